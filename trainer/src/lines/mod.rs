//! Files of lines that a thread writes while training continues, whatever the disk does.
//!
//! A full, failing or hanging disk delays lines: they wait in bounded memory, and the thread tries
//! again until the file takes them. Lines that find the memory full are dropped and counted.

mod backlog;
mod health;
mod tail;
mod target;
mod writer;

pub use backlog::{Limits, MissingLines};
pub use health::Notice;
pub use tail::ResumePoint;
pub use target::Target;
pub use writer::{LineWriter, Options, WrittenLines};
