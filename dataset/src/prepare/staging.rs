//! The folder in which a data set is made before it takes its place.
//!
//! A data set is written to `OUT/.unfinished`, a single pair `OUT/NAME` to `OUT/.NAME.unfinished`.
//! Once complete, the files are renamed into `OUT`. A process that is killed while it writes leaves
//! the data set that was in `OUT` as it was. One that is killed while it renames leaves a list of
//! the files, and the next command completes it.

use crate::{Error, info::INFO_FILE, tokens::with_extension};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    fs::{File, TryLockError},
    io::Write,
    path::{Path, PathBuf},
};

/// Name of the folder in the output folder.
const UNFINISHED: &str = ".unfinished";

/// Log of the finished parts: JSON lines.
const LOG_FILE: &str = "log.jsonl";

const LOCK_FILE: &str = "lock";

/// List of the files of a complete data set that are being renamed.
const COMPLETE_FILE: &str = "complete.json";

/// Name of the tokenizer in a data set.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// The files that a command makes.
#[derive(Debug, Clone)]
pub(super) enum Target {
    /// The files of a data set in this folder.
    DataSet(PathBuf),
    /// The pair of this path without ending.
    Pair(PathBuf),
}

impl Target {
    /// Returns the folder of the files.
    fn folder(&self) -> &Path {
        match self {
            Target::DataSet(folder) => folder,
            Target::Pair(prefix) => match prefix.parent() {
                Some(folder) if folder != Path::new("") => folder,
                _ => Path::new("."),
            },
        }
    }

    /// Returns the name of a pair.
    fn name(prefix: &Path) -> String {
        let name = prefix.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Returns the folder of the unfinished files.
    fn unfinished(&self) -> PathBuf {
        match self {
            Target::DataSet(folder) => folder.join(UNFINISHED),
            Target::Pair(prefix) => {
                let name = format!(".{}{UNFINISHED}", Target::name(prefix));
                self.folder().join(name)
            }
        }
    }

    /// True for the names of files that the command may replace.
    fn owns(&self, file: &str) -> bool {
        match self {
            Target::DataSet(_) => is_data_file(file),
            Target::Pair(prefix) => {
                let name = Target::name(prefix);
                file == format!("{name}.bin") || file == format!("{name}.idx")
            }
        }
    }

    /// Returns the existing files that the command may replace, in order.
    fn files(&self) -> Result<Vec<PathBuf>, Error> {
        let folder = self.folder();
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(cause) => return Err(Error::io("cannot read", folder)(cause)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(Error::io("cannot read", folder))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if name.is_some_and(|name| self.owns(name)) {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    }

    fn refuse_existing(&self, force: bool) -> Result<(), Error> {
        let found = self.files()?;
        match found.first() {
            Some(path) if !force => Err(Error::Options(format!(
                "{} already has data: {} exists; choose another place, or replace it with --force",
                self.folder().display(),
                path.display()
            ))),
            _ => Ok(()),
        }
    }
}

/// The folder of an unfinished data set. Only one process uses it.
pub(super) struct Staging {
    target: Target,
    folder: PathBuf,
    log: Option<File>,
    /// Locked for as long as it is open.
    _lock: File,
}

/// First line of the log of an unfinished data set.
#[derive(Serialize, Deserialize)]
struct Header {
    /// Hash of the command that made it.
    command: String,
}

/// The start of a command.
pub(super) enum Begun<T> {
    /// Nothing was there, or an unfinished data set of the same command, with the entries of its
    /// log.
    Open {
        staging: Staging,
        log: Vec<T>,
        /// True if an unfinished data set of the same command was dropped.
        is_restarted: bool,
    },
    /// A killed process of the same command had completed the data set.
    Complete,
}

impl Staging {
    /// Opens the folder of the unfinished data set of `target`.
    ///
    /// `force` allows to replace a data set, and drops what another command left unfinished.
    /// Without `resumes`, what the same command left unfinished is dropped, too.
    ///
    /// # Errors
    /// If `target` exists, another command left it unfinished, or another process makes it.
    pub(super) fn begin<T: DeserializeOwned>(
        target: Target,
        command: &str,
        force: bool,
        resumes: bool,
    ) -> Result<Begun<T>, Error> {
        let folder = target.unfinished();
        let output = target.folder().to_path_buf();
        let is_resumed = folder.is_dir();
        if !is_resumed {
            target.refuse_existing(force)?;
        }
        std::fs::create_dir_all(&folder).map_err(Error::io("cannot make", &folder))?;
        let path = folder.join(LOCK_FILE);
        let lock = File::create(&path).map_err(Error::io("cannot write", &path))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => Error::Options(format!(
                "{} is in use: another process prepares data there",
                output.display()
            )),
            TryLockError::Error(cause) => Error::io("cannot lock", &path)(cause),
        })?;
        let mut staging = Staging {
            target,
            folder,
            log: None,
            _lock: lock,
        };
        let saved = match staging.read_log::<T>() {
            Err(_) if force => None,
            saved => saved?,
        };
        let is_own = saved.as_ref().is_some_and(|saved| saved.command == command);
        let is_same = is_own && resumes;
        if let Some(names) = staging.load_complete()? {
            staging.rename(&names)?;
            if is_same {
                staging.remove()?;
                return Ok(Begun::Complete);
            }
            staging.target.refuse_existing(force)?;
        }
        if let Some(saved) = saved.filter(|_| is_same) {
            staging.open_log(saved.bytes)?;
            return Ok(Begun::Open {
                staging,
                log: saved.entries,
                is_restarted: false,
            });
        }
        if is_resumed {
            if staging.path(LOG_FILE).exists() && !force && !is_own {
                return Err(Error::Options(format!(
                    "{} has the unfinished data set of another command, or the inputs have \
                     changed: choose another folder, or start again with --force",
                    output.display()
                )));
            }
            staging.target.refuse_existing(force)?;
            staging.clear()?;
        }
        staging.open_log(0)?;
        let command = command.to_string();
        staging.append(&[Header { command }])?;
        Ok(Begun::Open {
            staging,
            log: Vec::new(),
            is_restarted: is_own,
        })
    }

    /// Returns the path of a file of the unfinished data set.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Appends entries to the log, from which the same command can continue.
    ///
    /// # Errors
    /// If the disk is full.
    pub(super) fn append<T: Serialize>(&self, entries: &[T]) -> Result<(), Error> {
        let mut text = Vec::new();
        for entry in entries {
            serde_json::to_writer(&mut text, entry).expect("plain data");
            text.push(b'\n');
        }
        let path = self.path(LOG_FILE);
        let mut log = self.log.as_ref().expect("the log was opened");
        log.write_all(&text)
            .and_then(|()| log.sync_all())
            .map_err(Error::io("cannot write", &path))
    }

    /// Puts the complete data set in its place: `names` are its files.
    ///
    /// # Errors
    /// If a file cannot be renamed.
    pub(super) fn complete(self, names: &[String]) -> Result<(), Error> {
        self.store_complete(names)?;
        self.rename(names)?;
        self.remove()
    }

    /// Renames files that have not been renamed yet, and removes those of an older data set.
    fn rename(&self, names: &[String]) -> Result<(), Error> {
        let output = self.target.folder();
        // The record last: its checksums reveal files of two data sets.
        let is_record = |name: &&String| name.as_str() == INFO_FILE;
        let others = names.iter().filter(|name| !is_record(name));
        for name in others.chain(names.iter().filter(is_record)) {
            let path = self.path(name);
            if path.exists() {
                std::fs::rename(&path, output.join(name))
                    .map_err(Error::io("cannot rename", &path))?;
            }
        }
        for path in self.target.files()? {
            let is_new = |name: &String| output.join(name) == path;
            if !names.iter().any(is_new) {
                std::fs::remove_file(&path).map_err(Error::io("cannot remove", &path))?;
            }
        }
        sync_folder(output)
    }

    /// Removes everything but the lock.
    fn clear(&self) -> Result<(), Error> {
        let failed = || Error::io("cannot remove", &self.folder);
        for entry in std::fs::read_dir(&self.folder).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            if !path.ends_with(LOCK_FILE) {
                std::fs::remove_file(&path).map_err(Error::io("cannot remove", &path))?;
            }
        }
        Ok(())
    }

    /// Removes the unfinished data set, and the output folder if nothing else is in it.
    pub(super) fn discard(self) {
        // Best effort: the error that led here matters more.
        let _ = self.remove();
        if let Target::DataSet(folder) = &self.target {
            let _ = std::fs::remove_dir(folder);
        }
    }

    fn remove(&self) -> Result<(), Error> {
        std::fs::remove_dir_all(&self.folder).map_err(Error::io("cannot remove", &self.folder))
    }

    /// Reads the log, without a last line that was not written whole.
    fn read_log<T: DeserializeOwned>(&self) -> Result<Option<SavedLog<T>>, Error> {
        let path = self.path(LOG_FILE);
        let Some(mut text) = read_if_exists(&path)? else {
            return Ok(None);
        };
        let end = text
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |at| at + 1);
        text.truncate(end);
        let damaged = |error: serde_json::Error| {
            let path = path.display();
            Error::Data(format!(
                "{path} is damaged: {error}: start again with --force"
            ))
        };
        let mut lines = text[..end.saturating_sub(1)].split(|&byte| byte == b'\n');
        let Some(header) = lines.next().filter(|line| !line.is_empty()) else {
            return Ok(None);
        };
        let header: Header = serde_json::from_slice(header).map_err(damaged)?;
        let entries = lines.map(|line| serde_json::from_slice(line).map_err(damaged));
        Ok(Some(SavedLog {
            command: header.command,
            entries: entries.collect::<Result<_, _>>()?,
            bytes: end as u64,
        }))
    }

    /// Opens the log to append after its first `bytes` bytes.
    fn open_log(&mut self, bytes: u64) -> Result<(), Error> {
        let path = self.path(LOG_FILE);
        let log = File::options().create(true).append(true).open(&path);
        let log = log.map_err(Error::io("cannot write", &path))?;
        log.set_len(bytes)
            .map_err(Error::io("cannot write", &path))?;
        self.log = Some(log);
        Ok(())
    }

    fn load_complete(&self) -> Result<Option<Vec<String>>, Error> {
        let path = self.path(COMPLETE_FILE);
        let Some(text) = read_if_exists(&path)? else {
            return Ok(None);
        };
        let names = serde_json::from_slice(&text);
        let names =
            names.map_err(|error| Error::Data(format!("{} is damaged: {error}", path.display())));
        names.map(Some)
    }

    /// Writes the list of files so that it is always whole.
    fn store_complete(&self, names: &[String]) -> Result<(), Error> {
        let text = serde_json::to_vec_pretty(names).expect("plain data");
        replace_synced(&self.path(COMPLETE_FILE), &text)?;
        sync_folder(&self.folder)
    }
}

/// The log of an interrupted command.
struct SavedLog<T> {
    command: String,
    entries: Vec<T>,
    /// Bytes of its whole lines.
    bytes: u64,
}

fn read_if_exists(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match std::fs::read(path) {
        Ok(text) => Ok(Some(text)),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(Error::io("cannot read", path)(cause)),
    }
}

/// Writes a file so that it is always whole: to a temporary path, which is synced and renamed.
pub(super) fn replace_synced(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let new = with_extension(path, "new");
    write_synced(&new, bytes)?;
    std::fs::rename(&new, path).map_err(Error::io("cannot rename", &new))
}

/// Writes a file and syncs it to disk.
pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = File::create(path).map_err(Error::io("cannot write", path))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(Error::io("cannot write", path))
}

fn sync_folder(path: &Path) -> Result<(), Error> {
    let synced = File::open(path).and_then(|folder| folder.sync_all());
    synced.map_err(Error::io("cannot sync", path))
}

fn is_data_file(name: &str) -> bool {
    if [INFO_FILE, TOKENIZER_FILE].contains(&name) {
        return true;
    }
    let stem = name
        .strip_suffix(".bin")
        .or_else(|| name.strip_suffix(".idx"));
    stem.is_some_and(is_pair)
}

/// True for the names of pairs in a data set: `train`, `valid`, `train-00000`, ...
pub(super) fn is_pair(stem: &str) -> bool {
    let rest = stem
        .strip_prefix("train")
        .or_else(|| stem.strip_prefix("valid"));
    rest.is_some_and(|rest| {
        let digits = rest.strip_prefix('-');
        let is_number =
            |digits: &str| !digits.is_empty() && digits.chars().all(|digit| digit.is_ascii_digit());
        rest.is_empty() || digits.is_some_and(is_number)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(output: &Path, command: &str, force: bool) -> Result<Vec<u32>, String> {
        match Staging::begin::<u32>(Target::DataSet(output.into()), command, force, true) {
            Ok(Begun::Open { log, .. }) => Ok(log),
            Ok(Begun::Complete) => Err("complete".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn open(output: &Path, command: &str, force: bool) -> Staging {
        match Staging::begin::<u32>(Target::DataSet(output.into()), command, force, true) {
            Ok(Begun::Open { staging, .. }) => staging,
            _ => panic!("cannot begin"),
        }
    }

    #[test]
    fn an_unfinished_data_set_belongs_to_its_command() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let staging = open(&output, "a", false);
        let used = begin(&output, "a", false).unwrap_err();
        assert!(used.contains("is in use"), "{used}");
        staging.append(&[7u32, 8]).unwrap();
        std::fs::write(staging.path("train.bin"), "new").unwrap();
        // A line of which the end was not written.
        staging.log.as_ref().unwrap().write_all(b"9").unwrap();
        drop(staging);
        let staging = open(&output, "a", false);
        staging.append(&[10u32]).unwrap();
        drop(staging);
        assert_eq!(begin(&output, "a", false), Ok(vec![7, 8, 10]));
        let other = begin(&output, "b", false).unwrap_err();
        assert!(
            other.contains("unfinished data set of another command"),
            "{other}"
        );
        assert_eq!(begin(&output, "b", true), Ok(vec![]));
        assert!(!output.join(".unfinished/train.bin").exists());
    }

    #[test]
    fn a_stream_is_never_resumed() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let staging = open(&output, "a", false);
        staging.append(&[7u32]).unwrap();
        std::fs::write(staging.path("train.bin"), "old").unwrap();
        drop(staging);
        let target = Target::DataSet(output.clone());
        let begun = Staging::begin::<u32>(target, "a", false, false)
            .ok()
            .unwrap();
        let Begun::Open {
            log, is_restarted, ..
        } = begun
        else {
            panic!("it was resumed");
        };
        assert!(is_restarted && log.is_empty());
        assert!(!output.join(".unfinished/train.bin").exists());
    }

    #[test]
    fn a_pair_replaces_only_itself() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["all.bin", "all.idx", "train.bin", "dataset.json"] {
            std::fs::write(folder.path().join(name), "old").unwrap();
        }
        let target = || Target::Pair(folder.path().join("all"));
        let refused = Staging::begin::<u32>(target(), "a", false, true)
            .err()
            .unwrap();
        assert!(refused.to_string().contains("all.bin exists"), "{refused}");
        let begun = Staging::begin::<u32>(target(), "a", true, true)
            .ok()
            .unwrap();
        let Begun::Open { staging, .. } = begun else {
            panic!("nothing was complete");
        };
        let used = Staging::begin::<u32>(target(), "a", true, true)
            .err()
            .unwrap();
        assert!(used.to_string().contains("is in use"), "{used}");
        for name in ["all.bin", "all.idx"] {
            std::fs::write(staging.path(name), "new").unwrap();
        }
        let names = ["all.bin".to_string(), "all.idx".to_string()];
        staging.complete(&names).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!([read("all.bin"), read("all.idx")], ["new", "new"]);
        assert_eq!([read("train.bin"), read("dataset.json")], ["old", "old"]);
        assert!(!folder.path().join(".all.unfinished").exists());
    }

    #[test]
    fn a_killed_renaming_is_completed() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path();
        std::fs::write(output.join("mine.txt"), "kept").unwrap();
        std::fs::write(output.join("valid.bin"), "old").unwrap();
        std::fs::write(output.join("dataset.json"), "old").unwrap();
        let refused = begin(output, "a", false).unwrap_err();
        assert!(refused.contains("already has data"), "{refused}");
        let staging = open(output, "a", true);
        std::fs::write(staging.path("dataset.json"), "new").unwrap();
        // As if `train.bin` had been renamed when the process was killed.
        std::fs::write(output.join("train.bin"), "new").unwrap();
        let names = ["dataset.json".to_string(), "train.bin".to_string()];
        staging.store_complete(&names).unwrap();
        drop(staging);
        assert_eq!(begin(output, "a", false), Err("complete".into()));
        let read = |name: &str| std::fs::read_to_string(output.join(name)).ok();
        assert_eq!(read("dataset.json").as_deref(), Some("new"));
        assert_eq!(read("train.bin").as_deref(), Some("new"));
        assert_eq!(read("mine.txt").as_deref(), Some("kept"));
        assert_eq!(read("valid.bin"), None);
        assert!(!output.join(UNFINISHED).exists());
    }
}
