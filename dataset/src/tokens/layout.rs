//! Integer types of tokens, and the fields of Megatron-LM's indexed data sets.

use std::path::{Path, PathBuf};

pub(super) const MAGIC: &[u8; 9] = b"MMIDIDX\x00\x00";

pub(super) const VERSION: u64 = 1;
pub(super) const VERSION_OFFSET: usize = 9;
pub(super) const DTYPE_OFFSET: usize = 17;
pub(super) const SEQUENCES_OFFSET: usize = 18;
pub(super) const DOCUMENTS_OFFSET: usize = 26;
pub(super) const HEADER: usize = 34;

/// The integer type of the tokens in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    U8,
    I8,
    I16,
    I32,
    I64,
    U16,
    U32,
    U64,
}

impl Width {
    /// Returns the width with this `DType` code of Megatron.
    pub(super) fn from_code(code: u8) -> Option<Width> {
        Some(match code {
            1 => Width::U8,
            2 => Width::I8,
            3 => Width::I16,
            4 => Width::I32,
            5 => Width::I64,
            8 => Width::U16,
            _ => return None,
        })
    }

    /// Returns the `DType` code of Megatron. Its files have no unsigned integers above 16 bits.
    pub(super) fn code(self) -> u8 {
        match self {
            Width::U8 => 1,
            Width::I8 => 2,
            Width::I16 => 3,
            Width::I32 | Width::U32 => 4,
            Width::I64 | Width::U64 => 5,
            Width::U16 => 8,
        }
    }

    /// Returns the name of the type in `dataset.json`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Width::U8 => "uint8",
            Width::I8 => "int8",
            Width::I16 => "int16",
            Width::I32 => "int32",
            Width::I64 => "int64",
            Width::U16 => "uint16",
            Width::U32 => "uint32",
            Width::U64 => "uint64",
        }
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Width::U8 | Width::I8 => 1,
            Width::I16 | Width::U16 => 2,
            Width::I32 | Width::U32 => 4,
            Width::I64 | Width::U64 => 8,
        }
    }

    pub(super) fn decode(self, bytes: &[u8]) -> Vec<i64> {
        fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> i64) -> Vec<i64> {
            bytes
                .as_chunks::<N>()
                .0
                .iter()
                .map(|chunk| value(*chunk))
                .collect()
        }
        match self {
            Width::U8 => each(bytes, |b: [u8; 1]| i64::from(b[0])),
            Width::I8 => each(bytes, |b| i64::from(i8::from_le_bytes(b))),
            Width::I16 => each(bytes, |b| i64::from(i16::from_le_bytes(b))),
            Width::U16 => each(bytes, |b| i64::from(u16::from_le_bytes(b))),
            Width::I32 => each(bytes, |b| i64::from(i32::from_le_bytes(b))),
            Width::U32 => each(bytes, |b| i64::from(u32::from_le_bytes(b))),
            // No token of 2^63 or more is in a vocabulary, nor is a negative one.
            Width::I64 | Width::U64 => each(bytes, i64::from_le_bytes),
        }
    }
}

/// Returns the path without ending of the pair that a path stands for: the path itself, or that of
/// one of its files.
pub fn pair_prefix(path: &Path) -> PathBuf {
    let is_ending = path
        .extension()
        .is_some_and(|ending| ending == "bin" || ending == "idx");
    if is_ending && path.is_file() {
        path.with_extension("")
    } else {
        path.to_path_buf()
    }
}

/// Returns a path with an extension after its name, which may have others.
pub(crate) fn with_extension(prefix: &Path, extension: &str) -> PathBuf {
    let mut path = prefix.as_os_str().to_owned();
    path.push(".");
    path.push(extension);
    path.into()
}
