//! Reading the snapshot that ranks restore, from this keeper's memory or from another's.

use super::{
    checksums::Checksums,
    connection::Peer,
    daemon::{Allocation, Keeper},
    decide::RestoreSource,
    layout::chunk_len,
    protocol::Request,
    snapshot::{PartInfo, SnapshotId},
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
    keeper.read_part(id, rank, u64::MAX, |region, part| {
        let damaged = || {
            let reason = format!("the header of rank {rank}'s part is damaged");
            Err(Error::Refused(reason))
        };
        if part.bytes < LENGTH_BYTES as u64 {
            return damaged();
        }
        let mut length = [0u8; LENGTH_BYTES];
        region.copy_out(0, &mut length);
        let end = u64::from_le_bytes(length).saturating_add(LENGTH_BYTES as u64);
        if end > part.bytes {
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
    let id = source.id;
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
    let id = source.id;
    if !source.is_here {
        let mut peer = keeper.peers.get(source.holder)?;
        let checksums = peer.checksums(id, &source.part, source.chunk_bytes)?;
        let allocation = fetch_from_holder(keeper, &mut peer, &source, &checksums)?;
        keeper.peers.put(peer);
        allocation.insert_part(id, source.part, checksums);
    }
    let region = keeper.region_of_part(id, rank);
    region.ok_or_else(|| Error::Refused(format!("rank {rank}'s part was dropped meanwhile")))
}

fn fetch_from_holder<'a>(
    keeper: &'a Keeper,
    peer: &mut Peer,
    source: &RestoreSource,
    checksums: &Checksums,
) -> Result<Allocation<'a>, Error> {
    let RestoreSource {
        id,
        part: PartInfo { rank, bytes, .. },
        chunk_bytes,
        holder,
        ..
    } = *source;
    let allocation = keeper.allocate(bytes, 1)?;
    let crcs = checksums.as_slice();
    let num_chunks = crcs.len() as u64;
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
        let received = peer.receive_bytes()?;
        let has_length = received.len() == chunk_len(bytes, chunk_bytes, chunk);
        if !has_length || crc32c(&received) != crcs[chunk as usize] {
            let reason = format!("chunk {chunk} of rank {rank}'s part from {holder} is damaged");
            return Err(Error::Refused(reason));
        }
        let position = chunk as usize * chunk_bytes;
        allocation.first().copy_in(position, &received);
    }
    Ok(allocation)
}
