//! Heartbeats: the state that each rank publishes in the store.

use super::calls::Log;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, time::Duration};
use torch_ext::{Error, Store};

pub(super) const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
/// A rank that sends no heartbeat for this long has stopped.
pub(super) const HEARTBEAT_TIMEOUT: Duration = Duration::from_millis(1600);

/// The most heartbeats that one request reads.
const HEARTBEATS_PER_REQUEST: usize = 1024;

/// The state of a rank. Its size does not depend on the number of ranks.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Heartbeat {
    /// Counts the heartbeats of the rank. The first is 0: the rank has joined.
    #[serde(rename = "b")]
    pub(super) beat: u64,
    /// The rank's last collectives, by the digests of their groups.
    #[serde(rename = "c")]
    pub(super) last_collectives: BTreeMap<u64, ReportedCollective>,
    /// The call that the rank has waited for longest.
    #[serde(rename = "w", default, skip_serializing_if = "Option::is_none")]
    pub(super) waits_for: Option<String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct ReportedCollective {
    #[serde(rename = "n")]
    pub(super) number: u64,
    #[serde(rename = "o")]
    pub(super) operation: String,
}

impl Heartbeat {
    pub(super) fn new(beat: u64, log: &Log) -> Heartbeat {
        let reported = log.last_collectives.iter().map(|(&group, last)| {
            let reported = ReportedCollective {
                number: last.number,
                operation: last.operation.to_string(),
            };
            (group, reported)
        });
        let awaited = log.calls.iter().find(|call| call.is_awaited());
        Heartbeat {
            beat,
            last_collectives: reported.collect(),
            waits_for: awaited.map(|call| call.name()),
        }
    }

    /// Publishes the heartbeat of `rank`; false without a store.
    pub(super) fn publish(&self, rank: usize, store: &Store) -> bool {
        store.set(&key(rank), &self.to_bytes()).is_ok()
    }

    fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data")
    }

    /// Reads the last heartbeats of ranks that have all joined.
    ///
    /// # Errors
    /// If the store is gone.
    pub(super) fn read(ranks: &[usize], store: &Store) -> Result<Vec<Heartbeat>, Error> {
        let mut heartbeats = Vec::with_capacity(ranks.len());
        for ranks in ranks.chunks(HEARTBEATS_PER_REQUEST) {
            let keys: Vec<String> = ranks.iter().map(|&rank| key(rank)).collect();
            for text in store.multi_get(&keys)? {
                heartbeats.push(serde_json::from_slice(&text).unwrap_or_default());
            }
        }
        Ok(heartbeats)
    }
}

fn key(rank: usize) -> String {
    format!("heartbeat/{rank}")
}

#[cfg(test)]
mod tests {
    use super::{
        super::calls::{
            LastCollective,
            tests::{call_in, group},
        },
        *,
    };

    #[test]
    fn a_heartbeat_has_the_same_size_in_groups_of_any_size() {
        let bytes = |members: &[usize]| {
            let call = call_in(group(members), Some(1), None);
            let mut log = Log::default();
            let last = LastCollective {
                number: 1000,
                operation: "reduce_scatter",
            };
            // The digest has up to 20 digits.
            log.last_collectives
                .insert(u64::MAX - members.len() as u64, last);
            log.calls.push_back(call);
            Heartbeat::new(7, &log).to_bytes().len()
        };
        let large: Vec<usize> = (0..16_384).collect();
        assert_eq!(bytes(&large), bytes(&[0, 1]));
        assert!(bytes(&large) < 150, "{} bytes", bytes(&large));
    }
}
