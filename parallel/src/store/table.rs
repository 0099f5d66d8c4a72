//! The keys and values of a store, and the clients that wait for keys. Without input or output.

use super::{MAX_KEY_BYTES, message::Reply};
use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};
use torch_ext::{StoreOperation, StoreReply, StoreRequest};

/// The longest wait that a client can ask for.
const MAX_WAIT: Duration = Duration::from_secs(7 * 24 * 3600);

pub(super) type ClientId = u64;

/// An answer, and the client that it is for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) client: ClientId,
    pub(super) reply: Reply,
}

/// A client that waits for keys.
#[derive(Debug)]
struct Waiter {
    request: StoreRequest,
    deadline: Instant,
    missing: BTreeSet<Vec<u8>>,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    values: HashMap<Vec<u8>, Vec<u8>>,
    waiters: HashMap<ClientId, Waiter>,
    /// The clients that wait for a key that is not set.
    wanted: HashMap<Vec<u8>, BTreeSet<ClientId>>,
    deadlines: BTreeSet<(Instant, ClientId)>,
}

impl Table {
    /// Carries out a client's request. Returns the answers that are possible now: to the client,
    /// unless it waits for keys, and to clients that waited for what it set.
    pub(super) fn request(
        &mut self,
        client: ClientId,
        request: StoreRequest,
        now: Instant,
    ) -> Vec<Answer> {
        self.forget(client);
        if let Err(reason) = check(&request) {
            let reply = Reply::Failed(reason);
            return vec![Answer { client, reply }];
        }
        if matches!(
            request.operation,
            StoreOperation::Get | StoreOperation::Wait
        ) {
            return Vec::from_iter(self.answer_or_wait(client, request, now));
        }
        let mut changed = Vec::new();
        let reply = match self.apply(request, &mut changed) {
            Ok(reply) => Reply::Done(reply.into()),
            Err(reason) => Reply::Failed(reason),
        };
        let mut answers = vec![Answer { client, reply }];
        for key in changed {
            answers.extend(self.wake(&key));
        }
        answers
    }

    /// Returns the answers to clients whose wait is over without success.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Answer> {
        let mut answers = Vec::new();
        while let Some(&(deadline, client)) = self.deadlines.first() {
            if deadline > now {
                break;
            }
            let Some(waiter) = self.forget(client) else {
                self.deadlines.pop_first();
                continue;
            };
            let key = waiter.missing.first().map_or("?".into(), |key| text(key));
            let timeout = waiter.request.timeout;
            let reason =
                format!("timed out: no rank has set the key {key} of the store in {timeout:.1?}");
            let reply = Reply::Failed(reason);
            answers.push(Answer { client, reply });
        }
        answers
    }

    /// Returns the time at which [`Table::expire`] has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// Ends the wait of a client, whose connection is closed.
    pub(super) fn leave(&mut self, client: ClientId) {
        self.forget(client);
    }

    fn forget(&mut self, client: ClientId) -> Option<Waiter> {
        let waiter = self.waiters.remove(&client)?;
        self.deadlines.remove(&(waiter.deadline, client));
        for key in &waiter.missing {
            if let Some(clients) = self.wanted.get_mut(key) {
                clients.remove(&client);
                if clients.is_empty() {
                    self.wanted.remove(key);
                }
            }
        }
        Some(waiter)
    }

    /// Answers a request for keys, or lets the client wait for those that are missing.
    fn answer_or_wait(
        &mut self,
        client: ClientId,
        request: StoreRequest,
        now: Instant,
    ) -> Option<Answer> {
        let keys = request.keys.iter();
        let is_missing = |key: &&Vec<u8>| !self.values.contains_key(*key);
        let missing = keys
            .filter(is_missing)
            .cloned()
            .collect::<BTreeSet<Vec<u8>>>();
        if missing.is_empty() {
            let reply = Reply::Done(self.read(&request).into());
            return Some(Answer { client, reply });
        }
        let deadline = now + request.timeout.min(MAX_WAIT);
        for key in &missing {
            self.wanted.entry(key.clone()).or_default().insert(client);
        }
        self.deadlines.insert((deadline, client));
        let waiter = Waiter {
            request,
            deadline,
            missing,
        };
        self.waiters.insert(client, waiter);
        None
    }

    /// Returns the answer to a get or a wait whose keys are all set.
    fn read(&self, request: &StoreRequest) -> StoreReply {
        let value = |key: &Vec<u8>| self.values.get(key).cloned().unwrap_or_default();
        let values = match request.operation {
            StoreOperation::Get => request.keys.iter().map(value).collect(),
            _ => Vec::new(),
        };
        StoreReply { number: 0, values }
    }

    /// Answers clients that wait for nothing else than this key, which is now set.
    fn wake(&mut self, key: &[u8]) -> Vec<Answer> {
        let mut answers = Vec::new();
        for client in self.wanted.remove(key).unwrap_or_default() {
            let Some(waiter) = self.waiters.get_mut(&client) else {
                continue;
            };
            waiter.missing.remove(key);
            if !waiter.missing.is_empty() {
                continue;
            }
            let Some(waiter) = self.forget(client) else {
                continue;
            };
            // A key may have been deleted since it was found.
            let now = waiter.deadline - waiter.request.timeout.min(MAX_WAIT);
            answers.extend(self.answer_or_wait(client, waiter.request, now));
        }
        answers
    }

    /// Carries out an operation that does not wait, and adds the keys that it set to `changed`.
    fn apply(
        &mut self,
        request: StoreRequest,
        changed: &mut Vec<Vec<u8>>,
    ) -> Result<StoreReply, String> {
        let StoreRequest {
            operation,
            mut keys,
            mut values,
            number,
            ..
        } = request;
        let mut reply = StoreReply::default();
        match operation {
            StoreOperation::Set => {
                for (key, value) in keys.into_iter().zip(values) {
                    changed.push(key.clone());
                    self.values.insert(key, value);
                }
            }
            StoreOperation::Add => {
                let key = keys.swap_remove(0);
                reply.number = self.add(&key, number)?;
                changed.push(key);
            }
            StoreOperation::CompareSet => {
                let desired = values.swap_remove(1);
                let key = keys.swap_remove(0);
                let value = self.compare_set(&key, values.swap_remove(0), desired);
                reply.values.push(value);
                changed.push(key);
            }
            StoreOperation::Append => {
                let key = keys.swap_remove(0);
                let value = self.values.entry(key.clone()).or_default();
                value.append(&mut values[0]);
                changed.push(key);
            }
            StoreOperation::Check => {
                let all = keys.iter().all(|key| self.values.contains_key(key));
                reply.number = i64::from(all);
            }
            StoreOperation::Delete => {
                let deleted = keys.iter().filter(|key| self.values.remove(*key).is_some());
                reply.number = deleted.count() as i64;
            }
            StoreOperation::Count => reply.number = self.values.len() as i64,
            StoreOperation::Get | StoreOperation::Wait => {}
        }
        Ok(reply)
    }

    /// Adds to a counter, which is decimal text like that of c10d's stores.
    fn add(&mut self, key: &[u8], amount: i64) -> Result<i64, String> {
        let before = match self.values.get(key) {
            None => Some(0),
            Some(value) => str::from_utf8(value)
                .ok()
                .and_then(|text| text.parse().ok()),
        };
        let Some(sum) = before.and_then(|before: i64| before.checked_add(amount)) else {
            return Err(format!("the key {} of the store is no counter", text(key)));
        };
        let value = sum.to_string().into_bytes();
        self.values.insert(key.to_vec(), value);
        Ok(sum)
    }

    fn compare_set(&mut self, key: &[u8], expected: Vec<u8>, desired: Vec<u8>) -> Vec<u8> {
        let found = self.values.get(key);
        let is_expected = match found {
            Some(found) => *found == expected,
            None => expected.is_empty(),
        };
        if is_expected {
            self.values.insert(key.to_vec(), desired.clone());
            return desired;
        }
        found.cloned().unwrap_or(expected)
    }
}

/// Refuses a request whose operands do not fit its operation, or are too long.
fn check(request: &StoreRequest) -> Result<(), String> {
    let keys = request.keys.len();
    let values = request.values.len();
    let fits = match request.operation {
        StoreOperation::Set => keys == values,
        StoreOperation::Add => (keys, values) == (1, 0),
        StoreOperation::CompareSet => (keys, values) == (1, 2),
        StoreOperation::Append => (keys, values) == (1, 1),
        StoreOperation::Get
        | StoreOperation::Wait
        | StoreOperation::Check
        | StoreOperation::Delete => values == 0,
        StoreOperation::Count => (keys, values) == (0, 0),
    };
    if !fits {
        let operation = request.operation;
        return Err(format!(
            "{operation:?} with {keys} keys and {values} values"
        ));
    }
    match request.keys.iter().find(|key| key.len() > MAX_KEY_BYTES) {
        Some(key) => Err(format!(
            "a key of {} bytes is longer than {MAX_KEY_BYTES}",
            key.len()
        )),
        None => Ok(()),
    }
}

fn text(key: &[u8]) -> String {
    let most = key.len().min(200);
    format!("{:?}", String::from_utf8_lossy(&key[..most]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use torch_ext::StoreOperation::{
        Add, Append, Check, CompareSet, Count, Delete, Get, Set, Wait,
    };

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// Returns the number of clients that wait, by key.
    fn waiting(table: &Table) -> BTreeMap<&[u8], usize> {
        let wanted = table.wanted.iter();
        wanted
            .map(|(key, clients)| (&key[..], clients.len()))
            .collect()
    }

    fn request(operation: StoreOperation, keys: &[&str], values: &[&str]) -> StoreRequest {
        let bytes = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect();
        StoreRequest {
            operation,
            keys: bytes(keys),
            values: bytes(values),
            number: 1,
            timeout: TIMEOUT,
        }
    }

    fn done(number: i64, values: &[&str]) -> Reply {
        let values = values.iter().map(|text| text.as_bytes().to_vec());
        let values = values.collect();
        Reply::Done(StoreReply { number, values }.into())
    }

    /// Sends a request of client 1, which has to be answered at once, and no other client.
    fn ask(table: &mut Table, operation: StoreOperation, keys: &[&str], values: &[&str]) -> Reply {
        let request = request(operation, keys, values);
        let mut answers = table.request(1, request, Instant::now());
        assert_eq!(answers.len(), 1);
        answers.remove(0).reply
    }

    #[test]
    fn operations_follow_c10d() {
        let mut table = Table::default();
        let table = &mut table;
        assert_eq!(ask(table, Set, &["a", "b"], &["1", "x"]), done(0, &[]));
        assert_eq!(ask(table, Get, &["b", "a"], &[]), done(0, &["x", "1"]));
        assert_eq!(ask(table, Add, &["a"], &[]), done(2, &[]));
        assert_eq!(ask(table, Get, &["a"], &[]), done(0, &["2"]));
        assert!(matches!(ask(table, Add, &["b"], &[]), Reply::Failed(_)));
        assert_eq!(ask(table, Append, &["b"], &["y"]), done(0, &[]));
        assert_eq!(
            ask(table, CompareSet, &["b"], &["no", "z"]),
            done(0, &["xy"])
        );
        assert_eq!(
            ask(table, CompareSet, &["b"], &["xy", "z"]),
            done(0, &["z"])
        );
        assert_eq!(
            ask(table, CompareSet, &["c"], &["no", "z"]),
            done(0, &["no"])
        );
        assert_eq!(ask(table, Check, &["a", "c"], &[]), done(0, &[]));
        assert_eq!(ask(table, CompareSet, &["c"], &["", "z"]), done(0, &["z"]));
        assert_eq!(ask(table, Check, &["a", "c"], &[]), done(1, &[]));
        assert_eq!(ask(table, Count, &[], &[]), done(3, &[]));
        assert_eq!(ask(table, Delete, &["a", "d"], &[]), done(1, &[]));
        assert_eq!(ask(table, Count, &[], &[]), done(2, &[]));
    }

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        let long = "k".repeat(MAX_KEY_BYTES + 1);
        for (operation, keys, values) in [
            (Set, vec!["a", "b"], vec!["1"]),
            (Add, vec![], vec![]),
            (CompareSet, vec!["a"], vec!["1"]),
            (Append, vec!["a"], vec![]),
            (Get, vec!["a"], vec!["1"]),
            (Count, vec!["a"], vec![]),
            (Set, vec![long.as_str()], vec!["1"]),
        ] {
            let reply = ask(&mut Table::default(), operation, &keys, &values);
            assert!(matches!(reply, Reply::Failed(_)), "{operation:?} {reply:?}");
        }
    }

    #[test]
    fn a_client_waits_for_all_of_its_keys() {
        let mut table = Table::default();
        let now = Instant::now();
        let get = request(Get, &["a", "b", "a"], &[]);
        assert_eq!(table.request(7, get, now), []);
        assert_eq!(table.request(8, request(Wait, &["b"], &[]), now), []);
        assert_eq!(waiting(&table), [(&b"a"[..], 1), (&b"b"[..], 2)].into());
        let set = request(Set, &["a"], &["1"]);
        assert_eq!(table.request(1, set, now).len(), 1);
        let set = request(Set, &["b"], &["2"]);
        let answers = table.request(1, set, now);
        let answer = |client, reply| Answer { client, reply };
        assert_eq!(answers[1], answer(7, done(0, &["1", "2", "1"])));
        assert_eq!(answers[2], answer(8, done(0, &[])));
        assert!(waiting(&table).is_empty() && table.next_deadline().is_none());
    }

    #[test]
    fn a_wait_ends_at_its_deadline_or_with_its_client() {
        let mut table = Table::default();
        let now = Instant::now();
        assert_eq!(table.request(7, request(Get, &["a"], &[]), now), []);
        assert_eq!(table.request(8, request(Get, &["a"], &[]), now), []);
        assert_eq!(table.next_deadline(), Some(now + TIMEOUT));
        assert_eq!(table.expire(now + TIMEOUT / 2), []);
        table.leave(8);
        let answers = table.expire(now + TIMEOUT);
        assert_eq!((answers.len(), answers[0].client), (1, 7));
        assert!(
            matches!(&answers[0].reply, Reply::Failed(reason) if reason.contains("timed out")),
            "{answers:?}"
        );
        assert!(waiting(&table).is_empty() && table.next_deadline().is_none());
    }

    proptest! {
        #[test]
        fn every_request_is_answered_once(
            steps in prop::collection::vec((0u64..4, 0u8..9, 0u8..3, any::<bool>()), 1..200),
        ) {
            let mut table = Table::default();
            let mut now = Instant::now();
            let mut waits = BTreeSet::new();
            for (client, operation, key, leaves) in steps {
                now += Duration::from_secs(1);
                if leaves {
                    table.leave(client);
                    waits.remove(&client);
                    continue;
                }
                // A client has one request at a time.
                if waits.contains(&client) {
                    continue;
                }
                let operation = StoreOperation::from_number(operation).unwrap();
                let key = key.to_string();
                let values: &[&str] = match operation {
                    Set | Append => &["1"],
                    CompareSet => &["", "1"],
                    _ => &[],
                };
                let keys: &[&str] = if operation == Count { &[] } else { &[&key] };
                waits.insert(client);
                let mut answers = table.request(client, request(operation, keys, values), now);
                answers.extend(table.expire(now));
                for answer in answers {
                    prop_assert!(waits.remove(&answer.client), "{answer:?} twice");
                }
                prop_assert_eq!(table.waiters.len(), waits.len());
                prop_assert_eq!(table.deadlines.len(), waits.len());
            }
            table.expire(now + MAX_WAIT);
            prop_assert!(table.waiters.is_empty() && waiting(&table).is_empty());
        }
    }
}
