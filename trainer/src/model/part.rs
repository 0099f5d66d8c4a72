//! Which part of a model a rank holds.

use parallel::pipeline::{Placement, stage_at};
use std::ops::Range;

/// Some layers, and what lies at the ends of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagePart {
    /// The layers, by their numbers in the model.
    pub layers: Range<usize>,
    /// Whether it begins the model.
    pub first: bool,
    /// Whether it ends it.
    pub last: bool,
}

/// A rank's number among those that share the vocabulary out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VocabularyShard {
    /// This one.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
}

impl VocabularyShard {
    /// Its rows of `vocab`: as even as possible.
    pub fn rows(self, vocab: usize) -> Range<usize> {
        vocab * self.rank / self.ranks..vocab * (self.rank + 1) / self.ranks
    }
}

/// The part of a model that one rank holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPart {
    /// Its stages, one for each chunk.
    pub stages: Vec<StagePart>,
    /// Its share of the embedding and the output layer, where all ranks of the pipeline have one; otherwise those of the
    /// first and the last stage share them out.
    pub vocabulary: Option<VocabularyShard>,
}

impl ModelPart {
    /// A whole model on one rank.
    pub fn whole(layers: usize) -> ModelPart {
        ModelPart {
            stages: vec![StagePart {
                layers: 0..layers,
                first: true,
                last: true,
            }],
            vocabulary: None,
        }
    }

    /// Rank `rank` of a pipeline whose stages have `layers` layers each. A vocabulary that is shared out is so over the
    /// pipeline's ranks times those that split matrices, `tensor`: this one among how many.
    pub fn for_rank(
        (rank, ranks): (usize, usize),
        placement: Placement,
        layers: &[usize],
        vocabulary_shared: bool,
        tensor: (usize, usize),
    ) -> ModelPart {
        let stage = |chunk| {
            let stage = stage_at(placement, ranks, rank, chunk);
            let start = layers[..stage].iter().sum::<usize>();
            StagePart {
                layers: start..start + layers[stage],
                first: stage == 0,
                last: stage + 1 == layers.len(),
            }
        };
        let stages = (0..layers.len() / ranks).map(stage).collect();
        let shard = VocabularyShard {
            rank: rank * tensor.1 + tensor.0,
            ranks: ranks * tensor.1,
        };
        ModelPart {
            stages,
            vocabulary: vocabulary_shared.then_some(shard),
        }
    }

    /// Whether it begins the model.
    pub fn has_first(&self) -> bool {
        self.stages.iter().any(|stage| stage.first)
    }

    /// Whether it ends the model.
    pub fn has_last(&self) -> bool {
        self.stages.iter().any(|stage| stage.last)
    }
}

/// Layers of each stage so that the longest stage is as short as possible, where the first stage has `first` layers' worth
/// of work besides and the last `last`; of equal solutions the one with the fewest layers at the end.
pub fn split_layers(layers: usize, stages: usize, first: f64, last: f64) -> Vec<usize> {
    let extra = |stage: usize| {
        (if stage == 0 { first } else { 0.0 }) + if stage + 1 == stages { last } else { 0.0 }
    };
    let mut split = vec![0; stages];
    for _ in 0..layers {
        // One layer more to the stage that is then the shortest.
        let cost = |stage: usize| split[stage] as f64 + extra(stage);
        let least = (0..stages).min_by(|&a, &b| cost(a).total_cmp(&cost(b)).then(a.cmp(&b)));
        split[least.expect("there is a stage")] += 1;
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
        // The vocabulary parallelism paper's last stage: 4, 3, 2 and 0 of 32 layers, for outputs of 0.6 to 4.8 layers.
        assert_eq!(split_layers(32, 8, 0.0, 4.8)[7], 0);
        assert_eq!(split_layers(32, 8, 0.0, 2.4)[7], 2);
        assert_eq!(split_layers(32, 8, 0.0, 0.6)[7], 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn no_layer_moved_would_make_the_longest_stage_shorter(
            layers in 0usize..80, stages in 1usize..17, first in 0.0f64..3.0, last in 0.0f64..8.0,
        ) {
            let split = split_layers(layers, stages, first, last);
            prop_assert_eq!(split.iter().sum::<usize>(), layers);
            let extra = |s: usize| if s == 0 { first } else { 0.0 } + if s + 1 == stages { last } else { 0.0 };
            let cost = |s: usize| split[s] as f64 + extra(s);
            let least = (0..stages).map(cost).fold(f64::INFINITY, f64::min);
            for stage in (0..stages).filter(|&stage| split[stage] > 0) {
                prop_assert!(cost(stage) <= least + 1.0 + 1e-9);
            }
        }

        #[test]
        fn every_layer_is_on_one_rank(ranks in 1usize..6, chunks in 1usize..4, layers in 0usize..40, turn in any::<bool>()) {
            let placement = if turn { Placement::V } else { Placement::Loop };
            let split = split_layers(layers, ranks * chunks, 0.0, 0.0);
            let parts: Vec<_> = (0..ranks).map(|r| ModelPart::for_rank((r, ranks), placement, &split, true, (0, 1))).collect();
            let mut seen: Vec<usize> = parts.iter().flat_map(|p| p.stages.iter().flat_map(|s| s.layers.clone())).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..layers).collect::<Vec<_>>());
            prop_assert_eq!(parts.iter().filter(|p| p.has_first()).count(), 1);
            prop_assert_eq!(parts.iter().filter(|p| p.has_last()).count(), 1);
            let rows: usize = parts.iter().map(|p| p.vocabulary.unwrap().rows(1001).len()).sum();
            prop_assert_eq!(rows, 1001);
        }
    }
}
