//! The safetensors format as moerun uses it: dtypes, headers and the metadata of images.

use crate::{Error, TensorSlice, manifest::FileEntry};
use safetensors::tensor::{Dtype, Metadata};
use serde::{Deserialize, Serialize};
use std::{fs::File, os::unix::fs::FileExt, path::Path};
use tch::Kind;

/// A safetensors file begins with the length of its header in this many bytes.
pub(crate) const LENGTH_BYTES: usize = 8;

/// Length of a header at most: a damaged length must not reserve all memory.
const MAX_HEADER_BYTES: u64 = 1 << 28;

/// Metadata keys of an image, fixed by format 2.
pub(crate) const STATE_KEY: &str = "state";
pub(crate) const SLICES_KEY: &str = "places";
pub(crate) const TENSORS_KEY: &str = "tensors";
/// Optional: the ranks whose images have the other slices that the writer held.
pub(crate) const COMPANIONS_KEY: &str = "companions";

/// A file that one rank wrote, and the slices in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shard {
    pub(crate) file: FileEntry,
    pub(crate) slices: Vec<TensorSlice>,
}

/// Returns the dtype in which values are saved, for those that can be.
pub(crate) fn dtype_of(kind: Kind) -> Option<Dtype> {
    match kind {
        Kind::Float => Some(Dtype::F32),
        Kind::BFloat16 => Some(Dtype::BF16),
        Kind::Int64 => Some(Dtype::I64),
        Kind::Uint8 => Some(Dtype::U8),
        _ => None,
    }
}

/// Returns the kind of values of a saved dtype; the inverse of [`dtype_of`].
pub(crate) fn kind_of(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::I64 => Some(Kind::Int64),
        Dtype::U8 => Some(Kind::Uint8),
        _ => None,
    }
}

/// The positions of the tensors in a safetensors file.
#[derive(Debug, Clone)]
pub struct TensorIndex {
    pub(crate) metadata: Metadata,
    /// The position of the first tensor in the file.
    pub(crate) data_start: u64,
}

impl TensorIndex {
    /// Returns the names, dtypes, shapes and places of the tensors.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Returns the position of the first tensor in the file.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// Reads the index of a file and compares the lengths in it with that of the file. Errors name
    /// `path`.
    ///
    /// # Errors
    /// If the file cannot be read, is no safetensors file, or has another length.
    pub fn from_file(file: &File, path: &Path) -> Result<TensorIndex, Error> {
        let header = FileHeader::read(file, path)?;
        let index = header.parse(path)?;
        let data_len = index.metadata.data_len() as u64;
        let announced = index.data_start.checked_add(data_len);
        if announced != Some(header.file_len) {
            let reason = format!(
                "the file has {} bytes, its header of {} bytes announces {data_len} more",
                header.file_len, index.data_start
            );
            return Err(Error::damaged(path, reason));
        }
        Ok(index)
    }
}

/// The first bytes of a safetensors file: the length of the header and the header.
struct FileHeader {
    bytes: Vec<u8>,
    file_len: u64,
}

impl FileHeader {
    fn read(file: &File, path: &Path) -> Result<FileHeader, Error> {
        let metadata = file.metadata();
        let file_len = metadata.map_err(Error::io("cannot read", path))?.len();
        let mut length = [0u8; LENGTH_BYTES];
        if file_len < LENGTH_BYTES as u64 {
            let reason = format!("the file of {file_len} bytes has no header");
            return Err(Error::damaged(path, reason));
        }
        file.read_exact_at(&mut length, 0)
            .map_err(Error::io("cannot read", path))?;
        let header_len = u64::from_le_bytes(length);
        let end = header_len.checked_add(LENGTH_BYTES as u64);
        if end.is_none_or(|end| end > file_len) || header_len > MAX_HEADER_BYTES {
            let reason = format!(
                "the header of {header_len} bytes does not fit into the file of {file_len} bytes \
                 or into {MAX_HEADER_BYTES}"
            );
            return Err(Error::damaged(path, reason));
        }
        let mut bytes = length.to_vec();
        bytes.resize(LENGTH_BYTES + header_len as usize, 0);
        file.read_exact_at(&mut bytes[LENGTH_BYTES..], LENGTH_BYTES as u64)
            .map_err(Error::io("cannot read", path))?;
        Ok(FileHeader { bytes, file_len })
    }

    fn parse(&self, path: &Path) -> Result<TensorIndex, Error> {
        parse_index(&self.bytes, path)
    }
}

/// Parses the first bytes of a file, up to the first tensor.
fn parse_index(bytes: &[u8], path: &Path) -> Result<TensorIndex, Error> {
    let header = bytes
        .get(LENGTH_BYTES..)
        .ok_or_else(|| Error::damaged(path, "no header"))?;
    let metadata =
        serde_json::from_slice(header).map_err(|e| Error::damaged(path, e.to_string()))?;
    Ok(TensorIndex {
        metadata,
        data_start: bytes.len() as u64,
    })
}

/// The header of an image.
pub struct ImageHeader {
    /// The state that the writer passed to [`ImageLayout::plan`](crate::ImageLayout::plan).
    pub state: serde_json::Value,
    /// The slices in the image.
    pub slices: Vec<TensorSlice>,
    /// The number of tensors in the whole checkpoint.
    pub tensors: usize,
    /// The ranks whose images have the other slices that the writer held.
    pub companions: Vec<usize>,
    pub(crate) index: TensorIndex,
}

impl ImageHeader {
    /// Parses the bytes of [`ImageLayout::encode_header`](crate::ImageLayout::encode_header).
    /// Errors name `source`.
    ///
    /// # Errors
    /// If the bytes are no header of an image.
    pub fn read(bytes: &[u8], source: &Path) -> Result<ImageHeader, Error> {
        let index = parse_index(bytes, source)?;
        let damaged = |reason: String| Error::damaged(source, reason);
        let invalid = |e: serde_json::Error| damaged(e.to_string());
        let text = |key: &str| {
            let values = index.metadata.metadata().as_ref();
            values
                .and_then(|values| values.get(key))
                .ok_or_else(|| damaged(format!("no {key} in the header")))
        };
        let tensors = text(TENSORS_KEY)?;
        let companions = match text(COMPANIONS_KEY) {
            Ok(companions) => serde_json::from_str(companions).map_err(invalid)?,
            Err(_) => Vec::new(),
        };
        Ok(ImageHeader {
            state: serde_json::from_str(text(STATE_KEY)?).map_err(invalid)?,
            slices: serde_json::from_str(text(SLICES_KEY)?).map_err(invalid)?,
            tensors: tensors
                .parse()
                .map_err(|_| damaged(format!("{tensors} is no number of tensors")))?,
            companions,
            index,
        })
    }

    pub(crate) fn from_file(path: &Path) -> Result<ImageHeader, Error> {
        let file = File::open(path).map_err(Error::io("cannot open", path))?;
        ImageHeader::from_open_file(&file, path)
    }

    pub(crate) fn from_open_file(file: &File, path: &Path) -> Result<ImageHeader, Error> {
        ImageHeader::read(&FileHeader::read(file, path)?.bytes, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_dtypes_convert_both_ways() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Int64, Kind::Uint8] {
            assert_eq!(dtype_of(kind).and_then(kind_of), Some(kind));
        }
        assert_eq!(dtype_of(Kind::Half), None);
        assert_eq!(kind_of(Dtype::F16), None);
    }
}
