//! A rank's log of calls.

use serde::{Serialize, Serializer};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Instant,
};

/// The number of calls that a log keeps.
const MAX_CALLS: usize = 2048;

/// A call of a collective, a send or a receive.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Call {
    #[serde(serialize_with = "as_text")]
    pub(super) group: Arc<str>,
    #[serde(serialize_with = "as_list")]
    pub(super) members: Arc<[usize]>,
    /// Distinguishes groups of the same name.
    #[serde(skip)]
    pub(super) key: Arc<str>,
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
        format!("{number}{}{peer} in group '{}'", self.operation, self.group)
    }

    /// True if a thread waits for the call.
    pub(super) fn is_awaited(&self) -> bool {
        self.waited_for && self.ended_s.is_none()
    }
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
    /// The last collectives, by [`Call::key`].
    pub(super) last_collectives: BTreeMap<Arc<str>, LastCollective>,
}

impl Log {
    /// Adds a call, which gets a number if it is a collective, and returns its id.
    pub(super) fn add(&mut self, mut call: Call, is_collective: bool) -> u64 {
        if is_collective {
            let operation = call.operation;
            let last = self.last_collectives.entry(call.key.clone());
            let last = last.or_insert(LastCollective {
                number: 0,
                operation,
            });
            last.number += 1;
            last.operation = operation;
            call.number = Some(last.number);
        }
        self.calls.push_back(call);
        if self.calls.len() > MAX_CALLS {
            self.calls.pop_front();
            self.first_id += 1;
        }
        self.first_id + self.calls.len() as u64 - 1
    }

    pub(super) fn get(&mut self, id: u64) -> Option<&mut Call> {
        let index = id.checked_sub(self.first_id)?;
        self.calls.get_mut(index as usize)
    }
}

fn as_list<S: Serializer>(ranks: &Arc<[usize]>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(ranks.iter())
}

fn as_text<S: Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn call(number: Option<u64>, peer: Option<usize>) -> Call {
        Call {
            group: "experts".into(),
            members: [0, 1, 2].into(),
            key: "experts/[0, 1, 2]".into(),
            number,
            operation: if peer.is_some() { "recv" } else { "all_to_all" },
            peer,
            tensor: String::new(),
            started_s: 0.0,
            ended_s: None,
            started: Instant::now(),
            waited_for: true,
            missing: None,
        }
    }

    #[test]
    fn calls_have_names_for_messages() {
        let collective = call(Some(3), None);
        assert_eq!(collective.name(), "call 3, all_to_all in group 'experts'");
        let receive = call(None, Some(2));
        assert_eq!(receive.name(), "recv from rank 2 in group 'experts'");
    }
}
