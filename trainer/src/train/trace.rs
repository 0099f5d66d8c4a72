//! The trace of one step, which a thread writes.

use crate::config::RunConfig;
use checkpoint::run_folder::RunFolder;
use kernels::profile::{self, Event};
use std::{
    io,
    path::{Path, PathBuf},
    thread::JoinHandle,
};

/// The recording of a step, and the thread that writes it.
#[derive(Default)]
pub(super) struct TraceWriter {
    recording: Option<Recording>,
    thread: Option<JoinHandle<()>>,
}

/// The step that is being recorded, and the folder for its trace.
struct Recording {
    step: u64,
    folder: PathBuf,
}

impl TraceWriter {
    /// Starts to record step `step`, if that is the one to trace.
    pub(super) fn begin(&mut self, step: u64, run: &RunConfig) {
        if run.trace_step != Some(step) {
            return;
        }
        profile::start();
        self.recording = Some(Recording {
            step,
            folder: run.dir.join("logs"),
        });
    }

    /// Ends the recording and writes it in a thread, if there is one. A failure only logs a
    /// warning.
    pub(super) fn end(&mut self, rank: usize) {
        let Some(Recording { step, folder }) = self.recording.take() else {
            return;
        };
        let events = profile::stop();
        self.thread = Some(std::thread::spawn(move || {
            let name = format!("rank-{rank}.trace.json");
            let path = folder.join(&name).display().to_string();
            match write(&events, rank, &folder, &name) {
                Ok(()) => tracing::info!("wrote the trace of step {step} to {path}"),
                Err(error) => tracing::warn!("cannot write {path}: {error}"),
            }
        }));
    }

    /// Waits until the trace is written.
    pub(super) fn finish(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Panics only if writing does, which leaves no trace either.
            let _ = thread.join();
        }
    }
}

fn write(events: &[Event], rank: usize, folder: &Path, name: &str) -> io::Result<()> {
    let logs = RunFolder::create_inside(folder).map_err(io::Error::other)?;
    logs.remove(name).map_err(io::Error::other)?;
    profile::write(events, rank, &folder.join(name))
}
