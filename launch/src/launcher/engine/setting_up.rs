//! Begins a generation: keepers learn their nodes, then ranks start.

use super::{
    Engine, Next, Stage,
    command::{Command, KeeperRequest},
    failure::Failure,
    requests::{Purpose, Recipient},
    running::Running,
    tracker::{Tracker, rank_nodes},
};
use crate::{
    protocol::{AssignedKeeper, Assignment},
    registry::KeeperRegistry,
};
use checkpoint::{
    Redundancy,
    keeper::{Node, Topology},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

#[derive(Debug)]
pub(super) struct SettingUp {
    began: Duration,
    /// None until the generation has begun.
    topology: Option<Topology>,
}

impl SettingUp {
    pub(super) fn new(began: Duration) -> SettingUp {
        SettingUp {
            began,
            topology: None,
        }
    }
}

impl Engine {
    pub(super) fn set_up(&mut self, mut setting_up: SettingUp) -> Next {
        if self.stops.first().is_some() {
            return self.stop_before_the_first_step();
        }
        let Some(topology) = setting_up.topology.take() else {
            setting_up.topology = Some(self.begin_generation());
            return Next::Go(Stage::SettingUp(setting_up));
        };
        if self
            .requests
            .any(|purpose| matches!(purpose, Purpose::SetUp(_)))
        {
            setting_up.topology = Some(topology);
            return Next::Wait(Stage::SettingUp(setting_up));
        }
        if self.has_keepers() {
            let nodes = 0..self.keepers.seats.len();
            let lost = nodes
                .into_iter()
                .find(|&node| self.keepers.ready_keeper(node).is_none());
            if let Some(node) = lost {
                let failure = Failure::transient(format!("the keeper of node {node} is gone"));
                return self.fail(failure);
            }
        }
        let machines = self.rank_machines(&topology);
        let missing = self.machines.missing(machines.iter().copied());
        if let Some(&machine) = missing.first() {
            // A lost machine may come back.
            if self.now.saturating_sub(setting_up.began) > self.settings.timeout() {
                return self.fail(Failure::transient(format!("machine {machine} is gone")));
            }
            setting_up.topology = Some(topology);
            return Next::Wait(Stage::SettingUp(setting_up));
        }
        self.start_ranks(&topology, &machines);
        self.tracker = Some(Tracker::new(topology, self.now));
        // Ranks that ended took the requests along that no checkpoint answers.
        self.checkpoints_asked = self.checkpoints_answered;
        Next::Go(Stage::Running(Running::default()))
    }

    fn begin_generation(&mut self) -> Topology {
        self.generation += u64::from(self.has_keepers());
        let topology = self.topology();
        self.save_registry();
        self.set_up_keepers(&topology);
        topology
    }

    /// Tells the keepers about the nodes.
    pub(super) fn set_up_keepers(&mut self, topology: &Topology) {
        for node in 0..self.keepers.seats.len() {
            if let Some(keeper) = self.keepers.ready_keeper(node) {
                let topology = topology.clone();
                let request = KeeperRequest::SetUp { topology, node };
                self.ask(keeper, Purpose::SetUp(keeper), request);
            }
        }
    }

    /// Writes where later launchers find the keepers. Nothing waits for the disk.
    pub(super) fn save_registry(&mut self) {
        if !self.has_keepers() {
            return;
        }
        let registry = KeeperRegistry {
            secret: self.keepers.secret.clone(),
            generation: self.generation,
            skipped_batches: self.history.skipped_batches.clone(),
            keepers: self.keepers.entries(),
            spares: self.keepers.spares.len(),
        };
        self.store_registry(Some(registry));
    }

    /// True if another launcher would find the keepers.
    pub(super) fn is_recorded(&self) -> bool {
        let keepers = self.keepers.entries();
        let mut addresses = keepers.iter().map(|keeper| keeper.address);
        let recorded: BTreeSet<SocketAddr> = self.recorded.iter().copied().collect();
        addresses.all(|address| recorded.contains(&address))
    }

    pub(super) fn store_registry(&mut self, registry: Option<KeeperRegistry>) {
        // An earlier write that still hangs is of no use any more.
        self.requests
            .forget(|purpose| purpose == Purpose::SaveRegistry);
        let recording = registry.as_ref().map(KeeperRegistry::addresses);
        self.recording = recording.unwrap_or_default();
        let id = self
            .requests
            .issue(Recipient::Disk, Purpose::SaveRegistry, None);
        self.commands.push(Command::SaveRegistry { id, registry });
    }

    fn topology(&mut self) -> Topology {
        let nodes = self.settings.config.nodes(self.world_size);
        let protection = self.settings.config.protection(nodes.len());
        let (redundancy, groups) = protection.unwrap_or_else(|reason| {
            self.warn_once(format!(
                "snapshots do not survive the loss of a node: {reason}"
            ));
            let alone = (0..nodes.len()).map(|node| vec![node]);
            (Redundancy::None, alone.collect())
        });
        let addresses = if self.has_keepers() {
            self.keepers.seat_addresses()
        } else {
            vec![([0, 0, 0, 0], 0).into(); nodes.len()]
        };
        let nodes = nodes.into_iter().zip(addresses);
        let nodes = nodes.map(|(ranks, address)| Node { address, ranks });
        Topology {
            generation: self.generation,
            nodes: nodes.collect(),
            redundancy,
            groups,
            chunk_bytes: self.settings.chunk_bytes,
        }
    }

    /// Returns the machine of each rank: that of its keeper, if there is one.
    fn rank_machines(&self, topology: &Topology) -> Vec<usize> {
        if !self.has_keepers() {
            let ranks = 0..self.world_size;
            return ranks
                .map(|rank| rank / self.settings.ranks_per_machine)
                .collect();
        }
        let nodes = rank_nodes(topology).into_iter();
        nodes.map(|node| self.keepers.seats[node].machine).collect()
    }

    fn start_ranks(&mut self, topology: &Topology, machines: &[usize]) {
        let mut assigned: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (rank, &machine) in machines.iter().enumerate() {
            assigned.entry(machine).or_default().push(rank);
        }
        let number = self.ranks.start(assigned.clone());
        let nodes = rank_nodes(topology);
        for (machine, ranks) in assigned {
            let locals = ranks.iter().enumerate();
            let assignments = locals.map(|(local_rank, &rank)| Assignment {
                rank,
                world_size: self.world_size,
                local_rank,
                local_world_size: ranks.len(),
                store: self.settings.store,
                address: self.machines.address(machine),
                generation: self.generation,
                keeper: self.assigned_keeper(nodes[rank]),
                skipped_batches: self.history.skipped_batches.clone(),
                config: self.settings.stored_config.clone(),
            });
            let assignments = assignments.collect();
            self.commands.push(Command::StartRanks {
                machine,
                number,
                assignments,
            });
        }
    }

    fn assigned_keeper(&self, node: usize) -> Option<AssignedKeeper> {
        if !self.has_keepers() {
            return None;
        }
        let keeper = self.keepers.get(self.keepers.seats[node].keeper?)?;
        Some(AssignedKeeper {
            socket: keeper.entry.socket.clone(),
            chunk: self.settings.chunk_bytes,
            restore: self.restored.map(|restored| (restored.id, restored.ranks)),
        })
    }
}
