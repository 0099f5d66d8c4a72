//! Removal of old checkpoints in a thread, while the run trains and saves.

use super::saved_config::{has_kind, kind};
use parking_lot::Mutex;
use std::{
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, Sender, channel},
    thread::JoinHandle,
};

/// Removes checkpoints under `root` as [`checkpoint::retain`] does after the one of step `step` was
/// written, and logs those that stay because newer ones have fewer parameters.
///
/// # Errors
/// If the folder cannot be read, or a checkpoint cannot be removed.
pub fn retain_checkpoints(root: &Path, keep: usize, step: u64) -> Result<(), checkpoint::Error> {
    let is_parameter = |name: &str| has_kind(name, &[kind::MASTER]);
    for spared in checkpoint::retain(root, keep, step, is_parameter)? {
        tracing::warn!(
            "{} stays although checkpoint.keep is {keep}: newer checkpoints have fewer parameters",
            spared.display()
        );
    }
    Ok(())
}

/// The thread that removes old checkpoints of a run. It starts when it is first needed, and ends
/// with this value.
#[derive(Default)]
pub(super) struct Retention(Mutex<Option<Worker>>);

struct Worker {
    /// Steps whose checkpoints were written.
    steps: Sender<u64>,
    /// Returns the number of failures.
    thread: JoinHandle<u64>,
}

impl Retention {
    /// Orders the removal of checkpoints under `root` but for the newest `keep` up to step `step`,
    /// of which one was just written. A failure is logged and counted.
    pub(super) fn order(&self, root: PathBuf, keep: usize, step: u64) {
        let mut worker = self.0.lock();
        let worker = worker.get_or_insert_with(|| {
            let (steps, orders) = channel();
            let thread = std::thread::spawn(move || remove_all(&root, keep, &orders));
            Worker { steps, thread }
        });
        if worker.steps.send(step).is_err() {
            tracing::warn!("old checkpoints stay: the thread that removes them has exited");
        }
    }

    /// Waits until all orders are carried out. Returns the number of those that failed.
    pub(super) fn finish(&self) -> u64 {
        let Some(Worker { steps, thread }) = self.0.lock().take() else {
            return 0;
        };
        drop(steps);
        // A panic was logged as it happened.
        thread.join().unwrap_or(1)
    }
}

impl Drop for Retention {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Carries out orders until there are no more. Returns the number of failures.
fn remove_all(root: &Path, keep: usize, orders: &Receiver<u64>) -> u64 {
    let mut failures = 0;
    while let Ok(step) = orders.recv() {
        // A later order contains the earlier ones.
        let step = orders.try_iter().fold(step, u64::max);
        if let Err(error) = retain_checkpoints(root, keep, step) {
            tracing::warn!("cannot remove old checkpoints: {error}");
            failures += 1;
        }
    }
    failures
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::{Staging, TensorSlice, list};
    use serde_json::Value;
    use tch::Tensor;

    fn save(root: &Path, step: u64) {
        let staging = Staging::new(root, step);
        staging.begin().unwrap();
        let values = Tensor::from_slice(&[step as f32]);
        let tensors = vec![(TensorSlice::whole("model/w", &[1]), values)];
        let shard = staging.write_shard(0, tensors).unwrap();
        staging.commit(vec![shard], 1, Value::Null).unwrap();
    }

    fn names(root: &Path) -> Vec<String> {
        let paths = list(root).unwrap();
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_string();
        paths.iter().map(name).collect()
    }

    #[test]
    fn old_checkpoints_are_gone_when_it_has_finished() {
        let root = tempfile::tempdir().unwrap();
        let retention = Retention::default();
        for step in 1..=9 {
            save(root.path(), step);
            retention.order(root.path().to_path_buf(), 2, step);
        }
        assert_eq!(retention.finish(), 0);
        assert_eq!(names(root.path()), ["step-00000009", "step-00000008"]);
        // It can be used again, and the end of the value is the end of the thread.
        save(root.path(), 10);
        retention.order(root.path().to_path_buf(), 1, 10);
        drop(retention);
        assert_eq!(names(root.path()), ["step-00000010"]);
    }

    #[test]
    fn failures_are_counted() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("checkpoints");
        std::fs::write(&file, "no folder").unwrap();
        let retention = Retention::default();
        retention.order(file, 1, 10);
        assert_eq!(retention.finish(), 1);
        assert_eq!(retention.finish(), 0);
    }
}
