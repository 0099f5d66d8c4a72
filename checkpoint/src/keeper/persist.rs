//! Writing a snapshot to disk from the keeper's memory, while the run goes on.

use super::protect::{chunk_len, chunk_size};
use super::serve::Keeper;
use super::{Error, SnapshotId};
use crate::image::ImageHeader;
use crate::manifest::FileEntry;
use crate::memory::Region;
use crate::write::{Shard, checksum};
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Writes parts of `id` that are here into `folder`, makes them durable and reads them back.
pub(crate) fn write(
    keeper: &Keeper,
    id: SnapshotId,
    ranks: &[usize],
    folder: &Path,
) -> Result<Vec<Shard>, Error> {
    let size = chunk_size(keeper, id)?;
    let mut shards = Vec::new();
    for &rank in ranks {
        let name = format!("shard-{rank:05}.safetensors");
        let path = folder.join(&name);
        // The slot stays pinned, so nobody writes over it.
        let written = keeper.read(id, rank, u64::MAX, |region, info| {
            write_part(region, info.bytes, &info.crcs, size, &path)
        });
        let (bytes, crc32c, slices) = written?.map_err(Error::Refused)?;
        shards.push(Shard::new(
            FileEntry {
                name,
                bytes,
                crc32c,
            },
            slices,
        ));
    }
    Ok(shards)
}

fn write_part(
    region: &Region,
    bytes: u64,
    crcs: &[u32],
    size: usize,
    path: &Path,
) -> Result<(u64, u32, Vec<crate::TensorSlice>), String> {
    let failed = |error: std::io::Error| format!("cannot write {}: {error}", path.display());
    let mut file = File::create(path).map_err(failed)?;
    let mut buffer = vec![0; size];
    let mut whole = 0u32;
    for (chunk, &crc) in crcs.iter().enumerate() {
        let len = chunk_len(bytes, size, chunk as u64);
        region.copy_out(chunk * size, &mut buffer[..len]);
        if crate::checksum::crc32c(&buffer[..len]) != crc {
            return Err(format!(
                "memory for {} is damaged at chunk {chunk}",
                path.display()
            ));
        }
        whole = crate::checksum::combine(whole, crc, len);
        file.write_all(&buffer[..len]).map_err(failed)?;
    }
    file.sync_all().map_err(failed)?;
    drop(file);
    let (found, crc) = checksum(path).map_err(|e| e.to_string())?;
    if (found, crc) != (bytes, whole) {
        return Err(format!(
            "{} gives back other bytes than were written",
            path.display()
        ));
    }
    Ok((
        bytes,
        whole,
        ImageHeader::from_file(path)
            .map_err(|e| e.to_string())?
            .slices,
    ))
}
