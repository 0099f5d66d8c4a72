//! The rows of each parameter that the ranks of a stage update.
//!
//! They follow from mesh and configuration, so that each rank knows those of all others.

use crate::{
    Error,
    config::ParallelConfig,
    model::{position::ShardPosition, replicas::Replicas, slices::slices_of_rows, spec::ParamSpec},
    replica_ranks::zero_rank_and_size,
};
use checkpoint::TensorSlice;
use parallel::{GroupKind, Mesh, own_rows};

/// The ranks of a pipeline stage, in order.
pub(crate) struct StageLayout(Vec<StageRank>);

/// A rank's position among those that hold the parameters of a stage.
#[derive(Debug, Clone)]
pub(crate) struct StageRank {
    pub(crate) position: ShardPosition,
    /// Index among the ranks that shard the rows, and their number, for each of
    /// [`Replicas::ALL`].
    pub(crate) shards: [(usize, usize); Replicas::ALL.len()],
}

impl StageLayout {
    /// Derives the positions of the ranks in the stage of `mesh`.
    ///
    /// # Errors
    /// If the mesh does not fit the configuration.
    pub(crate) fn new(parallel: &ParallelConfig, mesh: &Mesh) -> Result<StageLayout, Error> {
        let shape = mesh.shape();
        let of_rank = |rank: usize| {
            let mesh = Mesh::new(shape, rank, mesh.size());
            let mesh = mesh.map_err(|error| Error::Config(error.to_string()))?;
            Ok(StageRank {
                position: ShardPosition::on_mesh(&mesh),
                shards: Replicas::ALL.map(|replicas| zero_rank_and_size(&mesh, parallel, replicas)),
            })
        };
        let ranks = mesh.group(GroupKind::Stage).into_iter().map(of_rank);
        Ok(StageLayout(ranks.collect::<Result<_, Error>>()?))
    }

    /// Returns the layout of a rank that works alone.
    pub(crate) fn alone() -> StageLayout {
        StageLayout(vec![StageRank {
            position: ShardPosition::alone(),
            shards: [(0, 1); Replicas::ALL.len()],
        }])
    }

    /// Returns the layout of these ranks.
    #[cfg(test)]
    pub(crate) fn of_ranks(ranks: Vec<StageRank>) -> StageLayout {
        StageLayout(ranks)
    }

    /// Returns the number of ranks.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns the number of owners of each MoE layer's experts.
    pub(crate) fn expert_owners(&self) -> usize {
        self.0[0].position.expert.ranks
    }

    /// Returns the global slices of `spec` that rank `rank` of the stage updates, in the order of
    /// its rows. `experts_by_slot` are the matrices in the physical slots of all ranks.
    pub(crate) fn slices(
        &self,
        rank: usize,
        spec: &ParamSpec,
        experts_by_slot: &[usize],
    ) -> Vec<TensorSlice> {
        let StageRank { position, shards } = &self.0[rank];
        let own = &experts_by_slot[spec.own_experts(position)];
        let slices = spec.slices(position, own);
        let rows = slices.iter().map(|slice| slice.shape[0]).sum();
        let (shard, count) = shards[spec.replicas(position) as usize];
        slices_of_rows(slices, &own_rows(rows, shard, count))
    }
}
