//! What keepers report: which snapshots become complete, and whether ranks get on.

use checkpoint::keeper::{Event, PartInfo, RankStatus, Snapshot, SnapshotId, Topology};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// A snapshot that is not complete after this time never will be.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Pending {
    parts: BTreeMap<usize, PartInfo>,
    protected: BTreeSet<usize>,
}

/// One generation's snapshots and ranks.
pub(super) struct Tracker {
    pub(super) topology: Topology,
    pending: BTreeMap<SnapshotId, (Pending, Instant)>,
    /// Snapshots that ranks want on disk: each, or else the next one that becomes complete.
    wanted: BTreeSet<SnapshotId>,
    /// The newest complete snapshot.
    pub(super) newest: Option<SnapshotId>,
    ranks: BTreeMap<usize, (RankStatus, Instant)>,
    /// When some rank last got on, and how far.
    last_progress: (Instant, u64),
    longest: Duration,
    /// Steps done.
    pub(super) step: u64,
}

/// What is to be done about an event.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Tell all keepers; and write it to disk.
    Commit(Snapshot, bool),
    Abandon(SnapshotId, String),
    Nothing,
}

impl Tracker {
    pub(super) fn new(topology: Topology) -> Tracker {
        Tracker {
            topology,
            pending: BTreeMap::new(),
            wanted: BTreeSet::new(),
            newest: None,
            ranks: BTreeMap::new(),
            last_progress: (Instant::now(), 0),
            longest: Duration::ZERO,
            step: 0,
        }
    }

    /// Takes an event of the keeper of `node` into account.
    pub(super) fn on_event(&mut self, node: usize, event: Event) -> Action {
        let id = match event {
            Event::Heartbeat { ranks } => {
                self.pulse(ranks);
                return Action::Nothing;
            }
            Event::Complete { id, .. }
            | Event::Protected { id }
            | Event::Unprotected { id, .. } => id,
        };
        // Of an earlier generation, or given up.
        if id.generation != self.topology.generation || self.newest >= Some(id) {
            return Action::Nothing;
        }
        let (pending, _) = self
            .pending
            .entry(id)
            .or_insert_with(|| (Pending::default(), Instant::now()));
        match event {
            Event::Complete { part, durable, .. } => {
                pending.parts.insert(part.rank, part);
                if durable {
                    self.wanted.insert(id);
                }
            }
            Event::Protected { .. } => {
                pending.protected.insert(node);
            }
            Event::Unprotected { reason, .. } => {
                self.pending.remove(&id);
                return Action::Abandon(id, reason);
            }
            Event::Heartbeat { .. } => unreachable!("handled above"),
        }
        let complete = pending.parts.len() == self.topology.ranks();
        if !complete || pending.protected.len() < self.topology.nodes.len() {
            return Action::Nothing;
        }
        let Some((pending, _)) = self.pending.remove(&id) else {
            return Action::Nothing;
        };
        self.newest = Some(id);
        // Also in place of older ones, which were given up or overtaken.
        let durable = self.wanted.first().is_some_and(|&wanted| wanted <= id);
        self.wanted.retain(|&wanted| wanted > id);
        let parts = pending.parts.into_values().collect();
        Action::Commit(
            Snapshot {
                id,
                topology: self.topology.clone(),
                parts,
            },
            durable,
        )
    }

    /// The node of each rank.
    pub(super) fn rank_nodes(&self) -> Vec<usize> {
        (0..self.topology.ranks())
            .map(|rank| self.topology.node_of(rank).unwrap_or(0))
            .collect()
    }

    /// A snapshot for which a rank or a keeper has taken too long.
    pub(super) fn take_expired(&mut self) -> Option<SnapshotId> {
        let late = self
            .pending
            .iter()
            .find(|(_, (_, since))| since.elapsed() > SNAPSHOT_TIMEOUT)
            .map(|(&id, _)| id)?;
        self.pending.remove(&late);
        Some(late)
    }

    /// None that was begun will be complete: their ids.
    pub(super) fn give_up(&mut self) -> Vec<SnapshotId> {
        std::mem::take(&mut self.pending).into_keys().collect()
    }

    fn pulse(&mut self, ranks: Vec<RankStatus>) {
        let now = Instant::now();
        for rank in ranks {
            self.step = self.step.max(rank.step);
            self.ranks.insert(rank.rank, (rank, now));
        }
        let progress = self.ranks.values().map(|(rank, _)| rank.progress).sum();
        if progress != self.last_progress.1 {
            if self.last_progress.1 > 0 {
                self.longest = self.longest.max(self.last_progress.0.elapsed());
            }
            self.last_progress = (now, progress);
        }
    }

    /// A rank that was heard of, and has said nothing for `silence`.
    pub(super) fn hung(&self, silence: Duration) -> Option<usize> {
        let silent = |(rank, at): &(RankStatus, Instant)| {
            // Its keeper still speaks of it: a rank that has ended is the launcher's own to notice.
            at.elapsed() < Duration::from_secs(1) && Duration::from_millis(rank.silent_ms) > silence
        };
        // The one that is silent for longest was the first.
        let silent = self.ranks.values().filter(|rank| silent(rank));
        silent
            .max_by_key(|(rank, _)| rank.silent_ms)
            .map(|(rank, _)| rank.rank)
    }

    /// For how long no rank has got on, if that is too long.
    pub(super) fn stuck(&self, limit: Option<f64>) -> Option<Duration> {
        let limit = match limit {
            Some(seconds) => Duration::from_secs_f64(seconds),
            None => Duration::from_secs(60).max(10 * self.longest),
        };
        let still = self.last_progress.0.elapsed();
        (self.last_progress.1 > 0 && still > limit).then_some(still)
    }
}

#[cfg(test)]
mod tests {
    use super::{Action, Tracker};
    use checkpoint::Redundancy;
    use checkpoint::keeper::{Event, Node, PartInfo, SnapshotId, Topology};

    /// Of two nodes with a rank each.
    fn tracker() -> Tracker {
        let node = |rank: usize| Node {
            address: ([127, 0, 0, 1], 1).into(),
            ranks: vec![rank],
        };
        let redundancy = Redundancy::Parity { data: 1, parity: 1 };
        let nodes = vec![node(0), node(1)];
        let groups = vec![vec![0, 1]];
        Tracker::new(Topology {
            generation: 1,
            nodes,
            redundancy,
            groups,
            chunk_bytes: 4096,
        })
    }

    fn id(step: u64) -> SnapshotId {
        SnapshotId {
            generation: 1,
            step,
        }
    }

    fn complete(tracker: &mut Tracker, rank: usize, step: u64, durable: bool) {
        let part = PartInfo {
            rank,
            bytes: 1,
            crcs: vec![0],
        };
        assert_eq!(
            tracker.on_event(
                rank,
                Event::Complete {
                    id: id(step),
                    part,
                    durable
                }
            ),
            Action::Nothing
        );
    }

    /// Which step is committed when all keepers have made the parity of `step`, and whether it is to be written.
    fn protected(tracker: &mut Tracker, step: u64) -> Option<(u64, bool)> {
        let heard = [0, 1].map(|node| tracker.on_event(node, Event::Protected { id: id(step) }));
        heard.into_iter().find_map(|todo| match todo {
            Action::Commit(snapshot, durable) => Some((snapshot.id.step, durable)),
            _ => None,
        })
    }

    #[test]
    fn what_is_to_be_written_is_not_forgotten_when_it_is_overtaken_or_given_up() {
        let mut tracker = tracker();
        for (step, durable) in [(4, false), (5, true), (6, false)] {
            (0..2).for_each(|rank| complete(&mut tracker, rank, step, durable));
        }
        assert_eq!(
            protected(&mut tracker, 4),
            Some((4, false)),
            "nothing was to be written so far"
        );
        assert_eq!(
            protected(&mut tracker, 6),
            Some((6, true)),
            "it is written in place of 5"
        );
        assert_eq!(protected(&mut tracker, 5), None);
        for (step, durable) in [(7, true), (8, false), (9, false)] {
            (0..2).for_each(|rank| complete(&mut tracker, rank, step, durable));
        }
        let lost = Event::Unprotected {
            id: id(7),
            reason: "a keeper is gone".into(),
        };
        assert!(
            matches!(tracker.on_event(1, lost), Action::Abandon(given_up, _) if given_up == id(7))
        );
        assert_eq!(protected(&mut tracker, 8), Some((8, true)));
        assert_eq!(
            protected(&mut tracker, 9),
            Some((9, false)),
            "once is enough"
        );
    }
}
