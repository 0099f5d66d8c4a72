//! The folder of a run's checkpoints: which of them are verified, and which are set aside.
//!
//! [`newest`] is the only place that decides which checkpoint is the newest. It reads the data, so
//! a damaged checkpoint with a high number is neither resumed from nor counted by
//! [`retain`](crate::retain).

use crate::{
    Checkpoint, Error,
    manifest::ParsedManifest,
    names::{
        DAMAGED, LEFTOVER_SUFFIXES, MANIFEST, REMOVING, is_damaged_suffix, step_of, suffix_of,
    },
    run_folder::RunFolder,
    verified::{self, Summary},
};
use std::{
    cmp::Reverse,
    fmt::{Display, Formatter},
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The part of a checkpoint that is read to verify it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depth {
    /// The manifest, and the lengths of all files.
    Lengths,
    /// Also the checksum of every file. A checkpoint that this process wrote or read as a whole,
    /// and that has not changed since, is not read again.
    Data,
}

/// A checkpoint that was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    pub path: PathBuf,
    /// Number of completed steps.
    pub step: u64,
    /// A note for the user, see [`Checkpoint::note`].
    pub note: Option<String>,
}

/// A folder with the name of a checkpoint that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub path: PathBuf,
    /// The step in its name.
    pub step: u64,
    /// A complete message, which names the file.
    pub reason: String,
    /// True if its files prove it damaged, rather than of another version or unreadable now.
    pub is_damaged: bool,
}

/// A part of a checkpoint that an interrupted write or removal left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    pub path: PathBuf,
    pub bytes: u64,
}

impl Display for Leftover {
    fn fmt(&self, out: &mut Formatter<'_>) -> std::fmt::Result {
        let mb = self.bytes as f64 / 1e6;
        write!(out, "{} ({mb:.1} MB)", self.path.display())
    }
}

/// The contents of a folder of checkpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// Verified checkpoints, newest first.
    pub verified: Vec<Verified>,
    /// Folders with the names of checkpoints that cannot be used, newest first. [`newest`] has
    /// only those newer than the verified one.
    pub refused: Vec<Refused>,
    /// Folders that were set aside, `step-NNNNNNNN.damaged`.
    pub set_aside: Vec<PathBuf>,
    /// Folders that [`clean`] removes.
    pub leftovers: Vec<Leftover>,
}

/// The entries of a folder of checkpoints, by their names alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// Entries with the names of checkpoints and their steps, newest first, usable or not.
    pub candidates: Vec<(u64, PathBuf)>,
    /// Folders that were set aside, `step-NNNNNNNN.damaged`.
    pub set_aside: Vec<PathBuf>,
    /// Folders that [`clean`] removes.
    pub leftovers: Vec<PathBuf>,
}

/// Returns the folders under `root` with a manifest, newest first, and verifies nothing. A missing
/// folder holds none.
///
/// # Errors
/// If the folder or one of the checkpoints cannot be read.
pub fn list(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for (_, path) in listing(root)?.candidates {
        let manifest = path.join(MANIFEST);
        match std::fs::symlink_metadata(&manifest) {
            Ok(_) => found.push(path),
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(Error::io("cannot read", &manifest)(error)),
        }
    }
    Ok(found)
}

/// True if the last component of `path` is the name of a checkpoint, `step-NNNNNNNN`.
pub fn has_checkpoint_name(path: &Path) -> bool {
    step_of(path).is_some()
}

/// Verifies all checkpoints under `root`.
///
/// # Errors
/// If the folder or a checkpoint cannot be read by this user.
pub fn survey(root: &Path, depth: Depth) -> Result<Survey, Error> {
    verify_while(root, 0, depth, |_| true)
}

/// Finds the newest usable checkpoint under `root`: verifies the newest, and older ones until one
/// is verified. It is the only one in [`Survey::verified`].
///
/// # Errors
/// If the folder or a checkpoint cannot be read by this user.
pub fn newest(root: &Path, depth: Depth) -> Result<Survey, Error> {
    newest_since(root, 0, depth)
}

/// As [`newest`], but reads nothing of checkpoints before step `step`.
///
/// # Errors
/// As [`newest`].
pub fn newest_since(root: &Path, step: u64, depth: Depth) -> Result<Survey, Error> {
    verify_while(root, step, depth, |survey| survey.verified.is_empty())
}

fn verify_while(
    root: &Path,
    since: u64,
    depth: Depth,
    continues: impl Fn(&Survey) -> bool,
) -> Result<Survey, Error> {
    let Listing {
        candidates,
        set_aside,
        leftovers,
    } = listing(root)?;
    let mut survey = Survey {
        set_aside,
        leftovers: with_sizes(root, &leftovers)?,
        ..Survey::default()
    };
    for (step, path) in candidates {
        if step < since || !continues(&survey) {
            break;
        }
        match verify(&path, depth) {
            Ok(verified) => survey.verified.push(verified),
            Err(error) if error.is_denied() => return Err(error),
            Err(error) => survey.refused.push(Refused {
                path,
                step,
                reason: error.to_string(),
                is_damaged: error.is_damage(),
            }),
        }
    }
    Ok(survey)
}

/// Verifies the checkpoint in the folder `path`.
///
/// # Errors
/// If it is damaged, of another format, or cannot be read.
pub fn verify(path: &Path, depth: Depth) -> Result<Verified, Error> {
    let summary = summarize(path, depth)?;
    Ok(Verified {
        path: path.to_path_buf(),
        step: summary.step,
        note: summary.note.clone(),
    })
}

/// Verifies a checkpoint and summarizes it. Of one that this process has verified before, it reads
/// nothing.
pub(crate) fn summarize(path: &Path, depth: Depth) -> Result<Arc<Summary>, Error> {
    if let Some(known) = verified::recall(path) {
        return Ok(known);
    }
    let inspection = Inspection::open(path)?;
    if depth == Depth::Data {
        for file in 0..inspection.checkpoint().manifest().files.len() {
            inspection.checkpoint().verify_file(file)?;
        }
        inspection.remember();
    }
    Ok(inspection.summary)
}

/// Compares the manifest with itself and with the lengths of the files.
pub(crate) fn check_lengths(path: &Path) -> Result<(), Error> {
    Inspection::open(path).map(drop)
}

/// A checkpoint that is being verified, possibly by several ranks that share the files.
pub struct Inspection {
    checkpoint: Checkpoint,
    summary: Arc<Summary>,
}

impl Inspection {
    /// Opens a checkpoint, and compares the lengths of its files with the manifest. Of one without
    /// a checksum of its own, every slice must also be in the header of its file.
    ///
    /// # Errors
    /// If it is damaged, of another format, or cannot be read.
    pub fn open(path: &Path) -> Result<Inspection, Error> {
        Inspection::with_manifest(path, &Checkpoint::manifest_text(path)?)
    }

    /// As [`Inspection::open`], with the text of the manifest.
    ///
    /// # Errors
    /// As [`Inspection::open`].
    pub fn with_manifest(path: &Path, text: &[u8]) -> Result<Inspection, Error> {
        let inspection = Inspection::of(Checkpoint::with_manifest(path, text)?)?;
        inspection.checkpoint.check_unprotected()?;
        Ok(inspection)
    }

    /// As [`Inspection::open`], with a manifest that this process has just written.
    pub(crate) fn of_written(path: &Path, manifest: ParsedManifest) -> Result<Inspection, Error> {
        Inspection::of(Checkpoint::with_parsed(path, manifest)?)
    }

    fn of(checkpoint: Checkpoint) -> Result<Inspection, Error> {
        let summary = Arc::new(Summary::of(&checkpoint)?);
        Ok(Inspection {
            checkpoint,
            summary,
        })
    }

    /// Returns the open checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// True if this process has verified the checkpoint before and no file has changed since.
    pub fn is_known(&self) -> bool {
        verified::is_known(self.checkpoint.path(), &self.summary)
    }

    /// Remembers that all files had the right checksums, unless one has only just changed: the
    /// times of files have ticks, and another change in the same tick would not show.
    pub fn remember(&self) {
        verified::remember_read(self.checkpoint.path(), &self.summary);
    }

    /// Remembers that the files, now in the folder `path`, were read back when they were written.
    pub(crate) fn remember_written(self, path: &Path) {
        verified::remember_written(path, self.summary);
    }

    /// Returns the checkpoint, for reading its tensors.
    pub fn into_checkpoint(self) -> Checkpoint {
        self.checkpoint
    }
}

/// Renames the damaged checkpoints among `refused` to `step-NNNNNNNN.damaged`. Only the owner of
/// the run may call this. Returns the old and the new path of each.
///
/// # Errors
/// If `root` is a link, or a folder cannot be renamed.
pub fn set_damaged_aside(
    root: &Path,
    refused: &[Refused],
) -> Result<Vec<(PathBuf, PathBuf)>, Error> {
    let damaged = refused.iter().filter(|refused| refused.is_damaged);
    let Some(folder) = RunFolder::open_inside(root)? else {
        return Ok(Vec::new());
    };
    let mut renamed = Vec::new();
    for Refused { path, .. } in damaged {
        let name = path.file_name().and_then(|name| name.to_str());
        if let Some(name) = name {
            renamed.push((path.clone(), set_aside(&folder, name)?));
        }
    }
    Ok(renamed)
}

/// Renames `NAME` in the folder of checkpoints to `NAME.damaged`, or to the first free name of
/// `NAME.damaged-2`, `NAME.damaged-3` and so on.
pub(crate) fn set_aside(root: &RunFolder, name: &str) -> Result<PathBuf, Error> {
    let mut aside = format!("{name}.{DAMAGED}");
    let mut number = 2;
    while root.kind(&aside)?.is_some() {
        aside = format!("{name}.{DAMAGED}-{number}");
        number += 1;
    }
    root.rename(name, &aside)?;
    Ok(root.path().join(aside))
}

/// Removes what interrupted writes left under `root`: folders `step-NNNNNNNN.writing`,
/// `.keepers-writing` and `.removing`. Only the owner of the run may call this, before anything is
/// written. Returns what was removed.
///
/// A folder `.removing` with all its files gets its name back if no checkpoint has it: the one that
/// was to replace it, or the removal, did not get further.
///
/// # Errors
/// If `root` is a link, or a folder cannot be read, renamed or removed.
pub fn clean(root: &Path) -> Result<Vec<Leftover>, Error> {
    let Some(folder) = RunFolder::open_inside(root)? else {
        return Ok(Vec::new());
    };
    restore_replaced(&folder, &listing(root)?)?;
    let leftovers = with_sizes(root, &listing(root)?.leftovers)?;
    for Leftover { path, .. } in &leftovers {
        if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
            folder.remove(name)?;
        }
    }
    Ok(leftovers)
}

/// Renames each complete folder `step-NNNNNNNN.removing` back if no checkpoint has the name.
fn restore_replaced(folder: &RunFolder, found: &Listing) -> Result<(), Error> {
    for path in &found.leftovers {
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(name) = name.filter(|_| suffix_of(path) == Some(REMOVING)) else {
            continue;
        };
        let original = name.trim_end_matches(REMOVING).trim_end_matches('.');
        if folder.kind(original)?.is_some() {
            continue;
        }
        match check_lengths(path) {
            Ok(()) => {
                folder.rename(name, original)?;
                tracing::warn!("renamed {} back to {original}", path.display());
            }
            // A disk that fails says nothing about the contents.
            Err(error @ Error::Io { .. }) if !error.is_not_found() => return Err(error),
            Err(_) => {}
        }
    }
    Ok(())
}

fn with_sizes(root: &Path, paths: &[PathBuf]) -> Result<Vec<Leftover>, Error> {
    if paths.is_empty() {
        return Ok(Vec::new());
    }
    let folder = RunFolder::open(root)?;
    let leftover = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        Leftover {
            path: path.clone(),
            bytes: name.map_or(0, |name| folder.bytes(name)),
        }
    };
    Ok(paths.iter().map(leftover).collect())
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Returns what is in the folder `root`, and reads none of it. A missing folder is empty.
///
/// # Errors
/// If the folder cannot be read.
pub fn listing(root: &Path) -> Result<Listing, Error> {
    let mut listing = Listing::default();
    let failed = || Error::io("cannot read", root);
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(listing),
        Err(error) => return Err(failed()(error)),
    };
    for entry in entries {
        let entry = entry.map_err(failed())?;
        let path = entry.path();
        if let Some(step) = step_of(&path) {
            listing.candidates.push((step, path));
        } else if let Some(suffix) = suffix_of(&path) {
            let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
            // A file with the name of a leftover is none of ours.
            if LEFTOVER_SUFFIXES.contains(&suffix) && !is_file {
                listing.leftovers.push(path);
            } else if is_damaged_suffix(suffix) {
                listing.set_aside.push(path);
            }
        }
    }
    listing
        .candidates
        .sort_by_key(|(step, path)| (Reverse(*step), path.clone()));
    listing.set_aside.sort();
    listing.leftovers.sort();
    Ok(listing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Shard, Staging, TensorSlice, retain};
    use serde_json::Value;
    use std::os::unix::fs::symlink;
    use tch::Tensor;

    fn staged(root: &Path, step: u64) -> (Staging, Vec<Shard>) {
        let staging = Staging::new(root, step);
        staging.begin().unwrap();
        let values = Tensor::from_slice(&[step as f32, 1.0, 2.0]);
        let tensors = vec![(TensorSlice::whole("w", &[3]), values)];
        let shard = staging.write_shard(0, tensors).unwrap();
        (staging, vec![shard])
    }

    fn save(root: &Path, step: u64) -> PathBuf {
        let (staging, shards) = staged(root, step);
        staging.commit(shards, 1, Value::Null).unwrap()
    }

    fn shard_of(checkpoint: &Path) -> PathBuf {
        checkpoint.join("shard-00000.safetensors")
    }

    /// Changes the last byte of a checkpoint's shard.
    fn spoil(checkpoint: &Path) {
        // The clock of file times has ticks of some milliseconds.
        std::thread::sleep(std::time::Duration::from_millis(60));
        let shard = shard_of(checkpoint);
        let mut bytes = std::fs::read(&shard).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&shard, bytes).unwrap();
    }

    fn names(root: &Path) -> Vec<String> {
        RunFolder::open(root).unwrap().names().unwrap()
    }

    fn steps(survey: &Survey) -> (Vec<u64>, Vec<u64>) {
        let verified = survey.verified.iter().map(|verified| verified.step);
        let refused = survey.refused.iter().map(|refused| refused.step);
        (verified.collect(), refused.collect())
    }

    #[test]
    fn the_newest_is_the_newest_whose_data_is_right() {
        let root = tempfile::tempdir().unwrap();
        for step in [10, 20, 30, 40] {
            save(root.path(), step);
        }
        spoil(&root.path().join("step-00000040"));
        std::fs::remove_file(root.path().join("step-00000030/manifest.json")).unwrap();
        let found = newest(root.path(), Depth::Data).unwrap();
        assert_eq!(steps(&found), (vec![20], vec![40, 30]));
        assert!(found.refused[0].reason.contains("its checksum is"));
        assert!(found.refused[1].reason.contains("copied in part?"));
        // Lengths alone do not show a changed byte.
        let found = newest(root.path(), Depth::Lengths).unwrap();
        assert_eq!(steps(&found), (vec![40], vec![]));
        let all = survey(root.path(), Depth::Data).unwrap();
        assert_eq!(steps(&all), (vec![20, 10], vec![40, 30]));
        let since = newest_since(root.path(), 25, Depth::Data).unwrap();
        assert_eq!(steps(&since), (vec![], vec![40, 30]));
    }

    #[test]
    fn damaged_ones_are_set_aside_under_free_names() {
        let root = tempfile::tempdir().unwrap();
        save(root.path(), 10);
        for number in 1..4 {
            spoil(&save(root.path(), 20));
            let refused = newest(root.path(), Depth::Data).unwrap().refused;
            let renamed = set_damaged_aside(root.path(), &refused).unwrap();
            assert_eq!(renamed.len(), 1, "{number}");
        }
        let expected = [
            "step-00000010",
            "step-00000020.damaged",
            "step-00000020.damaged-2",
            "step-00000020.damaged-3",
        ];
        assert_eq!(names(root.path()), expected);
        let found = newest(root.path(), Depth::Data).unwrap();
        assert_eq!(steps(&found), (vec![10], vec![]));
        assert_eq!(found.set_aside.len(), 3);
    }

    /// A newer version's checkpoint is refused but not damaged, so it keeps its name.
    #[test]
    fn another_format_is_not_set_aside() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 20);
        std::fs::write(path.join(MANIFEST), r#"{"format": 4}"#).unwrap();
        let refused = newest(root.path(), Depth::Data).unwrap().refused;
        assert!(refused[0].reason.contains("newer than 3"));
        assert!(set_damaged_aside(root.path(), &refused).unwrap().is_empty());
        assert_eq!(names(root.path()), ["step-00000020"]);
        // A run that writes the step does not overwrite it.
        save(root.path(), 20);
        assert_eq!(
            names(root.path()),
            ["step-00000020", "step-00000020.damaged"]
        );
    }

    #[test]
    fn a_damaged_checkpoint_does_not_count_for_keep() {
        let root = tempfile::tempdir().unwrap();
        for step in [10, 50, 100] {
            save(root.path(), step);
        }
        spoil(&root.path().join("step-00000100"));
        save(root.path(), 60);
        retain(root.path(), 1, 60, |_| true).unwrap();
        assert_eq!(names(root.path()), ["step-00000060", "step-00000100"]);
        // The damaged one is older now.
        spoil(&root.path().join("step-00000060"));
        save(root.path(), 70);
        save(root.path(), 80);
        retain(root.path(), 2, 80, |_| true).unwrap();
        let kept = ["step-00000070", "step-00000080", "step-00000100"];
        assert_eq!(names(root.path()), kept);
    }

    #[test]
    fn a_good_one_stays_when_a_newer_one_is_damaged() {
        let root = tempfile::tempdir().unwrap();
        for step in [10, 20, 30] {
            save(root.path(), step);
        }
        spoil(&root.path().join("step-00000020"));
        retain(root.path(), 2, 30, |_| true).unwrap();
        let kept = ["step-00000010", "step-00000020", "step-00000030"];
        assert_eq!(names(root.path()), kept);
    }

    #[test]
    fn later_checkpoints_of_another_run_neither_count_nor_go() {
        let root = tempfile::tempdir().unwrap();
        for step in [100, 200, 50, 60] {
            save(root.path(), step);
            if step < 100 {
                retain(root.path(), 1, step, |_| true).unwrap();
            }
        }
        assert_eq!(
            names(root.path()),
            ["step-00000060", "step-00000100", "step-00000200"]
        );
    }

    #[test]
    fn leftovers_are_removed_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("file"), "kept").unwrap();
        save(root.path(), 10);
        let (staging, _) = staged(root.path(), 77);
        let bytes = std::fs::metadata(shard_of(staging.folder())).unwrap().len();
        std::fs::create_dir(root.path().join("step-00000005.removing")).unwrap();
        symlink(outside.path(), root.path().join("step-00000006.writing")).unwrap();
        std::fs::write(root.path().join("step-00000007.writing"), "a file").unwrap();
        std::fs::create_dir(root.path().join("notes.writing")).unwrap();
        let found = survey(root.path(), Depth::Lengths).unwrap().leftovers;
        let removed = clean(root.path()).unwrap();
        assert_eq!(removed, found);
        let sizes: Vec<u64> = removed.iter().map(|leftover| leftover.bytes).collect();
        assert_eq!(sizes, [0, 0, bytes]);
        assert!(
            removed[2]
                .to_string()
                .ends_with("step-00000077.writing (0.0 MB)")
        );
        let kept = ["notes.writing", "step-00000007.writing", "step-00000010"];
        assert_eq!(names(root.path()), kept);
        assert!(outside.path().join("file").exists());
        assert!(clean(&root.path().join("missing")).unwrap().is_empty());
    }

    /// A link in place of a checkpoint or of the whole folder.
    #[test]
    fn nothing_is_written_or_removed_through_a_link() {
        let outside = tempfile::tempdir().unwrap();
        let theirs = save(outside.path(), 10);
        let run = tempfile::tempdir().unwrap();
        let linked = run.path().join("checkpoints");
        symlink(outside.path(), &linked).unwrap();
        let begun = Staging::new(&linked, 20).begin().unwrap_err().to_string();
        assert!(
            begun.contains("checkpoints: it is a symbolic link"),
            "{begun}"
        );
        assert!(
            clean(&linked)
                .unwrap_err()
                .to_string()
                .contains("symbolic link")
        );
        assert_eq!(names(outside.path()), ["step-00000010"]);

        let root = run.path().join("own");
        std::fs::create_dir(&root).unwrap();
        symlink(&theirs, root.join("step-00000010")).unwrap();
        // It can be read: a run may begin from another run's checkpoint.
        assert_eq!(
            steps(&newest(&root, Depth::Data).unwrap()),
            (vec![10], vec![])
        );
        save(&root, 20);
        retain(&root, 1, 20, |_| true).unwrap();
        assert_eq!(names(&root), ["step-00000020"]);
        symlink(&theirs, root.join("step-00000030")).unwrap();
        save(&root, 30);
        assert!(
            !std::fs::symlink_metadata(root.join("step-00000030"))
                .unwrap()
                .is_symlink()
        );
        assert!(shard_of(&theirs).exists() && theirs.join(MANIFEST).exists());
        // A link in place of the folder that is being written.
        symlink(outside.path(), root.join("step-00000040.writing")).unwrap();
        save(&root, 40);
        assert_eq!(names(outside.path()), ["step-00000010"]);
    }

    #[test]
    fn a_verified_checkpoint_is_read_again_only_after_a_change() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 10);
        let is_known = || Inspection::open(&path).unwrap().is_known();
        assert!(is_known(), "this process wrote it");
        spoil(&path);
        assert!(!is_known());
        spoil(&path);
        verify(&path, Depth::Data).unwrap();
        assert!(!is_known(), "it has just changed");
        std::thread::sleep(std::time::Duration::from_millis(60));
        verify(&path, Depth::Data).unwrap();
        assert!(is_known());
        spoil(&path);
        assert!(verify(&path, Depth::Data).is_err());
        assert!(!is_known());
    }

    /// A keeper on another machine that does not share the disk writes to its own.
    #[test]
    fn a_shard_that_is_not_in_the_folder_is_not_committed() {
        let root = tempfile::tempdir().unwrap();
        let (staging, shards) = staged(root.path(), 10);
        std::fs::remove_file(shard_of(staging.folder())).unwrap();
        let refused = staging.commit(shards, 1, Value::Null).unwrap_err();
        assert!(refused.to_string().contains("it is missing"), "{refused}");
        assert!(
            newest(root.path(), Depth::Data)
                .unwrap()
                .verified
                .is_empty()
        );
    }
}
