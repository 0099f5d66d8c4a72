//! The memory of this machine, against what a command would take.

use crate::hint::hinted;
use anyhow::{Result, anyhow};
use checkpoint::keeper::{format_mib, total_bytes};
use parallel::device_kind;
use trainer::{EqualRanks, config::Config};

/// Estimates are refused from this multiple of the machine's memory on. Below it, malloc, swap and
/// overcommitted pages may still let a run work.
const MARGIN: f64 = 1.5;
/// Memory of a rank's process without tensors.
const PROCESS_BYTES: u64 = 100 << 20;

/// Refuses a run on CPUs whose ranks on this machine would take far more memory than it has.
///
/// # Errors
/// If they would: the estimate and the machine's memory.
pub(crate) fn refuse_too_large(config: &Config, local_ranks: usize, ranks: usize) -> Result<()> {
    if device_kind(&config.run.device) != "cpu" {
        return Ok(());
    }
    // Ranks of a machine have neighboring numbers. The first machine is as loaded as any.
    let local = local_ranks.min(ranks);
    let memory = config
        .memory_of(0..local, ranks)
        .map_err(|error| anyhow!(error))?;
    let held = |equal: &EqualRanks| equal.ranks.len() as u128 * u128::from(equal.memory.total());
    let tensors: u128 = memory.iter().map(held).sum();
    let bytes = tensors + local as u128 * u128::from(PROCESS_BYTES);
    let plural = if local == 1 { "" } else { "s" };
    refuse_bytes(&format!("{local} rank{plural} on this machine"), bytes)
}

/// Refuses to take far more memory than this machine has.
///
/// # Errors
/// If `what` would: the estimate and the machine's memory.
pub(crate) fn refuse_bytes(what: &str, bytes: u128) -> Result<()> {
    let Some(available) = total_bytes().filter(|&all| bytes as f64 > MARGIN * all as f64) else {
        return Ok(());
    };
    let needed = format_mib(u64::try_from(bytes).unwrap_or(u64::MAX));
    let available = format_mib(available);
    Err(hinted(
        anyhow!("{what}: about {needed} of memory are needed, and this machine has {available}"),
        "reduce the sizes, or use more machines; 'moerun plan mesh' prints the estimate",
    ))
}
