//! The lock of a run's folder: one launcher, or one rank 0 of another launcher, at a time.
//!
//! The kernel's lock (flock) decides between processes of one machine, and on most file systems
//! between machines. Some file systems have no flock, or one that other machines do not see. So
//! the holder's file also is a lease: the holder renews its modification time, and another machine
//! takes the folder once [`EXPIRY`] has passed without a renewal. Renewing needs no disk space.

mod holder;

use crate::{hint::hinted, terminal};
use anyhow::{Context, Result, anyhow, bail};
use holder::{EXPIRY, Holder, Record, Standing};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
};
use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    time::{Duration, Instant, SystemTime},
};

const RENEW_INTERVAL: Duration = Duration::from_secs(5);
const WATCH_INTERVAL: Duration = Duration::from_millis(200);
/// Most bytes of a lock file that are read.
const MAX_LEN: u64 = 4096;

/// A run's lock, until it is dropped.
pub(crate) struct RunLock {
    lease: Lease,
    /// None on a file system without flock.
    flock: Option<Flock<File>>,
    /// Its end stops the renewals.
    _renewals: Sender<()>,
}

/// The lock file of this process, and the text that it wrote there.
#[derive(Clone)]
struct Lease {
    path: PathBuf,
    text: String,
}

/// Locks a run's folder, which it creates if it is missing.
///
/// # Errors
/// If another process uses the folder, or the lock file cannot be written.
pub(crate) fn acquire(run: &Path) -> Result<RunLock> {
    std::fs::create_dir_all(run)
        .with_context(|| format!("cannot create the run's folder {}", run.display()))?;
    let path = run.join("lock");
    let file = open(&path, OpenOptions::new().create(true))?;
    let own = Holder::this_process()?;
    let text = serde_json::to_string(&own).expect("plain data");
    let renewed = file.try_clone().context("cannot share the lock file")?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut flock) => {
            refuse_holder(run, &path, &own, true)?;
            refuse_holder(run, &lease_path(run), &own, false)?;
            // A full disk has no room for the text, which only names the holder.
            let _ = flock
                .set_len(0)
                .and_then(|()| flock.write_all(text.as_bytes()));
            let lease = Lease { path, text };
            Ok(RunLock {
                _renewals: renew(renewed, lease.clone()),
                lease,
                flock: Some(flock),
            })
        }
        Err((_, Errno::EWOULDBLOCK)) => Err(in_use(run, read(&path)?.as_ref())),
        Err((_, errno @ (Errno::ENOSYS | Errno::ENOLCK | Errno::EOPNOTSUPP))) => {
            eprintln!(
                "warning: the file system of {} has no flock ({errno}): moerun keeps other \
                 processes out by the lease {}, which is less certain",
                run.display(),
                lease_path(run).display()
            );
            refuse_holder(run, &path, &own, false)?;
            let lease = take_lease(run, &own, text)?;
            let file = open(&lease.path, &mut OpenOptions::new())?;
            Ok(RunLock {
                _renewals: renew(file, lease.clone()),
                lease,
                flock: None,
            })
        }
        Err((_, errno)) => Err(errno).with_context(|| format!("cannot lock {}", path.display())),
    }
}

fn lease_path(run: &Path) -> PathBuf {
    run.join("lock.lease")
}

/// Opens a lock file, which is not a link and no pipe.
fn open(path: &Path, options: &mut OpenOptions) -> Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let options = options.read(true).write(true).custom_flags(flags.bits());
    let file = options
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    if !file.metadata().is_ok_and(|data| data.is_file()) {
        bail!("{} is no regular file", path.display());
    }
    Ok(file)
}

/// Reads a lock file; None if there is none, or its holder has released it.
fn read(path: &Path) -> Result<Option<Record>> {
    match read_text(path)? {
        None => Ok(None),
        Some(Content { text, .. }) if text.is_empty() && !is_lease(path) => Ok(None),
        Some(Content { text, modified }) => Ok(Some(Record {
            holder: serde_json::from_str(&text).ok(),
            age: modified.elapsed().unwrap_or_default(),
        })),
    }
}

fn is_lease(path: &Path) -> bool {
    path.extension().is_some()
}

/// Text and last renewal of a lock file.
#[derive(PartialEq, Eq)]
struct Content {
    text: String,
    modified: SystemTime,
}

fn read_text(path: &Path) -> Result<Option<Content>> {
    match try_read_text(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Opens the file anew, for which network file systems ask the server.
fn try_read_text(path: &Path) -> std::io::Result<Content> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(flags.bits()).open(path)?;
    let modified = file.metadata()?.modified()?;
    let mut bytes = Vec::new();
    file.take(MAX_LEN).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(Content { text, modified })
}

fn in_use(run: &Path, record: Option<&Record>) -> anyhow::Error {
    let holder = record.and_then(|record| record.holder.as_ref());
    let by = holder.map_or(String::new(), |holder| format!(": {holder}"));
    hinted(
        anyhow!("another moerun is using {}{by}", run.display()),
        "wait until it exits, or choose another run.dir",
    )
}

/// Refuses the folder if the holder in the file at `path` still uses it. Waits for its renewals if
/// nothing else tells.
fn refuse_holder(run: &Path, path: &Path, own: &Holder, has_flock: bool) -> Result<()> {
    let Some(record) = read(path)? else {
        return Ok(());
    };
    match record.standing(own, has_flock) {
        Standing::Free => Ok(()),
        Standing::Held => Err(in_use(run, Some(&record))),
        Standing::Unknown => {
            let holder = record.holder.as_ref();
            let holder = holder.map_or("another machine".into(), Holder::to_string);
            eprintln!(
                "waiting for up to {} s whether {} is still in use by {holder}",
                EXPIRY.as_secs(),
                run.display()
            );
            if is_renewed(path)? {
                return Err(in_use(run, Some(&record)));
            }
            Ok(())
        }
    }
}

/// Watches a lock file until it changes, for [`EXPIRY`] at most. Returns false if it did not, or
/// was released.
fn is_renewed(path: &Path) -> Result<bool> {
    let before = read_text(path)?;
    let began = Instant::now();
    while began.elapsed() < EXPIRY {
        std::thread::sleep(WATCH_INTERVAL);
        match read_text(path)? {
            None => return Ok(false),
            Some(now) if Some(&now) != before.as_ref() => return Ok(!now.text.is_empty()),
            Some(_) => {}
        }
    }
    Ok(false)
}

/// Takes the lease of a folder on a file system without flock.
fn take_lease(run: &Path, own: &Holder, text: String) -> Result<Lease> {
    let path = lease_path(run);
    refuse_holder(run, &path, own, false)?;
    // Two processes may find the same lease over. Only one creates the next.
    let aside = run.join(format!("lock.{}.over", std::process::id()));
    match std::fs::rename(&path, &aside) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        moved => moved.with_context(|| format!("cannot rename {}", path.display()))?,
    }
    let _ = std::fs::remove_file(&aside);
    let mut options = OpenOptions::new();
    let mut file = open(&path, options.create_new(true))?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("cannot write {}", path.display()))?;
    // A process that found the old lease over may just have moved this one.
    std::thread::sleep(WATCH_INTERVAL);
    let lease = Lease { path, text };
    if lease.is_own() {
        return Ok(lease);
    }
    Err(in_use(run, read(&lease.path)?.as_ref()))
}

impl Lease {
    fn is_own(&self) -> bool {
        let content = read_text(&self.path).ok().flatten();
        content.is_some_and(|content| content.text == self.text)
    }

    /// True if the file names another holder. A file that is gone, empty or cannot be read tells of
    /// none: a full or hanging disk leaves such files too.
    fn is_taken(&self) -> bool {
        let content = read_text(&self.path).ok().flatten();
        content.is_some_and(|content| {
            let holder = serde_json::from_str::<Holder>(&content.text);
            content.text != self.text && holder.is_ok()
        })
    }
}

/// Renews a lock file until the returned end of a channel is dropped. Ends the process if its lease
/// went to another one, which happens if this process was suspended for longer than [`EXPIRY`], and
/// other machines do not see its flock, if there is one.
fn renew(file: File, lease: Lease) -> Sender<()> {
    let (sender, end) = channel();
    std::thread::spawn(move || {
        while end.recv_timeout(RENEW_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            // Best effort: a read-only or hanging disk must not end the run.
            let _ = file.set_modified(SystemTime::now());
            if lease.is_taken() {
                let path = lease.path.display();
                eprintln!("error: another moerun took {path}, because this one was suspended");
                terminal::flush();
                signal_hook::low_level::exit(1);
            }
        }
    });
    sender
}

impl Drop for RunLock {
    fn drop(&mut self) {
        match &self.flock {
            _ if self.lease.is_taken() => {}
            // The text of an open lock means a holder that has exited without releasing it.
            Some(file) => {
                let _ = file.set_len(0);
            }
            None if self.lease.is_own() => {
                let _ = std::fs::remove_file(&self.lease.path);
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(run: &Path) -> String {
        match acquire(run) {
            Ok(_) => "free".into(),
            Err(error) => crate::hint::message(&error),
        }
    }

    #[test]
    fn a_folder_has_one_user_who_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let lock = acquire(&run).unwrap();
        let refused = message(&run);
        let expected = format!("process {} on ", std::process::id());
        assert!(
            refused.contains("another moerun is using") && refused.contains(&expected),
            "{refused}"
        );
        drop(lock);
        assert_eq!(std::fs::metadata(run.join("lock")).unwrap().len(), 0);
        assert_eq!(message(&run), "free");
    }

    #[test]
    fn a_lease_has_one_holder() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path();
        let own = Holder::this_process().unwrap();
        let text = serde_json::to_string(&own).unwrap();
        let lease = take_lease(run, &own, text.clone()).unwrap();
        assert!(lease.is_own());
        let second = take_lease(run, &own, text.clone());
        assert!(second.is_err(), "the holder is alive");
        // A flock does not tell about the holder of a lease.
        assert!(message(run).contains("another moerun is using"));
        let pid = format!("\"pid\":{}", std::process::id());
        let exited = text.replace(&pid, &format!("\"pid\":{}", i32::MAX));
        std::fs::write(&lease.path, exited).unwrap();
        assert!(!lease.is_own());
        assert!(take_lease(run, &own, text).is_ok(), "the holder is gone");
    }

    #[test]
    fn only_the_text_of_another_holder_takes_a_lock() {
        let folder = tempfile::tempdir().unwrap();
        let lock = acquire(folder.path()).unwrap();
        let path = folder.path().join("lock");
        assert!(!lock.lease.is_taken());
        let own = lock.lease.text.clone();
        for text in ["", &own[..own.len() / 2]] {
            std::fs::write(&path, text).unwrap();
            assert!(!lock.lease.is_taken(), "{text:?}");
        }
        let pid = format!("\"pid\":{}", std::process::id());
        let other = own.replace(&pid, "\"pid\":1");
        std::fs::write(&path, &other).unwrap();
        assert!(lock.lease.is_taken());
        drop(lock);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), other);
    }

    #[test]
    fn a_lock_file_that_cannot_be_read_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let lease = |name: &str| Lease {
            path: folder.path().join(name),
            text: "own".into(),
        };
        std::os::unix::fs::symlink("loop", folder.path().join("loop")).unwrap();
        assert!(read_text(&lease("loop").path).is_err());
        for name in ["loop", ".", "missing"] {
            assert!(!lease(name).is_taken(), "{name}");
        }
    }

    #[test]
    fn links_and_pipes_are_no_lock_files() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        std::fs::write(&target, "precious").unwrap();
        std::os::unix::fs::symlink(&target, folder.path().join("lock")).unwrap();
        assert!(message(folder.path()).contains("cannot write"));
        assert_eq!(std::fs::read(&target).unwrap(), b"precious");
        let other = tempfile::tempdir().unwrap();
        let pipe = other.path().join("lock");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(message(other.path()).contains("is no regular file"));
    }

    #[test]
    fn a_damaged_lock_file_is_no_holder() {
        for text in ["x", "{}", "[[[", "\u{0}\u{1}", "null"] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("lock"), text).unwrap();
            assert_eq!(message(folder.path()), "free", "{text}");
        }
    }
}
