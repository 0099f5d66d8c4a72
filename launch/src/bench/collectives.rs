//! `moerun bench collectives`: every collective at several sizes, by the path that training takes and by all others there are.

use super::{median, round};
use crate::cli::CollectivesArgs;
use crate::local_ranks::{COLLECTIVE_TIMEOUT, run_on_ranks};
use anyhow::{Context, Result, bail};
use parallel::{Backend, Communicator, Cpu, RankEnv, ReduceOp, World};
use serde_json::json;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// What is measured.
const OPERATIONS: [&str; 6] = [
    "all_reduce",
    "broadcast",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "send_recv",
];

pub(crate) fn run(args: &CollectivesArgs) -> Result<ExitCode> {
    if args.rounds == 0 || args.ranks < 2 {
        bail!("--rounds must be at least 1 and --ranks at least 2");
    }
    if let Some(wrong) = args
        .operation
        .iter()
        .find(|name| !OPERATIONS.contains(&name.as_str()))
    {
        bail!("--operation {wrong}: there are {}", OPERATIONS.join(", "));
    }
    run_on_ranks(args.ranks, |env| measure(args, env))
}

/// A path that an operation may take.
enum Side {
    /// A communicator of ours.
    Ours(Arc<dyn Communicator>),
    /// Gloo's own forms, as c10d calls them.
    Gloo(torch_ext::Gloo),
}

/// One operation's tensors: of `bytes` those that hold every rank's part.
struct Tensors {
    whole: Tensor,
    part: Tensor,
    other: Tensor,
}

fn measure(args: &CollectivesArgs, env: &RankEnv) -> Result<()> {
    let world = |number: usize, backend: Backend| {
        World::join(&env.for_another_world(number), COLLECTIVE_TIMEOUT, backend, &Cpu)
            .context("the ranks cannot be joined")
    };
    let auto = world(1, Backend::Auto)?;
    let gloo = world(2, Backend::Gloo)?;
    let mut sides = vec![
        ("moerun", Side::Ours(auto.all("all")?)),
        ("gloo composed", Side::Ours(gloo.all("all")?)),
    ];
    if let Some(own) = gloo.libtorch_gloo("plain")? {
        sides.push(("gloo", Side::Gloo(own)));
    }
    let mpi_launch = parallel::mpi_library().filter(|_| env.mpi_launch != parallel::MpiLaunch::No);
    // The world has to live as long as its groups.
    let mpi = mpi_launch
        .is_some()
        .then(|| world(3, Backend::Mpi))
        .transpose()?;
    if let Some(mpi) = &mpi {
        sides.push(("mpi", Side::Ours(mpi.all("all")?)));
    }
    let Side::Ours(all) = &sides[0].1 else {
        bail!("the first side is ours")
    };
    let all = all.clone();
    let size = auto.size();
    if auto.rank() == 0 {
        eprintln!(
            "{size} ranks; sides: {}",
            sides
                .iter()
                .map(|(name, _)| *name)
                .collect::<Vec<_>>()
                .join(", ")
        );
    }
    let chosen = |name: &&&str| {
        args.operation.is_empty() || args.operation.iter().any(|asked| asked == **name)
    };
    for &operation in OPERATIONS.iter().filter(chosen) {
        for &kib in &args.kib {
            let tensors = Tensors::new(kib * 1024, size);
            let mut times = vec![Vec::new(); sides.len()];
            // As many in a row as make the clock's own time small.
            let repeat = (4096 / kib.max(1)).clamp(2, 32);
            for turn in 0..args.rounds + 1 {
                for at in 0..sides.len() {
                    // Who comes first changes each round.
                    let at = (at + turn) % sides.len();
                    let side = &sides[at].1;
                    if !side.supports(operation) {
                        continue;
                    }
                    all.barrier()?.wait()?;
                    let started = Instant::now();
                    for _ in 0..repeat {
                        side.run(operation, &tensors)?;
                    }
                    let seconds =
                        Tensor::from_slice(&[started.elapsed().as_secs_f64() / repeat as f64]);
                    all.all_reduce(&seconds, ReduceOp::Max)?.wait()?;
                    // The first round warms caches.
                    if turn > 0 {
                        times[at].push(seconds.double_value(&[0]));
                    }
                }
            }
            if auto.rank() == 0 {
                let medians: Vec<(&str, f64)> = sides
                    .iter()
                    .zip(times)
                    .filter(|(_, times)| !times.is_empty())
                    .map(|((name, _), times)| (*name, median(times) * 1e6))
                    .collect();
                let others = medians[1..]
                    .iter()
                    .map(|(_, us)| *us)
                    .fold(f64::INFINITY, f64::min);
                let us: serde_json::Map<_, _> = medians
                    .iter()
                    .map(|(name, us)| (name.to_string(), json!(round(*us, 1))))
                    .collect();
                println!(
                    "{}",
                    json!({
                        "bench": "collectives", "operation": operation, "kib": kib, "ranks": size, "us": us,
                        "vs_fastest_other": round(medians[0].1 / others, 2), "rounds": args.rounds,
                    })
                );
            }
        }
    }
    all.barrier()?.wait()?;
    Ok(())
}

impl Tensors {
    fn new(bytes: usize, ranks: usize) -> Tensors {
        let part = (bytes / 4 / ranks).max(1) as i64;
        // Sums of zeros stay zeros, however often they are made; not of pages that nobody has written.
        let zeros = |count: i64| Tensor::ones([count], (Kind::Float, Device::Cpu)) * 0.0;
        Tensors {
            whole: zeros(part * ranks as i64),
            part: zeros(part),
            other: zeros(part * ranks as i64),
        }
    }
}

impl Side {
    fn supports(&self, operation: &str) -> bool {
        matches!(self, Side::Ours(_)) || matches!(operation, "all_gather" | "reduce_scatter")
    }

    fn run(&self, operation: &str, tensors: &Tensors) -> Result<()> {
        let Tensors { whole, part, other } = tensors;
        match self {
            Side::Gloo(group) => {
                let work = match operation {
                    "all_gather" => group.all_gather(whole, part)?,
                    _ => group.reduce_scatter(part, whole, ReduceOp::Sum)?,
                };
                work.wait(|| false)?;
            }
            Side::Ours(group) => {
                let rank = group.rank();
                let size = group.size();
                let rows = vec![part.size()[0]; size];
                match operation {
                    "all_reduce" => group.all_reduce(whole, ReduceOp::Sum)?.wait()?,
                    "broadcast" => group.broadcast(whole, 0)?.wait()?,
                    "all_gather" => group.all_gather(whole, part)?.wait()?,
                    "reduce_scatter" => group.reduce_scatter(part, whole, ReduceOp::Sum)?.wait()?,
                    "all_to_all" => group.all_to_all(other, whole, &rows, &rows)?.wait()?,
                    _ => {
                        let received = group.recv(other, (rank + size - 1) % size, 1)?;
                        group.send(whole, (rank + 1) % size, 1)?.wait()?;
                        received.wait()?;
                    }
                }
            }
        }
        Ok(())
    }
}
