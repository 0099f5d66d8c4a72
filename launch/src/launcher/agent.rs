//! A machine that is not the one of the launcher: this process does there what the launcher does on its own, and tells it what
//! became of it. All decisions stay with the launcher.
//!
//! Lines of JSON over one TCP connection, which the agent opens.

use super::Signals;
use super::assignment::Assignment;
use super::processes::{FailedRank, RankProcesses};
use super::spawn::spawn_keeper;
use crate::cli::TrainArgs;
use crate::config_file;
use crate::keeper::{KeeperSettings, Ready};
use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, ExitCode};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The first line of an agent.
#[derive(Serialize, Deserialize)]
pub(super) struct Hello {
    /// Which machine of the run it is.
    pub(super) machine: usize,
    /// Ranks it would start.
    pub(super) ranks: usize,
    /// Other versions do other things.
    pub(super) version: String,
}

/// What the launcher answers to it.
#[derive(Serialize, Deserialize)]
pub(super) enum HelloReply {
    Accepted,
    /// Why not.
    Refused(String),
}

/// What an agent is to do.
#[derive(Serialize, Deserialize)]
pub(super) enum AgentCommand {
    /// Start these ranks. Reports that carry a smaller number are of earlier ones.
    Start {
        number: u64,
        assignments: Vec<Assignment>,
    },
    /// Have so many processes stand by.
    StandBy { count: usize },
    /// Send the ranks a signal.
    Signal { signal: i32 },
    /// End the ranks, and those who stand by too.
    Kill { number: u64, standby: bool },
    /// Start a keeper that logs as the one of `node`; its address is this machine's.
    Keeper {
        number: u64,
        node: usize,
        orders: KeeperSettings,
    },
    /// End a keeper.
    KillKeeper { pid: i32 },
    /// All is done: end like the launcher.
    End { code: u8 },
}

/// What an agent tells.
#[derive(Serialize, Deserialize)]
pub(super) enum AgentReport {
    /// How the ranks are, since the order with this number.
    Ranks {
        number: u64,
        running: usize,
        failed: Vec<FailedRank>,
    },
    /// A keeper has been started, or why it has not: the process and its answer.
    Keeper {
        number: u64,
        started: Result<(i32, Ready), String>,
    },
}

/// How often ranks are looked at.
const TICK: Duration = Duration::from_millis(20);
/// The launcher of a run may be started after its agents.
const RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(600);

pub(crate) fn run(args: &TrainArgs, machine: usize, head: &str) -> Result<ExitCode> {
    let config = config_file::load(&args.config)?;
    let dir = config.run.dir.clone();
    std::fs::create_dir_all(dir.join("logs"))
        .with_context(|| format!("cannot make the run's folder {}", dir.display()))?;
    let signals = Signals::install()?;
    let stream = connect(head, &signals)?;
    let own = stream
        .local_addr()
        .context("cannot see this machine's address")?
        .ip();
    let mut writer = stream.try_clone().context("cannot share the connection")?;
    let mut reader = BufReader::new(stream);
    let version = env!("CARGO_PKG_VERSION").to_string();
    send_line(
        &mut writer,
        &Hello {
            machine,
            ranks: args.nproc_per_node,
            version,
        },
    )?;
    let mut line = String::new();
    reader
        .read_line(&mut line)
        .with_context(|| format!("{head} said nothing"))?;
    match serde_json::from_str(&line).with_context(|| format!("{head} is no launcher of moerun"))? {
        HelloReply::Accepted => {
            eprintln!("machine {machine} ({own}) has joined the launcher at {head}")
        }
        HelloReply::Refused(reason) => {
            bail!("the launcher at {head} refuses this machine: {reason}")
        }
    }
    let (sender, orders) = channel();
    std::thread::spawn(move || {
        for line in reader.lines() {
            let Some(order) = line
                .ok()
                .and_then(|line| serde_json::from_str::<AgentCommand>(&line).ok())
            else {
                return;
            };
            if sender.send(order).is_err() {
                return;
            }
        }
    });
    let mut ranks = RankProcesses::new(args, &dir);
    let mut keepers: Vec<Child> = Vec::new();
    let mut number = 0;
    let mut told = None;
    loop {
        match orders.recv_timeout(TICK) {
            Ok(AgentCommand::Start {
                number: order,
                assignments,
            }) => {
                number = order;
                if let Err(error) = ranks.start(&assignments) {
                    // The launcher sees ranks that have ended, and starts again or gives up.
                    eprintln!("error: {error:#}");
                    ranks.kill();
                }
            }
            Ok(AgentCommand::StandBy { count }) => ranks.stand_by(count),
            Ok(AgentCommand::Signal { signal }) => {
                ranks.signal(Signal::try_from(signal).unwrap_or(Signal::SIGTERM))
            }
            Ok(AgentCommand::Kill {
                number: order,
                standby,
            }) => {
                number = order;
                if standby {
                    ranks.kill_all()
                } else {
                    ranks.kill()
                }
            }
            Ok(AgentCommand::Keeper {
                number,
                node,
                mut orders,
            }) => {
                orders.listen.set_ip(own);
                let started =
                    spawn_keeper(&dir, node, &orders).map_err(|error| format!("{error:#}"));
                let started = started.map(|(child, ready)| {
                    let pid = child.id() as i32;
                    keepers.push(child);
                    (pid, ready)
                });
                send_line(&mut writer, &AgentReport::Keeper { number, started })?;
            }
            Ok(AgentCommand::KillKeeper { pid }) => {
                for keeper in keepers
                    .iter_mut()
                    .filter(|keeper| keeper.id() as i32 == pid)
                {
                    let _ = keeper.kill();
                    let _ = keeper.wait();
                }
            }
            Ok(AgentCommand::End { code }) => {
                ranks.kill_all();
                return Ok(ExitCode::from(code));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                ranks.kill_all();
                bail!(
                    "the launcher at {head} is gone: the ranks of this machine were ended; its keepers stay for an hour"
                );
            }
        }
        if signals.count() > 0 {
            // The launcher takes this machine for lost.
            ranks.kill_all();
            bail!(
                "machine {machine} was stopped: stop the launcher instead for a checkpoint of this moment"
            );
        }
        let state = (number, ranks.running(), ranks.failed());
        let key = (state.0, state.1, state.2.len());
        if told != Some(key) {
            let (number, running, failed) = state;
            send_line(
                &mut writer,
                &AgentReport::Ranks {
                    number,
                    running,
                    failed,
                },
            )?;
            told = Some(key);
        }
    }
}

fn connect(head: &str, signals: &Signals) -> Result<TcpStream> {
    let began = Instant::now();
    let mut said = false;
    loop {
        match TcpStream::connect(head) {
            Ok(stream) => {
                stream
                    .set_nodelay(true)
                    .context("cannot set up the connection")?;
                return Ok(stream);
            }
            Err(error) if began.elapsed() > RENDEZVOUS_TIMEOUT => {
                return Err(anyhow!(
                    "no launcher answers at {head} ({error}): start moerun with --node-rank 0 there"
                ));
            }
            Err(_) if signals.count() > 0 => bail!("stopped before a launcher answered at {head}"),
            Err(error) => {
                if !said && began.elapsed() > Duration::from_secs(5) {
                    eprintln!("waiting for the launcher at {head} ({error})");
                    said = true;
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
}

/// Sends a line.
pub(super) fn send_line(writer: &mut TcpStream, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message).expect("plain data");
    line.push(b'\n');
    writer
        .write_all(&line)
        .context("the connection to the launcher broke")
}
