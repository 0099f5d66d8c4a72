//! Which checkpoint is being written from memory, which is due next, and which are on disk.

use super::event::SavedCheckpoint;
use checkpoint::keeper::SnapshotId;

#[derive(Debug, Default)]
pub(crate) struct Checkpoints {
    /// The snapshot that is being written.
    pub(crate) writing: Option<SnapshotId>,
    /// A checkpoint is due of this snapshot or a newer one.
    due: Option<SnapshotId>,
    /// The newest that the last survey found and verified, or that was written since.
    pub(crate) newest: Option<SavedCheckpoint>,
    /// The newest that was written since the last survey began, which may have missed it.
    written_since: Option<SavedCheckpoint>,
    /// The reason why the last attempt to write one failed.
    pub(crate) last_error: Option<String>,
}

impl Checkpoints {
    /// Requests a checkpoint of a complete snapshot, or of a newer one if the disk is busy.
    pub(crate) fn request(&mut self, id: SnapshotId) {
        self.due = self.due.max(Some(id));
    }

    /// True if no checkpoint is being written or due.
    pub(crate) fn is_idle(&self) -> bool {
        self.writing.is_none() && self.due.is_none()
    }

    /// True if `newest`, the newest complete snapshot, is to be written now.
    pub(crate) fn is_due(&self, newest: SnapshotId) -> bool {
        self.writing.is_none() && self.due.is_some_and(|due| due <= newest)
    }

    /// Begins to write `newest`. Returns false if it is not due.
    pub(crate) fn begin(&mut self, newest: SnapshotId) -> bool {
        if !self.is_due(newest) {
            return false;
        }
        self.due = None;
        self.writing = Some(newest);
        true
    }

    /// Drops what is due: its snapshot will not complete.
    pub(crate) fn forget_due(&mut self) {
        self.due = None;
    }

    pub(crate) fn on_written(&mut self, saved: SavedCheckpoint) {
        self.writing = None;
        self.last_error = None;
        self.written_since = newer(self.written_since.take(), Some(saved.clone()));
        self.newest = newer(self.newest.take(), Some(saved));
    }

    pub(crate) fn on_survey_begun(&mut self) {
        self.written_since = None;
    }

    /// Takes the newest checkpoint that can be read, which may be older than one that could be.
    pub(crate) fn on_surveyed(&mut self, found: Option<SavedCheckpoint>) {
        self.newest = newer(found, self.written_since.clone());
    }

    pub(crate) fn on_failed(&mut self, reason: String) {
        self.writing = None;
        self.last_error = Some(reason);
    }

    pub(crate) fn newest_step(&self) -> Option<u64> {
        let newest = self.newest.as_ref()?;
        Some(newest.step)
    }
}

/// Returns the one with more steps; the second of two equal ones.
fn newer(
    first: Option<SavedCheckpoint>,
    second: Option<SavedCheckpoint>,
) -> Option<SavedCheckpoint> {
    let step = |saved: &Option<SavedCheckpoint>| saved.as_ref().map(|saved| saved.step);
    if step(&second) >= step(&first) {
        second
    } else {
        first
    }
}
