//! The experts of a layer that a rank holds, and how they are named.

use crate::parameters::{Parameters, slice};
use checkpoint::Place;
use moe::dispatch::Dispatcher;
use std::ops::Range;

/// A rank's part of a layer's experts: two parameters, each expert after expert.
pub(crate) struct HeldExperts {
    /// Of the layer's mixture.
    pub(crate) name: String,
    /// Numbers of the parameters.
    pub(crate) gate_up: usize,
    pub(crate) down: usize,
    pub(crate) shape: ExpertShape,
    /// The positions that this rank's owner holds.
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
    pub(crate) fn gate_up(&self, name: &str, experts: &[usize]) -> Vec<Place> {
        let name = |e: &usize| format!("{name}.experts.{e}.gate_up");
        experts
            .iter()
            .flat_map(|e| gate_up_boxes(&name(e), self.ffn, self.hidden, &self.part))
            .collect()
    }

    /// The boxes of `[L, D, F]`.
    pub(crate) fn down(&self, name: &str, experts: &[usize]) -> Vec<Place> {
        let name = |e: &usize| format!("{name}.experts.{e}.down");
        experts
            .iter()
            .map(|e| slice(&name(e), &[self.hidden, self.ffn], 1, &self.part))
            .collect()
    }
}

impl HeldExperts {
    /// Says that experts are at `positions`, for choices and for the names of this rank's rows. Values are not touched.
    pub(crate) fn place(
        &self,
        parameters: &Parameters,
        dispatcher: &Dispatcher,
        positions: &[i64],
    ) {
        let mut experts = vec![0; positions.len()];
        positions
            .iter()
            .enumerate()
            .for_each(|(expert, &position)| experts[position as usize] = expert);
        let own = &experts[self.own.clone()];
        parameters
            .get(self.gate_up)
            .rename(self.shape.gate_up(&self.name, own));
        parameters
            .get(self.down)
            .rename(self.shape.down(&self.name, own));
        dispatcher.place(positions.to_vec());
    }
}

/// The boxes of a gate-up matrix `[2F, D]` with the columns `part` of F: those of gate, then those of up.
pub(crate) fn gate_up_boxes(name: &str, ffn: i64, hidden: i64, part: &Range<i64>) -> Vec<Place> {
    let shape = [2 * ffn, hidden];
    if *part == (0..ffn) {
        vec![Place::whole(name, &shape)]
    } else {
        [0, ffn]
            .map(|start| slice(name, &shape, 0, &(start + part.start..start + part.end)))
            .to_vec()
    }
}
