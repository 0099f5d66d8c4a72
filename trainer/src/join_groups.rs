//! Creation of the process groups that a mesh and a configuration define.

use crate::{
    Error,
    config::{Config, MoeConfig, ParallelConfig, hierarchical_groups},
    model::replicas::Replicas,
    process_groups::ProcessGroups,
    replica_ranks::{is_tied, replica_ranks},
};
use moe::{
    dispatch::{Hierarchy, LeastLoaded},
    lending::least_loaded::Planner,
    plan::ExpertTopology,
};
use parallel::{CommError, GroupKind, Mesh, Replication, World, tensor::TensorParallel};
use parking_lot::Mutex;
use std::sync::Arc;

/// Creates the groups that `mesh` defines. A tied embedding has its first and last stage on the
/// pipeline ranks `tied_ranks`.
///
/// # Collective
/// All ranks.
///
/// # Errors
/// If a group cannot be created, or nodes do not divide the expert ranks.
pub(crate) fn join_groups(
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
