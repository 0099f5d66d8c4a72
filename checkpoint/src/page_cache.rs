//! The page cache, which hides from a reader whether bytes are on disk.

use crate::Error;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::{fs::File, path::Path};

/// Waits until a file is on disk and drops it from the page cache, so that the next read proves
/// that the disk has the bytes. Errors name `path`.
///
/// File systems in memory keep the pages: they have no other copy.
///
/// # Errors
/// If the disk fails.
pub(crate) fn sync_and_drop(file: &File, path: &Path) -> Result<(), Error> {
    file.sync_all().map_err(Error::io("cannot write", path))?;
    let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    // A length of 0 is the whole file.
    posix_fadvise(file, 0, 0, advice)
        .map_err(|errno| Error::io("cannot drop from the page cache", path)(errno.into()))
}
