//! Carries out the engine's commands and tells it what happens. Decides nothing.

pub(crate) mod agent;
mod agent_links;
mod clock;
mod disk;
mod keeper_links;
mod machine;
mod machine_protocol;
mod own_machine;
mod processes;
mod queue;
mod rank_child;
mod rank_source;
mod spawn;

pub(crate) use agent_links::Join;

use super::engine::{
    Engine,
    command::Command,
    event::{Event, Source},
    problem::Problem,
};
use crate::{
    cli::TrainArgs,
    hint::{self, hinted},
    signals::Signals,
};
use agent_links::{AgentLinks, own_event};
use anyhow::{Result, anyhow};
use checkpoint::keeper::Secret;
use clock::Clock;
use disk::Disk;
use keeper_links::KeeperLinks;
use machine::Machine;
use machine_protocol::MachineCommand;
use own_machine::OwnMachine;
use parallel::StoreServer;
use queue::Queue;
use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    process::ExitCode,
    time::Duration,
};

const TICK: Duration = Duration::from_millis(20);

/// Facts that carrying out commands needs.
pub(crate) struct RuntimeSettings<'a> {
    pub(crate) args: &'a TrainArgs,
    /// The folder of the run, `run.dir`.
    pub(crate) dir: &'a Path,
    pub(crate) secret: &'a Secret,
    /// Number of checkpoints to keep.
    pub(crate) keep: usize,
    pub(crate) reply_timeout: Duration,
    pub(crate) signals: &'a Signals,
    /// The store of the ranks.
    pub(crate) store: &'a StoreServer,
}

/// The connections to other machines, before the engine starts.
pub(crate) struct Listening {
    events: Queue<Event>,
    agents: AgentLinks,
    /// Address at which it listens; None in a run on one machine.
    pub(crate) address: Option<SocketAddr>,
}

impl Listening {
    /// Accepts the agents of other machines, if there are any.
    ///
    /// # Errors
    /// If this machine cannot listen at the address.
    pub(crate) fn start(join: Option<Join>, secret: &Secret) -> Result<Listening> {
        let events = Queue::new();
        let Some(join) = join else {
            return Ok(Listening {
                events,
                agents: AgentLinks::none(),
                address: None,
            });
        };
        let (agents, address) = AgentLinks::listen(join, secret.clone(), events.clone())?;
        Ok(Listening {
            events,
            agents,
            address: Some(address),
        })
    }

    pub(crate) fn own_ip(&self) -> Option<IpAddr> {
        self.address.map(|address| address.ip())
    }
}

pub(crate) struct Runtime<'a> {
    settings: RuntimeSettings<'a>,
    events: Queue<Event>,
    own: OwnMachine,
    agents: AgentLinks,
    keepers: KeeperLinks,
    disk: Disk,
    /// Number of requests to stop that the engine knows of.
    stops: usize,
}

impl<'a> Runtime<'a> {
    pub(crate) fn new(settings: RuntimeSettings<'a>, listening: Listening) -> Result<Runtime<'a>> {
        let address = listening.own_ip();
        let Listening { events, agents, .. } = listening;
        let args = settings.args.clone();
        let secret = settings.secret.clone();
        let dir = settings.dir.to_path_buf();
        let reports = events.clone();
        let own = OwnMachine::start(
            // This process orders the ranks itself.
            move || Machine::new(&args, &dir, secret, address, usize::MAX),
            move |report| reports.push(own_event(report)),
        )?;
        let secret = settings.secret.clone();
        let keepers = KeeperLinks::new(secret, settings.reply_timeout, events.clone());
        let disk = Disk::start(settings.dir, settings.keep, events.clone())?;
        Ok(Runtime {
            settings,
            events,
            own,
            agents,
            keepers,
            disk,
            stops: 0,
        })
    }

    /// Runs until the engine ends the run, and then prints how many connections were refused.
    pub(crate) fn drive(mut self, mut engine: Engine) -> ExitCode {
        let mut clock = Clock::start();
        let mut exit = ExitCode::FAILURE;
        // The first decisions need no event.
        let mut event = None;
        loop {
            for command in engine.handle(clock.now(), event) {
                if let Some(status) = self.carry_out(command) {
                    self.agents.end(status);
                    exit = ExitCode::from(status);
                }
            }
            if engine.has_ended() {
                break;
            }
            event = self.signal().or_else(|| self.events.pop(TICK));
        }
        let agents = self.agents.refusals().line("the agents' port");
        let store = self.settings.store.refusals().line("the store");
        for line in agents.into_iter().chain(store) {
            eprintln!("{line}");
        }
        exit
    }

    /// Returns what a signal to this process asks for.
    fn signal(&mut self) -> Option<Event> {
        let signals = self.settings.signals;
        let count = signals.stop_count();
        if count > self.stops
            && let Some(signal) = signals.last_stop()
        {
            self.stops = count;
            return Some(Event::Stop {
                source: Source::Launcher,
                signal: signal as i32,
                count,
            });
        }
        (signals.take_checkpoint_requests() > 0).then_some(Event::CheckpointWanted)
    }

    /// Returns the status if the launcher is to exit.
    fn carry_out(&mut self, command: Command) -> Option<u8> {
        match command {
            Command::ConnectKeeper {
                id,
                keeper,
                address,
            } => self.keepers.connect(id, keeper, address),
            Command::DisconnectKeeper { keeper } => self.keepers.disconnect(keeper),
            Command::AskKeeper {
                id,
                keeper,
                request,
            } => self.keepers.ask(id, keeper, request),
            Command::DropMachine { machine } => self.agents.drop_machine(machine),
            Command::WriteCheckpoint {
                id,
                snapshot,
                shares,
            } => self
                .disk
                .write_checkpoint(id, snapshot, shares, &self.keepers),
            Command::Survey { id } => self.disk.survey(id),
            Command::SaveRegistry { id, registry } => self.disk.save_registry(id, registry),
            Command::RecordRestart(record) => self.disk.record_restart(&record),
            Command::Print(line) => eprintln!("{line}"),
            Command::Log(line) => tracing::info!("{line}"),
            Command::Exit { status, problem } => {
                if let Some(problem) = problem {
                    eprintln!("error: {}", hint::message(&error(problem)));
                }
                return Some(status);
            }
            command => self.carry_out_on_machine(command),
        }
        None
    }

    fn carry_out_on_machine(&mut self, command: Command) {
        match command {
            Command::StartKeeper {
                id,
                machine,
                node,
                socket,
                memory,
            } => {
                let request = id.0;
                let command = MachineCommand::StartKeeper {
                    request,
                    node,
                    socket,
                    memory,
                };
                self.send(machine, command);
            }
            Command::KillKeeper { machine, pid } => {
                self.send(machine, MachineCommand::KillKeeper { pid });
            }
            Command::StartRanks {
                machine,
                number,
                assignments,
            } => {
                let command = MachineCommand::StartRanks {
                    number,
                    assignments,
                };
                self.send(machine, command);
            }
            Command::StandBy { machine, count } => {
                self.send(machine, MachineCommand::StandBy { count });
            }
            Command::SignalRanks { machine, signal } => {
                self.send(machine, MachineCommand::SignalRanks { signal });
            }
            Command::KillRanks {
                machine,
                number,
                standby,
            } => self.send(machine, MachineCommand::KillRanks { number, standby }),
            _ => unreachable!("carry_out handles the others"),
        }
    }

    fn send(&self, machine: usize, command: MachineCommand) {
        if machine == 0 {
            self.own.send(command);
        } else {
            self.agents.send(machine, command);
        }
    }
}

fn error(problem: Problem) -> anyhow::Error {
    let error = anyhow!(problem.message);
    match problem.hint {
        Some(hint) => hinted(error, hint),
        None => error,
    }
}
