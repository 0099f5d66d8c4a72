//! One generation of ranks while it runs.

use super::{
    Engine, Next, Stage,
    command::{Command, KeeperRequest},
    event::Source,
    failure::Failure,
    keepers::{KeeperId, KeeperState},
    problem::Problem,
    ranks::FailedRank,
    requests::Purpose,
    tracker::Action,
};
use checkpoint::keeper::{self, SnapshotId};
use nix::sys::signal::Signal;
use std::{collections::BTreeMap, time::Duration};

/// The time in which the real cause of a failure may still show up after a rank or keeper is gone.
const SETTLE_TIME: Duration = Duration::from_millis(400);
/// The time after which a keeper that did not start is tried again.
const REPAIR_INTERVAL: Duration = Duration::from_secs(30);
/// The silence after which a machine may be lost, so that its keeper is not replaced yet.
const SUSPICIOUS_SILENCE: Duration = Duration::from_secs(3);

/// The replacement of a keeper whose ranks live.
#[derive(Debug, Clone, Copy)]
enum Repair {
    /// Its ranks may be about to end, too; or its successor did not start, and is tried again.
    Waiting { until: Duration },
    /// Its successor is being started.
    Starting,
}

#[derive(Debug, Default)]
pub(super) struct Running {
    has_standbys: bool,
    /// A rank has failed; until then its peers may report the cause.
    settling: Option<Duration>,
    /// The time at which ranks were asked to stop.
    stopping: Option<Duration>,
    /// True if ranks stop only to start again with more machines.
    is_pausing: bool,
    repairs: BTreeMap<usize, Repair>,
    /// The time before which no spare keeper is started again.
    readmit_after: Duration,
}

impl Engine {
    pub(super) fn run(&mut self, mut running: Running) -> Next {
        if let Some(tracker) = &self.tracker {
            self.steps_done = self.steps_done.max(tracker.step);
        }
        if let Some(failure) = self.failure_of_ranks(&mut running) {
            return self.fail(failure);
        }
        if self.ranks.running() == 0 && self.ranks_ended_in_order() {
            return self.ranks_ended(&running);
        }
        if let Some(next) = self.pass_stop_on(&mut running) {
            return next;
        }
        self.pass_checkpoint_request_on(&running);
        self.repair_keepers(&mut running);
        let restart = &self.settings.config.restart;
        let hang = self
            .tracker
            .as_ref()
            .and_then(|tracker| Failure::of_hang(tracker, self.now, restart));
        if let Some(failure) = hang {
            return self.fail(failure);
        }
        self.keep_snapshots();
        self.start_standbys(&mut running);
        self.readmit(&mut running);
        Next::Wait(Stage::Running(running))
    }

    fn ranks_ended_in_order(&self) -> bool {
        let failed = self.ranks.failed();
        failed.iter().all(|failed| failed.stop_signal().is_some())
    }

    fn ranks_ended(&mut self, running: &Running) -> Next {
        let is_stop = self.stops.first().is_some();
        if running.is_pausing && !is_stop {
            self.tracker = None;
            return self.seat_grown();
        }
        self.end_in_order()
    }

    /// Returns the failure of a rank once its cause is known.
    fn failure_of_ranks(&mut self, running: &mut Running) -> Option<Failure> {
        let failed = self.ranks.failed();
        let mut failed: Vec<FailedRank> = failed
            .into_iter()
            .filter(|failed| {
                let stop = failed.stop_signal();
                if let (Some(signal), false) = (stop, running.is_pausing) {
                    // A stop signal that reached one rank is a request to stop the run.
                    let source = Source::Rank(failed.rank);
                    self.stops.note(source, signal, 1, self.now);
                }
                stop.is_none()
            })
            .collect();
        if failed.is_empty() {
            running.settling = None;
            return None;
        }
        // A killed rank is the cause. Ranks that failed by themselves may not be the first, which
        // is still about to report.
        if !failed.iter().any(|failed| failed.signal().is_some()) {
            let now = self.now;
            let until = *running.settling.get_or_insert(now + SETTLE_TIME);
            if self.now < until {
                return None;
            }
        }
        failed.retain(|failed| failed.stop_signal().is_none());
        let more = failed.len() + self.ranks.more_failed() - 1;
        if more > 0 {
            self.log(format!("{more} more ranks failed"));
        }
        Some(Failure::of_ranks(&failed, &self.settings.dir))
    }

    /// Stops the ranks at the first request. Ends the attempt at the second, or if they take too
    /// long.
    fn pass_stop_on(&mut self, running: &mut Running) -> Option<Next> {
        let first = self.stops.first()?;
        let Some(since) = running.stopping.filter(|_| !running.is_pausing) else {
            running.stopping = Some(self.now);
            running.is_pausing = false;
            let prefix = match first.source {
                Source::Launcher => String::new(),
                Source::Agent(machine) => format!("machine {machine} was asked to stop: "),
                Source::Keeper(keeper) => format!("{} was asked to stop: ", self.name_of(keeper)),
                Source::Rank(rank) => format!("rank {rank} was asked to stop: "),
            };
            self.print(format!(
                "{prefix}stopping after this step and writing a checkpoint; a second Ctrl-C stops \
                 at once"
            ));
            self.signal_ranks(Signal::SIGTERM);
            return None;
        };
        let timeout = self.settings.timeout();
        let is_late = self.now.saturating_sub(since) > timeout;
        if !self.stops.insists && !is_late {
            return None;
        }
        let problem = if is_late {
            Problem::new(format!("ranks did not stop within {timeout:.0?}"))
        } else {
            Problem::new("stopped without a checkpoint of the last step")
        };
        let hint = "run the same command to resume from the newest checkpoint";
        self.stops.insists = false;
        Some(self.end_failed(problem.hint(hint)))
    }

    fn signal_ranks(&mut self, signal: Signal) {
        let signal = signal as i32;
        for machine in self.ranks.machines() {
            self.commands.push(Command::SignalRanks { machine, signal });
        }
    }

    fn pass_checkpoint_request_on(&mut self, running: &Running) {
        if self.checkpoints_wanted > self.checkpoints_asked && running.stopping.is_none() {
            self.checkpoints_asked = self.checkpoints_wanted;
            self.print("writing a checkpoint after this step; training continues".into());
            self.signal_ranks(Signal::SIGUSR1);
        }
    }

    /// Starts standby processes once the ranks train: before, they would take their processors.
    fn start_standbys(&mut self, running: &mut Running) {
        let trains = self
            .tracker
            .as_ref()
            .is_some_and(|tracker| tracker.step > 0);
        let is_wanted = self.settings.config.restart.standby && self.has_keepers();
        if !is_wanted || running.has_standbys || !trains || running.stopping.is_some() {
            return;
        }
        running.has_standbys = true;
        for machine in self.ranks.machines() {
            let count = self.ranks.assigned_count(machine);
            self.commands.push(Command::StandBy { machine, count });
        }
    }

    /// Abandons snapshots that do not complete, and writes the newest if one is due.
    fn keep_snapshots(&mut self) {
        let now = self.now;
        let expired = self
            .tracker
            .as_mut()
            .and_then(|tracker| tracker.take_expired(now));
        if let Some(id) = expired {
            self.notify_all(|| KeeperRequest::Abandon(id));
        }
        self.write_newest_if_due();
    }

    pub(super) fn write_newest_if_due(&mut self) {
        let Some(tracker) = &self.tracker else {
            return;
        };
        let is_due = |&id: &SnapshotId| self.checkpoints.is_due(id);
        let Some(newest) = tracker.newest.filter(is_due) else {
            return;
        };
        let nodes = tracker.rank_nodes();
        let keepers = nodes
            .iter()
            .map(|&node| self.keepers.seats.get(node)?.keeper);
        if let Some(holders) = keepers.collect::<Option<Vec<KeeperId>>>() {
            self.write_checkpoint(newest, &holders);
        }
    }

    /// Takes an event from a keeper.
    pub(super) fn on_keeper_event(&mut self, keeper: KeeperId, event: keeper::Event) {
        let now = self.now;
        if let Some(keeper) = self.keepers.get_mut(keeper) {
            keeper.reconnects = 0;
            keeper.last_heard = now;
        }
        if let keeper::Event::StopRequested { signal } = event {
            self.on_keeper_signal(keeper, signal);
        }
        let Some(node) = self.keepers.node_of(keeper) else {
            return;
        };
        let Some(tracker) = &mut self.tracker else {
            return;
        };
        match tracker.on_event(node, event, now) {
            Action::Commit { snapshot, durable } => {
                let id = snapshot.id;
                self.newest_complete = self.newest_complete.max(Some(id.step));
                self.notify_all(|| KeeperRequest::Commit(snapshot.clone()));
                if durable {
                    self.checkpoints.request(id);
                }
                // Before a newer one is complete, whose report may already have arrived.
                self.write_newest_if_due();
                self.end_leftover_keepers();
            }
            Action::Abandon { id, reason } => {
                let step = id.step;
                self.log(format!("abandoned the snapshot of step {step}: {reason}"));
                self.notify_all(|| KeeperRequest::Abandon(id));
            }
            Action::Nothing => {}
        }
    }

    /// A signal to a keeper is a request to the run: a scheduler signals all processes.
    fn on_keeper_signal(&mut self, keeper: KeeperId, signal: i32) {
        if signal == Signal::SIGUSR1 as i32 {
            self.checkpoints_wanted += 1;
        } else {
            self.stops.note(Source::Keeper(keeper), signal, 1, self.now);
        }
    }

    /// Ends keepers whose parts no snapshot needs any more.
    fn end_leftover_keepers(&mut self) {
        for id in self.keepers.leftover.clone() {
            self.ask(id, Purpose::Notify(id), KeeperRequest::Stop);
            self.abandon_keeper(id);
        }
    }

    /// Replaces lost keepers whose ranks live. If they end too, the node is lost, and their end is
    /// the failure.
    fn repair_keepers(&mut self, running: &mut Running) {
        if !self.has_keepers() {
            return;
        }
        for node in 0..self.keepers.seats.len() {
            let seat = self.keepers.seats[node];
            let state = seat.keeper.map(|id| self.keepers.state(id));
            let repair = running.repairs.get(&node).copied();
            match (state, repair) {
                (Some(KeeperState::Ready), Some(Repair::Starting)) => {
                    running.repairs.remove(&node);
                    self.include_keeper();
                }
                (Some(KeeperState::Lost), Some(Repair::Starting)) => {
                    let reason = self.last_keeper_error.clone();
                    let seconds = REPAIR_INTERVAL.as_secs();
                    self.print(format!(
                        "warning: no snapshots until node {node} has a keeper: {reason}; trying \
                         again in {seconds} s"
                    ));
                    let until = self.now + REPAIR_INTERVAL;
                    running.repairs.insert(node, Repair::Waiting { until });
                }
                (Some(KeeperState::Lost), None) => {
                    let until = self.now + SETTLE_TIME;
                    running.repairs.insert(node, Repair::Waiting { until });
                }
                (Some(KeeperState::Lost), Some(Repair::Waiting { until })) => {
                    let is_silent =
                        self.machines.silence(seat.machine, self.now) > SUSPICIOUS_SILENCE;
                    let is_present = self.machines.is_present(seat.machine);
                    if self.now >= until && is_present && !is_silent {
                        self.restart_keeper(node);
                        running.repairs.insert(node, Repair::Starting);
                    }
                }
                _ => {}
            }
        }
    }

    /// Starts a new keeper under the socket name that the node's live ranks know.
    fn restart_keeper(&mut self, node: usize) {
        let reason = self.last_keeper_error.clone();
        self.print(format!(
            "warning: the keeper of node {node} is gone ({reason}); starting another, training \
             continues"
        ));
        let machine = self.keepers.seats[node].machine;
        let lost = self.keepers.seats[node].keeper;
        let socket = lost.and_then(|id| Some(self.keepers.get(id)?.entry.socket.clone()));
        if let Some(lost) = lost {
            self.abandon_keeper(lost);
        }
        let abandoned = self.tracker.as_mut().map(|tracker| tracker.take_pending());
        for id in abandoned.unwrap_or_default() {
            self.notify_all(|| KeeperRequest::Abandon(id));
        }
        let id = self.start_keeper(machine, node, socket);
        self.keepers.seats[node].keeper = Some(id);
    }

    /// Tells all keepers the addresses of their current peers.
    fn include_keeper(&mut self) {
        let addresses = self.keepers.seat_addresses();
        let Some(tracker) = &mut self.tracker else {
            return;
        };
        for (node, address) in tracker.topology.nodes.iter_mut().zip(addresses) {
            node.address = address;
        }
        let topology = tracker.topology.clone();
        self.set_up_keepers(&topology);
        self.save_registry();
    }

    /// Prepares keepers on machines that came back, and has the ranks pause once they can be used.
    fn readmit(&mut self, running: &mut Running) {
        let seats = &self.keepers.seats;
        let has_seat = |machine: usize| seats.iter().any(|seat| seat.machine == machine);
        self.machines.returned.retain(|&machine| !has_seat(machine));
        if running.stopping.is_some() || !self.has_keepers() {
            return;
        }
        self.release_lost_spares(running);
        if self.machines.returned.is_empty() || self.now < running.readmit_after {
            return;
        }
        for machine in self.machines.returned.clone() {
            self.start_spares_on(machine);
        }
        let is_starting = self.starts_spares();
        let trains = self
            .tracker
            .as_ref()
            .is_some_and(|tracker| tracker.step > 0);
        if is_starting || !trains {
            return;
        }
        if self.possible_world_size() > self.world_size {
            running.is_pausing = true;
            running.stopping = Some(self.now);
            self.print("lost machines are back: pausing after this step to include them".into());
            self.signal_ranks(Signal::SIGTERM);
        } else {
            // The returned machines serve as spares.
            self.machines.returned.clear();
            self.save_registry();
        }
    }

    /// Gives up spare keepers that are lost. Where their machines are there, others are started
    /// later.
    fn release_lost_spares(&mut self, running: &mut Running) {
        for id in self.keepers.spares.clone() {
            if self.keepers.state(id) != KeeperState::Lost {
                continue;
            }
            self.keepers.spares.retain(|&spare| spare != id);
            let machine = self.keepers.get(id).and_then(|keeper| keeper.machine);
            self.set_aside(id);
            let has_seat = |machine: usize| {
                let mut seats = self.keepers.seats.iter();
                seats.any(|seat| seat.machine == machine)
            };
            let can_start =
                |&machine: &usize| self.machines.is_present(machine) && !has_seat(machine);
            let Some(machine) = machine.filter(can_start) else {
                continue;
            };
            if !self.machines.returned.contains(&machine) || self.now >= running.readmit_after {
                let reason = self.last_keeper_error.clone();
                let seconds = REPAIR_INTERVAL.as_secs();
                self.print(format!(
                    "warning: machine {machine} has no spare keeper ({reason}); starting one in \
                     {seconds} s"
                ));
            }
            self.machines.returned.insert(machine);
            running.readmit_after = self.now + REPAIR_INTERVAL;
        }
    }

    /// Starts the spare keepers of a machine without any.
    fn start_spares_on(&mut self, machine: usize) {
        let is_there = |&id: &KeeperId| {
            let keeper = self.keepers.get(id);
            keeper.is_some_and(|keeper| keeper.machine == Some(machine))
        };
        if self.keepers.spares.iter().any(is_there) {
            return;
        }
        for _ in 0..self.nodes_per_machine() {
            let node = self.keepers.seats.len() + self.keepers.spares.len();
            let id = self.start_keeper(machine, node, None);
            self.keepers.spares.push(id);
        }
    }
}
