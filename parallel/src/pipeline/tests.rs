use super::check::{ScheduleError, check};
use super::communication::{Dependency, receives_only, with_communication};
use super::refine::refined;
use super::schedules::ScheduleKind;
use super::simulate::{Costs, Timeline, VocabularyCosts, simulate};
use super::vocabulary::with_vocabulary;
use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

const ALGORITHMS: [Vocabulary; 4] = [
    Vocabulary::Naive,
    Vocabulary::Interlaced,
    Vocabulary::Vocab1,
    Vocabulary::Vocab2,
];

/// Ranks 2 to 16, microbatches from as many up to eight times as many.
fn sizes() -> impl Iterator<Item = (usize, usize)> {
    (2..=16).flat_map(|p| [p, p + 1, 2 * p, 3 * p - 1, 4 * p, 8 * p].map(move |m| (p, m)))
}

/// All known orders of a size, and nothing where the size is refused for a good reason.
fn orders(p: usize, m: usize) -> impl Iterator<Item = (ScheduleKind, Order)> {
    ScheduleKind::NAMES
        .into_iter()
        .filter_map(move |(kind, name)| match kind.order(p, m, None) {
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
        })
}

/// F, B and W of 1 a stage, and `x` for all passes of the vocabulary of a microbatch, but for N.
fn costs(order: &Order, x: f64) -> Costs {
    let embed = x * 0.05;
    let embed_backward = x * 0.05;
    let one = VocabularyCosts {
        logits: x * 0.6,
        normalize: x * 0.1,
        logits_backward: x * 0.3,
        embed,
        embed_backward,
    };
    Costs {
        vocabulary: vec![one; order.ranks.len()],
        ..Costs::uniform(order.stages(), 1.0, 1.0, 1.0)
    }
}

fn run(order: Order, costs: &Costs) -> Timeline {
    simulate(&with_communication(order), costs)
}

/// What a rank only takes is under way while it computes something, unless it has nothing to compute before.
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
                    for need in schedule.order.dependencies(rank, pass) {
                        let began = match need {
                            Dependency::Message(message) => messages[&message],
                            Dependency::Collective(collective) => {
                                collectives.get(&collective).copied().unwrap_or(0)
                            }
                            Dependency::Pass(_) => 0,
                        };
                        assert!(
                            began < computed || computed == 0,
                            "rank {rank}, {pass}: {need:?}"
                        );
                    }
                    computed += usize::from(!matches!(
                        pass.kind,
                        PassKind::Embed | PassKind::EmbedBackward
                    ));
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
            // Of a rank's whole F, B and W: as many units as it has chunks.
            let bubble = run(order, &uniform).bubble() / chunks;
            let expected = match kind {
                ScheduleKind::GPipe | ScheduleKind::OneFOneB => before * 3.0,
                ScheduleKind::Interleaved => before * 3.0 / chunks,
                ScheduleKind::ZbH1 => before,
                ScheduleKind::ZbV if m >= 2 * p => 0.0,
                // Half of 1F1B's, and 0.67 of it without reordering when there are few ranks; arXiv 2405.15362.
                ScheduleKind::VHalf => {
                    assert!(
                        bubble <= 0.67 * before * 3.0 || p < 4,
                        "{p} x {m}: {bubble}"
                    );
                    continue;
                }
                ScheduleKind::VMin => {
                    assert!(
                        bubble <= 0.75 * before * 3.0 || p < 4,
                        "{p} x {m}: {bubble}"
                    );
                    continue;
                }
                ScheduleKind::DualPipeV => {
                    // At most (PP/2 - 1)(F&B + B - 3W) for PP = 2p stages, where F&B takes F + B + W.
                    assert!(
                        bubble <= before * (3.0 + 2.0 - 3.0) / 2.0,
                        "{p} x {m}: {bubble}"
                    );
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
            for vocabulary in std::iter::once(None).chain(ALGORITHMS.map(Some)) {
                let more =
                    vocabulary.map_or(0.0, |algorithm| algorithm.extra_microbatches(p) as f64);
                let order = vocabulary.map_or(order.clone(), |algorithm| {
                    with_vocabulary(&order, algorithm, &costs)
                });
                let timeline = run(order, &costs);
                let case = format!("{} {vocabulary:?} {p} x {m}: {timeline:?}", kind.name());
                let pf = p as f64;
                for rank in 0..p {
                    let held = timeline.peak_microbatches[rank];
                    let until_b = timeline.peak_microbatches_until_b[rank];
                    let below = pf - rank as f64;
                    match kind {
                        ScheduleKind::GPipe => assert_eq!(held, m as f64),
                        ScheduleKind::OneFOneB => assert_eq!(held, below + more, "{case}"),
                        ScheduleKind::Interleaved => {
                            assert_eq!(held, below + (pf - 1.0) / 2.0 + more, "{case}")
                        }
                        ScheduleKind::ZbH1 => {
                            assert_eq!((held, until_b), (pf + more, below + more), "{case}")
                        }
                        ScheduleKind::ZbV => assert!(until_b <= pf + more, "{case}"),
                        ScheduleKind::VHalf => {
                            assert!(until_b <= (pf / 2.0).floor() + 1.0 + more, "{case}")
                        }
                        ScheduleKind::VMin => {
                            assert!(until_b <= (pf / 3.0).ceil() + 1.0 + more, "{case}")
                        }
                        // PP + 1 chunks of PP = 2p stages.
                        ScheduleKind::DualPipeV => assert!(until_b <= pf + 0.5 + more, "{case}"),
                    }
                }
            }
        }
    }
}

#[test]
fn the_vocabulary_costs_no_bubble_for_each_microbatch() {
    for p in [2, 4, 7, 8, 16] {
        for ((kind, few), (_, many)) in orders(p, 4 * p).zip(orders(p, 8 * p)) {
            // The two that are there for comparison cost time for each microbatch.
            for algorithm in [Vocabulary::Vocab1, Vocabulary::Vocab2] {
                for x in [0.3, 1.0, 4.0] {
                    let costs = costs(&few, x);
                    let bubble = |order: &Order| {
                        run(with_vocabulary(order, algorithm, &costs), &costs).bubble()
                    };
                    let few = bubble(&few);
                    let many = bubble(&many);
                    assert!(
                        many <= few + 1e-9,
                        "{} {algorithm:?} {p}, x {x}: {few} then {many}",
                        kind.name()
                    );
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
            fields[column]
                .split(' ')
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
        // S and T were timed as one; S has two of the three matrix products.
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
        assert!(
            error.abs() < 0.02,
            "{} {} {}: measured {measured} ms, predicted {predicted:.1}",
            fields[0],
            fields[1],
            fields[2]
        );
        checked += 1;
    }
    assert_eq!(checked, 32);
}

#[test]
fn refined_orders_take_less_time_and_hold_no_more() {
    let mut shorter = 0;
    for (p, m) in sizes().filter(|(p, m)| p * m <= 32) {
        for (kind, order) in orders(p, m) {
            for vocabulary in [None, Some(Vocabulary::Vocab1), Some(Vocabulary::Vocab2)] {
                for (f, b, w, x) in [
                    (1.0, 1.0, 1.0, 2.0),
                    (1.0, 1.3, 0.8, 3.0),
                    (0.6, 1.5, 1.1, 0.7),
                ] {
                    let mut costs = Costs::uniform(order.stages(), f, b, w);
                    (costs.send, costs.collective) = (0.05 * f, 0.1 * f);
                    costs.vocabulary = vec![VocabularyCosts::of(Vocabulary::Vocab1, x / 3.0); p];
                    let order = vocabulary.map_or(order.clone(), |which| {
                        with_vocabulary(&order, which, &costs)
                    });
                    let better = refined(&order, &costs);
                    let case = format!("{} {vocabulary:?} {p} x {m}, {f} {b} {w} {x}", kind.name());
                    check(&with_communication(better.clone()))
                        .unwrap_or_else(|error| panic!("{case}: {error}"));
                    let before = run(order.clone(), &costs);
                    let after = run(better.clone(), &costs);
                    assert!(
                        after.total <= before.total * (1.0 + 1e-9),
                        "{case}: {} to {}",
                        before.total,
                        after.total
                    );
                    let held = |of: fn(&Timeline) -> &Vec<f64>| {
                        of(&after)
                            .iter()
                            .zip(of(&before))
                            .all(|(after, before)| after <= before)
                    };
                    assert!(held(|timeline| &timeline.peak_microbatches), "{case}");
                    assert!(
                        held(|timeline| &timeline.peak_microbatches_until_b),
                        "{case}"
                    );
                    // What has no freedom is left alone.
                    let split = order
                        .ranks
                        .iter()
                        .flatten()
                        .any(|pass| pass.kind == PassKind::BackwardWeight);
                    assert!(split || vocabulary.is_some() || better == order, "{case}");
                    shorter += usize::from(after.total < 0.99 * before.total);
                }
            }
        }
    }
    // Neither nothing nor everything: where F, B and W take the same, known orders are as short as orders get.
    assert!(shorter > 100, "{shorter}");
    let uniform = Costs {
        send: 0.05,
        collective: 0.1,
        ..Costs::uniform(8, 1.0, 1.0, 1.0)
    };
    let order = ScheduleKind::ZbV.order(4, 16, None).unwrap();
    let [before, after] =
        [order.clone(), refined(&order, &uniform)].map(|order| run(order, &uniform).total);
    assert!(after > 0.97 * before, "{before} to {after}");
}

fn broken(change: impl Fn(&mut Schedule)) -> ScheduleError {
    let mut schedule = with_communication(ScheduleKind::OneFOneB.order(3, 4, None).unwrap());
    change(&mut schedule);
    check(&schedule).unwrap_err()
}

#[test]
fn broken_lists_are_refused_with_the_pass_named() {
    let error = broken(|s| {
        s.ranks[1].retain(|step| !matches!(step, Step::Receive(m, 0) if m.microbatch == 2))
    });
    assert_eq!(
        error.to_string(),
        "rank 1 cannot compute F2: the activation of microbatch 2 for stage 1 is not received"
    );
    let error = broken(|s| {
        let of_third = |m: &Message| m.payload == Payload::Activation && m.microbatch == 2;
        s.ranks[0]
            .retain(|step| !matches!(step, Step::Send(m, _) | Step::WaitSend(m) if of_third(m)));
    });
    assert_eq!(
        error.to_string(),
        "rank 1, receiving the activation of microbatch 2 for stage 1: rank 0 does not send it"
    );
    // Backward before forward on one rank: found there.
    let reversed = |rank: usize| {
        let mut order = ScheduleKind::OneFOneB.order(3, 4, None).unwrap();
        order.ranks[rank].reverse();
        check(&with_communication(order)).unwrap_err().to_string()
    };
    assert_eq!(
        reversed(1),
        "rank 1 cannot compute BW3: F3 is not before it"
    );
    // Two ranks that each wait for what the other does later.
    let text = |lines: [&str; 2]| {
        let ranks = lines.map(String::from).to_vec();
        let order = OrderFile {
            placement: Placement::V,
            chunks: 2,
            ranks,
        }
        .parse()
        .unwrap();
        check(&with_communication(order))
    };
    assert_eq!(
        text([
            "F0 F1 F0.1 F1.1 BW0.1 BW0 BW1.1 BW1",
            "F0 F0.1 F1 F1.1 BW0.1 BW0 BW1.1 BW1"
        ]),
        Ok(())
    );
    let error = text([
        "F0 F0.1 F1 F1.1 BW0.1 BW0 BW1.1 BW1",
        "F0 F1 F0.1 F1.1 BW0.1 BW0 BW1.1 BW1",
    ])
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the schedule stops: rank 0 waits before F0.1, rank 1 waits before F1"
    );
    let error = text([
        "F0 F1 F0.1 F1.1 BW0.1 BW0 BW1.1",
        "F0 F0.1 F1 F1.1 BW0.1 BW0 BW1.1 BW1",
    ])
    .unwrap_err();
    assert_eq!(error.to_string(), "rank 0 never computes B1");
    let error = text(["F0 F0 F0.1 BW0.1 BW0", "F0 F0.1 BW0.1 BW0"]).unwrap_err();
    assert_eq!(error.to_string(), "rank 0: F0 is there twice");
}

#[test]
fn sizes_that_do_not_exist_are_refused_with_the_arithmetic() {
    let refused = |kind: ScheduleKind, p, m, chunks| kind.order(p, m, chunks).unwrap_err();
    assert!(refused(ScheduleKind::Interleaved, 4, 11, None).contains("use 10 or 12"));
    assert!(refused(ScheduleKind::DualPipeV, 4, 7, None).contains("2 x 4 = 8 microbatches, not 7"));
    assert_eq!(
        refused(ScheduleKind::ZbV, 4, 8, Some(3)),
        "zb-v has 2 chunks a rank, not 3"
    );
    assert!(refused(ScheduleKind::Interleaved, 4, 8, Some(1)).contains("it is 1f1b"));
    assert!(refused(ScheduleKind::GPipe, 0, 8, None).contains("at least one rank"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever the times of passes: a checked schedule ends, no rank computes two things at once, and nothing starts
    /// before what it needs has ended.
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
        let stages = order.stages();
        let time = |index: usize| times[index % times.len()];
        let costs = Costs {
            forward: (0..stages).map(time).collect(),
            backward_input: (0..stages).map(|s| time(s + 17)).collect(),
            backward_weight: (0..stages).map(|s| time(s + 31)).collect(),
            vocabulary: (0..p).map(|r| VocabularyCosts {
                logits: time(r + 3), normalize: time(r + 4), logits_backward: time(r + 5), embed: time(r + 7), embed_backward: time(r + 11),
            }).collect(),
            send: time(60),
            collective: time(61),
        };
        let schedule = with_communication(order.clone());
        prop_assert_eq!(check(&schedule), Ok(()));
        let timeline = simulate(&schedule, &costs);
        let mut ends = std::collections::HashMap::new();
        for (rank, spans) in timeline.ranks.iter().enumerate() {
            prop_assert!(spans.windows(2).all(|pair| pair[0].end <= pair[1].start));
            for span in spans {
                let stage = order.stage(rank, span.pass.chunk);
                ends.insert((span.pass.kind, if span.pass.kind.is_vocabulary() { rank } else { stage }, span.pass.microbatch), span);
            }
        }
        let input_gradient = |stage: usize, k: usize| {
            ends.get(&(PassKind::Backward, stage, k)).or_else(|| ends.get(&(PassKind::BackwardInput, stage, k))).unwrap()
        };
        for k in 0..m {
            for stage in 1..stages {
                prop_assert!(ends[&(PassKind::Forward, stage, k)].start >= ends[&(PassKind::Forward, stage - 1, k)].end);
                prop_assert!(input_gradient(stage - 1, k).start >= input_gradient(stage, k).end);
            }
            prop_assert!(input_gradient(stages - 1, k).start >= ends[&(PassKind::Forward, stages - 1, k)].end);
            for rank in (0..p).filter(|_| algorithm.is_some()) {
                prop_assert!(ends[&(PassKind::Logits, rank, k)].start >= ends[&(PassKind::Forward, stages - 1, k)].end);
                let after_t = algorithm.is_some_and(Vocabulary::gradient_after_t);
                let before = if after_t { PassKind::LogitsBackward } else { PassKind::Logits };
                prop_assert!(input_gradient(stages - 1, k).start >= ends[&(before, rank, k)].end);
                prop_assert!(ends[&(PassKind::Forward, 0, k)].start >= ends[&(PassKind::Embed, rank, k)].end);
                prop_assert!(ends[&(PassKind::EmbedBackward, rank, k)].start >= input_gradient(0, k).end);
            }
        }
    }
}
