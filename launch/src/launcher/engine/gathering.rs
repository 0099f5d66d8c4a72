//! The beginning: machines join, and keepers of an earlier launch are looked for.

use super::{
    Engine, Next, Stage,
    keepers::{KeeperState, Seat},
    problem::Problem,
    reassembly::Progress,
    recovering::Recovering,
    saving::{Saved, Saving},
    seating::Seating,
    settings::REMINDER_INTERVAL,
};
use crate::registry::{KeeperEntry, KeeperRegistry};
use std::time::Duration;

/// The time after which a message says what the launcher waits for.
const FIRST_REMINDER: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Gathering {
    next_reminder: Duration,
}

impl Gathering {
    pub(super) fn new(now: Duration) -> Gathering {
        Gathering {
            next_reminder: now + FIRST_REMINDER,
        }
    }
}

/// Decides about keepers of an earlier launch.
#[derive(Debug)]
pub(super) enum TakingOver {
    /// The launcher asks for their inventories.
    Asking,
    /// Their state does not fit this run, and is written to a checkpoint.
    Saving(Box<Saving>),
    /// The launcher ends them.
    Stopping { saved: Option<u64> },
}

impl Engine {
    /// Connects to the keepers of an earlier launch, all at once.
    pub(super) fn look_for_earlier_keepers(&mut self, registry: &KeeperRegistry) {
        let nodes = registry.keepers.len().saturating_sub(registry.spares);
        for (index, entry) in registry.keepers.iter().enumerate() {
            let id = self.keepers.add_earlier(entry.clone());
            if index < nodes {
                let machine = entry.machine;
                let keeper = Some(id);
                self.keepers.seats.push(Seat { machine, keeper });
            } else {
                self.keepers.spares.push(id);
            }
            self.connect(id);
        }
        self.recorded = registry.addresses();
        self.generation = registry.generation;
        self.history.skipped_batches = registry.skipped_batches.clone();
    }

    /// Connects to the keepers that an agent kept alive, if they are not known yet.
    pub(super) fn look_for_kept_keepers(&mut self, entries: Vec<KeeperEntry>) {
        if !matches!(self.stage, Stage::Gathering(_)) {
            return;
        }
        for entry in entries {
            let mut ids = self.keepers.ids().into_iter();
            let known = ids.find(|&id| self.keepers.address(id) == entry.address);
            if let Some(id) = known {
                // The agent knows that it lives.
                if self.keepers.state(id) == KeeperState::Lost {
                    self.reconnect(id);
                }
                continue;
            }
            let id = self.keepers.add_earlier(entry);
            self.keepers.leftover.insert(id);
            self.connect(id);
        }
    }

    pub(super) fn gather(&mut self, mut gathering: Gathering) -> Next {
        let missing = self.machines.missing(0..self.machines.count());
        let names: Vec<String> = missing.iter().map(usize::to_string).collect();
        let names = names.join(", ");
        if self.stops.first().is_some() {
            let what = if names.is_empty() {
                "stopped before the first step".into()
            } else {
                format!("stopped while waiting for machines {names}")
            };
            return self.end_stopped(Problem::new(what));
        }
        let connecting: Vec<String> = self
            .keepers
            .ids()
            .into_iter()
            .filter(|&id| self.keepers.state(id) == KeeperState::Connecting)
            .map(|id| self.keepers.address(id).to_string())
            .collect();
        if missing.is_empty() && connecting.is_empty() {
            return self.gathered();
        }
        if !missing.is_empty() && self.now > self.settings.timeout() {
            let timeout = self.settings.timeout();
            let problem = Problem::new(format!(
                "machines {names} did not join within {timeout:.0?}"
            ));
            let hint = "start the same command there with --node-rank";
            return self.end_failed(problem.hint(hint));
        }
        if self.now > gathering.next_reminder {
            gathering.next_reminder = self.now + REMINDER_INTERVAL;
            if !missing.is_empty() {
                self.print(format!("waiting for machines {names}"));
            }
            if !connecting.is_empty() {
                let addresses = connecting.join(", ");
                self.print(format!(
                    "waiting for keepers of an earlier launch at {addresses}"
                ));
            }
        }
        Next::Wait(Stage::Gathering(gathering))
    }

    fn gathered(&mut self) -> Next {
        let mut any_alive = false;
        for id in self.keepers.ids() {
            any_alive |= self.keepers.is_ready(id);
            let Some(keeper) = self.keepers.get(id) else {
                continue;
            };
            let place = self.machines.place_of(&keeper.entry);
            if let Some(keeper) = self.keepers.get_mut(id) {
                keeper.machine = place;
                keeper.entry.machine = place.unwrap_or(keeper.entry.machine);
            }
        }
        if !any_alive {
            self.forget_earlier_keepers();
            self.keepers.seats.clear();
            self.generation = 0;
            self.history.skipped_batches.clear();
            return self.seat_anew();
        }
        self.ask_for_inventories();
        Next::Go(Stage::TakingOver(TakingOver::Asking))
    }

    fn forget_earlier_keepers(&mut self) {
        let ids = self.keepers.ids();
        if !ids.is_empty() {
            let addresses = ids.iter().map(|&id| self.keepers.address(id).to_string());
            let addresses = addresses.collect::<Vec<_>>().join(", ");
            let reason = &self.last_keeper_error;
            self.print(format!(
                "warning: the keepers of an earlier launch at {addresses} are gone, and with them \
                 the state in their memory ({reason})"
            ));
        }
        for id in ids {
            self.keepers.remove(id);
        }
    }

    pub(super) fn seat_anew(&mut self) -> Next {
        Next::Go(Stage::Seating(Seating::anew(self)))
    }

    pub(super) fn take_over(&mut self, taking_over: TakingOver) -> Next {
        match taking_over {
            TakingOver::Asking => {
                if self.stops.first().is_some() {
                    return self.stop_before_the_first_step();
                }
                if self.awaits_inventories() {
                    return Next::Wait(Stage::TakingOver(taking_over));
                }
                self.decide_about_earlier()
            }
            // The end saves what is in memory, too.
            TakingOver::Saving(_) | TakingOver::Stopping { .. } if self.stops.first().is_some() => {
                self.stop_before_the_first_step()
            }
            TakingOver::Saving(saving) => match saving.advance(self) {
                Progress::Waiting(saving) => {
                    Next::Wait(Stage::TakingOver(TakingOver::Saving(Box::new(saving))))
                }
                Progress::Done(Saved::Failed(problem)) => {
                    let status = self.stops.status().unwrap_or(1);
                    self.exit(status, Some(problem))
                }
                Progress::Done(Saved::OutOfReach(problem)) => {
                    let reason = problem.message;
                    self.print(format!("warning: {reason}; continuing without it"));
                    self.stop_earlier(None)
                }
                Progress::Done(Saved::Nothing) => self.stop_earlier(None),
                Progress::Done(Saved::Written(step)) => self.stop_earlier(Some(step)),
            },
            TakingOver::Stopping { saved } => {
                if !self.keepers_have_stopped() {
                    return Next::Wait(Stage::TakingOver(TakingOver::Stopping { saved }));
                }
                if let Some(step) = saved {
                    self.print(format!(
                        "keepers of an earlier launcher had step {step} in memory; wrote it to a \
                         checkpoint"
                    ));
                }
                for id in self.keepers.ids() {
                    self.drop_keeper(id);
                }
                self.keepers.seats.clear();
                self.seat_anew()
            }
        }
    }

    fn stop_earlier(&mut self, saved: Option<u64>) -> Next {
        Next::Go(Stage::TakingOver(TakingOver::Stopping { saved }))
    }

    /// Continues from the memory of an earlier launch if it fits this run.
    fn decide_about_earlier(&mut self) -> Next {
        let config = &self.settings.config;
        let nodes = config.nodes(self.world_size).len();
        let steps = config.train.steps;
        let takes_snapshots = config.takes_snapshots();
        let held = self.held();
        let newest = held
            .candidates
            .first()
            .map(|candidate| candidate.snapshot.id);
        for id in &held.keepers {
            let inventory = self
                .keepers
                .get(*id)
                .and_then(|keeper| keeper.inventory.as_ref());
            let memberships = inventory
                .into_iter()
                .flat_map(|inventory| &inventory.memberships);
            let last = memberships.map(|(topology, _)| topology.generation).max();
            // The registry may be older: the disk was full.
            self.generation = self.generation.max(last.unwrap_or(0));
        }
        let is_unfinished = newest.is_some_and(|id| id.step < steps);
        if takes_snapshots && self.keepers.seats.len() == nodes && is_unfinished {
            self.place_earlier();
            return Next::Go(Stage::Seating(Seating::taken_over(self)));
        }
        let saving = Saving::begin(self);
        Next::Go(Stage::TakingOver(TakingOver::Saving(Box::new(saving))))
    }

    /// Puts every node where its keeper is now. A keeper without a place may still hold parts.
    fn place_earlier(&mut self) {
        let fresh = self.planned_seats();
        for (node, planned) in fresh.into_iter().enumerate() {
            let keeper = self.keepers.ready_keeper(node);
            let place = keeper.and_then(|id| self.keepers.get(id)?.machine);
            match place {
                Some(machine) => self.keepers.seats[node].machine = machine,
                None => {
                    self.keepers.seats[node] = planned;
                    self.keepers.leftover.extend(keeper);
                }
            }
        }
        self.settle_machines();
    }

    /// Gives nodes without a keeper a machine that has none.
    fn settle_machines(&mut self) {
        let per_machine = self.nodes_per_machine();
        for node in 0..self.keepers.seats.len() {
            if self.keepers.ready_keeper(node).is_some() {
                continue;
            }
            let used = |machine: usize| {
                let seats = self.keepers.seats.iter().enumerate();
                let used = seats.filter(|(other, seat)| {
                    let is_settled = *other < node || self.keepers.ready_keeper(*other).is_some();
                    is_settled && seat.machine == machine
                });
                used.count()
            };
            let mut machines = 0..self.machines.count();
            let own = self.keepers.seats[node].machine;
            let machine = if own < self.machines.count() && used(own) < per_machine {
                Some(own)
            } else {
                machines.find(|&machine| used(machine) < per_machine)
            };
            self.keepers.seats[node].machine = machine.unwrap_or(0);
        }
    }

    /// Begins to recover the state of an earlier launch.
    pub(super) fn recover_earlier(&mut self, notes: Option<String>) -> Next {
        let recovering = Recovering::begin(self, None, None, notes);
        Next::Go(Stage::Recovering(recovering))
    }
}
