//! Making parity: a keeper pulls the chunks of its stripes from the other nodes of its group,
//! encodes them and pushes the parities to where they belong.
//!
//! Pulling gives back-pressure: no keeper receives what it has not requested. A chunk is requested
//! before it exists and is sent as soon as the rank has filled it, so parity is made while the rank
//! still copies. The data of a stripe crosses the network once, and each further parity once more.

use super::{
    checksums::Checksums,
    connection::Peer,
    daemon::Keeper,
    decide::{Membership, StripeId},
    layout::{DataChunk, GroupLayout, OwnParity, chunk_len},
    protocol::{Reply, Request},
    snapshot::{Snapshot, SnapshotId},
    topology::{CodePosition, GroupPosition, Topology},
};
use crate::{erasure::ErasureCode, secure::Error, stripes::StripeLayout};
use nix::time::{ClockId, clock_gettime};
use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    net::SocketAddr,
    time::Duration,
};

/// Number of stripes that are requested ahead.
const PREFETCH_STRIPES: usize = 4;

/// Returns chunk number `chunk` of a rank's part, as soon as it is filled.
///
/// # Errors
/// If the part is not here and cannot arrive any more, or is not filled in time.
pub(super) fn read_chunk(
    keeper: &Keeper,
    id: SnapshotId,
    rank: usize,
    chunk: u64,
) -> Result<Vec<u8>, Error> {
    let chunk_bytes = keeper.apply(|state| state.chunk_bytes(id))?;
    let start = chunk.saturating_mul(chunk_bytes as u64);
    let end = start.saturating_add(chunk_bytes as u64);
    keeper.read_part(id, rank, end, |region, part| {
        let mut bytes = vec![0; chunk_len(part.bytes, chunk_bytes, chunk)];
        region.copy_out(start.min(part.bytes) as usize, &mut bytes);
        bytes
    })
}

/// Makes the parity of a new snapshot that this node encodes.
///
/// # Errors
/// If a node of the group is lost, or a part is not filled in time.
pub(super) fn encode(keeper: &Keeper, id: SnapshotId) -> Result<(), Error> {
    let membership = keeper.apply(|state| state.membership(id.generation).cloned());
    let unknown = || Error::Refused(format!("generation {} is not known here", id.generation));
    let Membership { topology, node } = membership.ok_or_else(unknown)?;
    let Some(GroupPosition { group, .. }) = topology.group_position(node) else {
        return Ok(());
    };
    let mut sources = Vec::new();
    for &node in &topology.groups[group] {
        let address = topology.nodes[node].address;
        sources.push(Some(address));
    }
    let job = ParityJob {
        keeper,
        topology: &topology,
        id,
        node,
        sources: &sources,
        role: Role::Encoder,
    };
    job.run()
}

/// Makes all parity again that `node` should have of a complete snapshot.
///
/// # Errors
/// If a source is lost, or a part is not there.
pub(super) fn reencode(
    keeper: &Keeper,
    snapshot: &Snapshot,
    node: usize,
    sources: &[Option<SocketAddr>],
) -> Result<(), Error> {
    let topology = snapshot.topology.clone();
    keeper.apply(|state| state.insert_membership(topology, node));
    let job = ParityJob {
        keeper,
        topology: &snapshot.topology,
        id: snapshot.id,
        node,
        sources,
        role: Role::Holder,
    };
    job.run()?;
    keeper.apply(|state| state.mark_protected(snapshot.id));
    Ok(())
}

/// Which parity a job makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// All parity of the stripes whose first parity belongs here. Other nodes receive theirs.
    Encoder,
    /// The parity that belongs here, of all stripes.
    Holder,
}

/// Making the parity of a snapshot on one node.
struct ParityJob<'a> {
    keeper: &'a Keeper,
    topology: &'a Topology,
    id: SnapshotId,
    node: usize,
    /// The keeper of each position of the group.
    sources: &'a [Option<SocketAddr>],
    role: Role,
}

impl ParityJob<'_> {
    fn run(&self) -> Result<(), Error> {
        let start = thread_time();
        let Some(own) = self.topology.group_position(self.node) else {
            return Ok(());
        };
        let most_ranks = self.topology.groups[own.group]
            .iter()
            .map(|&node| self.topology.nodes[node].ranks.len())
            .max()
            .unwrap_or(0);
        let mut peers = GroupConnections {
            keeper: self.keeper,
            sources: self.sources,
            open: BTreeMap::new(),
        };
        for local in 0..most_ranks {
            let Some(stripes) = self.topology.stripes(own.group, local) else {
                return Ok(());
            };
            let own = CodePosition {
                group: own.group,
                position: own.position,
                local,
            };
            let mut encoder = Encoder::new(self, own, stripes, &mut peers)?;
            encoder.run()?;
            encoder.fetch_checksums()?;
        }
        peers.close();
        let time = thread_time().saturating_sub(start);
        self.keeper.apply(|state| state.add_coding_time(time));
        Ok(())
    }
}

/// Encoding the parts of the ranks with one local number.
struct Encoder<'a, 'p> {
    job: &'a ParityJob<'a>,
    /// This node's place in the code.
    own: CodePosition,
    layout: GroupLayout,
    code: ErasureCode,
    peers: &'p mut GroupConnections<'a>,
    /// The positions to which parity was pushed that they have not confirmed.
    unconfirmed: VecDeque<usize>,
}

impl<'a, 'p> Encoder<'a, 'p> {
    fn new(
        job: &'a ParityJob<'a>,
        own: CodePosition,
        stripes: StripeLayout,
        peers: &'p mut GroupConnections<'a>,
    ) -> Result<Encoder<'a, 'p>, Error> {
        let code = ErasureCode::new(job.topology.redundancy, stripes.data(), stripes.parity)
            .map_err(|e| Error::Refused(e.to_string()))?;
        let mut encoder = Encoder {
            job,
            own,
            layout: GroupLayout {
                stripes,
                chunk_bytes: job.topology.chunk_bytes,
                part_bytes: vec![0; stripes.nodes],
            },
            code,
            peers,
            unconfirmed: VecDeque::new(),
        };
        for position in 0..stripes.nodes {
            if let Some(rank) = encoder.rank_at(position) {
                encoder.layout.part_bytes[position] = encoder.request_length(position, rank)?;
            }
        }
        Ok(encoder)
    }

    fn run(&mut self) -> Result<(), Error> {
        let num_parities = match self.job.role {
            Role::Encoder => 1,
            Role::Holder => self.layout.stripes.parity,
        };
        let todo = self.layout.parities_at(self.own.position, num_parities);
        let mut requested = 0;
        for (done, &own) in todo.iter().enumerate() {
            while requested < todo.len().min(done + PREFETCH_STRIPES) {
                self.request_data(todo[requested].stripe)?;
                requested += 1;
            }
            let data = self.receive_data(own.stripe)?;
            let parities = self.encode(own.stripe, &data);
            self.place_parities(own, parities)?;
            self.confirm_pushes(PREFETCH_STRIPES)?;
        }
        self.confirm_pushes(0)
    }

    /// Fetches the checksums of the other positions' parts, without which a lost part could be
    /// rebuilt but not checked.
    fn fetch_checksums(&mut self) -> Result<(), Error> {
        let id = self.job.id;
        let mut others = Vec::new();
        for position in 0..self.layout.stripes.nodes {
            let rank = self.rank_at(position);
            others.extend(
                rank.filter(|_| position != self.own.position)
                    .map(|rank| (position, rank)),
            );
        }
        for &(position, rank) in &others {
            let waits = true;
            let request = Request::Checksums { id, rank, waits };
            self.peers.get(position, Direction::Pull)?.send(&request)?;
        }
        for (position, rank) in others {
            let crcs = self
                .peers
                .get(position, Direction::Pull)?
                .receive_checksums()?;
            let checksums = Checksums::new(crcs);
            let keeper = self.job.keeper;
            keeper.apply(|state| state.put_checksums(id, rank, checksums));
        }
        Ok(())
    }

    fn rank_at(&self, position: usize) -> Option<usize> {
        self.job.topology.rank_at(CodePosition {
            position,
            ..self.own
        })
    }

    fn request_length(&mut self, position: usize, rank: usize) -> Result<u64, Error> {
        let id = self.job.id;
        let peer = self.peers.get(position, Direction::Pull)?;
        match peer.ask(&Request::Length { id, rank })? {
            Reply::Length(bytes) => Ok(bytes),
            other => Err(Error::Protocol(format!(
                "unexpected reply from a keeper to a request for a length: {other:?}"
            ))),
        }
    }

    fn request_data(&mut self, stripe: u64) -> Result<(), Error> {
        let id = self.job.id;
        for data in self.layout.data_chunks(stripe) {
            let DataChunk {
                position,
                chunk,
                len,
            } = data;
            if len == 0 {
                continue;
            }
            if let Some(rank) = self.rank_at(position) {
                let request = Request::Chunk { id, rank, chunk };
                self.peers.get(position, Direction::Pull)?.send(&request)?;
            }
        }
        Ok(())
    }

    /// Receives the chunks of a stripe, padded to equal length.
    fn receive_data(&mut self, stripe: u64) -> Result<Vec<Vec<u8>>, Error> {
        let stripe_len = self.layout.stripe_len(stripe);
        let mut data = Vec::with_capacity(self.layout.stripes.data());
        for chunk in self.layout.data_chunks(stripe) {
            let mut bytes = if chunk.len > 0 {
                let peer = self.peers.get(chunk.position, Direction::Pull)?;
                peer.receive_bytes()?
            } else {
                Vec::new()
            };
            bytes.resize(stripe_len, 0);
            data.push(bytes);
        }
        Ok(data)
    }

    fn encode(&self, stripe: u64, data: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let stripe_len = self.layout.stripe_len(stripe);
        let mut parities = Vec::with_capacity(self.layout.stripes.parity);
        for _ in 0..self.layout.stripes.parity {
            let mut buffer = self.job.keeper.apply(|state| state.take_buffer());
            buffer.resize(stripe_len, 0);
            parities.push(buffer);
        }
        let data: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
        let mut outputs: Vec<&mut [u8]> = parities.iter_mut().map(Vec::as_mut_slice).collect();
        self.code.encode(&data, &mut outputs);
        parities
    }

    /// Stores the parity that belongs here, and pushes the others if this node encodes.
    fn place_parities(&mut self, own: OwnParity, parities: Vec<Vec<u8>>) -> Result<(), Error> {
        let id = self.job.id;
        let local = self.own.local;
        let stripe = own.stripe;
        for (index, bytes) in parities.into_iter().enumerate() {
            if index == own.index {
                let stripe = StripeId { local, stripe };
                let keeper = self.job.keeper;
                keeper.apply(|state| state.put_parity(id, stripe, bytes))?;
            } else if self.job.role == Role::Encoder {
                let position = self.layout.stripes.parity_position(stripe, index);
                let request = Request::PutParity {
                    id,
                    local,
                    stripe,
                    bytes,
                };
                self.peers.get(position, Direction::Push)?.send(&request)?;
                self.unconfirmed.push_back(position);
            } else {
                self.job.keeper.apply(|state| state.return_buffer(bytes));
            }
        }
        Ok(())
    }

    /// Waits until at most `most` pushes are unconfirmed.
    fn confirm_pushes(&mut self, most: usize) -> Result<(), Error> {
        while self.unconfirmed.len() > most {
            let position = self.unconfirmed.pop_front().expect("it is not empty");
            let peer = self.peers.get(position, Direction::Push)?;
            peer.receive()?;
        }
        Ok(())
    }
}

/// Pulled chunks and pushed parity have different connections, so that neither waits for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Direction {
    Pull,
    Push,
}

/// Connections to the positions of a group.
struct GroupConnections<'a> {
    keeper: &'a Keeper,
    sources: &'a [Option<SocketAddr>],
    open: BTreeMap<(usize, Direction), Peer>,
}

impl GroupConnections<'_> {
    fn get(&mut self, position: usize, direction: Direction) -> Result<&mut Peer, Error> {
        match self.open.entry((position, direction)) {
            Entry::Occupied(peer) => Ok(peer.into_mut()),
            Entry::Vacant(vacant) => {
                let lost = || Error::Refused(format!("position {position} of the group is lost"));
                let address = self.sources[position].ok_or_else(lost)?;
                Ok(vacant.insert(self.keeper.peers.get(address)?))
            }
        }
    }

    /// Returns the connections, on which no reply is due, to the pool.
    fn close(self) {
        for peer in self.open.into_values() {
            self.keeper.peers.put(peer);
        }
    }
}

/// Returns the CPU time of this thread.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
