//! Follows the keepers' reports of one generation: which snapshots are complete, and whether ranks
//! make progress. Events in, actions out; times are those since the launcher's start.

use checkpoint::keeper::{
    Event, Node, PartInfo, RankStatus, Snapshot, SnapshotContents, SnapshotId, Topology,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// The time after which an incomplete snapshot is abandoned.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(60);
/// The age at which a keeper's report on a rank no longer counts.
const REPORT_LIFETIME: Duration = Duration::from_secs(1);
/// The least time without progress that counts as a hang, if none is configured.
const MIN_STEP_TIMEOUT: Duration = Duration::from_secs(60);

struct PendingSnapshot {
    parts: BTreeMap<usize, PartInfo>,
    /// Nodes that have its parity.
    protected: BTreeSet<usize>,
    since: Duration,
}

impl PendingSnapshot {
    fn new(since: Duration) -> PendingSnapshot {
        PendingSnapshot {
            parts: BTreeMap::new(),
            protected: BTreeSet::new(),
            since,
        }
    }
}

struct RankReport {
    status: RankStatus,
    received: Duration,
}

/// The snapshots and ranks of one generation.
pub(crate) struct Tracker {
    pub(crate) topology: Topology,
    /// The node of each rank.
    rank_nodes: Vec<usize>,
    pending: BTreeMap<SnapshotId, PendingSnapshot>,
    /// Snapshots newer than the newest complete one that will never be complete.
    abandoned: BTreeSet<SnapshotId>,
    /// Such snapshots that no rank has completed its part of. Abandoning one also ends the encoding
    /// of older ones, so that waits until it has to be.
    doomed: BTreeMap<SnapshotId, String>,
    /// Snapshots that ranks want on disk; the next one that completes will do.
    wanted: BTreeSet<SnapshotId>,
    /// The newest complete snapshot.
    pub(crate) newest: Option<SnapshotId>,
    ranks: BTreeMap<usize, RankReport>,
    /// The sum of all ranks' counters of progress, and the last time that it changed.
    progress: u64,
    progress_at: Duration,
    /// The longest time between two signs of progress.
    longest_pause: Duration,
    /// The number of steps done.
    pub(crate) step: u64,
}

/// The launcher's reaction to an event.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Tell all keepers that the snapshot is complete; if `durable`, write it to disk.
    Commit {
        snapshot: Snapshot,
        durable: bool,
    },
    Abandon {
        id: SnapshotId,
        reason: String,
    },
    Nothing,
}

impl Tracker {
    pub(crate) fn new(topology: Topology, now: Duration) -> Tracker {
        Tracker {
            rank_nodes: rank_nodes(&topology),
            topology,
            pending: BTreeMap::new(),
            abandoned: BTreeSet::new(),
            doomed: BTreeMap::new(),
            wanted: BTreeSet::new(),
            newest: None,
            ranks: BTreeMap::new(),
            progress: 0,
            progress_at: now,
            longest_pause: Duration::ZERO,
            step: 0,
        }
    }

    /// Takes an event from the keeper of `node`.
    pub(crate) fn on_event(&mut self, node: usize, event: Event, now: Duration) -> Action {
        if let Event::Complete { id, .. } | Event::Protected { id } = event
            && let Some(reason) = self.doomed.remove(&id)
        {
            self.abandon(id);
            return Action::Abandon { id, reason };
        }
        match event {
            Event::Heartbeat { ranks } => self.on_heartbeat(ranks, now),
            Event::Complete { id, part, durable } => {
                if let Some(pending) = self.pending(id, now) {
                    pending.parts.insert(part.rank, part);
                    if durable {
                        self.wanted.insert(id);
                    }
                    return self.commit_if_complete(id);
                }
            }
            Event::Protected { id } => {
                if let Some(pending) = self.pending(id, now) {
                    pending.protected.insert(node);
                    return self.commit_if_complete(id);
                }
            }
            Event::Unprotected { id, reason } => {
                if self.pending.contains_key(&id) {
                    self.abandon(id);
                    return Action::Abandon { id, reason };
                }
                if self.may_complete(id) {
                    self.doomed.insert(id, reason);
                }
            }
            // The engine has noted it.
            Event::StopRequested { .. } => {}
        }
        Action::Nothing
    }

    /// Returns the pending snapshot, or None if it is outdated: from an earlier generation, not
    /// newer than the newest complete one, or abandoned.
    fn pending(&mut self, id: SnapshotId, now: Duration) -> Option<&mut PendingSnapshot> {
        if !self.may_complete(id) {
            return None;
        }
        let pending = self.pending.entry(id);
        Some(pending.or_insert_with(|| PendingSnapshot::new(now)))
    }

    fn may_complete(&self, id: SnapshotId) -> bool {
        let is_current = id.generation == self.topology.generation && self.newest < Some(id);
        is_current && !self.abandoned.contains(&id)
    }

    fn commit_if_complete(&mut self, id: SnapshotId) -> Action {
        let is_complete = |pending: &PendingSnapshot| {
            pending.parts.len() == self.rank_nodes.len()
                && pending.protected.len() >= self.topology.nodes.len()
        };
        if !self.pending.get(&id).is_some_and(is_complete) {
            return Action::Nothing;
        }
        let Some(pending) = self.pending.remove(&id) else {
            return Action::Nothing;
        };
        self.newest = Some(id);
        // Its keepers forget older ones.
        self.pending.retain(|&pending, _| pending > id);
        self.abandoned.retain(|&abandoned| abandoned > id);
        self.doomed.retain(|&doomed, _| doomed > id);
        // It also stands in for older snapshots, which were abandoned or overtaken.
        let durable = self.wanted.first().is_some_and(|&wanted| wanted <= id);
        self.wanted.retain(|&wanted| wanted > id);
        let snapshot = Snapshot::from(SnapshotContents {
            id,
            topology: self.topology.clone().into(),
            parts: pending.parts.into_values().collect(),
        });
        Action::Commit { snapshot, durable }
    }

    /// Returns the node of each rank.
    pub(crate) fn rank_nodes(&self) -> &[usize] {
        &self.rank_nodes
    }

    /// Removes and returns a snapshot that has been incomplete for too long.
    pub(crate) fn take_expired(&mut self, now: Duration) -> Option<SnapshotId> {
        let mut pending = self.pending.iter();
        let (&id, _) =
            pending.find(|(_, pending)| now.saturating_sub(pending.since) > SNAPSHOT_TIMEOUT)?;
        self.abandon(id);
        Some(id)
    }

    fn abandon(&mut self, id: SnapshotId) {
        self.pending.remove(&id);
        self.abandoned.insert(id);
    }

    /// True while a snapshot newer than the newest complete one may still complete.
    pub(crate) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Removes and returns all incomplete snapshots.
    pub(crate) fn take_pending(&mut self) -> Vec<SnapshotId> {
        let pending: Vec<SnapshotId> = self.pending.keys().copied().collect();
        for &id in &pending {
            self.abandon(id);
        }
        pending
    }

    fn on_heartbeat(&mut self, ranks: Vec<RankStatus>, received: Duration) {
        let before = self.progress;
        for status in ranks {
            self.step = self.step.max(status.step);
            let rank = status.rank;
            self.progress += status.progress;
            if let Some(last) = self.ranks.insert(rank, RankReport { status, received }) {
                self.progress -= last.status.progress;
            }
        }
        if self.progress != before {
            if before > 0 {
                let pause = received.saturating_sub(self.progress_at);
                self.longest_pause = self.longest_pause.max(pause);
            }
            self.progress_at = received;
        }
    }

    /// Returns a rank that has sent no heartbeat for `timeout`.
    pub(crate) fn hung_rank(&self, now: Duration, timeout: Duration) -> Option<usize> {
        let is_silent = |report: &&RankReport| {
            let silence = Duration::from_millis(report.status.silent_ms);
            // Its keeper no longer reports a rank that has exited: the launcher notices that.
            now.saturating_sub(report.received) < REPORT_LIFETIME && silence > timeout
        };
        // The rank that has been silent longest hung first.
        let silent = self.ranks.values().filter(is_silent);
        let longest = silent.max_by_key(|report| report.status.silent_ms)?;
        Some(longest.status.rank)
    }

    /// Returns the time since any rank made progress, if that exceeds the limit.
    ///
    /// The default limit is ten times the longest pause so far, but at least a minute.
    pub(crate) fn stalled_for(&self, now: Duration, limit_s: Option<f64>) -> Option<Duration> {
        let limit = match limit_s {
            Some(seconds) => Duration::from_secs_f64(seconds),
            None => MIN_STEP_TIMEOUT.max(10 * self.longest_pause),
        };
        let pause = now.saturating_sub(self.progress_at);
        (self.progress > 0 && pause > limit).then_some(pause)
    }
}

/// Returns the node of each rank.
pub(crate) fn rank_nodes(topology: &Topology) -> Vec<usize> {
    let mut table = vec![0; topology.ranks()];
    for (node, Node { ranks, .. }) in topology.nodes.iter().enumerate() {
        for &rank in ranks {
            if let Some(entry) = table.get_mut(rank) {
                *entry = node;
            }
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::{Action, Tracker};
    use checkpoint::{
        Redundancy,
        keeper::{ChecksumDigest, Event, Node, PartInfo, SnapshotId, Topology},
    };
    use std::time::Duration;

    /// Returns a tracker of two nodes with one rank each.
    fn tracker() -> Tracker {
        let node = |rank: usize| Node {
            address: ([127, 0, 0, 1], 1).into(),
            ranks: vec![rank],
        };
        let redundancy = Redundancy::Parity { data: 1, parity: 1 };
        let nodes = vec![node(0), node(1)];
        let groups = vec![vec![0, 1]];
        let topology = Topology {
            generation: 1,
            nodes,
            redundancy,
            groups,
            chunk_bytes: 4096,
        };
        Tracker::new(topology, Duration::ZERO)
    }

    fn id(step: u64) -> SnapshotId {
        SnapshotId {
            generation: 1,
            step,
        }
    }

    /// Both ranks complete their parts of each step.
    fn complete(tracker: &mut Tracker, steps: &[(u64, bool)]) {
        for &(step, durable) in steps {
            for rank in 0..2 {
                let part = PartInfo {
                    rank,
                    bytes: 1,
                    digest: ChecksumDigest::of(&[0]),
                };
                let id = id(step);
                let event = Event::Complete { id, part, durable };
                assert_eq!(
                    tracker.on_event(rank, event, Duration::ZERO),
                    Action::Nothing
                );
            }
        }
    }

    /// All keepers have the parity of `step`: returns the step that is committed, and whether it is
    /// to be written.
    fn protected(tracker: &mut Tracker, step: u64) -> Option<(u64, bool)> {
        let event = || Event::Protected { id: id(step) };
        let actions = [0, 1].map(|node| tracker.on_event(node, event(), Duration::ZERO));
        actions.into_iter().find_map(|action| match action {
            Action::Commit { snapshot, durable } => Some((snapshot.id.step, durable)),
            _ => None,
        })
    }

    #[test]
    fn a_wanted_snapshot_that_is_overtaken_or_abandoned_is_replaced_by_a_newer_one() {
        let mut tracker = tracker();
        complete(&mut tracker, &[(4, false), (5, true), (6, false)]);
        let committed = protected(&mut tracker, 4);
        assert_eq!(committed, Some((4, false)), "none is wanted so far");
        let committed = protected(&mut tracker, 6);
        assert_eq!(committed, Some((6, true)), "in place of 5");
        assert_eq!(protected(&mut tracker, 5), None);
        complete(&mut tracker, &[(7, true), (8, false), (9, false)]);
        let reason = "a keeper is gone".to_string();
        let lost = Event::Unprotected { id: id(7), reason };
        let action = tracker.on_event(1, lost, Duration::ZERO);
        assert!(matches!(action, Action::Abandon { id: abandoned, .. } if abandoned == id(7)));
        assert_eq!(protected(&mut tracker, 8), Some((8, true)));
        let committed = protected(&mut tracker, 9);
        assert_eq!(committed, Some((9, false)), "8 was written");
    }

    #[test]
    fn a_rank_that_leaves_between_two_snapshots_does_not_end_the_first() {
        let mut tracker = tracker();
        complete(&mut tracker, &[(4, false)]);
        let reason = "rank 0 left its part unfinished".to_string();
        let left = Event::Unprotected { id: id(5), reason };
        let action = tracker.on_event(0, left, Duration::ZERO);
        assert_eq!(action, Action::Nothing, "it would end the encoding of 4");
        assert_eq!(protected(&mut tracker, 4), Some((4, false)));
        let action = tracker.on_event(1, Event::Protected { id: id(5) }, Duration::ZERO);
        assert!(matches!(action, Action::Abandon { id: abandoned, .. } if abandoned == id(5)));
    }

    #[test]
    fn late_reports_of_an_abandoned_snapshot_are_ignored() {
        let mut tracker = tracker();
        complete(&mut tracker, &[(4, false)]);
        let reason = "rank 0 left its part unfinished".to_string();
        let lost = Event::Unprotected { id: id(4), reason };
        let action = tracker.on_event(0, lost.clone(), Duration::ZERO);
        assert!(matches!(action, Action::Abandon { .. }), "{action:?}");
        assert_eq!(
            tracker.on_event(1, lost, Duration::ZERO),
            Action::Nothing,
            "the other keeper's encoding ended, too"
        );
        complete(&mut tracker, &[(4, false)]);
        assert!(!tracker.has_pending());
        complete(&mut tracker, &[(5, false)]);
        assert_eq!(protected(&mut tracker, 5), Some((5, false)));
    }
}
