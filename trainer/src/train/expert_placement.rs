//! Experts that move between ranks, with masters and optimizer state.
//!
//! A pure plan says which rows go from which rank to which, and one exchange carries it out.
//!
//! # Collective
//! Every rank of a stage, in the order of its MoE layers.

use super::run_state::PlacementState;
use crate::{
    Error,
    config::{Config, MoeConfig, PlacementConfig},
    model::{LocalExperts, Model, experts::experts_by_slot, spec::ParamSpec},
    optim::Optimizer,
    stage_layout::StageLayout,
};
use checkpoint::TensorSlice;
use moe::placement::rebalance_experts;
use parallel::{Communicator, Mesh, Work};
use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    sync::Arc,
};
use tch::{Device, Kind, Tensor};

/// Placement of all experts, and the rule by which they move.
pub(crate) struct ExpertPlacement {
    config: PlacementConfig,
    rows: ExpertRows,
    /// The ranks of this rank's stage.
    stage: Arc<dyn Communicator>,
    state: PlacementState,
}

/// Rows of a parameter on this rank.
struct HeldSlice {
    slice: TensorSlice,
    /// Master and optimizer state.
    values: Vec<Tensor>,
}

impl ExpertPlacement {
    /// Returns the initial placement of `experts` experts in each of `moe_layers` layers.
    pub(crate) fn new(
        config: &PlacementConfig,
        moe_layers: usize,
        experts: usize,
        rows: ExpertRows,
        stage: Arc<dyn Communicator>,
    ) -> ExpertPlacement {
        let state = PlacementState {
            physical_slots: vec![(0..experts as i64).collect(); moe_layers],
            loads: vec![vec![0.0; experts]; moe_layers],
        };
        ExpertPlacement {
            config: config.clone(),
            rows,
            stage,
            state,
        }
    }

    /// Returns the state that a checkpoint saves.
    pub(crate) fn state(&self) -> &PlacementState {
        &self.state
    }

    /// True if a checkpoint's state has the same numbers of layers and experts.
    pub(crate) fn fits(&self, state: &PlacementState) -> bool {
        let experts_by_layer = |state: &PlacementState| {
            state
                .physical_slots
                .iter()
                .map(Vec::len)
                .collect::<Vec<_>>()
        };
        experts_by_layer(state) == experts_by_layer(&self.state)
    }

    /// Continues from a checkpoint's state if it fits.
    pub(crate) fn resume(&mut self, state: &PlacementState) {
        if self.fits(state) {
            self.state = state.clone();
        }
    }

    /// Adds a step's routed tokens `[moe_layers][E]` to the loads and, if due, moves experts.
    /// Returns the number of moved experts.
    ///
    /// # Errors
    /// If an exchange fails.
    pub(crate) fn step(
        &mut self,
        step: u64,
        tokens_per_expert: &[&[f64]],
        model: &Model,
        optimizer: &Optimizer,
    ) -> Result<u64, Error> {
        self.smooth_loads(tokens_per_expert);
        if !step.is_multiple_of(self.config.every) {
            return Ok(0);
        }
        // The same on every rank, also for layers of other stages.
        let improved: Vec<Option<Vec<i64>>> = self
            .state
            .loads
            .iter()
            .zip(&self.state.physical_slots)
            .map(|(loads, slots)| {
                rebalance_experts(loads, slots, self.rows.owners(), self.config.min_gain)
            })
            .collect();
        for (moe_layer, moe, experts) in model.local_moe_layers() {
            if let Some(slots) = &improved[moe_layer] {
                let names = self.moved_tensors(moe_layer, slots, &experts.name);
                let before = &self.state.physical_slots[moe_layer];
                let moves = self.plan(&experts.name, before, slots, &names)?;
                self.exchange(model, optimizer, experts, &moves, || {
                    experts.set_physical_slots(&model.parameters, &moe.dispatcher, slots);
                })?;
            }
        }
        let moved = self.accept(improved);
        if moved > 0 {
            model.mark_stale();
        }
        Ok(moved)
    }

    fn smooth_loads(&mut self, tokens_per_expert: &[&[f64]]) {
        for (loads, tokens_per_expert) in self.state.loads.iter_mut().zip(tokens_per_expert) {
            let is_first = loads.iter().all(|&load| load == 0.0);
            let keep = if is_first { 0.0 } else { self.config.smoothing };
            for (load, &now) in loads.iter_mut().zip(*tokens_per_expert) {
                *load = keep * *load + (1.0 - keep) * now;
            }
        }
    }

    /// Returns the global names of the tensors of experts that move to other slots.
    fn moved_tensors(&self, moe_layer: usize, slots: &[i64], name: &str) -> BTreeSet<String> {
        let before = &self.state.physical_slots[moe_layer];
        let moved = (0..slots.len()).filter(|&expert| before[expert] != slots[expert]);
        let specs = self.rows.specs(name);
        let names = |expert| specs.iter().map(move |spec| spec.name(expert));
        moved.flat_map(names).collect()
    }

    /// Takes over improved placements and returns the number of moved experts.
    fn accept(&mut self, improved: Vec<Option<Vec<i64>>>) -> u64 {
        let mut moved = 0;
        for (slots, improved) in self.state.physical_slots.iter_mut().zip(improved) {
            if let Some(improved) = improved {
                let pairs = slots.iter().zip(&improved);
                moved += pairs.filter(|(before, after)| before != after).count() as u64;
                *slots = improved;
            }
        }
        moved
    }

    /// Plans the moves of the tensors `names` of layer `name` to new physical slots, as all ranks
    /// of the stage do.
    fn plan(
        &self,
        name: &str,
        before: &[i64],
        after: &[i64],
        names: &BTreeSet<String>,
    ) -> Result<PlannedMoves, Error> {
        let held = |slots: &[i64]| self.rows.of_stage(name, slots, names);
        let slices_before = held(before);
        let slices_after = held(after);
        let moves = plan_moves(&slices_before, &slices_after).map_err(Error::Placement)?;
        let own = |mut slices: Vec<Vec<TensorSlice>>| slices.swap_remove(self.stage.rank());
        Ok(PlannedMoves {
            names: names.clone(),
            before: own(slices_before),
            after: own(slices_after),
            moves,
        })
    }

    /// Calls `relabel`, which changes the global slices of this rank's rows, and brings the values
    /// of the planned tensors to their new ranks.
    fn exchange(
        &self,
        model: &Model,
        optimizer: &Optimizer,
        experts: &LocalExperts,
        planned: &PlannedMoves,
        relabel: impl FnOnce(),
    ) -> Result<(), Error> {
        let held = || held_slices(model, optimizer, experts, &planned.names);
        let before = held();
        check_held(&before, &planned.before)?;
        relabel();
        let after = held();
        check_held(&after, &planned.after)?;
        execute_moves(
            &planned.moves,
            &self.stage,
            |rows| find_rows(&before, rows),
            |rows| find_rows(&after, rows),
        )?;
        for index in experts.parameters.clone() {
            model.parameters.get(index).sync_from_master();
        }
        Ok(())
    }
}

/// Moves of a layer's experts, and this rank's slices that they change.
struct PlannedMoves {
    names: BTreeSet<String>,
    before: Vec<TensorSlice>,
    after: Vec<TensorSlice>,
    moves: Vec<Move>,
}

/// Checks that this rank holds the slices that the other ranks plan with.
fn check_held(held: &[HeldSlice], planned: &[TensorSlice]) -> Result<(), Error> {
    if held.iter().map(|held| &held.slice).eq(planned) {
        return Ok(());
    }
    let reason = "this rank holds other rows of the experts than planned; this is an error in \
                  moerun, please report it with the configuration";
    Err(Error::Placement(reason.to_string()))
}

/// The rows of each layer's experts that each rank of a stage holds. They follow from the mesh, the
/// configuration and the placement.
pub(crate) struct ExpertRows {
    hidden: usize,
    moe: MoeConfig,
    layout: StageLayout,
}

impl ExpertRows {
    /// Derives the rows of the ranks in the stage of `mesh`.
    ///
    /// # Errors
    /// If the mesh does not fit the configuration.
    pub(crate) fn new(config: &Config, moe: &MoeConfig, mesh: &Mesh) -> Result<ExpertRows, Error> {
        Ok(ExpertRows {
            hidden: config.model.hidden,
            moe: moe.clone(),
            layout: StageLayout::new(&config.parallel, mesh)?,
        })
    }

    /// Returns the number of owners of each MoE layer's experts.
    fn owners(&self) -> usize {
        self.layout.expert_owners()
    }

    /// Returns the descriptions of the experts of layer `name`.
    fn specs(&self, name: &str) -> Vec<ParamSpec> {
        self.moe.expert_specs(self.hidden, name)
    }

    /// Returns the slices of the tensors `names` of layer `name` that each rank holds, where expert
    /// e has the physical slot `physical_slots[e]`.
    fn of_stage(
        &self,
        name: &str,
        physical_slots: &[i64],
        names: &BTreeSet<String>,
    ) -> Vec<Vec<TensorSlice>> {
        let experts = experts_by_slot(physical_slots);
        let specs = self.specs(name);
        let held = |rank| {
            let specs = specs.iter();
            let slices = specs.flat_map(|spec| self.layout.slices(rank, spec, &experts));
            slices.filter(|slice| names.contains(&slice.name)).collect()
        };
        (0..self.layout.len()).map(held).collect()
    }
}

/// Returns this rank's slices of the tensors `names`, with their values.
fn held_slices(
    model: &Model,
    optimizer: &Optimizer,
    experts: &LocalExperts,
    names: &BTreeSet<String>,
) -> Vec<HeldSlice> {
    let mut held = Vec::new();
    for index in experts.parameters.clone() {
        let parameter = model.parameters.get(index);
        let state = optimizer.state(index).iter().map(|state| &state.tensor);
        let tensors = std::iter::once(&parameter.master).chain(state);
        let slices: Vec<_> = tensors.map(|tensor| parameter.slices(tensor)).collect();
        for (number, (slice, _)) in slices[0].iter().enumerate() {
            if names.contains(&slice.name) {
                let values = slices.iter().map(|slices| slices[number].1.shallow_clone());
                held.push(HeldSlice {
                    slice: slice.clone(),
                    values: values.collect(),
                });
            }
        }
    }
    held
}

/// Returns all values of the rows `rows`, from the slice that contains them.
fn find_rows(held: &[HeldSlice], rows: &TensorSlice) -> Result<Vec<Tensor>, Error> {
    let contains = |held: &&HeldSlice| {
        let slice = &held.slice;
        slice.name == rows.name
            && row_range(slice).contains(&rows.offset[0])
            && slice.offset[1..] == rows.offset[1..]
    };
    let found = held
        .iter()
        .find(contains)
        .ok_or_else(|| Error::Placement(format!("rows of {} are not here", rows.name)))?;
    let start = rows.offset[0] - found.slice.offset[0];
    let values = found.values.iter();
    Ok(values.map(|x| x.narrow(0, start, rows.shape[0])).collect())
}

fn row_range(slice: &TensorSlice) -> Range<i64> {
    slice.offset[0]..slice.offset[0] + slice.shape[0]
}

fn elements(slice: &TensorSlice) -> i64 {
    slice.shape.iter().product()
}

/// Rows of a tensor that go from one rank to another, or stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) rows: TensorSlice,
}

/// Plans moves from the slices that each rank holds to those that it is to hold.
///
/// A rank keeps rows that it holds. Of several holders, the one that has the fewest elements to
/// send so far sends them.
///
/// # Errors
/// If no rank holds a row that a rank is to hold.
pub(crate) fn plan_moves(
    before: &[Vec<TensorSlice>],
    after: &[Vec<TensorSlice>],
) -> Result<Vec<Move>, String> {
    // Few ranks hold rows of an expert, however many ranks there are.
    let mut by_name: HashMap<&str, Vec<(usize, &TensorSlice)>> = HashMap::new();
    for (rank, held) in before.iter().enumerate() {
        for slice in held {
            let holders = by_name.entry(slice.name.as_str()).or_default();
            holders.push((rank, slice));
        }
    }
    let mut moves = Vec::new();
    let mut sent = vec![0; before.len()];
    for (to, wanted) in after.iter().enumerate() {
        for slice in wanted {
            let wanted_rows = row_range(slice);
            let holders = by_name.get(slice.name.as_str());
            let mut row = wanted_rows.start;
            while row < wanted_rows.end {
                let of_row = holders.into_iter().flatten().filter_map(|&(rank, held)| {
                    let until = end_of_held_rows(held, slice, row)?;
                    Some((rank, until))
                });
                let chosen = of_row.min_by_key(|&(rank, _)| (rank != to, sent[rank], rank));
                let (from, until) =
                    chosen.ok_or_else(|| format!("no rank holds row {row} of {}", slice.name))?;
                let mut rows = slice.clone();
                rows.offset[0] = row;
                rows.shape[0] = until.min(wanted_rows.end) - row;
                if from != to {
                    sent[from] += elements(&rows);
                }
                row += rows.shape[0];
                moves.push(Move { from, to, rows });
            }
        }
    }
    Ok(moves)
}

/// Returns the end of the rows of `held` if it contains row `row` of `slice`, a slice of the same
/// tensor.
fn end_of_held_rows(held: &TensorSlice, slice: &TensorSlice, row: i64) -> Option<i64> {
    let contains = row_range(held).contains(&row)
        && held.offset[1..] == slice.offset[1..]
        && held.shape[1..] == slice.shape[1..];
    contains.then(|| row_range(held).end)
}

/// Executes `moves` among the ranks of `group`.
///
/// `source` and `target` return the tensors of rows on this rank before and after the moves, in the
/// same order.
///
/// # Errors
/// If the exchange fails.
pub(crate) fn execute_moves(
    moves: &[Move],
    group: &Arc<dyn Communicator>,
    source: impl Fn(&TensorSlice) -> Result<Vec<Tensor>, Error>,
    target: impl Fn(&TensorSlice) -> Result<Vec<Tensor>, Error>,
) -> Result<(), Error> {
    let rank = group.rank();
    let count = |tensors: &[Tensor]| tensors.iter().map(Tensor::numel).sum::<usize>() as i64;
    let empty = |elements: i64| Tensor::empty([elements], (Kind::Float, Device::Cpu));
    let mut sent = vec![empty(0)];
    let mut send_counts = vec![0; group.size()];
    // The plan lists moves by receiver, as the all-to-all needs them.
    for Move { to, rows, .. } in moves.iter().filter(|m| m.from == rank) {
        let tensors = source(rows)?;
        send_counts[*to] += count(&tensors);
        let flat = |x: &Tensor| x.to_device(Device::Cpu).to_kind(Kind::Float).reshape([-1]);
        sent.extend(tensors.iter().map(flat));
    }
    let mut targets = Vec::new();
    let mut receive_counts = vec![0; group.size()];
    for Move { from, rows, .. } in moves.iter().filter(|m| m.to == rank) {
        let tensors = target(rows)?;
        receive_counts[*from] += count(&tensors);
        targets.push((*from, tensors));
    }
    let sent = tch::no_grad(|| Tensor::cat(&sent, 0));
    let received = empty(receive_counts.iter().sum::<i64>());
    group
        .all_to_all(&received, &sent, &receive_counts, &send_counts)
        .and_then(Work::wait)?;
    // Values arrive by sender, each sender's in the order of the plan.
    targets.sort_by_key(|(from, _)| *from);
    let mut next = 0;
    for mut tensor in targets.into_iter().flat_map(|(_, tensors)| tensors) {
        let len = tensor.numel() as i64;
        let values = received.narrow(0, next, len).view(tensor.size().as_slice());
        tch::no_grad(|| tensor.f_copy_(&values))?;
        next += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Share,
        model::{position::ShardPosition, replicas::Replicas},
        stage_layout::StageRank,
    };
    use std::collections::HashSet;

    fn rows(name: &str, start: i64, len: i64) -> TensorSlice {
        let mut slice = TensorSlice::whole(name, &[8, 3]);
        slice.offset[0] = start;
        slice.shape[0] = len;
        slice
    }

    #[test]
    fn rows_come_from_holders_and_stay_where_they_can() {
        // Two replicas, in which each rank has half of an expert's rows; the experts swap ranks.
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

    /// Two owners with two replicas, whose rows two ranks split, before and after a move.
    #[test]
    fn the_ranks_of_a_stage_hold_each_row_once_per_replica() {
        let share = |rank, ranks| Share { rank, ranks };
        let rank = |rank: usize| StageRank {
            position: ShardPosition {
                tensor: share(0, 1),
                expert: share(rank / 2 % 2, 2),
                expert_tensor: share(rank % 2, 2),
                vocabulary: share(0, 1),
                vocabulary_replicas: Replicas::Dense,
            },
            shards: [(rank / 4 % 2, 2); Replicas::ALL.len()],
        };
        let rows = ExpertRows {
            hidden: 5,
            moe: MoeConfig::new(4, 1, 6),
            layout: StageLayout::of_ranks((0..16).map(rank).collect()),
        };
        for slots in [[0, 1, 2, 3], [2, 1, 0, 3]] {
            for expert in 0..4 {
                let names = ["gate_up", "down"].map(|part| format!("moe.experts.{expert}.{part}"));
                let names = BTreeSet::from(names);
                let held = rows.of_stage("moe", &slots, &names);
                let owner = slots[expert] as usize / 2;
                let mut elements = 0;
                for (rank, slices) in held.iter().enumerate() {
                    assert!(slices.is_empty() || rank / 2 % 2 == owner);
                    elements += slices.iter().map(super::elements).sum::<i64>();
                }
                assert_eq!(elements, 2 * (12 * 5 + 5 * 6));
                // The replicas 0 to 7 hold what 8 to 15 do, and nothing twice.
                assert_eq!(held[..8], held[8..]);
                let mut all: Vec<&TensorSlice> = held[..8].iter().flatten().collect();
                let count = all.len();
                all.sort();
                all.dedup();
                assert_eq!(all.len(), count);
            }
        }
    }

    #[test]
    fn replicas_share_sending() {
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
