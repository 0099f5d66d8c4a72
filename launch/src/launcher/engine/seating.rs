//! Gives every node a keeper: finds lost nodes, replaces them or does without them, and starts
//! what is missing.

use super::{
    Engine, Next, Stage,
    command::{Command, KeeperRequest},
    continuation::{Continuation, Nodes, largest_layout, plan_continuation},
    keepers::{KeeperId, KeeperState, Seat},
    problem::Problem,
    recovering::{Recovered, Recovering},
    requests::{Purpose, Recipient},
    setting_up::SettingUp,
    settings::REMINDER_INTERVAL,
};
use std::{collections::BTreeSet, time::Duration};

/// The time within which a started keeper must answer.
pub(super) const KEEPER_START_TIMEOUT: Duration = Duration::from_secs(40);
/// Number of times that a keeper is started on a node before the run gives up.
const MAX_STARTS: usize = 3;

#[derive(Debug)]
enum Why {
    New,
    /// The run continues what another launcher began.
    TakenOver,
    Failed {
        distrusted_from: Option<u64>,
        recovered: Recovered,
    },
    /// Lost machines came back.
    Grown,
}

#[derive(Debug)]
pub(super) struct Seating {
    why: Why,
    began: Duration,
    reminded: Duration,
    /// None until it is known which nodes are lost.
    notes: Option<Option<String>>,
    /// Number of failed starts.
    failed_starts: usize,
}

impl Seating {
    fn new(engine: &Engine, why: Why) -> Seating {
        Seating {
            why,
            began: engine.now,
            reminded: engine.now,
            notes: None,
            failed_starts: 0,
        }
    }

    pub(super) fn anew(engine: &Engine) -> Seating {
        Seating::new(engine, Why::New)
    }

    pub(super) fn taken_over(engine: &mut Engine) -> Seating {
        engine.ask_for_inventories();
        Seating::new(engine, Why::TakenOver)
    }

    pub(super) fn after_failure(
        engine: &mut Engine,
        distrusted_from: Option<u64>,
        recovered: Recovered,
    ) -> Seating {
        engine.ask_for_inventories();
        let why = Why::Failed {
            distrusted_from,
            recovered,
        };
        Seating::new(engine, why)
    }
}

impl Engine {
    /// Seats more nodes after lost machines came back.
    pub(super) fn seat_grown(&mut self) -> Next {
        self.ask_for_inventories();
        Next::Go(Stage::Seating(Seating::new(self, Why::Grown)))
    }

    /// Returns the machine of each node of a new run.
    pub(super) fn planned_seats(&self) -> Vec<Seat> {
        let nodes = self.settings.config.nodes(self.world_size).len();
        let seat = |node| Seat {
            machine: self.planned_machine(node),
            keeper: None,
        };
        (0..nodes).map(seat).collect()
    }

    /// Spare keepers are on the machines after those with ranks, if there are any.
    fn planned_machine(&self, node: usize) -> usize {
        let nodes = self.settings.config.nodes(self.world_size).len();
        let ranks_per_node = self.world_size.div_ceil(nodes);
        let last = self.machines.count() - 1;
        (node * ranks_per_node / self.settings.ranks_per_machine).min(last)
    }

    pub(super) fn nodes_per_machine(&self) -> usize {
        let ranks = self.settings.ranks_per_machine;
        let per_node = self.settings.config.parallel.ranks_per_node;
        ranks.div_ceil(per_node.unwrap_or(ranks).max(1)).max(1)
    }

    pub(super) fn seat(&mut self, mut seating: Seating) -> Next {
        if self.stops.first().is_some() {
            return self.stop_before_the_first_step();
        }
        if !self.settings.config.takes_snapshots() {
            return self.seated(seating, None);
        }
        self.reconnect_to_silent_keepers();
        if self.awaits_inventories() || self.is_reconnecting() {
            return Next::Wait(Stage::Seating(seating));
        }
        let notes = match seating.notes.take() {
            Some(notes) => notes,
            None => self.place_nodes(&seating.why),
        };
        if let Err(problem) = self.fill_seats(&mut seating) {
            return self.end_failed(problem);
        }
        let nodes = 0..self.keepers.seats.len();
        // A keeper may outlive the agent of its machine.
        let is_seated = |node: usize| {
            let machine = self.keepers.seats[node].machine;
            self.keepers.ready_keeper(node).is_some() && self.machines.is_present(machine)
        };
        if nodes.into_iter().all(is_seated) && !self.starts_spares() {
            return self.seated(seating, notes);
        }
        seating.notes = Some(notes);
        Next::Wait(Stage::Seating(seating))
    }

    /// Connects again to keepers that were out of reach, where machines are there.
    pub(super) fn reconnect_to_silent_keepers(&mut self) {
        for id in self.keepers.ids() {
            let Some(keeper) = self.keepers.get_mut(id) else {
                continue;
            };
            let machine = keeper.machine;
            let is_there = machine.is_some_and(|machine| self.machines.is_present(machine));
            if keeper.state == KeeperState::Lost && keeper.may_live && is_there {
                self.reconnect(id);
            }
        }
    }

    pub(super) fn reconnect(&mut self, id: KeeperId) {
        if let Some(keeper) = self.keepers.get_mut(id) {
            keeper.may_live = false;
            keeper.reconnects += 1;
            keeper.state = KeeperState::Connecting;
            self.connect(id);
        }
    }

    pub(super) fn is_reconnecting(&self) -> bool {
        let ids = self.keepers.ids();
        let mut connecting = ids
            .iter()
            .filter(|&&id| self.keepers.state(id) == KeeperState::Connecting);
        connecting.any(|&id| {
            let is_leftover = self.keepers.leftover.contains(&id);
            is_leftover || self.keepers.node_of(id).is_some()
        })
    }

    fn seated(&mut self, seating: Seating, notes: Option<String>) -> Next {
        match seating.why {
            Why::New => {
                self.restored = None;
                Next::Go(Stage::SettingUp(SettingUp::new(self.now)))
            }
            Why::TakenOver => self.recover_earlier(notes),
            Why::Failed {
                distrusted_from,
                recovered,
            } => {
                let recovering = Recovering::begin(self, distrusted_from, Some(recovered), notes);
                Next::Go(Stage::Recovering(recovering))
            }
            Why::Grown => {
                let world_size = self.world_size;
                let recovered = Recovered {
                    failure: format!("machines are back: continuing with {world_size} ranks"),
                    steps_done: self.steps_done,
                    skipped: None,
                };
                let recovering = Recovering::begin(self, None, Some(recovered), notes);
                Next::Go(Stage::Recovering(recovering))
            }
        }
    }

    /// Decides which nodes the run has from now on. Returns a description of lost ones.
    fn place_nodes(&mut self, why: &Why) -> Option<String> {
        match why {
            Why::New => {
                self.keepers.seats = self.planned_seats();
                self.start_spares();
                None
            }
            Why::Grown => {
                self.grow();
                None
            }
            Why::TakenOver | Why::Failed { .. } => self.replace_lost_nodes(),
        }
    }

    fn start_spares(&mut self) {
        let nodes = self.keepers.seats.len();
        for spare in 0..self.settings.spare_nodes {
            let machine = self.planned_machine(nodes + spare);
            let id = self.start_keeper(machine, nodes + spare, None);
            self.keepers.spares.push(id);
        }
    }

    /// True while a spare keeper is being started.
    pub(super) fn starts_spares(&self) -> bool {
        let mut spares = self.keepers.spares.iter();
        spares.any(|&id| {
            matches!(
                self.keepers.state(id),
                KeeperState::Starting | KeeperState::Connecting
            )
        })
    }

    /// A node is lost if its keeper is, or its machine.
    fn lost_nodes(&self) -> Vec<usize> {
        let nodes = 0..self.keepers.seats.len();
        let is_lost = |node: &usize| {
            let machine = self.keepers.seats[*node].machine;
            self.keepers.ready_keeper(*node).is_none() || !self.machines.is_present(machine)
        };
        nodes.filter(is_lost).collect()
    }

    fn replace_lost_nodes(&mut self) -> Option<String> {
        self.keepers.spares = self.usable_spares();
        let lost = self.lost_nodes();
        let (first, others) = lost.split_first()?;
        let s = if others.is_empty() { "" } else { "s" };
        let mut names = format!("lost node{s} {first}");
        for node in others {
            names += &format!(", {node}");
        }
        let nodes = Nodes {
            world_size: self.world_size,
            count: self.keepers.seats.len(),
            spares: self.keepers.spares.len(),
            lost: &lost,
        };
        let how = match plan_continuation(&self.settings.config, &nodes) {
            Continuation::Shrink {
                world_size,
                nodes,
                has_idle,
            } => {
                self.shrink(&lost, world_size, nodes);
                let idle = if has_idle { " (others idle)" } else { "" };
                format!("continuing with {world_size} ranks{idle} and the same global batch")
            }
            Continuation::Replace => match self.seat_spares(&lost) {
                0 => "ranks restart in place".into(),
                1 => "1 spare node took over".into(),
                used => format!("{used} spare nodes took over"),
            },
        };
        Some(format!("{names}: {how}"))
    }

    /// Returns the spare keepers that answer, on machines that are there; forgets the others.
    fn usable_spares(&mut self) -> Vec<KeeperId> {
        let spares = std::mem::take(&mut self.keepers.spares);
        let mut usable = Vec::new();
        for id in spares {
            let machine = self.keepers.get(id).and_then(|keeper| keeper.machine);
            let is_present = machine.is_some_and(|machine| self.machines.is_present(machine));
            if is_present && self.keepers.is_ready(id) {
                usable.push(id);
            } else {
                self.set_aside(id);
            }
        }
        usable
    }

    /// Puts spare keepers in the place of lost ones as far as there are any. Returns their number.
    fn seat_spares(&mut self, lost: &[usize]) -> usize {
        let mut used = 0;
        for &node in lost {
            let is_alive = self.keepers.ready_keeper(node).is_some();
            let Some(spare) = self.keepers.spares.pop() else {
                if !is_alive {
                    self.vacate(node);
                }
                continue;
            };
            self.vacate(node);
            let machine = self.keepers.get(spare).and_then(|keeper| keeper.machine);
            let own = self.keepers.seats[node].machine;
            self.keepers.seats[node] = Seat {
                machine: machine.unwrap_or(own),
                keeper: Some(spare),
            };
            used += 1;
        }
        used
    }

    /// Takes lost nodes out of the run. Keepers that are left without ranks still hold snapshots.
    fn shrink(&mut self, lost: &[usize], world_size: usize, nodes: usize) {
        for &node in lost.iter().rev() {
            self.vacate(node);
            self.keepers.seats.remove(node);
        }
        let idle = self.keepers.seats.split_off(nodes);
        let idle = idle.into_iter().filter_map(|seat| seat.keeper);
        self.keepers.spares.extend(idle);
        self.world_size = world_size;
    }

    /// Gives nodes to keepers without ranks, as far as the configuration can use them.
    fn grow(&mut self) {
        let world_size = self.possible_world_size();
        let nodes = self.settings.config.nodes(world_size).len();
        while self.keepers.seats.len() < nodes {
            // In the order in which they came: the newest is the last spare.
            if self.keepers.spares.is_empty() {
                break;
            }
            let spare = self.keepers.spares.remove(0);
            let machine = self.keepers.get(spare).and_then(|keeper| keeper.machine);
            self.keepers.seats.push(Seat {
                machine: machine.unwrap_or(0),
                keeper: Some(spare),
            });
        }
        self.world_size = world_size;
        self.machines.returned.clear();
    }

    /// Returns the most ranks that the run could have with its spare keepers.
    pub(super) fn possible_world_size(&self) -> usize {
        let spares = self.keepers.spares.iter();
        let ready = spares.filter(|&&id| self.keepers.is_ready(id)).count();
        let config = &self.settings.config;
        let per_node = config.parallel.ranks_per_node;
        let per_node = per_node.unwrap_or(self.settings.world_size);
        let ranks = (self.keepers.seats.len() + ready) * per_node;
        let most = ranks.min(self.settings.world_size);
        largest_layout(config, most).unwrap_or(self.world_size)
    }

    /// Ends a node's keeper, if it can be reached, and leaves the node without one. A keeper that
    /// still holds parts is kept until the next snapshot is complete.
    fn vacate(&mut self, node: usize) {
        let Some(id) = self.keepers.seats[node].keeper.take() else {
            return;
        };
        self.set_aside(id);
    }

    /// Keeps a keeper that may hold parts of a snapshot, and ends others.
    pub(super) fn set_aside(&mut self, id: KeeperId) {
        if self.keepers.is_ready(id) || self.keepers.may_live(id) {
            self.keepers.leftover.insert(id);
        } else {
            self.abandon_keeper(id);
        }
    }

    /// Starts the keepers of nodes that have none, where machines are there.
    fn fill_seats(&mut self, seating: &mut Seating) -> Result<(), Problem> {
        let mut missing = Vec::new();
        for node in 0..self.keepers.seats.len() {
            let Seat { machine, keeper } = self.keepers.seats[node];
            let state = keeper.map(|id| self.keepers.state(id));
            if !self.machines.is_present(machine) {
                if state == Some(KeeperState::Lost) {
                    // It was lost with its machine, which is no failed start.
                    self.vacate(node);
                }
                missing.push(machine.to_string());
                continue;
            }
            match state {
                Some(KeeperState::Lost) => {
                    seating.failed_starts += 1;
                    if seating.failed_starts >= MAX_STARTS {
                        let reason = &self.last_keeper_error;
                        return Err(Problem::new(format!(
                            "the keeper of node {node} does not start: {reason}"
                        )));
                    }
                    self.vacate(node);
                    self.fill_seat(node, machine);
                }
                Some(_) => {}
                None => self.fill_seat(node, machine),
            }
        }
        self.wait_for_machines(seating, &missing)
    }

    fn fill_seat(&mut self, node: usize, machine: usize) {
        let id = match self.keepers.leftover_on(machine, KeeperState::Ready) {
            Some(kept) => {
                self.keepers.leftover.remove(&kept);
                kept
            }
            None => self.start_keeper(machine, node, None),
        };
        self.keepers.seats[node].keeper = Some(id);
    }

    fn wait_for_machines(
        &mut self,
        seating: &mut Seating,
        missing: &[String],
    ) -> Result<(), Problem> {
        if missing.is_empty() {
            return Ok(());
        }
        let names = missing.join(", ");
        let timeout = self.settings.timeout();
        if self.now.saturating_sub(seating.began) > timeout {
            let problem = Problem::new(format!(
                "machines {names} did not join within {timeout:.0?}"
            ));
            let problem = match &seating.why {
                Why::Failed { recovered, .. } => problem.because(&recovered.failure),
                _ => problem,
            };
            return Err(problem.hint("start the same command there with --node-rank"));
        }
        if self.now.saturating_sub(seating.reminded) > REMINDER_INTERVAL {
            seating.reminded = self.now;
            self.print(format!("waiting for machines {names}"));
        }
        Ok(())
    }

    /// Starts a keeper's process.
    pub(super) fn start_keeper(
        &mut self,
        machine: usize,
        node: usize,
        socket: Option<String>,
    ) -> KeeperId {
        let keeper = self.keepers.add_new(machine, socket);
        let socket = self
            .keepers
            .get(keeper)
            .map(|keeper| keeper.entry.socket.clone());
        let deadline = Some(self.now + KEEPER_START_TIMEOUT);
        let recipient = Recipient::Machine(machine);
        let id = self
            .requests
            .issue(recipient, Purpose::StartKeeper(keeper), deadline);
        self.commands.push(Command::StartKeeper {
            id,
            machine,
            node,
            socket: socket.unwrap_or_default(),
            memory: self.settings.keeper_memory(),
        });
        keeper
    }

    /// Connects to a keeper whose process runs.
    pub(super) fn connect(&mut self, keeper: KeeperId) {
        let deadline = Some(self.now + self.settings.connect_timeout());
        let recipient = Recipient::Keeper(keeper);
        let id = self
            .requests
            .issue(recipient, Purpose::Connect(keeper), deadline);
        let address = self.keepers.address(keeper);
        self.commands.push(Command::ConnectKeeper {
            id,
            keeper,
            address,
        });
    }

    /// Kills a keeper that is of no use any more, as far as it can be reached.
    pub(super) fn abandon_keeper(&mut self, id: KeeperId) {
        if let Some(keeper) = self.keepers.get(id)
            && let Some(machine) = keeper.machine
            && keeper.entry.pid > 0
        {
            let pid = keeper.entry.pid;
            self.commands.push(Command::KillKeeper { machine, pid });
        }
        self.drop_keeper(id);
    }

    /// Forgets a keeper, and closes the connection to it.
    pub(super) fn drop_keeper(&mut self, id: KeeperId) {
        self.requests.take_of(Recipient::Keeper(id));
        self.commands.push(Command::DisconnectKeeper { keeper: id });
        self.keepers.remove(id);
    }

    /// Asks all keepers to end. Returns false while some have not, or are still starting.
    pub(super) fn keepers_have_stopped(&mut self) -> bool {
        let stopping = self
            .requests
            .purposes()
            .filter_map(|purpose| match purpose {
                Purpose::StopKeeper(id) => Some(id),
                _ => None,
            });
        let stopping: BTreeSet<KeeperId> = stopping.collect();
        for id in self.keepers.ready() {
            if !stopping.contains(&id) {
                self.ask(id, Purpose::StopKeeper(id), KeeperRequest::Stop);
            }
        }
        let is_own = |id| {
            let keeper = self.keepers.get(id);
            keeper.is_some_and(|keeper| keeper.machine.is_some())
        };
        !self.requests.any(|purpose| match purpose {
            Purpose::StopKeeper(_) | Purpose::StartKeeper(_) => true,
            Purpose::Connect(id) => is_own(id),
            _ => false,
        })
    }
}
