//! `moerun chaos`: faults made on purpose in a run that is going on, from a seed, and how long it takes to recover.
//!
//! Faults are carried out by the keeper of the node that they concern, so this works on whatever machines the run is.

use crate::cli::ChaosArgs;
use crate::registry::KeeperRegistry;
use crate::snapshot::ask_all;
use anyhow::{Context, Result, anyhow, bail};
use checkpoint::keeper::{Fault, Status};
use clap::ValueEnum;
use nix::sys::signal::Signal;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How often the run is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FaultKind {
    /// SIGKILL for a rank
    Kill,
    /// SIGSTOP for a rank: it hangs
    Stop,
    /// SIGABRT for a rank
    Abort,
    /// A rank stops for a second and goes on
    Delay,
    /// One bit of a rank's newest snapshot changes
    Corrupt,
    /// A rank's newest snapshot gets values that are not numbers, with checksums that fit
    Poison,
    /// All ranks and the keeper of a node die
    KillNode,
}

impl FaultKind {
    /// Whether the run has to be restarted after it.
    fn is_fatal(self) -> bool {
        matches!(
            self,
            FaultKind::Kill | FaultKind::Stop | FaultKind::Abort | FaultKind::KillNode
        )
    }
}

/// A fault, a number of steps after the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PlannedFault {
    kind: FaultKind,
    /// A rank, or for `kill-node` a node, modulo how many there are.
    target: u64,
    /// Steps after the last recovery.
    after: u64,
    /// How far into the next step, in thousandths of a step's time.
    offset_per_mille: u64,
    /// Which byte.
    at: u64,
}

/// The same faults for the same seed.
fn plan(seed: u64, faults: usize, kinds: &[FaultKind], gap: u64) -> Vec<PlannedFault> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..faults)
        .map(|_| PlannedFault {
            kind: kinds[(random.next_u64() % kinds.len() as u64) as usize],
            target: random.next_u64(),
            after: 1 + random.next_u64() % (2 * gap).max(1),
            offset_per_mille: random.next_u64() % 1000,
            at: random.next_u64(),
        })
        .collect()
}

/// A run at one moment.
struct RunState {
    registry: KeeperRegistry,
    statuses: Vec<Option<Status>>,
    generation: u64,
    step: u64,
}

fn observe(args: &ChaosArgs) -> Result<RunState> {
    let registry = KeeperRegistry::load(&args.run)?.ok_or_else(|| {
        anyhow!(
            "{} has no keepers: is it running, with snapshots?",
            args.run.display()
        )
    })?;
    let statuses: Vec<Option<Status>> = ask_all(&registry).into_iter().map(Result::ok).collect();
    let there = || statuses.iter().flatten();
    let generation = there()
        .flat_map(|s| s.inventory.memberships.iter().map(|(t, _)| t.generation))
        .max()
        .unwrap_or(0);
    // A rank that has not done a step in this attempt says 0.
    let steps = there().flat_map(|status| status.ranks.iter().map(|rank| rank.step));
    let step = steps.max().unwrap_or(0);
    Ok(RunState {
        generation,
        step,
        registry,
        statuses,
    })
}

/// Waits until the run is where `is_there` says.
fn wait(args: &ChaosArgs, what: &str, is_there: impl Fn(&RunState) -> bool) -> Result<RunState> {
    let begun = Instant::now();
    loop {
        let moment = observe(args)?;
        if is_there(&moment) {
            return Ok(moment);
        }
        if begun.elapsed() > Duration::from_secs(args.timeout_s) {
            bail!(
                "{what} did not come within {} s: the run is at step {}",
                args.timeout_s,
                moment.step
            );
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

pub(crate) fn run(args: &ChaosArgs) -> Result<ExitCode> {
    let planned = plan(args.seed, args.faults, &args.kinds, args.gap);
    let mut recoveries = Vec::new();
    let mut from = observe(args)?;
    for fault in &planned {
        let due = from.step + fault.after;
        let reached = wait(args, &format!("step {due}"), |moment| moment.step >= due);
        let moment = match reached {
            Ok(moment) => moment,
            // The run has come to its end.
            Err(_) if KeeperRegistry::load(&args.run)?.is_none() => break,
            Err(error) => return Err(error),
        };
        std::thread::sleep(Duration::from_micros(fault.offset_per_mille * args.step_ms));
        let ranks: Vec<(usize, usize)> = moment
            .statuses
            .iter()
            .enumerate()
            .flat_map(|(node, status)| {
                status
                    .iter()
                    .flat_map(move |status| status.ranks.iter().map(move |r| (node, r.rank)))
            })
            .collect();
        if ranks.is_empty() {
            from = moment;
            continue;
        }
        let (mut node, rank) = ranks[(fault.target % ranks.len() as u64) as usize];
        let signal = |signal: Signal| Fault::Signal {
            rank,
            signal: signal as i32,
        };
        let (order, what) = match fault.kind {
            FaultKind::Kill => (signal(Signal::SIGKILL), format!("rank {rank} is killed")),
            FaultKind::Stop => (signal(Signal::SIGSTOP), format!("rank {rank} is stopped")),
            FaultKind::Abort => (signal(Signal::SIGABRT), format!("rank {rank} aborts")),
            FaultKind::Delay => (
                Fault::Delay { rank, ms: 1000 },
                format!("rank {rank} is delayed by a second"),
            ),
            FaultKind::Corrupt => (
                Fault::Corrupt { rank, at: fault.at },
                format!("a bit of rank {rank}'s snapshot changes"),
            ),
            FaultKind::Poison => (
                Fault::Poison { rank },
                format!("rank {rank}'s snapshot is poisoned"),
            ),
            FaultKind::KillNode => {
                let nodes: Vec<usize> = ranks.iter().map(|(node, _)| *node).collect();
                node = nodes[(fault.target % nodes.len() as u64) as usize];
                (Fault::KillNode, format!("node {node} dies"))
            }
        };
        let begun = Instant::now();
        let made = moment
            .registry
            .connect(node, Duration::from_secs(5))
            .and_then(|mut peer| {
                // A keeper that kills itself does not answer.
                match peer.inject(order) {
                    Err(error) if fault.kind != FaultKind::KillNode => Err(anyhow!("{error}")),
                    _ => Ok(()),
                }
            });
        if let Err(error) = made {
            println!("step {}: {what}: not made: {error:#}", moment.step);
            from = moment;
            continue;
        }
        if !fault.kind.is_fatal() {
            println!("step {}: {what}", moment.step);
            from = moment;
            continue;
        }
        let generation = moment.generation;
        let next = wait(args, "the next step", |moment| {
            moment.generation > generation && moment.step > 0
        });
        let next = next.with_context(|| format!("step {}: {what}", moment.step))?;
        let seconds = begun.elapsed().as_secs_f64();
        println!(
            "step {}: {what}; step {} was done {seconds:.2} s later",
            moment.step, next.step
        );
        recoveries.push(seconds);
        from = next;
    }
    recoveries.sort_by(f64::total_cmp);
    if let (Some(longest), median) = (recoveries.last(), recoveries.get(recoveries.len() / 2)) {
        println!(
            "{} recoveries: median {:.2} s, longest {longest:.2} s",
            recoveries.len(),
            median.copied().unwrap_or_default()
        );
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_says_it_all() {
        let kinds = [FaultKind::Kill, FaultKind::Corrupt];
        assert_eq!(plan(7, 50, &kinds, 3), plan(7, 50, &kinds, 3));
        assert_ne!(plan(7, 50, &kinds, 3), plan(8, 50, &kinds, 3));
        let planned = plan(7, 500, &kinds, 3);
        assert!(
            planned
                .iter()
                .all(|fault| (1..=6).contains(&fault.after) && kinds.contains(&fault.kind))
        );
        assert!(planned.iter().any(|fault| fault.kind == FaultKind::Corrupt));
    }
}
