//! A rank's process, which is a child of this one, whether it was spawned or forked by the server.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::process::{WaitOptions, waitpid};
use std::{
    io::{self, PipeWriter, Write},
    os::unix::process::ExitStatusExt,
    process::ExitStatus,
};

pub(super) struct RankChild {
    pid: i32,
    /// Takes the assignment; None once the process has it.
    stdin: Option<PipeWriter>,
    /// None until the process was waited for: afterwards its id may belong to another one.
    status: Option<ExitStatus>,
}

impl RankChild {
    pub(super) fn new(pid: i32, stdin: PipeWriter) -> RankChild {
        RankChild {
            pid,
            stdin: Some(stdin),
            status: None,
        }
    }

    pub(super) fn id(&self) -> u32 {
        self.pid as u32
    }

    /// Sends the line with the assignment.
    ///
    /// # Errors
    /// If the process has exited.
    pub(super) fn assign(&mut self, line: &str) -> io::Result<()> {
        match self.stdin.take() {
            Some(mut stdin) => writeln!(stdin, "{line}"),
            None => Ok(()),
        }
    }

    /// Returns the status if the process has ended.
    ///
    /// # Errors
    /// If it is no child of this process.
    pub(super) fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            let pid = rustix::process::Pid::from_raw(self.pid);
            let ended = waitpid(pid, WaitOptions::NOHANG)?;
            self.status = ended.map(|(_, status)| ExitStatus::from_raw(status.as_raw()));
        }
        Ok(self.status)
    }

    /// Sends a signal, unless the process was waited for.
    pub(super) fn signal(&self, signal: Signal) {
        if self.status.is_none() {
            // Fails for a process of another user, which a rank is not.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}
