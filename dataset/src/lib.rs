//! Token files: their preparation from text, their format, and the order of samples.
//!
//! Nothing here needs libtorch, so data can be prepared on machines without it.

pub mod argument_ranges;
mod bench;
mod char_boundary;
mod checksums;
pub mod cli;
mod error;
mod fingerprint;
pub mod info;
pub mod input;
pub mod order;
pub mod prepare;
pub mod printable;
mod progress;
mod quiet_panic;
pub mod tokenizer;
pub mod tokens;

pub use checksums::{Checksums, verify_checksums};
pub use error::Error;
pub use fingerprint::Fingerprint;
pub use tokens::hash_file as checksum;
