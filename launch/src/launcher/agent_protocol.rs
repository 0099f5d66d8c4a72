//! Messages between the launcher and its agents: lines of JSON over one TCP connection.

use super::processes::FailedRank;
use crate::{
    keeper::{KeeperSettings, Ready},
    protocol::Assignment,
};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::{io::Write, net::TcpStream};

/// The first line of an agent.
#[derive(Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) machine: usize,
    /// Ranks that the agent's command line asks for.
    pub(super) ranks: usize,
    /// Must be the launcher's own: the protocol has no versions.
    pub(super) version: String,
}

#[derive(Serialize, Deserialize)]
pub(super) enum HelloReply {
    Accepted,
    /// The reason of the refusal.
    Refused(String),
}

#[derive(Serialize, Deserialize)]
pub(super) enum AgentCommand {
    /// Start these ranks. Reports with a smaller number concern earlier ones.
    Start {
        number: u64,
        assignments: Vec<Assignment>,
    },
    /// Keep `count` standby processes.
    StandBy {
        count: usize,
    },
    /// Send the ranks a signal.
    Signal {
        signal: i32,
    },
    /// Kill the ranks, and with `standby` also the standby processes.
    Kill {
        number: u64,
        standby: bool,
    },
    /// Start the keeper of `node`. The agent replaces the address by its machine's.
    StartKeeper {
        number: u64,
        node: usize,
        settings: KeeperSettings,
    },
    KillKeeper {
        pid: i32,
    },
    /// The run is over: exit with the launcher's status.
    End {
        code: u8,
    },
}

#[derive(Serialize, Deserialize)]
pub(super) enum AgentReport {
    /// State of the ranks since the command with this number.
    Ranks {
        number: u64,
        running: usize,
        failed: Vec<FailedRank>,
    },
    /// Reply to [`AgentCommand::StartKeeper`] with this number.
    Keeper {
        number: u64,
        started: Result<StartedKeeper, String>,
    },
}

/// A keeper's process and its answer.
#[derive(Serialize, Deserialize)]
pub(super) struct StartedKeeper {
    pub(super) pid: i32,
    pub(super) ready: Ready,
}

pub(super) fn send_line(writer: &mut TcpStream, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message).expect("plain data");
    line.push(b'\n');
    writer
        .write_all(&line)
        .context("lost the connection between launcher and agent")
}
