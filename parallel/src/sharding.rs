//! Sharded weights: each rank keeps some rows and gathers the others for its layers.
//!
//! This is ZeRO (arXiv 1910.02054). A weight is a matrix whose rows are all dimensions but the
//! last; ranks keep consecutive rows. One all-gather transfers all members of a [`ShardedWeights`].

use crate::{
    CommError, Communicator, Weight, Work,
    rows::{matrix_shape, own_rows},
};
use parking_lot::Mutex;
use std::sync::Arc;
use tch::Tensor;
use torch_ext::{Error, attach_backward};

/// A unit: weights that layers need at the same time.
pub struct ShardedWeights {
    group: Arc<dyn Communicator>,
    /// True if values stay after use (ZeRO-1 and 2).
    keep: bool,
    state: Mutex<GatherState>,
}

struct Member {
    weight: Weight,
    /// `[own rows, columns]`, which the optimizer updates in place.
    own_rows: Tensor,
}

impl Member {
    /// Returns the number of elements that each rank sends, padded to that of the first rank.
    fn shard_len(&self, ranks: usize) -> i64 {
        let (rows, cols) = matrix_shape(self.weight.shape());
        own_rows(rows, 0, ranks).end * cols
    }
}

struct PendingGather {
    work: Work,
    /// The padded shards of all ranks, one after the other.
    gathered: Tensor,
}

struct GatherState {
    members: Vec<Member>,
    /// True if the values are present and match the ranks' rows.
    current: bool,
    /// Number of layers that use the values now.
    users: usize,
    gathering: Option<PendingGather>,
}

impl ShardedWeights {
    /// Creates a unit from weights and this rank's rows `[own rows, columns]` of each.
    ///
    /// The other ranks of `group` have the other rows. With `keep` the values are present from the
    /// beginning and stay.
    pub fn new(
        members: Vec<(Weight, Tensor)>,
        group: Arc<dyn Communicator>,
        keep: bool,
    ) -> ShardedWeights {
        let member = |(weight, own_rows)| Member { weight, own_rows };
        let state = GatherState {
            members: members.into_iter().map(member).collect(),
            current: keep,
            users: 0,
            gathering: None,
        };
        ShardedWeights {
            group,
            keep,
            state: Mutex::new(state),
        }
    }

    /// Records that ranks have changed their rows, so that the next use gathers them again.
    pub fn mark_stale(&self) {
        self.state.lock().current = false;
    }

    /// Starts to gather values that are not present, so that [`ShardedWeights::gather`] waits less.
    ///
    /// # Collective
    /// All ranks of the group.
    ///
    /// # Errors
    /// If the gather cannot be started.
    pub fn prefetch(&self) -> Result<(), CommError> {
        let mut state = self.state.lock();
        if !state.current && state.gathering.is_none() {
            state.gathering = Some(self.start(&state.members)?);
        }
        Ok(())
    }

    /// Makes the values present until the matching [`ShardedWeights::release`].
    ///
    /// # Collective
    /// All ranks of the group.
    ///
    /// # Errors
    /// If the gather fails.
    pub fn gather(&self) -> Result<(), CommError> {
        self.prefetch()?;
        let mut state = self.state.lock();
        state.users += 1;
        if let Some(PendingGather { work, gathered }) = state.gathering.take() {
            work.wait()?;
            self.unpack(&state.members, &gathered);
            state.current = true;
        }
        Ok(())
    }

    /// Ends one use of the values; the last one frees them unless they are kept.
    pub fn release(&self) {
        let mut state = self.state.lock();
        state.users = state.users.saturating_sub(1);
        if state.users == 0 && !self.keep {
            state.current = false;
            for member in &state.members {
                member.weight.set_value(None);
            }
        }
    }

    fn start(&self, members: &[Member]) -> Result<PendingGather, CommError> {
        let ranks = self.group.size();
        let Some(first) = members.first() else {
            return Ok(PendingGather {
                work: Work::done(),
                gathered: Tensor::new(),
            });
        };
        let options = (first.weight.kind(), first.weight.device());
        let total = members
            .iter()
            .map(|member| member.shard_len(ranks))
            .sum::<i64>();
        tch::no_grad(|| {
            let own = Tensor::zeros([total], options);
            let mut offset = 0;
            for member in members {
                let rows = member.own_rows.reshape([-1]);
                own.narrow(0, offset, rows.numel() as i64).copy_(&rows);
                offset += member.shard_len(ranks);
            }
            let gathered = Tensor::empty([total * ranks as i64], options);
            let work = self.group.all_gather(&gathered, &own)?;
            Ok(PendingGather { work, gathered })
        })
    }

    /// Sets each weight's value from the rows of all ranks.
    fn unpack(&self, members: &[Member], gathered: &Tensor) {
        let ranks = self.group.size();
        tch::no_grad(|| {
            let by_rank = gathered.view([ranks as i64, -1]);
            let mut offset = 0;
            for member in members {
                let weight = &member.weight;
                let (rows, cols) = matrix_shape(weight.shape());
                let part = |rank: usize| {
                    let own = own_rows(rows, rank, ranks);
                    let len = own.end - own.start;
                    let shard = by_rank.get(rank as i64);
                    shard.narrow(0, offset, len * cols).view([len, cols])
                };
                let parts: Vec<Tensor> = (0..ranks).map(part).collect();
                if self.keep {
                    let _ = Tensor::cat_out(&weight.value().view([rows, cols]), &parts, 0);
                } else {
                    weight.set_value(Some(Tensor::cat(&parts, 0).view(weight.shape())));
                }
                offset += member.shard_len(ranks);
            }
        });
    }
}

/// Returns `x`; in backward, `hook` runs before its gradient is passed on.
///
/// # Errors
/// libtorch's message.
pub fn before_backward<F>(x: &Tensor, hook: F) -> Result<Tensor, Error>
where
    F: Fn() -> Result<(), CommError> + Send + 'static,
{
    let out = tch::no_grad(|| x.detach());
    let mut outputs = attach_backward(&[x], vec![out], move |grads| {
        hook()?;
        Ok(vec![grads[0].as_ref().map(Tensor::shallow_clone)])
    })?;
    Ok(outputs.remove(0))
}
