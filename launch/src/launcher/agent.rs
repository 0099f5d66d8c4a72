//! Agent: starts ranks and keepers on a remote machine for the launcher, which decides everything.

use super::{
    agent_protocol::{AgentCommand, AgentReport, Hello, HelloReply, StartedKeeper, send_line},
    processes::RankProcesses,
    spawn::spawn_keeper,
};
use crate::{
    cli::TrainArgs,
    config_file,
    hint::{self, hinted},
    keeper::KeeperSettings,
    signals::{Signals, StopMode},
};
use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;
use std::{
    io::{BufRead, BufReader},
    net::{IpAddr, TcpStream},
    path::Path,
    process::{Child, ExitCode},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    time::{Duration, Instant},
};

const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The launcher may start after its agents.
const RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(600);
const RECONNECT_INTERVAL: Duration = Duration::from_millis(200);
/// The time after which an agent says that it waits for the launcher.
const SILENT_WAIT: Duration = Duration::from_secs(5);

/// Runs the agent of `machine` until the launcher at `head` ends the run.
pub(super) fn run(
    args: &TrainArgs,
    machine: usize,
    head: &str,
    signals: &Signals,
) -> Result<ExitCode> {
    let config = config_file::load(&args.config)?;
    let dir = config.run.dir.clone();
    std::fs::create_dir_all(dir.join("logs"))
        .with_context(|| format!("cannot create the run's folder {}", dir.display()))?;
    signals.set_mode(StopMode::Count);
    let stream = connect(head, signals)?;
    let address = stream
        .local_addr()
        .context("cannot read this machine's address")?
        .ip();
    let mut writer = stream
        .try_clone()
        .context("cannot share the connection to the launcher")?;
    let mut reader = BufReader::new(stream);
    let hello = Hello {
        machine,
        ranks: args.nproc_per_node,
        version: env!("CARGO_PKG_VERSION").to_string(),
    };
    send_line(&mut writer, &hello)?;
    match read_reply(&mut reader, head)? {
        HelloReply::Accepted => {
            eprintln!("machine {machine} ({address}) joined the launcher at {head}")
        }
        HelloReply::Refused(reason) => {
            bail!("the launcher at {head} refused this machine: {reason}")
        }
    }
    let (sender, commands) = channel();
    std::thread::spawn(move || receive_commands(reader, &sender));
    let agent = Agent {
        address,
        ranks: RankProcesses::new(args, &dir),
        dir: &dir,
        keepers: Vec::new(),
        writer,
        number: 0,
        reported: None,
    };
    agent.serve(&commands, signals, machine, head)
}

fn read_reply(reader: &mut impl BufRead, head: &str) -> Result<HelloReply> {
    let mut line = String::new();
    reader
        .read_line(&mut line)
        .with_context(|| format!("no reply from {head}"))?;
    serde_json::from_str(&line).with_context(|| format!("{head} is not a moerun launcher"))
}

/// Passes commands on until the connection ends or carries something else.
fn receive_commands(reader: impl BufRead, commands: &Sender<AgentCommand>) {
    for line in reader.lines() {
        let Ok(line) = line else { return };
        let Ok(command) = serde_json::from_str(&line) else {
            return;
        };
        if commands.send(command).is_err() {
            return;
        }
    }
}

/// The part of [`AgentReport::Ranks`] that a new report is sent for.
#[derive(Clone, Copy, PartialEq, Eq)]
struct RankCounts {
    number: u64,
    running: usize,
    failed: usize,
}

struct Agent<'a> {
    address: IpAddr,
    dir: &'a Path,
    ranks: RankProcesses<'a>,
    keepers: Vec<Child>,
    writer: TcpStream,
    /// Number of the last command about ranks.
    number: u64,
    reported: Option<RankCounts>,
}

impl Agent<'_> {
    fn serve(
        mut self,
        commands: &Receiver<AgentCommand>,
        signals: &Signals,
        machine: usize,
        head: &str,
    ) -> Result<ExitCode> {
        loop {
            match commands.recv_timeout(POLL_INTERVAL) {
                Ok(AgentCommand::End { code }) => {
                    self.ranks.kill_all();
                    return Ok(ExitCode::from(code));
                }
                Ok(command) => self.handle(command)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.ranks.kill_all();
                    bail!(
                        "the launcher at {head} is gone: killed the ranks of this machine; \
                         its keepers stay for an hour"
                    );
                }
            }
            if signals.stop_count() > 0 {
                // To the launcher this machine is lost.
                self.ranks.kill_all();
                return Err(hinted(
                    anyhow!("machine {machine} was stopped without a checkpoint"),
                    "stop the launcher instead: it writes one",
                ));
            }
            self.report()?;
        }
    }

    fn handle(&mut self, command: AgentCommand) -> Result<()> {
        match command {
            AgentCommand::Start {
                number,
                assignments,
            } => {
                self.number = number;
                if let Err(error) = self.ranks.start(&assignments) {
                    // The launcher sees failed ranks, and restarts them or gives up.
                    eprintln!("error: {}", hint::message(&error));
                    self.ranks.kill();
                }
            }
            AgentCommand::StandBy { count } => self.ranks.stand_by(count),
            AgentCommand::Signal { signal } => {
                let signal = Signal::try_from(signal).unwrap_or(Signal::SIGTERM);
                self.ranks.signal(signal);
            }
            AgentCommand::Kill { number, standby } => {
                self.number = number;
                if standby {
                    self.ranks.kill_all();
                } else {
                    self.ranks.kill();
                }
            }
            AgentCommand::StartKeeper {
                number,
                node,
                settings,
            } => {
                let started = self.start_keeper(node, settings);
                let started = started.map_err(|error| format!("{error:#}"));
                send_line(&mut self.writer, &AgentReport::Keeper { number, started })?;
            }
            AgentCommand::KillKeeper { pid } => self.kill_keeper(pid),
            AgentCommand::End { .. } => unreachable!("handled by serve"),
        }
        Ok(())
    }

    fn start_keeper(&mut self, node: usize, mut settings: KeeperSettings) -> Result<StartedKeeper> {
        settings.listen.set_ip(self.address);
        let (child, ready) = spawn_keeper(self.dir, node, &settings)?;
        let pid = child.id() as i32;
        self.keepers.push(child);
        Ok(StartedKeeper { pid, ready })
    }

    fn kill_keeper(&mut self, pid: i32) {
        for keeper in &mut self.keepers {
            if keeper.id() as i32 == pid {
                let _ = keeper.kill();
                let _ = keeper.wait();
            }
        }
    }

    /// Reports the ranks' state if it changed.
    fn report(&mut self) -> Result<()> {
        let running = self.ranks.running();
        let failed = self.ranks.failed();
        let number = self.number;
        let counts = RankCounts {
            number,
            running,
            failed: failed.len(),
        };
        if self.reported == Some(counts) {
            return Ok(());
        }
        self.reported = Some(counts);
        let report = AgentReport::Ranks {
            number,
            running,
            failed,
        };
        send_line(&mut self.writer, &report)
    }
}

fn connect(head: &str, signals: &Signals) -> Result<TcpStream> {
    let began = Instant::now();
    let mut announced = false;
    loop {
        match TcpStream::connect(head) {
            Ok(stream) => {
                stream
                    .set_nodelay(true)
                    .context("cannot configure the connection to the launcher")?;
                return Ok(stream);
            }
            Err(error) if began.elapsed() > RENDEZVOUS_TIMEOUT => {
                return Err(hinted(
                    anyhow!("no launcher answers at {head}: {error}"),
                    "start moerun with --node-rank 0 there",
                ));
            }
            Err(_) if signals.stop_count() > 0 => {
                bail!("stopped while waiting for the launcher at {head}")
            }
            Err(error) => {
                if !announced && began.elapsed() > SILENT_WAIT {
                    eprintln!("waiting for the launcher at {head} ({error})");
                    announced = true;
                }
                std::thread::sleep(RECONNECT_INTERVAL);
            }
        }
    }
}
