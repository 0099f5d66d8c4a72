//! Inserts the passes of vocabulary parallelism into any order (arXiv 2411.05288, section 5).
//!
//! Between the last stage's forward of a microbatch and its backward, S runs on all ranks, but with `vocab-2` also T (and
//! N before it with `naive`), and collectives lie in between. So that nobody waits for those, every backward is put off by one microbatch for each
//! barrier; that is all the memory it costs. Then each rank takes S of a microbatch as soon as it has ended what it was
//! at when the last stage's forward ended, the last stage's own rank one backward later, right after T of the microbatch before: the same work on all
//! ranks lies within the time of one pass, and the collectives hide behind passes of layers. Embedding passes go with S,
//! one microbatch ahead of their use.

use super::communication::Dependency;
use super::simulate::Costs;
use super::{Order, Pass, PassKind, Vocabulary};
use std::collections::HashMap;

/// `order` with the vocabulary's layers on all its ranks. `costs` say where slots fall; the result is right, if not best,
/// for any others.
///
/// # Panics
/// When `order` already has passes of the vocabulary, or cannot run.
pub fn with_vocabulary(order: &Order, vocabulary: Vocabulary, costs: &Costs) -> Order {
    assert!(
        order.vocabulary.is_none(),
        "the vocabulary's passes are already there"
    );
    let ranks = order
        .ranks
        .iter()
        .map(|passes| {
            delay_backwards(
                passes,
                vocabulary.extra_microbatches(order.ranks.len()) * order.chunks,
            )
        })
        .collect();
    let base = Order {
        ranks,
        vocabulary: None,
        ..order.clone()
    };
    let lists = insert(&base, vocabulary, costs);
    Order {
        vocabulary: Some(vocabulary),
        ranks: lists,
        ..base
    }
}

/// Every backward after `forwards` more forwards than before, as long as there are any.
fn delay_backwards(passes: &[Pass], forwards: usize) -> Vec<Pass> {
    let total = passes
        .iter()
        .filter(|pass| pass.kind == PassKind::Forward)
        .count();
    let mut placed: Vec<(usize, bool, usize, Pass)> = Vec::new();
    let mut seen = 0;
    for (index, &pass) in passes.iter().enumerate() {
        if pass.kind == PassKind::Forward {
            seen += 1;
            placed.push((seen, false, index, pass));
        } else {
            placed.push(((seen + forwards).min(total), true, index, pass));
        }
    }
    placed.sort_by_key(|&(after, backward, index, _)| (after, backward, index));
    placed.into_iter().map(|(.., pass)| pass).collect()
}

/// The state of a rank while passes are dealt out.
struct RankState {
    /// Next pass of its own list.
    at: usize,
    /// Next pass of the output layer, by its number in the sequence.
    output: usize,
    clock: f64,
    list: Vec<Pass>,
}

/// What has happened so far.
struct InsertionState<'a> {
    base: &'a Order,
    vocabulary: Vocabulary,
    costs: &'a Costs,
    /// When passes of layers ended.
    ended: HashMap<(usize, Pass), f64>,
    /// The passes of the output layer, in every rank's order.
    sequence: &'a [Pass],
    /// For each of them: ranks that still have to do it, and when the last so far ended.
    outputs: HashMap<Pass, (usize, f64)>,
    /// How many forwards of the last stage come between the one of each microbatch and its backward.
    overlaps: Vec<usize>,
    /// Time of the backward that the last stage's rank does right after the last forward of each microbatch, if any.
    next_backward_times: Vec<f64>,
}

/// The output layer's passes: each as many microbatches behind S as barriers lie between, where the backward leaves time.
fn sequence(vocabulary: Vocabulary, overlaps: &[usize]) -> Vec<Pass> {
    let kinds = vocabulary.passes();
    let mut slots: Vec<(usize, Pass)> = Vec::new();
    for (microbatch, &overlap) in overlaps.iter().enumerate() {
        for (behind, &kind) in kinds.iter().enumerate() {
            slots.push((
                microbatch + behind.min(overlap),
                Pass::new(kind, 0, microbatch),
            ));
        }
    }
    // Stable: within a slot older microbatches first.
    slots.sort_by_key(|&(slot, _)| slot);
    slots.into_iter().map(|(_, pass)| pass).collect()
}

impl InsertionState<'_> {
    /// When `pass` of the output layer may start on rank `of`, if that is known.
    fn output_ready_at(&self, of: usize, pass: Pass) -> Option<f64> {
        let last = self.base.stages() - 1;
        let (rank, chunk) = self.base.rank_and_chunk(last);
        let logits_slot_start = |microbatch: usize| {
            let end = self
                .ended
                .get(&(rank, Pass::new(PassKind::Forward, chunk, microbatch)))?;
            // The rank of the last stage does a backward meanwhile, and so has the others' time to take theirs.
            let wait = if of == rank {
                self.next_backward_times[microbatch]
            } else {
                self.costs.collective
            };
            Some(end + wait)
        };
        let kinds = self.vocabulary.passes();
        let behind = kinds
            .iter()
            .position(|&kind| kind == pass.kind)
            .expect("it is one of the output layer's");
        match behind.checked_sub(1) {
            None => logits_slot_start(pass.microbatch),
            // It goes with a later S, unless its own backward comes before that.
            Some(_) if self.overlaps[pass.microbatch] >= behind => {
                logits_slot_start(pass.microbatch + behind)
            }
            Some(before) => self.complete(Pass {
                kind: kinds[before],
                ..pass
            }),
        }
    }

    /// When `pass` of the output layer has ended everywhere and its collective too.
    fn complete(&self, pass: Pass) -> Option<f64> {
        let (left, end) = self.outputs[&pass];
        (left == 0).then_some(end + self.costs.collective)
    }

    /// When `pass` of `rank` has all that it needs, if that is known.
    fn ready(&self, rank: usize, pass: Pass) -> Option<f64> {
        let mut ready = 0.0f64;
        for need in self.base.dependencies(rank, pass) {
            let end = match need {
                Dependency::Pass(other) => end_time(&self.ended, rank, other)?,
                Dependency::Message(message) => {
                    let (peer, producer) = self.base.producer(message);
                    end_time(&self.ended, peer, producer)? + self.costs.send
                }
                Dependency::Collective(_) => 0.0, // of the vocabulary: below
            };
            ready = ready.max(end);
        }
        if pass.kind.gives_input_gradient()
            && self.base.stage(rank, pass.chunk) + 1 == self.base.stages()
        {
            let kind = if self.vocabulary.gradient_after_t() {
                PassKind::LogitsBackward
            } else {
                PassKind::Logits
            };
            ready = ready.max(self.complete(Pass::new(kind, 0, pass.microbatch))?);
        }
        Some(ready)
    }
}

fn insert(base: &Order, vocabulary: Vocabulary, costs: &Costs) -> Vec<Vec<Pass>> {
    let ranks = base.ranks.len();
    let interlaced = vocabulary == Vocabulary::Interlaced;
    let overlaps = if interlaced {
        vec![0; base.microbatches]
    } else {
        overlaps(base)
    };
    let next_backward_times = if interlaced {
        vec![0.0; base.microbatches]
    } else {
        next_backward_times(base, costs)
    };
    let sequence = sequence(vocabulary, &overlaps);
    let mut states: Vec<RankState> = (0..ranks)
        .map(|_| RankState {
            at: 0,
            output: 0,
            clock: 0.0,
            list: Vec::new(),
        })
        .collect();
    let outputs = sequence.iter().map(|&pass| (pass, (ranks, 0.0))).collect();
    let mut progress = InsertionState {
        base,
        vocabulary,
        costs,
        ended: HashMap::new(),
        sequence: &sequence,
        outputs,
        overlaps,
        next_backward_times,
    };
    loop {
        // Of all that can start, the earliest; on one rank the output layer before a pass of the same time.
        let mut best: Option<(f64, usize, Pass)> = None;
        for (rank, state) in states.iter().enumerate() {
            let output = progress
                .sequence
                .get(state.output)
                .map(|&pass| (progress.output_ready_at(rank, pass), pass));
            let own = base.ranks[rank]
                .get(state.at)
                .map(|&pass| (progress.ready(rank, pass), pass));
            for (opens, pass) in output.into_iter().chain(own) {
                let Some(start) = opens.map(|opens| state.clock.max(opens)) else {
                    continue;
                };
                if best.is_none_or(|(time, ..)| start < time) {
                    best = Some((start, rank, pass));
                }
            }
        }
        let Some((start, rank, pass)) = best else {
            break;
        };
        let state = &mut states[rank];
        state.list.push(pass);
        state.clock = start + costs.of(base, rank, pass);
        if pass.kind.is_vocabulary() {
            if pass.kind == PassKind::Logits {
                // The embedding passes that will lie beside it.
                state.clock += costs.vocabulary[rank].embed + costs.vocabulary[rank].embed_backward;
            }
            let (left, end) = progress
                .outputs
                .get_mut(&pass)
                .expect("it is one of the output layer's");
            (*left, *end) = (*left - 1, end.max(state.clock));
            state.output += 1;
        } else {
            state.at += 1;
            progress.ended.insert((rank, pass), state.clock);
        }
    }
    let complete = states
        .iter()
        .zip(&base.ranks)
        .all(|(s, passes)| s.at == passes.len() && s.output == sequence.len());
    assert!(
        complete,
        "an order that stops cannot take in the vocabulary: check it first"
    );
    let lists: Vec<Vec<Pass>> = states.into_iter().map(|state| state.list).collect();
    let embedding = EmbeddingSlots::new(base, &lists);
    lists.iter().map(|list| embedding.insert(list)).collect()
}

fn next_backward_times(base: &Order, costs: &Costs) -> Vec<f64> {
    let (rank, chunk) = base.rank_and_chunk(base.stages() - 1);
    let mut times = vec![0.0; base.microbatches];
    for pair in base.ranks[rank].windows(2) {
        if pair[0].kind == PassKind::Forward
            && pair[0].chunk == chunk
            && pair[1].kind.gives_input_gradient()
        {
            times[pair[0].microbatch] = costs.of(base, rank, pair[1]);
        }
    }
    times
}

fn overlaps(base: &Order) -> Vec<usize> {
    let last = base.stages() - 1;
    let (rank, chunk) = base.rank_and_chunk(last);
    let mut forwards = 0;
    let mut overlaps = vec![0; base.microbatches];
    for pass in base.ranks[rank].iter().filter(|pass| pass.chunk == chunk) {
        if pass.kind == PassKind::Forward {
            forwards += 1;
        } else if pass.kind.gives_input_gradient() {
            overlaps[pass.microbatch] = usize::saturating_sub(forwards, pass.microbatch + 1);
        }
    }
    overlaps
}

fn end_time(ended: &HashMap<(usize, Pass), f64>, rank: usize, pass: Pass) -> Option<f64> {
    let whole = ended.get(&(rank, pass));
    let part = || {
        ended.get(&(
            rank,
            Pass {
                kind: PassKind::BackwardInput,
                ..pass
            },
        ))
    };
    whole
        .or_else(|| part().filter(|_| pass.kind == PassKind::Backward))
        .copied()
}

/// Beside which S each microbatch's embedding is looked up (None: before everything), and its gradient taken (None:
/// after everything).
struct EmbeddingSlots {
    lookup: Vec<Option<usize>>,
    gradient: Vec<Option<usize>>,
}

impl EmbeddingSlots {
    fn new(base: &Order, lists: &[Vec<Pass>]) -> EmbeddingSlots {
        let m = base.microbatches;
        let (rank, chunk) = base.rank_and_chunk(0);
        let mut embedding = EmbeddingSlots {
            lookup: vec![None; m],
            gradient: vec![None; m],
        };
        let mut logits = 0usize;
        for pass in &lists[rank] {
            match pass.kind {
                PassKind::Logits => logits += 1,
                // One S lies between the lookup and its use, for the sum over ranks.
                PassKind::Forward if pass.chunk == chunk => {
                    embedding.lookup[pass.microbatch] = logits.checked_sub(2)
                }
                kind if kind.gives_input_gradient() && pass.chunk == chunk => {
                    embedding.gradient[pass.microbatch] = Some(logits + 1).filter(|&slot| slot < m);
                }
                _ => {}
            }
        }
        embedding
    }

    /// A rank's passes with those of the embedding.
    fn insert(&self, list: &[Pass]) -> Vec<Pass> {
        let of = |kind: PassKind, slot: Option<usize>| {
            let places = if kind == PassKind::Embed {
                &self.lookup
            } else {
                &self.gradient
            };
            let chosen = places
                .iter()
                .enumerate()
                .filter(move |(_, place)| **place == slot);
            chosen.map(move |(microbatch, _)| Pass::new(kind, 0, microbatch))
        };
        let mut passes: Vec<Pass> = of(PassKind::Embed, None).collect();
        for &pass in list {
            passes.push(pass);
            if pass.kind == PassKind::Logits {
                passes.extend(of(PassKind::Embed, Some(pass.microbatch)));
                passes.extend(of(PassKind::EmbedBackward, Some(pass.microbatch)));
            }
        }
        passes.extend(of(PassKind::EmbedBackward, None));
        passes
    }
}
