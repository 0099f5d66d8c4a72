//! `moerun chaos`: injects faults into a live run and measures how long it takes to recover.
//!
//! The keeper of the node concerned carries out each fault, so this works on several machines.

use crate::{
    cli::ChaosArgs,
    fault::{FaultKind, FaultPlan, PlannedFault},
    hint::hinted,
    registry::KeeperRegistry,
};
use anyhow::{Context, Result, anyhow, bail};
use checkpoint::keeper::{Fault, Status};
use nix::sys::signal::Signal;
use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

const POLL_INTERVAL: Duration = Duration::from_millis(20);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) fn run(args: &ChaosArgs) -> Result<ExitCode> {
    let plan = FaultPlan {
        seed: args.seed,
        faults: args.faults,
        kinds: &args.kinds,
        gap: args.gap,
    };
    let mut recoveries = Vec::new();
    let mut last = observe(args)?;
    for fault in plan.faults() {
        let due = last.step + fault.after;
        let reached = wait(args, &format!("step {due}"), |state| state.step >= due);
        let state = match reached {
            Ok(state) => state,
            // The run is done.
            Err(_) if KeeperRegistry::load(&args.run)?.is_none() => break,
            Err(error) => return Err(error),
        };
        std::thread::sleep(Duration::from_micros(fault.offset_per_mille * args.step_ms));
        let Some(injection) = Injection::new(&fault, &state) else {
            last = state;
            continue;
        };
        let step = state.step;
        let what = injection.description.clone();
        let began = Instant::now();
        if let Err(error) = injection.run(&state) {
            println!("step {step}: {what}: not injected: {error:#}");
            last = state;
            continue;
        }
        if !fault.kind.is_fatal() {
            println!("step {step}: {what}");
            last = state;
            continue;
        }
        let has_recovered = |next: &RunState| next.generation > state.generation && next.step > 0;
        last = wait(args, "the next step", has_recovered)
            .with_context(|| format!("step {step}: {what}"))?;
        let seconds = began.elapsed().as_secs_f64();
        let recovered = last.step;
        println!("step {step}: {what}; step {recovered} was done {seconds:.2} s later");
        recoveries.push(seconds);
    }
    print_summary(&mut recoveries);
    Ok(ExitCode::SUCCESS)
}

fn print_summary(recoveries: &mut [f64]) {
    recoveries.sort_by(f64::total_cmp);
    let count = recoveries.len();
    if let Some(longest) = recoveries.last() {
        let median = recoveries[count / 2];
        println!("{count} recoveries: median {median:.2} s, longest {longest:.2} s");
    }
}

/// A run at one moment.
struct RunState {
    registry: KeeperRegistry,
    /// None for keepers that do not answer.
    statuses: Vec<Option<Status>>,
    generation: u64,
    step: u64,
}

/// A live rank and its node.
#[derive(Clone, Copy)]
struct LiveRank {
    node: usize,
    rank: usize,
}

impl RunState {
    fn live_ranks(&self) -> Vec<LiveRank> {
        let mut live = Vec::new();
        for (node, status) in self.statuses.iter().enumerate() {
            for rank in status.iter().flat_map(|status| &status.ranks) {
                let rank = rank.rank;
                live.push(LiveRank { node, rank });
            }
        }
        live
    }
}

fn observe(args: &ChaosArgs) -> Result<RunState> {
    let registry = KeeperRegistry::load(&args.run)?.ok_or_else(|| {
        hinted(
            anyhow!("{} has no keepers", args.run.display()),
            "start the run, with snapshot.every above 0",
        )
    })?;
    let statuses: Vec<Option<Status>> = registry.statuses().into_iter().map(Result::ok).collect();
    let answers = || statuses.iter().flatten();
    let memberships = answers().flat_map(|status| &status.inventory.memberships);
    let generations = memberships.map(|(topology, _)| topology.generation);
    let generation = generations.max().unwrap_or(0);
    // The step is 0 for a rank that has not done one in this generation.
    let ranks = answers().flat_map(|status| &status.ranks);
    let step = ranks.map(|rank| rank.step).max().unwrap_or(0);
    Ok(RunState {
        generation,
        step,
        registry,
        statuses,
    })
}

/// Waits until `is_reached` holds for the run's state.
fn wait(args: &ChaosArgs, what: &str, is_reached: impl Fn(&RunState) -> bool) -> Result<RunState> {
    let timeout = Duration::from_secs(args.timeout_s);
    let began = Instant::now();
    loop {
        let state = observe(args)?;
        if is_reached(&state) {
            return Ok(state);
        }
        if began.elapsed() > timeout {
            let step = state.step;
            bail!("{what} not reached within {timeout:.0?}: the run is at step {step}");
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// A fault aimed at a keeper.
struct Injection {
    node: usize,
    fault: Fault,
    description: String,
    /// True if the keeper dies, and so cannot reply.
    kills_keeper: bool,
}

impl Injection {
    /// Aims a fault. Returns None if no rank is live.
    fn new(fault: &PlannedFault, state: &RunState) -> Option<Injection> {
        let ranks = state.live_ranks();
        if ranks.is_empty() {
            return None;
        }
        let LiveRank { node, rank } = ranks[(fault.target % ranks.len() as u64) as usize];
        let signal = |signal: Signal| Fault::Signal {
            rank,
            signal: signal as i32,
        };
        let (order, description) = match fault.kind {
            FaultKind::Kill => (signal(Signal::SIGKILL), format!("rank {rank} is killed")),
            FaultKind::Stop => (signal(Signal::SIGSTOP), format!("rank {rank} is stopped")),
            FaultKind::Abort => (signal(Signal::SIGABRT), format!("rank {rank} aborts")),
            FaultKind::Delay => (
                Fault::Delay { rank, ms: 1000 },
                format!("rank {rank} is delayed by a second"),
            ),
            FaultKind::Corrupt => (
                Fault::Corrupt {
                    rank,
                    at: fault.byte,
                },
                format!("a bit of rank {rank}'s snapshot flips"),
            ),
            FaultKind::Poison => (
                Fault::Poison { rank },
                format!("rank {rank}'s snapshot is poisoned"),
            ),
            FaultKind::KillNode => (Fault::KillNode, format!("node {node} dies")),
        };
        Some(Injection {
            node,
            fault: order,
            description,
            kills_keeper: fault.kind == FaultKind::KillNode,
        })
    }

    fn run(self, state: &RunState) -> Result<()> {
        let mut peer = state.registry.connect(self.node, CONNECT_TIMEOUT)?;
        match peer.inject(self.fault) {
            Err(error) if !self.kills_keeper => Err(anyhow!("{error}")),
            _ => Ok(()),
        }
    }
}
