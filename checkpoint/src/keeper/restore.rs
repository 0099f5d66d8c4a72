//! Reading the snapshot that ranks restore, from this keeper's memory or from another's.

use super::{
    daemon::{Allocation, Keeper},
    decide::RestoreSource,
    layout::chunk_len,
    protocol::Request,
    snapshot::SnapshotId,
};
use crate::{checksum::crc32c, format::LENGTH_BYTES, memory::Region, secure::Error};
use std::sync::Arc;

/// Number of chunks that are requested ahead.
const PREFETCH_CHUNKS: u64 = 8;

/// Returns the header of a part that is here: its length, then the header itself.
///
/// # Errors
/// If the part is not here, or its header is damaged.
pub(super) fn local_header(keeper: &Keeper, id: SnapshotId, rank: usize) -> Result<Vec<u8>, Error> {
    keeper.read_part(id, rank, u64::MAX, |region, info| {
        let damaged = || {
            let reason = format!("the header of rank {rank}'s part is damaged");
            Err(Error::Refused(reason))
        };
        if info.bytes < LENGTH_BYTES as u64 {
            return damaged();
        }
        let mut length = [0u8; LENGTH_BYTES];
        region.copy_out(0, &mut length);
        let end = u64::from_le_bytes(length).saturating_add(LENGTH_BYTES as u64);
        if end > info.bytes {
            return damaged();
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
    let source = keeper.apply(|state| state.restore_source(rank))?;
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
    let source = keeper.apply(|state| state.restore_source(rank))?;
    let id = source.snapshot.id;
    if !source.is_here {
        let allocation = fetch_from_holder(keeper, &source, rank)?;
        allocation.insert_part(id, source.snapshot.parts[rank].clone());
    }
    let region = keeper.region_of_part(id, rank);
    region.ok_or_else(|| Error::Refused(format!("rank {rank}'s part was dropped meanwhile")))
}

fn fetch_from_holder<'a>(
    keeper: &'a Keeper,
    source: &RestoreSource,
    rank: usize,
) -> Result<Allocation<'a>, Error> {
    let RestoreSource {
        snapshot, holder, ..
    } = source;
    let id = snapshot.id;
    let chunk_bytes = snapshot.topology.chunk_bytes;
    let info = &snapshot.parts[rank];
    let allocation = keeper.allocate(info.bytes, 1)?;
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
        let position = chunk as usize * chunk_bytes;
        allocation.first().copy_in(position, &bytes);
    }
    keeper.peers.put(peer);
    Ok(allocation)
}
