//! Other ranks' experts while this one works on them: their weights from forward to backward, and what their gradients add up
//! to until they go home.
// Shapes: M borrowed experts, each so many elements.

use crate::foreign::{Lending, Returning};
use parallel::Weight;
use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::Error;

/// Borrowed experts, for all parts of a rank's tokens.
#[derive(Clone)]
pub(crate) struct Borrowed(Arc<Mutex<Held>>);

struct Held {
    lending: Arc<Lending>,
    /// `[M, elements]`; in backward fetched again where they were not kept.
    weights: Option<Tensor>,
    count: i64,
    keep: bool,
    /// `[M, elements]` fp32, and parts of the tokens whose contribution is still to come.
    gradients: Option<Tensor>,
    pending: usize,
}

impl Borrowed {
    /// For tokens in `parts` parts. With `keep` the weights stay until backward; otherwise they are fetched again then.
    pub(crate) fn new(
        lending: Arc<Lending>,
        weights: Tensor,
        keep: bool,
        parts: usize,
    ) -> Borrowed {
        let count = weights.size()[0];
        let held = Held {
            lending,
            weights: Some(weights),
            count,
            keep,
            gradients: None,
            pending: parts,
        };
        Borrowed(Arc::new(Mutex::new(held)))
    }

    /// How many.
    pub(crate) fn count(&self) -> i64 {
        self.lock().count
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock()
    }

    /// After forward.
    pub(crate) fn forget(&self) {
        let mut held = self.lock();
        if !held.keep {
            held.weights = None;
        }
    }

    /// `[M, elements]`: as they came, or fetched again.
    pub(crate) fn weights(&self, gate_up: &Weight, down: &Weight) -> Result<Tensor, Error> {
        let mut held = self.lock();
        if held.weights.is_none() {
            held.weights = Some(
                held.lending
                    .fetch(&gate_up.value(), &down.value())?
                    .arrive()?,
            );
        }
        Ok(held
            .weights
            .as_ref()
            .expect("they have been fetched")
            .shallow_clone())
    }

    /// Adds one part's contribution `[M, elements]`, fp32; the last one sends all of them home.
    pub(crate) fn add_gradients(
        &self,
        elements: i64,
        like: &Tensor,
        add: impl FnOnce(&Tensor),
    ) -> Result<Option<Returning>, Error> {
        let mut held = self.lock();
        let count = held.count;
        let sum = held
            .gradients
            .get_or_insert_with(|| Tensor::zeros([count, elements], (Kind::Float, like.device())));
        add(sum);
        held.pending -= 1;
        if held.pending > 0 {
            return Ok(None);
        }
        held.weights = None;
        held.gradients
            .take()
            .map(|all| held.lending.give_back(&all))
            .transpose()
    }
}
