//! Reading checkpoints: the manifest, and tensors by their global names.

use crate::{
    Error, TensorSlice,
    assemble::Contents,
    checksum::FileChecksum,
    file_identity::FileIdentity,
    format::{ImageHeader, TensorIndex, kind_of},
    manifest::{FileEntry, Manifest, ParsedManifest},
    memory::with_tensor_bytes,
    names::{MANIFEST, step_of},
    run_folder::RunFolder,
    shard_names,
};
use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};
use tch::{Device, Kind, Tensor};

/// Length of a manifest at most.
const MAX_MANIFEST_BYTES: u64 = 1 << 30;

/// An open checkpoint, on disk or in the memory of keepers.
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    /// The manifest's checksum; `None` for a snapshot, and a manifest of an earlier version.
    checksum: Option<u32>,
    /// The open shards by their numbers.
    shards: BTreeMap<usize, OpenShard>,
    source: Source,
}

/// The place of a checkpoint's shards.
enum Source {
    /// Files of a folder.
    Folder(RunFolder),
    /// The parts of a snapshot.
    Snapshot {
        headers: Vec<ImageHeader>,
        open: PartOpener,
    },
}

/// Opens a part of a snapshot by its number.
pub type PartOpener = Box<dyn FnMut(usize) -> Result<File, Error> + Send>;

/// A stored slice and what it has in common with a requested one.
struct Overlap {
    /// The number of the shard.
    file: usize,
    saved: TensorSlice,
    common: TensorSlice,
}

impl Checkpoint {
    /// Reads the manifest of the checkpoint in the folder `path`, and checks it against its
    /// checksum, itself and the name of the folder.
    ///
    /// # Errors
    /// If the manifest is missing, damaged, or of another format.
    pub fn open(path: &Path) -> Result<Checkpoint, Error> {
        Checkpoint::with_manifest(path, &Checkpoint::manifest_text(path)?)
    }

    /// Reads the text of the manifest in the folder `path`, for [`Checkpoint::with_manifest`].
    ///
    /// # Errors
    /// If it is missing or cannot be read.
    pub fn manifest_text(path: &Path) -> Result<Vec<u8>, Error> {
        read_manifest(&RunFolder::open(path)?)
    }

    /// As [`Checkpoint::open`], with the text of the manifest, which another process may have read.
    ///
    /// # Errors
    /// If the manifest is damaged or of another format, or the folder cannot be opened.
    pub fn with_manifest(path: &Path, text: &[u8]) -> Result<Checkpoint, Error> {
        let file = path.join(MANIFEST);
        let parsed = Manifest::parse(text, &file)?;
        let step = parsed.manifest.step;
        if let Some(named) = step_of(path).filter(|&named| named != step) {
            let reason = format!("it is of step {step}, its folder of step {named}");
            return Err(Error::damaged(&file, reason));
        }
        Checkpoint::with_parsed(path, parsed)
    }

    /// Opens the folder `path` of a manifest that was checked.
    pub(crate) fn with_parsed(path: &Path, parsed: ParsedManifest) -> Result<Checkpoint, Error> {
        let ParsedManifest { manifest, checksum } = parsed;
        Ok(Checkpoint {
            path: path.to_path_buf(),
            manifest,
            checksum,
            shards: BTreeMap::new(),
            source: Source::Folder(RunFolder::open(path)?),
        })
    }

    /// Returns a note for the user if damage of the manifest could go unnoticed, because an earlier
    /// version wrote it without a checksum.
    pub fn note(&self) -> Option<String> {
        let is_unprotected = self.checksum.is_none() && matches!(self.source, Source::Folder(_));
        is_unprotected.then(|| {
            let manifest = self.path.join(MANIFEST);
            format!(
                "{} has no checksum, because an earlier version wrote it; the next checkpoint will",
                manifest.display()
            )
        })
    }

    /// Combines images with these headers to a checkpoint; `open` opens an image when it is
    /// needed. Errors call the checkpoint `name`.
    ///
    /// # Errors
    /// If a tensor is missing, incomplete, or in several images.
    pub fn from_parts(
        name: &str,
        step: u64,
        headers: Vec<ImageHeader>,
        open: PartOpener,
    ) -> Result<Checkpoint, Error> {
        let path = PathBuf::from(name);
        let first = headers.first();
        let state = first.map(|header| header.state.clone());
        let expected = first.map_or(0, |header| header.tensors);
        let numbered = headers.iter().enumerate();
        let shards = numbered.map(|(part, header)| {
            let file = FileEntry {
                name: format!("part {part}"),
                bytes: 0,
                crc32c: 0,
            };
            (file, header.slices.as_slice())
        });
        let contents = Contents::assemble(&path, shards, expected)?;
        let manifest = contents.into_manifest(step, state.unwrap_or_default());
        Ok(Checkpoint::of_images(path, manifest, headers, open))
    }

    /// Makes a checkpoint of images with these headers, which the manifest numbers as its files.
    pub(crate) fn of_images(
        path: PathBuf,
        manifest: Manifest,
        headers: Vec<ImageHeader>,
        open: PartOpener,
    ) -> Checkpoint {
        Checkpoint {
            path,
            manifest,
            checksum: None,
            shards: BTreeMap::new(),
            source: Source::Snapshot { headers, open },
        }
    }

    /// Returns the folder of the checkpoint.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the manifest of the checkpoint.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Compares the length and the checksum of the file with this number with the manifest.
    ///
    /// # Errors
    /// If either differs, or the file cannot be read.
    pub fn verify_file(&self, number: usize) -> Result<(), Error> {
        let expected = &self.manifest.files[number];
        let path = self.path.join(&expected.name);
        let file = self.open_file(number)?;
        let found = FileChecksum::of(&file, &path)?;
        if found.crc32c != expected.crc32c {
            let reason = format!(
                "its checksum is {:08x}, the manifest says {:08x}",
                found.crc32c, expected.crc32c
            );
            return Err(Error::damaged(&path, reason));
        }
        Ok(())
    }

    /// Compares a manifest without a checksum with the shards: each slice has to be in its file.
    /// Another manifest has a checksum, and it was written with the shards.
    ///
    /// # Errors
    /// If a slice is missing or has another shape, or a file cannot be read.
    pub(crate) fn check_unprotected(&self) -> Result<(), Error> {
        if self.checksum.is_some() {
            return Ok(());
        }
        let mut shards = Vec::new();
        for (number, entry) in self.manifest.files.iter().enumerate() {
            let path = self.path.join(&entry.name);
            let file = self.open_file(number)?;
            let index = TensorIndex::from_file(&file, &path)?;
            shards.push((path, OpenShard { file, index }));
        }
        for (name, entry) in &self.manifest.tensors {
            for stored in &entry.slices {
                let (path, shard) = &shards[stored.file];
                shard.find(&stored.of_tensor(name, &entry.shape), path)?;
            }
        }
        Ok(())
    }

    /// Opens the file with this number, and compares its length with the manifest.
    ///
    /// # Errors
    /// If it is missing, has another length, or is no regular file of the folder.
    pub(crate) fn open_file(&self, number: usize) -> Result<File, Error> {
        let (folder, entry) = self.file_entry(number)?;
        let path = self.path.join(&entry.name);
        let file = shard_names::open(folder, &entry.name);
        let file = file.map_err(|error| missing_is_damage(error, &path))?;
        let metadata = file.metadata().map_err(Error::io("cannot read", &path))?;
        check_len(metadata.len(), entry, &path)?;
        Ok(file)
    }

    /// Returns the identity of the file with this number, and compares its length with the
    /// manifest. Does not open it.
    ///
    /// # Errors
    /// If it is missing, has another length, or is no regular file of the folder.
    pub(crate) fn file_identity(&self, number: usize) -> Result<FileIdentity, Error> {
        let (folder, entry) = self.file_entry(number)?;
        let path = self.path.join(&entry.name);
        let status = shard_names::status(folder, &entry.name);
        let status = status.map_err(|error| missing_is_damage(error, &path))?;
        check_len(u64::try_from(status.st_size).unwrap_or(0), entry, &path)?;
        Ok(FileIdentity::of(&status))
    }

    /// Returns the identity of the manifest's file.
    ///
    /// # Errors
    /// If it is missing, or no regular file of the folder.
    pub(crate) fn manifest_identity(&self) -> Result<FileIdentity, Error> {
        let status = self.folder()?.file_status(MANIFEST)?;
        Ok(FileIdentity::of(&status))
    }

    fn folder(&self) -> Result<&RunFolder, Error> {
        match &self.source {
            Source::Folder(folder) => Ok(folder),
            Source::Snapshot { .. } => Err(Error::mismatch(&self.path, "a snapshot has no files")),
        }
    }

    fn file_entry(&self, number: usize) -> Result<(&RunFolder, &FileEntry), Error> {
        Ok((self.folder()?, &self.manifest.files[number]))
    }

    /// Returns a slice of a tensor in host memory, in whatever slices it was saved.
    ///
    /// # Errors
    /// If there is no such tensor, its shape differs, or its file is damaged.
    pub fn tensor(&mut self, slice: &TensorSlice) -> Result<Tensor, Error> {
        let mut whole: Option<Tensor> = None;
        for overlap in self.overlaps(slice)? {
            let part = self.read(&overlap, None)?;
            if overlap.common.shape == slice.shape {
                return Ok(part);
            }
            let whole = whole.get_or_insert_with(|| {
                let options = (part.kind(), part.device());
                Tensor::zeros(&slice.shape, options)
            });
            narrow_to(whole, slice, &overlap.common).copy_(&part);
        }
        // A tensor without values overlaps no saved slice.
        Ok(whole.unwrap_or_else(|| {
            let options = (Kind::Float, Device::Cpu);
            Tensor::zeros(&slice.shape, options)
        }))
    }

    /// Copies a slice of a tensor into `into`, which has its shape. If the dtypes agree and the
    /// rows of `into` are contiguous, the file is read directly into it.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`]; `into` may have changed in part.
    pub fn tensor_into(&mut self, slice: &TensorSlice, into: &Tensor) -> Result<(), Error> {
        for overlap in self.overlaps(slice)? {
            let mut target = narrow_to(into, slice, &overlap.common);
            let part = self.read(&overlap, Some(&target))?;
            if part.data_ptr() != target.data_ptr() {
                tch::no_grad(|| target.copy_(&part));
            }
        }
        Ok(())
    }

    /// Returns the stored slices that have something in common with `slice`.
    fn overlaps(&self, slice: &TensorSlice) -> Result<Vec<Overlap>, Error> {
        let name = &slice.name;
        let Some(entry) = self.manifest.tensors.get(name) else {
            let reason = format!("there is no tensor {name}");
            return Err(Error::mismatch(&self.path, reason));
        };
        if entry.shape != slice.global_shape {
            let reason = format!(
                "{name} has shape {:?}, the model needs {:?}",
                entry.shape, slice.global_shape
            );
            return Err(Error::mismatch(&self.path, reason));
        }
        let mut overlaps = Vec::new();
        for stored in &entry.slices {
            let saved = stored.of_tensor(name, &entry.shape);
            if let Some(common) = saved.overlap(slice) {
                overlaps.push(Overlap {
                    file: stored.file,
                    saved,
                    common,
                });
            }
        }
        Ok(overlaps)
    }

    /// Reads what a stored slice has in common with a requested one: into `target` if the bytes
    /// can be read directly into it, else into new memory.
    fn read(&mut self, overlap: &Overlap, target: Option<&Tensor>) -> Result<Tensor, Error> {
        let Overlap {
            file,
            saved,
            common,
        } = overlap;
        let path = self.path.join(&self.manifest.files[*file].name);
        let shard = self.shard(*file, &path)?;
        let stored = shard.find(saved, &path)?;
        // Rows are contiguous in the file, so only the wanted ones are read.
        let mut shape = saved.shape.clone();
        let mut start = stored.start;
        let mut len = stored.len;
        if let (Some(rows), Some(first)) = (shape.first_mut(), common.offset.first()) {
            let row_bytes = len / (*rows).max(1) as usize;
            start += (first - saved.offset[0]) as usize * row_bytes;
            len = common.shape[0] as usize * row_bytes;
            *rows = common.shape[0];
        }
        let kind = stored.kind;
        let reads_directly = |target: &&Tensor| {
            target.device() == Device::Cpu
                && target.kind() == kind
                && target.is_contiguous()
                && target.size() == shape
                && shape == common.shape
        };
        let rows = match target.filter(reads_directly) {
            Some(target) => target.shallow_clone(),
            None => Tensor::f_empty(&shape, (kind, Device::Cpu))
                .map_err(|e| Error::damaged(&path, e.to_string()))?,
        };
        let needed = rows.numel() * kind.elt_size_in_bytes();
        if needed != len {
            let name = saved.key();
            let reason = format!("{name} has {len} bytes, its shape needs {needed}");
            return Err(Error::damaged(&path, reason));
        }
        let position = shard.index.data_start + start as u64;
        with_tensor_bytes(&rows, |bytes| shard.file.read_exact_at(bytes, position))
            .map_err(Error::io("cannot read", &path))?;
        let mut part = rows;
        for dim in 1..shape.len() {
            let start = common.offset[dim] - saved.offset[dim];
            part = part.narrow(dim as i64, start, common.shape[dim]);
        }
        Ok(part)
    }

    /// Returns a shard, which it opens when it is first needed.
    fn shard(&mut self, file: usize, path: &Path) -> Result<&OpenShard, Error> {
        if !self.shards.contains_key(&file) {
            let shard = self.open_shard(file, path)?;
            self.shards.insert(file, shard);
        }
        Ok(&self.shards[&file])
    }

    fn open_shard(&mut self, number: usize, path: &Path) -> Result<OpenShard, Error> {
        if let Source::Snapshot { headers, open } = &mut self.source {
            return Ok(OpenShard {
                index: headers[number].index.clone(),
                file: open(number)?,
            });
        }
        let file = self.open_file(number)?;
        Ok(OpenShard {
            index: TensorIndex::from_file(&file, path)?,
            file,
        })
    }
}

fn missing_is_damage(error: Error, path: &Path) -> Error {
    if error.is_not_found() {
        return Error::damaged(path, "it is missing");
    }
    error
}

fn check_len(found: u64, entry: &FileEntry, path: &Path) -> Result<(), Error> {
    let expected = entry.bytes;
    if found == expected {
        return Ok(());
    }
    let reason = format!("the file has {found} bytes, the manifest says {expected}");
    Err(Error::damaged(path, reason))
}

/// Reads the manifest in the folder of a checkpoint.
fn read_manifest(folder: &RunFolder) -> Result<Vec<u8>, Error> {
    let path = folder.path().join(MANIFEST);
    let file = match folder.open_file(MANIFEST) {
        Err(error) if error.is_not_found() => {
            let is_empty = folder.names()?.is_empty();
            let contents = if is_empty {
                "no shards"
            } else {
                "shards and no manifest.json"
            };
            return Err(Error::Partial {
                path: folder.path().display().to_string(),
                contents,
            });
        }
        opened => opened?,
    };
    let mut text = Vec::new();
    let read = file.take(MAX_MANIFEST_BYTES).read_to_end(&mut text);
    read.map_err(Error::io("cannot read", &path))?;
    Ok(text)
}

struct OpenShard {
    file: File,
    index: TensorIndex,
}

/// A slice as it is stored in a file.
struct StoredSlice {
    kind: Kind,
    /// The position of the first byte, relative to that of the first tensor.
    start: usize,
    /// The number of bytes.
    len: usize,
}

impl OpenShard {
    /// Finds a slice in the file and compares its shape. Errors name `path`.
    fn find(&self, saved: &TensorSlice, path: &Path) -> Result<StoredSlice, Error> {
        let name = saved.key();
        let damaged = |reason: String| Error::damaged(path, reason);
        let info = self.index.metadata.info(&name);
        let info = info.ok_or_else(|| damaged(format!("{name} is missing")))?;
        let unsupported = || damaged(format!("{name} has unsupported dtype {:?}", info.dtype));
        let kind = kind_of(info.dtype).ok_or_else(unsupported)?;
        let shape: Vec<i64> = info.shape.iter().map(|&size| size as i64).collect();
        if shape != saved.shape {
            return Err(damaged(format!(
                "{name} has shape {shape:?}, the manifest says {:?}",
                saved.shape
            )));
        }
        let (start, end) = info.data_offsets;
        Ok(StoredSlice {
            kind,
            start,
            len: end - start,
        })
    }
}

/// Returns the part of `whole` that holds `inner`, where `whole` holds `outer`.
fn narrow_to(whole: &Tensor, outer: &TensorSlice, inner: &TensorSlice) -> Tensor {
    let mut part = whole.shallow_clone();
    for dim in 0..inner.shape.len() {
        let start = inner.offset[dim] - outer.offset[dim];
        part = part.narrow(dim as i64, start, inner.shape[dim]);
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Shard, Staging,
        folder::{Depth, newest, verify},
        list, retain,
    };
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn write_shards(staging: &Staging) -> Vec<Shard> {
        staging.begin().unwrap();
        let a = Tensor::from_slice(&[1f32, 2., 3., 4.]).view([2, 2]);
        let first = vec![(TensorSlice::whole("a", &[2, 2]), a)];
        let b = Tensor::from_slice(&[7i64]);
        let c = Tensor::from_slice(&[0.5f32, 1.5]).to_kind(Kind::BFloat16);
        let second = vec![
            (TensorSlice::whole("b", &[1]), b),
            (TensorSlice::whole("c", &[2]), c),
        ];
        vec![
            staging.write_shard(0, first).unwrap(),
            staging.write_shard(1, second).unwrap(),
        ]
    }

    fn save(root: &Path, step: u64) -> PathBuf {
        let staging = Staging::new(root, step);
        let shards = write_shards(&staging);
        let state = json!({"note": step});
        staging.commit(shards, 3, state).unwrap()
    }

    fn open_error(path: &Path) -> String {
        Checkpoint::open(path).err().unwrap().to_string()
    }

    #[test]
    fn tensors_come_back_by_name() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 5);
        let mut checkpoint = Checkpoint::open(&path).unwrap();
        for file in 0..2 {
            checkpoint.verify_file(file).unwrap();
        }
        assert_eq!(checkpoint.manifest().state["note"], 5);
        let mut get = |name: &str, shape: &[i64]| {
            let slice = TensorSlice::whole(name, shape);
            checkpoint.tensor(&slice)
        };
        let a = get("a", &[2, 2]).unwrap().flatten(0, -1);
        assert_eq!(Vec::<f32>::try_from(a).unwrap(), [1., 2., 3., 4.]);
        assert_eq!(get("b", &[1]).unwrap().int64_value(&[0]), 7);
        assert_eq!(get("c", &[2]).unwrap().kind(), Kind::BFloat16);
        let unknown = get("d", &[1]).unwrap_err().to_string();
        assert!(unknown.contains("there is no tensor d"), "{unknown}");
        let misshapen = get("a", &[4]).unwrap_err().to_string();
        let expected = "a has shape [2, 2], the model needs [4]";
        assert!(misshapen.contains(expected), "{misshapen}");
    }

    /// Writes a matrix in up to four slices, cut at a row and a column.
    fn write_in_slices(root: &Path, matrix: &Tensor, cut_row: i64, cut_column: i64) -> PathBuf {
        let staging = Staging::new(root, 1);
        staging.begin().unwrap();
        let global_shape = matrix.size();
        let mut shards = Vec::new();
        for rows in [0..cut_row, cut_row..global_shape[0]] {
            for columns in [0..cut_column, cut_column..global_shape[1]] {
                let slice = TensorSlice {
                    name: "w".into(),
                    global_shape: global_shape.clone(),
                    offset: vec![rows.start, columns.start],
                    shape: vec![rows.end - rows.start, columns.end - columns.start],
                };
                if slice.shape.contains(&0) {
                    continue;
                }
                let whole = TensorSlice::whole("w", &global_shape);
                let part = narrow_to(matrix, &whole, &slice);
                let shard = staging.write_shard(shards.len(), vec![(slice, part)]);
                shards.push(shard.unwrap());
            }
        }
        staging.commit(shards, 1, Value::Null).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn any_slice_comes_back_from_any_slices(
            rows in 1i64..7,
            columns in 1i64..7,
            cuts in (0i64..7, 0i64..7),
            offsets in (0i64..6, 0i64..6),
            sizes in (1i64..6, 1i64..6),
            more_columns in 0i64..2,
        ) {
            let root = tempfile::tempdir().unwrap();
            let options = (Kind::Float, Device::Cpu);
            let all = Tensor::arange(rows * columns, options).view([rows, columns]);
            let cut_row = cuts.0.min(rows);
            let cut_column = cuts.1.min(columns);
            let path = write_in_slices(root.path(), &all, cut_row, cut_column);
            let offset = vec![offsets.0.min(rows - 1), offsets.1.min(columns - 1)];
            let shape = vec![sizes.0.min(rows - offset[0]), sizes.1.min(columns - offset[1])];
            let slice = TensorSlice {
                name: "w".into(),
                global_shape: vec![rows, columns],
                offset,
                shape,
            };
            let whole = TensorSlice::whole("w", &slice.global_shape);
            let expected = narrow_to(&all, &whole, &slice);
            let mut checkpoint = Checkpoint::open(&path).unwrap();
            let into = Tensor::zeros(
                [slice.shape[0] + 2, slice.shape[1] + more_columns],
                options,
            );
            let target = into
                .narrow(0, 1, slice.shape[0])
                .narrow(1, 0, slice.shape[1]);
            checkpoint.tensor_into(&slice, &target).unwrap();
            prop_assert_eq!(&target, &expected);
            let written = into.sum(Kind::Float);
            prop_assert_eq!(written, expected.sum(Kind::Float), "nothing else was written");
            let other = target.to_kind(Kind::Double).zeros_like();
            checkpoint.tensor_into(&slice, &other).unwrap();
            prop_assert_eq!(other.to_kind(Kind::Float), expected.copy());
            prop_assert_eq!(checkpoint.tensor(&slice).unwrap(), expected);
        }
    }

    #[test]
    fn a_tensor_with_a_hole_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let staging = Staging::new(root.path(), 1);
        staging.begin().unwrap();
        let half = TensorSlice {
            name: "w".into(),
            global_shape: vec![4],
            offset: vec![2],
            shape: vec![2],
        };
        let values = Tensor::from_slice(&[1f32, 2.]);
        let shard = staging.write_shard(0, vec![(half, values)]).unwrap();
        let error = staging.commit(vec![shard], 1, Value::Null).unwrap_err();
        let expected = "w is incomplete: 2 of 4 values were written";
        assert!(error.to_string().contains(expected), "{error}");
    }

    #[test]
    fn the_newest_are_listed_and_kept() {
        let root = tempfile::tempdir().unwrap();
        for step in [3, 20, 100] {
            save(root.path(), step);
        }
        Staging::new(root.path(), 200).begin().unwrap();
        let steps = || -> Vec<u64> {
            let paths = list(root.path()).unwrap();
            paths
                .iter()
                .map(|path| Checkpoint::open(path).unwrap())
                .map(|checkpoint| checkpoint.manifest().step)
                .collect()
        };
        assert_eq!(steps(), [100, 20, 3]);
        assert!(retain(root.path(), 2, 100, |_| true).unwrap().is_empty());
        assert_eq!(steps(), [100, 20]);
        assert!(list(&root.path().join("nowhere")).unwrap().is_empty());
        // A step can be saved a second time.
        save(root.path(), 100);
        assert_eq!(steps(), [100, 20]);
    }

    #[test]
    fn missing_and_doubled_tensors_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let staging = Staging::new(root.path(), 1);
        let written = write_shards(&staging);
        let commit = |shards: Vec<Shard>, expected: usize| {
            let result = staging.commit(shards, expected, Value::Null);
            result.unwrap_err().to_string()
        };
        let missing = commit(written.clone(), 4);
        assert!(missing.contains("3 tensors were written, 4 are expected"));
        let unexpected = commit(written.clone(), 2);
        assert!(unexpected.contains("3 tensors were written, 2 are expected"));
        let doubled = commit([written.clone(), written].concat(), 3);
        assert!(doubled.contains("a is in two shards, 0 and 2"));
        assert!(list(root.path()).unwrap().is_empty());
    }

    #[test]
    fn a_truncated_or_changed_file_is_refused_by_name() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 1);
        let shard = path.join("shard-00000.safetensors");
        let good = std::fs::read(&shard).unwrap();
        let message = || {
            let checkpoint = Checkpoint::open(&path).unwrap();
            checkpoint.verify_file(0).unwrap_err().to_string()
        };
        std::fs::write(&shard, &good[..good.len() - 3]).unwrap();
        let truncated = message();
        assert!(truncated.contains("shard-00000.safetensors is damaged"));
        assert!(
            truncated.contains("bytes, the manifest says"),
            "{truncated}"
        );
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        std::fs::write(&shard, &flipped).unwrap();
        assert!(message().contains("checksum"));
        std::fs::write(path.join("manifest.json"), "{\"format\": 2,").unwrap();
        assert!(open_error(&path).contains("manifest.json is damaged"));
    }

    /// Changes a manifest as an earlier version would have written it, without a checksum.
    fn rewrite_manifest(path: &Path, change: impl FnOnce(&mut Value)) {
        let file = path.join(MANIFEST);
        let mut manifest: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        manifest.as_object_mut().unwrap().remove("crc32c").unwrap();
        change(&mut manifest);
        std::fs::write(&file, manifest.to_string()).unwrap();
    }

    #[test]
    fn another_format_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 1);
        for (format, expected) in [
            (9, "format 9 is newer than 3"),
            (1, "format 1 is older than 2"),
        ] {
            rewrite_manifest(&path, |manifest| manifest["format"] = json!(format));
            assert!(open_error(&path).contains(expected));
            save(root.path(), 1);
        }
    }

    #[test]
    fn a_manifest_without_a_checksum_is_read_and_reported() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 1);
        assert_eq!(Checkpoint::open(&path).unwrap().note(), None);
        rewrite_manifest(&path, |_| ());
        let note = Checkpoint::open(&path).unwrap().note().unwrap();
        assert!(note.contains("manifest.json has no checksum"), "{note}");
    }

    /// Damage of a manifest without a checksum must not make `retain` remove an older checkpoint.
    #[test]
    fn a_manifest_without_a_checksum_has_to_agree_with_its_shards() {
        let root = tempfile::tempdir().unwrap();
        let older = save(root.path(), 1);
        let path = save(root.path(), 2);
        let in_other_file = |manifest: &mut Value| {
            manifest["tensors"]["a"]["pieces"][0]["file"] = json!(1);
        };
        let renamed = |manifest: &mut Value| {
            let tensors = manifest["tensors"].as_object_mut().unwrap();
            let entry = tensors.remove("a").unwrap();
            tensors.insert("e".into(), entry);
        };
        let transposed = |manifest: &mut Value| {
            manifest["tensors"]["a"]["shape"] = json!([4, 1]);
            manifest["tensors"]["a"]["pieces"][0]["shape"] = json!([4, 1]);
        };
        let changes: [&dyn Fn(&mut Value); 3] = [&in_other_file, &renamed, &transposed];
        let reasons = [
            "a is missing",
            "e is missing",
            "a has shape [2, 2], the manifest says [4, 1]",
        ];
        for (change, reason) in changes.into_iter().zip(reasons) {
            save(root.path(), 2);
            rewrite_manifest(&path, change);
            let refused = verify(&path, Depth::Lengths).unwrap_err();
            assert!(refused.is_damage(), "{refused}");
            assert!(refused.to_string().contains(reason), "{refused}");
            retain(root.path(), 1, 2, |_| true).unwrap();
            assert_eq!(
                newest(root.path(), Depth::Data).unwrap().verified[0].path,
                older
            );
            std::fs::remove_dir_all(&path).unwrap();
        }
        save(root.path(), 2);
        rewrite_manifest(&path, |_| ());
        verify(&path, Depth::Data).unwrap();
        retain(root.path(), 1, 2, |_| true).unwrap();
        assert!(!older.exists());
    }

    #[test]
    fn a_checkpoint_of_another_step_than_its_folder_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 5);
        let renamed = root.path().join("step-00000009");
        std::fs::rename(&path, &renamed).unwrap();
        let refused = open_error(&renamed);
        assert!(
            refused.contains("it is of step 5, its folder of step 9"),
            "{refused}"
        );
        // A name of the user's says no step.
        let best = root.path().join("best");
        std::fs::rename(&renamed, &best).unwrap();
        assert_eq!(Checkpoint::open(&best).unwrap().manifest().step, 5);
    }

    #[test]
    fn a_shard_is_a_regular_file_of_the_folder() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 1);
        let shard = path.join("shard-00000.safetensors");
        let outside = root.path().join("outside");
        std::fs::rename(&shard, &outside).unwrap();
        let error = |message: &str| {
            let checkpoint = Checkpoint::open(&path).unwrap();
            let refused = checkpoint.verify_file(0).unwrap_err().to_string();
            assert!(refused.contains("shard-00000.safetensors"), "{refused}");
            assert!(refused.contains(message), "{refused}");
            let mut checkpoint = Checkpoint::open(&path).unwrap();
            checkpoint
                .tensor(&TensorSlice::whole("a", &[2, 2]))
                .unwrap_err();
        };
        error("it is missing");
        std::os::unix::fs::symlink(&outside, &shard).unwrap();
        error("it is a symbolic link");
        std::fs::remove_file(&shard).unwrap();
        nix::unistd::mkfifo(&shard, nix::sys::stat::Mode::S_IRWXU).unwrap();
        error("it is a pipe");
        std::fs::remove_file(&shard).unwrap();
        std::fs::create_dir(&shard).unwrap();
        error("it is a folder");
    }

    #[test]
    fn a_folder_without_a_manifest_is_reported() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 1);
        std::fs::remove_file(path.join(MANIFEST)).unwrap();
        let refused = open_error(&path);
        assert!(
            refused.contains("step-00000001 has shards and no manifest.json"),
            "{refused}"
        );
        assert!(refused.contains("copied in part?"), "{refused}");
        std::os::unix::fs::symlink("nowhere", path.join(MANIFEST)).unwrap();
        assert!(open_error(&path).contains("it is a symbolic link"));
    }

    #[test]
    fn the_manifest_keeps_the_keys_of_format_2() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 1);
        let text = std::fs::read_to_string(path.join("manifest.json")).unwrap();
        let manifest: Value = serde_json::from_str(&text).unwrap();
        let expected = json!({
            "shape": [1],
            "pieces": [{"file": 1, "offset": [0], "shape": [1]}],
        });
        assert_eq!(manifest["tensors"]["b"], expected);
        let keys: Vec<&String> = manifest.as_object().unwrap().keys().collect();
        assert_eq!(
            keys,
            ["format", "step", "state", "files", "tensors", "crc32c"]
        );
    }
}
