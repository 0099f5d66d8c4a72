//! Copies of a process that has loaded libtorch, so that others need not load it again.

use crate::{Error, ffi};
use rustix::process::{Pid, WaitOptions, getppid, waitpid};
use std::{
    io::{PipeWriter, Read, Write, pipe},
    time::Duration,
};

/// The time after which a copy looks again whether its parent is gone.
const ADOPTION_POLL: Duration = Duration::from_micros(100);

/// The process in which [`fork_orphan`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forked {
    /// The process that asked for the copy, which has this process id.
    Original(i32),
    /// The copy.
    Copy,
}

/// Forks this process twice and returns in this process and in the second copy.
///
/// The first copy has exited when this returns, so the second one is a child of the nearest
/// ancestor with `PR_SET_CHILD_SUBREAPER`, or of init. The end of this process is then none of its
/// concern.
///
/// # Errors
/// If this process has more than one thread, whose locks the copy could never take, or the kernel
/// refuses.
pub fn fork_orphan() -> Result<Forked, Error> {
    refuse_threads()?;
    let (mut reader, writer) = pipe().map_err(|error| failed(&error))?;
    // SAFETY: this is the only thread, so the copy may do anything that this process may do.
    let between = match unsafe { ffi::fork() } {
        0 => {
            drop(reader);
            return Ok(fork_again(writer));
        }
        between => Pid::from_raw(between).filter(|_| between > 0),
    };
    let Some(between) = between else {
        return Err(failed(&std::io::Error::last_os_error()));
    };
    drop(writer);
    let mut reply = [0; 4];
    let read = reader.read_exact(&mut reply);
    // Until then, the new process has the wrong parent.
    while let Err(rustix::io::Errno::INTR) = waitpid(Some(between), WaitOptions::empty()) {}
    read.map_err(|error| failed(&error))?;
    match i32::from_ne_bytes(reply) {
        pid if pid > 0 => Ok(Forked::Original(pid)),
        code => Err(failed(&std::io::Error::from_raw_os_error(-code))),
    }
}

/// Returns in the second copy. The first one sends its process id, or a negative error, and exits.
fn fork_again(mut writer: PipeWriter) -> Forked {
    let between = Pid::from_raw(std::process::id() as i32);
    // SAFETY: as above.
    let pid = match unsafe { ffi::fork() } {
        0 => {
            drop(writer);
            while getppid() == between {
                std::thread::sleep(ADOPTION_POLL);
            }
            return Forked::Copy;
        }
        pid if pid > 0 => pid,
        _ => -std::io::Error::last_os_error().raw_os_error().unwrap_or(1),
    };
    let _ = writer.write_all(&pid.to_ne_bytes());
    // SAFETY: `_exit` does not return. Nothing of this copy needs a destructor.
    unsafe { ffi::_exit(0) }
}

fn failed(error: &std::io::Error) -> Error {
    Error::new(format!("cannot fork: {error}"))
}

fn refuse_threads() -> Result<(), Error> {
    let threads = std::fs::read_dir("/proc/self/task")
        .map_err(|error| Error::new(format!("cannot count threads in /proc/self/task: {error}")))?
        .count();
    if threads == 1 {
        return Ok(());
    }
    Err(Error::new(format!(
        "cannot fork a process of {threads} threads"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_not_copied() {
        // The test's own thread is the second.
        let error = fork_orphan().unwrap_err().to_string();
        assert!(error.starts_with("cannot fork a process of "), "{error}");
    }
}
