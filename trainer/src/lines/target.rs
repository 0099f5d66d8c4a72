//! The file that takes the lines: opened, cut where the run resumes, and appended to.

use super::tail::{ResumePoint, find_tail};
use checkpoint::run_folder::RunFolder;
use nix::{errno::Errno, fcntl::OFlag};
use std::{
    fs::File,
    io::{Error, ErrorKind, Read, Result, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// A file and what becomes of its content.
pub enum Target {
    /// Lines follow those that are in the file of a folder in the run's folder.
    Append(PathBuf),
    /// Lines after the point where the run resumes are removed first: the run repeats them.
    After { path: PathBuf, point: ResumePoint },
    /// A file that is open already.
    Open(File),
}

/// A file that lines are appended to.
pub(super) struct OpenFile {
    pub(super) file: File,
    /// Step before which the file was to have lines. `None` if it is empty and was to have none.
    pub(super) last_step: Option<u64>,
    /// Bytes to write before the next line, because the last one lacks its end.
    owed_newline: bool,
}

impl Target {
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            Target::Append(path) | Target::After { path, .. } => Some(path),
            Target::Open(_) => None,
        }
    }

    /// Opens the file, and its folder if there is none. Removes the lines after the point of the
    /// resume.
    pub(super) fn open(&self) -> Result<OpenFile> {
        match self {
            Target::Append(_) => end_last_line(self.open_file()?),
            Target::After { path, point } => {
                let is_new = !path.try_exists()?;
                let mut open = cut_after(self.open_file()?, *point)?;
                open.last_step = open.last_step.filter(|_| !is_new);
                Ok(open)
            }
            Target::Open(_) => Ok(OpenFile::whole(self.open_file()?)),
        }
    }

    fn open_file(&self) -> Result<File> {
        match self {
            Target::Append(path) => open_log(path),
            Target::After { path, .. } => open_regular(path),
            Target::Open(file) => file.try_clone(),
        }
    }

    /// Opens the file again, for lines that begin with `pending`. Also returns how many bytes of
    /// `pending` the file ends with, from writes that failed or that took a part of a line.
    pub(super) fn reopen(&self, pending: &[u8]) -> Result<(OpenFile, usize)> {
        let pending = match self {
            // Lines of a log repeat, so only a part of a line is certain to be of such a write.
            Target::Append(_) => pending.split(|&byte| byte == b'\n').next(),
            Target::After { .. } => Some(pending),
            Target::Open(_) => return Ok((self.open()?, 0)),
        };
        let file = self.open_file()?;
        let held = held_bytes(&file, pending.unwrap_or_default())?;
        let open = if held > 0 {
            OpenFile::whole(file)
        } else if matches!(self, Target::After { .. }) {
            cut_after(file, WHOLE_LINES)?
        } else {
            end_last_line(file)?
        };
        Ok((open, held))
    }

    /// Removes the file, which is empty. Lines make it again.
    pub(super) fn remove(&self) {
        // At worst, a restart before the first line reports lines as missing that never were.
        let _ = self.path().map(std::fs::remove_file);
    }

    /// True if the file was removed, so that lines would go nowhere, or its descriptor is stale.
    pub(super) fn is_lost(&self, open: &OpenFile) -> bool {
        let links = open.file.metadata().map(|metadata| metadata.nlink());
        self.path().is_some() && !matches!(links, Ok(1..))
    }
}

/// The point of a resume that repeats no line.
const WHOLE_LINES: ResumePoint = ResumePoint {
    step: u64::MAX,
    repeats_validation: false,
};

/// Returns the number of bytes of `pending`, which begins a line, that the file ends with.
fn held_bytes(file: &File, pending: &[u8]) -> Result<usize> {
    let len = file.metadata()?.len();
    let start = len.saturating_sub(pending.len() as u64 + 1);
    let mut end = vec![0; (len - start) as usize];
    file.read_exact_at(&mut end, start)?;
    let begins_line = |&place: &usize| match place.checked_sub(1) {
        Some(before) => end[before] == b'\n',
        None => start == 0,
    };
    let places = (0..end.len()).filter(begins_line);
    let mut held = places.map(|place| &end[place..]);
    let longest = held.find(|held| pending.starts_with(held));
    Ok(longest.map_or(0, <[u8]>::len))
}

impl OpenFile {
    /// Returns a file whose next bytes follow what it has.
    fn whole(file: File) -> OpenFile {
        OpenFile {
            file,
            last_step: None,
            owed_newline: false,
        }
    }

    /// Writes as much of `bytes` as the file takes. Returns how much that is, and the failure
    /// that ended it.
    pub(super) fn write(&mut self, bytes: &[u8]) -> (usize, Result<()>) {
        let mut written = 0;
        if self.owed_newline {
            match self.file.write(b"\n") {
                Ok(1) => self.owed_newline = false,
                Ok(_) => return (0, Err(ErrorKind::WriteZero.into())),
                Err(error) => return (0, Err(error)),
            }
        }
        while written < bytes.len() {
            match self.file.write(&bytes[written..]) {
                Ok(0) => return (written, Err(ErrorKind::WriteZero.into())),
                Ok(taken) => written += taken,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return (written, Err(error)),
            }
        }
        (written, Ok(()))
    }
}

/// Opens a file in a folder of the run's folder for appending. Follows a link in place of neither.
fn open_log(path: &Path) -> Result<File> {
    let name = path.file_name().and_then(|name| name.to_str());
    let Some((folder, name)) = path.parent().zip(name) else {
        return Err(ErrorKind::InvalidInput.into());
    };
    let opened = RunFolder::create_inside(folder).and_then(|folder| folder.append_file(name));
    opened.map_err(|error| match error {
        checkpoint::Error::Io { cause, .. } => cause,
        error => Error::new(ErrorKind::InvalidInput, error),
    })
}

/// Opens a file for appending. Never follows a link: in a shared folder it could lead anywhere.
fn open_regular(path: &Path) -> Result<File> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // A pipe without a reader would block the open.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = File::options()
        .read(true)
        .append(true)
        .create(true)
        .custom_flags(flags.bits())
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// Removes the lines after `point`, and a line that a crash cut off.
fn cut_after(mut file: File, point: ResumePoint) -> Result<OpenFile> {
    let len = file.metadata()?.len();
    let tail = find_tail(&mut file, len, point)?;
    if tail.keep < len {
        file.set_len(tail.keep)?;
    }
    // A run that resumed in a new folder began its file after the steps before.
    let begins_later = tail.first_step.is_some_and(|first| first > point.step);
    let before_first = tail.first_step.map_or(0, |first| first.saturating_sub(1));
    let in_empty = (!begins_later).then_some(before_first);
    Ok(OpenFile {
        file,
        last_step: tail.last_step.or(in_empty),
        owed_newline: tail.is_unterminated,
    })
}

/// Makes the first line of a log begin a line of the file.
fn end_last_line(mut file: File) -> Result<OpenFile> {
    let mut last = [b'\n'];
    if file.metadata()?.len() > 0 {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
    }
    Ok(OpenFile {
        file,
        last_step: None,
        owed_newline: last != [b'\n'],
    })
}

/// True if a descriptor stays useless after this failure, and another one of the path may not be:
/// the server lost the file's handle, or the file system was unmounted.
pub(super) fn needs_reopening(error: &Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::ESTALE | Errno::ENOTCONN))
}

/// True if the failure may pass without a change of the file's path or permissions.
pub(super) fn may_pass(error: &Error) -> bool {
    let passing = matches!(
        error.kind(),
        ErrorKind::StorageFull
            | ErrorKind::QuotaExceeded
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::FileTooLarge
            | ErrorKind::StaleNetworkFileHandle
            | ErrorKind::NotConnected
            | ErrorKind::TimedOut
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::NetworkDown
    );
    passing || error.raw_os_error() == Some(Errno::EIO as i32)
}
