//! The groups of ranks that one rank works with, by what their members have in common.

use crate::{
    Error,
    config::{Config, MoeConfig, ParallelConfig, hierarchical_groups},
    model::replicas::Replicas,
};
use moe::{
    dispatch::{Hierarchy, LeastLoaded},
    lending::least_loaded::Planner,
    plan::ExpertTopology,
};
use parallel::{
    CommError, Communicator, GroupKind, Local, Mesh, Replication, World, tensor::TensorParallel,
};
use parking_lot::Mutex;
use std::sync::Arc;

/// Process groups of the layers of one stage.
pub struct ProcessGroups {
    /// Ranks that split every matrix.
    pub tensor: TensorParallel,
    /// Ranks that split every sequence.
    pub context: Arc<dyn Communicator>,
    /// Ranks that work on the same sequences: context x tensor.
    pub sequence: Arc<dyn Communicator>,
    /// Ranks that split the experts of a layer.
    pub experts: Arc<dyn Communicator>,
    /// Owners and nodes of the ranks in `experts`.
    pub topology: ExpertTopology,
    /// Number of chunks in which tokens are dispatched to experts.
    pub expert_chunks: usize,
    /// Planner and group for lending experts, with least-loaded dispatch.
    pub least_loaded: Option<LeastLoaded>,
    /// The expert ranks by node, with hierarchical dispatch.
    pub hierarchy: Option<Hierarchy>,
    /// Ranks that hold the same parameters, indexed by [`crate::Replicas`].
    pub replications: Vec<Replication>,
    /// Stage of ZeRO, 0 to 3.
    pub zero: u8,
}

impl ProcessGroups {
    /// Returns the groups of a rank that works alone.
    pub fn single_rank() -> ProcessGroups {
        let local: Arc<dyn Communicator> = Arc::new(Local::new(0, "alone"));
        ProcessGroups {
            tensor: TensorParallel::new(local.clone(), 1),
            context: local.clone(),
            sequence: local.clone(),
            experts: local,
            topology: ExpertTopology::on_one_node(1, 1),
            expert_chunks: 1,
            least_loaded: None,
            hierarchy: None,
            replications: vec![Replication::alone(); Replicas::ALL.len()],
            zero: 0,
        }
    }

    /// Creates the groups that `mesh` defines. A tied embedding has its first and last stage on the
    /// pipeline ranks `tied_ranks`.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If a group cannot be created, or nodes do not divide the expert ranks.
    pub fn join(
        world: &World,
        mesh: &Mesh,
        config: &Config,
        tied_ranks: &[usize],
    ) -> Result<ProcessGroups, Error> {
        let moe = config.model.moe.as_ref();
        let parallel = &config.parallel;
        let ranks_per_node = parallel.ranks_per_node.unwrap_or(world.ranks_per_node());
        let group = |name: &str, kind| world.group(name, &mesh.group(kind));
        let replications = replications(world, mesh, parallel, tied_ranks)?;
        let topology = ExpertTopology {
            slices: mesh.shape().expert_tensor,
            nodes: mesh.nodes(GroupKind::Expert, ranks_per_node),
        };
        let is_single = topology.ranks() == 1;
        let spans_nodes = topology.nodes.first() != topology.nodes.last();
        let least_loaded = match moe.filter(|moe| moe.dispatch.least_loaded() && !is_single) {
            Some(moe) => Some(LeastLoaded {
                planner: Arc::new(Mutex::new(planner(moe, &topology, spans_nodes))),
                lending: group("lent experts", GroupKind::Expert)?,
            }),
            None => None,
        };
        let is_hierarchical = moe.is_some_and(|moe| moe.dispatch.hierarchical());
        let hierarchy = if is_hierarchical && spans_nodes {
            Some(hierarchy(world, mesh, ranks_per_node)?)
        } else {
            None
        };
        let tensor = group("tensor", GroupKind::Tensor)?;
        Ok(ProcessGroups {
            tensor: TensorParallel::new(tensor, parallel.tensor_chunks),
            context: world.p2p_group("context", &mesh.group(GroupKind::Context))?,
            sequence: group("sequence", GroupKind::Sequence)?,
            experts: group("experts", GroupKind::Expert)?,
            // A single rank has no transfers to overlap.
            expert_chunks: if is_single { 1 } else { parallel.expert_chunks },
            topology,
            least_loaded,
            hierarchy,
            replications,
            zero: parallel.zero,
        })
    }
}

/// Creates the replica groups of each kind, in the order of [`Replicas::ALL`].
fn replications(
    world: &World,
    mesh: &Mesh,
    parallel: &ParallelConfig,
    tied_ranks: &[usize],
) -> Result<Vec<Replication>, CommError> {
    let mut replications = Vec::new();
    for replicas in Replicas::ALL {
        let name = match replicas {
            Replicas::Dense => "dense gradients",
            Replicas::Stage => "stage gradients",
            Replicas::Expert => "expert gradients",
            Replicas::TiedEmbedding => "tied embedding",
        };
        let ranks = replica_ranks(mesh, parallel, tied_ranks, replicas);
        let has_parameter = replicas != Replicas::TiedEmbedding || is_tied(mesh, tied_ranks);
        replications.push(if has_parameter {
            Replication {
                shard_group: world.group(&format!("{name}, sharded"), &ranks.shards)?,
                replica_group: world.group(name, &ranks.replicas)?,
                replica_ranks: ranks.replicas,
            }
        } else {
            Replication::alone()
        });
    }
    Ok(replications)
}

/// True if this rank holds the embedding together with ranks of another stage.
fn is_tied(mesh: &Mesh, tied_ranks: &[usize]) -> bool {
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

fn planner(moe: &MoeConfig, topology: &ExpertTopology, spans_nodes: bool) -> Planner {
    let nodes = if spans_nodes {
        topology.owner_nodes()
    } else {
        Vec::new()
    };
    moe.least_loaded.planner(nodes)
}

fn hierarchy(world: &World, mesh: &Mesh, ranks_per_node: usize) -> Result<Hierarchy, Error> {
    let split = hierarchical_groups(mesh, ranks_per_node).map_err(Error::Config)?;
    Ok(Hierarchy {
        intra_node: world.group("experts of a node", &split.intra_node)?,
        inter_node: world.group("experts across nodes", &split.inter_node)?,
    })
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
