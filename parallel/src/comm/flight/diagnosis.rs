//! Diagnosis of a call that takes too long: which ranks are missing, by their heartbeats.

use super::{
    super::MemberRanges,
    calls::Call,
    heartbeat::{Heartbeat, ReportedCollective},
};

/// The most different problems that a message describes.
const DESCRIBED_PROBLEMS: usize = 3;
/// The most ranges of ranks that a message prints for a problem.
const DESCRIBED_RANGES: usize = 4;

/// Two readings of a rank's heartbeat.
#[derive(Debug, Clone)]
pub(super) struct Observation {
    pub(super) rank: usize,
    /// True if they are equal.
    pub(super) is_silent: bool,
    /// The second of them.
    pub(super) heartbeat: Heartbeat,
}

/// Ranks with one problem.
struct Problem {
    /// Such as `is missing`.
    predicate: String,
    ranks: Vec<usize>,
}

/// Describes the observed ranks that have not joined a call. The text is short, however many there
/// are.
pub(super) fn describe(observations: &[Observation], call: &Call) -> String {
    let mut problems: Vec<Problem> = Vec::new();
    for observation in observations {
        let Some(predicate) = observation.problem(call) else {
            continue;
        };
        let rank = observation.rank;
        match problems.iter_mut().find(|it| it.predicate == predicate) {
            Some(problem) => problem.ranks.push(rank),
            None => problems.push(Problem {
                predicate,
                ranks: vec![rank],
            }),
        }
    }
    let name = call.name();
    if problems.is_empty() {
        return format!(
            "{name}: all ranks made this call and are alive; the network may be slow or cut off"
        );
    }
    let printed = problems.len().min(DESCRIBED_PROBLEMS);
    let mut texts = problems[..printed]
        .iter()
        .map(Problem::text)
        .collect::<Vec<String>>();
    let left = problems[printed..]
        .iter()
        .map(|it| it.ranks.len())
        .sum::<usize>();
    if left > 0 {
        texts.push(format!("and {left} more ranks are missing or have stopped"));
    }
    format!("{name}: {}", texts.join("; "))
}

impl Problem {
    fn text(&self) -> String {
        let predicate = &self.predicate;
        match self.ranks[..] {
            [rank] => format!("rank {rank} {predicate}"),
            _ => {
                let ranges = MemberRanges::new(&self.ranks).text(DESCRIBED_RANGES);
                format!("each of ranks {ranges} {predicate}")
            }
        }
    }
}

impl Observation {
    /// Describes what is wrong with the rank; `None` if it made the call and is alive.
    fn problem(&self, call: &Call) -> Option<String> {
        let heartbeat = &self.heartbeat;
        let group = call.group.membership.digest;
        let last = heartbeat.last_collectives.get(&group).cloned();
        let ReportedCollective { number, operation } = last.unwrap_or_default();
        let waits_for = heartbeat.waits_for.as_ref();
        if self.is_silent {
            return Some(match (heartbeat.beat, call.number) {
                (0, _) => "has never reported".into(),
                (_, Some(own_number)) if number >= own_number => {
                    "has stopped inside this call".into()
                }
                _ if number == 0 => "has stopped; it had reported no call in this group".into(),
                _ => format!("has stopped; its last reported call here is {number}, {operation}"),
            });
        }
        match call.number {
            Some(own_number) if number < own_number => {
                let last_call = if number == 0 {
                    "it has made no call in this group".to_string()
                } else {
                    format!("its last call here is {number}, {operation}")
                };
                let waits =
                    waits_for.map_or(String::new(), |other| format!(", and it waits for {other}"));
                Some(format!("is missing; {last_call}{waits}"))
            }
            Some(_) => None,
            None => {
                let waits =
                    waits_for.map_or(String::new(), |other| format!(" and waits for {other}"));
                Some(format!("is alive{waits}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::calls::tests::{call, call_in, group},
        *,
    };
    use proptest::prelude::*;

    fn heartbeat(number: u64, waits_for: Option<&str>) -> Heartbeat {
        let last = ReportedCollective {
            number,
            operation: "all_gather".to_string(),
        };
        Heartbeat {
            beat: 7,
            last_collectives: [(group(&[0, 1, 2]).membership.digest, last)].into(),
            waits_for: waits_for.map(str::to_string),
        }
    }

    fn observed(rank: usize, is_silent: bool, heartbeat: Heartbeat) -> Observation {
        Observation {
            rank,
            is_silent,
            heartbeat,
        }
    }

    #[test]
    fn a_missing_rank_is_described_by_its_last_report() {
        let seven = call(Some(7), None);
        let described =
            |rank, is_silent, heartbeat| describe(&[observed(rank, is_silent, heartbeat)], &seven);
        let name = "call 7, all_to_all in group 'experts'";
        let all_well = format!(
            "{name}: all ranks made this call and are alive; the network may be slow or cut off"
        );
        assert_eq!(described(1, false, heartbeat(7, None)), all_well);
        assert_eq!(described(1, false, heartbeat(9, None)), all_well);
        let waits_for = Some("recv from rank 2 in group 'pipeline'");
        assert_eq!(
            described(1, false, heartbeat(6, waits_for)),
            format!(
                "{name}: rank 1 is missing; its last call here is 6, all_gather, and it waits for \
                 recv from rank 2 in group 'pipeline'"
            )
        );
        assert_eq!(
            described(1, true, heartbeat(6, None)),
            format!("{name}: rank 1 has stopped; its last reported call here is 6, all_gather")
        );
        assert_eq!(
            described(1, true, heartbeat(7, None)),
            format!("{name}: rank 1 has stopped inside this call")
        );
        assert_eq!(
            described(2, true, Heartbeat::default()),
            format!("{name}: rank 2 has never reported")
        );
        let receive = call(None, Some(2));
        assert_eq!(
            describe(&[observed(2, false, heartbeat(6, None))], &receive),
            "recv from rank 2 in group 'experts': rank 2 is alive"
        );
    }

    #[test]
    fn ranks_with_the_same_problem_are_one_entry() {
        let seven = call(Some(7), None);
        let stopped = (0..4096).step_by(16);
        let stopped = stopped.map(|rank| observed(rank, true, heartbeat(6, None)));
        let observations: Vec<Observation> = stopped
            .chain([observed(5000, false, heartbeat(0, None))])
            .collect();
        assert_eq!(
            describe(&observations, &seven),
            "call 7, all_to_all in group 'experts': each of ranks 0..4096 by 16 has stopped; its \
             last reported call here is 6, all_gather; rank 5000 is missing; it has made no call \
             in this group"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(30))]
        #[test]
        fn an_error_with_its_diagnosis_is_short(
            silent in prop::collection::vec(any::<bool>(), 1..2000),
            numbers in prop::collection::vec(0u64..9, 2000),
        ) {
            let members: Vec<usize> = (0..16_384)
                .map(|rank| rank * rank % 1_000_003)
                .collect();
            let call = call_in(group(&members), Some(7), None);
            let waits = Some("call 1234, reduce_scatter in group 'expert replicas'");
            let membership = &call.group.membership;
            let observation = |rank: usize| {
                let number = numbers[rank];
                let mut heartbeat = heartbeat(0, waits.filter(|_| number % 2 == 0));
                let last = ReportedCollective {
                    number,
                    operation: "reduce_scatter".into(),
                };
                heartbeat
                    .last_collectives
                    .insert(membership.digest, last);
                observed(rank * rank, silent[rank], heartbeat)
            };
            let observations: Vec<_> = (0..silent.len())
                .map(observation)
                .collect();
            let described = describe(&observations, &call);
            let error = membership.error("all_to_all", format!("{described} (timed out)"));
            prop_assert!(error.to_string().len() < 1024, "{}", error);
        }
    }
}
