//! Descriptions of parameters: their global shape, how ranks split them, and their role.
//!
//! A block describes each of its parameters once. The weights of a rank, the number of parameters,
//! the plan of memory, the names in a checkpoint, weight decay and learning-rate factors all follow
//! from these descriptions.

pub(crate) use super::role::Role;
use super::{position::ShardPosition, replicas::Replicas, share::Share, slices::slice};
use checkpoint::TensorSlice;
use std::ops::Range;

/// A dimension of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dim {
    /// Size over all ranks.
    pub(crate) size: u64,
    /// The configuration's key, or product of keys, that is the size.
    pub(crate) key: Option<&'static str>,
}

impl Dim {
    pub(crate) fn new(key: &'static str, size: u64) -> Dim {
        Dim {
            size,
            key: Some(key),
        }
    }

    /// Returns the width of the residual stream.
    pub(crate) fn hidden(width: usize) -> Dim {
        Dim::new("model.hidden", width as u64)
    }

    /// Returns a dimension whose size follows from that of another.
    pub(crate) fn derived(size: u64) -> Dim {
        Dim { size, key: None }
    }
}

/// Matrices of one parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stack {
    /// The parameter is the vector or matrix itself.
    Single,
    /// One matrix, with a dimension of 1 before its own, for grouped GEMMs.
    GroupOfOne,
    /// A matrix for each of this many experts, which the expert-parallel ranks divide.
    Experts(u64),
}

/// Division of each matrix of a parameter among ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Split {
    /// All ranks of the stage hold the whole.
    Whole,
    /// Tensor-parallel ranks hold equal parts of a dimension.
    Tensor(SplitDim),
    /// Expert-tensor-parallel ranks hold equal parts of a dimension.
    ExpertTensor(SplitDim),
    /// Ranks that share the vocabulary hold rows, as evenly as possible.
    Vocabulary,
}

/// A dimension that ranks divide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SplitDim {
    /// Index of the dimension.
    pub(crate) dim: usize,
    /// Equal units of the dimension that stay whole, such as heads. If the ranks do not divide
    /// their number, all ranks hold the whole.
    pub(crate) units: u64,
    /// Matrices that follow each other in the dimension. Each rank holds a part of each.
    pub(crate) fused: u64,
}

/// One parameter of the model, whatever the layout.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ParamSpec {
    /// Global name of the block; empty for parameters outside the layers.
    pub(crate) block: String,
    /// Name within the block, or within one expert of it.
    pub(crate) part: &'static str,
    /// Global shape of each matrix.
    pub(crate) dims: Vec<Dim>,
    pub(crate) stack: Stack,
    pub(crate) split: Split,
    pub(crate) role: Role,
    /// True if the matrix writes to the residual stream, which makes its initial values smaller.
    pub(crate) writes_residual: bool,
}

impl Split {
    /// Returns the division of a dimension whose equal parts are this many heads.
    pub(crate) fn heads(dim: usize, heads: u64) -> Split {
        Split::Tensor(SplitDim {
            dim,
            units: heads,
            fused: 1,
        })
    }
}

impl ParamSpec {
    /// Describes a single vector or matrix that does not write to the residual stream.
    pub(crate) fn single(
        block: &str,
        part: &'static str,
        dims: &[Dim],
        split: Split,
        role: Role,
    ) -> ParamSpec {
        ParamSpec {
            block: block.to_string(),
            part,
            dims: dims.to_vec(),
            stack: Stack::Single,
            split,
            role,
            writes_residual: false,
        }
    }

    /// Returns true for the operands of GEMMs.
    pub(crate) fn is_matrix(&self) -> bool {
        self.role.decays()
    }

    /// Returns the global name of the matrix of `expert`, which counts for stacks of experts only.
    pub(crate) fn name(&self, expert: usize) -> String {
        let ParamSpec { block, part, .. } = self;
        match self.stack {
            Stack::Experts(_) => format!("{block}.experts.{expert}.{part}"),
            _ if block.is_empty() => part.to_string(),
            _ => format!("{block}.{part}"),
        }
    }

    /// Returns the global name of the parameter, without the number of an expert.
    pub(crate) fn parameter_name(&self) -> String {
        match self.stack {
            Stack::Experts(_) => format!("{}.experts.{}", self.block, self.part),
            Stack::Single | Stack::GroupOfOne => self.name(0),
        }
    }

    /// Returns the number of matrices.
    pub(crate) fn matrices(&self) -> u64 {
        match self.stack {
            Stack::Single | Stack::GroupOfOne => 1,
            Stack::Experts(experts) => experts,
        }
    }

    /// Returns the elements of one matrix. Largest sizes exceed 64 bits.
    pub(crate) fn elements_per_matrix(&self) -> u128 {
        self.dims.iter().map(|dim| dim.size as u128).product()
    }

    /// Returns the elements of all matrices.
    pub(crate) fn elements(&self) -> u128 {
        self.matrices() as u128 * self.elements_per_matrix()
    }

    /// Returns the elements that a token uses which visits `experts` experts.
    pub(crate) fn active_elements(&self, experts: u64) -> u128 {
        match self.stack {
            Stack::Single | Stack::GroupOfOne => self.elements(),
            Stack::Experts(_) => experts as u128 * self.elements_per_matrix(),
        }
    }

    /// Returns the global shape of each matrix.
    pub(crate) fn shape(&self) -> Vec<i64> {
        self.dims.iter().map(|dim| dim.size as i64).collect()
    }

    /// Returns the dimension in which matrices follow each other, and their number.
    pub(crate) fn fused(&self) -> SplitDim {
        match self.split {
            Split::Tensor(split) | Split::ExpertTensor(split) => split,
            Split::Whole | Split::Vocabulary => SplitDim {
                dim: 0,
                units: 1,
                fused: 1,
            },
        }
    }

    /// Returns the rows and columns of each matrix, of which several may follow each other in the
    /// tensor. A vector has one column.
    pub(crate) fn matrix_shape(&self) -> [i64; 2] {
        let mut shape = self.shape();
        shape.resize(2, 1);
        let SplitDim { dim, fused, .. } = self.fused();
        shape[dim] /= fused as i64;
        [shape[0], shape[1]]
    }

    /// Returns the ranks that hold the same values.
    pub(crate) fn replicas(&self, position: &ShardPosition) -> Replicas {
        match self.split {
            Split::Whole => Replicas::Stage,
            Split::Tensor(split) if split.divides(position.tensor) => Replicas::Dense,
            Split::Tensor(_) => Replicas::Stage,
            Split::ExpertTensor(_) => Replicas::Expert,
            Split::Vocabulary => position.vocabulary_replicas,
        }
    }

    /// Returns the shape of a rank's tensor.
    pub(crate) fn local_shape(&self, position: &ShardPosition) -> Vec<i64> {
        let mut shape = self.shape();
        if let Some(own) = self.own_part(position) {
            shape[own.dim] = own.ranges().map(|range| range.end - range.start).sum();
        }
        match self.stack {
            Stack::Single => shape,
            Stack::GroupOfOne => [vec![1], shape].concat(),
            Stack::Experts(experts) => {
                let local = experts as i64 / position.expert.ranks as i64;
                // Vectors are columns, so that their elements are rows of the parameter.
                let column = if shape.len() == 1 { vec![1] } else { vec![] };
                [vec![local], shape, column].concat()
            }
        }
    }

    /// Returns the experts of a rank before any is moved, or 0 alone without experts.
    pub(crate) fn own_experts(&self, position: &ShardPosition) -> Range<usize> {
        match self.stack {
            Stack::Single | Stack::GroupOfOne => 0..1,
            Stack::Experts(experts) => {
                let local = experts as usize / position.expert.ranks;
                position.expert.rank * local..(position.expert.rank + 1) * local
            }
        }
    }

    /// Returns the global slices that the rows of a rank's tensor are, in order, if it holds the
    /// matrices of `experts`.
    pub(crate) fn slices(&self, position: &ShardPosition, experts: &[usize]) -> Vec<TensorSlice> {
        let own = self.own_part(position);
        let shape = self.shape();
        let of_expert = |&expert: &usize| {
            let name = self.name(expert);
            match &own {
                None => vec![TensorSlice::whole(name, &shape)],
                Some(own) => own
                    .ranges()
                    .map(|range| slice(&name, &shape, own.dim, &range))
                    .collect(),
            }
        };
        experts.iter().flat_map(of_expert).collect()
    }

    /// Returns the part of each matrix that a rank holds; `None` if it holds the whole.
    fn own_part(&self, position: &ShardPosition) -> Option<OwnPart> {
        let equal_part = |split: SplitDim, share: Share| {
            let per_matrix = self.dims[split.dim].size / split.fused;
            let is_split = share.ranks > 1 && split.divides(share);
            is_split.then(|| OwnPart {
                dim: split.dim,
                first: share.part(per_matrix as usize),
                stride: per_matrix as i64,
                count: split.fused as i64,
            })
        };
        match self.split {
            Split::Whole => None,
            Split::Tensor(split) => equal_part(split, position.tensor),
            Split::ExpertTensor(split) => equal_part(split, position.expert_tensor),
            Split::Vocabulary => Some(OwnPart {
                dim: 0,
                first: position.vocabulary.part(self.dims[0].size as usize),
                stride: 0,
                count: 1,
            }),
        }
    }
}

impl SplitDim {
    fn divides(&self, share: Share) -> bool {
        self.units.is_multiple_of(share.ranks as u64)
    }
}

/// Ranges of equal length in one dimension.
struct OwnPart {
    dim: usize,
    first: Range<usize>,
    /// Distance between the starts of two ranges.
    stride: i64,
    count: i64,
}

impl OwnPart {
    fn ranges(&self) -> impl Iterator<Item = Range<i64>> {
        let start = self.first.start as i64;
        let end = self.first.end as i64;
        (0..self.count).map(move |index| start + index * self.stride..end + index * self.stride)
    }
}
