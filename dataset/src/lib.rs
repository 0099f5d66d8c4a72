//! Token files: their preparation from text, their format, and the order of samples.
//!
//! Nothing here needs libtorch, so data can be prepared on machines without it.

pub mod argument_ranges;
mod bench;
pub mod cli;
mod error;
pub mod info;
pub mod input;
pub mod order;
pub mod prepare;
pub mod printable;
mod progress;
pub mod tokenizer;
pub mod tokens;

pub use error::Error;
