//! A simulated cluster that carries out the engine's commands in virtual time.

use crate::{
    launcher::engine::{
        Engine, Launch,
        command::{Command, KeeperRequest, KeeperShare},
        event::{Answer, Event, Failed, Host, SavedCheckpoint, Source},
        keepers::KeeperId,
        problem::Problem,
        ranks::{FailedRank, RankReport},
        requests::RequestId,
        settings::Settings,
    },
    protocol::Assignment,
    registry::{KeeperEntry, KeeperRegistry},
};
use checkpoint::keeper::{
    self, ChecksumDigest, Identity, Inventory, PartInfo, RankStatus, Secret, Shared, Snapshot,
    SnapshotId, Topology,
    recover::{Rebuild, candidates},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

const TICK: Duration = Duration::from_millis(20);
/// The time of a step.
const STEP: Duration = Duration::from_millis(200);
/// The time that ranks take to start.
const START: Duration = Duration::from_millis(600);
/// The time that a checkpoint takes to be written.
const WRITE: Duration = Duration::from_millis(300);
const ROUND_TRIP: Duration = Duration::from_millis(20);

/// A machine of the simulation.
#[derive(Debug, Default)]
struct SimMachine {
    /// False while the machine or its agent is gone.
    is_joined: bool,
    /// Since when nothing reaches the machine, and nothing comes from it.
    cut_since: Option<Duration>,
    /// Number of the last command about ranks.
    number: u64,
    ranks: BTreeSet<usize>,
    failed: Vec<FailedRank>,
}

#[derive(Debug)]
struct SimKeeper {
    machine: usize,
    pid: i32,
    is_alive: bool,
    /// True while the process is stopped.
    is_hung: bool,
    /// The time at which it was continued.
    continued_at: Option<Duration>,
    subscriber: Option<KeeperId>,
    memberships: Vec<(Shared<Topology>, usize)>,
    parts: BTreeMap<(SnapshotId, usize), PartInfo>,
    protected: BTreeSet<SnapshotId>,
    complete: BTreeMap<SnapshotId, Snapshot>,
    pinned: Option<SnapshotId>,
    /// Number of times that it will refuse to list what it holds.
    refusals: usize,
}

/// A generation of ranks.
#[derive(Debug)]
struct Attempt {
    number: u64,
    ranks: usize,
    step: u64,
    next_step_at: Duration,
    /// The step after which they end.
    is_stopping: bool,
    /// The next snapshot is to be written to disk.
    wants_checkpoint: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum DiskState {
    #[default]
    Works,
    Full,
    Hangs,
}

pub(super) struct World {
    engine: Engine,
    pub(super) now: Duration,
    machines: Vec<SimMachine>,
    keepers: BTreeMap<SocketAddr, SimKeeper>,
    links: BTreeMap<KeeperId, SocketAddr>,
    attempt: Option<Attempt>,
    steps: u64,
    /// Steps of the checkpoints on disk.
    pub(super) checkpoints: BTreeSet<u64>,
    pub(super) disk: DiskState,
    /// True while no keeper can be started.
    pub(super) refuses_keepers: bool,
    pub(super) registry: Option<KeeperRegistry>,
    /// Records that the runtime tries to write again once there is room.
    unwritten_registry: Option<Option<KeeperRegistry>>,
    waiting: Vec<(Duration, Event)>,
    /// Requests that wait for a stopped keeper.
    unread: Vec<Command>,
    /// Disk requests that wait for a hanging disk.
    hanging: Vec<Command>,
    next_port: u16,
    pub(super) printed: Vec<String>,
    pub(super) exit: Option<(u8, Option<Problem>)>,
    /// Descriptions of broken invariants.
    pub(super) violations: Vec<String>,
    pub(super) restarts: usize,
    /// Steps from which attempts started.
    pub(super) starts: Vec<u64>,
}

fn config(machines: usize, changes: &Value) -> trainer::config::Config {
    let mut config = json!({
        "run": {"dir": "run", "timeout_s": 60},
        "model": {
            "vocab_size": 64, "hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1,
            "moe": {"experts": 2, "top_k": 1, "ffn": 8},
        },
        "parallel": {"ranks_per_node": 2},
        "data": {"train": [{"path": "data"}], "sequence_length": 8},
        "train": {"steps": 40, "global_batch": 12, "micro_batch": 1},
        "checkpoint": {"every": 10},
        "snapshot": {"every": 1, "redundancy": "auto"},
        "restart": {"standby": false, "max_restarts": 1000},
    });
    if machines == 1 {
        config["parallel"] = json!({});
    }
    merge(&mut config, changes);
    serde_json::from_value(config).expect("a configuration")
}

fn merge(into: &mut Value, changes: &Value) {
    match (into, changes) {
        (Value::Object(into), Value::Object(changes)) => {
            for (key, value) in changes {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, changes) => *into = changes.clone(),
    }
}

fn host(machine: usize) -> Host {
    Host {
        address: Some(address(machine)),
        identity: format!("machine-{machine}"),
    }
}

fn address(machine: usize) -> IpAddr {
    let [.., high, low] = (machine as u32 + 1).to_be_bytes();
    IpAddr::from([10, 0, high, low])
}

impl World {
    /// Returns a run on `machines` machines of two ranks, of which the last `spares` are spare.
    pub(super) fn new(machines: usize, spares: usize, changes: &Value) -> World {
        let config = config(machines, changes);
        World::with(config, machines, spares, None, BTreeSet::new())
    }

    fn with(
        config: trainer::config::Config,
        machines: usize,
        spares: usize,
        registry: Option<KeeperRegistry>,
        checkpoints: BTreeSet<u64>,
    ) -> World {
        let secret = match &registry {
            Some(registry) => registry.secret.clone(),
            None => Secret::from_token("a token for simulations").expect("long enough"),
        };
        let settings = Settings {
            stored_config: String::new(),
            dir: PathBuf::from("run"),
            store: SocketAddr::from(([127, 0, 0, 1], 1)),
            ranks_per_machine: 2,
            spare_nodes: spares,
            world_size: 2 * (machines - spares),
            chunk_bytes: 1,
            config,
        };
        let launch = Launch {
            machines,
            own: host(0),
            secret,
            number: 7,
            registry,
        };
        let steps = settings.config.train.steps;
        let mut sim: Vec<SimMachine> = (0..machines).map(|_| SimMachine::default()).collect();
        sim[0].is_joined = true;
        World {
            engine: Engine::new(settings, launch),
            now: Duration::ZERO,
            machines: sim,
            keepers: BTreeMap::new(),
            links: BTreeMap::new(),
            attempt: None,
            steps,
            checkpoints,
            disk: DiskState::Works,
            refuses_keepers: false,
            registry: None,
            unwritten_registry: None,
            waiting: Vec::new(),
            unread: Vec::new(),
            hanging: Vec::new(),
            next_port: 1000,
            printed: Vec::new(),
            exit: None,
            violations: Vec::new(),
            restarts: 0,
            starts: Vec::new(),
        }
    }

    /// Starts the launcher again, after it was killed: ranks and agents' connections are gone.
    pub(super) fn relaunch(mut self, machines: usize, spares: usize, changes: &Value) -> World {
        let config = config(machines, changes);
        let registry = self.registry.take();
        let checkpoints = std::mem::take(&mut self.checkpoints);
        let mut world = World::with(config, machines, spares, registry.clone(), checkpoints);
        world.registry = registry;
        world.keepers = std::mem::take(&mut self.keepers);
        for keeper in world.keepers.values_mut() {
            keeper.subscriber = None;
        }
        world.next_port = self.next_port;
        world
    }

    /// Returns what the engine waits for, and what it printed.
    pub(super) fn describe(&self) -> String {
        format!("{:?} {}", self.printed, self.engine.describe())
    }

    pub(super) fn machines(&self) -> usize {
        self.machines.len()
    }

    pub(super) fn is_joined(&self, machine: usize) -> bool {
        self.machines[machine].is_joined
    }

    pub(super) fn join(&mut self, machine: usize) {
        if self.machines[machine].is_joined || self.exit.is_some() {
            return;
        }
        if self.machines[machine].cut_since.is_some() {
            // Messages sent in the meantime are lost.
            self.miss_keepers(machine);
        }
        self.machines[machine] = SimMachine {
            is_joined: true,
            ..SimMachine::default()
        };
        let keepers = self.keepers.iter();
        let on_machine = keepers.filter(|(_, keeper)| keeper.is_alive && keeper.machine == machine);
        let keepers = on_machine.map(|(&address, keeper)| KeeperEntry {
            pid: keeper.pid,
            machine,
            address,
            socket: String::new(),
            identity: format!("machine-{machine}"),
        });
        let keepers = keepers.collect();
        self.tell(Event::MachineJoined {
            machine,
            host: host(machine),
            keepers,
        });
    }

    pub(super) fn join_all(&mut self) {
        for machine in 1..self.machines.len() {
            self.join(machine);
        }
    }

    /// The machine loses power. Other machines notice at once.
    pub(super) fn lose(&mut self, machine: usize) {
        if !self.machines[machine].is_joined {
            return;
        }
        self.empty(machine);
        self.tell(Event::MachineLost {
            machine,
            reason: "the connection was closed".into(),
        });
        let addresses: Vec<SocketAddr> = self.keepers.keys().copied().collect();
        for address in addresses {
            if self.keepers[&address].machine == machine {
                self.kill_keeper_at(address);
            }
        }
    }

    /// The agent is killed, and its ranks end with it. Keepers live.
    pub(super) fn lose_agent(&mut self, machine: usize) {
        if self.machines[machine].is_joined {
            self.empty(machine);
            self.tell(Event::MachineLost {
                machine,
                reason: "the connection was closed".into(),
            });
        }
    }

    /// The agent finds its connection closed, ends its ranks and joins again before the launcher
    /// knows of it.
    pub(super) fn rejoin(&mut self, machine: usize) {
        if self.machines[machine].is_joined && self.machines[machine].cut_since.is_none() {
            self.empty(machine);
            self.join(machine);
        }
    }

    /// The agent and its ranks are gone. The network stays as it is.
    fn empty(&mut self, machine: usize) {
        let cut_since = self.machines[machine].cut_since;
        self.machines[machine] = SimMachine {
            cut_since,
            ..SimMachine::default()
        };
    }

    /// Nothing reaches the machine any more, and no connection is closed.
    pub(super) fn cut(&mut self, machine: usize) {
        self.machines[machine].cut_since = Some(self.now);
    }

    pub(super) fn kill_rank(&mut self, rank: usize) {
        self.end_rank(rank, Signal::SIGKILL as i32);
    }

    /// A rank exits with a raw status of `waitpid`.
    fn end_rank(&mut self, rank: usize, status: i32) {
        for machine in 0..self.machines.len() {
            if self.machines[machine].ranks.remove(&rank) {
                self.machines[machine].failed.push(FailedRank {
                    rank,
                    status,
                    report: None,
                    lost: None,
                });
                self.report_ranks(machine);
            }
        }
    }

    pub(super) fn ranks(&self) -> Vec<usize> {
        let ranks = self.machines.iter().flat_map(|machine| &machine.ranks);
        ranks.copied().collect()
    }

    pub(super) fn kill_keeper(&mut self, index: usize) {
        let alive = self.keepers.iter().filter(|(_, keeper)| keeper.is_alive);
        let alive: Vec<SocketAddr> = alive.map(|(&address, _)| address).collect();
        if !alive.is_empty() {
            self.kill_keeper_at(alive[index % alive.len()]);
        }
    }

    /// Stops the process of a keeper.
    /// Lets a live keeper refuse N times to list what it holds.
    pub(super) fn refuse_inventories(&mut self, index: usize, times: usize) {
        let mut live = self.keepers.values_mut().filter(|keeper| keeper.is_alive);
        live.nth(index).expect("a keeper").refusals = times;
    }

    pub(super) fn hang_keeper(&mut self, index: usize) {
        let alive = self.keepers.values_mut().filter(|keeper| keeper.is_alive);
        let mut alive: Vec<&mut SimKeeper> = alive.collect();
        let count = alive.len();
        if count > 0 {
            alive[index % count].is_hung = true;
        }
    }

    /// Lets stopped keepers continue.
    pub(super) fn continue_keepers(&mut self) {
        for keeper in self.keepers.values_mut() {
            if std::mem::take(&mut keeper.is_hung) {
                keeper.continued_at = Some(self.now);
            }
        }
        // Their heartbeats were due meanwhile.
        self.keeper_heartbeats();
        for command in std::mem::take(&mut self.unread) {
            self.carry_out(command);
        }
    }

    /// The newest checkpoint cannot be read any more. At the end of a run, nothing helps.
    pub(super) fn damage_checkpoint(&mut self) {
        if self.attempt.is_some() {
            self.checkpoints.pop_last();
        }
    }

    fn kill_keeper_at(&mut self, address: SocketAddr) {
        let Some(keeper) = self.keepers.get_mut(&address) else {
            return;
        };
        keeper.is_alive = false;
        keeper.parts.clear();
        if let Some(id) = keeper.subscriber.take() {
            self.tell(Event::KeeperGone {
                keeper: id,
                failed: Failed::Lost("the connection was closed".into()),
            });
        }
    }

    pub(super) fn signal(&mut self, source: Source, signal: Signal, count: usize) {
        self.tell(Event::Stop {
            source,
            signal: signal as i32,
            count,
        });
    }

    /// A stop signal reaches one rank: all ranks end after the same step.
    pub(super) fn signal_rank(&mut self) {
        if let Some(attempt) = &mut self.attempt {
            attempt.is_stopping = true;
        }
    }

    pub(super) fn want_checkpoint(&mut self) {
        self.tell(Event::CheckpointWanted);
    }

    pub(super) fn heal_disk(&mut self) {
        self.disk = DiskState::Works;
        if let Some(registry) = self.unwritten_registry.take() {
            self.registry = registry;
        }
        for command in std::mem::take(&mut self.hanging) {
            self.carry_out(command);
        }
    }

    pub(super) fn step(&self) -> u64 {
        self.attempt.as_ref().map_or(0, |attempt| attempt.step)
    }

    /// Lets time pass until `is_reached`, or for `limit`. Returns true if it was reached.
    pub(super) fn run_until(
        &mut self,
        limit: Duration,
        is_reached: impl Fn(&World) -> bool,
    ) -> bool {
        let end = self.now + limit;
        while self.now < end {
            if is_reached(self) {
                return true;
            }
            self.tick();
        }
        is_reached(self)
    }

    pub(super) fn tick(&mut self) {
        self.now += TICK;
        if self.exit.is_some() {
            return;
        }
        self.deliver();
        self.heartbeats();
        self.train();
        let commands = self.engine.handle(self.now, None);
        for command in commands {
            self.carry_out(command);
        }
    }

    fn deliver(&mut self) {
        let now = self.now;
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        let (due, later): (Vec<_>, Vec<_>) = waiting.partition(|event| event.0 <= now);
        self.waiting = later;
        for (_, event) in due {
            self.tell(event);
        }
    }

    fn heartbeats(&mut self) {
        if !(self.now.as_millis() as u64).is_multiple_of(1000) {
            return;
        }
        self.keeper_heartbeats();
        for machine in 1..self.machines.len() {
            if self.machines[machine].is_joined && self.machines[machine].cut_since.is_none() {
                self.tell(Event::Heartbeat { machine });
            }
        }
    }

    fn keeper_heartbeats(&mut self) {
        for keeper in self.talking_keepers() {
            let event = keeper::Event::Heartbeat { ranks: Vec::new() };
            self.tell(Event::Keeper { keeper, event });
        }
    }

    /// Every keeper reports that its ranks have made progress.
    pub(super) fn pulse(&mut self, progress: u64) {
        for keeper in self.talking_keepers() {
            let sim = &self.keepers[&self.links[&keeper]];
            let ranks = sim.memberships.last().map(|(topology, node)| {
                let ranks = topology.nodes[*node].ranks.iter();
                let status = |&rank: &usize| RankStatus {
                    rank,
                    pid: 1,
                    step: 0,
                    progress,
                    silent_ms: 0,
                };
                ranks.map(status).collect()
            });
            let ranks = ranks.unwrap_or_default();
            let event = keeper::Event::Heartbeat { ranks };
            self.tell(Event::Keeper { keeper, event });
        }
    }

    /// Returns the keepers whose events reach the launcher.
    fn talking_keepers(&self) -> Vec<KeeperId> {
        let keepers = self.keepers.values();
        let talking = keepers.filter(|keeper| keeper.is_alive && self.is_within_reach(keeper));
        talking.filter_map(|keeper| keeper.subscriber).collect()
    }

    /// True unless the keeper is stopped, or its machine cut off.
    fn is_within_reach(&self, keeper: &SimKeeper) -> bool {
        let machine = self.machines.get(keeper.machine);
        !keeper.is_hung && machine.is_some_and(|machine| machine.cut_since.is_none())
    }

    /// Loses what the keepers of a machine sent meanwhile.
    fn miss_keepers(&mut self, machine: usize) {
        let keepers = self.keepers.values_mut();
        let on_machine = keepers.filter(|keeper| keeper.machine == machine);
        let missed: Vec<KeeperId> = on_machine
            .filter_map(|keeper| keeper.subscriber.take())
            .collect();
        for keeper in missed {
            let failed = Failed::Silent("no reply in time".into());
            self.tell(Event::KeeperGone { keeper, failed });
        }
    }

    fn tell(&mut self, event: Event) {
        if self.exit.is_some() {
            return;
        }
        let commands = self.engine.handle(self.now, Some(event));
        for command in commands {
            self.carry_out(command);
        }
    }

    fn later(&mut self, after: Duration, event: Event) {
        self.waiting.push((self.now + after, event));
    }

    fn reply(&mut self, id: RequestId, reply: Result<Answer, Failed>) {
        self.later(ROUND_TRIP, Event::Reply { id, reply });
    }

    fn is_reachable(&self, machine: usize) -> bool {
        self.machines[machine].is_joined && self.machines[machine].cut_since.is_none()
    }

    fn report_ranks(&mut self, machine: usize) {
        if !self.is_reachable(machine) {
            return;
        }
        let SimMachine {
            number,
            ranks,
            failed,
            ..
        } = &self.machines[machine];
        let report = RankReport::new(*number, ranks.len(), failed.clone());
        self.later(ROUND_TRIP, Event::Ranks { machine, report });
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::StartKeeper { id, machine, .. } => self.start_keeper(id, machine),
            Command::KillKeeper { machine, pid } => self.kill_keeper_by_pid(machine, pid),
            Command::ConnectKeeper {
                id,
                keeper,
                address,
            } => self.connect(id, keeper, address),
            Command::DisconnectKeeper { keeper } => {
                if let Some(address) = self.links.remove(&keeper)
                    && let Some(sim) = self.keepers.get_mut(&address)
                {
                    sim.subscriber = sim.subscriber.filter(|&id| id != keeper);
                }
            }
            Command::AskKeeper {
                id,
                keeper,
                request,
            } => self.ask(id, keeper, request),
            Command::StartRanks {
                machine,
                number,
                assignments,
            } => self.start_ranks(machine, number, &assignments),
            Command::KillRanks {
                machine, number, ..
            } => self.kill_ranks(machine, number),
            Command::SignalRanks { machine, signal } => {
                if self.is_reachable(machine) {
                    self.signal_ranks(signal);
                }
            }
            Command::StandBy { .. } | Command::RecordRestart(_) | Command::Log(_) => {}
            Command::DropMachine { machine } => {
                // A machine that is only cut off ends its ranks when it misses the launcher.
                self.empty(machine);
            }
            Command::Print(line) => self.printed.push(line),
            Command::Exit { status, problem } => self.exit(status, problem),
            command => self.carry_out_on_disk(command),
        }
    }

    fn carry_out_on_disk(&mut self, command: Command) {
        if self.disk == DiskState::Hangs {
            self.hanging.push(command);
            return;
        }
        match command {
            Command::Survey { id } => {
                let newest = self.checkpoints.last().map(|&step| saved(step));
                self.reply(id, Ok(Answer::Surveyed(newest)));
            }
            Command::SaveRegistry { id, registry } => {
                if self.disk == DiskState::Full && registry.is_some() {
                    let failed = Failed::Refused("cannot write keepers.json: no space left".into());
                    self.reply(id, Err(failed));
                    self.unwritten_registry = Some(registry);
                } else {
                    self.unwritten_registry = None;
                    self.registry = registry;
                    self.reply(id, Ok(Answer::Done));
                }
            }
            Command::WriteCheckpoint {
                id,
                snapshot,
                shares,
            } => self.write_checkpoint(id, snapshot, &shares),
            other => panic!("not for the disk: {other:?}"),
        }
    }

    fn write_checkpoint(&mut self, id: RequestId, snapshot: SnapshotId, shares: &[KeeperShare]) {
        let sim = |keeper: KeeperId| self.keepers.get(self.links.get(&keeper)?);
        let has_part = |keeper: KeeperId, rank: usize| {
            let has_it = |sim: &SimKeeper| sim.parts.contains_key(&(snapshot, rank));
            sim(keeper).is_some_and(|sim| sim.is_alive && self.is_within_reach(sim) && has_it(sim))
        };
        let is_hung =
            |share: &KeeperShare| sim(share.keeper).is_some_and(|sim| !self.is_within_reach(sim));
        // The launcher gives a silent keeper up, and its connections with it.
        let duration = if shares.iter().any(is_hung) {
            Duration::from_secs(10)
        } else {
            WRITE
        };
        let is_whole = shares
            .iter()
            .all(|share| share.ranks.iter().all(|&rank| has_part(share.keeper, rank)));
        let reply = match (is_whole, self.disk) {
            (true, DiskState::Works) => {
                self.checkpoints.insert(snapshot.step);
                Ok(Answer::Written(saved(snapshot.step)))
            }
            (true, _) => Err(Failed::Refused("no space left on device".into())),
            (false, _) => Err(Failed::Refused("a keeper is gone".into())),
        };
        self.later(duration, Event::Reply { id, reply });
    }

    fn exit(&mut self, status: u8, problem: Option<Problem>) {
        self.exit = Some((status, problem));
        // The thread that would write it later ends, too.
        self.unwritten_registry = None;
        for machine in &mut self.machines {
            machine.ranks.clear();
        }
        self.attempt = None;
    }

    fn start_keeper(&mut self, id: RequestId, machine: usize) {
        if !self.is_reachable(machine) {
            return;
        }
        if self.refuses_keepers {
            let reason = "too little memory".into();
            self.reply(id, Err(Failed::Refused(reason)));
            return;
        }
        self.next_port += 1;
        let address = SocketAddr::new(address(machine), self.next_port);
        let pid = i32::from(self.next_port);
        self.keepers.insert(
            address,
            SimKeeper {
                machine,
                pid,
                is_alive: true,
                is_hung: false,
                continued_at: None,
                subscriber: None,
                memberships: Vec::new(),
                parts: BTreeMap::new(),
                protected: BTreeSet::new(),
                complete: BTreeMap::new(),
                pinned: None,
                refusals: 0,
            },
        );
        self.reply(id, Ok(Answer::KeeperStarted { pid, address }));
    }

    fn kill_keeper_by_pid(&mut self, machine: usize, pid: i32) {
        if !self.is_reachable(machine) {
            return;
        }
        for keeper in self.keepers.values_mut() {
            if keeper.machine == machine && keeper.pid == pid {
                keeper.is_alive = false;
                keeper.parts.clear();
            }
        }
    }

    fn connect(&mut self, id: RequestId, keeper: KeeperId, address: SocketAddr) {
        let Some(sim) = self.keepers.get(&address) else {
            return;
        };
        if !self.is_within_reach(sim) {
            if sim.is_hung {
                self.unread.push(Command::ConnectKeeper {
                    id,
                    keeper,
                    address,
                });
            }
            return;
        }
        let sim = self.keepers.get_mut(&address).expect("it was looked up");
        let reply = if sim.is_alive {
            sim.subscriber = Some(keeper);
            self.links.insert(keeper, address);
            Ok(Answer::Done)
        } else {
            Err(Failed::Lost("connection refused".into()))
        };
        self.reply(id, reply);
    }

    fn ask(&mut self, id: RequestId, keeper: KeeperId, request: KeeperRequest) {
        let Some(&address) = self.links.get(&keeper) else {
            self.reply(id, Err(Failed::Lost("it is not connected".into())));
            return;
        };
        let sim = &self.keepers[&address];
        if !self.is_within_reach(sim) {
            if sim.is_hung {
                self.unread.push(Command::AskKeeper {
                    id,
                    keeper,
                    request,
                });
            }
            return;
        }
        let reply = if self.keepers[&address].is_alive {
            self.answer(address, request)
        } else {
            Err(Failed::Lost("the connection was closed".into()))
        };
        self.reply(id, reply);
    }

    fn answer(&mut self, address: SocketAddr, request: KeeperRequest) -> Result<Answer, Failed> {
        let keeper = self.keepers.get_mut(&address).expect("it was looked up");
        match request {
            KeeperRequest::Inventory if keeper.refusals > 0 => {
                keeper.refusals -= 1;
                let reason = "a message of 9 bytes is longer than 8";
                return Err(Failed::Refused(reason.into()));
            }
            KeeperRequest::Inventory => return Ok(Answer::Inventory(keeper.inventory())),
            KeeperRequest::Verify(_) => return Ok(Answer::Damaged(Vec::new())),
            KeeperRequest::SetUp { topology, node } => {
                keeper
                    .memberships
                    .retain(|(other, _)| other.generation != topology.generation);
                keeper.memberships.push((topology.into(), node));
            }
            KeeperRequest::Commit(snapshot) => keeper.commit(snapshot),
            KeeperRequest::Pin(id) => keeper.pinned = Some(id),
            KeeperRequest::Unpin => keeper.pinned = None,
            KeeperRequest::SelectRestore { snapshot, .. } => {
                let newest = snapshot.map(|snapshot| snapshot.id);
                keeper.parts.retain(|(id, _), _| Some(*id) <= newest);
                keeper.complete.retain(|id, _| Some(*id) <= newest);
            }
            KeeperRequest::Rebuild(rebuilds) => return self.rebuild(address, rebuilds),
            KeeperRequest::Protect { snapshot, node, .. } => {
                let generation = snapshot.id.generation;
                let is_known = keeper
                    .memberships
                    .iter()
                    .any(|(other, _)| other.generation == generation);
                if !is_known {
                    keeper.memberships.push((snapshot.topology.clone(), node));
                }
                keeper.protected.insert(snapshot.id);
            }
            KeeperRequest::Stop => {
                keeper.is_alive = false;
                keeper.parts.clear();
            }
            KeeperRequest::Abandon(_) => {}
        }
        Ok(Answer::Done)
    }

    /// Rebuilds parts if enough sources are alive.
    fn rebuild(&mut self, address: SocketAddr, rebuilds: Vec<Rebuild>) -> Result<Answer, Failed> {
        for rebuild in rebuilds {
            let lives = |source: &Option<SocketAddr>| {
                let keeper = source.and_then(|source| self.keepers.get(&source));
                keeper.is_some_and(|keeper| keeper.is_alive && !keeper.is_hung)
            };
            let living = rebuild
                .sources
                .iter()
                .filter(|source| lives(source))
                .count();
            let needed = rebuild.sources.len() - rebuild.snapshot.topology.redundancy.max_losses();
            if living < needed || rebuild.sources.is_empty() {
                return Err(Failed::Refused("too little is left".into()));
            }
            let part = rebuild.snapshot.parts[rebuild.rank];
            let id = rebuild.snapshot.id;
            let keeper = self.keepers.get_mut(&address).expect("it was looked up");
            keeper.parts.insert((id, rebuild.rank), part);
            keeper.complete.insert(id, rebuild.snapshot);
        }
        Ok(Answer::Done)
    }

    fn start_ranks(&mut self, machine: usize, number: u64, assignments: &[Assignment]) {
        if !self.is_reachable(machine) {
            return;
        }
        let older = self.machines.iter().enumerate().filter(|(other, sim)| {
            self.is_reachable(*other) && sim.number != number && !sim.ranks.is_empty()
        });
        if older.count() > 0 {
            self.violations
                .push(format!("ranks of attempt {number} meet older ones"));
        }
        let sim = &mut self.machines[machine];
        sim.number = number;
        sim.failed.clear();
        sim.ranks = assignments
            .iter()
            .map(|assignment| assignment.rank)
            .collect();
        let first = &assignments[0];
        if self
            .attempt
            .as_ref()
            .is_none_or(|attempt| attempt.number != number)
        {
            let restore = first.keeper.as_ref().and_then(|keeper| keeper.restore);
            let from_disk = self.checkpoints.last().copied().unwrap_or(0);
            let step = restore.map_or(from_disk, |restore| restore.0.step);
            self.starts.push(step);
            self.restarts += 1;
            self.attempt = Some(Attempt {
                number,
                ranks: first.world_size,
                step,
                next_step_at: self.now + START,
                is_stopping: false,
                wants_checkpoint: false,
            });
        }
        self.report_ranks(machine);
    }

    fn kill_ranks(&mut self, machine: usize, number: u64) {
        if !self.is_reachable(machine) {
            return;
        }
        let sim = &mut self.machines[machine];
        sim.number = number;
        sim.ranks.clear();
        sim.failed.clear();
        self.attempt = None;
        self.report_ranks(machine);
    }

    fn signal_ranks(&mut self, signal: i32) {
        if let Some(attempt) = &mut self.attempt {
            if signal == Signal::SIGUSR1 as i32 {
                attempt.wants_checkpoint = true;
            } else {
                attempt.is_stopping = true;
            }
        }
    }

    /// Ranks take a step if all of them are there.
    fn train(&mut self) {
        let running = self.ranks().len();
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        if self.now < attempt.next_step_at || running < attempt.ranks {
            return;
        }
        if self
            .machines
            .iter()
            .any(|machine| machine.cut_since.is_some() && !machine.ranks.is_empty())
        {
            return;
        }
        if attempt.step >= self.steps {
            // Everything was done before this start.
            for rank in self.ranks() {
                self.finish_rank(rank);
            }
            return;
        }
        attempt.next_step_at = self.now + STEP;
        let ends = attempt.is_stopping || attempt.step + 1 >= self.steps;
        attempt.step += 1;
        let step = attempt.step;
        let durable = step.is_multiple_of(10) || ends || attempt.wants_checkpoint;
        attempt.wants_checkpoint = false;
        let status = if attempt.is_stopping && step < self.steps {
            (128 + Signal::SIGTERM as i32) << 8
        } else {
            0
        };
        self.snapshot(step, durable);
        if ends {
            for rank in self.ranks() {
                if status == 0 {
                    self.finish_rank(rank);
                } else {
                    self.end_rank(rank, status);
                }
            }
        }
    }

    fn finish_rank(&mut self, rank: usize) {
        for machine in 0..self.machines.len() {
            if self.machines[machine].ranks.remove(&rank) {
                self.report_ranks(machine);
            }
        }
    }

    /// Every rank hands its state to its keeper.
    fn snapshot(&mut self, step: u64, durable: bool) {
        let addresses: Vec<SocketAddr> = self.keepers.keys().copied().collect();
        let newest = |keeper: &SimKeeper| {
            keeper
                .memberships
                .last()
                .map(|(topology, _)| topology.generation)
        };
        let generation = self
            .keepers
            .values()
            .filter(|keeper| keeper.is_alive)
            .filter_map(newest)
            .max();
        let Some(generation) = generation else {
            return;
        };
        let id = SnapshotId { generation, step };
        for address in addresses {
            let keeper = self.keepers.get_mut(&address).expect("it is there");
            let last = keeper.memberships.last().cloned();
            let Some((topology, node)) =
                last.filter(|(topology, _)| topology.generation == generation)
            else {
                continue;
            };
            let works = keeper.is_alive && !keeper.is_hung;
            let Some(subscriber) = keeper.subscriber.filter(|_| works) else {
                continue;
            };
            let ranks = topology.nodes[node].ranks.clone();
            let mut events = Vec::new();
            for rank in ranks {
                let part = PartInfo {
                    rank,
                    bytes: 1,
                    digest: ChecksumDigest::of(&[0]),
                };
                keeper.parts.insert((id, rank), part);
                events.push(keeper::Event::Complete { id, part, durable });
            }
            keeper.protected.insert(id);
            events.push(keeper::Event::Protected { id });
            let status = |rank: &usize| RankStatus {
                rank: *rank,
                pid: 1,
                step,
                progress: step,
                silent_ms: 0,
            };
            let ranks = topology.nodes[node].ranks.iter().map(status).collect();
            events.push(keeper::Event::Heartbeat { ranks });
            for event in events {
                let keeper = subscriber;
                self.later(ROUND_TRIP, Event::Keeper { keeper, event });
            }
        }
    }

    /// Returns the newest step that the memory of keepers within reach can still give.
    pub(super) fn newest_in_memory(&self) -> Option<u64> {
        let keepers = self.keepers.values();
        let is_back = |keeper: &SimKeeper| {
            // Its answers may come too late: the launcher may just have given it up.
            let continued = keeper.continued_at;
            continued.is_none_or(|at| self.now > at + 2 * ROUND_TRIP)
        };
        let alive = keepers
            .filter(|keeper| keeper.is_alive && self.is_within_reach(keeper) && is_back(keeper));
        let inventories: Vec<Inventory> = alive.map(SimKeeper::inventory).collect();
        let found = candidates(&inventories);
        found.first().map(|candidate| candidate.snapshot.id.step)
    }

    /// Returns the newest step that is not lost.
    pub(super) fn preserved(&self) -> Option<u64> {
        let on_disk = self.checkpoints.last().copied();
        on_disk.max(self.newest_in_memory())
    }

    pub(super) fn has_keepers(&self) -> bool {
        !self.live_keepers().is_empty()
    }

    pub(super) fn live_keepers(&self) -> BTreeSet<SocketAddr> {
        let live = self.keepers.iter().filter(|(_, keeper)| keeper.is_alive);
        live.map(|(&address, _)| address).collect()
    }
}

impl SimKeeper {
    fn inventory(&self) -> Inventory {
        Inventory {
            identity: Identity::default(),
            memberships: self.memberships.clone(),
            parts: self
                .parts
                .iter()
                .map(|((id, _), part)| (*id, *part))
                .collect(),
            protected: self.protected.iter().copied().collect(),
            complete: self.complete.values().cloned().collect(),
        }
    }

    /// Keeps the two newest complete snapshots, and the pinned one.
    fn commit(&mut self, snapshot: Snapshot) {
        let newest = snapshot.id;
        self.complete.insert(newest, snapshot);
        let kept: BTreeSet<SnapshotId> = self.complete.keys().rev().take(2).copied().collect();
        let pinned = self.pinned;
        let is_kept = |id: SnapshotId| kept.contains(&id) || Some(id) == pinned || id > newest;
        self.complete.retain(|id, _| is_kept(*id));
        self.parts.retain(|(id, _), _| is_kept(*id));
        self.protected.retain(|id| is_kept(*id));
    }
}

fn saved(step: u64) -> SavedCheckpoint {
    SavedCheckpoint {
        step,
        path: PathBuf::from(format!("run/checkpoints/step-{step:08}")),
    }
}
