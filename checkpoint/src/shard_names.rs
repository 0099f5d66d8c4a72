//! Names of the shards in the folder of a checkpoint.
//!
//! The shards of the first [`SHARDS_PER_FOLDER`] ranks are in the folder itself. Those of later
//! ranks are in folders `ranks-NNNNN`, named by the first rank. File systems search and lock a
//! folder as a whole, so thousands of ranks should not create files in one.

use crate::{Error, names::MANIFEST, run_folder::RunFolder};
use nix::sys::stat::FileStat;
use std::fs::File;

/// Shards in a folder at most.
const SHARDS_PER_FOLDER: usize = 256;

/// Returns the name of a rank's shard: `shard-RRRRR.safetensors`, possibly after `ranks-NNNNN/`.
pub(crate) fn shard_name(rank: usize) -> String {
    let name = format!("shard-{rank:05}.safetensors");
    match rank / SHARDS_PER_FOLDER * SHARDS_PER_FOLDER {
        0 => name,
        first => format!("ranks-{first:05}/{name}"),
    }
}

/// True if a shard can have this name: it is one in the folder of the checkpoint or, with
/// `has_folders`, in a folder of that.
pub(crate) fn is_shard_name(name: &str, has_folders: bool) -> bool {
    let is_plain = crate::run_folder::is_plain_name;
    match name.split_once('/') {
        Some((folder, name)) => has_folders && is_plain(folder) && is_plain(name),
        None => is_plain(name) && name != MANIFEST,
    }
}

/// Creates the folder of a rank's shard in the folder of a checkpoint, unless it exists.
///
/// # Errors
/// If it cannot be created, or is a link.
pub(crate) fn create_folder_of(checkpoint: &RunFolder, shard: &str) -> Result<(), Error> {
    match shard.split_once('/') {
        Some((folder, _)) => checkpoint.create_subfolder(folder).map(drop),
        None => Ok(()),
    }
}

/// Opens a shard for reading.
///
/// # Errors
/// If there is none, it cannot be opened, or it or its folder is a link.
pub(crate) fn open(checkpoint: &RunFolder, shard: &str) -> Result<File, Error> {
    match shard.split_once('/') {
        Some((folder, name)) => checkpoint.subfolder(folder)?.open_file(name),
        None => checkpoint.open_file(shard),
    }
}

/// Returns the status of a shard, and does not open it.
///
/// # Errors
/// If there is none, or it or its folder is a link.
pub(crate) fn status(checkpoint: &RunFolder, shard: &str) -> Result<FileStat, Error> {
    match shard.split_once('/') {
        Some((folder, name)) => checkpoint.subfolder(folder)?.file_status(name),
        None => checkpoint.file_status(shard),
    }
}

/// Waits until the entries of all folders of these shards are on disk.
///
/// # Errors
/// If a folder is missing, or the disk fails.
pub(crate) fn sync_folders<'a>(
    checkpoint: &RunFolder,
    shards: impl Iterator<Item = &'a str>,
) -> Result<(), Error> {
    let mut folders: Vec<&str> = shards
        .filter_map(|shard| shard.split_once('/'))
        .map(|(folder, _)| folder)
        .collect();
    folders.sort_unstable();
    folders.dedup();
    for folder in folders {
        checkpoint.subfolder(folder)?.sync()?;
    }
    checkpoint.sync()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_the_shards_of_256_ranks() {
        assert_eq!(shard_name(0), "shard-00000.safetensors");
        assert_eq!(shard_name(255), "shard-00255.safetensors");
        assert_eq!(shard_name(256), "ranks-00256/shard-00256.safetensors");
        assert_eq!(shard_name(1023), "ranks-00768/shard-01023.safetensors");
        for rank in 0..2000 {
            assert!(is_shard_name(&shard_name(rank), true));
            assert_eq!(is_shard_name(&shard_name(rank), false), rank < 256);
        }
    }
}
