//! The part of a model that each rank holds.

use super::share::Share;
use parallel::pipeline::{Placement, stage_at};
use std::ops::Range;

/// Consecutive layers, possibly with an end of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagePart {
    /// Layers by their index in the model.
    pub layers: Range<usize>,
    /// True for the first stage of the model.
    pub first: bool,
    /// True for the last stage of the model.
    pub last: bool,
}

/// The part of a model that one rank holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPart {
    /// One stage per model chunk.
    pub stages: Vec<StagePart>,
    /// This rank's share of embedding and output layer, if all ranks of the pipeline have one.
    /// Otherwise the ranks of the first and of the last stage split them.
    pub vocabulary: Option<Share>,
}

/// The ends of the model that one rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ends {
    /// True if the rank embeds tokens.
    pub(crate) embedding: bool,
    /// True if the rank has the final norm.
    pub(crate) norm: bool,
    pub(crate) head: HeadWeight,
}

/// The weight of a rank's output layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadWeight {
    /// The rank has no output layer.
    None,
    /// The output layer's own.
    Own,
    /// That of the rank's embedding.
    Embedding,
    /// A copy of the embedding, which another rank embeds tokens with.
    EmbeddingCopy,
}

impl ModelPart {
    /// Returns the ends of the model on the rank. With `ties`, the embedding is also the output
    /// layer.
    pub(crate) fn ends(&self, ties: bool) -> Ends {
        let shares_vocabulary = self.vocabulary.is_some();
        let embedding = shares_vocabulary || self.has_first();
        let has_head = shares_vocabulary || self.has_last();
        Ends {
            embedding,
            norm: self.has_last(),
            head: match (has_head, ties, embedding) {
                (false, ..) => HeadWeight::None,
                (true, false, _) => HeadWeight::Own,
                (true, true, true) => HeadWeight::Embedding,
                (true, true, false) => HeadWeight::EmbeddingCopy,
            },
        }
    }

    /// Returns a whole model on one rank.
    pub fn whole(layers: usize) -> ModelPart {
        let stage = StagePart {
            layers: 0..layers,
            first: true,
            last: true,
        };
        ModelPart {
            stages: vec![stage],
            vocabulary: None,
        }
    }

    /// True if the rank has the first stage.
    pub fn has_first(&self) -> bool {
        self.stages.iter().any(|stage| stage.first)
    }

    /// True if the rank has the last stage.
    pub fn has_last(&self) -> bool {
        self.stages.iter().any(|stage| stage.last)
    }
}

/// A model split over the ranks of a pipeline.
#[derive(Debug, Clone, Copy)]
pub struct PipelineSplit<'a> {
    /// Ranks of the pipeline.
    pub ranks: usize,
    /// Stage of each model chunk.
    pub placement: Placement,
    /// Number of layers of each stage.
    pub layers: &'a [usize],
    /// True if all ranks share embedding and output layer (vocabulary parallelism).
    pub shares_vocabulary: bool,
    /// Tensor-parallel ranks of each stage.
    pub tensor_ranks: usize,
}

impl PipelineSplit<'_> {
    /// Returns the part of pipeline rank `rank` and tensor-parallel rank `tensor_rank`.
    ///
    /// A shared vocabulary is split over the pipeline's ranks times the tensor-parallel ranks.
    pub fn part(&self, rank: usize, tensor_rank: usize) -> ModelPart {
        let stage = |chunk| {
            let stage = stage_at(self.placement, self.ranks, rank, chunk);
            let start = self.layers[..stage].iter().sum::<usize>();
            StagePart {
                layers: start..start + self.layers[stage],
                first: stage == 0,
                last: stage + 1 == self.layers.len(),
            }
        };
        let chunks = self.layers.len() / self.ranks;
        let shard = Share {
            rank: rank * self.tensor_ranks + tensor_rank,
            ranks: self.ranks * self.tensor_ranks,
        };
        ModelPart {
            stages: (0..chunks).map(stage).collect(),
            vocabulary: self.shares_vocabulary.then_some(shard),
        }
    }
}

/// Returns the number of layers of each stage such that the longest stage is as short as possible.
///
/// The first and the last stage have additional work of `first` and `last` layers. Of equal
/// solutions it returns the one with the fewest layers at the end.
pub fn split_layers(layers: usize, stages: usize, first: f64, last: f64) -> Vec<usize> {
    let extra = |stage: usize| {
        let at_start = if stage == 0 { first } else { 0.0 };
        let at_end = if stage + 1 == stages { last } else { 0.0 };
        at_start + at_end
    };
    let mut split = vec![0; stages];
    for _ in 0..layers {
        let cost = |stage: usize| split[stage] as f64 + extra(stage);
        let shortest = (0..stages).min_by(|&a, &b| cost(a).total_cmp(&cost(b)).then(a.cmp(&b)));
        split[shortest.expect("there is a stage")] += 1;
    }
    split
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn layers_are_split_as_evenly_as_the_ends_allow() {
        assert_eq!(split_layers(3, 2, 0.0, 0.0), [2, 1]);
        // Layers of the last stage in the vocabulary parallelism paper: 4, 3, 2 and 0 of 32, for
        // output layers that cost 0.6 to 4.8 layers.
        assert_eq!(split_layers(32, 8, 0.0, 4.8)[7], 0);
        assert_eq!(split_layers(32, 8, 0.0, 2.4)[7], 2);
        assert_eq!(split_layers(32, 8, 0.0, 0.6)[7], 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn no_moved_layer_would_shorten_the_longest_stage(
            layers in 0usize..80,
            stages in 1usize..17,
            first in 0.0f64..3.0,
            last in 0.0f64..8.0,
        ) {
            let split = split_layers(layers, stages, first, last);
            prop_assert_eq!(split.iter().sum::<usize>(), layers);
            let extra = |s: usize| {
                let at_start = if s == 0 { first } else { 0.0 };
                let at_end = if s + 1 == stages { last } else { 0.0 };
                at_start + at_end
            };
            let cost = |s: usize| split[s] as f64 + extra(s);
            let least = (0..stages).map(cost).fold(f64::INFINITY, f64::min);
            for stage in (0..stages).filter(|&stage| split[stage] > 0) {
                prop_assert!(cost(stage) <= least + 1.0 + 1e-9);
            }
        }

        #[test]
        fn every_layer_is_on_one_rank(
            ranks in 1usize..6,
            chunks in 1usize..4,
            layers in 0usize..40,
            is_v: bool,
        ) {
            let layers_of_stage = split_layers(layers, ranks * chunks, 0.0, 0.0);
            let split = PipelineSplit {
                ranks,
                placement: if is_v { Placement::V } else { Placement::Loop },
                layers: &layers_of_stage,
                shares_vocabulary: true,
                tensor_ranks: 1,
            };
            let parts: Vec<_> = (0..ranks).map(|rank| split.part(rank, 0)).collect();
            let stages = parts.iter().flat_map(|part| &part.stages);
            let mut seen: Vec<usize> = stages.flat_map(|stage| stage.layers.clone()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..layers).collect::<Vec<_>>());
            prop_assert_eq!(parts.iter().filter(|part| part.has_first()).count(), 1);
            prop_assert_eq!(parts.iter().filter(|part| part.has_last()).count(), 1);
            let shards = parts.iter().map(|part| part.vocabulary.unwrap());
            prop_assert_eq!(shards.map(|shard| shard.part(1001).len()).sum::<usize>(), 1001);
        }
    }
}
