//! Something that several ranks do besides training, such as a bench: this program once more for each, or the ranks that a
//! launcher started.

use crate::environment::{self, DetectedRank};
use anyhow::{Context, Result, anyhow, bail};
use parallel::{Backend, Cpu, RankEnv, World};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;
use torch_ext::Store;

/// No operation among the ranks takes longer.
pub(crate) const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(300);

/// Runs `body` on `count` ranks of one thread: this process only starts them, or is one of them. Under torchrun's
/// environment it is a rank in any case.
pub(crate) fn run_on_ranks(
    count: usize,
    body: impl FnOnce(&RankEnv) -> Result<()>,
) -> Result<ExitCode> {
    match environment::detect_rank()? {
        Some(DetectedRank { env, .. }) => {
            crate::rank::exit_with_launcher()?;
            tch::set_num_threads(1);
            let code = match body(&env) {
                Ok(()) => 0,
                Err(error) => {
                    eprintln!("error: rank {}: {error:#}", env.rank);
                    1
                }
            };
            if code == 0 {
                crate::rank::finalize_mpi();
            }
            // Without destructors: a communicator whose peers are gone would wait for them.
            signal_hook::low_level::exit(code)
        }
        None => start(count),
    }
}

/// Joins the other ranks, with tensors on the host; worlds with different numbers have nothing to do with each other.
pub(crate) fn join_world(env: &RankEnv, number: usize) -> Result<World> {
    let again = env.for_another_world(number);
    let env = if number == 0 { env } else { &again };
    World::join(env, COLLECTIVE_TIMEOUT, Backend::Auto, &Cpu).context("the ranks cannot be joined")
}

fn start(count: usize) -> Result<ExitCode> {
    let store = Store::tcp("127.0.0.1", 0, true, Duration::from_secs(10))
        .map_err(|e| anyhow!("cannot serve: {e}"))?;
    let master_port = store.port()?;
    let this = std::env::current_exe().context("cannot find this program's own file")?;
    let mut children = Vec::new();
    for rank in 0..count {
        let env = RankEnv::single_node(rank, count, master_port);
        let mut command = Command::new(&this);
        command
            .args(std::env::args_os().skip(1))
            .envs(environment::torchrun_variables(&env));
        command
            .env(environment::LAUNCHER_PID, std::process::id().to_string())
            .env("OMP_NUM_THREADS", "1");
        // One of them prints.
        command.stdin(Stdio::null()).stdout(if rank == 0 {
            Stdio::inherit()
        } else {
            Stdio::null()
        });
        children.push(
            command
                .spawn()
                .with_context(|| format!("cannot start rank {rank}"))?,
        );
    }
    let failed = wait(&mut children)?;
    children.iter_mut().for_each(|child| {
        let _ = child.kill();
        let _ = child.wait();
    });
    match failed {
        None => Ok(ExitCode::SUCCESS),
        Some(rank) => bail!("rank {rank} failed: see its message above"),
    }
}

/// Until all have ended, or one has failed: which.
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
