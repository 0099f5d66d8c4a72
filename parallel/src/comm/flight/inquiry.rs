//! The search for the ranks that miss a call: the first rank to notice asks for all members, and
//! tells the others. So a stalled group of any size sends each member's heartbeat a few times, not
//! to all of its members.

use super::{
    calls::Call,
    diagnosis::{Observation, describe},
    heartbeat::{HEARTBEAT_INTERVAL, HEARTBEAT_TIMEOUT, Heartbeat},
};
use std::time::{Duration, Instant};
use torch_ext::{Error, Store};

/// The time in which the rank that asks must tell the others; then another one asks.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(2300);
/// The ranks that ask one after the other, if each of them fails.
const ATTEMPTS: usize = 2;

/// The occasion of an inquiry. Each has answers of its own: ranks may arrive in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Occasion {
    /// The call takes long.
    Stalled,
    /// The call has failed.
    Failed,
}

/// A rank's means to look for others.
pub(super) struct Inquirer<'a> {
    pub(super) store: &'a Store,
    pub(super) rank: usize,
    /// Publishes a heartbeat of this rank: others may be looking for it.
    pub(super) beat: &'a mut dyn FnMut() -> bool,
}

impl Inquirer<'_> {
    /// Describes the ranks that have not joined a call.
    pub(super) fn describe_missing_ranks(&mut self, call: &Call, occasion: Occasion) -> String {
        let described = match call.number {
            Some(number) => self.share(call, number, occasion),
            None => self.look(call),
        };
        described.unwrap_or_else(|error| {
            let name = call.name();
            format!("{name}: the missing ranks are unknown: {error}")
        })
    }

    /// Looks for all members, or waits for the text of a rank that does.
    fn share(&mut self, call: &Call, number: u64, occasion: Occasion) -> Result<String, Error> {
        let group = call.group.membership.digest;
        for attempt in 0..ATTEMPTS {
            let key = format!("inquiry/{group:016x}/{number}/{occasion:?}/{attempt}");
            let answer = format!("{key}/answer");
            if self.store.add(&key, 1)? == 1 {
                let text = self.look(call)?;
                self.store.set(&answer, text.as_bytes())?;
                return Ok(text);
            }
            if let Some(text) = self.await_answer(&answer)? {
                return Ok(text);
            }
        }
        self.look(call)
    }

    fn await_answer(&mut self, key: &str) -> Result<Option<String>, Error> {
        let start = Instant::now();
        while start.elapsed() < ANSWER_TIMEOUT {
            if self.store.contains(key)? {
                let text = self.store.get(key)?;
                return Ok(Some(String::from_utf8_lossy(&text).into_owned()));
            }
            std::thread::sleep(HEARTBEAT_INTERVAL / 2);
            (self.beat)();
        }
        Ok(None)
    }

    /// Compares two heartbeats of each rank on which the call depends.
    fn look(&mut self, call: &Call) -> Result<String, Error> {
        let others: Vec<usize> = match call.peer {
            Some(peer) => vec![peer],
            None => call
                .group
                .membership
                .members
                .iter()
                .copied()
                .filter(|&rank| rank != self.rank)
                .collect(),
        };
        let before = Heartbeat::read(&others, self.store)?;
        let start = Instant::now();
        while start.elapsed() < HEARTBEAT_TIMEOUT {
            std::thread::sleep(HEARTBEAT_INTERVAL / 2);
            (self.beat)();
        }
        let after = Heartbeat::read(&others, self.store)?;
        let pairs = before.into_iter().zip(after);
        let observation =
            |(rank, (before, heartbeat)): (usize, (Heartbeat, Heartbeat))| Observation {
                rank,
                is_silent: heartbeat.beat == before.beat,
                heartbeat,
            };
        let observations = others
            .into_iter()
            .zip(pairs)
            .map(observation)
            .collect::<Vec<_>>();
        Ok(describe(&observations, call))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::calls::{
            Log,
            tests::{call_in, group},
        },
        *,
    };
    use crate::{
        StoreServer, StoreTraffic,
        store::{TrafficCounter, connect_counted},
    };
    use std::{sync::Arc, thread};

    const TIMEOUT: Duration = Duration::from_secs(30);

    struct Answer {
        text: String,
        traffic: StoreTraffic,
    }

    /// All ranks but the last, which has stopped, look for it at the same time.
    fn inquire(size: usize) -> Vec<Answer> {
        let server = StoreServer::local().unwrap();
        let members: Vec<usize> = (0..size).collect();
        let join = |rank: usize| {
            let traffic = Arc::new(TrafficCounter::default());
            let store = connect_counted(server.access(), TIMEOUT, traffic.clone()).unwrap();
            let mut log = Log::default();
            for _ in 0..if rank + 1 == size { 1 } else { 2 } {
                log.add(
                    call_in(group(&(0..size).collect::<Vec<_>>()), None, None),
                    true,
                );
            }
            assert!(Heartbeat::new(1, &log).publish(rank, &store));
            (store, log, traffic)
        };
        let joined: Vec<_> = (0..size).map(join).collect();
        let look = |(rank, (store, log, traffic)): (usize, (Store, Log, Arc<TrafficCounter>))| {
            let call = call_in(group(&members), Some(2), None);
            thread::spawn(move || {
                let before = traffic.total();
                let mut beats = 1;
                let mut beat = || {
                    beats += 1;
                    Heartbeat::new(beats, &log).publish(rank, &store)
                };
                let mut inquirer = Inquirer {
                    store: &store,
                    rank,
                    beat: &mut beat,
                };
                let text = inquirer.describe_missing_ranks(&call, Occasion::Failed);
                let traffic = traffic.total() - before;
                Answer { text, traffic }
            })
        };
        let others = joined.into_iter().enumerate().take(size - 1);
        let others: Vec<_> = others.map(look).collect();
        others
            .into_iter()
            .map(|rank| rank.join().unwrap())
            .collect()
    }

    #[test]
    fn one_rank_asks_for_all() {
        for size in [4, 64] {
            let answers = inquire(size);
            let last = size - 1;
            let expected = format!(
                "call 2, all_to_all in group 'experts': rank {last} has stopped; its last \
                 reported call here is 1, all_to_all"
            );
            assert!(
                answers.iter().all(|it| it.text == expected),
                "{}",
                answers[0].text
            );
            let requests = answers.iter().map(|it| it.traffic.requests);
            assert!(requests.clone().all(|requests| requests < 30));
            // One rank reads all heartbeats, and the others its answer.
            let mut bytes = answers
                .iter()
                .map(|it| it.traffic.bytes)
                .collect::<Vec<u64>>();
            bytes.sort_unstable();
            let others = bytes[bytes.len() - 2];
            assert!(others < 3000, "{others} bytes");
        }
    }

    #[test]
    fn another_rank_asks_if_the_first_one_dies() {
        let server = StoreServer::local().unwrap();
        let store = crate::store::connect(server.access(), TIMEOUT).unwrap();
        let call = call_in(group(&[0, 1]), Some(2), None);
        let digest = call.group.membership.digest;
        store
            .add(&format!("inquiry/{digest:016x}/2/Failed/0"), 1)
            .unwrap();
        assert!(Heartbeat::default().publish(1, &store));
        let mut inquirer = Inquirer {
            store: &store,
            rank: 0,
            beat: &mut || true,
        };
        let text = inquirer.describe_missing_ranks(&call, Occasion::Failed);
        assert!(text.ends_with("rank 1 has never reported"), "{text}");
    }
}
