//! The experts that a rank holds, and their global names.

use crate::model::parameters::{Parameters, slice};
use checkpoint::TensorSlice;
use moe::dispatch::Dispatcher;
use std::ops::Range;

/// A rank's part of the experts of one MoE layer: two parameters, in which experts follow each
/// other.
pub(crate) struct LocalExperts {
    /// Global name of the MoE layer.
    pub(crate) name: String,
    /// Index of the gate-up parameter.
    pub(crate) gate_up: usize,
    /// Index of the down parameter.
    pub(crate) down: usize,
    pub(crate) shape: ExpertShape,
    /// Physical slots of this rank's owner.
    pub(crate) slots: Range<usize>,
}

/// Size of one expert.
#[derive(Debug, Clone)]
pub(crate) struct ExpertShape {
    pub(crate) hidden: i64,
    pub(crate) ffn: i64,
    /// Columns of `ffn` that this rank has.
    pub(crate) part: Range<i64>,
}

impl ExpertShape {
    /// Returns the slices of `[L, 2F, D]`: for each expert the rows of gate, then those of up.
    pub(crate) fn gate_up(&self, name: &str, experts: &[usize]) -> Vec<TensorSlice> {
        let slices = |expert: &usize| {
            let name = format!("{name}.experts.{expert}.gate_up");
            gate_up_slices(&name, self.ffn, self.hidden, &self.part)
        };
        experts.iter().flat_map(slices).collect()
    }

    /// Returns the slices of `[L, D, F]`.
    pub(crate) fn down(&self, name: &str, experts: &[usize]) -> Vec<TensorSlice> {
        let slice_of = |expert: &usize| {
            let name = format!("{name}.experts.{expert}.down");
            slice(&name, &[self.hidden, self.ffn], 1, &self.part)
        };
        experts.iter().map(slice_of).collect()
    }
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
        let mut expert_of_slot = vec![0; physical_slots.len()];
        for (expert, &physical_slot) in physical_slots.iter().enumerate() {
            expert_of_slot[physical_slot as usize] = expert;
        }
        let own = &expert_of_slot[self.slots.clone()];
        let gate_up = self.shape.gate_up(&self.name, own);
        let down = self.shape.down(&self.name, own);
        parameters.get(self.gate_up).rename(gate_up);
        parameters.get(self.down).rename(down);
        dispatcher.set_physical_slots(physical_slots.to_vec());
    }
}

/// Returns the slices of a gate-up matrix `[2F, D]` for the columns `part` of F: those of gate,
/// then those of up.
pub(crate) fn gate_up_slices(
    name: &str,
    ffn: i64,
    hidden: i64,
    part: &Range<i64>,
) -> Vec<TensorSlice> {
    let shape = [2 * ffn, hidden];
    if *part == (0..ffn) {
        return vec![TensorSlice::whole(name, &shape)];
    }
    let rows_from = |start: i64| {
        let rows = start + part.start..start + part.end;
        slice(name, &shape, 0, &rows)
    };
    vec![rows_from(0), rows_from(ffn)]
}
