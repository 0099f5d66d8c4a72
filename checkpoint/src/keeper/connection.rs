//! Connections to a keeper, for the launcher, for tools and for other keepers.

use super::{
    checksums::Checksums,
    fault::Fault,
    protocol::{Reply, Request},
    recover::Rebuild,
    report::{Damage, Event, Inventory, Status},
    sizes::keeper_purpose,
    snapshot::{PartInfo, Snapshot, SnapshotId},
    topology::Topology,
};
use crate::{
    Shard,
    secure::{Connection, Error, Secret, connect_tcp},
};
use parking_lot::{Mutex, MutexGuard};
use std::{
    collections::HashMap,
    net::{Shutdown, SocketAddr, TcpStream},
    path::Path,
    sync::{Arc, Weak},
    time::Duration,
};

/// Limit for a reply of another keeper, and for what the reply waits for.
pub(super) const PEER_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time for connecting: a keeper whose places are taken turns a client away at first.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// A connection to a keeper. Each method sends a request and waits for the reply.
///
/// A method fails if the connection is closed, the reply does not arrive in time, or the keeper
/// refuses. After [`Error::Refused`] the connection is still usable.
pub struct Peer {
    connection: Connection<TcpStream>,
    timeout: Duration,
    address: SocketAddr,
}

/// Ends a connection to a keeper that another thread uses.
#[derive(Debug)]
pub struct Closer(Weak<TcpStream>);

impl Closer {
    fn of(connection: &Connection<TcpStream>) -> Closer {
        Closer(Arc::downgrade(connection.socket()))
    }

    /// False once the connection has ended by itself.
    pub fn is_open(&self) -> bool {
        self.0.strong_count() > 0
    }

    /// Ends the connection. Whatever waits for it fails.
    pub fn close(&self) {
        if let Some(socket) = self.0.upgrade() {
            // It fails if the peer was first.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Peer {
    /// Connects to a keeper, whose replies then have to arrive within `timeout`. Connecting may
    /// take as long, but 15 s at most.
    ///
    /// # Errors
    /// If no keeper of this run answers at `address`; [`Error::is_lost`] tells whether there is
    /// none, or a busy one.
    pub fn connect(address: SocketAddr, secret: &Secret, timeout: Duration) -> Result<Peer, Error> {
        let connect_timeout = timeout.min(CONNECT_TIMEOUT);
        let connection = connect_tcp(address, secret, keeper_purpose(), connect_timeout)?;
        Ok(Peer {
            connection,
            timeout,
            address,
        })
    }

    /// Returns what ends the connection from another thread, whatever this one waits for.
    pub fn closer(&self) -> Closer {
        Closer::of(&self.connection)
    }

    pub(super) fn send(&mut self, request: &Request) -> Result<(), Error> {
        self.connection.send(request)
    }

    pub(super) fn receive(&mut self) -> Result<Reply, Error> {
        match self.connection.receive(Some(self.timeout))? {
            Reply::Refused(reason) => Err(Error::Refused(reason)),
            reply => Ok(reply),
        }
    }

    pub(super) fn receive_bytes(&mut self) -> Result<Vec<u8>, Error> {
        match self.receive()? {
            Reply::Bytes(bytes) => Ok(bytes),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) fn receive_checksums(&mut self) -> Result<Vec<u32>, Error> {
        match self.receive()? {
            Reply::Checksums(crcs) => Ok(crcs),
            other => Err(unexpected(&other)),
        }
    }

    /// Returns the checksums of a complete part, if the keeper has them and they are those that
    /// its snapshot names.
    pub(super) fn checksums(
        &mut self,
        id: SnapshotId,
        part: &PartInfo,
        chunk_bytes: usize,
    ) -> Result<Checksums, Error> {
        self.send(&Request::Checksums {
            id,
            rank: part.rank,
            waits: false,
        })?;
        Checksums::verified(self.receive_checksums()?, part, chunk_bytes)
    }

    pub(super) fn ask(&mut self, request: &Request) -> Result<Reply, Error> {
        self.send(request)?;
        self.receive()
    }

    fn command(&mut self, request: &Request) -> Result<(), Error> {
        match self.ask(request)? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Begins a generation, in which the keeper is node number `node`.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn set_up(&mut self, topology: &Topology, node: usize) -> Result<(), Error> {
        let topology = topology.clone();
        self.command(&Request::Setup { topology, node })
    }

    /// Returns what the keeper holds.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn inventory(&mut self) -> Result<Inventory, Error> {
        match self.ask(&Request::Inventory)? {
            Reply::Inventory(inventory) => Ok(*inventory),
            other => Err(unexpected(&other)),
        }
    }

    /// Returns the state of the keeper, for people.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn status(&mut self) -> Result<Status, Error> {
        match self.ask(&Request::Status)? {
            Reply::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }

    /// Declares a snapshot complete on every rank.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn commit(&mut self, snapshot: &Snapshot) -> Result<(), Error> {
        self.command(&Request::Commit(snapshot.clone()))
    }

    /// Declares that a snapshot will never be complete.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn abandon(&mut self, id: SnapshotId) -> Result<(), Error> {
        self.command(&Request::Abandon(id))
    }

    /// Selects the snapshot that ranks restore; the keeper forgets newer ones. `holders` are the
    /// keepers that have the parts, by rank.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn select_restore(
        &mut self,
        snapshot: Option<&Snapshot>,
        holders: &[SocketAddr],
    ) -> Result<(), Error> {
        self.command(&Request::SelectRestore {
            snapshot: snapshot.cloned(),
            holders: holders.to_vec(),
        })
    }

    /// Compares what the keeper has of a snapshot with the checksums.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn verify(&mut self, id: SnapshotId) -> Result<Damage, Error> {
        match self.ask(&Request::Verify(id))? {
            Reply::Damage(damage) => Ok(damage),
            other => Err(unexpected(&other)),
        }
    }

    /// Rebuilds a rank's part from what other nodes have.
    ///
    /// # Errors
    /// See [`Peer`]; also if too little is left.
    pub fn rebuild(&mut self, rebuild: Rebuild) -> Result<(), Error> {
        self.command(&Request::Rebuild(Box::new(rebuild)))
    }

    /// Makes the parity again that `node` should have of a snapshot. `sources` are the keepers that
    /// have the parts, by position in the group.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn protect(
        &mut self,
        snapshot: &Snapshot,
        node: usize,
        sources: &[Option<SocketAddr>],
    ) -> Result<(), Error> {
        self.command(&Request::Protect {
            snapshot: snapshot.clone(),
            node,
            sources: sources.to_vec(),
        })
    }

    /// Keeps the parts of a complete snapshot until [`Peer::unpin`]. A keeper pins one snapshot at
    /// a time.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn pin(&mut self, id: SnapshotId) -> Result<(), Error> {
        self.command(&Request::Pin(id))
    }

    /// Releases the pinned snapshot.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn unpin(&mut self) -> Result<(), Error> {
        self.command(&Request::Unpin)
    }

    /// Writes the parts of these ranks as shards of a checkpoint.
    ///
    /// # Errors
    /// See [`Peer`]; also if the disk is full.
    pub fn persist(
        &mut self,
        id: SnapshotId,
        ranks: &[usize],
        folder: &Path,
    ) -> Result<Vec<Shard>, Error> {
        let request = Request::Persist {
            id,
            ranks: ranks.to_vec(),
            folder: folder.to_path_buf(),
        };
        match self.ask(&request)? {
            Reply::Shards(shards) => Ok(shards),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes a fault on purpose.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn inject(&mut self, fault: Fault) -> Result<(), Error> {
        self.command(&Request::Inject(fault))
    }

    /// Ends the process of the keeper.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn stop(&mut self) -> Result<(), Error> {
        self.command(&Request::Stop)
    }

    /// Turns this connection into a stream of all later events. A launcher that connects again
    /// with its number also receives a stop signal that it may have missed. A keeper that another
    /// launcher takes over forgets the signal: it concerned the run that has ended.
    ///
    /// # Errors
    /// See [`Peer`].
    pub fn subscribe(mut self, launcher: u64) -> Result<EventStream, Error> {
        self.command(&Request::Subscribe { launcher })?;
        Ok(EventStream {
            connection: self.connection,
        })
    }
}

/// A connection on which a keeper sends events.
pub struct EventStream {
    connection: Connection<TcpStream>,
}

impl EventStream {
    /// Returns what ends the stream from another thread.
    pub fn closer(&self) -> Closer {
        Closer::of(&self.connection)
    }

    /// Calls `on_event` for each event. Returns the error that ended the stream. A keeper that is
    /// silent does not end it.
    pub fn for_each_event(mut self, mut on_event: impl FnMut(Event)) -> Error {
        loop {
            match self.connection.receive(None) {
                Ok(event) => on_event(event),
                Err(error) => return error,
            }
        }
    }
}

fn unexpected(reply: &Reply) -> Error {
    Error::Protocol(format!("unexpected reply from a keeper: {reply:?}"))
}

/// Connections to other keepers that can be used again.
pub(super) struct PeerPool {
    secret: Secret,
    idle: Mutex<HashMap<SocketAddr, Vec<Peer>>>,
    fetching: Mutex<()>,
}

impl PeerPool {
    pub(super) fn new(secret: Secret) -> PeerPool {
        PeerPool {
            secret,
            idle: Mutex::default(),
            fetching: Mutex::default(),
        }
    }

    /// Locks the fetching of parts from other keepers.
    pub(super) fn lock_fetching(&self) -> MutexGuard<'_, ()> {
        self.fetching.lock()
    }

    /// Returns an idle connection, or a new one.
    pub(super) fn get(&self, address: SocketAddr) -> Result<Peer, Error> {
        let idle = self.idle.lock().get_mut(&address).and_then(Vec::pop);
        match idle {
            Some(peer) => Ok(peer),
            None => Peer::connect(address, &self.secret, 2 * PEER_TIMEOUT),
        }
    }

    /// Takes back a connection on which no reply is due.
    pub(super) fn put(&self, peer: Peer) {
        let mut idle = self.idle.lock();
        idle.entry(peer.address).or_default().push(peer);
    }
}
