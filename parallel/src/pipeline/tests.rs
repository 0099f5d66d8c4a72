use super::{
    check::{ScheduleError, check},
    communication::{Dependency, receives_only, with_communication},
    refine::refined,
    schedules::ScheduleKind,
    simulate::{Costs, Span, Timeline, VocabularyCosts, simulate},
    vocabulary::with_vocabulary,
    *,
};
use proptest::prelude::*;
use std::collections::HashMap;

const ALGORITHMS: [Vocabulary; 4] = [
    Vocabulary::Naive,
    Vocabulary::Interlaced,
    Vocabulary::Vocab1,
    Vocabulary::Vocab2,
];

/// Returns 2 to 16 ranks with one to eight times as many microbatches.
fn sizes() -> impl Iterator<Item = (usize, usize)> {
    (2..=16).flat_map(|p| {
        let microbatches = [p, p + 1, 2 * p, 3 * p - 1, 4 * p, 8 * p];
        microbatches.map(move |m| (p, m))
    })
}

/// Returns all orders of a size, without those that do not exist for it.
fn orders(p: usize, m: usize) -> impl Iterator<Item = (ScheduleKind, Order)> {
    let order = move |(kind, name): (ScheduleKind, &str)| match kind.order(p, m, None) {
        Ok(order) => Some((kind, order)),
        Err(error) => {
            let allowed = match kind {
                ScheduleKind::Interleaved => !m.is_multiple_of(m / p),
                ScheduleKind::DualPipeV => m < 2 * p,
                _ => false,
            };
            assert!(allowed, "{name} {p} x {m}: {error}");
            None
        }
    };
    ScheduleKind::NAMES.into_iter().filter_map(order)
}

/// Returns 1 for F, B and W of a stage, and `x` for S, T, IF and IB together.
fn costs(order: &Order, x: f64) -> Costs {
    let one = VocabularyCosts {
        logits: x * 0.6,
        normalize: x * 0.1,
        logits_backward: x * 0.3,
        embed: x * 0.05,
        embed_backward: x * 0.05,
    };
    Costs {
        vocabulary: vec![one; order.ranks.len()],
        ..Costs::uniform(order.stages(), 1.0, 1.0, 1.0)
    }
}

fn run(order: Order, costs: &Costs) -> Timeline {
    simulate(&with_communication(order), costs)
}

/// Asserts that whatever a rank only receives is started one computation before its use.
///
/// The first computation of a rank is exempt.
fn assert_overlaps_computation(schedule: &Schedule) {
    for (rank, steps) in schedule.ranks.iter().enumerate() {
        let mut computed = 0;
        let mut messages = HashMap::new();
        let mut collectives = HashMap::new();
        for step in steps {
            match *step {
                Step::Receive(message, _) => drop(messages.insert(message, computed)),
                Step::EnterCollective(collective)
                    if receives_only(&schedule.order, rank, collective.kind) =>
                {
                    collectives.insert(collective, computed);
                }
                Step::Compute(pass) => {
                    for dependency in schedule.order.dependencies(rank, pass) {
                        let began = match dependency {
                            Dependency::Message(message) => messages[&message],
                            Dependency::Collective(collective) => {
                                collectives.get(&collective).copied().unwrap_or(0)
                            }
                            Dependency::Pass(_) => 0,
                        };
                        let overlaps = began < computed || computed == 0;
                        assert!(overlaps, "rank {rank}, {pass}: {dependency:?}");
                    }
                    let lookups = [PassKind::Embed, PassKind::EmbedBackward];
                    computed += usize::from(!lookups.contains(&pass.kind));
                }
                _ => {}
            }
        }
    }
}

#[test]
fn every_order_passes_the_check_with_and_without_the_vocabulary() {
    for (p, m) in sizes() {
        for (kind, order) in orders(p, m) {
            let name = kind.name();
            check(&with_communication(order.clone()))
                .unwrap_or_else(|error| panic!("{name} {p} x {m}: {error}"));
            for algorithm in ALGORITHMS {
                let order = with_vocabulary(&order, algorithm, &costs(&order, 2.0));
                let schedule = with_communication(order);
                check(&schedule)
                    .unwrap_or_else(|error| panic!("{name} {algorithm:?} {p} x {m}: {error}"));
                assert_overlaps_computation(&schedule);
            }
        }
    }
}

#[test]
fn bubbles_are_those_of_the_papers() {
    for (p, m) in sizes() {
        let before = p as f64 - 1.0;
        for (kind, order) in orders(p, m) {
            let chunks = order.chunks as f64;
            let uniform = costs(&order, 0.0);
            // In units of a rank's F, B and W, which have one part per chunk.
            let bubble = run(order, &uniform).bubble() / chunks;
            let expected = match kind {
                ScheduleKind::GPipe | ScheduleKind::OneFOneB => before * 3.0,
                ScheduleKind::Interleaved => before * 3.0 / chunks,
                ScheduleKind::ZbH1 => before,
                ScheduleKind::ZbV if m >= 2 * p => 0.0,
                // arXiv 2405.15362: half of 1F1B's, or 0.67 of it without reordering for few ranks.
                ScheduleKind::VHalf => {
                    let is_short = bubble <= 0.67 * before * 3.0;
                    assert!(is_short || p < 4, "{p} x {m}: {bubble}");
                    continue;
                }
                ScheduleKind::VMin => {
                    let is_short = bubble <= 0.75 * before * 3.0;
                    assert!(is_short || p < 4, "{p} x {m}: {bubble}");
                    continue;
                }
                ScheduleKind::DualPipeV => {
                    // At most (PP/2 - 1)(F&B + B - 3W) for PP = 2p stages, if F&B takes F + B + W.
                    let most = before * (3.0 + 2.0 - 3.0) / 2.0;
                    assert!(bubble <= most, "{p} x {m}: {bubble}");
                    continue;
                }
                ScheduleKind::ZbV => continue,
            };
            assert!(
                (bubble - expected).abs() < 1e-9,
                "{} {p} x {m}: {bubble}, expected {expected}",
                kind.name()
            );
        }
    }
}

#[test]
fn held_microbatches_are_those_of_the_papers() {
    for (p, m) in sizes().filter(|(p, m)| *m >= 3 * p) {
        for (kind, order) in orders(p, m) {
            let costs = costs(&order, 2.0);
            assert_held(kind, &run(order.clone(), &costs), 0, "");
            for algorithm in ALGORITHMS {
                let order = with_vocabulary(&order, algorithm, &costs);
                let timeline = run(order, &costs);
                let extra = algorithm.extra_microbatches(p);
                assert_held(kind, &timeline, extra, &format!("{algorithm:?} of {m}"));
            }
        }
    }
}

/// Asserts that every rank holds the papers' number of microbatches and `extra` ones.
fn assert_held(kind: ScheduleKind, timeline: &Timeline, extra: usize, case: &str) {
    let ranks = timeline.ranks.len();
    let microbatches = timeline.ranks[0]
        .iter()
        .filter(|span| span.pass.kind == PassKind::Forward && span.pass.chunk == 0)
        .count();
    let p = ranks as f64;
    let extra = extra as f64;
    for rank in 0..ranks {
        let held = timeline.peak_microbatches[rank];
        let until_b = timeline.peak_microbatches_until_b[rank];
        let below = p - rank as f64;
        let expected = match kind {
            ScheduleKind::GPipe => held == microbatches as f64,
            ScheduleKind::OneFOneB => held == below + extra,
            ScheduleKind::Interleaved => held == below + (p - 1.0) / 2.0 + extra,
            ScheduleKind::ZbH1 => held == p + extra && until_b == below + extra,
            ScheduleKind::ZbV => until_b <= p + extra,
            ScheduleKind::VHalf => until_b <= (p / 2.0).floor() + 1.0 + extra,
            ScheduleKind::VMin => until_b <= (p / 3.0).ceil() + 1.0 + extra,
            // PP + 1 chunks of PP = 2p stages.
            ScheduleKind::DualPipeV => until_b <= p + 0.5 + extra,
        };
        let name = kind.name();
        assert!(
            expected,
            "{name} {case}, rank {rank}: {held}, {until_b}; {timeline:?}"
        );
    }
}

#[test]
fn the_vocabulary_costs_no_bubble_for_each_microbatch() {
    for p in [2, 4, 7, 8, 16] {
        for ((kind, few), (_, many)) in orders(p, 4 * p).zip(orders(p, 8 * p)) {
            // The other two exist for comparison and cost time for each microbatch.
            for algorithm in [Vocabulary::Vocab1, Vocabulary::Vocab2] {
                for x in [0.3, 1.0, 4.0] {
                    let costs = costs(&few, x);
                    let bubble = |order: &Order| {
                        let order = with_vocabulary(order, algorithm, &costs);
                        run(order, &costs).bubble()
                    };
                    let few = bubble(&few);
                    let many = bubble(&many);
                    let case = format!("{} {algorithm:?} {p}, x {x}", kind.name());
                    assert!(many <= few + 1e-9, "{case}: {few} then {many}");
                }
            }
        }
    }
}

#[test]
fn measured_iterations_of_the_papers_authors_are_predicted() {
    let text = include_str!("fixtures/vocabulary_parallelism_8xa100.csv");
    let mut checked = 0;
    for line in text.lines().filter(|line| !line.starts_with('#')).skip(1) {
        let fields: Vec<&str> = line.split(',').collect();
        let times = |column: usize| -> Vec<f64> {
            let microseconds = fields[column].split(' ');
            microseconds
                .map(|time| time.parse::<f64>().unwrap() / 1e3)
                .collect()
        };
        let microbatches: usize = fields[3].parse().unwrap();
        let measured: f64 = fields[4].parse().unwrap();
        let forward = times(5);
        let backward = times(6);
        let logits = times(7);
        let embed = times(8);
        let embed_backward = times(9);
        let p = forward.len();
        // S and T were timed together; S has two of the three GEMMs.
        let vocabulary = (0..p).map(|rank| VocabularyCosts {
            logits: logits[rank] * 2.0 / 3.0,
            normalize: 0.0,
            logits_backward: logits[rank] / 3.0,
            embed: embed[rank],
            embed_backward: embed_backward[rank],
        });
        let costs = Costs {
            vocabulary: vocabulary.collect(),
            forward,
            backward_input: backward,
            backward_weight: vec![0.0; p],
            send: times(10)[0],
            collective: times(10)[0],
        };
        let order = ScheduleKind::OneFOneB.order(p, microbatches, None).unwrap();
        let order = match fields[0] {
            "vocab-1" => with_vocabulary(&order, Vocabulary::Vocab1, &costs),
            "vocab-2" => with_vocabulary(&order, Vocabulary::Vocab2, &costs),
            _ => order,
        };
        let predicted = run(order, &costs).total;
        let error = predicted / measured - 1.0;
        let case = fields[..3].join(" ");
        assert!(
            error.abs() < 0.02,
            "{case}: measured {measured} ms, predicted {predicted:.1}"
        );
        checked += 1;
    }
    assert_eq!(checked, 32);
}

/// Times of F, B, W, and of S and T together.
const REFINED_TIMES: [[f64; 4]; 3] = [
    [1.0, 1.0, 1.0, 2.0],
    [1.0, 1.3, 0.8, 3.0],
    [0.6, 1.5, 1.1, 0.7],
];

#[test]
fn refined_orders_take_less_time_and_hold_no_more() {
    let mut shorter = 0;
    for (p, m) in sizes().filter(|(p, m)| p * m <= 32) {
        for (kind, order) in orders(p, m) {
            for vocabulary in [None, Some(Vocabulary::Vocab1), Some(Vocabulary::Vocab2)] {
                for times in REFINED_TIMES {
                    let case = format!("{} {vocabulary:?} {p} x {m}, {times:?}", kind.name());
                    let costs = refined_costs(&order, times);
                    let order = match vocabulary {
                        Some(algorithm) => with_vocabulary(&order, algorithm, &costs),
                        None => order.clone(),
                    };
                    shorter += usize::from(assert_refined(&order, &costs, &case));
                }
            }
        }
    }
    // Some, not all: if F, B and W take equal times, the orders of the papers are optimal.
    assert!(shorter > 100, "{shorter}");
    let uniform = Costs {
        send: 0.05,
        collective: 0.1,
        ..Costs::uniform(8, 1.0, 1.0, 1.0)
    };
    let order = ScheduleKind::ZbV.order(4, 16, None).unwrap();
    let before = run(order.clone(), &uniform).total;
    let after = run(refined(&order, &uniform), &uniform).total;
    assert!(after > 0.97 * before, "{before} to {after}");
}

fn refined_costs(order: &Order, [f, b, w, x]: [f64; 4]) -> Costs {
    let vocabulary = VocabularyCosts::from_logits(Vocabulary::Vocab1, x / 3.0);
    Costs {
        send: 0.05 * f,
        collective: 0.1 * f,
        vocabulary: vec![vocabulary; order.ranks.len()],
        ..Costs::uniform(order.stages(), f, b, w)
    }
}

/// Asserts that refining costs neither time nor memory, and returns true if it gains 1 %.
fn assert_refined(order: &Order, costs: &Costs, case: &str) -> bool {
    let better = refined(order, costs);
    check(&with_communication(better.clone())).unwrap_or_else(|error| panic!("{case}: {error}"));
    let before = run(order.clone(), costs);
    let after = run(better.clone(), costs);
    let is_no_longer = after.total <= before.total * (1.0 + 1e-9);
    assert!(is_no_longer, "{case}: {} to {}", before.total, after.total);
    let holds_no_more = |held: fn(&Timeline) -> &Vec<f64>| {
        let mut pairs = held(&after).iter().zip(held(&before));
        pairs.all(|(after, before)| after <= before)
    };
    assert!(
        holds_no_more(|timeline| &timeline.peak_microbatches),
        "{case}"
    );
    assert!(
        holds_no_more(|timeline| &timeline.peak_microbatches_until_b),
        "{case}"
    );
    // An order without freedom is unchanged.
    let mut passes = order.ranks.iter().flatten();
    let is_split = passes.any(|pass| pass.kind == PassKind::BackwardWeight);
    let has_freedom = is_split || order.vocabulary.is_some();
    assert!(has_freedom || better == *order, "{case}");
    after.total < 0.99 * before.total
}

fn broken(change: impl Fn(&mut Schedule)) -> ScheduleError {
    let mut schedule = with_communication(ScheduleKind::OneFOneB.order(3, 4, None).unwrap());
    change(&mut schedule);
    check(&schedule).unwrap_err()
}

#[test]
fn broken_lists_are_refused_with_the_pass_named() {
    let error = broken(|schedule| {
        schedule.ranks[1]
            .retain(|step| !matches!(step, Step::Receive(message, 0) if message.microbatch == 2))
    });
    assert_eq!(
        error.to_string(),
        "rank 1: cannot compute F2: the activation of microbatch 2 for stage 1 is not received"
    );
    let error = broken(|schedule| {
        let is_third =
            |message: &Message| message.payload == Payload::Activation && message.microbatch == 2;
        schedule.ranks[0].retain(|step| match step {
            Step::Send(message, _) | Step::WaitSend(message) => !is_third(message),
            _ => true,
        });
    });
    assert_eq!(
        error.to_string(),
        "rank 1: receiving the activation of microbatch 2 for stage 1: rank 0 does not send it"
    );
    // A backward before its forward on one rank is found there.
    let reversed = |rank: usize| {
        let mut order = ScheduleKind::OneFOneB.order(3, 4, None).unwrap();
        order.ranks[rank].reverse();
        check(&with_communication(order)).unwrap_err().to_string()
    };
    assert_eq!(
        reversed(1),
        "rank 1: cannot compute BW3: F3 does not come before it"
    );
}

/// Checks an order of two ranks with two chunks each.
fn check_text(lines: [&str; 2]) -> Result<(), ScheduleError> {
    let file = OrderFile {
        placement: Placement::V,
        chunks: 2,
        ranks: lines.map(String::from).to_vec(),
    };
    check(&with_communication(file.parse().unwrap()))
}

#[test]
fn broken_orders_are_refused_with_the_pass_named() {
    let refused = |lines| check_text(lines).unwrap_err().to_string();
    assert_eq!(
        check_text([
            "F0 F1 F0.1 F1.1 BW0.1 BW0 BW1.1 BW1",
            "F0 F0.1 F1 F1.1 BW0.1 BW0 BW1.1 BW1"
        ]),
        Ok(())
    );
    // Two ranks that each wait for a later pass of the other.
    assert_eq!(
        refused([
            "F0 F0.1 F1 F1.1 BW0.1 BW0 BW1.1 BW1",
            "F0 F1 F0.1 F1.1 BW0.1 BW0 BW1.1 BW1",
        ]),
        "deadlock: rank 0 waits before F0.1, rank 1 waits before F1"
    );
    assert_eq!(
        refused([
            "F0 F1 F0.1 F1.1 BW0.1 BW0 BW1.1",
            "F0 F0.1 F1 F1.1 BW0.1 BW0 BW1.1 BW1",
        ]),
        "rank 0: B1 is missing"
    );
    assert_eq!(
        refused(["F0 F0 F0.1 BW0.1 BW0", "F0 F0.1 BW0.1 BW0"]),
        "rank 0: F0 appears twice"
    );
}

#[test]
fn sizes_that_do_not_exist_are_refused_with_the_arithmetic() {
    let refused = |kind: ScheduleKind, p, m, chunks| kind.order(p, m, chunks).unwrap_err();
    let assert_refused = |error: String, words: &str| assert!(error.contains(words), "{error}");
    assert_refused(
        refused(ScheduleKind::Interleaved, 4, 11, None),
        "use 10 or 12",
    );
    assert_refused(
        refused(ScheduleKind::DualPipeV, 4, 7, None),
        "2 x 4 = 8 microbatches, not 7",
    );
    assert_refused(
        refused(ScheduleKind::ZbV, 4, 8, Some(3)),
        "zb-v has 2 chunks per rank, not 3",
    );
    assert_refused(
        refused(ScheduleKind::Interleaved, 4, 8, Some(1)),
        "it is 1f1b",
    );
    assert_refused(
        refused(ScheduleKind::GPipe, 0, 8, None),
        "at least one rank",
    );
}

/// The spans of all passes of a simulated schedule.
struct Spans<'a>(HashMap<(PassKind, usize, usize), &'a Span>);

impl Spans<'_> {
    fn new<'a>(order: &Order, timeline: &'a Timeline) -> Spans<'a> {
        let mut spans = HashMap::new();
        for (rank, of_rank) in timeline.ranks.iter().enumerate() {
            for span in of_rank {
                let Pass {
                    kind,
                    chunk,
                    microbatch,
                } = span.pass;
                let location = if kind.is_vocabulary() {
                    rank
                } else {
                    order.stage(rank, chunk)
                };
                spans.insert((kind, location, microbatch), span);
            }
        }
        Spans(spans)
    }

    /// Returns the span of a pass of a stage, or of a rank for vocabulary parallelism.
    fn of(&self, kind: PassKind, location: usize, microbatch: usize) -> &Span {
        self.0[&(kind, location, microbatch)]
    }

    fn input_gradient(&self, stage: usize, microbatch: usize) -> &Span {
        let of = |kind| self.0.get(&(kind, stage, microbatch));
        of(PassKind::Backward)
            .or_else(|| of(PassKind::BackwardInput))
            .unwrap()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// With any times, a checked schedule ends, ranks compute one pass at a time, and no pass
    /// starts before its dependencies have ended.
    #[test]
    fn checked_schedules_run_whatever_passes_take(
        p in 1usize..9,
        rounds in 1usize..5,
        number in 0usize..8,
        algorithm in prop::option::of(prop::sample::select(&ALGORITHMS[..])),
        times in prop::collection::vec(0.1f64..5.0, 64),
        planned in 0.1f64..5.0,
    ) {
        let (kind, _) = ScheduleKind::NAMES[number];
        let m = 2 * p * rounds;
        let order = kind.order(p, m, None).unwrap();
        let order = match algorithm {
            Some(algorithm) => with_vocabulary(&order, algorithm, &costs(&order, planned)),
            None => order,
        };
        let costs = drawn_costs(&order, &times);
        let schedule = with_communication(order.clone());
        prop_assert_eq!(check(&schedule), Ok(()));
        let timeline = simulate(&schedule, &costs);
        for spans in &timeline.ranks {
            prop_assert!(
                spans
                    .windows(2)
                    .all(|pair| pair[0].end <= pair[1].start)
            );
        }
        assert_dependencies(&order, &Spans::new(&order, &timeline));
    }
}

/// Returns costs that are all different.
fn drawn_costs(order: &Order, times: &[f64]) -> Costs {
    let time = |index: usize| times[index % times.len()];
    let stages = 0..order.stages();
    let of_rank = |rank| VocabularyCosts {
        logits: time(rank + 3),
        normalize: time(rank + 4),
        logits_backward: time(rank + 5),
        embed: time(rank + 7),
        embed_backward: time(rank + 11),
    };
    Costs {
        forward: stages.clone().map(time).collect(),
        backward_input: stages.clone().map(|stage| time(stage + 17)).collect(),
        backward_weight: stages.map(|stage| time(stage + 31)).collect(),
        vocabulary: (0..order.ranks.len()).map(of_rank).collect(),
        send: time(60),
        collective: time(61),
    }
}

fn assert_dependencies(order: &Order, spans: &Spans) {
    use PassKind::*;
    let assert_follows = |later: &Span, earlier: &Span| {
        assert!(
            later.start >= earlier.end,
            "{} before {}",
            later.pass,
            earlier.pass
        );
    };
    let last = order.stages() - 1;
    for k in 0..order.microbatches {
        for stage in 1..order.stages() {
            assert_follows(spans.of(Forward, stage, k), spans.of(Forward, stage - 1, k));
            let gradient = spans.input_gradient(stage, k);
            assert_follows(spans.input_gradient(stage - 1, k), gradient);
        }
        let forward = spans.of(Forward, last, k);
        assert_follows(spans.input_gradient(last, k), forward);
        let Some(vocabulary) = order.vocabulary else {
            continue;
        };
        let before = if vocabulary.gradient_after_t() {
            LogitsBackward
        } else {
            Logits
        };
        for rank in 0..order.ranks.len() {
            assert_follows(spans.of(Logits, rank, k), forward);
            assert_follows(spans.input_gradient(last, k), spans.of(before, rank, k));
            assert_follows(spans.of(Forward, 0, k), spans.of(Embed, rank, k));
            let gradient = spans.input_gradient(0, k);
            assert_follows(spans.of(EmbedBackward, rank, k), gradient);
        }
    }
}
