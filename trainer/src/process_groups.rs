//! The groups of ranks that one rank works with, by what their members have in common.

use crate::model::replicas::Replicas;
use moe::{
    dispatch::{Hierarchy, LeastLoaded},
    plan::ExpertTopology,
};
use parallel::{Communicator, Local, Replication, tensor::TensorParallel};
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
}
