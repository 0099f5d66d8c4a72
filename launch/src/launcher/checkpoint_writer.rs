//! Writes checkpoints from the keepers' memory, one at a time, while training continues.

use super::keepers::Keepers;
use anyhow::{Result, anyhow};
use checkpoint::{
    Shard, Staging,
    folder::{self, Depth},
    keeper::{Peer, SnapshotId},
};
use crossbeam_channel::{Receiver, bounded};
use std::path::{Path, PathBuf};

/// The checkpoint being written, and the one due next.
pub(super) struct CheckpointWriter {
    root: PathBuf,
    /// Number of checkpoints to keep.
    keep: usize,
    writing: Option<Writing>,
    /// A checkpoint is due of this snapshot or a newer one.
    due: Option<SnapshotId>,
    /// The reason why the last attempt to write a checkpoint failed.
    pub(super) last_error: Option<anyhow::Error>,
}

struct Writing {
    id: SnapshotId,
    result: Receiver<Result<PathBuf>>,
}

/// A checkpoint that was written or failed.
pub(super) struct Finished {
    pub(super) step: u64,
    pub(super) result: Result<PathBuf>,
}

/// The ranks whose parts one keeper writes.
struct KeeperShare {
    peer: Result<Peer>,
    ranks: Vec<usize>,
}

impl CheckpointWriter {
    pub(super) fn new(root: &Path, keep: usize) -> CheckpointWriter {
        CheckpointWriter {
            root: root.to_path_buf(),
            keep,
            writing: None,
            due: None,
            last_error: None,
        }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn newest_on_disk(&self) -> Option<PathBuf> {
        let newest = folder::newest(&self.root, Depth::Data).ok()?;
        let newest = newest.verified.into_iter().next();
        newest.map(|verified| verified.path)
    }

    pub(super) fn newest_step_on_disk(&self) -> Option<u64> {
        let newest = folder::newest(&self.root, Depth::Data).ok()?;
        newest.verified.first().map(|verified| verified.step)
    }

    /// Requests a checkpoint of a complete snapshot, or of a newer one if the disk is busy.
    pub(super) fn request(&mut self, id: SnapshotId) {
        self.due = self.due.max(Some(id));
    }

    /// True if no checkpoint is being written or due.
    pub(super) fn is_idle(&self) -> bool {
        self.writing.is_none() && self.due.is_none()
    }

    pub(super) fn take_finished(&mut self, keepers: &mut Keepers) -> Option<Finished> {
        let writing = self.writing.as_ref()?;
        let step = writing.id.step;
        let result = writing.result.try_recv().ok()?;
        self.writing = None;
        keepers.ask_all(|peer| peer.unpin());
        Some(Finished { step, result })
    }

    /// Starts to write `newest`, the newest complete snapshot, if one is due and the disk is free.
    ///
    /// `holders` has for each rank the node whose keeper holds its part.
    pub(super) fn begin(&mut self, keepers: &mut Keepers, newest: SnapshotId, holders: &[usize]) {
        if self.writing.is_some() || self.due.is_none_or(|due| due > newest) {
            return;
        }
        self.due = None;
        // Before a newer snapshot is complete: until then this one cannot be overwritten.
        keepers.ask_all(|peer| peer.pin(newest));
        let mut shares = Vec::new();
        for node in 0..keepers.members.len() {
            let ranks = 0..holders.len();
            let ranks: Vec<usize> = ranks.filter(|&rank| holders[rank] == node).collect();
            if !ranks.is_empty() {
                let peer = keepers.long_connection(node);
                shares.push(KeeperShare { peer, ranks });
            }
        }
        let (sender, result) = bounded(1);
        let root = self.root.clone();
        let keep = self.keep;
        std::thread::spawn(move || {
            let written = write(&root, newest, shares).and_then(|path| {
                trainer::retain_checkpoints(&root, keep, newest.step)?;
                Ok(path)
            });
            let _ = sender.send(written);
        });
        self.writing = Some(Writing { id: newest, result });
    }
}

fn write(root: &Path, id: SnapshotId, shares: Vec<KeeperShare>) -> Result<PathBuf> {
    let staging = Staging::new(root, id.step);
    let result = write_staged(&staging, id, shares);
    if result.is_err() {
        staging.discard();
    }
    result
}

fn write_staged(staging: &Staging, id: SnapshotId, shares: Vec<KeeperShare>) -> Result<PathBuf> {
    staging.begin()?;
    let folder = std::path::absolute(staging.folder())?;
    let folder = &folder;
    let parts = std::thread::scope(|scope| {
        let start = |share| scope.spawn(move || persist(share, id, folder));
        let threads: Vec<_> = shares.into_iter().map(start).collect();
        let parts = threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"));
        parts.collect::<Result<Vec<_>>>()
    })?;
    let mut shards: Vec<(usize, Shard)> = parts.into_iter().flatten().collect();
    shards.sort_by_key(|(rank, _)| *rank);
    let shards = shards.into_iter().map(|(_, shard)| shard);
    Ok(staging.commit_images(shards.collect())?)
}

/// Has a keeper write its ranks' parts; returns each rank's shard.
fn persist(share: KeeperShare, id: SnapshotId, folder: &Path) -> Result<Vec<(usize, Shard)>> {
    let mut peer = share.peer?;
    let shards = peer
        .persist(id, &share.ranks, folder)
        .map_err(|error| anyhow!("{error}"))?;
    Ok(share.ranks.into_iter().zip(shards).collect())
}
