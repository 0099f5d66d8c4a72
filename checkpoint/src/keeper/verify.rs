//! Comparing the parts and the parity of a snapshot with their checksums.

use super::daemon::Keeper;
use super::error::Error;
use super::layout::chunk_len;
use super::report::Damage;
use super::snapshot::SnapshotId;
use crate::checksum::crc32c;

/// Returns which chunks and how many parities of a snapshot here are damaged.
///
/// # Errors
/// If the snapshot is not known, or is overwritten meanwhile.
pub(super) fn find_damage(keeper: &Keeper, id: SnapshotId) -> Result<Damage, Error> {
    let chunk_bytes = keeper.lock().chunk_bytes(id)?;
    let mut chunks = Vec::new();
    for rank in complete_ranks(keeper, id) {
        keeper.read_part(id, rank, u64::MAX, |region, info| {
            let mut buffer = vec![0; chunk_bytes];
            for (chunk, &crc) in info.crcs.iter().enumerate() {
                let len = chunk_len(info.bytes, chunk_bytes, chunk as u64);
                let bytes = &mut buffer[..len];
                region.copy_out(chunk * chunk_bytes, bytes);
                if crc32c(bytes) != crc {
                    chunks.push((rank, chunk as u64));
                }
            }
        })?;
    }
    let parities = keeper.lock().parity.num_damaged(id);
    Ok(Damage { chunks, parities })
}

/// Returns the ranks whose complete parts of a snapshot are here.
fn complete_ranks(keeper: &Keeper, id: SnapshotId) -> Vec<usize> {
    keeper
        .lock()
        .slots
        .parts()
        .filter(|part| part.id == id)
        .filter(|part| part.is_complete())
        .map(|part| part.info.rank)
        .collect()
}
