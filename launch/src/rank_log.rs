//! The log of a rank or keeper. A thread writes it, so that no disk stops the process.

use crate::protocol::log_path;
use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    path::Path,
    sync::{Arc, OnceLock, atomic::AtomicBool},
    time::{Duration, Instant},
};
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;
use trainer::lines::{Limits, LineWriter, MissingLines, Notice, Options, Target};

/// Time within which an existing folder answers.
const OPEN_TIMEOUT: Duration = Duration::from_secs(2);

/// Time in which a process that ends waits for its log.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// MiB of memory for lines of a keeper's log that the disk does not take.
const KEEPER_BUFFER_MIB: u64 = 8;

static LOG: OnceLock<LineWriter> = OnceLock::new();

/// Sends the log, and output of libtorch itself, to the rank's file.
///
/// Rank 0 keeps stderr: it prints the progress.
///
/// # Errors
/// If the file cannot be opened. A rank that the launcher started tolerates what may pass, such as
/// a full disk, and writes the log later.
pub(crate) fn log_to_file(dir: &Path, rank: usize, launched: bool, limits: Limits) -> Result<()> {
    let path = log_path(dir, rank);
    let log = LineWriter::start(Options {
        target: Target::Append(path.clone()),
        limits,
        record,
        reports_gap: false,
        on_open: launched
            .then(|| -> Box<dyn Fn(&File) + Send> { Box::new(move |file| redirect(file, rank)) }),
    });
    let opened = log.wait_until_open(OPEN_TIMEOUT, launched);
    opened.with_context(|| format!("cannot write {}", path.display()))?;
    let shown_as = (rank == 0).then(|| path.display().to_string());
    install(log, LogLines { shown_as });
    Ok(())
}

/// Sends the log to the file that is this process's standard error.
///
/// # Errors
/// If standard error is closed.
pub(crate) fn log_to_stderr() -> Result<()> {
    let stderr = std::io::stderr().as_fd().try_clone_to_owned();
    let file = File::from(stderr.context("standard error is closed")?);
    let log = LineWriter::start(Options {
        target: Target::Open(file),
        limits: Limits::of_mib(KEEPER_BUFFER_MIB),
        record,
        reports_gap: false,
        on_open: None,
    });
    install(log, LogLines { shown_as: None });
    Ok(())
}

/// Waits until the log is written, for a second at most and only while its disk answers.
pub(crate) fn flush() {
    if let Some(log) = LOG.get() {
        log.flush(Instant::now() + END_TIMEOUT, true);
    }
}

fn install(log: LineWriter, lines: LogLines) {
    // A limit on file sizes then fails the write and does not end the process.
    let received = Arc::new(AtomicBool::new(false));
    let _ = signal_hook::flag::register(Signal::SIGXFSZ as i32, received);
    if LOG.set(log).is_ok() {
        tracing_subscriber::fmt()
            .with_writer(lines)
            .with_ansi(false)
            .with_target(false)
            .init();
    }
}

fn redirect(file: &File, rank: usize) {
    // Without it, libtorch prints to the terminal.
    let _ = nix::unistd::dup2_stdout(file);
    if rank != 0 {
        let _ = nix::unistd::dup2_stderr(file);
    }
}

fn record(missing: &MissingLines) -> String {
    let lines = missing.lines;
    format!("{lines} lines are missing here: the disk took none for too long")
}

/// Makes writers for the lines of events. None of them fails: what the disk does not take waits.
struct LogLines {
    /// Name of the log in warnings on the terminal, on rank 0.
    shown_as: Option<String>,
}

struct LogLine<'a> {
    shown_as: Option<&'a str>,
    is_error: bool,
}

impl<'a> MakeWriter<'a> for LogLines {
    type Writer = LogLine<'a>;

    fn make_writer(&'a self) -> LogLine<'a> {
        LogLine {
            shown_as: self.shown_as.as_deref(),
            is_error: false,
        }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> LogLine<'a> {
        LogLine {
            is_error: *metadata.level() == Level::ERROR,
            ..self.make_writer()
        }
    }
}

impl Write for LogLine<'_> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        if let Some(log) = LOG.get() {
            log.push(String::from_utf8_lossy(text).into_owned(), None, false);
            if self.is_error {
                // The process may be about to crash.
                log.position().wait();
            }
            if let Some(name) = self.shown_as {
                report(log, name);
            }
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Warns on the terminal of an outage, once.
fn report(log: &LineWriter, name: &str) {
    match log.notice() {
        Some(Notice::Outage(cause)) => {
            eprintln!("warning: cannot write {name}: {cause}; lines wait in memory");
        }
        Some(Notice::Recovered { dropped, .. }) if dropped.lines > 0 => {
            let lines = dropped.lines;
            eprintln!("warning: {lines} lines of {name} were dropped");
        }
        _ => {}
    }
}
