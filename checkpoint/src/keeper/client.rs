//! Connections of a rank to its node's keeper.

use super::{
    protocol::{RankReply, RankRequest},
    snapshot::SnapshotId,
};
use crate::{
    memory::{Region, receive_file},
    secure::{Connection, Error, Purpose, Secret, connect_local},
};
use std::{
    fs::File,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Limit of a rank's waiting for a reply while it trains.
const REPLY_TIMEOUT: Duration = Duration::from_millis(500);
/// Limit while a rank starts, when memory is allocated and parts come from other nodes.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(120);
/// Limit of connecting: a keeper whose places are taken turns a client away at first.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Number of this process's last session with a keeper.
static LAST_SESSION: AtomicU64 = AtomicU64::new(0);

fn connect(
    socket: &str,
    secret: &Secret,
    rank: usize,
    session: u64,
) -> Result<Connection<UnixStream>, Error> {
    let mut connection = connect_local(socket, secret, Purpose::RANK, CONNECT_TIMEOUT)?;
    connection.send(&RankRequest::Hello { rank, session })?;
    match connection.receive(Some(CONNECT_TIMEOUT))? {
        RankReply::Ack => Ok(connection),
        other => Err(unexpected(other)),
    }
}

fn unexpected(reply: RankReply) -> Error {
    match reply {
        RankReply::Refused(reason) => Error::Refused(reason),
        other => Error::Protocol(format!("unexpected reply from the keeper: {other:?}")),
    }
}

/// The memory of a slot, mapped into this process.
pub type SlotMemory = Arc<Region>;

/// The connection of a rank's training thread, which begins a session of the rank. The keeper drops
/// what an earlier session left half-written, and ignores its messages from then on.
pub struct KeeperClient {
    connection: Connection<UnixStream>,
    rank: usize,
    session: u64,
}

impl KeeperClient {
    /// Connects rank `rank` to the keeper that listens on `socket`.
    ///
    /// # Errors
    /// If no keeper of this run listens there.
    pub fn connect(socket: &str, secret: &Secret, rank: usize) -> Result<KeeperClient, Error> {
        let session = LAST_SESSION.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(KeeperClient {
            connection: connect(socket, secret, rank, session)?,
            rank,
            session,
        })
    }

    fn ask(&mut self, request: &RankRequest, timeout: Duration) -> Result<RankReply, Error> {
        self.connection.writer.send_within(request, timeout)?;
        match self.connection.receive(Some(timeout))? {
            RankReply::Refused(reason) => Err(Error::Refused(reason)),
            reply => Ok(reply),
        }
    }

    /// Receives a file that a reply announced.
    fn receive_file(&mut self) -> Result<File, Error> {
        self.connection.reader.limit_reads(STARTUP_TIMEOUT)?;
        Ok(receive_file(self.connection.socket())?)
    }

    /// Allocates `slots` slots of `bytes` bytes. Slots of an earlier attempt are used again if
    /// their size is right.
    ///
    /// # Errors
    /// [`Error::Refused`] if the node has too little memory, or this process cannot map it.
    pub fn allocate(&mut self, bytes: u64, slots: usize) -> Result<Vec<SlotMemory>, Error> {
        let request = RankRequest::Allocate { bytes, slots };
        let count = match self.ask(&request, STARTUP_TIMEOUT)? {
            RankReply::Slots(count) => count,
            other => return Err(unexpected(other)),
        };
        let mut files = Vec::new();
        for _ in 0..count {
            let file = self.receive_file()?;
            files.push(file);
        }
        // All files are received before one can fail, so that the stream stays in order.
        let mut memory = Vec::new();
        for file in files {
            let region = Region::open(file)
                .map_err(|error| Error::Refused(format!("cannot map its memory: {error}")))?;
            memory.push(Arc::new(region));
        }
        Ok(memory)
    }

    /// Reserves a free slot for a snapshot of `bytes` bytes, if there is one.
    ///
    /// # Errors
    /// If the keeper is gone, or does not reply at once.
    pub fn reserve(
        &mut self,
        id: SnapshotId,
        bytes: u64,
        durable: bool,
    ) -> Result<Option<usize>, Error> {
        let request = RankRequest::Reserve { id, bytes, durable };
        match self.ask(&request, REPLY_TIMEOUT)? {
            RankReply::Slot(slot) => Ok(slot),
            other => Err(unexpected(other)),
        }
    }

    /// Returns a reserved slot, because another rank found none.
    ///
    /// # Errors
    /// If the keeper is gone.
    pub fn release(&mut self, slot: usize) -> Result<(), Error> {
        let request = RankRequest::Release { slot };
        self.connection.writer.send_within(&request, REPLY_TIMEOUT)
    }

    /// Returns the header of `rank`'s part of the snapshot to restore.
    ///
    /// # Errors
    /// If the keeper cannot read the part.
    pub fn header(&mut self, rank: usize) -> Result<Vec<u8>, Error> {
        match self.ask(&RankRequest::Header { rank }, STARTUP_TIMEOUT)? {
            RankReply::Bytes(bytes) => Ok(bytes),
            other => Err(unexpected(other)),
        }
    }

    /// Opens `rank`'s part of the snapshot to restore.
    ///
    /// # Errors
    /// If the keeper cannot read the part.
    pub fn open(&mut self, rank: usize) -> Result<File, Error> {
        match self.ask(&RankRequest::Open { rank }, STARTUP_TIMEOUT)? {
            RankReply::Part => self.receive_file(),
            other => Err(unexpected(other)),
        }
    }
}

/// The connection of a rank's copying thread. Its reports have no replies.
pub struct FillReporter {
    connection: Connection<UnixStream>,
}

impl FillReporter {
    /// Connects as [`KeeperClient::connect`] does, in the session of `client`.
    ///
    /// # Errors
    /// As [`KeeperClient::connect`].
    pub fn connect(
        socket: &str,
        secret: &Secret,
        client: &KeeperClient,
    ) -> Result<FillReporter, Error> {
        let connection = connect(socket, secret, client.rank, client.session)?;
        Ok(FillReporter { connection })
    }

    fn send(&mut self, request: &RankRequest) -> Result<(), Error> {
        self.connection.writer.send_within(request, REPLY_TIMEOUT)
    }

    /// Reports that the slot is filled up to byte `filled_to`, with the checksums of the chunks
    /// that were completed since the last report.
    ///
    /// # Errors
    /// If the keeper is gone.
    pub fn filled(&mut self, slot: usize, filled_to: u64, crcs: Vec<u32>) -> Result<(), Error> {
        let report = RankRequest::Filled {
            slot,
            filled_to,
            crcs,
        };
        self.send(&report)
    }

    /// Waits until the keeper has processed all earlier reports. Returns true if it has the whole
    /// part of snapshot `id`, which it may have dropped because another rank left its own
    /// unfinished.
    ///
    /// # Errors
    /// If the keeper is gone, or does not reply in time.
    pub fn is_complete(&mut self, id: SnapshotId) -> Result<bool, Error> {
        self.send(&RankRequest::IsComplete { id })?;
        match self.connection.receive(Some(STARTUP_TIMEOUT))? {
            RankReply::Complete(is_complete) => Ok(is_complete),
            other => Err(unexpected(other)),
        }
    }

    /// Reports that the rank is alive, has done `step` steps, and made progress `progress` times.
    ///
    /// # Errors
    /// If the keeper is gone.
    pub fn heartbeat(&mut self, step: u64, progress: u64) -> Result<(), Error> {
        self.send(&RankRequest::Heartbeat { step, progress })
    }
}
