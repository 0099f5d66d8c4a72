//! Experts that move between ranks, with their masters and moments: a plan of which box goes from whom to whom, and one
//! exchange that carries it out.
//!
//! # Collective
//! Every rank of a stage, in the order of its MoE layers.

use crate::Error;
use crate::config::PlacementConfig;
use crate::model::{LocalExperts, Model};
use crate::optim::Optimizer;
use crate::train::checkpointing::PlacementState;
use checkpoint::TensorSlice;
use moe::placement::rebalance_experts;
use parallel::agreement::{all_gather_bytes, decode_peer_message};
use parallel::{Communicator, Work};
use std::collections::BTreeSet;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// Where experts are, and when they move.
pub(crate) struct ExpertPlacement {
    config: PlacementConfig,
    /// Ranks that share a layer's experts out, in owners.
    owners: usize,
    /// The ranks of this rank's stage.
    stage: Arc<dyn Communicator>,
    state: PlacementState,
}

impl ExpertPlacement {
    /// All experts of `moe_layers` layers where they are at first.
    pub(crate) fn new(
        config: &PlacementConfig,
        moe_layers: usize,
        experts: usize,
        owners: usize,
        stage: Arc<dyn Communicator>,
    ) -> ExpertPlacement {
        let physical_slots = vec![(0..experts as i64).collect(); moe_layers];
        let state = PlacementState {
            physical_slots,
            loads: vec![vec![0.0; experts]; moe_layers],
        };
        ExpertPlacement {
            config: config.clone(),
            owners,
            stage,
            state,
        }
    }

    /// For a checkpoint.
    pub(crate) fn state(&self) -> &PlacementState {
        &self.state
    }

    /// Whether what a checkpoint says is about the same experts.
    pub(crate) fn fits(&self, state: &PlacementState) -> bool {
        let sizes = |state: &PlacementState| {
            state
                .physical_slots
                .iter()
                .map(Vec::len)
                .collect::<Vec<_>>()
        };
        sizes(state) == sizes(&self.state)
    }

    /// Goes on from what a checkpoint says.
    pub(crate) fn resume(&mut self, state: &PlacementState) {
        if self.fits(state) {
            self.state = state.clone();
        }
    }

    /// Takes the token counts of a step into account, `[moe_layers][E]`, and, when it is time, moves experts: how many of them.
    ///
    /// # Errors
    /// When an exchange fails.
    pub(crate) fn step(
        &mut self,
        step: u64,
        tokens_per_expert: &[&[f64]],
        model: &Model,
        optimizer: &Optimizer,
    ) -> Result<u64, Error> {
        for (loads, tokens_per_expert) in self.state.loads.iter_mut().zip(tokens_per_expert) {
            let keep = if loads.iter().all(|&load| load == 0.0) {
                0.0
            } else {
                self.config.smoothing
            };
            loads
                .iter_mut()
                .zip(*tokens_per_expert)
                .for_each(|(load, &now)| *load = keep * *load + (1.0 - keep) * now);
        }
        if !step.is_multiple_of(self.config.every) {
            return Ok(0);
        }
        // The same on every rank, also for layers of other stages.
        let better = |(loads, physical_slots): (&Vec<f64>, &Vec<i64>)| {
            rebalance_experts(loads, physical_slots, self.owners, self.config.min_gain)
        };
        let better: Vec<_> = self
            .state
            .loads
            .iter()
            .zip(&self.state.physical_slots)
            .map(better)
            .collect();
        for (moe_layer, moe, held) in model.local_moe_layers() {
            if let Some(physical_slots) = &better[moe_layer] {
                let before = &self.state.physical_slots[moe_layer];
                let moved = |expert: &usize| before[*expert] != physical_slots[*expert];
                let names: BTreeSet<String> = (0..physical_slots.len())
                    .filter(moved)
                    .flat_map(|expert| {
                        ["gate_up", "down"]
                            .map(|part| format!("{}.experts.{expert}.{part}", held.name))
                    })
                    .collect();
                self.exchange(model, optimizer, held, &names, || {
                    held.set_physical_slots(&model.parameters, &moe.dispatcher, physical_slots);
                })?;
            }
        }
        let mut moved = 0;
        for (physical_slots, better) in self.state.physical_slots.iter_mut().zip(better) {
            if let Some(better) = better {
                moved += physical_slots
                    .iter()
                    .zip(&better)
                    .filter(|(before, after)| before != after)
                    .count() as u64;
                *physical_slots = better;
            }
        }
        if moved > 0 {
            model.mark_stale();
        }
        Ok(moved)
    }

    /// Brings the values of the tensors `names` to where they are after `relabel`.
    fn exchange(
        &self,
        model: &Model,
        optimizer: &Optimizer,
        held: &LocalExperts,
        names: &BTreeSet<String>,
        relabel: impl FnOnce(),
    ) -> Result<(), Error> {
        // This rank's boxes, each with its master and moments.
        let boxes = || {
            let mut boxes: Vec<(TensorSlice, Vec<Tensor>)> = Vec::new();
            for index in [held.gate_up, held.down] {
                let parameter = model.parameters.get(index);
                let (exp_avg, exp_avg_sq) = optimizer.moments(index);
                let [masters, first, second] =
                    [&parameter.master, exp_avg, exp_avg_sq].map(|t| parameter.slices(t));
                for ((place, master), ((_, first), (_, second))) in
                    masters.into_iter().zip(first.into_iter().zip(second))
                {
                    if names.contains(&place.name) {
                        boxes.push((place, vec![master, first, second]));
                    }
                }
            }
            boxes
        };
        let places =
            |boxes: &[(TensorSlice, Vec<Tensor>)]| -> Result<Vec<Vec<TensorSlice>>, Error> {
                let own: Vec<&TensorSlice> = boxes.iter().map(|(place, _)| place).collect();
                let all =
                    all_gather_bytes(&self.stage, &serde_json::to_vec(&own).expect("plain data"))?;
                all.iter()
                    .map(|bytes| Ok(decode_peer_message(bytes)?))
                    .collect()
            };
        let before = boxes();
        let held_by = places(&before)?;
        relabel();
        let after = boxes();
        let moves = plan_moves(&held_by, &places(&after)?).map_err(Error::Placement)?;
        execute_moves(
            &moves,
            &self.stage,
            3,
            |kind, rows| find_rows(&before, kind, rows),
            |kind, rows, values| {
                let into = find_rows(&after, kind, rows)?;
                tch::no_grad(|| into.shallow_clone().f_copy_(values))?;
                Ok(())
            },
        )?;
        for index in [held.gate_up, held.down] {
            model.parameters.get(index).sync_from_master();
        }
        Ok(())
    }
}

/// The rows `rows`, of kind `kind`, in the box that has them.
fn find_rows(
    boxes: &[(TensorSlice, Vec<Tensor>)],
    kind: usize,
    rows: &TensorSlice,
) -> Result<Tensor, Error> {
    let has = |place: &TensorSlice| {
        let start = place.offset[0];
        let end = place.offset[0] + place.shape[0];
        place.name == rows.name
            && (start..end).contains(&rows.offset[0])
            && place.offset[1..] == rows.offset[1..]
    };
    let (place, tensors) = boxes
        .iter()
        .find(|(place, _)| has(place))
        .ok_or_else(|| Error::Placement(format!("rows of {} are not here", rows.name)))?;
    Ok(tensors[kind].narrow(0, rows.offset[0] - place.offset[0], rows.shape[0]))
}

/// Rows of a tensor that go from one rank to another, or stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) rows: TensorSlice,
}

/// From what each rank holds and what each is to hold: where everything comes from. A rank that has something keeps it;
/// otherwise the holder that sends least so far sends it.
///
/// # Errors
/// When somebody is to have what nobody holds.
pub(crate) fn plan_moves(
    before: &[Vec<TensorSlice>],
    after: &[Vec<TensorSlice>],
) -> Result<Vec<Move>, String> {
    let mut moves = Vec::new();
    let mut sent = vec![0; before.len()];
    for (to, wanted) in after.iter().enumerate() {
        for place in wanted {
            let mut row = place.offset[0];
            let end = place.offset[0] + place.shape[0];
            while row < end {
                // Who holds this row, and how far its box goes on.
                let holds = |rank: usize| {
                    let box_of = before[rank].iter().find(|held| {
                        let rows = held.offset[0]..held.offset[0] + held.shape[0];
                        held.name == place.name
                            && rows.contains(&row)
                            && (&held.offset[1..], &held.shape[1..])
                                == (&place.offset[1..], &place.shape[1..])
                    })?;
                    Some(box_of.offset[0] + box_of.shape[0])
                };
                let holders = (0..before.len()).filter_map(|rank| Some((rank, holds(rank)?)));
                let chosen = holders.min_by_key(|&(rank, _)| (rank != to, sent[rank], rank));
                let (from, until) =
                    chosen.ok_or_else(|| format!("no rank holds row {row} of {}", place.name))?;
                let mut rows = place.clone();
                rows.offset[0] = row;
                rows.shape[0] = until.min(end) - row;
                if from != to {
                    sent[from] += rows.shape.iter().product::<i64>();
                }
                row += rows.shape[0];
                moves.push(Move { from, to, rows });
            }
        }
    }
    Ok(moves)
}

/// Carries `moves` out among the ranks of `group`: of each of `kinds` kinds of values, boxes that `held` gives are sent, and
/// those that arrive are handed to `receive`.
///
/// # Errors
/// When the exchange fails.
pub(crate) fn execute_moves(
    moves: &[Move],
    group: &Arc<dyn Communicator>,
    kinds: usize,
    held: impl Fn(usize, &TensorSlice) -> Result<Tensor, Error>,
    receive: impl Fn(usize, &TensorSlice, &Tensor) -> Result<(), Error>,
) -> Result<(), Error> {
    let rank = group.rank();
    let ranks = group.size();
    let elements = |to_or_from: &dyn Fn(&&Move) -> bool| {
        let rows = moves.iter().filter(to_or_from);
        rows.map(|m| m.rows.shape.iter().product::<i64>())
            .sum::<i64>()
            * kinds as i64
    };
    let rows_to: Vec<i64> = (0..ranks)
        .map(|to| elements(&|m| m.from == rank && m.to == to))
        .collect();
    let rows_from: Vec<i64> = (0..ranks)
        .map(|from| elements(&|m| m.to == rank && m.from == from))
        .collect();
    let mut sent = vec![Tensor::empty([0], (Kind::Float, tch::Device::Cpu))];
    // By receiver, as the plan is.
    for Move { rows, .. } in moves.iter().filter(|m| m.from == rank) {
        for kind in 0..kinds {
            sent.push(held(kind, rows)?.to_device(tch::Device::Cpu).reshape([-1]));
        }
    }
    let sent = tch::no_grad(|| Tensor::cat(&sent, 0));
    let received = Tensor::empty(
        [rows_from.iter().sum::<i64>()],
        (Kind::Float, tch::Device::Cpu),
    );
    group
        .all_to_all(&received, &sent, &rows_from, &rows_to)
        .and_then(Work::wait)?;
    // By sender, each with its own in the order of the plan.
    let mut next = 0;
    for from in 0..ranks {
        for Move { rows, .. } in moves.iter().filter(|m| m.to == rank && m.from == from) {
            for kind in 0..kinds {
                let len: i64 = rows.shape.iter().product();
                receive(
                    kind,
                    rows,
                    &received.narrow(0, next, len).view(rows.shape.as_slice()),
                )?;
                next += len;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn rows(name: &str, start: i64, len: i64) -> TensorSlice {
        let mut place = TensorSlice::whole(name, &[8, 3]);
        (place.offset[0], place.shape[0]) = (start, len);
        place
    }

    #[test]
    fn rows_come_from_those_who_have_them_and_stay_where_they_can() {
        // Two replicas, each of whose ranks has half of an expert's rows; the experts change places.
        let before = [("a", 0), ("a", 4), ("b", 0), ("b", 4)]
            .map(|(name, start)| vec![rows(name, start, 4)]);
        let after = vec![
            vec![rows("b", 0, 8)],
            vec![rows("a", 2, 4)],
            vec![],
            vec![rows("b", 4, 4), rows("a", 0, 1)],
        ];
        let moves = plan_moves(&before, &after).unwrap();
        let step = |from, to, rows| Move { from, to, rows };
        assert_eq!(
            moves,
            [
                step(2, 0, rows("b", 0, 4)),
                step(3, 0, rows("b", 4, 4)),
                step(0, 1, rows("a", 2, 2)),
                step(1, 1, rows("a", 4, 2)),
                step(3, 3, rows("b", 4, 4)),
                step(0, 3, rows("a", 0, 1)),
            ]
        );
        assert!(
            plan_moves(&before, &[vec![rows("c", 0, 1)]])
                .unwrap_err()
                .contains("row 0 of c")
        );
    }

    #[test]
    fn replicas_share_the_sending() {
        let before = vec![vec![rows("a", 0, 8)], vec![rows("a", 0, 8)], vec![], vec![]];
        let after = vec![vec![], vec![], vec![rows("a", 0, 8)], vec![rows("a", 0, 8)]];
        let senders: HashSet<usize> = plan_moves(&before, &after)
            .unwrap()
            .iter()
            .map(|m| m.from)
            .collect();
        assert_eq!(senders, HashSet::from([0, 1]));
    }
}
