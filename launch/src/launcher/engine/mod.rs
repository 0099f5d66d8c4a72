//! The launcher's decisions: events in, commands out. The time is passed in, and nothing here does
//! any I/O, so that tests can play every situation.
//!
//! A run goes through stages. After each event the current stage looks at what is known and either
//! waits or moves to the next:
//!
//! | stage | waits for |
//! |---|---|
//! | [`gathering`] | machines, and keepers of an earlier launch |
//! | [`seating`] | a keeper for every node |
//! | [`recovering`] | a snapshot that is whole, or the newest checkpoint |
//! | [`setting_up`] | keepers that know the new generation |
//! | [`running`] | the end of the ranks |
//! | [`killing`] | the end of killed ranks, after a failure |
//! | [`ending`] | the last checkpoint, then the end of the keepers |

mod checkpoints;
pub(crate) mod command;
mod continuation;
mod ending;
pub(crate) mod event;
mod failure;
mod gathering;
pub(crate) mod keepers;
mod killing;
mod machines;
mod policy;
pub(crate) mod problem;
pub(crate) mod ranks;
mod reassembly;
mod recovering;
pub(crate) mod requests;
pub(crate) mod restart_record;
mod running;
mod saving;
mod seating;
mod setting_up;
pub(crate) mod settings;
mod stops;
#[cfg(test)]
mod tests;
mod tracker;

use crate::registry::KeeperRegistry;
use checkpoint::keeper::{self, InventoryPool, Secret};
use checkpoints::Checkpoints;
use command::{Command, KeeperRequest};
use ending::Ending;
use event::{Answer, Event, Failed, Host};
use gathering::{Gathering, TakingOver};
use keepers::{KeeperId, KeeperState, Keepers};
use killing::Killing;
use machines::Machines;
use policy::History;
use ranks::Ranks;
use recovering::{Recovering, RestoredSnapshot};
use requests::{Purpose, Recipient, Requests};
use running::Running;
use seating::Seating;
use setting_up::SettingUp;
use settings::Settings;
use std::{net::SocketAddr, time::Duration};
use stops::Stops;
use tracker::Tracker;

/// The limit of a request that moves or checks whole snapshots.
pub(crate) const LONG_TIMEOUT: Duration = Duration::from_secs(3600);

/// The time for which a look may wait after signs of life, of which thousands of keepers send more
/// than the engine could look at one by one.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Number of times that the engine connects again to a keeper that does not answer.
const MAX_RECONNECTS: usize = 2;
/// Number of times that a keeper may refuse to list what it holds before the run does without it.
const MAX_REFUSALS: usize = 2;

/// Facts that a launch starts with, besides its settings.
pub(crate) struct Launch {
    pub(crate) machines: usize,
    /// The launcher's own machine.
    pub(crate) own: Host,
    pub(crate) secret: Secret,
    pub(crate) number: u64,
    /// Left by an earlier launcher of the run.
    pub(crate) registry: Option<KeeperRegistry>,
}

#[derive(Debug)]
enum Stage {
    Gathering(Gathering),
    TakingOver(TakingOver),
    Seating(Seating),
    Recovering(Recovering),
    SettingUp(SettingUp),
    Running(Running),
    Killing(Killing),
    Ending(Ending),
    Ended,
}

/// The stage after a look at what is known.
enum Next {
    /// Wait for the next event.
    Wait(Stage),
    Go(Stage),
}

pub(crate) struct Engine {
    settings: Settings,
    /// Time since the launcher's start.
    now: Duration,
    /// The time of the last look at what is known.
    looked: Duration,
    commands: Vec<Command>,
    requests: Requests,
    /// Replies that no stage has taken yet.
    replies: Vec<TakenReply>,
    /// The common values of the keepers' last inventories.
    inventory_pool: InventoryPool,
    machines: Machines,
    keepers: Keepers,
    ranks: Ranks,
    history: History,
    checkpoints: Checkpoints,
    stops: Stops,
    /// The current number of ranks.
    world_size: usize,
    generation: u64,
    restored: Option<RestoredSnapshot>,
    /// None while no ranks run.
    tracker: Option<Tracker>,
    /// Steps that were done when ranks last reported.
    steps_done: u64,
    /// Step of the newest snapshot that was complete.
    newest_complete: Option<u64>,
    /// Number of requests for a checkpoint.
    checkpoints_wanted: usize,
    /// Number of these requests that checkpoints on disk answer.
    checkpoints_answered: usize,
    /// Number of these requests that ranks know of.
    checkpoints_asked: usize,
    /// True if the run lost a keeper since its ranks started.
    has_lost_keeper: bool,
    /// Addresses of the keepers that the file on disk names.
    recorded: Vec<SocketAddr>,
    /// Addresses that it names once the request to write it succeeds.
    recording: Vec<SocketAddr>,
    /// The reason why a keeper was lost or did not start.
    last_keeper_error: String,
    warnings: Vec<String>,
    stage: Stage,
}

type TakenReply = (Purpose, Result<Answer, Failed>);

impl Engine {
    pub(crate) fn new(settings: Settings, launch: Launch) -> Engine {
        let Launch {
            machines,
            own,
            secret,
            number,
            registry,
        } = launch;
        let mut engine = Engine {
            world_size: settings.world_size,
            settings,
            now: Duration::ZERO,
            looked: Duration::ZERO,
            commands: Vec::new(),
            requests: Requests::default(),
            replies: Vec::new(),
            inventory_pool: InventoryPool::default(),
            machines: Machines::new(machines, own),
            keepers: Keepers::new(secret, number),
            ranks: Ranks::default(),
            history: History::default(),
            checkpoints: Checkpoints::default(),
            stops: Stops::default(),
            generation: 0,
            restored: None,
            tracker: None,
            steps_done: 0,
            newest_complete: None,
            checkpoints_wanted: 0,
            checkpoints_answered: 0,
            checkpoints_asked: 0,
            has_lost_keeper: false,
            recorded: Vec::new(),
            recording: Vec::new(),
            last_keeper_error: String::new(),
            warnings: Vec::new(),
            stage: Stage::Gathering(Gathering::new(Duration::ZERO)),
        };
        if let Some(registry) = registry {
            engine.look_for_earlier_keepers(&registry);
        }
        engine
    }

    /// Takes an event, or only notices that time has passed. Returns what is to be done.
    pub(crate) fn handle(&mut self, now: Duration, event: Option<Event>) -> Vec<Command> {
        self.now = now;
        let may_wait = event.as_ref().is_some_and(|event| self.may_wait(event));
        if let Some(event) = event {
            self.learn(event);
        }
        if !may_wait || now >= self.looked + LOOK_INTERVAL {
            self.looked = now;
            self.notice_silence();
            while self.advance() {}
        }
        std::mem::take(&mut self.commands)
    }

    /// True for what keepers and agents report all the time. It is learned at once; the stage looks
    /// at it soon enough.
    fn may_wait(&self, event: &Event) -> bool {
        match event {
            Event::Keeper { event, .. } => !matches!(event, keeper::Event::StopRequested { .. }),
            Event::Heartbeat { .. } => true,
            Event::Reply { id, reply: Ok(_) } => {
                matches!(self.requests.purpose(*id), Some(Purpose::Notify(_)))
            }
            _ => false,
        }
    }

    /// True once the launcher is to exit.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.stage, Stage::Ended)
    }

    /// Returns what the engine waits for, for messages of tests.
    #[cfg(test)]
    fn describe(&self) -> String {
        format!("{:?} with {:?}", self.stage, self.requests)
    }

    /// Looks at what is known. Returns true if the stage changed.
    fn advance(&mut self) -> bool {
        let next = match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Gathering(gathering) => self.gather(gathering),
            Stage::TakingOver(taking_over) => self.take_over(taking_over),
            Stage::Seating(seating) => self.seat(seating),
            Stage::Recovering(recovering) => self.recover(recovering),
            Stage::SettingUp(setting_up) => self.set_up(setting_up),
            Stage::Running(running) => self.run(running),
            Stage::Killing(killing) => self.kill(killing),
            Stage::Ending(ending) => self.end(ending),
            Stage::Ended => Next::Wait(Stage::Ended),
        };
        match next {
            Next::Wait(stage) => {
                self.stage = stage;
                false
            }
            Next::Go(stage) => {
                self.stage = stage;
                true
            }
        }
    }

    fn learn(&mut self, event: Event) {
        match event {
            Event::Stop {
                source,
                signal,
                count,
            } => self.stops.note(source, signal, count, self.now),
            Event::CheckpointWanted => self.checkpoints_wanted += 1,
            Event::MachineJoined {
                machine,
                host,
                keepers,
            } => {
                self.join_machine(machine, host);
                self.look_for_kept_keepers(keepers);
            }
            Event::MachineLost { machine, reason } => self.lose_machine(machine, &reason),
            Event::Ranks { machine, report } => {
                self.machines.hear(machine, self.now);
                self.ranks.on_report(machine, report);
            }
            Event::Heartbeat { machine } => self.machines.hear(machine, self.now),
            Event::Keeper { keeper, event } => self.on_keeper_event(keeper, event),
            Event::KeeperGone { keeper, failed } => self.lose_keeper(keeper, failed),
            Event::Reply { id, reply } => {
                if let Some(request) = self.requests.take(id) {
                    self.on_reply(request.purpose, reply);
                }
            }
        }
    }

    fn join_machine(&mut self, machine: usize, host: Host) {
        if self.machines.is_present(machine) {
            // Its agent lost the connection first, and ended its ranks.
            self.lose_machine(machine, "it joined again");
        }
        self.machines.join(machine, host, self.now);
        if !matches!(self.stage, Stage::Gathering(_)) {
            self.machines.returned.insert(machine);
        }
    }

    fn lose_machine(&mut self, machine: usize, reason: &str) {
        if !self.machines.is_present(machine) {
            return;
        }
        self.machines.lose(machine);
        self.ranks
            .on_machine_lost(machine, &format!("machine {machine} is gone ({reason})"));
        let failed = format!("machine {machine} is gone");
        for request in self.requests.take_of(Recipient::Machine(machine)) {
            self.on_reply(request.purpose, Err(Failed::Lost(failed.clone())));
        }
    }

    /// Treats a keeper whose events have stopped as lost, even if it still answers requests.
    fn lose_keeper(&mut self, id: KeeperId, failed: Failed) {
        let Some(keeper) = self.keepers.get_mut(id) else {
            return;
        };
        if keeper.state == KeeperState::Lost {
            return;
        }
        // One that hangs does not answer later either.
        keeper.may_live = matches!(failed, Failed::Silent(_))
            && keeper.entry.pid > 0
            && keeper.reconnects < MAX_RECONNECTS;
        keeper.state = KeeperState::Lost;
        keeper.inventory = None;
        self.has_lost_keeper |= self.keepers.node_of(id).is_some();
        self.last_keeper_error = failed.reason().to_string();
        self.commands.push(Command::DisconnectKeeper { keeper: id });
        for request in self.requests.take_of(Recipient::Keeper(id)) {
            self.on_reply(request.purpose, Err(failed.clone()));
        }
    }

    /// Gives up requests whose deadline has passed, and machines and keepers that are silent.
    fn notice_silence(&mut self) {
        for request in self.requests.take_expired(self.now) {
            let failed = Failed::Silent("no reply in time".into());
            self.on_reply(request.purpose, Err(failed));
        }
        let timeout = self.settings.heartbeat_timeout();
        let silence = format!("no sign of life for {:.0} s", timeout.as_secs_f64());
        for machine in self.machines.present_others() {
            if self.machines.silence(machine, self.now) > timeout {
                self.commands.push(Command::DropMachine { machine });
                self.lose_machine(machine, &silence);
            }
        }
        for keeper in self.keepers.silent(self.now, timeout) {
            self.lose_keeper(keeper, Failed::Silent(silence.clone()));
        }
    }

    fn on_reply(&mut self, purpose: Purpose, reply: Result<Answer, Failed>) {
        match purpose {
            Purpose::StartKeeper(id) => self.on_keeper_started(id, reply),
            Purpose::Connect(id) => self.on_keeper_connected(id, reply),
            Purpose::Inventory(id) => self.on_inventory(id, reply),
            Purpose::Verify(id) | Purpose::Rebuild(id) | Purpose::Select(id) => {
                self.replies.push((purpose, reply.clone()));
                self.lose_if_unreachable(id, &reply);
            }
            Purpose::SetUp(id) => {
                if let Err(Failed::Refused(reason)) = &reply {
                    let name = self.name_of(id);
                    self.warn_once(format!("{name} has no snapshots from now on: {reason}"));
                }
                self.lose_if_unreachable(id, &reply);
            }
            Purpose::Notify(id) => self.lose_if_unreachable(id, &reply),
            // It may have ended before it replied.
            Purpose::StopKeeper(id) => {
                if let Some(keeper) = self.keepers.get_mut(id) {
                    keeper.state = KeeperState::Lost;
                }
            }
            Purpose::WriteCheckpoint(snapshot) => self.on_written(snapshot.step, reply),
            Purpose::Survey => match reply {
                Ok(Answer::Surveyed(found)) => self.checkpoints.on_surveyed(found),
                Ok(_) => {}
                Err(failed) => {
                    let reason = failed.reason().to_string();
                    self.print(format!("warning: cannot search for checkpoints: {reason}"));
                }
            },
            Purpose::SaveRegistry => {
                let recording = std::mem::take(&mut self.recording);
                if reply.is_ok() {
                    self.recorded = recording;
                }
                if let Err(failed) = reply {
                    let reason = failed.reason().to_string();
                    self.warn_once(format!(
                        "{reason}: while this lasts, another launcher cannot find the state in \
                         memory; training continues"
                    ));
                }
            }
        }
    }

    fn on_inventory(&mut self, id: KeeperId, reply: Result<Answer, Failed>) {
        match reply {
            Ok(Answer::Inventory(mut inventory)) => {
                self.inventory_pool.share(&mut inventory);
                let complete = inventory.complete.iter();
                let newest = complete.map(|snapshot| snapshot.id.step).max();
                self.newest_complete = self.newest_complete.max(newest);
                if let Some(keeper) = self.keepers.get_mut(id) {
                    keeper.inventory = Some(inventory);
                    keeper.reconnects = 0;
                }
            }
            Ok(_) => {}
            Err(Failed::Refused(reason)) => self.on_inventory_refused(id, reason),
            Err(failed) => self.lose_keeper(id, failed),
        }
    }

    /// A keeper that refuses is alive. The launcher asks it again, then does without its parts.
    fn on_inventory_refused(&mut self, id: KeeperId, reason: String) {
        let name = self.name_of(id);
        self.log(format!("{name}: {reason}"));
        let Some(keeper) = self.keepers.get_mut(id) else {
            return;
        };
        keeper.refusals.push(reason);
        if keeper.refusals.len() < MAX_REFUSALS {
            self.ask(id, Purpose::Inventory(id), KeeperRequest::Inventory);
        }
    }

    fn lose_if_unreachable(&mut self, id: KeeperId, reply: &Result<Answer, Failed>) {
        match reply {
            Ok(_) => {}
            Err(failed @ (Failed::Lost(_) | Failed::Silent(_))) => {
                self.lose_keeper(id, failed.clone());
            }
            Err(Failed::Refused(reason)) => {
                let name = self.name_of(id);
                self.log(format!("{name}: {reason}"));
            }
        }
    }

    fn on_keeper_started(&mut self, id: KeeperId, reply: Result<Answer, Failed>) {
        match reply {
            Ok(Answer::KeeperStarted { pid, address }) => {
                let Some(keeper) = self.keepers.get_mut(id) else {
                    return;
                };
                keeper.entry.pid = pid;
                keeper.entry.address = address;
                keeper.state = KeeperState::Connecting;
                keeper.entry.identity = self.machines.identity(keeper.entry.machine);
                self.connect(id);
            }
            Ok(_) => self.lose_keeper(id, Failed::Lost("unexpected reply".into())),
            Err(failed) => self.lose_keeper(id, failed),
        }
    }

    fn on_keeper_connected(&mut self, id: KeeperId, reply: Result<Answer, Failed>) {
        match reply {
            Ok(_) => {
                let now = self.now;
                if let Some(keeper) = self.keepers.get_mut(id) {
                    keeper.state = KeeperState::Ready;
                    keeper.last_heard = now;
                }
                // It may be one that was out of reach, and holds parts.
                let is_running = matches!(self.stage, Stage::Running(_) | Stage::Gathering(_));
                if !is_running {
                    self.ask(id, Purpose::Inventory(id), KeeperRequest::Inventory);
                }
            }
            Err(failed) => {
                let address = self.keepers.address(id);
                let reason = failed.reason();
                let reason = format!("cannot reach the keeper at {address}: {reason}");
                let failed = match failed {
                    Failed::Lost(_) => Failed::Lost(reason),
                    // It is there, but has no place for another connection, or takes long.
                    Failed::Silent(_) | Failed::Refused(_) => Failed::Silent(reason),
                };
                self.lose_keeper(id, failed);
            }
        }
    }

    fn on_written(&mut self, step: u64, reply: Result<Answer, Failed>) {
        self.notify_all(|| KeeperRequest::Unpin);
        match reply {
            Ok(Answer::Written(saved)) => {
                self.log(format!("checkpoint {}", saved.path.display()));
                self.checkpoints_answered = self.checkpoints_asked;
                self.checkpoints.on_written(saved);
            }
            Ok(_) => self.checkpoints.on_failed("unexpected reply".into()),
            Err(failed) => {
                let reason = failed.reason().to_string();
                if matches!(self.stage, Stage::Running(_)) {
                    self.print(format!(
                        "warning: no checkpoint at step {step}: {reason}; training continues"
                    ));
                }
                self.checkpoints.on_failed(reason);
            }
        }
    }

    /// Takes the replies to some requests.
    fn take_replies(&mut self, is_wanted: impl Fn(Purpose) -> bool) -> Vec<TakenReply> {
        let replies = std::mem::take(&mut self.replies).into_iter();
        let (taken, left) = replies.partition(|reply| is_wanted(reply.0));
        self.replies = left;
        taken
    }

    /// Sends a request to a keeper.
    fn ask(&mut self, keeper: KeeperId, purpose: Purpose, request: KeeperRequest) {
        let limit = match request {
            KeeperRequest::Verify(_)
            | KeeperRequest::Rebuild(_)
            | KeeperRequest::Protect { .. } => LONG_TIMEOUT,
            _ => self.settings.heartbeat_timeout(),
        };
        let deadline = Some(self.now + limit);
        let id = self
            .requests
            .issue(Recipient::Keeper(keeper), purpose, deadline);
        self.commands.push(Command::AskKeeper {
            id,
            keeper,
            request,
        });
    }

    fn has_keepers(&self) -> bool {
        !self.keepers.seats.is_empty()
    }

    fn name_of(&self, id: KeeperId) -> String {
        match self.keepers.node_of(id) {
            Some(node) => format!("the keeper of node {node}"),
            None => format!("the keeper at {}", self.keepers.address(id)),
        }
    }

    fn print(&mut self, line: String) {
        self.commands.push(Command::Print(line));
    }

    fn warn_once(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.print(format!("warning: {warning}"));
            self.warnings.push(warning);
        }
    }

    fn log(&mut self, line: String) {
        self.commands.push(Command::Log(line));
    }
}
