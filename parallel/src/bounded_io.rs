//! Input and output that is not waited for without end: a disk may hang.

use std::{
    fs::OpenOptions,
    io::{Error, ErrorKind, Result, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::mpsc::channel,
    time::Duration,
};

/// Does `work` in a thread of its own, and waits for it for `limit` at most.
///
/// # Errors
/// If the work fails, or is not done in time.
pub fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (done, result) = channel();
    std::thread::Builder::new().spawn(move || {
        // The receiver may have given up.
        let _ = done.send(work());
    })?;
    let timed_out = || Error::new(ErrorKind::TimedOut, "the disk does not answer");
    result
        .recv_timeout(limit)
        .unwrap_or_else(|_| Err(timed_out()))
}

/// Writes a file as [`within`] does. A link of this name is an error.
///
/// # Errors
/// If the file cannot be written, or not in time.
pub fn write_within(limit: Duration, path: PathBuf, content: Vec<u8>) -> Result<()> {
    within(limit, move || {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        options.custom_flags(nix::libc::O_NOFOLLOW);
        options.open(&path)?.write_all(&content)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_does_not_open_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report");
        let second = Duration::from_secs(1);
        write_within(second, path.clone(), b"longer text".to_vec()).unwrap();
        write_within(second, path.clone(), b"text".to_vec()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"text");
        // Opening a pipe waits for its reader.
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = write_within(second / 10, pipe, Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn nothing_is_written_through_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        std::fs::write(&target, "kept").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(write_within(Duration::from_secs(1), link, Vec::new()).is_err());
        assert_eq!(std::fs::read(&target).unwrap(), b"kept");
    }
}
