//! The ranks that hold the same parameters, as a pure function of mesh and configuration.

use crate::{config::ParallelConfig, model::replicas::Replicas};
use parallel::{GroupKind, Mesh};

/// True if this rank holds the embedding together with ranks of another stage.
pub(crate) fn is_tied(mesh: &Mesh, tied_ranks: &[usize]) -> bool {
    tied_ranks.contains(&mesh.coordinates().pipeline) && tied_ranks.len() > 1
}

/// The ranks that hold a parameter together with one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReplicaRanks {
    /// Ranks that shard its rows, in the order of the rows.
    pub(crate) shards: Vec<usize>,
    /// Ranks that have the same rows.
    pub(crate) replicas: Vec<usize>,
}

/// Returns the ranks that hold a parameter together with this one. Each `zero_group_size` neighbors
/// among those that hold the same parameter shard its rows. A rank without a tied embedding is
/// alone with it.
pub(crate) fn replica_ranks(
    mesh: &Mesh,
    parallel: &ParallelConfig,
    tied_ranks: &[usize],
    replicas: Replicas,
) -> ReplicaRanks {
    let members = match replicas {
        Replicas::Dense => mesh.group(GroupKind::DenseReplicas),
        Replicas::Stage => mesh.group(GroupKind::Stage),
        Replicas::Expert => mesh.group(GroupKind::ExpertReplicas),
        Replicas::TiedEmbedding if is_tied(mesh, tied_ranks) => {
            mesh.dense_replicas_in_stages(tied_ranks)
        }
        Replicas::TiedEmbedding => {
            let alone = vec![mesh.rank()];
            return ReplicaRanks {
                shards: alone.clone(),
                replicas: alone,
            };
        }
    };
    let size = zero_group_size(mesh, parallel, replicas);
    let position = members
        .iter()
        .position(|&rank| rank == mesh.rank())
        .expect("a rank is its own replica");
    let block = position / size * size;
    let same_shard = members.iter().copied().skip(position % size).step_by(size);
    ReplicaRanks {
        shards: members[block..block + size].to_vec(),
        replicas: same_shard.collect(),
    }
}

/// Returns how many neighboring replicas of a parameter shard its rows.
fn zero_group_size(mesh: &Mesh, config: &ParallelConfig, replicas: Replicas) -> usize {
    if config.zero == 0 {
        return 1;
    }
    let shape = mesh.shape();
    let dense = config.zero_group_size.unwrap_or(shape.data * shape.context);
    // Neighboring ranks of a stage, whatever part of it they hold.
    let block = dense * shape.tensor;
    match replicas {
        Replicas::Dense | Replicas::TiedEmbedding => dense,
        Replicas::Stage => block,
        Replicas::Expert => {
            let owners = block / (shape.expert * shape.expert_tensor);
            gcd(mesh.expert_replicas(), owners.max(1))
        }
    }
}

/// Returns the index of this rank among those that shard the rows of a parameter, and their number.
pub(crate) fn zero_rank_and_size(
    mesh: &Mesh,
    config: &ParallelConfig,
    replicas: Replicas,
) -> (usize, usize) {
    let kind = match replicas {
        Replicas::Dense | Replicas::TiedEmbedding => GroupKind::DenseReplicas,
        Replicas::Stage => GroupKind::Stage,
        Replicas::Expert => GroupKind::ExpertReplicas,
    };
    let size = zero_group_size(mesh, config, replicas);
    (mesh.position(kind) % size, size)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
