//! The launcher's view of a run's keepers: start, take over, ask, replace, stop.

use super::machines::{KeeperProcess, Machines};
use crate::{
    keeper::KeeperSettings,
    registry::{KeeperEntry, KeeperRegistry},
};
use anyhow::{Result, anyhow};
use checkpoint::keeper::{Event, Inventory, Peer, Secret, Topology};
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Child,
    time::Duration,
};
use trainer::config::Config;

/// The time after which a keeper without a launcher exits.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(3600);
/// The limit of a request that moves or checks whole snapshots.
const LONG_TIMEOUT: Duration = Duration::from_secs(3600);

pub(super) enum KeeperMessage {
    Event(Event),
    /// The connection ended, for this reason.
    Gone(String),
}

/// A message and the keeper's number among all keepers that this launcher has had.
pub(super) struct NumberedMessage {
    pub(super) number: u64,
    pub(super) message: KeeperMessage,
}

pub(super) struct Member {
    number: u64,
    pub(super) keeper: KeeperEntry,
    /// None once the keeper is lost.
    control: Option<Peer>,
    /// None on another machine, and if an earlier launcher started the keeper.
    child: Option<Child>,
}

/// Place of a keeper to be started.
struct KeeperSite {
    node: usize,
    machine: usize,
    /// The socket that the node's ranks know; None for a new one.
    socket: Option<String>,
}

/// Keepers of the nodes with ranks, then spare ones.
pub(super) struct Keepers {
    dir: PathBuf,
    registry: KeeperRegistry,
    memory: Option<u64>,
    reply_timeout: Duration,
    pub(super) members: Vec<Member>,
    /// Number of nodes with ranks.
    pub(super) nodes: usize,
    next_number: u64,
    sender: Sender<NumberedMessage>,
    pub(super) messages: Receiver<NumberedMessage>,
}

impl Keepers {
    fn empty(dir: &Path, config: &Config, registry: KeeperRegistry) -> Keepers {
        let (sender, messages) = unbounded();
        let memory_gib = config.snapshot.memory_gib;
        Keepers {
            dir: dir.to_path_buf(),
            registry,
            memory: memory_gib.map(|gib| (gib * 1073741824.0) as u64),
            reply_timeout: Duration::from_secs_f64(config.restart.heartbeat_timeout_s),
            members: Vec::new(),
            nodes: 0,
            next_number: 0,
            sender,
            messages,
        }
    }

    /// Starts a keeper on each of the `keeper_machines`; the first `nodes` keepers have ranks.
    pub(super) fn start(
        dir: &Path,
        config: &Config,
        nodes: usize,
        keeper_machines: &[usize],
        machines: &mut Machines,
    ) -> Result<Keepers> {
        let secret = Secret::random().map_err(|error| anyhow!("{error}"))?;
        let mut keepers = Keepers::empty(dir, config, KeeperRegistry::new(secret));
        keepers.nodes = nodes;
        for (node, &machine) in keeper_machines.iter().enumerate() {
            let socket = None;
            let site = KeeperSite {
                node,
                machine,
                socket,
            };
            let member = keepers.spawn(site, machines)?;
            keepers.members.push(member);
        }
        Ok(keepers)
    }

    /// Connects to the keepers of an earlier launcher. Returns None if all are gone.
    ///
    /// A keeper that cannot be reached counts as a lost node.
    pub(super) fn take_over(
        dir: &Path,
        config: &Config,
        registry: KeeperRegistry,
    ) -> Option<Keepers> {
        let nodes = registry.keepers.len() - registry.spares;
        let entries = registry.keepers.clone();
        let mut keepers = Keepers::empty(dir, config, registry);
        keepers.nodes = nodes;
        for keeper in entries {
            let mut member = Member {
                number: keepers.next_number,
                keeper,
                control: None,
                child: None,
            };
            keepers.next_number += 1;
            // Another process may have its address by now.
            if keepers.connect(&mut member).is_err() {
                member.control = None;
            }
            keepers.members.push(member);
        }
        let mut members = keepers.members.iter();
        let any_alive = members.any(|member| member.control.is_some());
        any_alive.then_some(keepers)
    }

    fn spawn(&mut self, site: KeeperSite, machines: &mut Machines) -> Result<Member> {
        let KeeperSite {
            node,
            machine,
            socket,
        } = site;
        let number = self.next_number;
        self.next_number += 1;
        let secret = self.secret();
        // Every user can see the name: it contains part of the secret's digest.
        let socket = socket.unwrap_or_else(|| format!("moerun/{}/{number}", secret.name()));
        let settings = KeeperSettings {
            socket: socket.clone(),
            secret: secret.clone(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            memory: self.memory,
            orphan_timeout_s: ORPHAN_TIMEOUT.as_secs(),
        };
        let KeeperProcess { pid, ready, child } = machines.start_keeper(machine, node, settings)?;
        let keeper = KeeperEntry {
            pid,
            machine,
            address: ready.address,
            socket,
        };
        let mut member = Member {
            number,
            keeper,
            control: None,
            child,
        };
        self.connect(&mut member)?;
        Ok(member)
    }

    /// Opens a connection for requests and one for events.
    fn connect(&self, member: &mut Member) -> Result<()> {
        let address = member.keeper.address;
        let connect = || {
            Peer::connect(address, self.secret(), self.reply_timeout)
                .map_err(|error| anyhow!("cannot reach the keeper at {address}: {error}"))
        };
        let events = connect()?
            .subscribe()
            .map_err(|error| anyhow!("the keeper at {address} sends no events: {error}"))?;
        member.control = Some(connect()?);
        let sender = self.sender.clone();
        let number = member.number;
        std::thread::spawn(move || {
            // Sending fails once the launcher exits.
            let send = |message| drop(sender.send(NumberedMessage { number, message }));
            let error = events.for_each_event(|event| send(KeeperMessage::Event(event)));
            send(KeeperMessage::Gone(error.to_string()));
        });
        Ok(())
    }

    /// Returns the node of the keeper with this number; None once it is replaced.
    pub(super) fn node_of(&self, number: u64) -> Option<usize> {
        let mut members = self.members.iter();
        members.position(|member| member.number == number)
    }

    /// True if the keeper answers.
    pub(super) fn is_alive(&mut self, node: usize) -> bool {
        self.inventory(node).is_some()
    }

    pub(super) fn inventory(&mut self, node: usize) -> Option<Inventory> {
        self.ask(node, |peer| peer.inventory())
    }

    /// Sends a request to a keeper. A keeper that does not answer properly is lost.
    pub(super) fn ask<T>(
        &mut self,
        node: usize,
        ask: impl FnOnce(&mut Peer) -> Result<T, checkpoint::keeper::Error>,
    ) -> Option<T> {
        let member = &mut self.members[node];
        match ask(member.control.as_mut()?) {
            Ok(answer) => Some(answer),
            Err(error) => {
                tracing::warn!("the keeper of node {node}: {error}");
                if !matches!(error, checkpoint::keeper::Error::Refused(_)) {
                    member.control = None;
                }
                None
            }
        }
    }

    /// Sends a request to every keeper that is not lost.
    pub(super) fn ask_all(
        &mut self,
        ask: impl Fn(&mut Peer) -> Result<(), checkpoint::keeper::Error>,
    ) {
        for node in 0..self.members.len() {
            self.ask(node, &ask);
        }
    }

    /// Opens a connection for requests that take long.
    pub(super) fn long_connection(&self, node: usize) -> Result<Peer> {
        let address = self.members[node].keeper.address;
        Peer::connect(address, self.secret(), LONG_TIMEOUT)
            .map_err(|error| anyhow!("the keeper of node {node}: {error}"))
    }

    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        let members = self.members.iter();
        members.map(|member| member.keeper.address).collect()
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.registry.secret
    }

    /// Treats a keeper whose events have stopped as lost, even if it still answers requests.
    pub(super) fn mark_lost(&mut self, node: usize) {
        self.members[node].control = None;
    }

    fn kill_keeper(&mut self, node: usize, machines: &Machines) {
        let member = &mut self.members[node];
        member.control = None;
        machines.kill_keeper(member.keeper.machine, member.keeper.pid);
        if let Some(child) = &mut member.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Replaces a lost keeper. Returns true if a spare took over, false if it started a new one.
    pub(super) fn replace(&mut self, node: usize, machines: &mut Machines) -> Result<bool> {
        self.kill_keeper(node, machines);
        while self.members.len() > self.nodes {
            let spare = self.members.len() - 1;
            if self.is_alive(spare) {
                self.members.swap_remove(node);
                return Ok(true);
            }
            self.kill_keeper(spare, machines);
            self.members.truncate(spare);
        }
        let site = KeeperSite {
            node,
            machine: self.members[node].keeper.machine,
            socket: None,
        };
        self.members[node] = self.spawn(site, machines)?;
        Ok(false)
    }

    /// Starts a new keeper under the socket name that the node's live ranks know.
    pub(super) fn restart(&mut self, node: usize, machines: &mut Machines) -> Result<()> {
        self.kill_keeper(node, machines);
        let keeper = &self.members[node].keeper;
        let site = KeeperSite {
            node,
            machine: keeper.machine,
            socket: Some(keeper.socket.clone()),
        };
        self.members[node] = self.spawn(site, machines)?;
        Ok(())
    }

    /// Takes nodes out of the run. `nodes` must be ascending.
    pub(super) fn remove(&mut self, nodes: &[usize], machines: &Machines) {
        for &node in nodes.iter().rev() {
            self.kill_keeper(node, machines);
            self.members.remove(node);
            self.nodes -= 1;
        }
    }

    /// Records a new generation in the registry and announces it to the keepers.
    pub(super) fn begin_generation(
        &mut self,
        topology: &Topology,
        skipped_batches: &BTreeMap<u64, u64>,
    ) -> Result<()> {
        self.registry.generation = topology.generation;
        self.registry.skipped_batches = skipped_batches.clone();
        self.save()?;
        self.set_up(topology);
        Ok(())
    }

    pub(super) fn set_up(&mut self, topology: &Topology) {
        for node in 0..topology.nodes.len() {
            self.ask(node, |peer| peer.set_up(topology, node));
        }
    }

    /// Writes the registry with the current keepers.
    pub(super) fn save(&mut self) -> Result<()> {
        let members = self.members.iter();
        self.registry.keepers = members.map(|member| member.keeper.clone()).collect();
        self.registry.spares = self.members.len() - self.nodes;
        self.registry.save(&self.dir)
    }

    /// Stops all keepers at the end of the run.
    pub(super) fn stop(mut self) {
        self.ask_all(|peer| peer.stop());
        for member in &mut self.members {
            if let Some(child) = &mut member.child {
                let _ = child.wait();
            }
        }
        KeeperRegistry::remove(&self.dir);
    }
}
