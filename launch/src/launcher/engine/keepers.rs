//! The keepers of a run: which node each has, and which are spare.

use crate::registry::KeeperEntry;
use checkpoint::keeper::{Inventory, Secret};
use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

/// Number of a keeper among all that this launcher has had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct KeeperId(pub(crate) u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeeperState {
    /// Its process is being started.
    Starting,
    /// Its process runs; the launcher connects to it.
    Connecting,
    Ready,
    Lost,
}

#[derive(Debug)]
pub(crate) struct Keeper {
    pub(crate) entry: KeeperEntry,
    /// None for a keeper of an earlier launch on a machine that this launch does not have.
    pub(crate) machine: Option<usize>,
    pub(crate) state: KeeperState,
    /// True for a lost keeper that was only out of reach: its memory may still be there.
    pub(crate) may_live: bool,
    /// Number of attempts to connect again since it last answered.
    pub(crate) reconnects: usize,
    /// The time of its last event, or of the connection.
    pub(crate) last_heard: Duration,
    /// Its last answer about what it holds.
    pub(crate) inventory: Option<Inventory>,
    /// The node that it had when it was last looked up.
    last_node: Cell<usize>,
    /// The reasons why it refused to answer that since it was first asked.
    pub(crate) refusals: Vec<String>,
}

/// A node with ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seat {
    pub(crate) machine: usize,
    /// None while the node has no keeper.
    pub(crate) keeper: Option<KeeperId>,
}

#[derive(Debug)]
pub(crate) struct Keepers {
    pub(crate) secret: Secret,
    /// Distinguishes the names of this launch's keepers from those of other launches.
    launch: u64,
    next: u64,
    all: BTreeMap<KeeperId, Keeper>,
    pub(crate) seats: Vec<Seat>,
    pub(crate) spares: Vec<KeeperId>,
    /// Keepers without a place that may hold parts of snapshots.
    pub(crate) leftover: BTreeSet<KeeperId>,
}

impl Keepers {
    pub(crate) fn new(secret: Secret, launch: u64) -> Keepers {
        Keepers {
            secret,
            launch,
            next: 0,
            all: BTreeMap::new(),
            seats: Vec::new(),
            spares: Vec::new(),
            leftover: BTreeSet::new(),
        }
    }

    /// Adds a keeper of an earlier launch, to be connected to.
    pub(crate) fn add_earlier(&mut self, entry: KeeperEntry) -> KeeperId {
        let id = self.take_id();
        let keeper = Keeper {
            machine: None,
            entry,
            state: KeeperState::Connecting,
            may_live: false,
            reconnects: 0,
            last_heard: Duration::ZERO,
            inventory: None,
            last_node: Cell::default(),
            refusals: Vec::new(),
        };
        self.all.insert(id, keeper);
        id
    }

    /// Adds a keeper that is to be started under `socket`, or under a fresh name.
    pub(crate) fn add_new(&mut self, machine: usize, socket: Option<String>) -> KeeperId {
        let id = self.take_id();
        // Every user can see the name: it contains part of the secret's digest.
        let fresh = || format!("moerun/{}/{:x}-{}", self.secret.name(), self.launch, id.0);
        let entry = KeeperEntry {
            pid: 0,
            machine,
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
            socket: socket.unwrap_or_else(fresh),
            identity: String::new(),
        };
        let keeper = Keeper {
            entry,
            machine: Some(machine),
            state: KeeperState::Starting,
            may_live: false,
            reconnects: 0,
            last_heard: Duration::ZERO,
            inventory: None,
            last_node: Cell::default(),
            refusals: Vec::new(),
        };
        self.all.insert(id, keeper);
        id
    }

    fn take_id(&mut self) -> KeeperId {
        self.next += 1;
        KeeperId(self.next)
    }

    pub(crate) fn get(&self, id: KeeperId) -> Option<&Keeper> {
        self.all.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: KeeperId) -> Option<&mut Keeper> {
        self.all.get_mut(&id)
    }

    pub(crate) fn remove(&mut self, id: KeeperId) -> Option<Keeper> {
        self.leftover.remove(&id);
        self.spares.retain(|&spare| spare != id);
        for seat in &mut self.seats {
            seat.keeper = seat.keeper.filter(|&keeper| keeper != id);
        }
        self.all.remove(&id)
    }

    pub(crate) fn ids(&self) -> Vec<KeeperId> {
        self.all.keys().copied().collect()
    }

    pub(crate) fn is_ready(&self, id: KeeperId) -> bool {
        self.state(id) == KeeperState::Ready
    }

    pub(crate) fn state(&self, id: KeeperId) -> KeeperState {
        self.get(id)
            .map_or(KeeperState::Lost, |keeper| keeper.state)
    }

    pub(crate) fn may_live(&self, id: KeeperId) -> bool {
        self.get(id).is_some_and(|keeper| keeper.may_live)
    }

    /// Keepers that can be asked.
    pub(crate) fn ready(&self) -> Vec<KeeperId> {
        let all = self.all.iter();
        let ready = all.filter(|(_, keeper)| keeper.state == KeeperState::Ready);
        ready.map(|(&id, _)| id).collect()
    }

    /// Connected keepers without an event for longer than `limit`.
    pub(crate) fn silent(&self, now: Duration, limit: Duration) -> Vec<KeeperId> {
        let ready = self
            .all
            .iter()
            .filter(|(_, keeper)| keeper.state == KeeperState::Ready);
        let silent = ready.filter(|(_, keeper)| now.saturating_sub(keeper.last_heard) > limit);
        silent.map(|(&id, _)| id).collect()
    }

    /// Returns a keeper without a place on a machine that has one in this state.
    pub(crate) fn leftover_on(&self, machine: usize, state: KeeperState) -> Option<KeeperId> {
        let mut leftover = self.leftover.iter();
        let is_there = |id: &&KeeperId| {
            let keeper = self.get(**id);
            keeper.is_some_and(|keeper| keeper.machine == Some(machine) && keeper.state == state)
        };
        leftover.find(is_there).copied()
    }

    /// Returns the node of a keeper that has one. Keepers report often and rarely move, so the last
    /// answer is tried first.
    pub(crate) fn node_of(&self, id: KeeperId) -> Option<usize> {
        let last = &self.get(id)?.last_node;
        let is_there = |seat: &Seat| seat.keeper == Some(id);
        if !self.seats.get(last.get()).is_some_and(is_there) {
            last.set(self.seats.iter().position(is_there)?);
        }
        Some(last.get())
    }

    /// Returns a node's keeper if it can be asked.
    pub(crate) fn ready_keeper(&self, node: usize) -> Option<KeeperId> {
        self.seats[node].keeper.filter(|&id| self.is_ready(id))
    }

    pub(crate) fn address(&self, id: KeeperId) -> SocketAddr {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        self.get(id).map_or(nowhere, |keeper| keeper.entry.address)
    }

    /// Returns the address of each node's keeper.
    pub(crate) fn seat_addresses(&self) -> Vec<SocketAddr> {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let seats = self.seats.iter();
        let addresses = seats.map(|seat| seat.keeper.map_or(nowhere, |id| self.address(id)));
        addresses.collect()
    }

    /// Returns the entries of the registry: keepers of nodes, then spare ones.
    pub(crate) fn entries(&self) -> Vec<KeeperEntry> {
        let seats = self.seats.iter().filter_map(|seat| seat.keeper);
        let ids = seats.chain(self.spares.iter().copied());
        let keepers = ids.filter_map(|id| self.get(id));
        keepers.map(|keeper| keeper.entry.clone()).collect()
    }
}
