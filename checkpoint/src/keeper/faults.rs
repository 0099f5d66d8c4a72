//! Faults on purpose, with which `moerun chaos` and tests prove that a run survives them.

use super::daemon::Keeper;
use super::error::Error;
use super::layout::chunk_len;
use super::restore::local_header;
use crate::checksum::crc32c;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How many bytes of values [`Fault::Poison`] overwrites.
const POISONED_BYTES: usize = 256;

/// A fault to be made on purpose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// Sends a signal (`SIGKILL`, `SIGSTOP`, `SIGABRT`), given by number, to a rank's process.
    Signal { rank: usize, signal: i32 },
    /// Stops a rank and continues it after some milliseconds.
    Delay { rank: usize, ms: u64 },
    /// Flips one bit of a rank's newest complete part, in byte `at` modulo its length.
    Corrupt { rank: usize, at: u64 },
    /// Replaces the first values of a rank's newest complete part by NaN and updates the checksums:
    /// an intact snapshot of a useless state.
    Poison { rank: usize },
    /// Kills all ranks of the node and the keeper itself.
    KillNode,
}

pub(super) fn inject(keeper: &Keeper, fault: Fault) -> Result<(), Error> {
    match fault {
        Fault::Signal { rank, signal } => send_signal(keeper, rank, signal),
        Fault::Delay { rank, ms } => delay(keeper, rank, Duration::from_millis(ms)),
        Fault::Corrupt { rank, at } => corrupt(keeper, rank, at),
        Fault::Poison { rank } => poison(keeper, rank),
        Fault::KillNode => kill_node(keeper),
    }
}

fn process(keeper: &Keeper, rank: usize) -> Result<Pid, Error> {
    let pid = keeper.lock().ranks.pid(rank);
    let absent = || Error::Refused(format!("rank {rank} is not here"));
    pid.map(Pid::from_raw).ok_or_else(absent)
}

fn send_signal(keeper: &Keeper, rank: usize, number: i32) -> Result<(), Error> {
    let unknown = |_| Error::Refused(format!("there is no signal {number}"));
    let signal = Signal::try_from(number).map_err(unknown)?;
    kill(process(keeper, rank)?, signal)?;
    Ok(())
}

fn delay(keeper: &Keeper, rank: usize, duration: Duration) -> Result<(), Error> {
    let pid = process(keeper, rank)?;
    kill(pid, Signal::SIGSTOP)?;
    std::thread::spawn(move || {
        std::thread::sleep(duration);
        // The process may have been killed meanwhile.
        let _ = kill(pid, Signal::SIGCONT);
    });
    Ok(())
}

fn corrupt(keeper: &Keeper, rank: usize, at: u64) -> Result<(), Error> {
    let state = keeper.lock();
    let newest = state.slots.newest();
    let slot = newest.and_then(|id| state.slots.find(id, rank));
    let absent = || Error::Refused(format!("no complete part of rank {rank} is here"));
    let slot = slot.ok_or_else(absent)?;
    let bytes = state.slots.part(slot).map_or(1, |part| part.info.bytes);
    let position = at % bytes.max(1);
    state.region(slot).write(position as usize, 1, |byte| {
        byte[0] ^= 1 << (at % 8);
    });
    Ok(())
}

fn poison(keeper: &Keeper, rank: usize) -> Result<(), Error> {
    let newest = keeper.lock().slots.newest();
    let absent = || Error::Refused("no complete snapshot is here".into());
    let id = newest.ok_or_else(absent)?;
    let start = local_header(keeper, id, rank)?.len();
    let chunk_bytes = keeper.lock().chunk_bytes(id)?;
    let crcs = keeper.read_part(id, rank, u64::MAX, |region, info| {
        let end = (start + POISONED_BYTES).min(info.bytes as usize) / 4 * 4;
        for position in (start..end).step_by(4) {
            region.copy_in(position, &f32::NAN.to_le_bytes());
        }
        let mut crcs = Vec::with_capacity(info.crcs.len());
        for chunk in 0..info.crcs.len() {
            let mut bytes = vec![0; chunk_len(info.bytes, chunk_bytes, chunk as u64)];
            region.copy_out(chunk * chunk_bytes, &mut bytes);
            crcs.push(crc32c(&bytes));
        }
        crcs
    })?;
    keeper.lock().replace_checksums(id, rank, crcs);
    Ok(())
}

fn kill_node(keeper: &Keeper) -> Result<(), Error> {
    let state = keeper.lock();
    for pid in state.ranks.pids() {
        // A rank that is gone already needs no signal.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    kill(Pid::this(), Signal::SIGKILL)?;
    Ok(())
}
