//! The keepers of a run, as the launcher sees them: started or taken over, asked, replaced, stopped.

use super::machines::Machines;
use crate::keeper::KeeperSettings;
use crate::registry::{self, KeeperRegistry};
use anyhow::{Result, anyhow};
use checkpoint::keeper::{Event, Inventory, Peer, Secret, Topology};
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;
use trainer::config::Config;

/// How long a keeper stays without a launcher.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(3600);

/// What came from a keeper: which, by its number among all that there ever were, and what.
pub(super) enum KeeperMessage {
    Event(Event),
    /// It is gone, or says nothing any more.
    Gone(String),
}

pub(super) struct Member {
    number: u64,
    pub(super) keeper: registry::KeeperEntry,
    /// None when it is gone.
    control: Option<Peer>,
    child: Option<Child>,
}

/// The keepers of nodes with ranks, then the spare ones.
pub(super) struct Keepers {
    dir: PathBuf,
    secret: Secret,
    memory: Option<u64>,
    reply_timeout: Duration,
    pub(super) members: Vec<Member>,
    /// How many have ranks.
    pub(super) nodes: usize,
    next_number: u64,
    sender: Sender<(u64, KeeperMessage)>,
    pub(super) messages: Receiver<(u64, KeeperMessage)>,
}

impl Keepers {
    fn empty(dir: &Path, config: &Config, secret: Secret) -> Keepers {
        let (sender, messages) = unbounded();
        Keepers {
            dir: dir.to_path_buf(),
            secret,
            memory: config
                .snapshot
                .memory_gib
                .map(|gib| (gib * 1073741824.0) as u64),
            reply_timeout: Duration::from_secs_f64(config.restart.heartbeat_timeout_s),
            members: Vec::new(),
            nodes: 0,
            next_number: 0,
            sender,
            messages,
        }
    }

    /// Starts one for each of `nodes` nodes, and `spares` more, on the machines that `machine_of` says.
    pub(super) fn start(
        dir: &Path,
        config: &Config,
        (nodes, spares): (usize, usize),
        machines: &mut Machines,
        machine_of: impl Fn(usize) -> usize,
    ) -> Result<Keepers> {
        let secret = Secret::random().map_err(|e| anyhow!("{e}"))?;
        let mut keepers = Keepers::empty(dir, config, secret);
        keepers.nodes = nodes;
        for number in 0..nodes + spares {
            let member = keepers.spawn(number, None, (machines, machine_of(number)))?;
            keepers.members.push(member);
        }
        Ok(keepers)
    }

    /// Those that an earlier launcher left; where one is gone it counts as a lost node. None where all are gone.
    pub(super) fn take_over(
        dir: &Path,
        config: &Config,
        registry: &KeeperRegistry,
    ) -> Result<Option<Keepers>> {
        let mut keepers = Keepers::empty(dir, config, registry.secret.clone());
        keepers.nodes = registry.keepers.len() - registry.spares;
        for keeper in &registry.keepers {
            let mut member = Member {
                number: keepers.next_number,
                keeper: keeper.clone(),
                control: None,
                child: None,
            };
            keepers.next_number += 1;
            // It may be another's by now.
            if keepers.connect(&mut member).is_err() {
                member.control = None;
            }
            keepers.members.push(member);
        }
        Ok(keepers
            .members
            .iter()
            .any(|member| member.control.is_some())
            .then_some(keepers))
    }

    /// Starts one that ranks reach by the name `socket`, if that is given, on a machine.
    fn spawn(
        &mut self,
        node: usize,
        socket: Option<String>,
        (machines, machine): (&mut Machines, usize),
    ) -> Result<Member> {
        let number = self.next_number;
        self.next_number += 1;
        // Part of a digest: the name can be seen by everybody.
        let socket = socket.unwrap_or_else(|| format!("moerun/{}/{number}", self.secret.name()));
        let settings = KeeperSettings {
            socket: socket.clone(),
            secret: self.secret.clone(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            memory: self.memory,
            orphan_timeout_s: ORPHAN_TIMEOUT.as_secs(),
        };
        let (pid, ready, child) = machines.start_keeper(machine, node, settings)?;
        let keeper = registry::KeeperEntry {
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

    /// Opens the connection for requests and the one for events.
    fn connect(&self, member: &mut Member) -> Result<()> {
        let connect = |reply_timeout| {
            Peer::connect(member.keeper.address, &self.secret, reply_timeout).map_err(|e| {
                anyhow!(
                    "the keeper at {} cannot be reached: {e}",
                    member.keeper.address
                )
            })
        };
        let events = connect(self.reply_timeout)?
            .subscribe()
            .map_err(|e| anyhow!("the keeper tells no events: {e}"))?;
        member.control = Some(connect(self.reply_timeout)?);
        let sender = self.sender.clone();
        let number = member.number;
        std::thread::spawn(move || {
            // Nobody listens when the launcher ends.
            let error = events
                .for_each_event(|event| drop(sender.send((number, KeeperMessage::Event(event)))));
            let _ = sender.send((number, KeeperMessage::Gone(error.to_string())));
        });
        Ok(())
    }

    /// The place of the keeper with this number; None for one that has been replaced.
    pub(super) fn index_of(&self, number: u64) -> Option<usize> {
        self.members
            .iter()
            .position(|member| member.number == number)
    }

    /// Whether the keeper answers.
    pub(super) fn is_alive(&mut self, place: usize) -> bool {
        self.inventory(place).is_some()
    }

    pub(super) fn inventory(&mut self, place: usize) -> Option<Inventory> {
        self.ask(place, |peer| peer.inventory())
    }

    /// Asks a keeper; one that does not answer properly is gone.
    pub(super) fn ask<T>(
        &mut self,
        place: usize,
        ask: impl FnOnce(&mut Peer) -> Result<T, checkpoint::keeper::Error>,
    ) -> Option<T> {
        let member = &mut self.members[place];
        match ask(member.control.as_mut()?) {
            Ok(answer) => Some(answer),
            Err(error) => {
                tracing::warn!("the keeper of node {place}: {error}");
                if !matches!(error, checkpoint::keeper::Error::Refused(_)) {
                    member.control = None;
                }
                None
            }
        }
    }

    /// Asks every keeper that is there.
    pub(super) fn ask_all(
        &mut self,
        ask: impl Fn(&mut Peer) -> Result<(), checkpoint::keeper::Error>,
    ) {
        for place in 0..self.members.len() {
            self.ask(place, &ask);
        }
    }

    /// A connection of its own for something that takes long.
    pub(super) fn long_connection(&self, place: usize) -> Result<Peer> {
        const LONG_TIMEOUT: Duration = Duration::from_secs(3600);
        let address = self.members[place].keeper.address;
        Peer::connect(address, &self.secret, LONG_TIMEOUT)
            .map_err(|e| anyhow!("the keeper of node {place}: {e}"))
    }

    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.members
            .iter()
            .map(|member| member.keeper.address)
            .collect()
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.secret
    }

    /// A keeper whose events do not come any more counts as gone, whatever else it may answer.
    pub(super) fn mark_lost(&mut self, place: usize) {
        self.members[place].control = None;
    }

    /// Ends what is left of a keeper that does not answer.
    fn kill_keeper(&mut self, place: usize, machines: &Machines) {
        let member = &mut self.members[place];
        member.control = None;
        machines.kill_keeper(member.keeper.machine, member.keeper.pid);
        if let Some(child) = &mut member.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Puts a keeper where one was lost: a spare one if there is any; whether it was.
    pub(super) fn replace(&mut self, place: usize, machines: &mut Machines) -> Result<bool> {
        self.kill_keeper(place, machines);
        while self.members.len() > self.nodes {
            let spare = self.members.len() - 1;
            if self.is_alive(spare) {
                self.members.swap_remove(place);
                return Ok(true);
            }
            self.kill_keeper(spare, machines);
            self.members.truncate(spare);
        }
        let machine = self.members[place].keeper.machine;
        let member = self.spawn(place, None, (machines, machine))?;
        self.members[place] = member;
        Ok(false)
    }

    /// Starts a keeper anew whose ranks still live: under the name that they know.
    pub(super) fn restart(&mut self, place: usize, machines: &mut Machines) -> Result<()> {
        self.kill_keeper(place, machines);
        let registry::KeeperEntry {
            socket, machine, ..
        } = self.members[place].keeper.clone();
        let member = self.spawn(place, Some(socket), (machines, machine))?;
        self.members[place] = member;
        Ok(())
    }

    /// Takes the nodes at `places` out of the run.
    pub(super) fn remove(&mut self, places: &[usize], machines: &Machines) {
        for &place in places.iter().rev() {
            self.kill_keeper(place, machines);
            self.members.remove(place);
            self.nodes -= 1;
        }
    }

    /// Begins a generation.
    pub(super) fn set_up(&mut self, topology: &Topology) {
        for node in 0..topology.nodes.len() {
            self.ask(node, |peer| peer.set_up(topology, node));
        }
    }

    /// Writes down where they are.
    pub(super) fn save(&self, registry: &mut KeeperRegistry) -> Result<()> {
        registry.keepers = self
            .members
            .iter()
            .map(|member| member.keeper.clone())
            .collect();
        registry.spares = self.members.len() - self.nodes;
        registry.save(&self.dir)
    }

    /// The run is over.
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
