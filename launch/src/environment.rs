//! The only reader of the launchers' environment variables.

use anyhow::{Context, Result, anyhow, bail};
use parallel::RankEnv;
use std::env::var;

/// Tells a rank that `moerun` itself started it, and with which process id, so that it can end with the launcher.
pub(crate) const LAUNCHER_PID: &str = "MOERUN_LAUNCHER_PID";

/// Whether `moerun` itself started this process; it then says on standard input what the process is to do.
pub(crate) fn is_launched() -> bool {
    var(LAUNCHER_PID).is_ok()
}

/// What torchrun's variables say, or None where there is no RANK.
pub(crate) fn rank() -> Result<Option<RankEnv>> {
    if var("RANK").is_err() {
        return Ok(None);
    }
    let env = RankEnv {
        rank: number("RANK")?,
        world_size: number("WORLD_SIZE")?,
        local_rank: number_or("LOCAL_RANK", "RANK")?,
        local_world_size: number_or("LOCAL_WORLD_SIZE", "WORLD_SIZE")?,
        master_addr: var("MASTER_ADDR")
            .context("RANK is set but MASTER_ADDR is not: unset RANK, or set what torchrun sets")?,
        master_port: number("MASTER_PORT")?,
        launcher_serves: var("TORCHELASTIC_USE_AGENT_STORE").is_ok_and(|value| value == "True"),
        attempt: if var("TORCHELASTIC_RESTART_COUNT").is_ok() { number("TORCHELASTIC_RESTART_COUNT")? } else { 0 },
        interface: var("GLOO_SOCKET_IFNAME").ok().filter(|name| !name.is_empty()),
    };
    if env.rank >= env.world_size {
        bail!("RANK={} is not below WORLD_SIZE={}", env.rank, env.world_size);
    }
    Ok(Some(env))
}

/// The variables that [`rank`] reads.
pub(crate) fn variables(env: &RankEnv) -> Vec<(&'static str, String)> {
    vec![
        ("RANK", env.rank.to_string()),
        ("WORLD_SIZE", env.world_size.to_string()),
        ("LOCAL_RANK", env.local_rank.to_string()),
        ("LOCAL_WORLD_SIZE", env.local_world_size.to_string()),
        ("MASTER_ADDR", env.master_addr.clone()),
        ("MASTER_PORT", env.master_port.to_string()),
        ("TORCHELASTIC_USE_AGENT_STORE", if env.launcher_serves { "True" } else { "False" }.to_string()),
        ("TORCHELASTIC_RESTART_COUNT", env.attempt.to_string()),
    ]
}

fn number<T: std::str::FromStr>(name: &str) -> Result<T> {
    let text =
        var(name).map_err(|_| anyhow!("RANK is set but {name} is not: unset RANK, or set what torchrun sets"))?;
    text.parse().map_err(|_| anyhow!("{name}={text} is not a number that fits"))
}

fn number_or<T: std::str::FromStr>(name: &str, other: &str) -> Result<T> {
    number(if var(name).is_ok() { name } else { other })
}
