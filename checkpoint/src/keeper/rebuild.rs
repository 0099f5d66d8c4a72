//! Rebuilding a part, or damaged chunks of it, from the other positions of its group.

use super::{
    checksums::Checksums,
    connection::Peer,
    daemon::Keeper,
    layout::GroupLayout,
    protocol::{Reply, Request},
    recover::Rebuild,
    topology::CodePosition,
};
use crate::{
    checksum::crc32c,
    erasure::{CodeError, ErasureCode},
    memory::Region,
    secure::Error,
};

/// Rebuilds what `wanted` says, in this keeper's memory.
///
/// # Errors
/// If too much of a stripe is lost, or a rebuilt chunk does not match its checksum.
pub(super) fn rebuild(keeper: &Keeper, wanted: &Rebuild) -> Result<(), Error> {
    let rebuilder = Rebuilder::new(keeper, wanted)?;
    let id = wanted.snapshot.id;
    let rank = wanted.rank;
    let checksums = rebuilder.own_checksums()?.clone();
    let local = keeper.region_of_part(id, rank);
    // Damaged chunks are replaced in place; a whole part gets new memory.
    if let (Some(region), Some(chunks)) = (local, &wanted.chunks) {
        rebuilder.fill(&region, chunks)?;
        // The damage may be in the checksums.
        keeper.apply(|state| state.set_checksums(id, rank, checksums));
        return Ok(());
    }
    let part = wanted.snapshot.parts[rank];
    let allocation = keeper.allocate(part.bytes, 1)?;
    let all: Vec<u64> = (0..checksums.as_slice().len() as u64).collect();
    rebuilder.fill(allocation.first(), &all)?;
    allocation.insert_part(id, part, checksums);
    Ok(())
}

struct Rebuilder<'a> {
    keeper: &'a Keeper,
    wanted: &'a Rebuild,
    code_position: CodePosition,
    layout: GroupLayout,
    code: ErasureCode,
    /// The checksums of the part at each position, if a keeper of the group has them.
    checksums: Vec<Option<Checksums>>,
}

/// A chunk of a stripe: data or parity.
struct StripeChunk {
    position: usize,
    source: Source,
}

enum Source {
    /// A chunk of a rank's part.
    Data {
        rank: usize,
        chunk: u64,
    },
    /// Zeros behind the end of a part, which need not be requested.
    Padding,
    Parity,
}

/// The chunks of a stripe that were received, and those that turned out to be lost.
struct Gathered {
    received: Vec<Option<Vec<u8>>>,
    is_lost: Vec<bool>,
}

impl<'a> Rebuilder<'a> {
    fn new(keeper: &'a Keeper, wanted: &'a Rebuild) -> Result<Rebuilder<'a>, Error> {
        let Rebuild { snapshot, rank, .. } = wanted;
        let topology = &snapshot.topology;
        let unprotected = || Error::Refused(format!("rank {rank}'s part has no redundancy"));
        let code_position = topology.code_position(*rank).ok_or_else(unprotected)?;
        let CodePosition { group, local, .. } = code_position;
        let stripes = topology.stripes(group, local).ok_or_else(unprotected)?;
        let code = ErasureCode::new(topology.redundancy, stripes.data(), stripes.parity)
            .map_err(|e| Error::Refused(e.to_string()))?;
        let mut part_bytes = vec![0; stripes.nodes];
        for (position, bytes) in part_bytes.iter_mut().enumerate() {
            let code_position = CodePosition {
                position,
                ..code_position
            };
            if let Some(rank) = topology.rank_at(code_position) {
                *bytes = snapshot.parts[rank].bytes;
            }
        }
        let layout = GroupLayout {
            stripes,
            chunk_bytes: topology.chunk_bytes,
            part_bytes,
        };
        let mut rebuilder = Rebuilder {
            keeper,
            wanted,
            code_position,
            layout,
            code,
            checksums: Vec::new(),
        };
        for position in 0..stripes.nodes {
            let rank = rebuilder.rank_at(position);
            let checksums = rank.and_then(|rank| rebuilder.find_checksums(rank));
            rebuilder.checksums.push(checksums);
        }
        Ok(rebuilder)
    }

    /// Returns the checksums of a rank's part from this keeper, or from another of the group.
    fn find_checksums(&self, rank: usize) -> Option<Checksums> {
        let snapshot = &self.wanted.snapshot;
        let part = &snapshot.parts[rank];
        let chunk_bytes = snapshot.topology.chunk_bytes;
        let local = self
            .keeper
            .apply(|state| state.checksums(snapshot.id, rank));
        let local = local.filter(|checksums| checksums.are_of(part, chunk_bytes));
        if local.is_some() {
            return local;
        }
        for &address in self.wanted.sources.iter().flatten() {
            let Ok(mut peer) = self.keeper.peers.get(address) else {
                continue;
            };
            let checksums = peer.checksums(snapshot.id, part, chunk_bytes);
            // A keeper that refuses is still connected.
            if matches!(&checksums, Ok(_) | Err(Error::Refused(_))) {
                self.keeper.peers.put(peer);
            }
            if let Ok(checksums) = checksums {
                return Some(checksums);
            }
        }
        None
    }

    /// Returns the checksums of the wanted part.
    ///
    /// # Errors
    /// If no keeper of the group has them.
    fn own_checksums(&self) -> Result<&Checksums, Error> {
        let lost = || {
            let rank = self.wanted.rank;
            let reason = format!("the checksums of rank {rank}'s part are lost");
            Error::Refused(reason)
        };
        let own = self.checksums[self.code_position.position].as_ref();
        own.ok_or_else(lost)
    }

    fn rank_at(&self, position: usize) -> Option<usize> {
        let topology = &self.wanted.snapshot.topology;
        topology.rank_at(CodePosition {
            position,
            ..self.code_position
        })
    }

    /// Rebuilds these chunks in the memory of the part.
    fn fill(&self, region: &Region, chunks: &[u64]) -> Result<(), Error> {
        for &chunk in chunks {
            let bytes = self.rebuild_chunk(chunk)?;
            let position = chunk as usize * self.layout.chunk_bytes;
            if position + bytes.len() > region.len() {
                let reason = format!("chunk {chunk} is behind the end of the part");
                return Err(Error::Refused(reason));
            }
            region.copy_in(position, &bytes);
        }
        Ok(())
    }

    fn rebuild_chunk(&self, chunk: u64) -> Result<Vec<u8>, Error> {
        let own = self.code_position.position;
        let rank = self.wanted.rank;
        let stripe = self.layout.stripes.stripe_of(own, chunk);
        let chunks = self.stripe_chunks(stripe);
        let target = chunks.iter().position(|part| part.position == own);
        let target = target.expect("every position has one chunk of a stripe");
        let lost = |e: CodeError| {
            let reason = format!("chunk {chunk} of rank {rank}'s part is lost: {e}");
            Error::Refused(reason)
        };
        let received = self.gather(stripe, &chunks, target).map_err(lost)?;
        let mut bytes = vec![0; self.layout.stripe_len(stripe)];
        let views: Vec<Option<&[u8]>> = received.iter().map(Option::as_deref).collect();
        self.code
            .rebuild(&views, target, &mut bytes)
            .map_err(lost)?;
        bytes.truncate(self.layout.chunk_len(own, chunk));
        let expected = self.own_checksums()?.as_slice().get(chunk as usize);
        if expected != Some(&crc32c(&bytes)) {
            let reason = format!("chunk {chunk} of rank {rank}'s part was rebuilt incorrectly");
            return Err(Error::Refused(reason));
        }
        Ok(bytes)
    }

    /// Returns the chunks of a stripe in the order of the code: data, then parity.
    fn stripe_chunks(&self, stripe: u64) -> Vec<StripeChunk> {
        let mut chunks = Vec::with_capacity(self.layout.stripes.nodes);
        for data in self.layout.data_chunks(stripe) {
            let source = if data.len == 0 {
                Source::Padding
            } else {
                Source::Data {
                    rank: self.rank_at(data.position).expect("it has bytes"),
                    chunk: data.chunk,
                }
            };
            chunks.push(StripeChunk {
                position: data.position,
                source,
            });
        }
        for index in 0..self.layout.stripes.parity {
            chunks.push(StripeChunk {
                position: self.layout.stripes.parity_position(stripe, index),
                source: Source::Parity,
            });
        }
        chunks
    }

    /// Receives as many chunks of a stripe as the code needs, data first. A chunk that is lost or
    /// damaged is replaced by another.
    fn gather(
        &self,
        stripe: u64,
        chunks: &[StripeChunk],
        target: usize,
    ) -> Result<Vec<Option<Vec<u8>>>, CodeError> {
        let needed = self.layout.stripes.data();
        let mut gathered = Gathered {
            received: vec![None; chunks.len()],
            is_lost: vec![false; chunks.len()],
        };
        gathered.is_lost[target] = true;
        loop {
            let missing = needed - gathered.received.iter().flatten().count();
            if missing == 0 {
                return Ok(gathered.received);
            }
            let next: Vec<usize> = (0..chunks.len())
                .filter(|&index| gathered.received[index].is_none())
                .filter(|&index| !gathered.is_lost[index])
                .take(missing)
                .collect();
            if next.len() < missing {
                return Err(CodeError::TooFewChunks {
                    left: gathered.is_lost.iter().filter(|&&lost| !lost).count(),
                    total: chunks.len(),
                    needed,
                });
            }
            self.request(stripe, chunks, &next, &mut gathered);
        }
    }

    /// Requests chunks from all positions at once, and records which arrive.
    fn request(
        &self,
        stripe: u64,
        chunks: &[StripeChunk],
        next: &[usize],
        gathered: &mut Gathered,
    ) {
        let stripe_len = self.layout.stripe_len(stripe);
        let mut pending: Vec<(usize, Peer)> = Vec::new();
        for &index in next {
            let chunk = &chunks[index];
            let Some(request) = self.request_for(stripe, chunk) else {
                gathered.received[index] = Some(vec![0; stripe_len]);
                continue;
            };
            let address = self.wanted.sources[chunk.position];
            let peer = address.and_then(|address| self.keeper.peers.get(address).ok());
            match peer.map(|mut peer| peer.send(&request).map(|()| peer)) {
                Some(Ok(peer)) => pending.push((index, peer)),
                Some(Err(_)) | None => gathered.is_lost[index] = true,
            }
        }
        for (index, mut peer) in pending {
            let reply = peer.receive();
            // A keeper that refuses is still connected.
            if matches!(&reply, Ok(_) | Err(Error::Refused(_))) {
                self.keeper.peers.put(peer);
            }
            let bytes = self.check_reply(&chunks[index], reply, stripe_len);
            gathered.is_lost[index] = bytes.is_none();
            gathered.received[index] = bytes;
        }
    }

    /// Returns the request for a chunk of a stripe, if one is needed.
    fn request_for(&self, stripe: u64, chunk: &StripeChunk) -> Option<Request> {
        let id = self.wanted.snapshot.id;
        match chunk.source {
            Source::Data { rank, chunk } => Some(Request::Chunk { id, rank, chunk }),
            Source::Parity => Some(Request::Parity {
                id,
                local: self.code_position.local,
                stripe,
            }),
            Source::Padding => None,
        }
    }

    /// Returns the bytes of a chunk, padded to the length of the stripe, if they are right.
    fn check_reply(
        &self,
        chunk: &StripeChunk,
        reply: Result<Reply, Error>,
        stripe_len: usize,
    ) -> Option<Vec<u8>> {
        let Ok(Reply::Bytes(mut bytes)) = reply else {
            return None;
        };
        let is_right = match chunk.source {
            Source::Data { chunk: number, .. } => {
                let checksums = self.checksums[chunk.position].as_ref();
                let expected = checksums.and_then(|list| list.as_slice().get(number as usize));
                expected == Some(&crc32c(&bytes))
            }
            // The keeper has compared the parity with its checksum.
            Source::Parity | Source::Padding => bytes.len() == stripe_len,
        };
        bytes.resize(stripe_len, 0);
        is_right.then_some(bytes)
    }
}
