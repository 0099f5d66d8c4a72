//! How a rank reaches its node's keeper.

use super::wire::{self, TimeoutStream};
use super::{Error, RankReply, RankRequest, Secret, SnapshotId};
use crate::memory::{Region, receive_file};
use std::fs::File;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::Arc;
use std::time::Duration;

/// A rank waits for an answer no longer than this while it trains.
const REPLY_TIMEOUT: Duration = Duration::from_millis(500);
/// While it starts: memory is made then, and parts come from other nodes.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(120);

fn connect(socket: &str, secret: &Secret, rank: usize) -> Result<UnixStream, Error> {
    let address = SocketAddr::from_abstract_name(socket)?;
    let mut stream = UnixStream::connect_addr(&address)?;
    wire::client_handshake(&mut stream, secret)?;
    wire::send(&mut stream, &RankRequest::Hello { rank })?;
    match wire::receive(&mut stream)? {
        RankReply::Ack => Ok(stream),
        other => Err(unexpected(other)),
    }
}

fn unexpected(reply: RankReply) -> Error {
    match reply {
        RankReply::Refused(reason) => Error::Refused(reason),
        other => Error::Protocol(format!("the keeper answered something else: {other:?}")),
    }
}

/// A slot's memory, mapped here.
pub type SlotMemory = Arc<Region>;

/// Requests of a rank's training thread.
pub struct KeeperClient {
    stream: UnixStream,
}

impl KeeperClient {
    /// Connects rank `rank` to the keeper that listens on `socket`.
    ///
    /// # Errors
    /// When no keeper of this run is there.
    pub fn connect(socket: &str, secret: &Secret, rank: usize) -> Result<KeeperClient, Error> {
        Ok(KeeperClient {
            stream: connect(socket, secret, rank)?,
        })
    }

    fn ask(&mut self, request: &RankRequest, timeout: Duration) -> Result<RankReply, Error> {
        self.stream.set_timeouts(Some(timeout), Some(timeout))?;
        wire::send(&mut self.stream, request)?;
        match wire::receive(&mut self.stream)? {
            RankReply::Refused(reason) => Err(Error::Refused(reason)),
            reply => Ok(reply),
        }
    }

    /// Takes `slots` slots of `bytes` bytes, those of an earlier attempt where they fit.
    ///
    /// # Errors
    /// When the node has too little memory: how much is missing.
    pub fn allocate(&mut self, bytes: u64, slots: usize) -> Result<Vec<SlotMemory>, Error> {
        let count = match self.ask(&RankRequest::Allocate { bytes, slots }, STARTUP_TIMEOUT)? {
            RankReply::Slots(count) => count,
            other => return Err(unexpected(other)),
        };
        let files = (0..count)
            .map(|_| receive_file(&self.stream))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(files
            .into_iter()
            .map(|file| Region::open(file).map(Arc::new))
            .collect::<Result<_, _>>()?)
    }

    /// Takes a free slot for a snapshot of `bytes` bytes, if there is one.
    ///
    /// # Errors
    /// When the keeper is gone or does not answer at once.
    pub fn reserve(
        &mut self,
        id: SnapshotId,
        bytes: u64,
        durable: bool,
    ) -> Result<Option<usize>, Error> {
        match self.ask(&RankRequest::Reserve { id, bytes, durable }, REPLY_TIMEOUT)? {
            RankReply::Slot(slot) => Ok(slot),
            other => Err(unexpected(other)),
        }
    }

    /// Gives a slot back that another rank had none for.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn release(&mut self, slot: usize) -> Result<(), Error> {
        wire::send(&mut self.stream, &RankRequest::Release { slot })
    }

    /// The header of `rank`'s part of the snapshot that is to be restored.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn head(&mut self, rank: usize) -> Result<Vec<u8>, Error> {
        match self.ask(&RankRequest::Header { rank }, STARTUP_TIMEOUT)? {
            RankReply::Bytes(bytes) => Ok(bytes),
            other => Err(unexpected(other)),
        }
    }

    /// That part, to be read.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn open(&mut self, rank: usize) -> Result<File, Error> {
        match self.ask(&RankRequest::Open { rank }, STARTUP_TIMEOUT)? {
            RankReply::Part => Ok(receive_file(&self.stream)?),
            other => Err(unexpected(other)),
        }
    }
}

/// What a rank's copying thread reports; nothing is answered.
pub struct FillReporter {
    stream: UnixStream,
}

impl FillReporter {
    /// As [`KeeperClient::connect`].
    ///
    /// # Errors
    /// As [`KeeperClient::connect`].
    pub fn connect(socket: &str, secret: &Secret, rank: usize) -> Result<FillReporter, Error> {
        let stream = connect(socket, secret, rank)?;
        stream.set_timeouts(Some(REPLY_TIMEOUT), Some(REPLY_TIMEOUT))?;
        Ok(FillReporter { stream })
    }

    /// The slot is filled up to byte `filled_to`; `crcs` are of the chunks that were completed.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn filled(&mut self, slot: usize, filled_to: u64, crcs: Vec<u32>) -> Result<(), Error> {
        wire::send(
            &mut self.stream,
            &RankRequest::Filled {
                slot,
                filled_to,
                crcs,
            },
        )
    }

    /// Waits until the keeper has heard all that was said before.
    ///
    /// # Errors
    /// When the keeper is gone, or does not answer in time.
    pub fn sync(&mut self) -> Result<(), Error> {
        self.stream
            .set_timeouts(Some(STARTUP_TIMEOUT), Some(REPLY_TIMEOUT))?;
        wire::send(&mut self.stream, &RankRequest::Sync)?;
        match wire::receive(&mut self.stream)? {
            RankReply::Ack => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// The rank lives, has done `step` steps, and has got on `progress` times.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn heartbeat(&mut self, step: u64, progress: u64) -> Result<(), Error> {
        wire::send(&mut self.stream, &RankRequest::Heartbeat { step, progress })
    }
}
