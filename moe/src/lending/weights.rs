//! Weights of lent experts on a helper, from forward to backward, and the sums of their gradients.
// Shapes: M lent experts.

use crate::lending::transfer::{Lending, PendingGradients};
use parallel::Weight;
use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::Error;

/// Weights of lent experts, for all chunks of a rank's tokens.
#[derive(Clone)]
pub(crate) struct LentWeights(Arc<Mutex<LentWeightsState>>);

struct LentWeightsState {
    lending: Arc<Lending>,
    /// `[M, elements]`; None if backward must fetch them again.
    weights: Option<Tensor>,
    count: i64,
    keep: bool,
    /// `[M, elements]` fp32.
    gradients: Option<Tensor>,
    /// Chunks of tokens that have not yet contributed to the gradients.
    pending_chunks: usize,
}

impl LentWeights {
    /// Wraps received weights, for tokens in `chunks` chunks. If `keep` is false, backward fetches
    /// the weights again.
    pub(crate) fn new(
        lending: Arc<Lending>,
        weights: Tensor,
        keep: bool,
        chunks: usize,
    ) -> LentWeights {
        let count = weights.size()[0];
        let state = LentWeightsState {
            lending,
            weights: Some(weights),
            count,
            keep,
            gradients: None,
            pending_chunks: chunks,
        };
        LentWeights(Arc::new(Mutex::new(state)))
    }

    /// Returns the number of lent experts.
    pub(crate) fn count(&self) -> i64 {
        self.lock().count
    }

    fn lock(&self) -> MutexGuard<'_, LentWeightsState> {
        self.0.lock()
    }

    /// Frees the weights after forward, unless they are kept.
    pub(crate) fn release(&self) {
        let mut state = self.lock();
        if !state.keep {
            state.weights = None;
        }
    }

    /// Returns the weights `[M, elements]`. Fetches them if they were freed, for which this rank
    /// sends those that it lends of `own`, all weights of its experts.
    pub(crate) fn weights(&self, own: &[&Weight]) -> Result<Tensor, Error> {
        let mut state = self.lock();
        if let Some(weights) = &state.weights {
            return Ok(weights.shallow_clone());
        }
        let own = own
            .iter()
            .map(|weight| weight.value())
            .collect::<Vec<Tensor>>();
        let weights = state.lending.fetch(&own)?.wait()?;
        state.weights = Some(weights.shallow_clone());
        Ok(weights)
    }

    /// Calls `add` to add one chunk's contribution to the sums `[M, elements]`, fp32, on the device
    /// of `like`. After the last chunk, starts to send the sums home.
    pub(crate) fn add_gradients(
        &self,
        elements: i64,
        like: &Tensor,
        add: impl FnOnce(&Tensor) -> Result<(), Error>,
    ) -> Result<Option<PendingGradients>, Error> {
        let mut state = self.lock();
        let count = state.count;
        let sum = state
            .gradients
            .get_or_insert_with(|| Tensor::zeros([count, elements], (Kind::Float, like.device())));
        add(sum)?;
        state.pending_chunks -= 1;
        if state.pending_chunks > 0 {
            return Ok(None);
        }
        state.weights = None;
        state
            .gradients
            .take()
            .map(|all| state.lending.send_gradients(&all))
            .transpose()
    }
}
