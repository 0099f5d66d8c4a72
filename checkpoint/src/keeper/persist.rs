//! Writing a snapshot to disk from the keeper's memory, while training continues.

use super::{daemon::Keeper, decide::ReadablePart, layout::chunk_len, snapshot::SnapshotId};
use crate::{
    checksum::{FileChecksum, combine, crc32c},
    format::{ImageHeader, Shard},
    manifest::FileEntry,
    memory::Region,
    page_cache,
    run_folder::RunFolder,
    secure::Error,
    shard_names::{self, shard_name},
};
use nix::libc::O_NOFOLLOW;
use std::{fs::OpenOptions, io::Write, os::unix::fs::OpenOptionsExt, path::Path};

/// Writes parts of `id` that are here to files in `folder`, syncs them and reads them back from
/// disk.
///
/// # Errors
/// If a part is not here or damaged, or the disk fails.
pub(super) fn write(
    keeper: &Keeper,
    id: SnapshotId,
    ranks: &[usize],
    folder: &Path,
) -> Result<Vec<Shard>, Error> {
    let refused = |error: crate::Error| Error::Refused(error.to_string());
    let chunk_bytes = keeper.apply(|state| state.chunk_bytes(id))?;
    let checkpoint = RunFolder::open(folder).map_err(refused)?;
    let mut shards = Vec::with_capacity(ranks.len());
    for &rank in ranks {
        let name = shard_name(rank);
        shard_names::create_folder_of(&checkpoint, &name).map_err(refused)?;
        let path = folder.join(&name);
        let written = keeper.read_part(id, rank, u64::MAX, |region, part| {
            write_part(region, part, chunk_bytes, &path)
        })??;
        let header = ImageHeader::from_file(&path).map_err(refused)?;
        shards.push(Shard {
            file: FileEntry {
                name,
                bytes: written.bytes,
                crc32c: written.crc32c,
            },
            slices: header.slices,
        });
    }
    Ok(shards)
}

/// Writes a part to a file and reads it back.
fn write_part(
    region: &Region,
    part: &ReadablePart,
    chunk_bytes: usize,
    path: &Path,
) -> Result<FileChecksum, Error> {
    let name = path.display();
    let failed = |e: std::io::Error| Error::Refused(format!("cannot write {name}: {e}"));
    // A link could lead anywhere.
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    options.custom_flags(O_NOFOLLOW);
    let mut file = options.open(path).map_err(failed)?;
    let mut buffer = vec![0; chunk_bytes];
    let mut crc32c_of_file = 0;
    for (chunk, &crc) in part.checksums.as_slice().iter().enumerate() {
        let len = chunk_len(part.bytes, chunk_bytes, chunk as u64);
        let bytes = &mut buffer[..len];
        region.copy_out(chunk * chunk_bytes, bytes);
        if crc32c(bytes) != crc {
            let reason = format!("cannot write {name}: chunk {chunk} is damaged in memory");
            return Err(Error::Refused(reason));
        }
        crc32c_of_file = combine(crc32c_of_file, crc, len);
        file.write_all(bytes).map_err(failed)?;
    }
    let refused = |error: crate::Error| Error::Refused(error.to_string());
    page_cache::sync_and_drop(&file, path).map_err(refused)?;
    drop(file);
    let expected = FileChecksum {
        bytes: part.bytes,
        crc32c: crc32c_of_file,
    };
    let found = FileChecksum::read(path).map_err(refused)?;
    if found != expected {
        let reason = format!("{name} is damaged: other bytes were read than written");
        return Err(Error::Refused(reason));
    }
    Ok(expected)
}
