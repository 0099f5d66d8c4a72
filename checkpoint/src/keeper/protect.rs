//! Making parity: a keeper pulls the chunks of its stripes from the other nodes of its group, encodes them and hands out
//! the parities.
//!
//! Pulling makes back-pressure of itself: nobody is sent what it has not asked for. A chunk is asked for before it is
//! there, and comes as soon as the rank has filled it, so parity is made while the rank still copies. A stripe's data
//! crosses the network once, its further parities once more.

use super::connection::Peer;
use super::serve::Keeper;
use super::{Error, Reply, Request, Snapshot, SnapshotId, Topology};
use crate::erasure::ErasureCode;
use crate::stripes::Stripes;
use nix::time::{ClockId, clock_gettime};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

/// Stripes that are asked for ahead.
const PREFETCH_STRIPES: usize = 4;

/// Bytes of `rank`'s part in chunk number `chunk`.
pub(crate) fn chunk(
    keeper: &Keeper,
    id: SnapshotId,
    rank: usize,
    chunk: u64,
) -> Result<Vec<u8>, Error> {
    let size = chunk_size(keeper, id)?;
    keeper.read(id, rank, (chunk + 1) * size as u64, |region, info| {
        let mut bytes = vec![0; chunk_len(info.bytes, size, chunk)];
        region.copy_out((chunk * size as u64).min(info.bytes) as usize, &mut bytes);
        bytes
    })
}

/// The unit of checksums of a snapshot.
pub(crate) fn chunk_size(keeper: &Keeper, id: SnapshotId) -> Result<usize, Error> {
    let state = keeper.lock();
    let topology = state.complete.get(&id).map(|snapshot| &snapshot.topology);
    let topology = topology.or_else(|| {
        state
            .memberships
            .get(&id.generation)
            .map(|(topology, _)| topology)
    });
    topology
        .map(|topology| topology.chunk)
        .ok_or_else(|| Error::Refused("that generation is not known here".into()))
}

/// Length of chunk number `chunk` of a part of `bytes` bytes.
pub(crate) fn chunk_len(bytes: u64, size: usize, chunk: u64) -> usize {
    bytes.saturating_sub(chunk * size as u64).min(size as u64) as usize
}

/// Bytes that a stripe's parities have: the longest of its chunks; `lengths` are those of the parts, by position.
pub(crate) fn stripe_len(stripes: &Stripes, stripe: u64, lengths: &[u64], size: usize) -> usize {
    let chunk = |position: usize| {
        stripes
            .chunk(position, stripe)
            .map_or(0, |chunk| chunk_len(lengths[position], size, chunk))
    };
    (0..stripes.nodes).map(chunk).max().unwrap_or(0)
}

/// Makes the parity of a new snapshot that this node encodes.
pub(crate) fn encode(keeper: &Keeper, id: SnapshotId) -> Result<(), Error> {
    let membership = keeper.lock().memberships.get(&id.generation).cloned();
    let (topology, node) =
        membership.ok_or_else(|| Error::Refused("this generation was not begun here".into()))?;
    let Some((group, _)) = topology.position(node) else {
        return Ok(());
    };
    let sources: Vec<_> = topology.groups[group]
        .iter()
        .map(|&node| Some(topology.nodes[node].address))
        .collect();
    make_parity(keeper, &topology, id, node, &sources, true)
}

/// Makes anew all parity of a complete snapshot that `node` should have.
pub(crate) fn reencode(
    keeper: &Keeper,
    snapshot: &Snapshot,
    node: usize,
    sources: &[Option<SocketAddr>],
) -> Result<(), Error> {
    keeper
        .lock()
        .memberships
        .insert(snapshot.id.generation, (snapshot.topology.clone(), node));
    make_parity(
        keeper,
        &snapshot.topology,
        snapshot.id,
        node,
        sources,
        false,
    )?;
    keeper.lock().protected.insert(snapshot.id);
    Ok(())
}

/// `encoder`: the stripes whose first parity is here are encoded, and their other parities sent to where they belong.
/// Otherwise every parity that belongs here is made, and nothing sent.
fn make_parity(
    keeper: &Keeper,
    topology: &Topology,
    id: SnapshotId,
    node: usize,
    sources: &[Option<SocketAddr>],
    encoder: bool,
) -> Result<(), Error> {
    let began = thread_time();
    let Some((group, position)) = topology.position(node) else {
        return Ok(());
    };
    let nodes = &topology.groups[group];
    let mut peers = Connections {
        keeper,
        sources,
        open: BTreeMap::new(),
    };
    for local in 0..nodes
        .iter()
        .map(|&node| topology.nodes[node].ranks.len())
        .max()
        .unwrap_or(0)
    {
        let Some(stripes) = topology.stripes(group, local) else {
            return Ok(());
        };
        let code = ErasureCode::new(topology.redundancy, stripes.data(), stripes.parity)
            .map_err(Error::Refused)?;
        let rank = |position: usize| topology.rank_at(group, position, local);
        let mut lengths = vec![0; stripes.nodes];
        for (position, length) in lengths.iter_mut().enumerate() {
            if let Some(rank) = rank(position) {
                *length = match peers.at(position, 0)?.ask(&Request::Length { id, rank })? {
                    Reply::Length(bytes) => bytes,
                    other => {
                        return Err(Error::Protocol(format!(
                            "a length was asked for, not {other:?}"
                        )));
                    }
                };
            }
        }
        let size = topology.chunk;
        let chunks = lengths
            .iter()
            .map(|bytes| bytes.div_ceil(size as u64))
            .max()
            .unwrap_or(0);
        let own = |stripe: u64| {
            let limit = if encoder { 1 } else { stripes.parity };
            (0..limit).find(|&index| stripes.parity_position(stripe, index) == position)
        };
        let todo: Vec<(u64, usize)> = (0..stripes.count(chunks))
            .filter_map(|stripe| Some((stripe, own(stripe)?)))
            .collect();
        let needs = |stripe: u64| {
            stripes
                .data_positions(stripe)
                .filter_map(move |at| Some((at, stripes.chunk(at, stripe)?)))
                .collect::<Vec<_>>()
        };
        let exists =
            |at: usize, chunk: u64, lengths: &[u64]| chunk_len(lengths[at], size, chunk) > 0;
        let mut asked = 0;
        let mut pushed: VecDeque<usize> = VecDeque::new();
        for (number, &(stripe, index)) in todo.iter().enumerate() {
            while asked < todo.len().min(number + PREFETCH_STRIPES) {
                for (at, chunk) in needs(todo[asked].0) {
                    if let Some(rank) = rank(at).filter(|_| exists(at, chunk, &lengths)) {
                        peers.at(at, 0)?.send(&Request::Chunk { id, rank, chunk })?;
                    }
                }
                asked += 1;
            }
            let len = stripe_len(&stripes, stripe, &lengths, size);
            let mut data = Vec::with_capacity(stripes.data());
            for (at, chunk) in needs(stripe) {
                let mut bytes = if exists(at, chunk, &lengths) {
                    peers.at(at, 0)?.receive_bytes()?
                } else {
                    Vec::new()
                };
                bytes.resize(len, 0);
                data.push(bytes);
            }
            let mut parity: Vec<Vec<u8>> = (0..stripes.parity)
                .map(|_| keeper.lock().spare_buffers.pop().unwrap_or_default())
                .collect();
            parity.iter_mut().for_each(|bytes| bytes.resize(len, 0));
            let views: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
            code.encode(
                &views,
                &mut parity.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>(),
            );
            for (number, bytes) in parity.into_iter().enumerate() {
                if number == index {
                    let crc = crate::checksum::crc32c(&bytes);
                    keeper
                        .lock()
                        .parity
                        .entry(id)
                        .or_default()
                        .insert((local, stripe), (bytes, crc));
                } else if encoder && number > 0 {
                    let at = stripes.parity_position(stripe, number);
                    peers.at(at, 1)?.send(&Request::PutParity {
                        id,
                        local,
                        stripe,
                        bytes,
                    })?;
                    pushed.push_back(at);
                } else {
                    keeper.lock().spare_buffers.push(bytes);
                }
            }
            while pushed.len() > PREFETCH_STRIPES {
                let at = pushed.pop_front().expect("it is not empty");
                peers.at(at, 1)?.receive()?;
            }
        }
        for at in pushed {
            peers.at(at, 1)?.receive()?;
        }
    }
    for (_, peer) in std::mem::take(&mut peers.open) {
        keeper.peers.put(peer);
    }
    keeper.lock().coding_time += thread_time().saturating_sub(began);
    Ok(())
}

/// Connections to the positions of a group, each with a direction for what is pulled and one for what is pushed.
struct Connections<'a> {
    keeper: &'a Keeper,
    sources: &'a [Option<SocketAddr>],
    open: BTreeMap<(usize, usize), Peer>,
}

impl Connections<'_> {
    fn at(&mut self, position: usize, direction: usize) -> Result<&mut Peer, Error> {
        if !self.open.contains_key(&(position, direction)) {
            let address = self.sources[position]
                .ok_or_else(|| Error::Refused(format!("position {position} is lost")))?;
            self.open
                .insert((position, direction), self.keeper.peers.get(address)?);
        }
        Ok(self
            .open
            .get_mut(&(position, direction))
            .expect("it was just put there"))
    }
}

/// CPU time of this thread.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
