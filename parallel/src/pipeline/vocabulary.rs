//! Inserts the passes of vocabulary parallelism into any order (arXiv 2411.05288, section 5).
//!
//! Between the last stage's forward of a microbatch and its backward, all ranks run S; except with
//! `vocab-2` also T, and with `naive` N between them. Collectives separate these passes. To keep
//! ranks from waiting for them, every backward is delayed by one microbatch per barrier. The
//! activations of these microbatches are the only memory it costs.
//!
//! Each rank then runs S of a microbatch after the pass during which the last stage's forward
//! ended. The rank of the last stage does so one backward later, right after T of the microbatch
//! before. So all ranks do the same work within the time of one pass, and collectives overlap with
//! passes of layers. Embedding passes accompany S, one microbatch ahead of their use.

use super::{Order, Pass, PassKind, Vocabulary, communication::Dependency, simulate::Costs};
use std::collections::HashMap;

/// Returns `order` with the embedding and the output layer on all ranks.
///
/// `costs` decide where passes go. The result is correct for any other costs, if not optimal.
///
/// # Panics
/// If `order` already has passes of vocabulary parallelism, or cannot run.
pub fn with_vocabulary(order: &Order, vocabulary: Vocabulary, costs: &Costs) -> Order {
    assert!(
        order.vocabulary.is_none(),
        "the order already has passes of vocabulary parallelism"
    );
    let delay = vocabulary.extra_microbatches(order.ranks.len()) * order.chunks;
    let base = Order {
        ranks: order
            .ranks
            .iter()
            .map(|passes| delay_backwards(passes, delay))
            .collect(),
        ..order.clone()
    };
    Order {
        vocabulary: Some(vocabulary),
        ranks: insert(&base, vocabulary, costs),
        ..base
    }
}

/// A pass and the sort key of its delayed position.
struct DelayedPass {
    /// Number of forwards before it.
    forwards: usize,
    is_backward: bool,
    index: usize,
    pass: Pass,
}

/// Moves every backward behind `delay` more forwards, as long as there are any.
fn delay_backwards(passes: &[Pass], delay: usize) -> Vec<Pass> {
    let is_forward = |pass: &Pass| pass.kind == PassKind::Forward;
    let total = passes.iter().filter(|pass| is_forward(pass)).count();
    let mut delayed = Vec::new();
    let mut forwards = 0;
    for (index, &pass) in passes.iter().enumerate() {
        let is_backward = !is_forward(&pass);
        forwards += usize::from(!is_backward);
        delayed.push(DelayedPass {
            forwards: if is_backward {
                (forwards + delay).min(total)
            } else {
                forwards
            },
            is_backward,
            index,
            pass,
        });
    }
    delayed.sort_by_key(|delayed| (delayed.forwards, delayed.is_backward, delayed.index));
    delayed.into_iter().map(|delayed| delayed.pass).collect()
}

/// The progress of one rank during the insertion.
#[derive(Default)]
struct RankState {
    /// The next pass of its own list.
    at: usize,
    /// The next pass of the output layer, as an index of the sequence.
    output: usize,
    clock: f64,
    list: Vec<Pass>,
}

/// The progress of one pass of the output layer.
#[derive(Clone, Copy)]
struct OutputState {
    /// Number of ranks that still have to run it.
    ranks_left: usize,
    /// The time at which the last rank so far has finished it.
    end: f64,
}

/// The progress of all ranks.
struct InsertionState<'a> {
    base: &'a Order,
    vocabulary: Vocabulary,
    costs: &'a Costs,
    /// End times of passes of layers, by rank.
    ended: HashMap<(usize, Pass), f64>,
    /// The passes of the output layer, in the order of every rank.
    sequence: &'a [Pass],
    outputs: HashMap<Pass, OutputState>,
    /// For each microbatch, the number of forwards of the last stage before its backward.
    overlaps: Vec<usize>,
    /// For each microbatch, the time of the backward that follows its forward on the last stage's
    /// rank, or zero.
    next_backward_times: Vec<f64>,
}

/// Returns the passes of the output layer in order.
///
/// Each pass is as many microbatches behind S as there are barriers between, if the backward leaves
/// time for that.
fn output_sequence(vocabulary: Vocabulary, overlaps: &[usize]) -> Vec<Pass> {
    let mut slots: Vec<(usize, Pass)> = Vec::new();
    for (microbatch, &overlap) in overlaps.iter().enumerate() {
        for (barriers, &kind) in vocabulary.passes().iter().enumerate() {
            let slot = microbatch + barriers.min(overlap);
            slots.push((slot, Pass::new(kind, 0, microbatch)));
        }
    }
    // The sort is stable: older microbatches come first within a slot.
    slots.sort_by_key(|&(slot, _)| slot);
    slots.into_iter().map(|(_, pass)| pass).collect()
}

/// The earliest pass that can start.
struct Candidate {
    start: f64,
    rank: usize,
    pass: Pass,
}

impl InsertionState<'_> {
    /// Returns the time at which S of a microbatch may start on `rank`, if that is known.
    fn logits_ready_at(&self, rank: usize, microbatch: usize) -> Option<f64> {
        let (last_rank, chunk) = self.base.rank_and_chunk(self.base.stages() - 1);
        let forward = Pass::new(PassKind::Forward, chunk, microbatch);
        let end = self.ended.get(&(last_rank, forward))?;
        // The rank of the last stage runs a backward first; the others use that time for their S.
        let wait = if rank == last_rank {
            self.next_backward_times[microbatch]
        } else {
            self.costs.collective
        };
        Some(end + wait)
    }

    /// Returns the time at which `pass` of the output layer may start on `rank`, if that is known.
    fn output_ready_at(&self, rank: usize, pass: Pass) -> Option<f64> {
        let kinds = self.vocabulary.passes();
        let barriers = kinds
            .iter()
            .position(|&kind| kind == pass.kind)
            .expect("it is a pass of the output layer");
        if barriers == 0 {
            self.logits_ready_at(rank, pass.microbatch)
        } else if self.overlaps[pass.microbatch] >= barriers {
            // It accompanies a later S.
            self.logits_ready_at(rank, pass.microbatch + barriers)
        } else {
            // Its own backward comes before that S.
            let kind = kinds[barriers - 1];
            self.output_complete_at(Pass { kind, ..pass })
        }
    }

    /// Returns the end of a pass of the output layer on all ranks and of its collective, if known.
    fn output_complete_at(&self, pass: Pass) -> Option<f64> {
        let output = &self.outputs[&pass];
        (output.ranks_left == 0).then_some(output.end + self.costs.collective)
    }

    /// Returns the time at which the dependencies of `pass` of a layer are ready, if that is known.
    fn ready_at(&self, rank: usize, pass: Pass) -> Option<f64> {
        let mut ready = 0.0f64;
        for dependency in self.base.dependencies(rank, pass) {
            let end = match dependency {
                Dependency::Pass(other) => self.end_time(rank, other)?,
                Dependency::Message(message) => {
                    let (peer, producer) = self.base.producer(message);
                    self.end_time(peer, producer)? + self.costs.send
                }
                // The base has no vocabulary parallelism, so this does not occur.
                Dependency::Collective(_) => 0.0,
            };
            ready = ready.max(end);
        }
        let is_last_stage = self.base.stage(rank, pass.chunk) + 1 == self.base.stages();
        if pass.kind.gives_input_gradient() && is_last_stage {
            let kind = if self.vocabulary.gradient_after_t() {
                PassKind::LogitsBackward
            } else {
                PassKind::Logits
            };
            let output = Pass::new(kind, 0, pass.microbatch);
            ready = ready.max(self.output_complete_at(output)?);
        }
        Some(ready)
    }

    /// Returns the end of a pass; a backward that is split ends with its B.
    fn end_time(&self, rank: usize, pass: Pass) -> Option<f64> {
        let end = |pass| self.ended.get(&(rank, pass)).copied();
        let kind = PassKind::BackwardInput;
        let split = || end(Pass { kind, ..pass }).filter(|_| pass.kind == PassKind::Backward);
        end(pass).or_else(split)
    }

    /// Returns the earliest pass that can start.
    ///
    /// If two can start at the same time on one rank, the output layer comes first.
    fn earliest(&self, ranks: &[RankState]) -> Option<Candidate> {
        let mut best: Option<Candidate> = None;
        for (rank, state) in ranks.iter().enumerate() {
            let output = self
                .sequence
                .get(state.output)
                .copied()
                .map(|pass| (self.output_ready_at(rank, pass), pass));
            let own = self.base.ranks[rank]
                .get(state.at)
                .copied()
                .map(|pass| (self.ready_at(rank, pass), pass));
            for (ready, pass) in output.into_iter().chain(own) {
                let Some(ready) = ready else { continue };
                let start = state.clock.max(ready);
                if best.as_ref().is_none_or(|best| start < best.start) {
                    best = Some(Candidate { start, rank, pass });
                }
            }
        }
        best
    }

    /// Appends a pass to the list of its rank.
    fn append(&mut self, state: &mut RankState, candidate: Candidate) {
        let Candidate { start, rank, pass } = candidate;
        state.list.push(pass);
        state.clock = start + self.costs.pass_time(self.base, rank, pass);
        if !pass.kind.is_vocabulary() {
            state.at += 1;
            self.ended.insert((rank, pass), state.clock);
            return;
        }
        if pass.kind == PassKind::Logits {
            // Leaves time for the embedding passes that accompany it.
            let costs = &self.costs.vocabulary[rank];
            state.clock += costs.embed + costs.embed_backward;
        }
        state.output += 1;
        let output = self.outputs.get_mut(&pass);
        let output = output.expect("it is a pass of the output layer");
        output.ranks_left -= 1;
        output.end = output.end.max(state.clock);
    }
}

/// Returns the passes of each rank with those of vocabulary parallelism.
fn insert(base: &Order, vocabulary: Vocabulary, costs: &Costs) -> Vec<Vec<Pass>> {
    let ranks = base.ranks.len();
    let mut overlaps = vec![0; base.microbatches];
    let mut next_backward_times = vec![0.0; base.microbatches];
    if vocabulary != Vocabulary::Interlaced {
        overlaps = forwards_before_backward(base);
        next_backward_times = times_of_next_backward(base, costs);
    }
    let sequence = output_sequence(vocabulary, &overlaps);
    let not_run = OutputState {
        ranks_left: ranks,
        end: 0.0,
    };
    let mut insertion = InsertionState {
        base,
        vocabulary,
        costs,
        ended: HashMap::new(),
        sequence: &sequence,
        outputs: sequence.iter().map(|&pass| (pass, not_run)).collect(),
        overlaps,
        next_backward_times,
    };
    let mut states = (0..ranks)
        .map(|_| RankState::default())
        .collect::<Vec<RankState>>();
    while let Some(candidate) = insertion.earliest(&states) {
        let state = &mut states[candidate.rank];
        insertion.append(state, candidate);
    }
    let is_complete = |(state, passes): (&RankState, &Vec<Pass>)| {
        state.at == passes.len() && state.output == sequence.len()
    };
    assert!(
        states.iter().zip(&base.ranks).all(is_complete),
        "the order deadlocks: check it before inserting vocabulary parallelism"
    );
    let lists = states
        .into_iter()
        .map(|state| state.list)
        .collect::<Vec<Vec<Pass>>>();
    let embedding = EmbeddingSlots::new(base, &lists);
    lists.iter().map(|list| embedding.insert(list)).collect()
}

/// Returns the values of [`InsertionState::next_backward_times`].
fn times_of_next_backward(base: &Order, costs: &Costs) -> Vec<f64> {
    let (rank, chunk) = base.rank_and_chunk(base.stages() - 1);
    let mut times = vec![0.0; base.microbatches];
    for pair in base.ranks[rank].windows(2) {
        let pass = pair[0];
        let next = pair[1];
        let is_forward = pass.kind == PassKind::Forward && pass.chunk == chunk;
        if is_forward && next.kind.gives_input_gradient() {
            times[pass.microbatch] = costs.pass_time(base, rank, next);
        }
    }
    times
}

/// Returns the values of [`InsertionState::overlaps`].
fn forwards_before_backward(base: &Order) -> Vec<usize> {
    let (rank, chunk) = base.rank_and_chunk(base.stages() - 1);
    let mut forwards = 0usize;
    let mut overlaps = vec![0; base.microbatches];
    for pass in base.ranks[rank].iter().filter(|pass| pass.chunk == chunk) {
        if pass.kind == PassKind::Forward {
            forwards += 1;
        } else if pass.kind.gives_input_gradient() {
            overlaps[pass.microbatch] = forwards.saturating_sub(pass.microbatch + 1);
        }
    }
    overlaps
}

/// The S that each microbatch's embedding passes accompany.
struct EmbeddingSlots {
    /// None: the lookup runs before all other passes.
    lookup: Vec<Option<usize>>,
    /// None: the gradient is computed after all other passes.
    gradient: Vec<Option<usize>>,
}

impl EmbeddingSlots {
    fn new(base: &Order, lists: &[Vec<Pass>]) -> EmbeddingSlots {
        let microbatches = base.microbatches;
        let (rank, chunk) = base.rank_and_chunk(0);
        let mut slots = EmbeddingSlots {
            lookup: vec![None; microbatches],
            gradient: vec![None; microbatches],
        };
        let mut logits = 0usize;
        for pass in &lists[rank] {
            match pass.kind {
                PassKind::Logits => logits += 1,
                // One S is between the lookup and its use, for the sum over ranks.
                PassKind::Forward if pass.chunk == chunk => {
                    slots.lookup[pass.microbatch] = logits.checked_sub(2);
                }
                kind if kind.gives_input_gradient() && pass.chunk == chunk => {
                    let slot = logits + 1;
                    slots.gradient[pass.microbatch] = (slot < microbatches).then_some(slot);
                }
                _ => {}
            }
        }
        slots
    }

    /// Returns a rank's passes with those of the embedding.
    fn insert(&self, list: &[Pass]) -> Vec<Pass> {
        let lookups = |slot| passes_in(&self.lookup, PassKind::Embed, slot);
        let gradients = |slot| passes_in(&self.gradient, PassKind::EmbedBackward, slot);
        let mut passes: Vec<Pass> = lookups(None).collect();
        for &pass in list {
            passes.push(pass);
            if pass.kind == PassKind::Logits {
                let slot = Some(pass.microbatch);
                passes.extend(lookups(slot));
                passes.extend(gradients(slot));
            }
        }
        passes.extend(gradients(None));
        passes
    }
}

/// Returns passes of `kind` for the microbatches that have `slot`.
fn passes_in(
    slots: &[Option<usize>],
    kind: PassKind,
    slot: Option<usize>,
) -> impl Iterator<Item = Pass> {
    let chosen = slots.iter().enumerate();
    chosen
        .filter(move |(_, chosen)| **chosen == slot)
        .map(move |(microbatch, _)| Pass::new(kind, 0, microbatch))
}
