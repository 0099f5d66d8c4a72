//! The identity of a file, by which a change of it shows without reading it.

use nix::sys::stat::FileStat;

/// The inode, length and times of a file. All stay as they are unless the file changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileIdentity {
    inode: u64,
    len: i64,
    modified_ns: i128,
    changed_ns: i128,
}

impl FileIdentity {
    pub(crate) fn of(status: &FileStat) -> FileIdentity {
        let time = |seconds: i64, nanoseconds: i64| {
            i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds)
        };
        FileIdentity {
            inode: status.st_ino,
            len: status.st_size,
            modified_ns: time(status.st_mtime, status.st_mtime_nsec),
            changed_ns: time(status.st_ctime, status.st_ctime_nsec),
        }
    }

    /// Returns the time of the last change, in nanoseconds since the epoch.
    pub(crate) fn changed_ns(self) -> i128 {
        self.changed_ns
    }
}
