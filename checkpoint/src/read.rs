//! Reading: the manifest, and tensors by their global names.

use crate::image::ImageHeader;
use crate::manifest::{FORMAT, FileEntry, Manifest, SliceEntry};
use crate::memory::fill;
use crate::write::{Shard, assemble};
use crate::{Error, TensorSlice};
use safetensors::tensor::{Dtype, Metadata};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// An open checkpoint, on disk or in the memory of keepers.
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    shards: BTreeMap<usize, OpenShard>,
    parts: Option<SnapshotParts>,
}

/// Shards that are not files of the folder.
struct SnapshotParts {
    heads: Vec<ImageHeader>,
    open: PartOpener,
}

/// Gives the file of a part, by number.
pub type PartOpener = Box<dyn FnMut(usize) -> Result<File, Error>>;

struct OpenShard {
    file: File,
    metadata: Metadata,
    data_start: u64,
}

/// The complete checkpoints under `root`, newest first. A folder that is not there holds none.
///
/// # Errors
/// When the folder cannot be read.
pub fn list(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("cannot read", root)(error)),
    };
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let step = path
                .file_name()?
                .to_str()?
                .strip_prefix("step-")?
                .parse()
                .ok()?;
            path.join("manifest.json").exists().then_some((step, path))
        })
        .collect();
    found.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

impl Checkpoint {
    /// Reads the manifest of the checkpoint in folder `path`.
    ///
    /// # Errors
    /// When it is missing, damaged, or of a newer format.
    pub fn open(path: &Path) -> Result<Checkpoint, Error> {
        let file = path.join("manifest.json");
        let text = std::fs::read(&file).map_err(Error::io("cannot open", &file))?;
        let damaged = |error: serde_json::Error| Error::damaged(&file, error.to_string());
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(damaged)?;
        if let Some(format) = value["format"]
            .as_u64()
            .filter(|&format| format != u64::from(FORMAT))
        {
            let age = if format > u64::from(FORMAT) {
                "newer"
            } else {
                "older"
            };
            return Err(Error::mismatch(
                &file,
                format!("format {format} is {age} than {FORMAT}, which this moerun reads"),
            ));
        }
        let manifest: Manifest = serde_json::from_value(value).map_err(damaged)?;
        Ok(Checkpoint {
            path: path.to_path_buf(),
            manifest,
            shards: BTreeMap::new(),
            parts: None,
        })
    }

    /// The checkpoint whose shards are images with these headers, which `open` opens when they are needed. `name` is what
    /// errors call it.
    ///
    /// # Errors
    /// When a tensor is missing or doubled.
    pub fn from_parts(
        name: &str,
        step: u64,
        heads: Vec<ImageHeader>,
        open: PartOpener,
    ) -> Result<Checkpoint, Error> {
        let path = PathBuf::from(name);
        let state = heads
            .first()
            .map(|head| head.state.clone())
            .unwrap_or_default();
        let expected = heads.first().map_or(0, |head| head.tensors);
        let shards = heads.iter().enumerate().map(|(part, head)| {
            let file = FileEntry {
                name: format!("part {part}"),
                bytes: 0,
                crc32c: 0,
            };
            Shard::new(file, head.slices.clone())
        });
        let (files, tensors) = assemble(&path, shards.collect(), expected)?;
        let manifest = Manifest {
            format: FORMAT,
            step,
            state,
            files,
            tensors,
        };
        Ok(Checkpoint {
            path,
            manifest,
            shards: BTreeMap::new(),
            parts: Some(SnapshotParts { heads, open }),
        })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The slice `slice` of a tensor, in host memory, whatever slices it was saved in.
    ///
    /// # Errors
    /// When there is no such tensor, its shape differs, or its file is damaged.
    pub fn tensor(&mut self, slice: &TensorSlice) -> Result<Tensor, Error> {
        let mut whole: Option<Tensor> = None;
        for (file, saved, begin, size) in self.overlaps(slice)? {
            let part = self.part(file, &saved, &begin, &size, None)?;
            if size == slice.shape {
                return Ok(part);
            }
            let whole = whole
                .get_or_insert_with(|| Tensor::zeros(&slice.shape, (part.kind(), part.device())));
            narrow_to(whole, slice, &begin, &size).copy_(&part);
        }
        // A tensor without values has no slices that overlap anything.
        Ok(whole.unwrap_or_else(|| Tensor::zeros(&slice.shape, (Kind::Float, tch::Device::Cpu))))
    }

    /// The same slice to `into`, of its shape: read to where it stays, if dtypes agree and rows lie together there.
    ///
    /// # Errors
    /// As for [`Checkpoint::tensor`]; `into` may have changed in part.
    pub fn tensor_into(&mut self, slice: &TensorSlice, into: &Tensor) -> Result<(), Error> {
        for (file, saved, begin, size) in self.overlaps(slice)? {
            let mut target = narrow_to(into, slice, &begin, &size);
            let part = self.part(file, &saved, &begin, &size, Some(&target))?;
            if part.data_ptr() != target.data_ptr() {
                tch::no_grad(|| target.copy_(&part));
            }
        }
        Ok(())
    }

    /// The slices that have something of `slice`: file, what was saved, and where in the global tensor the common slice begins and how
    /// large it is.
    fn overlaps(&self, slice: &TensorSlice) -> Result<Vec<Overlap>, Error> {
        let TensorSlice {
            name,
            global,
            offset,
            shape,
        } = slice;
        let Some(entry) = self.manifest.tensors.get(name) else {
            return Err(Error::mismatch(
                &self.path,
                format!("there is no tensor {name} in it"),
            ));
        };
        if entry.shape != *global {
            let reason = format!(
                "{name} has shape {:?}, the model's is {global:?}",
                entry.shape
            );
            return Err(Error::mismatch(&self.path, reason));
        }
        let of = |piece: &SliceEntry| {
            let offset_of_piece = piece.offset.clone();
            let shape_of_piece = piece.shape.clone();
            let saved = TensorSlice {
                name: name.clone(),
                global: global.clone(),
                offset: offset_of_piece,
                shape: shape_of_piece,
            };
            let (begin, size) = saved.overlap(offset, shape)?;
            Some((piece.file, saved, begin, size))
        };
        Ok(entry.slices.iter().filter_map(of).collect())
    }

    /// The slice at `begin` of size `size` of the global tensor, out of the piece `saved`: in `target`, where it can be read to that.
    fn part(
        &mut self,
        file: usize,
        saved: &TensorSlice,
        begin: &[i64],
        size: &[i64],
        target: Option<&Tensor>,
    ) -> Result<Tensor, Error> {
        let path = self.path.join(&self.manifest.files[file].name);
        let shard = match self.shards.entry(file) {
            std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::btree_map::Entry::Vacant(slot) => {
                slot.insert(match &mut self.parts {
                    None => open_shard(&path)?,
                    Some(parts) => {
                        let head = &parts.heads[file];
                        let metadata = head.metadata.clone();
                        let data_start = head.data_start;
                        OpenShard {
                            file: (parts.open)(file)?,
                            metadata,
                            data_start,
                        }
                    }
                })
            }
        };
        let name = saved.key();
        let info = shard
            .metadata
            .info(&name)
            .ok_or_else(|| Error::damaged(&path, format!("{name} is not in it")))?;
        let kind = match info.dtype {
            Dtype::F32 => Kind::Float,
            Dtype::BF16 => Kind::BFloat16,
            Dtype::I64 => Kind::Int64,
            Dtype::U8 => Kind::Uint8,
            other => {
                return Err(Error::damaged(
                    &path,
                    format!("{name} has the dtype {other:?}"),
                ));
            }
        };
        let (start, end) = info.data_offsets;
        if info
            .shape
            .iter()
            .map(|&n| n as i64)
            .ne(saved.shape.iter().copied())
        {
            return Err(Error::damaged(
                &path,
                format!("{name} is not of the shape in the manifest"),
            ));
        }
        // Only the rows that are wanted are read: they lie together.
        let mut shape = saved.shape.clone();
        let mut from = start;
        let mut len = end - start;
        if let (Some(rows), Some(first)) = (shape.first_mut(), begin.first()) {
            let row = len / (*rows).max(1) as usize;
            from += (first - saved.offset[0]) as usize * row;
            len = size[0] as usize * row;
            *rows = size[0];
        }
        let fits = |target: &&Tensor| {
            target.device() == Device::Cpu
                && target.kind() == kind
                && target.is_contiguous()
                && target.size() == shape
                && shape == size
        };
        let rows = match target.filter(fits) {
            Some(target) => target.shallow_clone(),
            None => Tensor::f_empty(&shape, (kind, Device::Cpu))
                .map_err(|e| Error::damaged(&path, e.to_string()))?,
        };
        if rows.numel() * kind.elt_size_in_bytes() != len {
            return Err(Error::damaged(
                &path,
                format!("{name} has {len} bytes, which is not its shape"),
            ));
        }
        let from = shard.data_start + from as u64;
        fill(&rows, |bytes| shard.file.read_exact_at(bytes, from))
            .map_err(Error::io("cannot read", &path))?;
        let narrow = |tensor: Tensor, dim: usize| {
            tensor.narrow(dim as i64, begin[dim] - saved.offset[dim], size[dim])
        };
        Ok((1..shape.len()).fold(rows, narrow))
    }
}

/// See [`Checkpoint::overlaps`].
type Overlap = (usize, TensorSlice, Vec<i64>, Vec<i64>);

/// The part of `whole`, which is the slice `slice` of a tensor, that is the slice at `begin` of size `size`.
fn narrow_to(whole: &Tensor, slice: &TensorSlice, begin: &[i64], size: &[i64]) -> Tensor {
    let narrow = |part: Tensor, (dim, (&begin, &size)): (usize, (&i64, &i64))| {
        part.narrow(dim as i64, begin - slice.offset[dim], size)
    };
    begin
        .iter()
        .zip(size)
        .enumerate()
        .fold(whole.shallow_clone(), narrow)
}

fn open_shard(path: &Path) -> Result<OpenShard, Error> {
    let (metadata, data_start) = parse_header(path)?;
    Ok(OpenShard {
        file: File::open(path).map_err(Error::io("cannot open", path))?,
        metadata,
        data_start,
    })
}

/// The header of a safetensors file, and where its data begins.
pub(crate) fn parse_header(path: &Path) -> Result<(Metadata, u64), Error> {
    let (head, file_len) = read_header(path)?;
    let metadata = parse_metadata(&head[8..], path)?;
    let announced = (metadata.data_len() + head.len()) as u64;
    if announced != file_len {
        return Err(Error::damaged(
            path,
            format!("{file_len} bytes where its header announces {announced}"),
        ));
    }
    Ok((metadata, head.len() as u64))
}

/// The first bytes of a safetensors file, its header's length and the header, and the length of the file.
pub(crate) fn read_header(path: &Path) -> Result<(Vec<u8>, u64), Error> {
    let mut file = File::open(path).map_err(Error::io("cannot open", path))?;
    let mut head = vec![0u8; 8];
    file.read_exact(&mut head)
        .map_err(Error::io("cannot read", path))?;
    let header_len = u64::from_le_bytes(head[..].try_into().expect("eight bytes"));
    let file_len = file
        .metadata()
        .map_err(Error::io("cannot read", path))?
        .len();
    if header_len.checked_add(8).is_none_or(|end| end > file_len) {
        return Err(Error::damaged(
            path,
            format!("its header of {header_len} bytes does not fit into {file_len}"),
        ));
    }
    head.resize(header_len as usize + 8, 0);
    file.read_exact(&mut head[8..])
        .map_err(Error::io("cannot read", path))?;
    Ok((head, file_len))
}

pub(crate) fn parse_metadata(header: &[u8], path: &Path) -> Result<Metadata, Error> {
    serde_json::from_slice(header).map_err(|e| Error::damaged(path, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Shard, Staging, retain};
    use proptest::prelude::*;

    fn shards(staging: &Staging) -> Vec<Shard> {
        staging.begin().unwrap();
        let first = vec![(
            TensorSlice::whole("a", &[2, 2]),
            Tensor::from_slice(&[1f32, 2., 3., 4.]).view([2, 2]),
        )];
        let second = vec![
            (TensorSlice::whole("b", &[1]), Tensor::from_slice(&[7i64])),
            (
                TensorSlice::whole("c", &[2]),
                Tensor::from_slice(&[0.5f32, 1.5]).to_kind(Kind::BFloat16),
            ),
        ];
        vec![
            staging.write_shard(0, first).unwrap(),
            staging.write_shard(1, second).unwrap(),
        ]
    }

    fn save(root: &Path, step: u64) -> PathBuf {
        let staging = Staging::new(root, step);
        let shards = shards(&staging);
        staging
            .commit(shards, 3, serde_json::json!({"note": step}))
            .unwrap()
    }

    #[test]
    fn tensors_come_back_by_name() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 5);
        let mut checkpoint = Checkpoint::open(&path).unwrap();
        (0..2).for_each(|file| checkpoint.verify_file(file).unwrap());
        assert_eq!(checkpoint.manifest().state["note"], 5);
        let mut get =
            |name: &str, shape: &[i64]| checkpoint.tensor(&TensorSlice::whole(name, shape));
        assert_eq!(
            Vec::<f32>::try_from(get("a", &[2, 2]).unwrap().flatten(0, -1)).unwrap(),
            [1., 2., 3., 4.]
        );
        assert_eq!(get("b", &[1]).unwrap().int64_value(&[0]), 7);
        assert_eq!(get("c", &[2]).unwrap().kind(), Kind::BFloat16);
        assert!(
            get("d", &[1])
                .unwrap_err()
                .to_string()
                .contains("there is no tensor d")
        );
        assert!(
            get("a", &[4])
                .unwrap_err()
                .to_string()
                .contains("[2, 2], the model's is [4]")
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn any_slice_comes_back_from_any_slices(
            rows in 1i64..7, columns in 1i64..7, cuts in (0i64..7, 0i64..7), wanted in (0i64..6, 0i64..6, 1i64..6, 1i64..6),
            narrow in 0i64..2,
        ) {
            let root = tempfile::tempdir().unwrap();
            let global = vec![rows, columns];
            let all = Tensor::arange(rows * columns, (Kind::Float, tch::Device::Cpu)).view([rows, columns]);
            let staging = Staging::new(root.path(), 1);
            staging.begin().unwrap();
            let (cut_row, cut_column) = (cuts.0.min(rows), cuts.1.min(columns));
            let mut shards = Vec::new();
            for (from_row, to_row) in [(0, cut_row), (cut_row, rows)] {
                for (from_column, to_column) in [(0, cut_column), (cut_column, columns)] {
                    let shape = vec![to_row - from_row, to_column - from_column];
                    if shape.contains(&0) {
                        continue;
                    }
                    let part = all.narrow(0, from_row, shape[0]).narrow(1, from_column, shape[1]);
                    let slice = TensorSlice { name: "w".into(), global: global.clone(), offset: vec![from_row, from_column], shape };
                    shards.push(staging.write_shard(shards.len(), vec![(slice, part)]).unwrap());
                }
            }
            let path = staging.commit(shards, 1, serde_json::Value::Null).unwrap();
            let offset = vec![wanted.0.min(rows - 1), wanted.1.min(columns - 1)];
            let shape = vec![wanted.2.min(rows - offset[0]), wanted.3.min(columns - offset[1])];
            let expected = all.narrow(0, offset[0], shape[0]).narrow(1, offset[1], shape[1]);
            let slice = TensorSlice { name: "w".into(), global, offset, shape };
            let mut checkpoint = Checkpoint::open(&path).unwrap();
            let into = Tensor::zeros([slice.shape[0] + 2, slice.shape[1] + narrow], (Kind::Float, tch::Device::Cpu));
            let target = into.narrow(0, 1, slice.shape[0]).narrow(1, 0, slice.shape[1]);
            checkpoint.tensor_into(&slice, &target).unwrap();
            prop_assert_eq!(&target, &expected);
            prop_assert_eq!(into.sum(Kind::Float), expected.sum(Kind::Float), "nothing beside it was written");
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
            global: vec![4],
            offset: vec![2],
            shape: vec![2],
        };
        let shard = staging
            .write_shard(0, vec![(half, Tensor::from_slice(&[1f32, 2.]))])
            .unwrap();
        let error = staging
            .commit(vec![shard], 1, serde_json::Value::Null)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("of the 4 values of w only 2 were written"),
            "{error}"
        );
    }

    #[test]
    fn the_newest_are_listed_and_kept() {
        let root = tempfile::tempdir().unwrap();
        for step in [3, 20, 100] {
            save(root.path(), step);
        }
        Staging::new(root.path(), 200).begin().unwrap();
        let steps = |root: &Path| {
            list(root)
                .unwrap()
                .iter()
                .map(|p| Checkpoint::open(p).unwrap().manifest().step)
                .collect::<Vec<_>>()
        };
        assert_eq!(steps(root.path()), [100, 20, 3]);
        retain(root.path(), 2).unwrap();
        assert_eq!(steps(root.path()), [100, 20]);
        assert!(list(&root.path().join("nowhere")).unwrap().is_empty());
        // The same step can be saved again.
        save(root.path(), 100);
        assert_eq!(steps(root.path()), [100, 20]);
    }

    #[test]
    fn missing_and_doubled_tensors_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let staging = Staging::new(root.path(), 1);
        let written = shards(&staging);
        let commit = |shards: Vec<Shard>, expected: usize| {
            staging
                .commit(shards, expected, serde_json::Value::Null)
                .unwrap_err()
                .to_string()
        };
        assert!(commit(written.clone(), 4).contains("3 tensors were written, 4 are expected"));
        assert!(commit(written.clone(), 2).contains("3 tensors were written, 2 are expected"));
        let doubled = [written.clone(), written].concat();
        assert!(commit(doubled, 3).contains("a is in two shards"));
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
        assert!(
            message().contains("shard-00000.safetensors is damaged")
                && message().contains("bytes where")
        );
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        std::fs::write(&shard, &flipped).unwrap();
        assert!(message().contains("checksum"));
        std::fs::write(path.join("manifest.json"), "{\"format\": 2,").unwrap();
        assert!(
            Checkpoint::open(&path)
                .err()
                .unwrap()
                .to_string()
                .contains("manifest.json is damaged")
        );
    }

    #[test]
    fn a_newer_format_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 1);
        let text = std::fs::read_to_string(path.join("manifest.json"))
            .unwrap()
            .replace("\"format\": 2", "\"format\": 9");
        std::fs::write(path.join("manifest.json"), text).unwrap();
        assert!(
            Checkpoint::open(&path)
                .err()
                .unwrap()
                .to_string()
                .contains("format 9 is newer")
        );
    }
}
