//! Starts one process for each rank and a keeper for each node, on one machine or several, watches them, and goes on after a
//! failure.

mod agent;
mod assignment;
mod checkpoint_writer;
mod hostfile;
mod keepers;
mod machines;
mod policy;
mod processes;
mod recovery;
mod spawn;
mod tracker;

pub(crate) use assignment::Assignment;

use crate::cli::TrainArgs;
use crate::config_file;
use crate::rank::FailureKind;
use crate::registry::{self, KeeperRegistry};
use anyhow::{Context, Result, anyhow, bail};
use checkpoint::Redundancy;
use checkpoint::keeper::{DEFAULT_CHUNK_BYTES, Node, Topology};
use checkpoint_writer::CheckpointWriter;
use hostfile::Hostfile;
use keepers::{KeeperMessage, Keepers};
use machines::Machines;
use nix::sys::signal::Signal;
use policy::{Cause, History, Verdict};
use processes::{FailedRank, RankProcesses, first_cause};
use recovery::{Restored, find_candidates, recover};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io::Write;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use torch_ext::Store;
use tracker::{Action, Tracker};
use trainer::KeeperAccess;
use trainer::config::{Config, WithoutSpare};

/// How often children are looked at.
const TICK: Duration = Duration::from_millis(20);
/// After one rank failed, the others may be about to say that they failed first.
const SETTLE_TIME: Duration = Duration::from_millis(400);

pub(crate) fn run(args: &TrainArgs) -> Result<ExitCode> {
    let hosts = args.hostfile.as_deref().map(Hostfile::read).transpose()?;
    let (machines, per_machine) = match &hosts {
        Some(hosts) => (
            hosts.names.len(),
            hosts.slots.unwrap_or(args.nproc_per_node),
        ),
        None => (args.nnodes, args.nproc_per_node),
    };
    if args.node_rank >= machines {
        bail!(
            "--node-rank {} is not below --nnodes {machines}",
            args.node_rank
        );
    }
    let rdzv = match (&args.rdzv, &hosts) {
        (Some(rdzv), _) => rdzv.clone(),
        (None, Some(hosts)) => format!("{}:0", hosts.names[0]),
        (None, None) if machines > 1 => bail!(
            "--nnodes {machines} needs --rdzv HOST:PORT: the machine with --node-rank 0 and a free port there, the same on all"
        ),
        (None, None) => String::new(),
    };
    if args.node_rank > 0 {
        return agent::run(args, args.node_rank, &rdzv);
    }
    // Of several machines the last ones may stand by.
    let spare_machines = if machines > 1 { args.spare_nodes } else { 0 };
    if spare_machines >= machines {
        bail!("--spare-nodes {spare_machines} leaves none of {machines} machines to train on");
    }
    let size = per_machine * (machines - spare_machines);
    let mut config = config_file::load(&args.config)?;
    if machines > 1 {
        let per_node = *config.parallel.ranks_per_node.get_or_insert(per_machine);
        if per_machine % per_node != 0 || (spare_machines > 0 && per_node != per_machine) {
            bail!(
                "parallel.ranks_per_node is {per_node}, and machines of {per_machine} ranks are not made of such nodes"
            );
        }
    }
    config_file::refuse_problems(&args.config, &config, size)?;
    let dir = config.run.dir.clone();
    let logs = dir.join("logs");
    std::fs::create_dir_all(&logs)
        .with_context(|| format!("cannot make the run's folder {}", logs.display()))?;
    let _lock = registry::lock(&dir)?;
    let store =
        Store::tcp("127.0.0.1", args.master_port, true, Duration::from_secs(10)).map_err(|e| {
            anyhow!(
                "cannot serve on port {}: {e}; choose another with --master-port, or leave it out",
                args.master_port
            )
        })?;
    let signals = Signals::install()?;
    let alone = Machines::local(RankProcesses::new(args, &dir), &dir, signals.count.clone());
    let mut _sessions = None;
    let fleet = match machines {
        1 => alone,
        _ => {
            let timeout = Duration::from_secs(config.run.timeout_s);
            let at = resolve(&rdzv)?;
            let (fleet, at) = Machines::listen(alone, at, machines - 1, per_machine, timeout)?;
            if let Some(hosts) = &hosts {
                let head = format!(
                    "{}:{}",
                    rdzv.rsplit_once(':').map_or("", |(host, _)| host),
                    at.port()
                );
                _sessions = Some(hosts.start_agents(args, &head, per_machine)?);
            }
            fleet
        }
    };
    Launcher::new(
        args,
        &config,
        &dir,
        (store.port()?, size, per_machine),
        fleet,
    )
    .run(&signals)
}

/// An address of `HOST:PORT`.
fn resolve(text: &str) -> Result<SocketAddr> {
    let mut found = text
        .to_socket_addrs()
        .map_err(|e| anyhow!("--rdzv {text}: {e}; it has the form HOST:PORT"))?;
    found
        .next()
        .ok_or_else(|| anyhow!("--rdzv {text}: that host has no address"))
}

/// Signals that a person or a scheduler sent, counted.
struct Signals {
    count: Arc<AtomicUsize>,
    last: Arc<AtomicUsize>,
}

impl Signals {
    fn install() -> Result<Signals> {
        let signals = Signals {
            count: Arc::default(),
            last: Arc::default(),
        };
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let count = signals.count.clone();
            let last = signals.last.clone();
            std::thread::spawn({
                let mut iterator = signal_hook::iterator::Signals::new([signal])
                    .context("cannot handle signals")?;
                move || {
                    for signal in iterator.forever() {
                        last.store(signal as usize, Ordering::SeqCst);
                        count.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
        }
        Ok(signals)
    }

    fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    fn last(&self) -> usize {
        self.last.load(Ordering::SeqCst)
    }
}

/// How one attempt ended.
enum AttemptOutcome {
    Done,
    /// By a second signal, or because ranks did not stop in time after the first.
    Killed,
    Failed(Failure),
}

/// What failed, for people and for the policy.
struct Failure {
    cause: Cause,
    /// A line for the terminal.
    brief: String,
    /// With the path of the log.
    full: String,
}

struct Launcher<'a> {
    args: &'a TrainArgs,
    config: &'a Config,
    dir: &'a Path,
    checkpoints: PathBuf,
    port: u16,
    machines: Machines<'a>,
    /// Ranks of a machine.
    per_machine: usize,
    /// How many ranks there are now.
    size: usize,
    keepers: Option<Keepers>,
    registry: Option<KeeperRegistry>,
    generation: u64,
    history: History,
    checkpoint_writer: CheckpointWriter,
    started: Instant,
    /// Why the last checkpoint that was tried could not be written.
    checkpoint_error: Option<anyhow::Error>,
    standby_started: bool,
}

impl<'a> Launcher<'a> {
    fn new(
        args: &'a TrainArgs,
        config: &'a Config,
        dir: &'a Path,
        (port, size, per_machine): (u16, usize, usize),
        machines: Machines<'a>,
    ) -> Launcher<'a> {
        let checkpoints = dir.join("checkpoints");
        Launcher {
            args,
            config,
            dir,
            port,
            machines,
            per_machine,
            size,
            keepers: None,
            registry: None,
            generation: 0,
            history: History::default(),
            checkpoint_writer: CheckpointWriter::new(&checkpoints, config.checkpoint.keep),
            checkpoints,
            started: Instant::now(),
            checkpoint_error: None,
            standby_started: false,
        }
    }

    fn run(mut self, signals: &Signals) -> Result<ExitCode> {
        let all: Vec<usize> = (0..self.machines.count()).collect();
        self.machines.wait_for(&all)?;
        let mut restored = self.begin()?;
        loop {
            let mut tracker = self.begin_generation(&restored)?;
            let end = self.watch(&mut tracker, signals);
            match end {
                AttemptOutcome::Done => {
                    self.finish(&mut tracker, signals)?;
                    let interrupted = signals.count() > 0;
                    let code = if interrupted {
                        128 + signals.last() as u8
                    } else {
                        0
                    };
                    self.machines.end(code);
                    return Ok(ExitCode::from(code));
                }
                AttemptOutcome::Killed => {
                    self.machines.kill_all();
                    let rescue_message = self.rescue_message();
                    return Err(anyhow!(
                        "{rescue_message}stopped without a checkpoint of this moment; the same command goes on from the last one"
                    ));
                }
                // It was to stop: nothing is started again.
                AttemptOutcome::Failed(failure) if signals.count() > 0 => {
                    self.machines.kill_all();
                    let rescue_message = self.rescue_message();
                    return Err(anyhow!("{rescue_message}{}", failure.full));
                }
                AttemptOutcome::Failed(failure) => {
                    self.machines.kill();
                    let now = self.started.elapsed().as_secs_f64();
                    let done = tracker
                        .step
                        .max(restored.snapshot.map_or(0, |(id, _)| id.step));
                    let verdict = match self.keepers {
                        Some(_) => {
                            self.history
                                .decide(&failure.cause, done, now, &self.config.restart)
                        }
                        None => Verdict::GiveUp(String::new()),
                    };
                    match verdict {
                        Verdict::GiveUp(why) => {
                            self.machines.kill_all();
                            let rescue_message = self.rescue_message();
                            let why = if why.is_empty() {
                                why
                            } else {
                                format!("{why}\n")
                            };
                            return Err(anyhow!("{why}{rescue_message}{}", failure.full));
                        }
                        Verdict::Restart { older, skipped } => {
                            restored = self.recover(older)?;
                            self.record_restart(&failure, done, &restored, skipped);
                            let skipped = skipped.map_or(String::new(), |step| {
                                format!("; the batch of step {step} is left out")
                            });
                            eprintln!("{}; {}{skipped}", failure.brief, restored.message);
                        }
                    }
                }
            }
        }
    }

    /// Starts keepers, or takes those over that an earlier launcher left: what to begin with.
    fn begin(&mut self) -> Result<Restored> {
        let nothing = Restored {
            snapshot: None,
            message: String::new(),
        };
        let left = match KeeperRegistry::load(self.dir)? {
            Some(registry) => Keepers::take_over(self.dir, self.config, &registry)?
                .map(|keepers| (registry, keepers)),
            None => None,
        };
        let nodes = self.config.nodes(self.size).len();
        if let Some((registry, keepers)) = left {
            self.generation = registry.generation;
            self.history.skipped_batches = registry.skipped_batches.clone();
            let same = self.config.takes_snapshots() && keepers.nodes == nodes;
            self.keepers = Some(keepers);
            let newest = self
                .keepers
                .as_mut()
                .and_then(|keepers| find_candidates(keepers).0.first().map(|c| c.snapshot.id));
            if same && newest.is_some_and(|id| id.step < self.config.train.steps) {
                self.registry = Some(registry);
                self.replace_lost_nodes()?;
                let restored = self.recover(0)?;
                eprintln!(
                    "keepers of an earlier launcher are still there; {}",
                    restored.message
                );
                return Ok(restored);
            }
            // Another number of nodes, or the run was at its end: by way of the disk.
            if let Some(step) = self.rescue()? {
                eprintln!(
                    "keepers of an earlier launcher had step {step} in memory: it is a checkpoint now"
                );
            }
        }
        if self.config.takes_snapshots() {
            let spares = self.args.spare_nodes;
            // Spare ones are on the machines after those with ranks, where there are any.
            let per_node = self.size.div_ceil(nodes);
            let last = self.machines.count() - 1;
            let machine_of = |node: usize| (node * per_node / self.per_machine).min(last);
            let keepers = Keepers::start(
                self.dir,
                self.config,
                (nodes, spares),
                &mut self.machines,
                machine_of,
            )?;
            self.registry = Some(KeeperRegistry::new(keepers.secret()));
            self.keepers = Some(keepers);
        }
        Ok(nothing)
    }

    /// Starts the ranks of another attempt.
    fn begin_generation(&mut self, restored: &Restored) -> Result<Tracker> {
        self.generation += u64::from(self.keepers.is_some());
        let nodes = self.config.nodes(self.size);
        let (redundancy, groups) = self
            .config
            .protection(nodes.len())
            .unwrap_or_else(|reason| {
                eprintln!("warning: {reason}: snapshots survive no loss of a node");
                (
                    Redundancy::None,
                    (0..nodes.len()).map(|node| vec![node]).collect(),
                )
            });
        let addresses = self.keepers.as_ref().map(Keepers::addresses);
        let address = |node: usize| {
            addresses
                .as_ref()
                .map_or(([0, 0, 0, 0], 0).into(), |addresses| addresses[node])
        };
        let nodes = nodes.into_iter().enumerate().map(|(node, ranks)| Node {
            address: address(node),
            ranks,
        });
        let topology = Topology {
            generation: self.generation,
            nodes: nodes.collect(),
            redundancy,
            groups,
            chunk_bytes: DEFAULT_CHUNK_BYTES,
        };
        if let (Some(keepers), Some(registry)) = (&mut self.keepers, &mut self.registry) {
            registry.generation = self.generation;
            registry.skipped_batches = self.history.skipped_batches.clone();
            keepers.save(registry)?;
            keepers.set_up(&topology);
        }
        let machine_of = |rank: usize| match self.keepers.as_ref().zip(topology.node_of(rank)) {
            Some((keepers, node)) => keepers.members[node].keeper.machine,
            None => rank / self.per_machine,
        };
        let places: Vec<usize> = (0..self.size).map(machine_of).collect();
        // A machine that was lost may have come back.
        self.machines.wait_for(&places)?;
        let assignments = places.iter().enumerate().map(|(rank, &machine)| {
            let neighbours = |ranks: std::ops::Range<usize>| {
                ranks.filter(|&other| places[other] == machine).count()
            };
            let assignment =
                Assignment {
                    rank,
                    world_size: self.size,
                    local_rank: neighbours(0..rank),
                    local_world_size: neighbours(0..self.size),
                    host: self
                        .machines
                        .address(0)
                        .map_or("127.0.0.1".into(), |address| address.to_string()),
                    port: self.port,
                    address: self.machines.address(machine),
                    generation: self.generation,
                    keeper: self.keepers.as_ref().zip(topology.node_of(rank)).map(
                        |(keepers, node)| KeeperAccess {
                            socket: keepers.members[node].keeper.socket.clone(),
                            secret: keepers.secret().clone(),
                            generation: self.generation,
                            chunk: DEFAULT_CHUNK_BYTES,
                            restore: restored.snapshot,
                        },
                    ),
                    skipped_batches: self.history.skipped_batches.clone(),
                };
            (machine, assignment)
        });
        let assignments = assignments.collect();
        self.machines.start(assignments)?;
        self.standby_started = false;
        Ok(Tracker::new(topology))
    }

    fn watch(&mut self, tracker: &mut Tracker, signals: &Signals) -> AttemptOutcome {
        let timeout = Duration::from_secs(self.config.run.timeout_s);
        let mut asked: Option<Instant> = None;
        loop {
            let failed = self.machines.failed();
            if !failed.is_empty() {
                return AttemptOutcome::Failed(self.explain(failed));
            }
            if self.machines.running() == 0 {
                return AttemptOutcome::Done;
            }
            match asked {
                None if signals.count() > 0 => {
                    eprintln!(
                        "stopping after this step, with a checkpoint; a second signal stops at once"
                    );
                    self.machines.signal(Signal::SIGTERM);
                    asked = Some(Instant::now());
                }
                Some(since) if signals.count() > 1 || since.elapsed() > timeout => {
                    return AttemptOutcome::Killed;
                }
                _ => {}
            }
            self.listen(tracker);
            if let Some(failure) = self.hung(tracker) {
                return AttemptOutcome::Failed(failure);
            }
            // When the ranks are at work: before, they need the processors themselves.
            if !self.standby_started
                && self.config.restart.standby
                && self.keepers.is_some()
                && tracker.step > 0
            {
                self.standby_started = true;
                self.machines.stand_by();
            }
        }
    }

    /// Sleeps for one tick and hears what keepers have had to say.
    fn listen(&mut self, tracker: &mut Tracker) {
        // Not in the channel's own wait, which spins for a while first: the processors are the ranks'.
        std::thread::sleep(TICK);
        let Some(keepers) = &mut self.keepers else {
            return;
        };
        while let Ok((number, heard)) = keepers.messages.try_recv() {
            let Some(place) = keepers.index_of(number) else {
                continue;
            };
            match heard {
                KeeperMessage::Event(event) => match tracker.on_event(place, event) {
                    Action::Commit(snapshot, durable) => {
                        keepers.ask_all(|peer| peer.commit(&snapshot));
                        if durable {
                            self.checkpoint_writer.request(snapshot.id);
                        }
                        // Before a newer one is complete, which may have been told already.
                        self.checkpoint_writer
                            .begin(keepers, snapshot.id, &tracker.rank_nodes());
                    }
                    Action::Abandon(id, reason) => {
                        tracing::warn!("the snapshot of step {} was given up: {reason}", id.step);
                        keepers.ask_all(|peer| peer.abandon(id));
                    }
                    Action::Nothing => {}
                },
                KeeperMessage::Gone(reason) => {
                    self.replace_keeper(tracker, place, &reason);
                    return;
                }
            }
        }
        if let Some(id) = tracker.take_expired() {
            keepers.ask_all(|peer| peer.abandon(id));
        }
        if let Some((step, written)) = self.checkpoint_writer.take_finished(keepers) {
            match written {
                Ok(path) => tracing::info!("checkpoint {}", path.display()),
                Err(error) => {
                    self.checkpoint_error =
                        Some(anyhow!("no checkpoint at step {step}: {error:#}"));
                    if step < self.config.train.steps && self.machines.running() > 0 {
                        eprintln!(
                            "warning: no checkpoint at step {step}: {error:#}; training goes on"
                        );
                    }
                }
            }
        }
        if let Some(newest) = tracker.newest {
            self.checkpoint_writer
                .begin(keepers, newest, &tracker.rank_nodes());
        }
    }

    /// A keeper is gone. If its ranks live, another takes its place and training goes on; otherwise the node is lost, which the
    /// ranks' end will tell.
    fn replace_keeper(&mut self, tracker: &mut Tracker, place: usize, reason: &str) {
        // A process with much memory ends some time after it was killed.
        let heard = Instant::now();
        let ends =
            |machines: &mut Machines| !machines.failed().is_empty() || machines.running() == 0;
        while !ends(&mut self.machines) && heard.elapsed() < SETTLE_TIME {
            std::thread::sleep(SETTLE_TIME / 40);
        }
        let Some(keepers) = &mut self.keepers else {
            return;
        };
        keepers.mark_lost(place);
        if ends(&mut self.machines) {
            return;
        }
        eprintln!(
            "warning: the keeper of node {place} is gone ({reason}); another is started, and training goes on"
        );
        let given_up = tracker.give_up();
        let replaced = keepers.restart(place, &mut self.machines).and_then(|()| {
            tracker
                .topology
                .nodes
                .iter_mut()
                .zip(keepers.addresses())
                .for_each(|(node, address)| node.address = address);
            given_up
                .iter()
                .for_each(|&id| keepers.ask_all(|peer| peer.abandon(id)));
            keepers.set_up(&tracker.topology);
            self.registry
                .as_mut()
                .map_or(Ok(()), |registry| keepers.save(registry))
        });
        if let Err(error) = replaced {
            eprintln!("warning: {error:#}; there are no snapshots on node {place}");
        }
    }

    fn hung(&self, tracker: &Tracker) -> Option<Failure> {
        let silence = Duration::from_secs_f64(self.config.restart.heartbeat_timeout_s);
        let brief = if let Some(rank) = tracker.hung(silence) {
            format!(
                "rank {rank} failed: it hangs (no sign of life for {:.1} s)",
                silence.as_secs_f64()
            )
        } else if let Some(still) = tracker.stuck(self.config.restart.step_timeout_s) {
            format!(
                "the run hangs: no rank got on for {:.0} s after step {}",
                still.as_secs_f64(),
                tracker.step
            )
        } else {
            return None;
        };
        Some(Failure {
            cause: Cause::Transient,
            full: brief.clone(),
            brief,
        })
    }

    /// The failure that came first.
    fn explain(&mut self, mut failed: Vec<FailedRank>) -> Failure {
        // A rank that was killed is the reason; ranks that failed by themselves may not have been the first.
        if !failed.iter().any(|failed| failed.signal().is_some()) {
            std::thread::sleep(SETTLE_TIME);
            failed = self.machines.failed();
        }
        let Some(first) = first_cause(&failed) else {
            let brief = "a rank failed without a word".to_string();
            return Failure {
                cause: Cause::Transient,
                full: brief.clone(),
                brief,
            };
        };
        let kind = first.report.as_ref().map(|report| report.kind.clone());
        let cause = match kind.filter(|_| first.signal().is_none()) {
            Some(FailureKind::Diverged { step }) => Cause::Diverged { step },
            Some(FailureKind::Own { steps: 0 }) => Cause::Permanent,
            _ => Cause::Transient,
        };
        let reason = first.reason();
        let reason = reason.lines().next().unwrap_or_default();
        Failure {
            cause,
            brief: format!("rank {} failed: {reason}", first.rank),
            full: first.explain(self.dir),
        }
    }

    /// A line of `restarts.jsonl`. It is worth less than the run.
    fn record_restart(
        &self,
        failure: &Failure,
        done: u64,
        restored: &Restored,
        skipped: Option<u64>,
    ) {
        let line = serde_json::json!({
            "generation": self.generation + 1,
            "failure": failure.brief,
            "steps_done": done,
            "snapshot_step": restored.snapshot.map(|(id, _)| id.step),
            "resumed_from": restored.message,
            "skipped_step": skipped,
        });
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("restarts.jsonl"));
        if let Err(error) = file.and_then(|mut file| writeln!(file, "{line}")) {
            tracing::warn!("restarts.jsonl cannot be written: {error}");
        }
    }

    /// Puts keepers where nodes were lost, or takes the nodes out; what ranks go on from.
    fn recover(&mut self, older: usize) -> Result<Restored> {
        let lost = self.replace_lost_nodes()?;
        let Some(keepers) = &mut self.keepers else {
            return Ok(Restored {
                snapshot: None,
                message: String::new(),
            });
        };
        let mut restored = recover(keepers, older, &self.checkpoints);
        if !lost.is_empty() {
            restored.message = format!("{lost}; {}", restored.message);
        }
        Ok(restored)
    }

    /// What became of lost nodes, in words; nothing where none is.
    fn replace_lost_nodes(&mut self) -> Result<String> {
        let Some(keepers) = &mut self.keepers else {
            return Ok(String::new());
        };
        let lost: Vec<usize> = (0..keepers.nodes)
            .filter(|&node| !keepers.is_alive(node))
            .collect();
        if lost.is_empty() {
            return Ok(String::new());
        }
        let names = lost
            .iter()
            .map(usize::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        let spares = keepers.members.len() - keepers.nodes;
        if spares < lost.len() && self.config.restart.without_spare == WithoutSpare::Shrink {
            let left = self.size
                - lost
                    .iter()
                    .map(|&node| self.config.nodes(self.size)[node].len())
                    .sum::<usize>();
            if let Some(size) = largest_layout(self.config, left) {
                let nodes = self.config.nodes(size).len();
                let surplus: Vec<usize> = (0..keepers.nodes)
                    .filter(|node| !lost.contains(node))
                    .skip(nodes)
                    .collect();
                keepers.remove(&lost, &self.machines);
                // Keepers without ranks still have what was in their memory.
                keepers.nodes = nodes;
                self.size = size;
                let spare = if surplus.is_empty() {
                    ""
                } else {
                    ", others idle"
                };
                return Ok(format!(
                    "node {names} is lost: going on with {size} ranks{spare}, the same global batch"
                ));
            }
        }
        let mut by_spare = 0;
        for &node in &lost {
            by_spare += usize::from(keepers.replace(node, &mut self.machines)?);
        }
        let how = match by_spare {
            0 => "its ranks start anew in its place".to_string(),
            _ => format!(
                "{by_spare} spare node{} took over",
                if by_spare == 1 { "" } else { "s" }
            ),
        };
        Ok(format!("node {names} is lost: {how}"))
    }

    /// The ranks are done: what they left is made complete and written.
    ///
    /// # Errors
    /// When it cannot be: it is still in the keepers' memory then.
    fn finish(&mut self, tracker: &mut Tracker, signals: &Signals) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(self.config.run.timeout_s);
        let mut tried = false;
        let asked = signals.count();
        while self.keepers.is_some() {
            self.listen(tracker);
            if signals.count() > asked {
                return Err(anyhow!(
                    "stopped while the last checkpoint was written; the state is still in memory, and the same command goes on"
                ));
            }
            let Some(keepers) = &mut self.keepers else {
                break;
            };
            let newest = find_candidates(keepers)
                .0
                .first()
                .map(|candidate| candidate.snapshot.id);
            let newest = newest.filter(|id| id.generation == self.generation);
            let whole = newest.is_none_or(|id| tracker.newest >= Some(id));
            if !whole && Instant::now() > deadline {
                return Err(anyhow!(
                    "the last snapshot did not become complete; the same command tries again"
                ));
            }
            if !whole || !self.checkpoint_writer.is_idle() {
                // A disk that is slow is waited for.
                continue;
            }
            let on_disk = step_on_disk(&self.checkpoints);
            match newest.filter(|id| on_disk < Some(id.step)) {
                None => break,
                Some(id) if !tried => {
                    tried = true;
                    self.checkpoint_writer.request(id);
                }
                Some(_) => {
                    let why = self
                        .checkpoint_error
                        .take()
                        .unwrap_or_else(|| anyhow!("the last checkpoint was not written"));
                    return Err(anyhow!(
                        "{why:#}\n  the state is still in memory: make room and start the same command again"
                    ));
                }
            }
        }
        if let Some(keepers) = self.keepers.take() {
            if let (Some(_), Some(path)) = (tracker.newest, newest_checkpoint(&self.checkpoints)) {
                eprintln!("checkpoint {}", path.display());
            }
            keepers.stop();
        }
        Ok(())
    }

    /// Nothing that is only in memory is lost when a run is given up: the newest snapshot becomes a checkpoint, unless there
    /// is a newer one. Which step. The keepers are stopped.
    ///
    /// # Errors
    /// When it cannot be written: the keepers stay, and the same command tries again.
    fn rescue(&mut self) -> Result<Option<u64>> {
        let Some(mut keepers) = self.keepers.take() else {
            return Ok(None);
        };
        let newest = find_candidates(&mut keepers)
            .0
            .first()
            .map(|candidate| candidate.snapshot.id);
        let newest = newest.filter(|id| step_on_disk(&self.checkpoints) < Some(id.step));
        let written = match newest {
            Some(_) => self.write_newest(&mut keepers)?,
            None => None,
        };
        keepers.stop();
        Ok(written)
    }

    /// Puts the newest snapshot together and writes it: which step, None where it cannot be put together.
    fn write_newest(&mut self, keepers: &mut Keepers) -> Result<Option<u64>> {
        let Some((id, _)) = recover(keepers, 0, &self.checkpoints).snapshot else {
            return Ok(None);
        };
        let (found, places) = find_candidates(keepers);
        let candidate = found
            .into_iter()
            .find(|candidate| candidate.snapshot.id == id);
        let holders = candidate.and_then(|candidate| {
            candidate
                .holders
                .iter()
                .map(|holder| Some(places[(*holder)?]))
                .collect::<Option<Vec<usize>>>()
        });
        let Some(holders) = holders else {
            return Ok(None);
        };
        self.checkpoint_writer.request(id);
        loop {
            self.checkpoint_writer.begin(keepers, id, &holders);
            match self.checkpoint_writer.take_finished(keepers) {
                None => std::thread::sleep(TICK),
                // One that was under way when the run was given up.
                Some((step, _)) if step != id.step => {}
                Some((step, Ok(_))) => return Ok(Some(step)),
                Some((step, Err(error))) => {
                    return Err(anyhow!(
                        "step {step} is only in memory, and cannot be written: {error:#}\n  make room and start the same \
                         command again"
                    ));
                }
            }
        }
    }

    /// [`Launcher::rescue`] on the way out, in words.
    fn rescue_message(&mut self) -> String {
        match self.rescue() {
            Ok(None) => String::new(),
            Ok(Some(step)) => format!("the state of step {step} was written to a checkpoint\n"),
            Err(error) => format!("{error:#}\n"),
        }
    }
}

fn newest_checkpoint(root: &Path) -> Option<PathBuf> {
    checkpoint::list(root).ok()?.into_iter().next()
}

fn step_on_disk(root: &Path) -> Option<u64> {
    let newest = checkpoint::Checkpoint::open(&newest_checkpoint(root)?).ok()?;
    Some(newest.manifest().step)
}

/// The most ranks, at most `left`, that the configuration can run on.
fn largest_layout(config: &Config, left: usize) -> Option<usize> {
    let mut config = config.clone();
    // How they protect one another is decided anew.
    config.snapshot.redundancy = trainer::config::RedundancyConfig::None;
    (1..=left)
        .rev()
        .find(|&ranks| config.problems(ranks).is_empty())
}
