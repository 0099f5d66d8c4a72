//! Token files: pairs of Megatron-LM, headerless arrays of OLMo, and files of datatrove.
//!
//! moerun writes pairs in the format of Megatron-LM's `IndexedDataset`. `PREFIX.bin` holds the
//! tokens of all documents one after another. `PREFIX.idx` holds the beginning of each document.
//! The fields of the index, little-endian:
//!
//! - magic `MMIDIDX\0\0`
//! - u64 version, which is 1
//! - u8 dtype code
//! - u64 number of sequences
//! - u64 number of document boundaries
//! - i32 length of each sequence
//! - i64 byte offset of each sequence
//! - i64 document boundaries
//!
//! Tokens are read with positioned reads from the page cache, not through a memory map. For windows
//! of this size both are equally fast, and a file that shrinks during a run causes an error instead
//! of a signal.

mod datatrove;
mod file;
mod format;
mod layout;
mod megatron;
mod pair;
mod raw;
mod writer;

pub use file::TokenFile;
pub use format::{TokenDtype, TokenFormat, TokenPath};
pub use layout::pair_prefix;
pub(crate) use layout::with_extension;
pub use pair::{TokenPair, TokenPart, hash_file};
pub use writer::{TokenWriter, WrittenPair};
