//! The experts of a layer that a rank holds, and how they are named.

use crate::model::parameters::{Parameters, slice};
use checkpoint::TensorSlice;
use moe::dispatch::Dispatcher;
use std::ops::Range;

/// A rank's part of a layer's experts: two parameters, each expert after expert.
pub(crate) struct LocalExperts {
    /// Of the layer's mixture.
    pub(crate) name: String,
    /// Numbers of the parameters.
    pub(crate) gate_up: usize,
    pub(crate) down: usize,
    pub(crate) shape: ExpertShape,
    /// The physical slots that this rank's owner holds.
    pub(crate) own: Range<usize>,
}

/// One expert.
#[derive(Debug, Clone)]
pub(crate) struct ExpertShape {
    pub(crate) hidden: i64,
    pub(crate) ffn: i64,
    /// What of ffn this rank has.
    pub(crate) part: Range<i64>,
}

impl ExpertShape {
    /// The boxes of `[L, 2F, D]`: of each of the `experts` the rows of gate, then those of up.
    pub(crate) fn gate_up(&self, name: &str, experts: &[usize]) -> Vec<TensorSlice> {
        let name = |e: &usize| format!("{name}.experts.{e}.gate_up");
        experts
            .iter()
            .flat_map(|e| gate_up_boxes(&name(e), self.ffn, self.hidden, &self.part))
            .collect()
    }

    /// The boxes of `[L, D, F]`.
    pub(crate) fn down(&self, name: &str, experts: &[usize]) -> Vec<TensorSlice> {
        let name = |e: &usize| format!("{name}.experts.{e}.down");
        experts
            .iter()
            .map(|e| slice(&name(e), &[self.hidden, self.ffn], 1, &self.part))
            .collect()
    }
}

impl LocalExperts {
    /// Says that experts are at `physical_slots`, for choices and for the names of this rank's rows. Values are not touched.
    pub(crate) fn set_physical_slots(
        &self,
        parameters: &Parameters,
        dispatcher: &Dispatcher,
        physical_slots: &[i64],
    ) {
        let mut experts = vec![0; physical_slots.len()];
        physical_slots
            .iter()
            .enumerate()
            .for_each(|(expert, &physical_slot)| experts[physical_slot as usize] = expert);
        let own = &experts[self.own.clone()];
        parameters
            .get(self.gate_up)
            .rename(self.shape.gate_up(&self.name, own));
        parameters
            .get(self.down)
            .rename(self.shape.down(&self.name, own));
        dispatcher.set_physical_slots(physical_slots.to_vec());
    }
}

/// The boxes of a gate-up matrix `[2F, D]` with the columns `part` of F: those of gate, then those of up.
pub(crate) fn gate_up_boxes(
    name: &str,
    ffn: i64,
    hidden: i64,
    part: &Range<i64>,
) -> Vec<TensorSlice> {
    let shape = [2 * ffn, hidden];
    if *part == (0..ffn) {
        vec![TensorSlice::whole(name, &shape)]
    } else {
        [0, ffn]
            .map(|start| slice(name, &shape, 0, &(start + part.start..start + part.end)))
            .to_vec()
    }
}
