//! The file that takes the lines: opened, cut where the run resumes, and appended to.

use super::tail::{ResumePoint, find_tail};
use checkpoint::run_folder::RunFolder;
use nix::{errno::Errno, fcntl::OFlag};
use std::{
    fs::File,
    io::{Error, ErrorKind, Read, Result, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
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
    /// Step of the last line that was kept, in a file that had lines.
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

    /// Opens the file, and its folder if there is none. Lines are removed only by the first call.
    pub(super) fn open(&self, is_first: bool) -> Result<OpenFile> {
        let file = match self {
            Target::Append(path) => open_log(path)?,
            Target::After { path, .. } => open_regular(path)?,
            Target::Open(file) => {
                return Ok(OpenFile {
                    file: file.try_clone()?,
                    last_step: None,
                    owed_newline: false,
                });
            }
        };
        match self {
            Target::After { point, .. } if is_first => cut_after(file, *point),
            _ => end_last_line(file),
        }
    }

    /// True if the file was removed, so that lines would go nowhere.
    pub(super) fn is_removed(&self, open: &OpenFile) -> bool {
        let links = open.file.metadata().map(|metadata| metadata.nlink());
        self.path().is_some() && matches!(links, Ok(0))
    }
}

impl OpenFile {
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
    Ok(OpenFile {
        file,
        last_step: tail.last_step,
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

/// True if the failure may pass without a change of the file's path or permissions.
pub(super) fn may_pass(error: &Error) -> bool {
    let passing = matches!(
        error.kind(),
        ErrorKind::StorageFull
            | ErrorKind::QuotaExceeded
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::FileTooLarge
            | ErrorKind::StaleNetworkFileHandle
            | ErrorKind::TimedOut
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::NetworkDown
    );
    passing || error.raw_os_error() == Some(Errno::EIO as i32)
}
