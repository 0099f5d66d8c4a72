//! A rank's log of calls.

use super::super::Membership;
use serde::{Serialize, Serializer};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Instant,
};

/// The number of calls that a log keeps.
pub(super) const MAX_CALLS: usize = 2048;
/// The most ranges of ranks that a log prints for a group.
const LOGGED_RANGES: usize = 32;

/// A group whose calls are logged.
#[derive(Debug)]
pub(super) struct RecordedGroup {
    /// The group's number among those of this rank.
    pub(super) number: usize,
    pub(super) membership: Membership,
}

/// A call of a collective, a send or a receive.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Call {
    #[serde(serialize_with = "as_number")]
    pub(super) group: Arc<RecordedGroup>,
    /// The number of the collective, which is the same on all ranks of the group; `None` for a send
    /// or receive.
    pub(super) number: Option<u64>,
    pub(super) operation: &'static str,
    /// The global rank of the other side of a send or receive.
    pub(super) peer: Option<usize>,
    pub(super) tensor: String,
    /// Seconds since the recorder started.
    pub(super) started_s: f64,
    pub(super) ended_s: Option<f64>,
    #[serde(skip)]
    pub(super) started: Instant,
    #[serde(skip)]
    pub(super) waited_for: bool,
    /// A description of the missing ranks, once they were looked for.
    pub(super) missing: Option<String>,
}

impl Call {
    /// Returns the name of the call for messages.
    pub(super) fn name(&self) -> String {
        let number = self
            .number
            .map_or(String::new(), |number| format!("call {number}, "));
        let peer = match (self.operation, self.peer) {
            ("send", Some(peer)) => format!(" to rank {peer}"),
            (_, Some(peer)) => format!(" from rank {peer}"),
            _ => String::new(),
        };
        let group = self.group.membership.name();
        format!("{number}{}{peer} in group '{group}'", self.operation)
    }

    /// True if a thread waits for the call.
    pub(super) fn is_awaited(&self) -> bool {
        self.waited_for && self.ended_s.is_none()
    }
}

/// A call that was logged. It leaves the log once there are many later ones.
#[derive(Debug, Clone)]
pub(super) struct StartedCall {
    pub(super) id: u64,
    pub(super) call: Call,
}

/// The last collective of a group.
#[derive(Debug, Clone, Copy)]
pub(super) struct LastCollective {
    pub(super) number: u64,
    pub(super) operation: &'static str,
}

/// The last calls of this rank. A call's id is its number among all calls.
#[derive(Default)]
pub(super) struct Log {
    pub(super) calls: VecDeque<Call>,
    first_id: u64,
    /// The last collectives, by [`Membership::digest`].
    pub(super) last_collectives: BTreeMap<u64, LastCollective>,
}

/// A log as it is written to its file. Calls name their groups by number.
#[derive(Serialize)]
struct LogFile<'a> {
    rank: usize,
    groups: BTreeMap<usize, GroupEntry<'a>>,
    calls: &'a VecDeque<Call>,
}

#[derive(Serialize)]
struct GroupEntry<'a> {
    name: &'a str,
    size: usize,
    /// Ranges of global ranks, such as `0..4096 by 16`.
    members: String,
}

impl Log {
    /// Adds a call, which gets an id, and a number if it is a collective.
    pub(super) fn add(&mut self, mut call: Call, is_collective: bool) -> StartedCall {
        if is_collective {
            let operation = call.operation;
            let last = self.last_collectives.entry(call.group.membership.digest);
            let last = last.or_insert(LastCollective {
                number: 0,
                operation,
            });
            last.number += 1;
            last.operation = operation;
            call.number = Some(last.number);
        }
        self.calls.push_back(call.clone());
        if self.calls.len() > MAX_CALLS {
            self.calls.pop_front();
            self.first_id += 1;
        }
        let id = self.first_id + self.calls.len() as u64 - 1;
        StartedCall { id, call }
    }

    pub(super) fn get(&mut self, id: u64) -> Option<&mut Call> {
        let index = id.checked_sub(self.first_id)?;
        self.calls.get_mut(index as usize)
    }

    /// Returns the log of `rank` as JSON.
    pub(super) fn to_json(&self, rank: usize) -> Vec<u8> {
        let groups = self.calls.iter().map(|call| {
            let membership = &call.group.membership;
            let described = GroupEntry {
                name: membership.name(),
                size: membership.size(),
                members: membership.ranges().text(LOGGED_RANGES),
            };
            (call.group.number, described)
        });
        let file = LogFile {
            rank,
            groups: groups.collect(),
            calls: &self.calls,
        };
        serde_json::to_vec(&file).expect("plain data")
    }
}

fn as_number<S>(group: &Arc<RecordedGroup>, serializer: S) -> Result<S::Ok, S::Error>
where
    S: Serializer,
{
    serializer.serialize_u64(group.number as u64)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(in super::super) fn group(members: &[usize]) -> Arc<RecordedGroup> {
        Arc::new(RecordedGroup {
            number: 4,
            membership: Membership::new("experts", members, members[0]).unwrap(),
        })
    }

    pub(in super::super) fn call_in(
        group: Arc<RecordedGroup>,
        number: Option<u64>,
        peer: Option<usize>,
    ) -> Call {
        Call {
            group,
            number,
            operation: if peer.is_some() { "recv" } else { "all_to_all" },
            peer,
            tensor: "BFloat16 [4096, 7168]".into(),
            started_s: 0.0,
            ended_s: None,
            started: Instant::now(),
            waited_for: true,
            missing: None,
        }
    }

    pub(in super::super) fn call(number: Option<u64>, peer: Option<usize>) -> Call {
        call_in(group(&[0, 1, 2]), number, peer)
    }

    #[test]
    fn calls_have_names_for_messages() {
        let collective = call(Some(3), None);
        assert_eq!(collective.name(), "call 3, all_to_all in group 'experts'");
        let receive = call(None, Some(2));
        assert_eq!(receive.name(), "recv from rank 2 in group 'experts'");
    }

    #[test]
    fn a_log_names_each_group_once() {
        let mut log = Log::default();
        for _ in 0..3 {
            log.add(call(None, None), true);
        }
        let text = log.to_json(1);
        let file: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let members = &file["groups"]["4"]["members"];
        assert_eq!((&file["rank"], members), (&1.into(), &"0..3".into()));
        assert_eq!(file["calls"][2]["number"], 3);
        assert_eq!(file["calls"][2]["group"], 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn a_log_of_large_groups_is_small(
            strides in prop::collection::vec(1usize..64, 1..30),
            irregular in prop::collection::vec(0usize..1_000_000, 0..200),
        ) {
            let group = |(number, stride): (usize, &usize)| {
                let regular = (0..16_384).map(|rank| rank * stride);
                let members: Vec<usize> = irregular
                    .iter()
                    .copied()
                    .chain(regular)
                    .collect();
                let membership = Membership::new("expert replicas", &members, 0).unwrap();
                Arc::new(RecordedGroup { number, membership })
            };
            let groups: Vec<_> = strides
                .iter()
                .enumerate()
                .map(group)
                .collect();
            let mut log = Log::default();
            for number in 0..MAX_CALLS + 10 {
                let mut call = call_in(groups[number % groups.len()].clone(), None, None);
                call.missing = Some("m".repeat(500));
                log.add(call, true);
            }
            prop_assert_eq!(log.calls.len(), MAX_CALLS);
            prop_assert!(log.to_json(0).len() < 2_000_000);
        }
    }
}
