//! Writing: every rank its shard, then one rank the manifest and the name.

use crate::checksum::RunningCrc;
use crate::image::ImageHeader;
use crate::manifest::{FORMAT, FileEntry, Manifest, SliceEntry, TensorEntry};
use crate::read::{list, parse_header};
use crate::{Checkpoint, Error, TensorSlice};
use safetensors::tensor::{Dtype, View};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// A checkpoint that is being written: `step-NNNNNNNN.writing` in the folder of all checkpoints.
#[derive(Debug, Clone)]
pub struct Staging {
    folder: PathBuf,
    target: PathBuf,
    step: u64,
}

/// What one rank wrote.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shard {
    file: FileEntry,
    slices: Vec<TensorSlice>,
}

/// A tensor as safetensors wants to see it.
struct TensorBytes {
    dtype: Dtype,
    shape: Vec<usize>,
    tensor: Tensor,
}

impl View for TensorBytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        // One tensor at a time is copied out of libtorch's memory, while it is written.
        let tensor = self.tensor.to_device(Device::Cpu).contiguous();
        let mut bytes = vec![0u8; self.data_len()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        Cow::Owned(bytes)
    }
    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// The dtypes that are saved.
pub(crate) fn dtype_of(kind: Kind) -> Option<Dtype> {
    Some(match kind {
        Kind::Float => Dtype::F32,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Int64 => Dtype::I64,
        Kind::Uint8 => Dtype::U8,
        _ => return None,
    })
}

impl Shard {
    pub(crate) fn new(file: FileEntry, slices: Vec<TensorSlice>) -> Shard {
        Shard { file, slices }
    }
}

impl Staging {
    /// The folder that shards are written to.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The place for step `step` under `root`. Makes nothing.
    pub fn new(root: &Path, step: u64) -> Staging {
        let target = root.join(format!("step-{step:08}"));
        Staging {
            folder: target.with_extension("writing"),
            target,
            step,
        }
    }

    /// Makes the folder, empty. One rank does it before any writes.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn begin(&self) -> Result<(), Error> {
        self.discard();
        std::fs::create_dir_all(&self.folder).map_err(Error::io("cannot make", &self.folder))
    }

    /// Removes what was written; a failed save leaves nothing behind.
    pub fn discard(&self) {
        // What is not there need not be removed; what cannot be removed is never read.
        let _ = std::fs::remove_dir_all(&self.folder);
    }

    /// Writes this rank's shard, makes it durable and reads it back.
    ///
    /// # Errors
    /// When the disk is full or gives back other bytes.
    pub fn write_shard(
        &self,
        rank: usize,
        tensors: Vec<(TensorSlice, Tensor)>,
    ) -> Result<Shard, Error> {
        let name = format!("shard-{rank:05}.safetensors");
        let path = self.folder.join(&name);
        let slices: Vec<TensorSlice> = tensors.iter().map(|(place, _)| place.clone()).collect();
        let mut views = Vec::with_capacity(tensors.len());
        for (place, tensor) in tensors {
            let name = place.key();
            let dtype = dtype_of(tensor.kind()).ok_or_else(|| {
                Error::mismatch(
                    &path,
                    format!("{name} has a dtype that is not saved: {:?}", tensor.kind()),
                )
            })?;
            let shape = tensor.size().iter().map(|&n| n as usize).collect();
            views.push((
                name,
                TensorBytes {
                    dtype,
                    shape,
                    tensor,
                },
            ));
        }
        safetensors::serialize_to_file(views, None, &path).map_err(|error| match error {
            safetensors::SafeTensorError::IoError(source) => {
                Error::io("cannot write", &path)(source)
            }
            other => Error::mismatch(&path, other.to_string()),
        })?;
        let file = File::open(&path).map_err(Error::io("cannot open", &path))?;
        file.sync_all().map_err(Error::io("cannot write", &path))?;
        let (bytes, crc32c) = checksum(&path)?;
        // A header that reads back proves that the lengths in it fit the file.
        parse_header(&path)?;
        Ok(Shard {
            file: FileEntry {
                name,
                bytes,
                crc32c,
            },
            slices,
        })
    }

    /// Writes the manifest, makes everything durable and gives the checkpoint its name. One rank does it, after all
    /// have written; `tensors` is the number of names that must be there, each whole and once.
    ///
    /// # Errors
    /// When a tensor is missing or doubled, or the file system refuses.
    pub fn commit(
        &self,
        shards: Vec<Shard>,
        tensors: usize,
        state: serde_json::Value,
    ) -> Result<PathBuf, Error> {
        let (files, tensors) = assemble(&self.folder, shards, tensors)?;
        let manifest = Manifest {
            format: FORMAT,
            step: self.step,
            state,
            files,
            tensors,
        };
        let path = self.folder.join("manifest.json");
        let text = serde_json::to_vec_pretty(&manifest).expect("plain data");
        std::fs::write(&path, text).map_err(Error::io("cannot write", &path))?;
        sync(&path)?;
        sync(&self.folder)?;
        if self.target.exists() {
            // The same step again, after a resume from an older one: the new one takes its place.
            std::fs::remove_dir_all(&self.target)
                .map_err(Error::io("cannot replace", &self.target))?;
        }
        std::fs::rename(&self.folder, &self.target)
            .map_err(Error::io("cannot name", &self.target))?;
        if let Some(parent) = self.target.parent() {
            sync(parent)?;
        }
        Ok(self.target.clone())
    }
}

impl Staging {
    /// [`Staging::commit`] of shards that are images: what they have to be, and the state, are in the first one's header.
    ///
    /// # Errors
    /// As [`Staging::commit`].
    pub fn commit_images(&self, shards: Vec<Shard>) -> Result<PathBuf, Error> {
        let first = shards
            .first()
            .ok_or_else(|| Error::mismatch(&self.folder, "no shard was written"))?;
        let head = ImageHeader::from_file(&self.folder.join(&first.file.name))?;
        self.commit(shards, head.tensors, head.state)
    }
}

/// What shards have together: each of `expected` tensors whole and once.
pub(crate) fn assemble(
    what: &Path,
    shards: Vec<Shard>,
    expected: usize,
) -> Result<(Vec<FileEntry>, BTreeMap<String, TensorEntry>), Error> {
    let mut tensors: BTreeMap<String, TensorEntry> = BTreeMap::new();
    let mut files = Vec::new();
    let refuse = |reason| Err(Error::mismatch(what, reason));
    for (file, shard) in shards.into_iter().enumerate() {
        for TensorSlice {
            name,
            global,
            offset,
            shape,
        } in shard.slices
        {
            let entry = tensors.entry(name.clone()).or_insert_with(|| TensorEntry {
                shape: global.clone(),
                slices: Vec::new(),
            });
            if entry.shape != global {
                return refuse(format!(
                    "{name} has shape {global:?} in shard {file}, {:?} in others",
                    entry.shape
                ));
            }
            for slice in &entry.slices {
                let other = TensorSlice {
                    name: name.clone(),
                    global: global.clone(),
                    offset: slice.offset.clone(),
                    shape: slice.shape.clone(),
                };
                if other.overlap(&offset, &shape).is_some() {
                    return refuse(format!(
                        "{name} is in two shards, {} and {file}",
                        slice.file
                    ));
                }
            }
            entry.slices.push(SliceEntry {
                file,
                offset,
                shape,
            });
        }
        files.push(shard.file);
    }
    for (name, entry) in &tensors {
        let written: i64 = entry
            .slices
            .iter()
            .map(|slice| slice.shape.iter().product::<i64>())
            .sum();
        let whole: i64 = entry.shape.iter().product();
        if written != whole {
            return refuse(format!(
                "of the {whole} values of {name} only {written} were written"
            ));
        }
    }
    if tensors.len() != expected {
        return refuse(format!(
            "{} tensors were written, {expected} are expected",
            tensors.len()
        ));
    }
    Ok((files, tensors))
}

/// Removes all but the newest `keep` checkpoints under `root`.
///
/// # Errors
/// When the folder cannot be read.
pub fn retain(root: &Path, keep: usize) -> Result<(), Error> {
    for path in list(root)?.into_iter().skip(keep.max(1)) {
        // The manifest goes first: what is left of the rest is no checkpoint.
        let _ = std::fs::remove_file(path.join("manifest.json"));
        std::fs::remove_dir_all(&path).map_err(Error::io("cannot remove", &path))?;
    }
    Ok(())
}

impl Checkpoint {
    /// Checks length and checksum of file number `number`.
    ///
    /// # Errors
    /// When either differs: which file, and how.
    pub fn verify_file(&self, number: usize) -> Result<(), Error> {
        let entry = &self.manifest().files[number];
        let path = self.path().join(&entry.name);
        let found = std::fs::metadata(&path)
            .map_err(Error::io("cannot open", &path))?
            .len();
        if found != entry.bytes {
            return Err(Error::damaged(
                &path,
                format!("{found} bytes where the manifest says {}", entry.bytes),
            ));
        }
        let (_, crc32c) = checksum(&path)?;
        if crc32c != entry.crc32c {
            let reason = format!(
                "checksum {crc32c:08x} where the manifest says {:08x}",
                entry.crc32c
            );
            return Err(Error::damaged(&path, reason));
        }
        Ok(())
    }
}

fn sync(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::io("cannot write", path))
}

/// Length and CRC-32C of a file.
pub(crate) fn checksum(path: &Path) -> Result<(u64, u32), Error> {
    let mut file = File::open(path).map_err(Error::io("cannot open", path))?;
    let mut buffer = vec![0u8; 1 << 20];
    let mut bytes = 0u64;
    let mut crc = RunningCrc::new();
    loop {
        let read = file
            .read(&mut buffer)
            .map_err(Error::io("cannot read", path))?;
        if read == 0 {
            return Ok((bytes, crc.value()));
        }
        bytes += read as u64;
        crc.add(&buffer[..read]);
    }
}
