//! The ranks that are connected to a keeper.

use crate::keeper::report::RankStatus;
use std::{collections::BTreeMap, time::Instant};

/// The messages of a connected rank, summed up.
#[derive(Debug)]
struct RankRecord {
    pid: i32,
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
    /// Adds a connection of a rank. Another process replaces the record of an earlier one.
    pub(crate) fn connect(&mut self, rank: usize, pid: i32, now: Instant) {
        let new_record = || RankRecord {
            pid,
            step: 0,
            progress: 0,
            last_heard: now,
            connections: 0,
        };
        let record = self.ranks.entry(rank).or_insert_with(new_record);
        if record.pid != pid {
            *record = new_record();
        }
        record.connections += 1;
    }

    /// Removes a connection and returns true, unless another process has become this rank.
    pub(crate) fn disconnect(&mut self, rank: usize, pid: i32) -> bool {
        let Some(record) = self.ranks.get_mut(&rank) else {
            return false;
        };
        if record.pid != pid {
            return false;
        }
        record.connections = record.connections.saturating_sub(1);
        if record.connections == 0 {
            self.ranks.remove(&rank);
        }
        true
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
        self.ranks.get(&rank).map(|record| record.pid)
    }

    pub(crate) fn pids(&self) -> impl Iterator<Item = i32> + '_ {
        self.ranks.values().map(|record| record.pid)
    }

    pub(crate) fn statuses(&self, now: Instant) -> Vec<RankStatus> {
        let mut statuses = Vec::with_capacity(self.ranks.len());
        for (&rank, record) in &self.ranks {
            let silence = now.saturating_duration_since(record.last_heard);
            statuses.push(RankStatus {
                rank,
                pid: record.pid,
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

    #[test]
    fn a_rank_is_there_while_its_process_has_a_connection() {
        let mut table = RankTable::default();
        let now = Instant::now();
        table.connect(3, 100, now);
        table.connect(3, 100, now);
        assert!(table.disconnect(3, 100));
        assert_eq!(table.pid(3), Some(100));
        // A restarted rank connects before the old process's last connection is closed.
        table.connect(3, 200, now);
        assert!(!table.disconnect(3, 100));
        assert_eq!(table.pid(3), Some(200));
        assert!(table.disconnect(3, 200));
        assert_eq!(table.pid(3), None);
    }

    #[test]
    fn statuses_show_the_most_progress_and_the_silence() {
        let mut table = RankTable::default();
        let start = Instant::now();
        table.connect(0, 100, start);
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
