//! The ranks that are connected to a keeper.

use crate::keeper::report::RankStatus;
use std::{collections::BTreeMap, time::Instant};

/// Connections that a process made as one rank, one after the other: the training thread's and that
/// of the thread that copies for it. A rank that connects again begins another session, whose
/// messages may overtake the last ones of the earlier session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RankSession {
    pub(crate) rank: usize,
    pub(crate) pid: i32,
    /// Increases with each session of a process.
    pub(crate) number: u64,
}

/// The messages of a connected rank, summed up.
#[derive(Debug)]
struct RankRecord {
    session: RankSession,
    step: u64,
    progress: u64,
    last_heard: Instant,
    connections: usize,
}

/// The connected ranks by number.
#[derive(Debug, Default)]
pub(crate) struct RankTable {
    ranks: BTreeMap<usize, RankRecord>,
}

impl RankTable {
    /// Adds a connection. Returns true if it begins a session after another one of the rank.
    pub(crate) fn connect(&mut self, session: RankSession, now: Instant) -> bool {
        let new_record = RankRecord {
            session,
            step: 0,
            progress: 0,
            last_heard: now,
            connections: 1,
        };
        let Some(record) = self.ranks.get_mut(&session.rank) else {
            self.ranks.insert(session.rank, new_record);
            return false;
        };
        let last = record.session;
        if last == session {
            record.connections += 1;
            return false;
        }
        if last.pid != session.pid {
            *record = new_record;
            return true;
        }
        let is_newer = last.number < session.number;
        if is_newer {
            record.session = session;
            record.connections = 1;
        }
        is_newer
    }

    /// Removes a connection and returns true, unless its session is not the rank's last one.
    pub(crate) fn disconnect(&mut self, session: RankSession) -> bool {
        let is_current = |record: &&mut RankRecord| record.session == session;
        let Some(record) = self.ranks.get_mut(&session.rank).filter(is_current) else {
            return false;
        };
        record.connections = record.connections.saturating_sub(1);
        if record.connections == 0 {
            self.ranks.remove(&session.rank);
        }
        true
    }

    /// True if the rank has begun another session since.
    pub(crate) fn is_outdated(&self, session: RankSession) -> bool {
        let record = self.ranks.get(&session.rank);
        record.is_some_and(|record| record.session != session)
    }

    pub(crate) fn record_message(&mut self, rank: usize, now: Instant) {
        if let Some(record) = self.ranks.get_mut(&rank) {
            record.last_heard = now;
        }
    }

    /// Records progress. Messages on different connections may arrive out of order.
    pub(crate) fn record_progress(&mut self, rank: usize, step: u64, progress: u64) {
        if let Some(record) = self.ranks.get_mut(&rank) {
            record.step = record.step.max(step);
            record.progress = record.progress.max(progress);
        }
    }

    pub(crate) fn pid(&self, rank: usize) -> Option<i32> {
        self.ranks.get(&rank).map(|record| record.session.pid)
    }

    pub(crate) fn pids(&self) -> impl Iterator<Item = i32> + '_ {
        self.ranks.values().map(|record| record.session.pid)
    }

    pub(crate) fn statuses(&self, now: Instant) -> Vec<RankStatus> {
        let mut statuses = Vec::with_capacity(self.ranks.len());
        for (&rank, record) in &self.ranks {
            let silence = now.saturating_duration_since(record.last_heard);
            statuses.push(RankStatus {
                rank,
                pid: record.session.pid,
                step: record.step,
                progress: record.progress,
                silent_ms: silence.as_millis() as u64,
            });
        }
        statuses
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn session(rank: usize, pid: i32, number: u64) -> RankSession {
        RankSession { rank, pid, number }
    }

    #[test]
    fn a_rank_is_there_while_its_session_has_a_connection() {
        let mut table = RankTable::default();
        let now = Instant::now();
        let [first, second] = [session(3, 100, 1), session(3, 100, 2)];
        let restarted = session(3, 200, 1);
        assert!(!table.connect(first, now) && !table.connect(first, now));
        assert!(table.disconnect(first));
        assert_eq!(table.pid(3), Some(100));
        // A rank connects again before the last connection of its earlier session is closed.
        for (next, earlier) in [(second, first), (restarted, second)] {
            assert!(table.connect(next, now));
            assert!(table.is_outdated(earlier) && !table.is_outdated(next));
            assert!(!table.disconnect(earlier));
            assert_eq!(table.pid(3), Some(next.pid));
        }
        assert!(table.disconnect(restarted));
        assert_eq!(table.pid(3), None);
        // A connection that was made late belongs to an earlier session still.
        table.connect(second, now);
        assert!(!table.connect(first, now) && table.is_outdated(first));
    }

    #[test]
    fn statuses_show_the_most_progress_and_the_silence() {
        let mut table = RankTable::default();
        let start = Instant::now();
        table.connect(session(0, 100, 1), start);
        table.record_message(0, start + Duration::from_millis(5));
        table.record_progress(0, 7, 30);
        table.record_progress(0, 6, 31);
        let expected = RankStatus {
            rank: 0,
            pid: 100,
            step: 7,
            progress: 31,
            silent_ms: 15,
        };
        let statuses = table.statuses(start + Duration::from_millis(20));
        assert_eq!(statuses, [expected]);
    }
}
