//! Injecting faults on purpose.

use super::{
    checksums::Checksums,
    daemon::Keeper,
    fault::Fault,
    layout::{chunk_len, num_chunks},
    restore::local_header,
};
use crate::{checksum::crc32c, secure::Error};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::time::Duration;

/// Number of bytes that [`Fault::Poison`] overwrites.
const POISONED_BYTES: usize = 256;

/// Injects a fault into a rank, its newest part or the node.
///
/// # Errors
/// If the rank, its part or the signal does not exist.
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
    // A process in another namespace of process ids has none here: 0 would be this one's group.
    match keeper.apply(|state| state.pid(rank)).filter(|&pid| pid > 1) {
        Some(pid) => Ok(Pid::from_raw(pid)),
        None => {
            let reason = format!("rank {rank} is not here");
            Err(Error::Refused(reason))
        }
    }
}

fn send_signal(keeper: &Keeper, rank: usize, number: i32) -> Result<(), Error> {
    let Ok(signal) = Signal::try_from(number) else {
        let reason = format!("there is no signal {number}");
        return Err(Error::Refused(reason));
    };
    kill(process(keeper, rank)?, signal)?;
    Ok(())
}

fn delay(keeper: &Keeper, rank: usize, duration: Duration) -> Result<(), Error> {
    let pid = process(keeper, rank)?;
    kill(pid, Signal::SIGSTOP)?;
    let resume = move || {
        std::thread::sleep(duration);
        // The process may have been killed meanwhile.
        let _ = kill(pid, Signal::SIGCONT);
    };
    if let Err(error) = std::thread::Builder::new().spawn(resume) {
        kill(pid, Signal::SIGCONT)?;
        return Err(error.into());
    }
    Ok(())
}

fn corrupt(keeper: &Keeper, rank: usize, at: u64) -> Result<(), Error> {
    let newest = keeper.apply(|state| state.newest_part(rank));
    let found = newest.and_then(|(slot, bytes)| Some((keeper.region(slot)?, bytes)));
    let Some((region, bytes)) = found else {
        let reason = format!("no complete part of rank {rank} is here");
        return Err(Error::Refused(reason));
    };
    let position = at % bytes.max(1);
    region.write(position as usize, 1, |byte| {
        byte[0] ^= 1 << (at % 8);
    });
    Ok(())
}

fn poison(keeper: &Keeper, rank: usize) -> Result<(), Error> {
    let newest = keeper.apply(|state| state.newest());
    let Some(id) = newest else {
        let reason = "no complete snapshot is here";
        return Err(Error::Refused(reason.into()));
    };
    let start = local_header(keeper, id, rank)?.len();
    let chunk_bytes = keeper.apply(|state| state.chunk_bytes(id))?;
    let crcs = keeper.read_part(id, rank, u64::MAX, |region, part| {
        let end = (start + POISONED_BYTES).min(part.bytes as usize) / 4 * 4;
        for position in (start..end).step_by(4) {
            region.copy_in(position, &f32::NAN.to_le_bytes());
        }
        let mut crcs = Vec::new();
        for chunk in 0..num_chunks(part.bytes, chunk_bytes) {
            let mut bytes = vec![0; chunk_len(part.bytes, chunk_bytes, chunk)];
            region.copy_out(chunk as usize * chunk_bytes, &mut bytes);
            crcs.push(crc32c(&bytes));
        }
        crcs
    })?;
    let checksums = Checksums::new(crcs);
    keeper.apply(|state| state.replace_checksums(id, rank, checksums));
    Ok(())
}

fn kill_node(keeper: &Keeper) -> Result<(), Error> {
    for pid in keeper.apply(|state| state.pids()) {
        if pid > 1 {
            // A rank that is gone already needs no signal.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    kill(Pid::this(), Signal::SIGKILL)?;
    Ok(())
}
