//! The keeper's process: who may talk to it, and what it answers.

use super::connection::PeerPool;
use super::memory_limit::{available_bytes, format_mib};
use super::slots::Slots;
use super::wire::{self, TimeoutStream};
use super::{
    Error, Event, Fault, Inventory, RankReply, RankRequest, RankStatus, Reply, Request, Secret,
    Snapshot, SnapshotId, Status, Topology, persist, protect, restore,
};
use crate::memory::{Region, send_file};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::{Pid, Uid};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// How often the launcher hears of the ranks.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(100);
/// What another process is to answer within, and what is waited for on its behalf.
pub(crate) const PEER_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections that have not shown yet that they know the secret.
const MAX_UNAUTHENTICATED: usize = 64;
/// Complete snapshots that are remembered: those that two or three slots can hold.
const MAX_COMPLETE_SNAPSHOTS: usize = 3;

/// What a keeper is started with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the Unix socket for ranks, in the abstract namespace: nothing is left of it on disk.
    pub socket: String,
    /// The run's.
    pub secret: Secret,
    /// Where to listen for the launcher and other keepers; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The most memory to take for slots and parity, in bytes; by default what the machine has left.
    pub memory: Option<u64>,
    /// How long to stay without a launcher.
    pub orphan_timeout: Duration,
}

/// A rank, as it was last heard of.
struct RankRecord {
    pid: i32,
    step: u64,
    progress: u64,
    heard: Instant,
    connections: usize,
}

/// Parity of one snapshot, by local number and stripe, with its checksum.
pub(crate) type SnapshotParity = BTreeMap<(usize, u64), (Vec<u8>, u32)>;

#[derive(Default)]
pub(crate) struct KeeperState {
    /// By generation: who was where, and which node this was.
    pub(crate) memberships: BTreeMap<u64, (Topology, usize)>,
    pub(crate) slots: Slots,
    /// The slots' memory.
    pub(crate) regions: Vec<Option<Arc<Region>>>,
    pub(crate) parity: BTreeMap<SnapshotId, SnapshotParity>,
    pub(crate) protected: BTreeSet<SnapshotId>,
    pub(crate) complete: BTreeMap<SnapshotId, Snapshot>,
    /// What ranks are to restore, and who has the parts.
    pub(crate) restoring: Option<(Snapshot, Vec<SocketAddr>)>,
    ranks: BTreeMap<usize, RankRecord>,
    watchers: Vec<Sender<Event>>,
    /// The newest snapshot that was given up.
    abandoned: Option<SnapshotId>,
    /// Whose parity is being made, or has been.
    encoding: BTreeSet<SnapshotId>,
    /// The snapshot that is being written to disk.
    pinned: Option<SnapshotId>,
    skipped: u64,
    pub(crate) coding_time: Duration,
    /// Buffers of parity that is not needed any more.
    pub(crate) spare_buffers: Vec<Vec<u8>>,
    stopping: bool,
}

impl KeeperState {
    fn broadcast(&mut self, event: &Event) {
        self.watchers
            .retain(|watcher| watcher.send(event.clone()).is_ok());
    }

    /// What was kept for the disk need not be kept any longer.
    fn unpin(&mut self) {
        let Some(id) = self.pinned.take() else { return };
        for slot in &mut self.slots.slots {
            if slot.part.as_ref().is_some_and(|part| part.id == id) {
                slot.pins = slot.pins.saturating_sub(1);
            }
        }
    }

    fn bytes(&self) -> (u64, u64) {
        let slots = self
            .regions
            .iter()
            .flatten()
            .map(|region| region.len() as u64)
            .sum();
        let parity = self
            .parity
            .values()
            .flat_map(BTreeMap::values)
            .map(|(bytes, _)| bytes.len() as u64)
            .sum();
        (slots, parity)
    }

    /// Whether a snapshot that is not here may still come.
    fn may_arrive(&self, id: SnapshotId) -> bool {
        let current = self.memberships.keys().next_back().copied();
        current.is_none_or(|current| id.generation >= current) && self.abandoned < Some(id)
    }

    fn free_parity(&mut self, keep: impl Fn(SnapshotId) -> bool) {
        let gone: Vec<SnapshotId> = self
            .parity
            .keys()
            .copied()
            .filter(|&id| !keep(id))
            .collect();
        for id in gone {
            self.spare_buffers.extend(
                self.parity
                    .remove(&id)
                    .into_iter()
                    .flat_map(BTreeMap::into_values)
                    .map(|(bytes, _)| bytes),
            );
        }
        self.protected.retain(|&id| keep(id));
        self.encoding.retain(|&id| keep(id));
    }

    /// Frees memory that holds nothing any more and that no rank writes.
    fn free_regions(&mut self) {
        for (slot, region) in self.slots.slots.iter().zip(&mut self.regions) {
            if slot.writer.is_none() && slot.part.is_none() && slot.pins == 0 {
                *region = None;
            }
        }
    }

    /// Puts a part of which all bytes are known to be right into memory of its own.
    pub(crate) fn insert_part(
        &mut self,
        id: SnapshotId,
        info: super::PartInfo,
        region: Arc<Region>,
    ) {
        let vacant = (0..self.regions.len()).find(|&slot| self.regions[slot].is_none());
        let slot = vacant.unwrap_or_else(|| self.slots.add(None));
        if slot == self.regions.len() {
            self.regions.push(None);
        }
        self.slots.slots[slot].part = Some(super::slots::Part {
            id,
            filled: info.bytes,
            info,
            durable: false,
        });
        self.regions[slot] = Some(region);
    }
}

pub(crate) struct Keeper {
    pub(crate) secret: Secret,
    memory: Option<u64>,
    state: Mutex<KeeperState>,
    /// Something was filled, given up or stopped.
    pub(crate) changed: Condvar,
    encode: Mutex<Sender<SnapshotId>>,
    pub(crate) peers: PeerPool,
    unauthenticated: AtomicUsize,
}

/// Keeps until it is told to stop, or has been without a launcher for too long. `ready` is told where it listens.
///
/// # Errors
/// When an address is taken.
pub fn run(settings: Settings, ready: impl FnOnce(SocketAddr)) -> Result<(), Error> {
    let listener = TcpListener::bind(settings.listen)?;
    let name = std::os::unix::net::SocketAddr::from_abstract_name(&settings.socket)?;
    let ranks = UnixListener::bind_addr(&name)?;
    let (encode, to_encode) = channel();
    let keeper = Arc::new(Keeper {
        peers: PeerPool::new(settings.secret.clone()),
        secret: settings.secret,
        memory: settings.memory,
        state: Mutex::default(),
        changed: Condvar::new(),
        encode: Mutex::new(encode),
        unauthenticated: AtomicUsize::new(0),
    });
    ready(listener.local_addr()?);
    std::thread::spawn({
        let keeper = keeper.clone();
        move || keeper.accept_peers(&listener)
    });
    std::thread::spawn({
        let keeper = keeper.clone();
        move || keeper.accept_ranks(&ranks)
    });
    std::thread::spawn({
        let keeper = keeper.clone();
        move || keeper.encode_all(&to_encode)
    });
    let mut watched = Instant::now();
    let mut pulsed = Instant::now();
    loop {
        let mut state = keeper.lock();
        if state.stopping {
            return Ok(());
        }
        if pulsed.elapsed() >= HEARTBEAT_INTERVAL {
            pulsed = Instant::now();
            let ranks = state.rank_statuses();
            state.broadcast(&Event::Heartbeat { ranks });
        }
        if !state.watchers.is_empty() {
            watched = Instant::now();
        } else if watched.elapsed() > settings.orphan_timeout {
            tracing::warn!(
                "no launcher for {:?}: this keeper ends",
                settings.orphan_timeout
            );
            return Ok(());
        }
        // Woken by changes as well: stopping is one.
        keeper.changed.wait_for(&mut state, HEARTBEAT_INTERVAL);
    }
}

impl KeeperState {
    fn rank_statuses(&self) -> Vec<RankStatus> {
        let status = |(&rank, view): (&usize, &RankRecord)| RankStatus {
            rank,
            pid: view.pid,
            step: view.step,
            progress: view.progress,
            silent_ms: view.heard.elapsed().as_millis() as u64,
        };
        self.ranks.iter().map(status).collect()
    }

    fn inventory(&self) -> Inventory {
        let parts = self
            .slots
            .slots
            .iter()
            .filter_map(|slot| slot.part.as_ref());
        let complete = parts
            .filter(|part| part.is_complete())
            .map(|part| (part.id, part.info.clone()))
            .collect();
        Inventory {
            memberships: self.memberships.values().cloned().collect(),
            parts: complete,
            protected: self.protected.iter().copied().collect(),
            complete: self.complete.values().cloned().collect(),
        }
    }
}

impl Keeper {
    pub(crate) fn lock(&self) -> MutexGuard<'_, KeeperState> {
        self.state.lock()
    }

    /// New memory, where there is so much.
    pub(crate) fn allocate(&self, bytes: u64, count: u64) -> Result<Vec<Arc<Region>>, Error> {
        let wanted = bytes * count;
        let (slots, parity) = self.lock().bytes();
        let left = match self.memory {
            Some(limit) => limit.saturating_sub(slots + parity),
            // The other half is for what the ranks will need.
            None => available_bytes().map_or(u64::MAX, |bytes| bytes / 2),
        };
        if wanted > left {
            let limit = if self.memory.is_some() {
                "that snapshot.memory_gib leaves"
            } else {
                "half of the machine's free memory is"
            };
            return Err(Error::Refused(format!(
                "{count} slots of {} do not fit into the {} {limit}",
                format_mib(bytes),
                format_mib(left)
            )));
        }
        let region = |_| Ok(Arc::new(Region::create("moerun snapshot", bytes as usize)?));
        (0..count).map(region).collect()
    }

    /// Waits until `rank`'s part of `id` is filled up to `filled_to` (as far as it goes), and reads it.
    pub(crate) fn read<T>(
        &self,
        id: SnapshotId,
        rank: usize,
        filled_to: u64,
        read: impl FnOnce(&Region, &super::PartInfo) -> T,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + PEER_TIMEOUT;
        let mut state = self.lock();
        loop {
            if let Some(slot) = state.slots.find(id, rank) {
                let part = state.slots.slots[slot]
                    .part
                    .as_ref()
                    .expect("found by its part");
                if part.filled >= filled_to.min(part.info.bytes) {
                    let info = part.info.clone();
                    let region = state.regions[slot].clone().expect("a slot with a part");
                    state.slots.slots[slot].pins += 1;
                    drop(state);
                    let result = read(&region, &info);
                    self.lock().slots.slots[slot].pins -= 1;
                    return Ok(result);
                }
            } else if !state.may_arrive(id) {
                return Err(Error::Refused(format!(
                    "rank {rank}'s part of step {} is not here",
                    id.step
                )));
            }
            let Some(left) = deadline
                .checked_duration_since(Instant::now())
                .filter(|_| !state.stopping)
            else {
                return Err(Error::Refused(format!(
                    "rank {rank}'s part of step {} did not come",
                    id.step
                )));
            };
            self.changed.wait_for(&mut state, left);
        }
    }

    fn accept_peers(self: &Arc<Keeper>, listener: &TcpListener) {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Out of descriptors, for instance: not for ever.
                std::thread::sleep(Duration::from_millis(20));
                continue;
            };
            if self.unauthenticated.fetch_add(1, Ordering::SeqCst) >= MAX_UNAUTHENTICATED {
                self.unauthenticated.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let keeper = self.clone();
            std::thread::spawn(move || {
                let mut stream = stream;
                let _ = stream.set_nodelay(true);
                let known = wire::server_handshake(&mut stream, &keeper.secret);
                keeper.unauthenticated.fetch_sub(1, Ordering::SeqCst);
                match known {
                    Ok(()) => keeper.serve_peer(stream),
                    Err(error) => {
                        tracing::warn!(
                            "a connection from {:?} was refused: {error}",
                            stream.peer_addr().ok()
                        )
                    }
                }
            });
        }
    }

    /// One connection of the launcher, of another keeper or of a tool.
    fn serve_peer(self: &Arc<Keeper>, mut stream: TcpStream) {
        if stream.set_timeouts(None, Some(PEER_TIMEOUT)).is_err() {
            return;
        }
        while let Ok(request) = wire::receive::<Request>(&mut stream) {
            if matches!(request, Request::Subscribe) {
                return self.watch(stream);
            }
            let reply = self
                .answer(request)
                .unwrap_or_else(|error| Reply::Refused(error.to_string()));
            if wire::send(&mut stream, &reply).is_err() {
                return;
            }
        }
    }

    fn watch(&self, mut stream: TcpStream) {
        let (sender, events) = channel();
        // First written down, then told: nothing that happens after the answer is missed.
        self.lock().watchers.push(sender);
        if wire::send(&mut stream, &Reply::Done).is_err() {
            return;
        }
        for event in events {
            if wire::send(&mut stream, &event).is_err() {
                return;
            }
        }
    }

    fn answer(self: &Arc<Keeper>, request: Request) -> Result<Reply, Error> {
        let mut state = self.lock();
        match request {
            Request::Setup { topology, node } => {
                // What a snapshot of an older generation needs to be understood is in `complete`.
                let generation = topology.generation;
                // Ranks that are elsewhere now write nothing here any more; what they wrote is only to be read.
                for slot in &mut state.slots.slots {
                    if slot
                        .writer
                        .is_some_and(|rank| topology.node_of(rank) != Some(node))
                    {
                        slot.writer = None;
                    }
                }
                state.free_regions();
                state.memberships.retain(|&older, _| older < generation);
                state.memberships.insert(generation, (topology, node));
                let wanted: BTreeSet<u64> = state
                    .complete
                    .keys()
                    .map(|id| id.generation)
                    .chain([generation])
                    .collect();
                state
                    .memberships
                    .retain(|generation, _| wanted.contains(generation));
            }
            Request::Subscribe => unreachable!("handled by the caller"),
            Request::Inventory => return Ok(Reply::Inventory(state.inventory())),
            Request::Status => {
                let (slot_bytes, parity_bytes) = state.bytes();
                let unfinished = state
                    .slots
                    .slots
                    .iter()
                    .filter_map(|slot| slot.part.as_ref());
                return Ok(Reply::Status(Status {
                    pid: std::process::id() as i32,
                    ranks: state.rank_statuses(),
                    slot_bytes,
                    parity_bytes,
                    inventory: state.inventory(),
                    filling: unfinished
                        .filter(|part| !part.is_complete())
                        .map(|part| part.id)
                        .collect(),
                    skipped: state.skipped,
                    coding_ms: state.coding_time.as_millis() as u64,
                }));
            }
            Request::Commit(snapshot) => {
                let id = snapshot.id;
                state.slots.commit(id);
                state.complete.insert(id, snapshot);
                while state.complete.len() > MAX_COMPLETE_SNAPSHOTS {
                    state.complete.pop_first();
                }
                // What was brought here to be restored is not needed any more.
                if state
                    .restoring
                    .as_ref()
                    .is_some_and(|(restored, _)| restored.id < id)
                {
                    state.restoring = None;
                }
                let guests: Vec<usize> = (0..state.slots.slots.len())
                    .filter(|&slot| {
                        let slot = &state.slots.slots[slot];
                        slot.writer.is_none() && slot.part.as_ref().is_some_and(|part| part.id < id)
                    })
                    .collect();
                guests
                    .into_iter()
                    .for_each(|slot| state.slots.release(slot));
                state.free_regions();
                // Parity of the two newest: the one before stays until the newest could be needed.
                let kept: BTreeSet<SnapshotId> =
                    state.complete.keys().rev().take(2).copied().collect();
                state.free_parity(|other| kept.contains(&other) || other > id);
            }
            Request::Abandon(id) => {
                state.slots.abandon(id);
                state.abandoned = state.abandoned.max(Some(id));
                state.free_parity(|other| other != id);
                self.changed.notify_all();
            }
            Request::Keep { snapshot, holders } => {
                state.unpin();
                let id = snapshot.as_ref().map(|snapshot| snapshot.id);
                // An older complete one stays too: it is next, should this one turn out to be of no use.
                let older: BTreeSet<SnapshotId> = state
                    .complete
                    .keys()
                    .copied()
                    .filter(|&other| id.is_some_and(|id| other <= id))
                    .collect();
                state
                    .slots
                    .retain(|part| older.contains(&part.id) || Some(part.id) == id);
                state.free_parity(|other| older.contains(&other) || Some(other) == id);
                state.complete.retain(|other, _| older.contains(other));
                state.slots.newest = id;
                state.free_regions();
                if let Some(snapshot) = &snapshot {
                    state.complete.insert(snapshot.id, snapshot.clone());
                }
                state.restoring = snapshot.map(|snapshot| (snapshot, holders));
                self.changed.notify_all();
            }
            Request::Verify(id) => {
                drop(state);
                return Ok(Reply::Damage(restore::find_damage(self, id)?));
            }
            Request::Length { id, rank } => {
                drop(state);
                return Ok(Reply::Length(self.read(id, rank, 0, |_, info| info.bytes)?));
            }
            Request::Chunk { id, rank, chunk } => {
                drop(state);
                return Ok(Reply::Bytes(protect::chunk(self, id, rank, chunk)?));
            }
            Request::Header { id, rank } => {
                drop(state);
                return Ok(Reply::Bytes(restore::local_header(self, id, rank)?));
            }
            Request::Parity { id, local, stripe } => {
                let held = state
                    .parity
                    .get(&id)
                    .and_then(|parity| parity.get(&(local, stripe)));
                let (bytes, crc) =
                    held.ok_or_else(|| Error::Refused("there is no such parity here".into()))?;
                if crate::checksum::crc32c(bytes) != *crc {
                    return Err(Error::Refused("the parity here is damaged".into()));
                }
                return Ok(Reply::Bytes(bytes.clone()));
            }
            Request::PutParity {
                id,
                local,
                stripe,
                bytes,
            } => {
                if !state.may_arrive(id) && !state.complete.contains_key(&id) {
                    return Err(Error::Refused(format!("step {} is given up", id.step)));
                }
                let crc = crate::checksum::crc32c(&bytes);
                state
                    .parity
                    .entry(id)
                    .or_default()
                    .insert((local, stripe), (bytes, crc));
            }
            Request::Rebuild(rebuild) => {
                drop(state);
                restore::rebuild(self, &rebuild)?;
            }
            Request::Protect {
                snapshot,
                node,
                sources,
            } => {
                drop(state);
                protect::reencode(self, &snapshot, node, &sources)?;
            }
            Request::Persist { id, ranks, folder } => {
                drop(state);
                return Ok(Reply::Shards(persist::write(self, id, &ranks, &folder)?));
            }
            Request::Pin(id) => {
                state.unpin();
                for slot in &mut state.slots.slots {
                    if slot.part.as_ref().is_some_and(|part| part.id == id) {
                        slot.pins += 1;
                    }
                }
                state.pinned = Some(id);
            }
            Request::Unpin => state.unpin(),
            Request::Inject(fault) => self.inject(state, fault)?,
            Request::Stop => {
                state.stopping = true;
                self.changed.notify_all();
            }
        }
        Ok(Reply::Done)
    }

    fn inject(
        self: &Arc<Keeper>,
        state: MutexGuard<'_, KeeperState>,
        fault: Fault,
    ) -> Result<(), Error> {
        let pid = |state: &KeeperState, rank: usize| {
            let view = state.ranks.get(&rank);
            view.map(|view| Pid::from_raw(view.pid))
                .ok_or_else(|| Error::Refused(format!("rank {rank} is not here")))
        };
        match fault {
            Fault::Signal { rank, signal } => {
                let signal = Signal::try_from(signal)
                    .map_err(|_| Error::Refused(format!("there is no signal {signal}")))?;
                kill(pid(&state, rank)?, signal)?;
            }
            Fault::Delay { rank, ms } => {
                let pid = pid(&state, rank)?;
                kill(pid, Signal::SIGSTOP)?;
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(ms));
                    // It may be gone by now.
                    let _ = kill(pid, Signal::SIGCONT);
                });
            }
            Fault::Corrupt { rank, at } => {
                let newest = state.slots.newest.and_then(|id| state.slots.find(id, rank));
                let slot = newest.ok_or_else(|| {
                    Error::Refused(format!("there is no complete part of rank {rank} here"))
                })?;
                let bytes = state.slots.slots[slot]
                    .part
                    .as_ref()
                    .map_or(1, |part| part.info.bytes);
                let region = state.regions[slot].clone().expect("a slot with a part");
                region.write((at % bytes.max(1)) as usize, 1, |byte| {
                    byte[0] ^= 1 << (at % 8)
                });
            }
            Fault::Poison { rank } => {
                drop(state);
                restore::poison(self, rank)?;
            }
            Fault::KillNode => {
                for view in state.ranks.values() {
                    let _ = kill(Pid::from_raw(view.pid), Signal::SIGKILL);
                }
                kill(Pid::this(), Signal::SIGKILL)?;
            }
        }
        Ok(())
    }

    fn encode_all(self: &Arc<Keeper>, ids: &Receiver<SnapshotId>) {
        for id in ids {
            let event = match protect::encode(self, id) {
                Ok(()) => {
                    self.lock().protected.insert(id);
                    Event::Protected { id }
                }
                Err(error) => Event::Unprotected {
                    id,
                    reason: error.to_string(),
                },
            };
            self.lock().broadcast(&event);
        }
    }

    fn accept_ranks(self: &Arc<Keeper>, listener: &UnixListener) {
        for stream in listener.incoming().flatten() {
            let keeper = self.clone();
            std::thread::spawn(move || {
                let mut stream = stream;
                let known = getsockopt(&stream, PeerCredentials)
                    .map_err(Error::from)
                    .and_then(|peer| {
                        if peer.uid() != Uid::effective().as_raw() {
                            return Err(Error::Unauthenticated);
                        }
                        wire::server_handshake(&mut stream, &keeper.secret)?;
                        Ok(peer.pid())
                    });
                match known {
                    Ok(pid) => keeper.serve_rank(stream, pid),
                    Err(error) => tracing::warn!("a local connection was refused: {error}"),
                }
            });
        }
    }

    fn serve_rank(self: &Arc<Keeper>, mut stream: UnixStream, pid: i32) {
        if stream.set_timeouts(None, Some(PEER_TIMEOUT)).is_err() {
            return;
        }
        let Ok(RankRequest::Hello { rank }) = wire::receive(&mut stream) else {
            return;
        };
        {
            let mut state = self.lock();
            let fresh = RankRecord {
                pid,
                step: 0,
                progress: 0,
                heard: Instant::now(),
                connections: 0,
            };
            let view = state.ranks.entry(rank).or_insert(fresh);
            if view.pid != pid {
                *view = RankRecord {
                    pid,
                    step: 0,
                    progress: 0,
                    heard: Instant::now(),
                    connections: 0,
                };
            }
            view.connections += 1;
        }
        if wire::send(&mut stream, &RankReply::Ack).is_ok() {
            while let Ok(request) = wire::receive::<RankRequest>(&mut stream) {
                if let Err(error) = self.handle_rank_request(&mut stream, rank, request) {
                    tracing::warn!("rank {rank}: {error}");
                    if wire::send(&mut stream, &RankReply::Refused(error.to_string())).is_err() {
                        break;
                    }
                }
            }
        }
        let mut state = self.lock();
        if let Some(view) = state.ranks.get_mut(&rank).filter(|view| view.pid == pid) {
            view.connections -= 1;
            if view.connections == 0 {
                state.ranks.remove(&rank);
            }
            // What it was writing is of no use.
            state.slots.drop_unfinished(rank);
        }
    }

    fn handle_rank_request(
        self: &Arc<Keeper>,
        stream: &mut UnixStream,
        rank: usize,
        request: RankRequest,
    ) -> Result<(), Error> {
        let mut state = self.lock();
        if let Some(view) = state.ranks.get_mut(&rank) {
            view.heard = Instant::now();
        }
        match request {
            RankRequest::Hello { .. } => {
                return Err(Error::Protocol("it has said who it is".into()));
            }
            RankRequest::Allocate { bytes, slots } => {
                drop(state);
                let regions = self.allocate_slots(rank, bytes, slots)?;
                wire::send(stream, &RankReply::Slots(regions.len()))?;
                for region in regions {
                    send_file(stream, region.file())?;
                }
            }
            RankRequest::Reserve { id, bytes, durable } => {
                let fits = state.slots.of(rank).all(|slot| {
                    state.regions[slot]
                        .as_ref()
                        .is_some_and(|region| region.len() as u64 >= bytes)
                });
                let slot = if fits {
                    state.slots.reserve(rank, id, bytes, durable)
                } else {
                    None
                };
                let number =
                    slot.and_then(|slot| state.slots.of(rank).position(|other| other == slot));
                state.skipped += u64::from(number.is_none());
                drop(state);
                wire::send(stream, &RankReply::Slot(number))?;
            }
            RankRequest::Release { slot } => {
                let slot = state.slots.of(rank).nth(slot);
                slot.into_iter().for_each(|slot| state.slots.release(slot));
                self.changed.notify_all();
            }
            RankRequest::Filled {
                slot,
                filled_to,
                crcs,
            } => {
                let slot = state.slots.of(rank).nth(slot);
                let slot = slot.ok_or_else(|| Error::Protocol("there is no such slot".into()))?;
                let part = state
                    .slots
                    .fill(slot, filled_to, &crcs)
                    .map_err(Error::Protocol)?
                    .clone();
                if state.encoding.insert(part.id) {
                    let _ = self.encode.lock().send(part.id);
                }
                if part.is_complete() {
                    state.broadcast(&Event::Complete {
                        id: part.id,
                        part: part.info,
                        durable: part.durable,
                    });
                }
                self.changed.notify_all();
            }
            RankRequest::Heartbeat { step, progress } => {
                if let Some(view) = state.ranks.get_mut(&rank) {
                    (view.step, view.progress) = (view.step.max(step), view.progress.max(progress));
                }
            }
            RankRequest::Sync => {
                drop(state);
                wire::send(stream, &RankReply::Ack)?;
            }
            RankRequest::Header { rank: wanted } => {
                drop(state);
                wire::send(stream, &RankReply::Bytes(restore::head(self, wanted)?))?;
            }
            RankRequest::Open { rank: wanted } => {
                drop(state);
                let region = restore::fetch(self, wanted)?;
                wire::send(stream, &RankReply::Part)?;
                send_file(stream, region.file())?;
            }
        }
        Ok(())
    }

    /// This rank's slots: those it had, where they are large enough, and new ones.
    fn allocate_slots(
        &self,
        rank: usize,
        bytes: u64,
        count: usize,
    ) -> Result<Vec<Arc<Region>>, Error> {
        let mut state = self.lock();
        let own: Vec<usize> = state.slots.of(rank).collect();
        let fits = |state: &KeeperState, slot: usize| {
            let len = state.regions[slot]
                .as_ref()
                .map_or(0, |region| region.len() as u64);
            len >= bytes && len <= bytes + bytes / 4 + (1 << 20)
        };
        let (kept, others): (Vec<usize>, Vec<usize>) =
            own.into_iter().partition(|&slot| fits(&state, slot));
        for slot in others.into_iter().chain(kept.iter().skip(count).copied()) {
            state.slots.slots[slot].writer = None;
        }
        state.free_regions();
        drop(state);
        let missing = count.saturating_sub(kept.len());
        let fresh = self.allocate(bytes, missing as u64)?;
        let mut state = self.lock();
        for region in fresh {
            let slot = state.slots.add(Some(rank));
            state.regions.resize(slot + 1, None);
            state.regions[slot] = Some(region);
        }
        let regions = state
            .slots
            .of(rank)
            .map(|slot| state.regions[slot].clone().expect("it was just made"));
        Ok(regions.collect())
    }
}
