//! Comparing the parts and the parity of a snapshot with their checksums.

use super::{daemon::Keeper, layout::chunk_len, report::Damage, snapshot::SnapshotId};
use crate::{checksum::crc32c, secure::Error};

/// Returns which chunks and how many parities of a snapshot here are damaged.
///
/// # Errors
/// If the snapshot is not known, or is overwritten meanwhile.
pub(super) fn find_damage(keeper: &Keeper, id: SnapshotId) -> Result<Damage, Error> {
    let chunk_bytes = keeper.apply(|state| state.chunk_bytes(id))?;
    let mut chunks = Vec::new();
    for rank in keeper.apply(|state| state.complete_ranks(id)) {
        keeper.read_part(id, rank, u64::MAX, |region, part| {
            let mut buffer = vec![0; chunk_bytes];
            for (chunk, &crc) in part.checksums.as_slice().iter().enumerate() {
                let len = chunk_len(part.bytes, chunk_bytes, chunk as u64);
                let bytes = &mut buffer[..len];
                region.copy_out(chunk * chunk_bytes, bytes);
                if crc32c(bytes) != crc {
                    chunks.push((rank, chunk as u64));
                }
            }
        })?;
    }
    let parities = keeper.apply(|state| state.num_damaged_parities(id));
    Ok(Damage { chunks, parities })
}
