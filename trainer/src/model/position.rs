//! Position of a rank on the axes that split parameters.

use super::{part::ModelPart, replicas::Replicas, share::Share};
use crate::process_groups::ProcessGroups;
use parallel::Mesh;

/// Position of a rank on the axes that split parameters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ShardPosition {
    pub(crate) tensor: Share,
    /// Share of the experts, in whole ones.
    pub(crate) expert: Share,
    /// Share of each of these experts.
    pub(crate) expert_tensor: Share,
    /// Rows of embedding and output layer.
    pub(crate) vocabulary: Share,
    /// Ranks with the same rows of the vocabulary.
    pub(crate) vocabulary_replicas: Replicas,
}

impl ShardPosition {
    /// Returns the position of the rank that `mesh` belongs to.
    pub(crate) fn on_mesh(mesh: &Mesh) -> ShardPosition {
        let shape = mesh.shape();
        let at = mesh.coordinates();
        let share = |rank, ranks| Share { rank, ranks };
        ShardPosition::new(
            share(at.tensor, shape.tensor),
            share(at.expert, shape.expert),
            share(at.expert_tensor, shape.expert_tensor),
        )
    }

    /// Returns the position of the rank that `groups` belong to.
    pub(crate) fn in_groups(groups: &ProcessGroups) -> ShardPosition {
        // Neighboring ranks split the same experts.
        let slices = groups.topology.slices;
        let rank = groups.experts.rank();
        let share = |rank, ranks| Share { rank, ranks };
        ShardPosition::new(
            share(groups.tensor.rank(), groups.tensor.size()),
            share(rank / slices, groups.experts.size() / slices),
            share(rank % slices, slices),
        )
    }

    /// Returns the position of a rank that splits nothing.
    pub(crate) fn alone() -> ShardPosition {
        let whole = Share { rank: 0, ranks: 1 };
        ShardPosition::new(whole, whole, whole)
    }

    fn new(tensor: Share, expert: Share, expert_tensor: Share) -> ShardPosition {
        ShardPosition {
            tensor,
            expert,
            expert_tensor,
            vocabulary: tensor,
            vocabulary_replicas: Replicas::Dense,
        }
    }

    /// Returns the same position for a rank that holds `part` of the model. With `ties`, the
    /// embedding is also the output layer: on two ranks it is one parameter with replicas at both
    /// ends of the pipeline.
    pub(crate) fn with_part(self, ties: bool, part: &ModelPart) -> ShardPosition {
        let is_split = part.has_first() != part.has_last();
        let is_tied = ties && part.vocabulary.is_none() && is_split;
        ShardPosition {
            vocabulary: part.vocabulary.unwrap_or(self.tensor),
            vocabulary_replicas: if is_tied {
                Replicas::TiedEmbedding
            } else {
                Replicas::Dense
            },
            ..self
        }
    }
}
