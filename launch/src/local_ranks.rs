//! Runs a command other than training, such as a bench, on several ranks.
//!
//! Starts this program once for each rank, or uses the ranks that a launcher started.

use crate::{
    environment::{self, DetectedRank},
    hint, terminal,
};
use anyhow::{Context, Result, bail};
use parallel::{Backend, Cpu, RankEnv, StoreServer, World};
use std::{
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

pub(crate) const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(300);

/// Runs `body` on `count` ranks of one thread each.
///
/// This process only starts them. Under a launcher it is one of them, and exits when `body` ends.
pub(crate) fn run_on_ranks(
    count: usize,
    body: impl FnOnce(&RankEnv) -> Result<()>,
) -> Result<ExitCode> {
    match environment::detect_rank()? {
        Some(DetectedRank { env, .. }) => {
            crate::rank::exit_with_launcher()?;
            tch::set_num_threads(1);
            let status = match body(&env) {
                Ok(()) => {
                    crate::rank::finalize_mpi();
                    0
                }
                Err(error) => {
                    eprintln!("error: rank {}: {}", env.rank, hint::message(&error));
                    1
                }
            };
            terminal::flush();
            // Without destructors: a process group whose peers are gone would wait for them.
            signal_hook::low_level::exit(status)
        }
        None => start(count),
    }
}

/// Joins the other ranks, with tensors on the host. Worlds with different numbers are independent.
pub(crate) fn join_world(env: &RankEnv, number: usize) -> Result<World> {
    let again = env.for_another_world(number);
    let env = if number == 0 { env } else { &again };
    World::join(env, COLLECTIVE_TIMEOUT, Backend::Auto, &Cpu).context("cannot join the other ranks")
}

fn start(count: usize) -> Result<ExitCode> {
    let store = StoreServer::local().context("cannot serve the ranks' store")?;
    let this = std::env::current_exe().context("cannot find this program's file")?;
    let mut children = Vec::new();
    for rank in 0..count {
        let env = RankEnv::single_node(rank, count, store.access().clone());
        let mut command = Command::new(&this);
        command
            .args(std::env::args_os().skip(1))
            .envs(environment::torchrun_variables(&env));
        command
            .env(environment::LAUNCHER_PID, std::process::id().to_string())
            .env("OMP_NUM_THREADS", "1");
        // Only rank 0 prints results.
        let stdout = if rank == 0 {
            Stdio::inherit()
        } else {
            Stdio::null()
        };
        command.stdin(Stdio::null()).stdout(stdout);
        let child = command.spawn();
        children.push(child.with_context(|| format!("cannot start rank {rank}"))?);
    }
    let failed = wait(&mut children)?;
    for child in &mut children {
        let _ = child.kill();
        let _ = child.wait();
    }
    match failed {
        None => Ok(ExitCode::SUCCESS),
        Some(rank) => bail!("rank {rank} failed (see its message above)"),
    }
}

/// Waits until all ranks have exited or one has failed. Returns the failed one.
fn wait(children: &mut [Child]) -> Result<Option<usize>> {
    loop {
        let mut running = false;
        for (rank, child) in children.iter_mut().enumerate() {
            match child.try_wait().context("cannot wait for a rank")? {
                Some(status) if !status.success() => return Ok(Some(rank)),
                Some(_) => {}
                None => running = true,
            }
        }
        if !running {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
