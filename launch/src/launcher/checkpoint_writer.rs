//! Checkpoints out of keepers' memory: one at a time, while training goes on.

use super::keepers::Keepers;
use anyhow::{Result, anyhow};
use checkpoint::keeper::{Peer, SnapshotId};
use checkpoint::{Shard, Staging};
use crossbeam_channel::{Receiver, bounded};
use std::path::{Path, PathBuf};

/// The one that is being written, and the one that comes next.
pub(super) struct CheckpointWriter {
    root: PathBuf,
    keep: usize,
    writing: Option<(SnapshotId, Receiver<Result<PathBuf>>)>,
    /// A checkpoint is due from this snapshot on.
    due: Option<SnapshotId>,
}

impl CheckpointWriter {
    pub(super) fn new(root: &Path, keep: usize) -> CheckpointWriter {
        CheckpointWriter {
            root: root.to_path_buf(),
            keep,
            writing: None,
            due: None,
        }
    }

    /// A complete snapshot is to be written, or a newer one if the disk is busy for so long.
    pub(super) fn request(&mut self, id: SnapshotId) {
        self.due = self.due.max(Some(id));
    }

    /// Nothing is being written or waits to be.
    pub(super) fn is_idle(&self) -> bool {
        self.writing.is_none() && self.due.is_none()
    }

    /// What was written has come to an end: which step, and the folder or why not.
    pub(super) fn take_finished(
        &mut self,
        keepers: &mut Keepers,
    ) -> Option<(u64, Result<PathBuf>)> {
        let (id, result) = self.writing.as_ref()?;
        let step = id.step;
        let result = result.try_recv().ok()?;
        self.writing = None;
        keepers.ask_all(|peer| peer.unpin());
        Some((step, result))
    }

    /// Begins to write `newest`, the newest complete snapshot, if one is due and the disk is free. `holders` are the places
    /// of the keepers that have the ranks' parts.
    pub(super) fn begin(&mut self, keepers: &mut Keepers, newest: SnapshotId, holders: &[usize]) {
        if self.writing.is_some() || self.due.is_none_or(|due| due > newest) {
            return;
        }
        self.due = None;
        // Before a newer one is complete: until then nobody writes over it.
        keepers.ask_all(|peer| peer.pin(newest));
        let mut tasks: Vec<(Result<Peer>, Vec<usize>)> = Vec::new();
        for place in 0..keepers.members.len() {
            let ranks: Vec<usize> = (0..holders.len())
                .filter(|&rank| holders[rank] == place)
                .collect();
            if !ranks.is_empty() {
                tasks.push((keepers.long_connection(place), ranks));
            }
        }
        let (sender, result) = bounded(1);
        let root = self.root.clone();
        let keep = self.keep;
        std::thread::spawn(move || {
            let written = write(&root, newest, tasks);
            let written =
                written.and_then(|path| Ok(checkpoint::retain(&root, keep).map(|()| path)?));
            let _ = sender.send(written);
        });
        self.writing = Some((newest, result));
    }
}

fn write(root: &Path, id: SnapshotId, tasks: Vec<(Result<Peer>, Vec<usize>)>) -> Result<PathBuf> {
    let staging = Staging::new(root, id.step);
    let written = || -> Result<PathBuf> {
        staging.begin()?;
        let folder = std::path::absolute(staging.folder())?;
        let mut shards: Vec<(usize, Shard)> = std::thread::scope(|scope| {
            let folder = &folder;
            let start = |(peer, ranks): (Result<Peer>, Vec<usize>)| {
                scope.spawn(move || {
                    let shards = peer?
                        .persist(id, &ranks, folder)
                        .map_err(|e| anyhow!("{e}"))?;
                    Ok::<_, anyhow::Error>(ranks.into_iter().zip(shards).collect::<Vec<_>>())
                })
            };
            let handles: Vec<_> = tasks.into_iter().map(start).collect();
            let parts = handles
                .into_iter()
                .map(|handle| handle.join().expect("no panic"));
            Ok::<_, anyhow::Error>(
                parts
                    .collect::<Result<Vec<_>>>()?
                    .into_iter()
                    .flatten()
                    .collect(),
            )
        })?;
        shards.sort_by_key(|(rank, _)| *rank);
        Ok(staging.commit_images(shards.into_iter().map(|(_, shard)| shard).collect())?)
    };
    let result = written();
    if result.is_err() {
        staging.discard();
    }
    result
}
