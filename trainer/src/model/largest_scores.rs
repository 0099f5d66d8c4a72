//! The largest scores of the heads of one attention block during a step.

use parking_lot::Mutex;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// The largest scaled score of each query head of this rank, over the microbatches since
/// [`LargestScores::begin`]. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct LargestScores {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
enum State {
    #[default]
    Off,
    /// No head was seen yet.
    Begun,
    /// `[H]` fp32 on the device.
    Some(Tensor),
}

impl LargestScores {
    /// Starts to measure, and forgets what was measured before.
    pub(crate) fn begin(&self) {
        *self.state.lock() = State::Begun;
    }

    /// Ends measuring and returns `[H]` fp32, or `None` if nothing was measured.
    pub(crate) fn take(&self) -> Option<Tensor> {
        match std::mem::take(&mut *self.state.lock()) {
            State::Off | State::Begun => None,
            State::Some(largest) => Some(largest),
        }
    }

    /// Returns the tensor `[H]` fp32 that attention of queries `[B, H, s, d]` raises to its largest
    /// scores; `None` unless they are measured.
    pub(crate) fn of_heads(&self, query: &Tensor) -> Option<Tensor> {
        let mut state = self.state.lock();
        match &*state {
            State::Off => None,
            State::Some(largest) => Some(largest.shallow_clone()),
            State::Begun => {
                let options = (Kind::Float, query.device());
                let largest = Tensor::full([query.size()[1]], f64::NEG_INFINITY, options);
                *state = State::Some(largest.shallow_clone());
                Some(largest)
            }
        }
    }
}
