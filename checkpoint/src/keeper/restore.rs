//! What ranks need to go on: parts that are checked, rebuilt, and brought from other nodes.

use super::protect::{chunk_len, chunk_size, stripe_len};
use super::recover::Rebuild;
use super::serve::Keeper;
use super::{Damage, Error, Reply, Request, Snapshot, SnapshotId};
use crate::erasure::ErasureCode;
use crate::memory::Region;
use std::net::SocketAddr;
use std::sync::Arc;

/// Chunks that are asked for ahead.
const PREFETCH_CHUNKS: u64 = 8;

/// What of a snapshot here has another checksum than it had.
pub(crate) fn find_damage(keeper: &Keeper, id: SnapshotId) -> Result<Damage, Error> {
    let size = chunk_size(keeper, id)?;
    let ranks: Vec<usize> = {
        let state = keeper.lock();
        let parts = state
            .slots
            .slots
            .iter()
            .filter_map(|slot| slot.part.as_ref());
        parts
            .filter(|part| part.id == id && part.is_complete())
            .map(|part| part.info.rank)
            .collect()
    };
    let mut bad = Vec::new();
    for rank in ranks {
        keeper.read(id, rank, u64::MAX, |region, info| {
            let mut bytes = vec![0; size];
            for (chunk, &crc) in info.crcs.iter().enumerate() {
                let len = chunk_len(info.bytes, size, chunk as u64);
                region.copy_out(chunk * size, &mut bytes[..len]);
                if crate::checksum::crc32c(&bytes[..len]) != crc {
                    bad.push((rank, chunk as u64));
                }
            }
        })?;
    }
    let state = keeper.lock();
    let parities = state
        .parity
        .get(&id)
        .into_iter()
        .flat_map(|parity| parity.values());
    let parities = parities
        .filter(|(bytes, crc)| crate::checksum::crc32c(bytes) != *crc)
        .count() as u64;
    Ok(Damage {
        chunks: bad,
        parities,
    })
}

/// Spoils a rank's newest complete part without breaking it: see [`super::Fault::Poison`].
pub(crate) fn poison(keeper: &Keeper, rank: usize) -> Result<(), Error> {
    let newest = keeper.lock().slots.newest;
    let id = newest.ok_or_else(|| Error::Refused("there is no complete snapshot here".into()))?;
    let start = local_header(keeper, id, rank)?.len();
    let size = chunk_size(keeper, id)?;
    let crcs = keeper.read(id, rank, u64::MAX, |region, info| {
        let end = (start + 256).min(info.bytes as usize) / 4 * 4;
        for at in (start..end).step_by(4) {
            region.copy_in(at, &f32::NAN.to_le_bytes());
        }
        let crc = |chunk: usize| {
            let mut bytes = vec![0; chunk_len(info.bytes, size, chunk as u64)];
            region.copy_out(chunk * size, &mut bytes);
            crate::checksum::crc32c(&bytes)
        };
        (0..info.crcs.len()).map(crc).collect::<Vec<u32>>()
    })?;
    let mut state = keeper.lock();
    if let Some(slot) = state.slots.find(id, rank)
        && let Some(part) = &mut state.slots.slots[slot].part
    {
        part.info.crcs = crcs.clone();
    }
    if let Some(snapshot) = state.complete.get_mut(&id) {
        snapshot.parts[rank].crcs = crcs;
    }
    Ok(())
}

/// The header of a part here: its length, then itself.
pub(crate) fn local_header(keeper: &Keeper, id: SnapshotId, rank: usize) -> Result<Vec<u8>, Error> {
    keeper.read(id, rank, u64::MAX, |region, info| {
        let mut length = [0u8; 8];
        region.copy_out(0, &mut length);
        let end = u64::from_le_bytes(length).saturating_add(8);
        if end > info.bytes {
            return Err(Error::Refused(format!(
                "the header of rank {rank}'s part is damaged"
            )));
        }
        let mut head = vec![0; end as usize];
        region.copy_out(0, &mut head);
        Ok(head)
    })?
}

fn restoring(keeper: &Keeper, rank: usize) -> Result<(Snapshot, SocketAddr, bool), Error> {
    let state = keeper.lock();
    let (snapshot, holders) = state
        .restoring
        .as_ref()
        .ok_or_else(|| Error::Refused("nothing is to be restored".into()))?;
    let holder = holders
        .get(rank)
        .ok_or_else(|| Error::Refused(format!("the snapshot has no rank {rank}")))?;
    let here = state.slots.find(snapshot.id, rank).is_some();
    Ok((snapshot.clone(), *holder, here))
}

/// The header of a part of the snapshot that is to be restored.
pub(crate) fn head(keeper: &Keeper, rank: usize) -> Result<Vec<u8>, Error> {
    let (snapshot, holder, here) = restoring(keeper, rank)?;
    if here {
        return local_header(keeper, snapshot.id, rank);
    }
    let mut peer = keeper.peers.get(holder)?;
    peer.send(&Request::Header {
        id: snapshot.id,
        rank,
    })?;
    let head = peer.receive_bytes()?;
    keeper.peers.put(peer);
    Ok(head)
}

/// A part of the snapshot that is to be restored, brought here where it was not.
pub(crate) fn fetch(keeper: &Keeper, rank: usize) -> Result<Arc<Region>, Error> {
    // One at a time: the second rank that wants the same part then finds it.
    let _fetching = keeper.peers.lock_fetching();
    let (snapshot, holder, here) = restoring(keeper, rank)?;
    if !here {
        let info = &snapshot.parts[rank];
        let region = keeper.allocate(info.bytes, 1)?.remove(0);
        let mut peer = keeper.peers.get(holder)?;
        let chunks = info.crcs.len() as u64;
        let size = snapshot.topology.chunk;
        let mut asked = 0;
        for chunk in 0..chunks {
            while asked < chunks.min(chunk + PREFETCH_CHUNKS) {
                peer.send(&Request::Chunk {
                    id: snapshot.id,
                    rank,
                    chunk: asked,
                })?;
                asked += 1;
            }
            let bytes = peer.receive_bytes()?;
            let right = bytes.len() == chunk_len(info.bytes, size, chunk);
            if !right || crate::checksum::crc32c(&bytes) != info.crcs[chunk as usize] {
                return Err(Error::Refused(format!(
                    "chunk {chunk} of rank {rank}'s part came damaged from {holder}"
                )));
            }
            region.copy_in(chunk as usize * size, &bytes);
        }
        keeper.peers.put(peer);
        keeper.lock().insert_part(snapshot.id, info.clone(), region);
    }
    let state = keeper.lock();
    let slot = state.slots.find(snapshot.id, rank);
    slot.and_then(|slot| state.regions[slot].clone())
        .ok_or_else(|| Error::Refused("the part is gone again".into()))
}

/// Makes a part, or the chunks of it that are damaged, out of what other positions of its group have.
pub(crate) fn rebuild(keeper: &Keeper, wanted: &Rebuild) -> Result<(), Error> {
    let Rebuild {
        snapshot,
        rank,
        chunks,
        sources,
    } = wanted;
    let topology = &snapshot.topology;
    let id = snapshot.id;
    let refused = || Error::Refused(format!("rank {rank} has no place in the code"));
    let code_position = topology.code_position(*rank).ok_or_else(refused)?;
    let stripes = topology
        .stripes(code_position.group, code_position.local)
        .ok_or_else(refused)?;
    let code = ErasureCode::new(topology.redundancy, stripes.data(), stripes.parity)
        .map_err(Error::Refused)?;
    let own = &snapshot.parts[*rank];
    let here = {
        let state = keeper.lock();
        state
            .slots
            .find(id, *rank)
            .and_then(|slot| state.regions[slot].clone())
    };
    let region = match (&here, chunks) {
        (Some(region), Some(_)) => region.clone(),
        _ => keeper.allocate(own.bytes, 1)?.remove(0),
    };
    let rank_at =
        |position: usize| topology.rank_at(code_position.group, position, code_position.local);
    let lengths: Vec<u64> = (0..stripes.nodes)
        .map(|position| rank_at(position).map_or(0, |rank| snapshot.parts[rank].bytes))
        .collect();
    let size = topology.chunk;
    let all: Vec<u64> = (0..own.crcs.len() as u64).collect();
    for &chunk in chunks.as_ref().unwrap_or(&all) {
        let stripe = stripes.stripe_of(code_position.position, chunk);
        let len = stripe_len(&stripes, stripe, &lengths, size);
        // Data first, then parity: where each is, what to ask for, and what proves that it is right.
        let data: Vec<usize> = stripes.data_positions(stripe).collect();
        let position = |index: usize| match index.checked_sub(data.len()) {
            None => data[index],
            Some(parity) => stripes.parity_position(stripe, parity),
        };
        let number = |index: usize| stripes.chunk(position(index), stripe).unwrap_or(0);
        let target = data
            .iter()
            .position(|&at| at == code_position.position)
            .expect("a node's chunk is data");
        let mut got: Vec<Option<Vec<u8>>> = vec![None; stripes.nodes];
        let mut lost = vec![false; stripes.nodes];
        lost[target] = true;
        loop {
            let missing = data.len() - got.iter().flatten().count();
            let next: Vec<usize> = (0..stripes.nodes)
                .filter(|&i| got[i].is_none() && !lost[i])
                .take(missing)
                .collect();
            if missing == 0 {
                break;
            }
            if next.len() < missing {
                let left = stripes.nodes - lost.iter().filter(|&&lost| lost).count();
                return Err(Error::Refused(format!(
                    "chunk {chunk} of rank {rank}'s part is lost: {left} of its stripe are left and {} are needed",
                    data.len()
                )));
            }
            let mut asked = Vec::new();
            for index in next {
                let is_data = index < data.len();
                let chunk = number(index);
                let expected = chunk_len(lengths[position(index)], size, chunk);
                if is_data && expected == 0 {
                    got[index] = Some(vec![0; len]);
                    continue;
                }
                let request = if is_data {
                    Request::Chunk {
                        id,
                        rank: rank_at(position(index)).expect("it has bytes"),
                        chunk,
                    }
                } else {
                    Request::Parity {
                        id,
                        local: code_position.local,
                        stripe,
                    }
                };
                let peer =
                    sources[position(index)].and_then(|address| keeper.peers.get(address).ok());
                match peer.map(|mut peer| peer.send(&request).map(|()| peer)) {
                    Some(Ok(peer)) => asked.push((index, peer)),
                    Some(Err(_)) | None => lost[index] = true,
                }
            }
            for (index, mut peer) in asked {
                let reply = peer.receive();
                let connected = matches!(&reply, Ok(_) | Err(Error::Refused(_)));
                let bytes = match reply {
                    Ok(Reply::Bytes(mut bytes)) => {
                        let right = if index < data.len() {
                            let info =
                                &snapshot.parts[rank_at(position(index)).expect("it has bytes")];
                            info.crcs.get(number(index) as usize)
                                == Some(&crate::checksum::crc32c(&bytes))
                        } else {
                            bytes.len() == len
                        };
                        bytes.resize(len, 0);
                        right.then_some(bytes)
                    }
                    _ => None,
                };
                if connected {
                    keeper.peers.put(peer);
                }
                lost[index] = bytes.is_none();
                got[index] = bytes;
            }
        }
        let mut out = vec![0; len];
        let views: Vec<Option<&[u8]>> = got.iter().map(Option::as_deref).collect();
        code.rebuild(&views, target, &mut out)
            .map_err(Error::Refused)?;
        out.truncate(chunk_len(own.bytes, size, chunk));
        if own.crcs.get(chunk as usize) != Some(&crate::checksum::crc32c(&out)) {
            return Err(Error::Refused(format!(
                "chunk {chunk} of rank {rank}'s part was rebuilt to something else"
            )));
        }
        region.copy_in(chunk as usize * size, &out);
    }
    if here.is_none() || chunks.is_none() {
        let mut state = keeper.lock();
        if let Some(slot) = state.slots.find(id, *rank) {
            state.slots.release(slot);
        }
        state.insert_part(id, own.clone(), region);
    }
    Ok(())
}
