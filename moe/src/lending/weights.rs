//! Other ranks' experts while this one works on them: their weights from forward to backward, and what their gradients add up
//! to until they go home.
// Shapes: M lent experts, each so many elements.

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
    /// `[M, elements]`; in backward fetched again where they were not kept.
    weights: Option<Tensor>,
    count: i64,
    keep: bool,
    /// `[M, elements]` fp32, and chunks of the tokens whose contribution is still to come.
    gradients: Option<Tensor>,
    pending: usize,
}

impl LentWeights {
    /// For tokens in `chunks` chunks. With `keep` the weights stay until backward; otherwise they are fetched again then.
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
            pending: chunks,
        };
        LentWeights(Arc::new(Mutex::new(state)))
    }

    /// How many.
    pub(crate) fn count(&self) -> i64 {
        self.lock().count
    }

    fn lock(&self) -> MutexGuard<'_, LentWeightsState> {
        self.0.lock()
    }

    /// After forward.
    pub(crate) fn release(&self) {
        let mut state = self.lock();
        if !state.keep {
            state.weights = None;
        }
    }

    /// `[M, elements]`: as they came, or fetched again.
    pub(crate) fn weights(
        &self,
        gate_up_proj: &Weight,
        down_proj: &Weight,
    ) -> Result<Tensor, Error> {
        let mut state = self.lock();
        if state.weights.is_none() {
            state.weights = Some(
                state
                    .lending
                    .fetch(&gate_up_proj.value(), &down_proj.value())?
                    .wait()?,
            );
        }
        Ok(state
            .weights
            .as_ref()
            .expect("they have been fetched")
            .shallow_clone())
    }

    /// Adds one chunk's contribution `[M, elements]`, fp32; the last one sends all of them home.
    pub(crate) fn add_gradients(
        &self,
        elements: i64,
        like: &Tensor,
        add: impl FnOnce(&Tensor),
    ) -> Result<Option<PendingGradients>, Error> {
        let mut state = self.lock();
        let count = state.count;
        let sum = state
            .gradients
            .get_or_insert_with(|| Tensor::zeros([count, elements], (Kind::Float, like.device())));
        add(sum);
        state.pending -= 1;
        if state.pending > 0 {
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
