//! Supervises a run: starts keepers and ranks, and restarts them after failures.

use super::{
    attempt::{Attempt, AttemptOutcome, AttemptParts},
    checkpoint_writer::CheckpointWriter,
    failure::Failure,
    keepers::Keepers,
    lost_nodes::{Continuation, Nodes, plan_continuation},
    machines::{Machines, PlacedRank},
    policy::{History, Verdict},
    recovery::{Restored, find_candidates, recover},
    rescue::rescue,
    restart_record::RestartRecord,
    signals::Signals,
};
use crate::{
    hint::{self, hinted},
    protocol::Assignment,
    registry::KeeperRegistry,
};
use anyhow::{Result, anyhow};
use checkpoint::{
    Redundancy,
    keeper::{DEFAULT_CHUNK_BYTES, Node, Topology},
};
use parallel::StoreAccess;
use std::{fs::File, io::Write, net::SocketAddr, path::Path, process::ExitCode, time::Instant};
use trainer::{KeeperAccess, config::Config};

/// Values that do not change during a run.
pub(super) struct RunSettings<'a> {
    pub(super) config: &'a Config,
    pub(super) dir: &'a Path,
    /// Port at which the launcher serves the ranks' store.
    pub(super) store: StoreAccess,
    pub(super) ranks_per_machine: usize,
    pub(super) spare_nodes: usize,
}

pub(super) struct Supervisor<'a> {
    settings: RunSettings<'a>,
    machines: Machines<'a>,
    /// The current number of ranks.
    world_size: usize,
    /// None in a run without snapshots.
    keepers: Option<Keepers>,
    generation: u64,
    history: History,
    writer: CheckpointWriter,
    started: Instant,
}

impl<'a> Supervisor<'a> {
    pub(super) fn new(
        settings: RunSettings<'a>,
        world_size: usize,
        machines: Machines<'a>,
    ) -> Supervisor<'a> {
        let checkpoints = settings.dir.join("checkpoints");
        let writer = CheckpointWriter::new(&checkpoints, settings.config.checkpoint.keep);
        Supervisor {
            settings,
            machines,
            world_size,
            keepers: None,
            generation: 0,
            history: History::default(),
            writer,
            started: Instant::now(),
        }
    }

    pub(super) fn run(mut self, signals: &Signals) -> Result<ExitCode> {
        let all_machines: Vec<usize> = (0..self.machines.count()).collect();
        self.machines.wait_for(&all_machines)?;
        let mut restored = self.begin()?;
        loop {
            let mut attempt = self.start_attempt(&restored, signals)?;
            let failure = match attempt.watch() {
                AttemptOutcome::Done => {
                    attempt.finish()?;
                    let status = signals.exit_status();
                    self.machines.end(status);
                    return Ok(ExitCode::from(status));
                }
                AttemptOutcome::Killed => {
                    return Err(self.give_up(hinted(
                        anyhow!("stopped without a checkpoint of the last step"),
                        "run the same command to resume from the newest checkpoint",
                    )));
                }
                AttemptOutcome::Failed(failure) => failure,
            };
            let step = attempt.step().max(restored.step().unwrap_or(0));
            if signals.count() > 0 {
                // A run that is to stop does not restart.
                return Err(self.give_up(failure.into_error()));
            }
            self.machines.kill();
            match self.decide(&failure, step) {
                Verdict::GiveUp(reason) => {
                    let error = failure.into_error();
                    return Err(self.give_up(match reason {
                        Some(reason) => error.context(reason),
                        None => error,
                    }));
                }
                Verdict::Restart { older, skipped } => {
                    restored = self.recover(older)?;
                    self.record_restart(&failure, step, &restored, skipped);
                    let skipped = match skipped {
                        Some(step) => format!("; skipping the batch of step {step}"),
                        None => String::new(),
                    };
                    eprintln!("{}; {}{skipped}", failure.brief(), restored.message);
                }
            }
        }
    }

    /// Starts keepers, or takes over those of an earlier launcher. Returns the state to start from.
    fn begin(&mut self) -> Result<Restored> {
        let config = self.settings.config;
        if let Some(restored) = self.take_over()? {
            return Ok(restored);
        }
        if config.takes_snapshots() {
            let nodes = config.nodes(self.world_size).len();
            let machines = self.keeper_machines(nodes);
            let dir = self.settings.dir;
            let keepers = Keepers::start(dir, config, nodes, &machines, &mut self.machines)?;
            self.keepers = Some(keepers);
        }
        Ok(Restored::default())
    }

    /// Resumes from the memory of an earlier launcher's keepers, if it fits this run. Otherwise
    /// writes it to a checkpoint and stops them.
    fn take_over(&mut self) -> Result<Option<Restored>> {
        let RunSettings { config, dir, .. } = self.settings;
        let Some(registry) = KeeperRegistry::load(dir)? else {
            return Ok(None);
        };
        let generation = registry.generation;
        let skipped_batches = registry.skipped_batches.clone();
        let Some(mut keepers) = Keepers::take_over(dir, config, registry) else {
            return Ok(None);
        };
        self.generation = generation;
        self.history.skipped_batches = skipped_batches;
        let nodes = config.nodes(self.world_size).len();
        let fits = config.takes_snapshots() && keepers.nodes == nodes;
        let newest = find_candidates(&mut keepers).newest();
        let is_unfinished = newest.is_some_and(|id| id.step < config.train.steps);
        self.keepers = Some(keepers);
        if fits && is_unfinished {
            self.replace_lost_nodes()?;
            let restored = self.recover(0)?;
            eprintln!("found keepers of an earlier launcher; {}", restored.message);
            return Ok(Some(restored));
        }
        if let Some(step) = self.rescue()? {
            eprintln!(
                "keepers of an earlier launcher had step {step} in memory; wrote it to a checkpoint"
            );
        }
        Ok(None)
    }

    /// Returns the machine of each node's keeper and of each spare one.
    ///
    /// Spare keepers are on the machines after those with ranks, if there are any.
    fn keeper_machines(&self, nodes: usize) -> Vec<usize> {
        let ranks_per_node = self.world_size.div_ceil(nodes);
        let ranks_per_machine = self.settings.ranks_per_machine;
        let last = self.machines.count() - 1;
        let machine_of = |node: usize| (node * ranks_per_node / ranks_per_machine).min(last);
        let keepers = 0..nodes + self.settings.spare_nodes;
        keepers.map(machine_of).collect()
    }

    /// Starts the ranks of the next generation.
    fn start_attempt<'s>(
        &'s mut self,
        restored: &Restored,
        signals: &'s Signals,
    ) -> Result<Attempt<'s, 'a>> {
        self.generation += u64::from(self.keepers.is_some());
        let topology = self.topology();
        if let Some(keepers) = &mut self.keepers {
            keepers.begin_generation(&topology, &self.history.skipped_batches)?;
        }
        let machines = self.rank_machines(&topology);
        // A lost machine may have come back.
        self.machines.wait_for(&machines)?;
        let place = |rank: usize| PlacedRank {
            machine: machines[rank],
            assignment: self.assignment(rank, &machines, &topology, restored),
        };
        let ranks = (0..self.world_size).map(place).collect();
        self.machines.start(ranks)?;
        let parts = AttemptParts {
            config: self.settings.config,
            dir: self.settings.dir,
            machines: &mut self.machines,
            keepers: &mut self.keepers,
            writer: &mut self.writer,
            signals,
        };
        Ok(Attempt::new(parts, topology))
    }

    fn topology(&self) -> Topology {
        let config = self.settings.config;
        let nodes = config.nodes(self.world_size);
        let (redundancy, groups) = config.protection(nodes.len()).unwrap_or_else(|reason| {
            eprintln!("warning: snapshots do not survive the loss of a node: {reason}");
            let alone = (0..nodes.len()).map(|node| vec![node]);
            (Redundancy::None, alone.collect())
        });
        let addresses = match &self.keepers {
            Some(keepers) => keepers.addresses(),
            None => vec![SocketAddr::from(([0, 0, 0, 0], 0)); nodes.len()],
        };
        let nodes = nodes.into_iter().zip(addresses);
        let nodes = nodes.map(|(ranks, address)| Node { address, ranks });
        Topology {
            generation: self.generation,
            nodes: nodes.collect(),
            redundancy,
            groups,
            chunk_bytes: DEFAULT_CHUNK_BYTES,
        }
    }

    /// Returns the machine of each rank: that of its keeper, if there is one.
    fn rank_machines(&self, topology: &Topology) -> Vec<usize> {
        let machine_of = |rank: usize| match (&self.keepers, topology.node_of(rank)) {
            (Some(keepers), Some(node)) => keepers.members[node].keeper.machine,
            _ => rank / self.settings.ranks_per_machine,
        };
        (0..self.world_size).map(machine_of).collect()
    }

    fn assignment(
        &self,
        rank: usize,
        machines: &[usize],
        topology: &Topology,
        restored: &Restored,
    ) -> Assignment {
        let machine = machines[rank];
        let on_same_machine = |ranks: &[usize]| {
            let same = ranks.iter().filter(|&&other| other == machine);
            same.count()
        };
        let keeper = self.keepers.as_ref().zip(topology.node_of(rank));
        let keeper = keeper.map(|(keepers, node)| KeeperAccess {
            socket: keepers.members[node].keeper.socket.clone(),
            secret: keepers.secret().clone(),
            generation: self.generation,
            chunk: DEFAULT_CHUNK_BYTES,
            restore: restored.snapshot.map(|made| (made.id, made.ranks)),
        });
        Assignment {
            rank,
            world_size: self.world_size,
            local_rank: on_same_machine(&machines[..rank]),
            local_world_size: on_same_machine(machines),
            store: self.settings.store.clone(),
            address: self.machines.address(machine),
            generation: self.generation,
            keeper,
            skipped_batches: self.history.skipped_batches.clone(),
        }
    }

    fn decide(&mut self, failure: &Failure, step: u64) -> Verdict {
        if self.keepers.is_none() {
            return Verdict::GiveUp(None);
        }
        let now = self.started.elapsed().as_secs_f64();
        let config = &self.settings.config.restart;
        self.history.decide(&failure.cause, step, now, config)
    }

    /// Appends a line to `restarts.jsonl`. Best effort: failure only warns.
    fn record_restart(
        &self,
        failure: &Failure,
        step: u64,
        restored: &Restored,
        skipped: Option<u64>,
    ) {
        let record = RestartRecord {
            generation: self.generation + 1,
            failure: failure.brief(),
            steps_done: step,
            snapshot_step: restored.step(),
            resumed_from: &restored.message,
            skipped_step: skipped,
        };
        let line = serde_json::to_string(&record).expect("plain data");
        let path = self.settings.dir.join("restarts.jsonl");
        let file = File::options().create(true).append(true).open(path);
        if let Err(error) = file.and_then(|mut file| writeln!(file, "{line}")) {
            tracing::warn!("cannot write restarts.jsonl: {error}");
        }
    }

    /// Replaces lost nodes or takes them out of the run. Returns the state to resume from.
    fn recover(&mut self, older: usize) -> Result<Restored> {
        let lost = self.replace_lost_nodes()?;
        let Some(keepers) = &mut self.keepers else {
            return Ok(Restored::default());
        };
        let mut restored = recover(keepers, older, self.writer.root());
        if let Some(lost) = lost {
            restored.message = format!("{lost}; {}", restored.message);
        }
        Ok(restored)
    }

    /// Returns a description of the lost nodes and their replacement, if there are any.
    fn replace_lost_nodes(&mut self) -> Result<Option<String>> {
        let Some(keepers) = &mut self.keepers else {
            return Ok(None);
        };
        let nodes = 0..keepers.nodes;
        let lost: Vec<usize> = nodes.filter(|&node| !keepers.is_alive(node)).collect();
        let Some((first, others)) = lost.split_first() else {
            return Ok(None);
        };
        let mut names = format!(
            "lost node{} {first}",
            if others.is_empty() { "" } else { "s" }
        );
        for node in others {
            names += &format!(", {node}");
        }
        let nodes = Nodes {
            world_size: self.world_size,
            count: keepers.nodes,
            spares: keepers.members.len() - keepers.nodes,
            lost: &lost,
        };
        let how = match plan_continuation(self.settings.config, &nodes) {
            Continuation::Shrink {
                world_size,
                nodes,
                has_idle,
            } => {
                keepers.remove(&lost, &self.machines);
                // Keepers without ranks still hold their snapshots.
                keepers.nodes = nodes;
                self.world_size = world_size;
                let idle = if has_idle { " (others idle)" } else { "" };
                format!("continuing with {world_size} ranks{idle} and the same global batch")
            }
            Continuation::Replace => {
                let mut spares_used = 0;
                for &node in &lost {
                    let is_spare = keepers.replace(node, &mut self.machines)?;
                    spares_used += usize::from(is_spare);
                }
                match spares_used {
                    0 => "ranks restart in place".into(),
                    1 => "1 spare node took over".into(),
                    _ => format!("{spares_used} spare nodes took over"),
                }
            }
        };
        Ok(Some(format!("{names}: {how}")))
    }

    fn rescue(&mut self) -> Result<Option<u64>> {
        match self.keepers.take() {
            Some(keepers) => rescue(keepers, &mut self.writer),
            None => Ok(None),
        }
    }

    /// Kills all ranks and saves what is only in memory. Returns the error to exit with.
    fn give_up(&mut self, error: anyhow::Error) -> anyhow::Error {
        self.machines.kill_all();
        match self.rescue() {
            Ok(None) => {}
            Ok(Some(step)) => eprintln!("wrote the state of step {step} to a checkpoint"),
            Err(error) => eprintln!("warning: {}", hint::message(&error)),
        }
        error
    }
}
