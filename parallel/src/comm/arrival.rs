//! The arrival of a group's members at the store, in a constant number of requests per rank.

use std::time::Duration;
use torch_ext::{Error, Store};

/// Added to the counter of arrivals by a rank that objects.
const OBJECTION: i64 = 1 << 32;

/// A point that all members of a group pass together.
pub(crate) struct Arrival<'a> {
    pub(crate) store: &'a Store,
    pub(crate) key: &'a str,
    /// The number of members.
    pub(crate) size: usize,
}

impl Arrival<'_> {
    /// Waits for all members; true on all of them if each of them agrees.
    ///
    /// # Errors
    /// If a member does not come within the store's timeout.
    pub(crate) fn agree(&self, agrees: bool) -> Result<bool, Error> {
        if let Some(all_agree) = self.arrive(agrees)? {
            return Ok(all_agree);
        }
        let answer = self.store.get(&self.answer_key())?;
        Ok(answer == [1])
    }

    /// Waits for all members.
    ///
    /// # Errors
    /// If a member does not come within `timeout`. The message tells how many came.
    pub(crate) fn wait(&self, timeout: Duration) -> Result<(), String> {
        let text = |error: Error| error.to_string();
        if self.arrive(true).map_err(text)?.is_some() {
            return Ok(());
        }
        if self.store.wait(&self.answer_key(), timeout).is_ok() {
            return Ok(());
        }
        let size = self.size;
        let present = self.store.add(self.key, 0).map_err(text)? % OBJECTION;
        Err(format!(
            "only {present} of {size} ranks joined within {timeout:.1?}"
        ))
    }

    /// Counts this rank. The last to come answers for all, and gets the answer.
    fn arrive(&self, agrees: bool) -> Result<Option<bool>, Error> {
        let own = if agrees { 1 } else { 1 + OBJECTION };
        let arrivals = self.store.add(self.key, own)?;
        if arrivals % OBJECTION < self.size as i64 {
            return Ok(None);
        }
        let all_agree = arrivals < OBJECTION;
        self.store.set(&self.answer_key(), &[u8::from(all_agree)])?;
        Ok(Some(all_agree))
    }

    fn answer_key(&self) -> String {
        format!("{}/all", self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{StoreServer, store};
    use std::thread;

    const TIMEOUT: Duration = Duration::from_secs(20);

    #[test]
    fn members_pass_together_and_one_objection_counts() {
        let server = StoreServer::local().unwrap();
        for (key, objector) in [("all", None), ("one", Some(3))] {
            let arrive = |rank: usize| {
                let access = server.access().clone();
                thread::spawn(move || {
                    let store = store::connect(&access, TIMEOUT).unwrap();
                    let size = 5;
                    let store = &store;
                    let arrival = Arrival { store, key, size };
                    arrival.agree(objector != Some(rank)).unwrap()
                })
            };
            let ranks: Vec<_> = (0..5).map(arrive).collect();
            for rank in ranks {
                assert_eq!(rank.join().unwrap(), objector.is_none());
            }
        }
    }

    #[test]
    fn a_missing_member_is_counted() {
        let server = StoreServer::local().unwrap();
        let store = store::connect(server.access(), TIMEOUT).unwrap();
        store.add("late", 2).unwrap();
        let arrival = Arrival {
            store: &store,
            key: "late",
            size: 4,
        };
        let error = arrival.wait(Duration::from_millis(200)).unwrap_err();
        assert_eq!(error, "only 3 of 4 ranks joined within 200.0ms");
    }
}
