//! Reading: the manifest, and tensors by their global names.

use crate::Error;
use crate::manifest::{FORMAT, Manifest};
use safetensors::tensor::{Dtype, Metadata};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// An open checkpoint.
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    shards: BTreeMap<usize, OpenShard>,
}

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
            let step = path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?;
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
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| Error::damaged(&file, e.to_string()))?;
        if manifest.format > FORMAT {
            let reason = format!("format {} is newer than this moerun, which knows up to {FORMAT}", manifest.format);
            return Err(Error::mismatch(&file, reason));
        }
        Ok(Checkpoint { path: path.to_path_buf(), manifest, shards: BTreeMap::new() })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The tensor `name`, in host memory.
    ///
    /// # Errors
    /// When there is none, or its file is damaged.
    pub fn tensor(&mut self, name: &str) -> Result<Tensor, Error> {
        let number = *self
            .manifest
            .tensors
            .get(name)
            .ok_or_else(|| Error::mismatch(&self.path, format!("there is no tensor {name} in it")))?;
        let path = self.path.join(&self.manifest.files[number].name);
        let shard = match self.shards.entry(number) {
            std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::btree_map::Entry::Vacant(slot) => slot.insert(open_shard(&path)?),
        };
        let info = shard.metadata.info(name).ok_or_else(|| Error::damaged(&path, format!("{name} is not in it")))?;
        let kind = match info.dtype {
            Dtype::F32 => Kind::Float,
            Dtype::BF16 => Kind::BFloat16,
            Dtype::I64 => Kind::Int64,
            Dtype::U8 => Kind::Uint8,
            other => return Err(Error::damaged(&path, format!("{name} has the dtype {other:?}"))),
        };
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0u8; end - start];
        shard
            .file
            .read_exact_at(&mut bytes, shard.data_start + start as u64)
            .map_err(Error::io("cannot read", &path))?;
        let shape: Vec<i64> = info.shape.iter().map(|&n| n as i64).collect();
        Tensor::f_from_data_size(&bytes, &shape, kind).map_err(|e| Error::damaged(&path, format!("{name}: {e}")))
    }

    /// The tensor `name`, which must have the shape `shape`.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`], and when the shape differs.
    pub fn tensor_of_shape(&mut self, name: &str, shape: &[i64]) -> Result<Tensor, Error> {
        let tensor = self.tensor(name)?;
        if tensor.size() != shape {
            let reason = format!("{name} has shape {:?}, the model's is {shape:?}", tensor.size());
            return Err(Error::mismatch(&self.path, reason));
        }
        Ok(tensor)
    }
}

fn open_shard(path: &Path) -> Result<OpenShard, Error> {
    let (metadata, data_start) = parse_header(path)?;
    Ok(OpenShard { file: File::open(path).map_err(Error::io("cannot open", path))?, metadata, data_start })
}

/// The header of a safetensors file, and where its data begins.
pub(crate) fn parse_header(path: &Path) -> Result<(Metadata, u64), Error> {
    let mut file = File::open(path).map_err(Error::io("cannot open", path))?;
    let mut length = [0u8; 8];
    file.read_exact(&mut length).map_err(Error::io("cannot read", path))?;
    let header_len = u64::from_le_bytes(length);
    let file_len = file.metadata().map_err(Error::io("cannot read", path))?.len();
    if header_len.checked_add(8).is_none_or(|end| end > file_len) {
        return Err(Error::damaged(path, format!("its header of {header_len} bytes does not fit into {file_len}")));
    }
    let mut header = vec![0u8; header_len as usize];
    file.read_exact(&mut header).map_err(Error::io("cannot read", path))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| Error::damaged(path, e.to_string()))?;
    if metadata.data_len() as u64 + 8 + header_len != file_len {
        let reason =
            format!("{file_len} bytes where its header announces {}", metadata.data_len() as u64 + 8 + header_len);
        return Err(Error::damaged(path, reason));
    }
    Ok((metadata, header_len + 8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Shard, Staging, retain};

    fn shards(staging: &Staging) -> Vec<Shard> {
        staging.begin().unwrap();
        let first = vec![("a".to_string(), Tensor::from_slice(&[1f32, 2., 3., 4.]).view([2, 2]))];
        let second = vec![
            ("b".to_string(), Tensor::from_slice(&[7i64])),
            ("c".to_string(), Tensor::from_slice(&[0.5f32, 1.5]).to_kind(Kind::BFloat16)),
        ];
        vec![staging.write_shard(0, first).unwrap(), staging.write_shard(1, second).unwrap()]
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    fn save(root: &Path, step: u64) -> PathBuf {
        let staging = Staging::new(root, step);
        let shards = shards(&staging);
        staging.commit(shards, &names(&["a", "b", "c"]), serde_json::json!({"note": step})).unwrap()
    }

    #[test]
    fn tensors_come_back_by_name() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 5);
        let mut checkpoint = Checkpoint::open(&path).unwrap();
        (0..2).for_each(|file| checkpoint.verify_file(file).unwrap());
        assert_eq!(checkpoint.manifest().state["note"], 5);
        assert_eq!(
            Vec::<f32>::try_from(checkpoint.tensor_of_shape("a", &[2, 2]).unwrap().flatten(0, -1)).unwrap(),
            [1., 2., 3., 4.]
        );
        assert_eq!(checkpoint.tensor("b").unwrap().int64_value(&[0]), 7);
        assert_eq!(checkpoint.tensor("c").unwrap().kind(), Kind::BFloat16);
        assert!(checkpoint.tensor("d").unwrap_err().to_string().contains("there is no tensor d"));
        assert!(checkpoint.tensor_of_shape("a", &[4]).unwrap_err().to_string().contains("[2, 2], the model's is [4]"));
    }

    #[test]
    fn the_newest_are_listed_and_kept() {
        let root = tempfile::tempdir().unwrap();
        for step in [3, 20, 100] {
            save(root.path(), step);
        }
        Staging::new(root.path(), 200).begin().unwrap();
        let steps = |root: &Path| {
            list(root).unwrap().iter().map(|p| Checkpoint::open(p).unwrap().manifest().step).collect::<Vec<_>>()
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
        let commit = |shards: Vec<Shard>, expected: &[&str]| {
            staging.commit(shards, &names(expected), serde_json::Value::Null).unwrap_err().to_string()
        };
        assert!(commit(written.clone(), &["a", "b", "c", "d"]).contains("d was written by no rank"));
        assert!(commit(written.clone(), &["a", "b"]).contains("3 tensors were written, 2 are expected"));
        let doubled = [written.clone(), written].concat();
        assert!(commit(doubled, &["a", "b", "c"]).contains("a is in two shards"));
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
        assert!(message().contains("shard-00000.safetensors is damaged") && message().contains("bytes where"));
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        std::fs::write(&shard, &flipped).unwrap();
        assert!(message().contains("checksum"));
        std::fs::write(path.join("manifest.json"), "{\"format\": 1,").unwrap();
        assert!(Checkpoint::open(&path).err().unwrap().to_string().contains("manifest.json is damaged"));
    }

    #[test]
    fn a_newer_format_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 1);
        let text =
            std::fs::read_to_string(path.join("manifest.json")).unwrap().replace("\"format\": 1", "\"format\": 9");
        std::fs::write(path.join("manifest.json"), text).unwrap();
        assert!(Checkpoint::open(&path).err().unwrap().to_string().contains("format 9 is newer"));
    }
}
