//! Weights of which each rank keeps some rows, gathered when layers need them (ZeRO, arXiv 1910.02054).
//!
//! A weight is seen as a matrix, all dims but the last as rows; ranks keep consecutive rows, as many each, the last ones
//! fewer. Members of one [`ShardedWeights`] travel together, in one all-gather.

use crate::gradients::matrix_shape;
use crate::{CommError, Communicator, Weight, Work};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use tch::Tensor;
use torch_ext::{Error, attach_backward};

/// The rows, of `rows`, that rank `rank` of `ranks` keeps.
pub fn own_rows(rows: i64, rank: usize, ranks: usize) -> Range<i64> {
    let each = (rows + ranks as i64 - 1) / ranks as i64;
    (each * rank as i64).min(rows)..(each * (rank as i64 + 1)).min(rows)
}

/// Weights that are needed at the same time.
pub struct ShardedWeights {
    group: Arc<dyn Communicator>,
    /// Whether values stay when no layer needs them (ZeRO-1 and 2).
    keep: bool,
    state: Mutex<GatherState>,
}

struct GatherState {
    /// With this rank's rows.
    members: Vec<(Weight, Tensor)>,
    /// Whether the values are there and as ranks keep them.
    current: bool,
    /// Layers at work with the values.
    users: usize,
    gathering: Option<(Work, Tensor)>,
}

impl ShardedWeights {
    /// Weights with the rows `[own rows, columns]` that this rank keeps of each; the ranks of `group` have the others. With
    /// `keep` the values are there from the beginning and stay.
    pub fn new(
        members: Vec<(Weight, Tensor)>,
        group: Arc<dyn Communicator>,
        keep: bool,
    ) -> ShardedWeights {
        let state = GatherState {
            members,
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

    /// Says that ranks have changed their rows.
    pub fn mark_stale(&self) {
        self.lock().current = false;
    }

    /// Starts to gather what is not there, so that [`ShardedWeights::gather`] need not wait as long.
    ///
    /// # Collective
    /// All ranks of the group.
    ///
    /// # Errors
    /// When the gather cannot be started.
    pub fn prefetch(&self) -> Result<(), CommError> {
        let mut state = self.lock();
        if !state.current && state.gathering.is_none() {
            state.gathering = Some(self.start(&state.members)?);
        }
        Ok(())
    }

    /// Makes the values be there until [`ShardedWeights::release`] has been called as often.
    ///
    /// # Collective
    /// All ranks of the group.
    ///
    /// # Errors
    /// When the gather fails.
    pub fn gather(&self) -> Result<(), CommError> {
        self.prefetch()?;
        let mut state = self.lock();
        state.users += 1;
        if let Some((work, all)) = state.gathering.take() {
            work.wait()?;
            self.unpack(&state.members, &all);
            state.current = true;
        }
        Ok(())
    }

    /// Says that a layer needs the values no longer.
    pub fn release(&self) {
        let mut state = self.lock();
        state.users = state.users.saturating_sub(1);
        if state.users == 0 && !self.keep {
            state.current = false;
            state
                .members
                .iter()
                .for_each(|(weight, _)| weight.set_value(None));
        }
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, GatherState> {
        self.state.lock()
    }

    /// Elements that each rank sends of a weight.
    fn share(&self, weight: &Weight) -> i64 {
        let (rows, cols) = matrix_shape(weight.shape());
        own_rows(rows, 0, self.group.size()).end * cols
    }

    fn start(&self, members: &[(Weight, Tensor)]) -> Result<(Work, Tensor), CommError> {
        tch::no_grad(|| {
            let total: i64 = members.iter().map(|(weight, _)| self.share(weight)).sum();
            let Some((first, _)) = members.first() else {
                return Ok((Work::done(), Tensor::new()));
            };
            let options = (first.kind(), first.device());
            let own = Tensor::zeros([total], options);
            let mut offset = 0;
            for (weight, rows) in members {
                own.narrow(0, offset, rows.numel() as i64)
                    .copy_(&rows.reshape([-1]));
                offset += self.share(weight);
            }
            let all = Tensor::empty([total * self.group.size() as i64], options);
            Ok((self.group.all_gather(&all, &own)?, all))
        })
    }

    /// Gives each weight the rows of all ranks.
    fn unpack(&self, members: &[(Weight, Tensor)], all: &Tensor) {
        let ranks = self.group.size();
        tch::no_grad(|| {
            let mut offset = 0;
            let all = all.view([ranks as i64, -1]);
            for (weight, _) in members {
                let (rows, cols) = matrix_shape(weight.shape());
                let part = |rank: usize| {
                    let own = own_rows(rows, rank, ranks);
                    let len = own.end - own.start;
                    all.get(rank as i64)
                        .narrow(0, offset, len * cols)
                        .view([len, cols])
                };
                let parts: Vec<Tensor> = (0..ranks).map(part).collect();
                if self.keep {
                    let _ = Tensor::cat_out(&weight.value().view([rows, cols]), &parts, 0);
                } else {
                    weight.set_value(Some(Tensor::cat(&parts, 0).view(weight.shape())));
                }
                offset += self.share(weight);
            }
        });
    }
}

/// `x` as it is; when its gradient comes, `then` is done before the gradient goes on.
///
/// # Errors
/// libtorch's message.
pub fn before_backward<F>(x: &Tensor, then: F) -> Result<Tensor, Error>
where
    F: Fn() -> Result<(), CommError> + Send + 'static,
{
    let mut out = attach_backward(&[x], vec![tch::no_grad(|| x.detach())], move |grads| {
        then().map_err(|e| Error::new(e.to_string()))?;
        Ok(vec![grads[0].as_ref().map(Tensor::shallow_clone)])
    })?;
    Ok(out.remove(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn every_row_has_one_rank_and_the_first_has_the_most(rows in 0i64..100, ranks in 1usize..17) {
            let parts: Vec<_> = (0..ranks).map(|rank| own_rows(rows, rank, ranks)).collect();
            let seen: Vec<i64> = parts.iter().flat_map(Clone::clone).collect();
            prop_assert_eq!(seen, (0..rows).collect::<Vec<_>>());
            prop_assert!(parts.iter().all(|part| part.end - part.start <= parts[0].end));
        }
    }
}
