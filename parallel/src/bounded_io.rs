//! Input and output that is not waited for without end: a disk may hang.

use nix::{
    fcntl::{AT_FDCWD, OFlag, openat},
    sys::stat::Mode,
};
use std::{
    fs::File,
    io::{Error, ErrorKind, Result, Write},
    path::{Path, PathBuf},
    sync::mpsc::channel,
    time::Duration,
};

/// Does `work` in a thread of its own, and waits for it for `limit` at most.
///
/// # Errors
/// If the work fails, or is not done in time.
pub fn within<T>(limit: Duration, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T>
where
    T: Send + 'static,
{
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

/// Writes a file as [`within`] does. A link in place of the file or of its folder is an error.
///
/// # Errors
/// If the file cannot be written, or not in time.
pub fn write_within(limit: Duration, path: PathBuf, content: Vec<u8>) -> Result<()> {
    within(limit, move || {
        create_without_links(&path)?.write_all(&content)
    })
}

fn create_without_links(path: &Path) -> Result<File> {
    let Some((folder, name)) = path.parent().zip(path.file_name()) else {
        return Err(ErrorKind::InvalidInput.into());
    };
    let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let as_folder = flags | OFlag::O_DIRECTORY | OFlag::O_RDONLY;
    let folder = openat(AT_FDCWD, folder, as_folder, Mode::empty())?;
    let to_write = flags | OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC;
    let mode = Mode::from_bits_truncate(0o666);
    Ok(File::from(openat(&folder, name, to_write, mode)?))
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
        let logs = folder.path().join("logs");
        std::os::unix::fs::symlink(folder.path(), &logs).unwrap();
        let through = logs.join("target");
        assert!(write_within(Duration::from_secs(1), through, Vec::new()).is_err());
        assert_eq!(std::fs::read(&target).unwrap(), b"kept");
    }
}
