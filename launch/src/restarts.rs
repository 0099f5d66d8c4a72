//! The file `restarts.jsonl` of a run: a line for each restart, and for each start that changes the
//! configuration.

use anyhow::{Context, Result};
use checkpoint::run_folder::RunFolder;
use std::{io::Write, path::Path};

const NAME: &str = "restarts.jsonl";

/// Appends a line to the file in the run's folder `dir`.
///
/// # Errors
/// If the disk does not take it, or the file is a link.
pub(crate) fn append(dir: &Path, line: &str) -> Result<()> {
    let mut file = RunFolder::open(dir)?.append_file(NAME)?;
    file.write_all(format!("{line}\n").as_bytes())
        .with_context(|| format!("cannot write {}", dir.join(NAME).display()))
}
