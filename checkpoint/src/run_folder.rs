//! Access to a run's folder that follows no links: nothing is written or removed outside of it.
//!
//! The path of the folder itself is the user's, and may contain links. Everything below is reached
//! by name from an open folder, so a link that replaces an entry meanwhile changes nothing.

use crate::Error;
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, renameat, renameat2},
    sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat},
    unistd::{UnlinkatFlags, unlinkat},
};
use std::{
    ffi::CStr,
    fs::File,
    io::Write,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

const FILE_MODE: u32 = 0o666;
const PRIVATE_MODE: u32 = 0o600;
const FOLDER_MODE: u32 = 0o777;

/// Folders inside each other that [`RunFolder::remove`] opens at most.
const MAX_DEPTH: usize = 64;

/// An open folder, whose entries are reached by name.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    folder: OwnedFd,
}

/// The kind of an entry of a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    File,
    Folder,
    Link,
    /// A pipe, a socket or a device.
    Special,
}

impl EntryKind {
    fn of(stat: &FileStat) -> EntryKind {
        let format = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        match format {
            SFlag::S_IFREG => EntryKind::File,
            SFlag::S_IFDIR => EntryKind::Folder,
            SFlag::S_IFLNK => EntryKind::Link,
            _ => EntryKind::Special,
        }
    }

    fn refusal(self) -> &'static str {
        match self {
            EntryKind::File => "it is a file and no folder",
            EntryKind::Folder => "it is a folder and no file",
            EntryKind::Link => "it is a symbolic link, and none is followed in a run's folder",
            EntryKind::Special => "it is a pipe, a socket or a device and no file",
        }
    }
}

/// True if `name` is the name of an entry of a folder, and no path.
pub fn is_plain_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])
}

impl RunFolder {
    /// Opens a folder by a path of the user, in which links are followed.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path) -> Result<RunFolder, Error> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let folder = openat(AT_FDCWD, path, flags, Mode::empty());
        Ok(RunFolder {
            path: path.to_path_buf(),
            folder: folder.map_err(failed("cannot open", path))?,
        })
    }

    /// Creates a folder by a path of the user, unless it exists, and opens it.
    ///
    /// # Errors
    /// If it cannot be created or opened.
    pub fn create(path: &Path) -> Result<RunFolder, Error> {
        std::fs::create_dir_all(path).map_err(Error::io("cannot create", path))?;
        RunFolder::open(path)
    }

    /// Creates and opens a folder of a run's folder: a link in the last component is refused.
    ///
    /// # Errors
    /// If it cannot be created or opened, or is a link.
    pub fn create_inside(path: &Path) -> Result<RunFolder, Error> {
        match split(path) {
            Some((parent, name)) => RunFolder::create(parent)?.create_subfolder(name),
            None => RunFolder::create(path),
        }
    }

    /// Opens a folder of a run's folder: a link in the last component is refused. Returns `None`
    /// if it does not exist.
    ///
    /// # Errors
    /// If it cannot be opened, or is a link.
    pub fn open_inside(path: &Path) -> Result<Option<RunFolder>, Error> {
        let opened = match split(path) {
            Some((parent, name)) => {
                RunFolder::open(parent).and_then(|parent| parent.subfolder(name))
            }
            None => RunFolder::open(path),
        };
        match opened {
            Err(Error::Io { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => {
                Ok(None)
            }
            opened => opened.map(Some),
        }
    }

    /// Returns the path by which the folder was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the folder `name`.
    ///
    /// # Errors
    /// If there is none, it cannot be opened, or it is a link.
    pub fn subfolder(&self, name: &str) -> Result<RunFolder, Error> {
        self.require(name, EntryKind::Folder)?;
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY;
        Ok(RunFolder {
            path: self.path.join(name),
            folder: self.openat(name, flags, 0, "cannot open")?,
        })
    }

    /// Creates the folder `name`, unless it exists, and opens it.
    ///
    /// # Errors
    /// If it cannot be created or opened, or is a link.
    pub fn create_subfolder(&self, name: &str) -> Result<RunFolder, Error> {
        let path = self.entry(name)?;
        let mode = Mode::from_bits_truncate(FOLDER_MODE);
        match mkdirat(&self.folder, name, mode) {
            Ok(()) | Err(Errno::EEXIST) => self.subfolder(name),
            Err(error) => Err(failed("cannot create", &path)(error)),
        }
    }

    /// Opens the regular file `name` for reading. Never blocks, whatever it is.
    ///
    /// # Errors
    /// If there is none, it cannot be opened, or it is a link or no regular file.
    pub fn open_file(&self, name: &str) -> Result<File, Error> {
        self.require(name, EntryKind::File)?;
        let file = self.openat(name, OFlag::O_RDONLY, 0, "cannot open")?;
        self.regular(name, file)
    }

    /// Creates the file `name`, which must not exist, for reading and writing.
    ///
    /// # Errors
    /// If it cannot be created, or anything has that name.
    pub fn create_file(&self, name: &str) -> Result<File, Error> {
        self.create_with(name, FILE_MODE)
    }

    /// Creates a file as [`RunFolder::create_file`] does, which only this user can read.
    ///
    /// # Errors
    /// As [`RunFolder::create_file`].
    pub fn create_private_file(&self, name: &str) -> Result<File, Error> {
        self.create_with(name, PRIVATE_MODE)
    }

    fn create_with(&self, name: &str, mode: u32) -> Result<File, Error> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
        self.openat(name, flags, mode, "cannot create")
            .map(File::from)
    }

    /// Opens the file `name` for reading and appending; creates it if there is none.
    ///
    /// # Errors
    /// If it cannot be opened, or is a link or no regular file.
    pub fn append_file(&self, name: &str) -> Result<File, Error> {
        if self.kind(name)?.is_some() {
            self.require(name, EntryKind::File)?;
        }
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_APPEND;
        let file = self.openat(name, flags, FILE_MODE, "cannot open")?;
        self.regular(name, file)
    }

    /// Replaces the file `name` by one with these bytes, synced to disk, in one step. A link with
    /// this name is replaced, and its target stays as it is.
    ///
    /// # Errors
    /// If it cannot be written, or `name` is a folder. An older file is then untouched.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = self.entry(name)?;
        let temporary = format!("{name}.tmp");
        self.remove(&temporary)?;
        let mut file = self.create_file(&temporary)?;
        let written = file.write_all(bytes).and_then(|()| file.sync_all());
        let replaced = written
            .map_err(Error::io("cannot write", &path))
            .and_then(|()| self.rename(&temporary, name));
        if replaced.is_err() {
            // The first error explains more.
            let _ = self.remove(&temporary);
        }
        replaced
    }

    /// Renames an entry. A file or an empty folder with the new name is replaced.
    ///
    /// # Errors
    /// If the file system refuses it.
    pub fn rename(&self, from: &str, to: &str) -> Result<(), Error> {
        self.entry(from)?;
        let target = self.entry(to)?;
        renameat(&self.folder, from, &self.folder, to).map_err(failed("cannot rename to", &target))
    }

    /// Exchanges the names of two entries in one step. Returns false if the file system cannot.
    ///
    /// # Errors
    /// If an entry does not exist, or the file system refuses it.
    pub(crate) fn exchange(&self, first: &str, second: &str) -> Result<bool, Error> {
        self.entry(first)?;
        let target = self.entry(second)?;
        let flags = RenameFlags::RENAME_EXCHANGE;
        match renameat2(&self.folder, first, &self.folder, second, flags) {
            Ok(()) => Ok(true),
            Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => Ok(false),
            Err(error) => Err(failed("cannot rename to", &target)(error)),
        }
    }

    /// Removes an entry, a folder with all that is in it. Of a link, only the link is removed. An
    /// entry that does not exist is no error.
    ///
    /// # Errors
    /// If the file system refuses it.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.entry(name)?;
        let terminated = std::ffi::CString::new(name).expect("names have no zero byte");
        remove_at(self.folder.as_fd(), &terminated, MAX_DEPTH)
            .map_err(failed("cannot remove", &path))
    }

    /// Returns the kind of an entry, or `None` if there is none. Links are not followed.
    ///
    /// # Errors
    /// If the folder cannot be searched.
    pub fn kind(&self, name: &str) -> Result<Option<EntryKind>, Error> {
        let path = self.entry(name)?;
        match fstatat(&self.folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(EntryKind::of(&stat))),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(failed("cannot read", &path)(error)),
        }
    }

    /// Returns the names of all entries that are UTF-8, sorted.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let read = || {
            let mut folder = Dir::openat(&self.folder, ".", flags, Mode::empty())?;
            let mut names = Vec::new();
            for entry in folder.iter() {
                let entry = entry?;
                let name = entry.file_name().to_str().ok();
                names.extend(name.filter(|name| is_plain_name(name)).map(str::to_string));
            }
            names.sort();
            Ok(names)
        };
        read().map_err(failed("cannot read", &self.path))
    }

    /// Returns the bytes of all files in the entry `name`. An unreadable one counts as empty.
    pub fn bytes(&self, name: &str) -> u64 {
        let Ok(stat) = fstatat(&self.folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) else {
            return 0;
        };
        match EntryKind::of(&stat) {
            EntryKind::File => u64::try_from(stat.st_size).unwrap_or(0),
            EntryKind::Folder => {
                let folder = self.subfolder(name);
                let inner = folder.and_then(|folder| {
                    let names = folder.names()?;
                    Ok(names.iter().map(|name| folder.bytes(name)).sum())
                });
                inner.unwrap_or(0)
            }
            EntryKind::Link | EntryKind::Special => 0,
        }
    }

    /// Waits until the folder's entries are on disk.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn sync(&self) -> Result<(), Error> {
        nix::unistd::fsync(&self.folder).map_err(failed("cannot write", &self.path))
    }

    /// Returns the path of an entry, for messages.
    fn entry(&self, name: &str) -> Result<PathBuf, Error> {
        if is_plain_name(name) {
            Ok(self.path.join(name))
        } else {
            let reason = format!("{name:?} is no name of a file in this folder");
            Err(Error::mismatch(&self.path, reason))
        }
    }

    /// Returns the status of the regular file `name`, and does not open it.
    ///
    /// # Errors
    /// If there is none, or it is a link or no regular file.
    pub(crate) fn file_status(&self, name: &str) -> Result<FileStat, Error> {
        self.require(name, EntryKind::File)
    }

    fn require(&self, name: &str, kind: EntryKind) -> Result<FileStat, Error> {
        let path = self.entry(name)?;
        let found = fstatat(&self.folder, name, AtFlags::AT_SYMLINK_NOFOLLOW);
        let found = found.map_err(failed("cannot open", &path))?;
        match EntryKind::of(&found) {
            of_kind if of_kind == kind => Ok(found),
            other => Err(Error::mismatch(&path, other.refusal())),
        }
    }

    fn regular(&self, name: &str, file: OwnedFd) -> Result<File, Error> {
        let path = self.path.join(name);
        let stat = fstat(&file).map_err(failed("cannot open", &path))?;
        match EntryKind::of(&stat) {
            EntryKind::File => Ok(File::from(file)),
            kind => Err(Error::mismatch(&path, kind.refusal())),
        }
    }

    fn openat(
        &self,
        name: &str,
        flags: OFlag,
        mode: u32,
        action: &'static str,
    ) -> Result<OwnedFd, Error> {
        let path = self.entry(name)?;
        // Opening a pipe would wait for its other end.
        let safe = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(mode);
        match openat(&self.folder, name, flags | safe, mode) {
            Err(Errno::ELOOP) => Err(Error::mismatch(&path, EntryKind::Link.refusal())),
            opened => opened.map_err(failed(action, &path)),
        }
    }
}

/// Splits a path into its folder and its name.
fn split(path: &Path) -> Option<(&Path, &str)> {
    let name = path.file_name()?.to_str()?;
    let parent = path.parent()?;
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    Some((parent, name))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    let failed = Error::io(action, path);
    move |errno| failed(errno.into())
}

fn remove_at(folder: impl AsFd, name: &CStr, depth: usize) -> Result<(), Errno> {
    let folder = folder.as_fd();
    match unlinkat(folder, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        // Linux says EISDIR of a folder, POSIX EPERM.
        Err(Errno::EISDIR | Errno::EPERM) if depth > 0 => {}
        Err(error) => return Err(error),
    }
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut inner = Dir::openat(folder, name, flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in inner.iter() {
        names.push(entry?.file_name().to_owned());
    }
    for entry in names {
        if !matches!(entry.to_bytes(), b"." | b"..") {
            remove_at(&inner, &entry, depth - 1)?;
        }
    }
    unlinkat(folder, name, UnlinkatFlags::RemoveDir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::mkfifo;
    use std::os::unix::fs::symlink;

    fn message<T>(result: Result<T, Error>) -> String {
        result.err().expect("refused").to_string()
    }

    #[test]
    fn links_are_neither_followed_nor_written_through() {
        let root = tempfile::tempdir().unwrap();
        let outside = root.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("file"), "kept").unwrap();
        let run = RunFolder::create(&root.path().join("run")).unwrap();
        symlink(outside.join("file"), run.path().join("file")).unwrap();
        symlink(&outside, run.path().join("folder")).unwrap();
        symlink("nowhere", run.path().join("dangling")).unwrap();
        for name in ["file", "dangling"] {
            let refused = message(run.open_file(name));
            assert!(refused.contains("it is a symbolic link"), "{refused}");
            assert!(message(run.append_file(name)).contains("symbolic link"));
            assert!(message(run.create_file(name)).contains("File exists"));
        }
        assert!(message(run.subfolder("folder")).contains("symbolic link"));
        assert!(message(run.create_subfolder("folder")).contains("symbolic link"));
        let inside = run.path().join("folder");
        assert!(message(RunFolder::create_inside(&inside)).contains("symbolic link"));
        assert!(message(RunFolder::open_inside(&inside)).contains("symbolic link"));
        run.write_file("file", b"new").unwrap();
        run.remove("folder").unwrap();
        run.remove("dangling").unwrap();
        run.remove("missing").unwrap();
        assert_eq!(run.names().unwrap(), ["file"]);
        let text = |path: PathBuf| std::fs::read_to_string(path).unwrap();
        assert_eq!(text(run.path().join("file")), "new");
        assert_eq!(text(outside.join("file")), "kept");
    }

    #[test]
    fn a_removed_folder_takes_nothing_outside_with_it() {
        let root = tempfile::tempdir().unwrap();
        let outside = root.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("file"), "kept").unwrap();
        let run = RunFolder::create(&root.path().join("run")).unwrap();
        let deep = run.create_subfolder("a").unwrap();
        let deep = deep.create_subfolder("b").unwrap();
        deep.write_file("file", b"12345").unwrap();
        symlink(&outside, deep.path().join("link")).unwrap();
        assert_eq!(run.bytes("a"), 5);
        run.remove("a").unwrap();
        assert!(run.names().unwrap().is_empty());
        assert!(outside.join("file").exists());
    }

    #[test]
    fn only_plain_names_of_regular_files_are_opened() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("outside"), "x").unwrap();
        let run = RunFolder::create(&root.path().join("run")).unwrap();
        for name in ["../outside", "/etc/passwd", "..", ".", "", "a/b", "a\0b"] {
            assert!(
                message(run.open_file(name)).contains("is no name"),
                "{name}"
            );
            assert!(message(run.remove(name)).contains("is no name"), "{name}");
        }
        // Without a writer, opening a pipe for reading would wait.
        mkfifo(&run.path().join("pipe"), Mode::S_IRWXU).unwrap();
        assert!(message(run.open_file("pipe")).contains("it is a pipe"));
        assert!(message(run.append_file("pipe")).contains("it is a pipe"));
        let missing = message(run.open_file("missing"));
        assert!(missing.contains("No such file"), "{missing}");
        assert!(
            RunFolder::open_inside(&run.path().join("missing"))
                .unwrap()
                .is_none()
        );
        let mut file = run.append_file("log").unwrap();
        file.write_all(b"one").unwrap();
        let mut file = run.append_file("log").unwrap();
        file.write_all(b"two").unwrap();
        assert_eq!(run.bytes("log"), 6);
    }
}
