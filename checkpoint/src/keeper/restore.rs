//! Reading the snapshot that ranks restore, from this keeper's memory or from another's.

use super::daemon::Keeper;
use super::error::Error;
use super::layout::chunk_len;
use super::protocol::Request;
use super::snapshot::{Snapshot, SnapshotId};
use crate::checksum::crc32c;
use crate::format::LENGTH_BYTES;
use crate::memory::Region;
use std::net::SocketAddr;
use std::sync::Arc;

/// Number of chunks that are requested ahead.
const PREFETCH_CHUNKS: u64 = 8;

/// The location of a rank's part of the snapshot to restore.
struct RestoreSource {
    snapshot: Snapshot,
    holder: SocketAddr,
    /// True if the part is in this keeper's memory.
    is_here: bool,
}

fn restore_source(keeper: &Keeper, rank: usize) -> Result<RestoreSource, Error> {
    let state = keeper.lock();
    let Some(target) = state.restore_target() else {
        return Err(Error::Refused("there is nothing to restore".into()));
    };
    let id = target.snapshot.id;
    let Some(&holder) = target.holders.get(rank) else {
        let reason = format!("the snapshot of step {} has no rank {rank}", id.step);
        return Err(Error::Refused(reason));
    };
    Ok(RestoreSource {
        holder,
        is_here: state.slots.find(id, rank).is_some(),
        snapshot: target.snapshot.clone(),
    })
}

/// Returns the header of a part that is here: its length, then the header itself.
///
/// # Errors
/// If the part is not here, or its header is damaged.
pub(super) fn local_header(keeper: &Keeper, id: SnapshotId, rank: usize) -> Result<Vec<u8>, Error> {
    keeper.read_part(id, rank, u64::MAX, |region, info| {
        let mut length = [0u8; LENGTH_BYTES];
        region.copy_out(0, &mut length);
        let end = u64::from_le_bytes(length).saturating_add(LENGTH_BYTES as u64);
        if end > info.bytes {
            let reason = format!("the header of rank {rank}'s part is damaged");
            return Err(Error::Refused(reason));
        }
        let mut header = vec![0; end as usize];
        region.copy_out(0, &mut header);
        Ok(header)
    })?
}

/// Returns the header of a part of the snapshot to restore.
///
/// # Errors
/// If the part cannot be read.
pub(super) fn header(keeper: &Keeper, rank: usize) -> Result<Vec<u8>, Error> {
    let source = restore_source(keeper, rank)?;
    let id = source.snapshot.id;
    if source.is_here {
        return local_header(keeper, id, rank);
    }
    let mut peer = keeper.peers.get(source.holder)?;
    peer.send(&Request::Header { id, rank })?;
    let header = peer.receive_bytes()?;
    keeper.peers.put(peer);
    Ok(header)
}

/// Returns a part of the snapshot to restore, which is first fetched if it is not here.
///
/// # Errors
/// If the part cannot be fetched, or arrives damaged.
pub(super) fn fetch(keeper: &Keeper, rank: usize) -> Result<Arc<Region>, Error> {
    // One at a time, so that a second rank finds what the first has fetched.
    let _fetching = keeper.peers.lock_fetching();
    let source = restore_source(keeper, rank)?;
    let id = source.snapshot.id;
    if !source.is_here {
        let region = fetch_from_holder(keeper, &source, rank)?;
        let info = source.snapshot.parts[rank].clone();
        keeper.lock().insert_part(id, info, region);
    }
    let region = keeper.lock().find_region(id, rank);
    region.ok_or_else(|| Error::Refused(format!("rank {rank}'s part was dropped meanwhile")))
}

fn fetch_from_holder(
    keeper: &Keeper,
    source: &RestoreSource,
    rank: usize,
) -> Result<Arc<Region>, Error> {
    let RestoreSource {
        snapshot, holder, ..
    } = source;
    let id = snapshot.id;
    let chunk_bytes = snapshot.topology.chunk_bytes;
    let info = &snapshot.parts[rank];
    let region = keeper.allocate(info.bytes, 1)?.remove(0);
    let mut peer = keeper.peers.get(*holder)?;
    let num_chunks = info.crcs.len() as u64;
    let mut requested = 0;
    for chunk in 0..num_chunks {
        while requested < num_chunks.min(chunk + PREFETCH_CHUNKS) {
            let request = Request::Chunk {
                id,
                rank,
                chunk: requested,
            };
            peer.send(&request)?;
            requested += 1;
        }
        let bytes = peer.receive_bytes()?;
        let has_length = bytes.len() == chunk_len(info.bytes, chunk_bytes, chunk);
        if !has_length || crc32c(&bytes) != info.crcs[chunk as usize] {
            let reason = format!("chunk {chunk} of rank {rank}'s part from {holder} is damaged");
            return Err(Error::Refused(reason));
        }
        region.copy_in(chunk as usize * chunk_bytes, &bytes);
    }
    keeper.peers.put(peer);
    Ok(region)
}
