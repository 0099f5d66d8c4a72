//! Diagnosis of a call that takes too long: the ranks' heartbeats tell which of them are missing.

use super::calls::{Call, Log};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use torch_ext::Store;

pub(super) const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
/// A rank that sends no heartbeat for this long has stopped.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_millis(1600);

/// The state that a rank publishes in the store.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Heartbeat {
    /// Counts the heartbeats of the rank.
    beat: u64,
    /// The rank's last collectives, by [`Call::key`].
    last_collectives: BTreeMap<String, ReportedCollective>,
    /// The call that the rank has waited for longest.
    waits_for: Option<String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct ReportedCollective {
    number: u64,
    operation: String,
}

impl Heartbeat {
    pub(super) fn new(beat: u64, log: &Log) -> Heartbeat {
        let mut last_collectives = BTreeMap::new();
        for (key, last) in &log.last_collectives {
            let reported = ReportedCollective {
                number: last.number,
                operation: last.operation.to_string(),
            };
            last_collectives.insert(key.to_string(), reported);
        }
        let awaited = log.calls.iter().find(|call| call.is_awaited());
        Heartbeat {
            beat,
            last_collectives,
            waits_for: awaited.map(Call::name),
        }
    }

    /// Publishes the heartbeat of `rank`; false without a store.
    pub(super) fn publish(&self, rank: usize, store: &Store) -> bool {
        let text = serde_json::to_vec(self).expect("plain data");
        store.set(&key(rank), &text).is_ok()
    }

    /// Reads the last heartbeat of `rank`.
    fn read(rank: usize, store: &Store) -> Option<Heartbeat> {
        let key = key(rank);
        if !store.contains(&key).ok()? {
            return None;
        }
        let text = store.get(&key).ok()?;
        serde_json::from_slice(&text).ok()
    }
}

fn key(rank: usize) -> String {
    format!("heartbeat/{rank}")
}

/// Describes the ranks that have not joined a call.
///
/// This rank calls `beat` meanwhile: others may be looking for it.
pub(super) fn describe_missing_ranks(
    store: &Store,
    own: usize,
    call: &Call,
    beat: &mut dyn FnMut() -> bool,
) -> String {
    let others: Vec<usize> = match call.peer {
        Some(peer) => vec![peer],
        None => {
            let members = call.members.iter().copied();
            members.filter(|&rank| rank != own).collect()
        }
    };
    let read = |&rank: &usize| Heartbeat::read(rank, store);
    let before: Vec<Option<Heartbeat>> = others.iter().map(read).collect();
    let start = Instant::now();
    while start.elapsed() < HEARTBEAT_TIMEOUT {
        std::thread::sleep(HEARTBEAT_INTERVAL / 2);
        beat();
    }
    let mut missing = Vec::new();
    for (&rank, before) in others.iter().zip(before) {
        let now = Heartbeat::read(rank, store);
        let beat_of = |heartbeat: &Option<Heartbeat>| heartbeat.as_ref().map(|it| it.beat);
        let is_silent = beat_of(&now) == beat_of(&before);
        missing.extend(describe_rank(
            rank,
            is_silent,
            now.unwrap_or_default(),
            call,
        ));
    }
    let name = call.name();
    if missing.is_empty() {
        format!(
            "{name}: all ranks made this call and are alive; the network may be slow or cut off"
        )
    } else {
        format!("{name}: {}", missing.join("; "))
    }
}

/// Describes what is wrong with a rank; `None` if it made the call and is alive.
fn describe_rank(
    rank: usize,
    is_silent: bool,
    heartbeat: Heartbeat,
    call: &Call,
) -> Option<String> {
    let last = heartbeat.last_collectives.get(&*call.key).cloned();
    let ReportedCollective { number, operation } = last.unwrap_or_default();
    if is_silent {
        let text = match (heartbeat.beat, call.number) {
            (0, _) => format!("rank {rank} has never reported"),
            (_, Some(own_number)) if number >= own_number => {
                format!("rank {rank} has stopped inside this call")
            }
            _ if number == 0 => {
                format!("rank {rank} has stopped; it had reported no call in this group")
            }
            _ => format!(
                "rank {rank} has stopped; its last reported call here is {number}, {operation}"
            ),
        };
        return Some(text);
    }
    match call.number {
        Some(own_number) if number < own_number => {
            let last_call = if number == 0 {
                "it has made no call in this group".to_string()
            } else {
                format!("its last call here is {number}, {operation}")
            };
            let waits = match heartbeat.waits_for {
                Some(other) => format!(", and it waits for {other}"),
                None => String::new(),
            };
            Some(format!("rank {rank} is missing; {last_call}{waits}"))
        }
        Some(_) => None,
        None => {
            let waits = match heartbeat.waits_for {
                Some(other) => format!(" and waits for {other}"),
                None => String::new(),
            };
            Some(format!("rank {rank} is alive{waits}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::calls::tests::call, *};

    fn heartbeat(number: u64, waits_for: Option<&str>) -> Heartbeat {
        let last = ReportedCollective {
            number,
            operation: "all_gather".to_string(),
        };
        Heartbeat {
            beat: 7,
            last_collectives: [("experts/[0, 1, 2]".to_string(), last)].into(),
            waits_for: waits_for.map(str::to_string),
        }
    }

    #[test]
    fn a_missing_rank_is_described_by_its_last_report() {
        let seven = call(Some(7), None);
        assert_eq!(describe_rank(1, false, heartbeat(7, None), &seven), None);
        assert_eq!(describe_rank(1, false, heartbeat(9, None), &seven), None);
        let waits_for = Some("recv from rank 2 in group 'pipeline'");
        let described =
            |rank, is_silent, heartbeat| describe_rank(rank, is_silent, heartbeat, &seven).unwrap();
        assert_eq!(
            described(1, false, heartbeat(6, waits_for)),
            "rank 1 is missing; its last call here is 6, all_gather, and it waits for recv from \
             rank 2 in group 'pipeline'"
        );
        assert_eq!(
            described(1, true, heartbeat(6, None)),
            "rank 1 has stopped; its last reported call here is 6, all_gather"
        );
        assert_eq!(
            described(1, true, heartbeat(7, None)),
            "rank 1 has stopped inside this call"
        );
        assert_eq!(
            described(2, true, Heartbeat::default()),
            "rank 2 has never reported"
        );
        let receive = call(None, Some(2));
        let text = describe_rank(2, false, heartbeat(6, None), &receive).unwrap();
        assert_eq!(text, "rank 2 is alive");
    }
}
