//! The check that the files of `run.tls` can be read here, and that Gloo can encrypt.

use crate::hint::one_line;
use std::{
    fs::{File, Metadata},
    io::Read,
    os::unix::fs::PermissionsExt,
    path::Path,
};
use trainer::config::Config;

/// Bytes of a file that are searched for the beginning of PEM text.
const SEARCHED_BYTES: u64 = 64 << 10;
/// Permissions of the group and of others.
const SHARED_MODE: u32 = 0o077;

/// Returns one sentence for each file of `run.tls` that cannot be used.
pub(super) fn tls_file_problems(config: &Config) -> Vec<String> {
    let Some(tls) = &config.run.tls else {
        return Vec::new();
    };
    let mut problems = Vec::new();
    for (key, path) in [
        ("run.tls.cert", &tls.cert),
        ("run.tls.key", &tls.key),
        ("run.tls.ca", &tls.ca),
    ] {
        let reason = match open_pem(path) {
            Err(reason) => reason,
            Ok(file) if key == "run.tls.key" && is_shared(&file) => {
                "other users may read it: chmod 600 it".into()
            }
            Ok(_) => continue,
        };
        problems.push(one_line(&format!("{key}: {}: {reason}", path.display())));
    }
    if let Err(error) = torch_ext::check_tls() {
        problems.push(format!("run.tls: {error}"));
    }
    problems
}

/// Opens a file of PEM text.
fn open_pem(path: &Path) -> Result<Metadata, String> {
    let file = File::open(path).map_err(|error| format!("cannot open it: {error}"))?;
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("it is no file".into());
    }
    let mut start = Vec::new();
    file.take(SEARCHED_BYTES)
        .read_to_end(&mut start)
        .map_err(|error| format!("cannot read it: {error}"))?;
    let marker = b"-----BEGIN ";
    if start.windows(marker.len()).any(|bytes| bytes == marker) {
        return Ok(metadata);
    }
    Err("it is not in PEM format (-----BEGIN ...)".into())
}

fn is_shared(file: &Metadata) -> bool {
    file.permissions().mode() & SHARED_MODE != 0
}
