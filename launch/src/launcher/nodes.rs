//! The keepers of a run, as the launcher sees them: started or taken over, asked, replaced, stopped.

use super::ranks::OWN_PROGRAM;
use crate::keeper::{Orders, Ready};
use crate::register::{self, Register};
use anyhow::{Context, Result, anyhow};
use checkpoint::keeper::{Event, Inventory, Peer, Secret, Topology};
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use trainer::config::Config;

/// How long a keeper stays without a launcher.
const LONELY: Duration = Duration::from_secs(3600);
/// A keeper starts within this time.
const STARTING: Duration = Duration::from_secs(30);

/// What came from a keeper: which, by its number among all that there ever were, and what.
pub(super) enum Heard {
    Event(Event),
    /// It is gone, or says nothing any more.
    Gone(String),
}

pub(super) struct Member {
    number: u64,
    pub(super) keeper: register::Keeper,
    /// None when it is gone.
    control: Option<Peer>,
    child: Option<Child>,
}

/// The keepers of nodes with ranks, then the spare ones.
pub(super) struct Keepers {
    dir: PathBuf,
    secret: Secret,
    memory: Option<u64>,
    patience: Duration,
    pub(super) members: Vec<Member>,
    /// How many have ranks.
    pub(super) nodes: usize,
    numbers: u64,
    sender: Sender<(u64, Heard)>,
    pub(super) heard: Receiver<(u64, Heard)>,
}

impl Keepers {
    fn none(dir: &Path, config: &Config, secret: Secret) -> Keepers {
        let (sender, heard) = unbounded();
        Keepers {
            dir: dir.to_path_buf(),
            secret,
            memory: config.snapshot.memory_gib.map(|gib| (gib * 1073741824.0) as u64),
            patience: Duration::from_secs_f64(config.restart.heartbeat_timeout_s),
            members: Vec::new(),
            nodes: 0,
            numbers: 0,
            sender,
            heard,
        }
    }

    /// Starts one for each of `nodes` nodes, and `spares` more.
    pub(super) fn start(dir: &Path, config: &Config, nodes: usize, spares: usize) -> Result<Keepers> {
        let secret = Secret::random().map_err(|e| anyhow!("{e}"))?;
        let mut keepers = Keepers::none(dir, config, secret);
        keepers.nodes = nodes;
        for number in 0..nodes + spares {
            let member = keepers.spawn(number, None)?;
            keepers.members.push(member);
        }
        Ok(keepers)
    }

    /// Those that an earlier launcher left; where one is gone it counts as a lost node. None where all are gone.
    pub(super) fn take_over(dir: &Path, config: &Config, register: &Register) -> Result<Option<Keepers>> {
        let mut keepers = Keepers::none(dir, config, register.secret.clone());
        keepers.nodes = register.keepers.len() - register.spares;
        for keeper in &register.keepers {
            let mut member = Member { number: keepers.numbers, keeper: keeper.clone(), control: None, child: None };
            keepers.numbers += 1;
            // It may be another's by now.
            if keepers.connect(&mut member).is_err() {
                member.control = None;
            }
            keepers.members.push(member);
        }
        Ok(keepers.members.iter().any(|member| member.control.is_some()).then_some(keepers))
    }

    /// Starts one that ranks reach by the name `socket`, if that is given.
    fn spawn(&mut self, node: usize, socket: Option<String>) -> Result<Member> {
        let number = self.numbers;
        self.numbers += 1;
        // Part of a digest: the name can be seen by everybody.
        let socket = socket.unwrap_or_else(|| format!("moerun/{}/{number}", self.secret.name()));
        let log = self.dir.join("logs").join(format!("keeper-{node}.log"));
        let file = File::options().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(OWN_PROGRAM);
        command.arg0("moerun").args(["keeper", "serve"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        let mut child = command.spawn().context("cannot start a keeper")?;
        let orders = Orders {
            socket: socket.clone(),
            secret: self.secret.clone(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            memory: self.memory,
            lonely_s: LONELY.as_secs(),
        };
        let ready =
            tell(&mut child, &orders).with_context(|| format!("the keeper of node {node}: see {}", log.display()));
        let ready = match ready {
            Ok(ready) => ready,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
        };
        let keeper = register::Keeper { pid: child.id() as i32, address: ready.address, socket };
        let mut member = Member { number, keeper, control: None, child: Some(child) };
        self.connect(&mut member)?;
        Ok(member)
    }

    /// Opens the connection for requests and the one for events.
    fn connect(&self, member: &mut Member) -> Result<()> {
        let connect = |patience| {
            Peer::connect(member.keeper.address, &self.secret, patience)
                .map_err(|e| anyhow!("the keeper at {} cannot be reached: {e}", member.keeper.address))
        };
        let events = connect(self.patience)?;
        member.control = Some(connect(self.patience)?);
        let (sender, number) = (self.sender.clone(), member.number);
        std::thread::spawn(move || {
            // Nobody listens when the launcher ends.
            let error = events.watch(|event| drop(sender.send((number, Heard::Event(event)))));
            let _ = sender.send((number, Heard::Gone(error.to_string())));
        });
        Ok(())
    }

    /// The place of the keeper with this number; None for one that has been replaced.
    pub(super) fn place(&self, number: u64) -> Option<usize> {
        self.members.iter().position(|member| member.number == number)
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
    pub(super) fn ask_all(&mut self, ask: impl Fn(&mut Peer) -> Result<(), checkpoint::keeper::Error>) {
        for place in 0..self.members.len() {
            self.ask(place, &ask);
        }
    }

    /// A connection of its own for something that takes long.
    pub(super) fn long(&self, place: usize) -> Result<Peer> {
        const LONG: Duration = Duration::from_secs(3600);
        let address = self.members[place].keeper.address;
        Peer::connect(address, &self.secret, LONG).map_err(|e| anyhow!("the keeper of node {place}: {e}"))
    }

    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.members.iter().map(|member| member.keeper.address).collect()
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.secret
    }

    /// A keeper whose events do not come any more counts as gone, whatever else it may answer.
    pub(super) fn lose(&mut self, place: usize) {
        self.members[place].control = None;
    }

    /// Ends what is left of a keeper that does not answer.
    fn bury(&mut self, place: usize) {
        let member = &mut self.members[place];
        member.control = None;
        if let Some(child) = &mut member.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Puts a keeper where one was lost: a spare one if there is any; whether it was.
    pub(super) fn replace(&mut self, place: usize) -> Result<bool> {
        self.bury(place);
        while self.members.len() > self.nodes {
            let spare = self.members.len() - 1;
            if self.is_alive(spare) {
                self.members.swap_remove(place);
                return Ok(true);
            }
            self.bury(spare);
            self.members.truncate(spare);
        }
        let member = self.spawn(place, None)?;
        self.members[place] = member;
        Ok(false)
    }

    /// Starts a keeper anew whose ranks still live: under the name that they know.
    pub(super) fn restart(&mut self, place: usize) -> Result<()> {
        self.bury(place);
        let socket = self.members[place].keeper.socket.clone();
        let member = self.spawn(place, Some(socket))?;
        self.members[place] = member;
        Ok(())
    }

    /// Takes the nodes at `places` out of the run.
    pub(super) fn remove(&mut self, places: &[usize]) {
        for &place in places.iter().rev() {
            self.bury(place);
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
    pub(super) fn save(&self, register: &mut Register) -> Result<()> {
        register.keepers = self.members.iter().map(|member| member.keeper.clone()).collect();
        register.spares = self.members.len() - self.nodes;
        register.save(&self.dir)
    }

    /// The run is over.
    pub(super) fn stop(mut self) {
        self.ask_all(|peer| peer.stop());
        for member in &mut self.members {
            if let Some(child) = &mut member.child {
                let _ = child.wait();
            }
        }
        Register::remove(&self.dir);
    }
}

fn tell(child: &mut Child, orders: &Orders) -> Result<Ready> {
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let (mut stdin, stdout) = stdin.zip(stdout).context("it has no standard input and output")?;
    writeln!(stdin, "{}", serde_json::to_string(orders).expect("plain data")).context("it ended at once")?;
    let (sender, line) = crossbeam_channel::bounded(1);
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        let _ = sender.send(read.map(|_| line));
    });
    let line = line.recv_timeout(STARTING).context("it did not start in time")?.context("it said nothing")?;
    serde_json::from_str(&line).context("it did not start")
}
