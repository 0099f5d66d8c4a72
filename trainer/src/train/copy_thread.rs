//! The thread that copies snapshots into the keeper's memory while training continues.

use super::{
    progress_counter::ProgressCounter,
    run_state::RunState,
    slot_writer::{FlatTensor, ImageContent, SlotWriter},
};
use crate::{Error, lines::WrittenLines};
use checkpoint::{
    ImageLayout,
    keeper::{SlotMemory, SnapshotId},
};
use parking_lot::{Condvar, Mutex};
use std::{
    collections::VecDeque,
    sync::{Arc, mpsc::Sender},
    time::{Duration, Instant},
};
use tch::{Kind, Tensor};

pub(crate) const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(100);

/// Interval at which the thread looks for work. A rank that waits for it wakes it at once.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Commands for the thread.
///
/// [`Mailbox::put`] never notifies: on a machine whose processors all compute, the woken thread
/// would take the processor of the training thread, and training would stop.
#[derive(Default)]
pub(crate) struct Mailbox {
    commands: Mutex<VecDeque<CopyCommand>>,
    wake: Condvar,
}

impl Mailbox {
    /// Adds a command. Returns true if the thread still exists to take it.
    pub(crate) fn put(mailbox: &Arc<Mailbox>, command: CopyCommand) -> bool {
        mailbox.commands.lock().push_back(command);
        Mailbox::is_shared(mailbox)
    }

    /// True while both the rank and the thread hold the mailbox.
    pub(crate) fn is_shared(mailbox: &Arc<Mailbox>) -> bool {
        Arc::strong_count(mailbox) > 1
    }

    /// Wakes the thread, for a rank that waits for it.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    fn take(&self) -> Option<CopyCommand> {
        let mut commands = self.commands.lock();
        self.wake
            .wait_while_for(&mut commands, |queue| queue.is_empty(), POLL_INTERVAL);
        commands.pop_front()
    }
}

pub(crate) enum CopyCommand {
    Copy(Box<CopyRequest>),
    /// Copies other tensors from now on.
    Plan(Arc<Mutex<CopyPlan>>),
    /// Answers whether the keeper has this rank's part of a snapshot, after all copies so far.
    IsComplete(SnapshotId, Sender<bool>),
}

/// A snapshot to copy.
pub(crate) struct CopyRequest {
    pub(crate) slot: usize,
    pub(crate) memory: SlotMemory,
    pub(crate) state: RunState,
    /// State of the random generator, which is a new tensor in each snapshot.
    pub(crate) generator: Tensor,
    /// Lines that must be in their files before the snapshot exists.
    pub(crate) lines: Vec<WrittenLines>,
}

/// Tensors that this rank saves, with their offsets, in the order of the image.
pub(crate) struct CopyPlan {
    pub(crate) image: ImageLayout,
    pub(crate) tensors: Vec<(u64, Tensor)>,
}

/// State of the thread.
pub(crate) struct CopyThread {
    pub(crate) writer: SlotWriter,
    pub(crate) progress: ProgressCounter,
    pub(crate) plan: Arc<Mutex<CopyPlan>>,
}

impl CopyThread {
    /// Processes commands until the rank drops the mailbox or the keeper is gone. The training
    /// thread notices the latter at its next snapshot.
    ///
    /// Sends the seconds of each copy to `done`.
    pub(crate) fn run(mut self, mailbox: Arc<Mailbox>, done: &Sender<Result<f64, Error>>) {
        let mut last_heartbeat = Instant::now();
        while Mailbox::is_shared(&mailbox) {
            let command = mailbox.take();
            let was_busy = command.is_some();
            match command {
                Some(CopyCommand::Plan(plan)) => self.plan = plan,
                Some(CopyCommand::IsComplete(id, answer)) => {
                    let Ok(is_complete) = self.writer.is_complete(id) else {
                        return;
                    };
                    // The receiver may have given up.
                    let _ = answer.send(is_complete);
                }
                Some(CopyCommand::Copy(request)) => {
                    let copied = self.copy(&request);
                    let has_failed = copied.is_err();
                    if done.send(copied).is_err() || has_failed {
                        return;
                    }
                }
                None => {}
            }
            if was_busy || last_heartbeat.elapsed() > HEARTBEAT_INTERVAL {
                last_heartbeat = Instant::now();
                let step = self.progress.step();
                let ticks = self.progress.ticks();
                if self.writer.heartbeat(step, ticks).is_err() {
                    return;
                }
            }
        }
    }

    /// Copies a snapshot and returns the seconds that it took.
    fn copy(&mut self, request: &CopyRequest) -> Result<f64, Error> {
        let begun = Instant::now();
        for lines in &request.lines {
            lines.wait();
        }
        let plan = self.plan.clone();
        let plan = plan.lock();
        let state = serde_json::to_value(&request.state).expect("plain data");
        let header = plan.image.encode_header(&state)?;
        // The generator's state is the only tensor of bytes.
        let values = plan
            .tensors
            .iter()
            .map(|(offset, tensor)| match tensor.kind() {
                Kind::Uint8 => FlatTensor::new(*offset, &request.generator),
                _ => FlatTensor::new(*offset, tensor),
            });
        let tensors: Vec<FlatTensor> = values.collect();
        let content = ImageContent {
            header: &header,
            tensors: &tensors,
            bytes: plan.image.bytes(),
        };
        self.writer.fill(request.slot, &request.memory, &content)?;
        Ok(begun.elapsed().as_secs_f64())
    }
}
