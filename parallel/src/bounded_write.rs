//! Writing of small files by processes that end, on disks that may not answer.

use std::{
    io::{Error, ErrorKind, Result},
    path::PathBuf,
    sync::mpsc::channel,
    time::Duration,
};

/// Writes a file in a thread of its own, and waits for it for `limit` at most.
///
/// # Errors
/// If the file cannot be written, or not in time.
pub fn write_within(limit: Duration, path: PathBuf, content: Vec<u8>) -> Result<()> {
    let (done, written) = channel();
    std::thread::spawn(move || {
        // The receiver may have given up.
        let _ = done.send(std::fs::write(&path, content));
    });
    let timed_out = || Error::new(ErrorKind::TimedOut, "the disk does not answer");
    written
        .recv_timeout(limit)
        .unwrap_or_else(|_| Err(timed_out()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_does_not_open_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report");
        let second = Duration::from_secs(1);
        write_within(second, path.clone(), b"text".to_vec()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"text");
        // Opening a pipe waits for its reader.
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = write_within(second / 10, pipe, Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }
}
