//! The ranks that a rank works with, by what they have in common.

use crate::Error;
use crate::config::{Config, ParallelConfig, hierarchical_groups};
use crate::model::parameters::Replicas;
use moe::dispatch::{Hierarchy, LeastLoaded};
use moe::plan::ExpertTopology;
use parallel::tensor::TensorParallel;
use parallel::{CommError, Communicator, GroupKind, Local, Mesh, Replication, World};
use parking_lot::Mutex;
use std::sync::Arc;

/// Those that the layers of one stage need.
pub struct ProcessGroups {
    /// They split every matrix.
    pub tensor: TensorParallel,
    /// They split every sequence.
    pub context: Arc<dyn Communicator>,
    /// They work on the same sequences: context x tensor.
    pub sequence: Arc<dyn Communicator>,
    /// They share out a layer's experts ...
    pub experts: Arc<dyn Communicator>,
    /// ... and where they are.
    pub topology: ExpertTopology,
    /// Parts in which tokens travel to experts.
    pub expert_chunks: usize,
    /// How full ranks lend experts, where they do.
    pub least_loaded: Option<LeastLoaded>,
    /// The expert ranks by node, where tokens go by way of nodes.
    pub hierarchy: Option<Hierarchy>,
    /// They hold the same parameters, by the number of [`crate::Replicas`].
    pub replications: Vec<Replication>,
    /// What of the optimizer's work they share out.
    pub zero: u8,
}

impl ProcessGroups {
    /// A rank that works alone.
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
            replications: vec![Replication::alone(); 4],
            zero: 0,
        }
    }

    /// Where `mesh` says, with the first and the last stage on the pipeline's ranks `ends`.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// When they cannot be joined, or nodes do not divide them.
    pub fn join(
        world: &World,
        mesh: &Mesh,
        config: &Config,
        ends: &[usize],
    ) -> Result<ProcessGroups, Error> {
        let moe = config.model.moe.as_ref();
        let per_node = config.parallel.ranks_per_node;
        let per_node = per_node.unwrap_or(world.ranks_per_node());
        let config = &config.parallel;
        let group = |name: &str, kind| world.group(name, &mesh.group(kind));
        let shape = mesh.shape();
        let mut replications = Vec::new();
        for (name, kind, replicas) in [
            ("dense gradients", GroupKind::DenseReplicas, Replicas::Dense),
            ("stage gradients", GroupKind::Stage, Replicas::Stage),
            (
                "expert gradients",
                GroupKind::ExpertReplicas,
                Replicas::Expert,
            ),
        ] {
            replications.push(replication(
                world,
                name,
                &mesh.group(kind),
                zero_group_size(mesh, config, replicas),
            )?);
        }
        // On ranks that have neither end nobody uses it.
        let at_end = ends.contains(&mesh.coordinates().pipeline) && ends.len() > 1;
        replications.push(if at_end {
            let size = zero_group_size(mesh, config, Replicas::TiedEmbedding);
            replication(
                world,
                "tied embedding",
                &mesh.dense_replicas_in_stages(ends),
                size,
            )?
        } else {
            Replication::alone()
        });
        let topology = ExpertTopology {
            slices: shape.expert_tensor,
            nodes: mesh.nodes(GroupKind::Expert, per_node),
        };
        let alone = topology.ranks() == 1;
        let nodes = topology.nodes.first() != topology.nodes.last();
        let least_loaded = match moe.filter(|moe| moe.dispatch.least_loaded() && !alone) {
            Some(moe) => {
                let nodes = if nodes {
                    topology.owner_nodes()
                } else {
                    Vec::new()
                };
                let planner = Arc::new(Mutex::new(moe.least_loaded.planner(nodes)));
                Some(LeastLoaded {
                    planner,
                    lending: group("lent experts", GroupKind::Expert)?,
                })
            }
            None => None,
        };
        let hierarchy = match moe.filter(|moe| moe.dispatch.hierarchical() && nodes) {
            Some(_) => {
                let split = hierarchical_groups(mesh, per_node).map_err(Error::Config)?;
                Some(Hierarchy {
                    intra_node: world.group("experts of a node", &split.intra_node)?,
                    inter_node: world.group("experts across nodes", &split.inter_node)?,
                })
            }
            None => None,
        };
        Ok(ProcessGroups {
            tensor: TensorParallel::new(group("tensor", GroupKind::Tensor)?, config.tensor_chunks),
            context: world.p2p_group("context", &mesh.group(GroupKind::Context))?,
            sequence: group("sequence", GroupKind::Sequence)?,
            experts: group("experts", GroupKind::Expert)?,
            // One rank has nobody to wait for.
            expert_chunks: if alone { 1 } else { config.expert_chunks },
            topology,
            least_loaded,
            hierarchy,
            replications,
            zero: config.zero,
        })
    }
}

/// How many neighbours among the replicas of a parameter share out its rows.
fn zero_group_size(mesh: &Mesh, config: &ParallelConfig, replicas: Replicas) -> usize {
    if config.zero == 0 {
        return 1;
    }
    let shape = mesh.shape();
    // A block of neighbours in a stage, whatever part of it they hold.
    let dense = config.zero_group_size.unwrap_or(shape.data * shape.context);
    let block = dense * shape.tensor;
    match replicas {
        Replicas::Dense | Replicas::TiedEmbedding => dense,
        Replicas::Stage => block,
        Replicas::Expert => gcd(
            mesh.expert_replicas(),
            (block / (shape.expert * shape.expert_tensor)).max(1),
        ),
    }
}

/// This rank among those that share out the rows of a parameter, and how many they are.
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
    let position = mesh
        .group(kind)
        .iter()
        .position(|&rank| rank == mesh.rank())
        .unwrap_or(0);
    (position % size, size)
}

/// Of `members`, which hold the same parameters, each `size` neighbours share out the rows.
fn replication(
    world: &World,
    name: &str,
    members: &[usize],
    size: usize,
) -> Result<Replication, CommError> {
    let position = members
        .iter()
        .position(|&rank| rank == world.rank())
        .expect("a rank is its own replica");
    let block = position / size * size;
    let across: Vec<usize> = members
        .iter()
        .copied()
        .skip(position % size)
        .step_by(size)
        .collect();
    Ok(Replication {
        shard_group: world.group(
            &format!("{name}, shared out"),
            &members[block..block + size],
        )?,
        replica_group: world.group(name, &across)?,
    })
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
