//! Rules from a tensor of the model to tensors of a folder: names, stacks, and the order of rows.

use crate::{config::ModelConfig, model::attention::HeadRows};

/// Prefix of the names of a folder's layers.
pub(crate) const LAYERS: &str = "model.layers";

/// The tensors of the folder that a tensor of the model consists of, one below the other in equal
/// parts. Several entries are alternatives: the importer takes the first of which the folder has
/// the tensors, the exporter the first.
pub(crate) type Rule = &'static [&'static [Source]];

/// Rules by the names of the model's tensors, without layer and expert: `attention.query`.
pub(crate) type Names = &'static [(&'static str, Rule)];

/// A tensor of the folder, and which of its rows a tensor of the model has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source {
    /// Name, in its layer if it has one, with `{expert}` for the number of the expert.
    pub(crate) name: &'static str,
    pub(crate) stack: Stack,
    /// True if the folder has the rows as columns.
    pub(crate) is_transposed: bool,
    pub(crate) order: RowOrder,
}

/// Matrices of a folder's tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stack {
    /// The tensor is the matrix or vector itself.
    None,
    /// The tensor has one for each expert.
    Experts,
    /// The tensor has one only, with a dimension of 1 before its own.
    One,
}

/// Order of the folder's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// That of the model.
    Same,
    /// The first half of the model's rows are the even ones, the second half the odd ones.
    Interleaved,
    /// The rows of each head that rotate together are neighbors, and not half the rotating rows
    /// apart.
    AdjacentPairs,
    /// As `AdjacentPairs`, and the rows of each head that rotate follow the others.
    AdjacentPairsLast,
    /// The rows of queries, keys and values follow each other in one tensor; these are its queries.
    FusedQueries,
    /// The keys of such a tensor.
    FusedKeys,
    /// The values of such a tensor.
    FusedValues,
}

/// Rows at equal distances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// First row in the tensor of the model, where they follow each other.
    pub(crate) ours: u64,
    /// First row in the tensor of the folder.
    pub(crate) theirs: u64,
    /// Distance of rows in the tensor of the folder.
    pub(crate) step: u64,
    pub(crate) count: u64,
}

/// Returns a tensor of the folder that has a tensor of the model as it is.
pub(crate) const fn named(name: &'static str) -> Source {
    Source {
        name,
        stack: Stack::None,
        is_transposed: false,
        order: RowOrder::Same,
    }
}

impl Source {
    /// The tensor has a matrix for each expert.
    pub(crate) const fn of_experts(self) -> Source {
        Source {
            stack: Stack::Experts,
            ..self
        }
    }

    /// The tensor has a dimension of 1 before its own.
    pub(crate) const fn in_stack_of_one(self) -> Source {
        Source {
            stack: Stack::One,
            ..self
        }
    }

    /// The tensor has the rows as columns.
    pub(crate) const fn transposed(self) -> Source {
        Source {
            is_transposed: true,
            ..self
        }
    }

    /// The tensor has the rows in this order.
    pub(crate) const fn ordered(self, order: RowOrder) -> Source {
        Source { order, ..self }
    }
}

/// Rows of a tensor of the model.
pub(crate) struct Rows<'a> {
    pub(crate) model: &'a ModelConfig,
    pub(crate) layer: usize,
    /// Name of the tensor in its block, such as `query`.
    pub(crate) part: &'a str,
    pub(crate) count: u64,
}

impl RowOrder {
    /// Returns the rows of the folder's tensor that are these rows of the model's.
    pub(crate) fn runs(self, rows: &Rows) -> Vec<Run> {
        match self {
            RowOrder::Same => vec![in_order(0, 0, rows.count)],
            RowOrder::Interleaved => {
                let half = rows.count / 2;
                vec![every_second(0, 0, half), every_second(half, 1, half)]
            }
            RowOrder::AdjacentPairs => {
                let heads = rows.heads();
                let rotary = heads.rotary.start;
                heads.each(|first, heads| heads.adjacent_pairs(first, first + rotary, first))
            }
            RowOrder::AdjacentPairsLast => {
                let heads = rows.heads();
                let rest = heads.width - (heads.rotary.end - heads.rotary.start);
                heads.each(|first, heads| heads.adjacent_pairs(first, first + rest, first))
            }
            RowOrder::FusedQueries => vec![in_order(0, 0, rows.count)],
            RowOrder::FusedKeys => vec![in_order(0, rows.rows_of("query"), rows.count)],
            RowOrder::FusedValues => {
                let before = rows.rows_of("query") + rows.rows_of("key");
                vec![in_order(0, before, rows.count)]
            }
        }
    }
}

impl Rows<'_> {
    fn heads(&self) -> HeadRows {
        let attention = self.model.attention(self.layer);
        let rotary = self.model.rope.width(attention.rotary_part().width) as u64;
        let heads = attention.head_rows(self.part, rotary);
        heads.expect("the order of heads is that of a tensor with heads")
    }

    /// Returns the rows of another matrix of the attention block.
    fn rows_of(&self, part: &str) -> u64 {
        let specs = self.model.attention(self.layer).specs("");
        let spec = specs.iter().find(|spec| spec.part == part);
        spec.map_or(0, |spec| spec.dims[0].size)
    }
}

impl HeadRows {
    /// Returns the runs of each head. `runs` gets the first row of a head.
    fn each(&self, runs: impl Fn(u64, &HeadRows) -> Vec<Run>) -> Vec<Run> {
        let heads = (0..self.heads).flat_map(|head| runs(head * self.width, self));
        heads.collect()
    }

    /// Returns the runs of a head whose first row is `ours`, if the folder's rotating rows begin at
    /// `rotary`, in pairs, and the others follow each other from `rest` on.
    fn adjacent_pairs(&self, ours: u64, rotary: u64, rest: u64) -> Vec<Run> {
        let half = (self.rotary.end - self.rotary.start) / 2;
        let start = ours + self.rotary.start;
        let mut runs = vec![
            every_second(start, rotary, half),
            every_second(start + half, rotary + 1, half),
        ];
        let before = self.rotary.start;
        let after = self.width - self.rotary.end;
        // Rows of the folder after those before the rotating ones, which may lie between.
        let skipped = if rotary == rest + before { 2 * half } else { 0 };
        runs.push(in_order(ours, rest, before));
        runs.push(in_order(start + 2 * half, rest + before + skipped, after));
        runs.retain(|run| run.count > 0);
        runs
    }
}

fn in_order(ours: u64, theirs: u64, count: u64) -> Run {
    Run {
        ours,
        theirs,
        step: 1,
        count,
    }
}

fn every_second(ours: u64, theirs: u64, count: u64) -> Run {
    Run {
        ours,
        theirs,
        step: 2,
        count,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the folder's row of each row of the model.
    fn rows(runs: &[Run], count: usize) -> Vec<u64> {
        let mut rows = vec![u64::MAX; count];
        for run in runs {
            for index in 0..run.count {
                rows[(run.ours + index) as usize] = run.theirs + index * run.step;
            }
        }
        rows
    }

    #[test]
    fn rotating_rows_are_pairs_in_the_folder() {
        let heads = HeadRows {
            heads: 2,
            width: 6,
            rotary: 0..4,
        };
        let same_place = heads.each(|first, heads| heads.adjacent_pairs(first, first, first));
        assert_eq!(
            rows(&same_place, 12),
            [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]
        );
        let last = heads.each(|first, heads| heads.adjacent_pairs(first, first + 2, first));
        assert_eq!(rows(&last, 12), [2, 4, 3, 5, 0, 1, 8, 10, 9, 11, 6, 7]);
        let latent_and_key = HeadRows {
            heads: 1,
            width: 7,
            rotary: 3..7,
        };
        let last = latent_and_key.adjacent_pairs(0, 3, 0);
        assert_eq!(rows(&last, 7), [0, 1, 2, 3, 5, 4, 6]);
    }
}
