//! Counts of refused connections.

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// The reason of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Too many connections were unauthenticated, and this was the oldest.
    Evicted,
    /// The handshake took too long.
    TimedOut,
    /// The proof was wrong.
    Unauthenticated,
    /// The peer sent something else than a handshake.
    Malformed,
    /// The peer closed the connection before its proof.
    Closed,
    /// The peer is another user of this machine.
    OtherUser,
    /// Too many authenticated connections were open.
    Full,
    /// Too few file descriptors were left.
    NoDescriptor,
    /// The system could not start a thread.
    NoThread,
}

/// The numbers of refused connections by reason; see [`Refusal`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusalCounts {
    pub evicted: u64,
    pub timed_out: u64,
    pub unauthenticated: u64,
    pub malformed: u64,
    pub closed: u64,
    pub other_user: u64,
    pub full: u64,
    pub no_descriptor: u64,
    pub no_thread: u64,
}

impl RefusalCounts {
    fn of(&mut self, refusal: Refusal) -> &mut u64 {
        match refusal {
            Refusal::Evicted => &mut self.evicted,
            Refusal::TimedOut => &mut self.timed_out,
            Refusal::Unauthenticated => &mut self.unauthenticated,
            Refusal::Malformed => &mut self.malformed,
            Refusal::Closed => &mut self.closed,
            Refusal::OtherUser => &mut self.other_user,
            Refusal::Full => &mut self.full,
            Refusal::NoDescriptor => &mut self.no_descriptor,
            Refusal::NoThread => &mut self.no_thread,
        }
    }

    /// Returns the number of all refused connections.
    pub fn total(&self) -> u64 {
        self.named().into_iter().map(|(_, count)| count).sum()
    }

    /// Returns a line about the connections that `port` refused, if there were any.
    pub fn line(&self, port: &str) -> Option<String> {
        let total = self.total();
        (total > 0).then(|| format!("refused connections at {port}: {total} ({self})"))
    }

    /// Returns the counts with their names.
    fn named(&self) -> [(&'static str, u64); 9] {
        [
            ("evicted while others waited", self.evicted),
            ("too slow", self.timed_out),
            ("without the secret", self.unauthenticated),
            ("not of moerun", self.malformed),
            ("closed early", self.closed),
            ("of another user", self.other_user),
            ("over the limit", self.full),
            ("without a file descriptor", self.no_descriptor),
            ("without a thread", self.no_thread),
        ]
    }
}

/// Lists the reasons that occurred, such as `3 too slow, 1 without the secret`.
impl std::fmt::Display for RefusalCounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut separator = "";
        for (name, count) in self.named() {
            if count > 0 {
                write!(f, "{separator}{count} {name}")?;
                separator = ", ";
            }
        }
        Ok(())
    }
}

/// Counts that the thread of a [`Door`](super::Door) keeps and others read.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<RefusalCounts>);

impl Refusals {
    pub(super) fn count(&self, refusal: Refusal) {
        *self.0.lock().of(refusal) += 1;
    }

    /// Returns the counts so far.
    pub fn counts(&self) -> RefusalCounts {
        *self.0.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_listed_with_their_numbers() {
        let refusals = Refusals::default();
        refusals.count(Refusal::TimedOut);
        refusals.count(Refusal::TimedOut);
        refusals.count(Refusal::OtherUser);
        let counts = refusals.counts();
        assert_eq!(counts.total(), 3);
        assert_eq!(counts.to_string(), "2 too slow, 1 of another user");
    }

    #[test]
    fn refused_connections_are_shown() {
        assert_eq!(RefusalCounts::default().line("the store"), None);
        let counts = RefusalCounts {
            malformed: 2,
            full: 1,
            ..RefusalCounts::default()
        };
        let line = counts.line("the store").unwrap();
        let expected = "refused connections at the store: 3 (2 not of moerun, 1 over the limit)";
        assert_eq!(line, expected);
    }
}
