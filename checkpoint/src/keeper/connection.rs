//! Asking a keeper for something.

use super::serve::PEER_TIMEOUT;
use super::{
    Damage, Error, Event, Fault, Inventory, Reply, Request, Secret, Snapshot, SnapshotId, Status,
    Topology, recover, wire,
};
use crate::Shard;
use parking_lot::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

/// A connection to a keeper.
pub struct Peer {
    stream: TcpStream,
    address: SocketAddr,
}

impl Peer {
    /// Connects; every answer then has to come within `timeout`.
    ///
    /// # Errors
    /// When no keeper of this run is there.
    pub fn connect(address: SocketAddr, secret: &Secret, timeout: Duration) -> Result<Peer, Error> {
        Ok(Peer {
            stream: wire::connect(address, secret, timeout)?,
            address,
        })
    }

    pub(crate) fn send(&mut self, request: &Request) -> Result<(), Error> {
        wire::send(&mut self.stream, request)
    }

    pub(crate) fn receive(&mut self) -> Result<Reply, Error> {
        match wire::receive(&mut self.stream)? {
            Reply::Refused(reason) => Err(Error::Refused(reason)),
            reply => Ok(reply),
        }
    }

    pub(crate) fn receive_bytes(&mut self) -> Result<Vec<u8>, Error> {
        match self.receive()? {
            Reply::Bytes(bytes) => Ok(bytes),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) fn ask(&mut self, request: &Request) -> Result<Reply, Error> {
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
    /// As all of these: when the keeper is gone, does not answer in time, or refuses.
    pub fn set_up(&mut self, topology: &Topology, node: usize) -> Result<(), Error> {
        self.command(&Request::Setup {
            topology: topology.clone(),
            node,
        })
    }

    /// What it has.
    ///
    /// # Errors
    /// As [`Peer::set_up`].
    pub fn inventory(&mut self) -> Result<Inventory, Error> {
        match self.ask(&Request::Inventory)? {
            Reply::Inventory(inventory) => Ok(inventory),
            other => Err(unexpected(&other)),
        }
    }

    /// What people want to know.
    ///
    /// # Errors
    /// As [`Peer::set_up`].
    pub fn status(&mut self) -> Result<Status, Error> {
        match self.ask(&Request::Status)? {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Says that a snapshot is complete on every rank.
    ///
    /// # Errors
    /// As [`Peer::set_up`].
    pub fn commit(&mut self, snapshot: &Snapshot) -> Result<(), Error> {
        self.command(&Request::Commit(snapshot.clone()))
    }

    /// Says that a snapshot never will be.
    ///
    /// # Errors
    /// As [`Peer::set_up`].
    pub fn abandon(&mut self, id: SnapshotId) -> Result<(), Error> {
        self.command(&Request::Abandon(id))
    }

    /// Says what ranks are to restore, and who has each rank's part; anything newer is forgotten.
    ///
    /// # Errors
    /// As [`Peer::set_up`].
    pub fn keep(
        &mut self,
        snapshot: Option<&Snapshot>,
        holders: &[SocketAddr],
    ) -> Result<(), Error> {
        self.command(&Request::Keep {
            snapshot: snapshot.cloned(),
            holders: holders.to_vec(),
        })
    }

    /// What of a snapshot here is damaged.
    ///
    /// # Errors
    /// As [`Peer::set_up`].
    pub fn verify(&mut self, id: SnapshotId) -> Result<Damage, Error> {
        match self.ask(&Request::Verify(id))? {
            Reply::Damage(damage) => Ok(damage),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes a rank's part out of what other nodes have.
    ///
    /// # Errors
    /// As [`Peer::set_up`], and when too little is left.
    pub fn rebuild(&mut self, rebuild: recover::Rebuild) -> Result<(), Error> {
        self.command(&Request::Rebuild(Box::new(rebuild)))
    }

    /// Makes anew the parity that `node` should have of a snapshot; `sources` are the keepers that have what the positions of
    /// its group should.
    ///
    /// # Errors
    /// As [`Peer::set_up`].
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

    /// Keeps the parts of a complete snapshot until they are written to disk; one snapshot at a time.
    ///
    /// # Errors
    /// As [`Peer::set_up`].
    pub fn pin(&mut self, id: SnapshotId) -> Result<(), Error> {
        self.command(&Request::Pin(id))
    }

    /// Ends what [`Peer::pin`] began.
    ///
    /// # Errors
    /// As [`Peer::set_up`].
    pub fn unpin(&mut self) -> Result<(), Error> {
        self.command(&Request::Unpin)
    }

    /// Writes the parts of these ranks as shards of a checkpoint.
    ///
    /// # Errors
    /// As [`Peer::set_up`], and when the disk is full.
    pub fn persist(
        &mut self,
        id: SnapshotId,
        ranks: &[usize],
        folder: &Path,
    ) -> Result<Vec<Shard>, Error> {
        match self.ask(&Request::Persist {
            id,
            ranks: ranks.to_vec(),
            folder: folder.to_path_buf(),
        })? {
            Reply::Shards(shards) => Ok(shards),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes a fault on purpose.
    ///
    /// # Errors
    /// As [`Peer::set_up`].
    pub fn inject(&mut self, fault: Fault) -> Result<(), Error> {
        self.command(&Request::Inject(fault))
    }

    /// Ends the keeper.
    ///
    /// # Errors
    /// As [`Peer::set_up`].
    pub fn stop(&mut self) -> Result<(), Error> {
        self.command(&Request::Stop)
    }

    /// Makes this connection one of events: of all from here on none is missed.
    ///
    /// # Errors
    /// As [`Peer::set_up`].
    pub fn watch(mut self) -> Result<EventStream, Error> {
        self.command(&Request::Subscribe)?;
        Ok(EventStream(self.stream))
    }
}

/// A connection on which a keeper tells what happens.
pub struct EventStream(TcpStream);

impl EventStream {
    /// Hands each event to `on_event`, until the keeper is gone or says nothing for the connection's timeout; then why.
    pub fn for_each_event(mut self, mut on_event: impl FnMut(Event)) -> Error {
        loop {
            match wire::receive(&mut self.0) {
                Ok(event) => on_event(event),
                Err(error) => return error,
            }
        }
    }
}

fn unexpected(reply: &Reply) -> Error {
    Error::Protocol(format!("a keeper answered something else: {reply:?}"))
}

/// Connections that can be used again.
pub(crate) struct PeerPool {
    secret: Secret,
    idle: Mutex<HashMap<SocketAddr, Vec<Peer>>>,
    fetching: Mutex<()>,
}

impl PeerPool {
    pub(crate) fn new(secret: Secret) -> PeerPool {
        PeerPool {
            secret,
            idle: Mutex::default(),
            fetching: Mutex::default(),
        }
    }

    /// Held by the one who brings parts here.
    pub(crate) fn lock_fetching(&self) -> MutexGuard<'_, ()> {
        self.fetching.lock()
    }

    /// A connection, old or new.
    pub(crate) fn get(&self, address: SocketAddr) -> Result<Peer, Error> {
        let idle = self.idle.lock().get_mut(&address).and_then(Vec::pop);
        match idle {
            Some(peer) => Ok(peer),
            None => Peer::connect(address, &self.secret, 2 * PEER_TIMEOUT),
        }
    }

    /// Takes a connection back on which no reply is due.
    pub(crate) fn put(&self, peer: Peer) {
        self.idle.lock().entry(peer.address).or_default().push(peer);
    }
}
