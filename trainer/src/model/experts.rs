//! The experts that a rank holds, and their global names.

use super::parameters::Parameters;
use moe::dispatch::Dispatcher;
use std::ops::Range;

/// A rank's part of the experts of one MoE layer: parameters in which experts follow each other.
pub(crate) struct LocalExperts {
    /// Global name of the MoE layer.
    pub(crate) name: String,
    /// Indices of the parameters.
    pub(crate) parameters: Range<usize>,
}

impl LocalExperts {
    /// Sets the physical slot of each expert, for dispatch and for the names of this rank's rows.
    /// Leaves the values of the weights where they are.
    pub(crate) fn set_physical_slots(
        &self,
        parameters: &Parameters,
        dispatcher: &Dispatcher,
        physical_slots: &[i64],
    ) {
        let experts = experts_by_slot(physical_slots);
        for index in self.parameters.clone() {
            parameters.get(index).set_experts(&experts);
        }
        dispatcher.set_physical_slots(physical_slots.to_vec());
    }
}

/// Returns the expert in each physical slot, where expert e has the slot `physical_slots[e]`.
pub(crate) fn experts_by_slot(physical_slots: &[i64]) -> Vec<usize> {
    let mut experts = vec![0; physical_slots.len()];
    for (expert, &slot) in physical_slots.iter().enumerate() {
        experts[slot as usize] = expert;
    }
    experts
}
