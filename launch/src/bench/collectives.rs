//! `moerun bench collectives`: every collective at several sizes, with the training backend and all
//! others.

use super::figures::{median, round};
use crate::{
    cli::CollectivesArgs,
    hint::hinted,
    local_ranks::{COLLECTIVE_TIMEOUT, run_on_ranks},
    machine_memory::refuse_bytes,
};
use anyhow::{Context, Result, anyhow};
use parallel::{Backend, Communicator, Cpu, RankEnv, ReduceOp, World};
use serde_json::{Map, Value, json};
use std::{process::ExitCode, sync::Arc, time::Instant};
use tch::{Device, Kind, Tensor};

const OPERATIONS: [&str; 6] = [
    "all_reduce",
    "broadcast",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "send_recv",
];

pub(crate) fn run(args: &CollectivesArgs) -> Result<ExitCode> {
    let largest = args.kib.iter().max().copied().unwrap_or(0) as u128;
    refuse_bytes("bench collectives", (largest << 10) * args.ranks as u128)?;
    if let Some(wrong) = args
        .operation
        .iter()
        .find(|name| !OPERATIONS.contains(&name.as_str()))
    {
        return Err(hinted(
            anyhow!("--operation {wrong}: no such operation"),
            format!("use {}", OPERATIONS.join(", ")),
        ));
    }
    run_on_ranks(args.ranks, |env| measure(args, env))
}

/// An implementation of collectives.
enum Side {
    /// A communicator of moerun.
    Ours(Arc<dyn Communicator>),
    /// Gloo's native forms, as c10d calls them.
    Gloo(torch_ext::Gloo),
}

struct NamedSide {
    name: &'static str,
    side: Side,
}

/// Operands: `whole` and `other` hold a part of every rank, `part` one.
struct Tensors {
    whole: Tensor,
    part: Tensor,
    other: Tensor,
}

fn measure(args: &CollectivesArgs, env: &RankEnv) -> Result<()> {
    let world = |number: usize, backend: Backend| {
        let env = env.for_another_world(number);
        World::join(&env, COLLECTIVE_TIMEOUT, backend, &Cpu).context("cannot join the other ranks")
    };
    let auto = world(1, Backend::Auto)?;
    let gloo = world(2, Backend::Gloo)?;
    let all = auto.all("all")?;
    let mut sides = vec![
        NamedSide {
            name: "moerun",
            side: Side::Ours(all.clone()),
        },
        NamedSide {
            name: "gloo composed",
            side: Side::Ours(gloo.all("all")?),
        },
    ];
    if let Some(plain) = gloo.libtorch_gloo("plain")? {
        sides.push(NamedSide {
            name: "gloo",
            side: Side::Gloo(plain),
        });
    }
    let has_mpi = parallel::mpi_library().is_some() && env.mpi_launch != parallel::MpiLaunch::No;
    // The world must outlive its groups.
    let mpi = has_mpi.then(|| world(3, Backend::Mpi)).transpose()?;
    if let Some(mpi) = &mpi {
        sides.push(NamedSide {
            name: "mpi",
            side: Side::Ours(mpi.all("all")?),
        });
    }
    let size = auto.size();
    if auto.rank() == 0 {
        let names: Vec<&str> = sides.iter().map(|side| side.name).collect();
        eprintln!("{size} ranks; sides: {}", names.join(", "));
    }
    let chosen = |name: &&&str| {
        args.operation.is_empty() || args.operation.iter().any(|asked| asked == **name)
    };
    for &operation in OPERATIONS.iter().filter(chosen) {
        for &kib in &args.kib {
            let times = measure_case(args.rounds, &sides, all.as_ref(), operation, kib)?;
            if auto.rank() == 0 {
                let line = line(args.rounds, size, &sides, times, operation, kib);
                println!("{line}");
            }
        }
    }
    all.barrier()?.wait()?;
    Ok(())
}

/// Returns the seconds of each round for each side, on the slowest rank.
fn measure_case(
    rounds: usize,
    sides: &[NamedSide],
    all: &dyn Communicator,
    operation: &str,
    kib: usize,
) -> Result<Vec<Vec<f64>>> {
    let tensors = Tensors::new(kib * 1024, all.size());
    let mut times = vec![Vec::new(); sides.len()];
    // Enough repetitions to make the cost of reading the clock small.
    let repeat = (4096 / kib.max(1)).clamp(2, 32);
    for round in 0..rounds + 1 {
        for index in 0..sides.len() {
            // The order changes each round.
            let index = (index + round) % sides.len();
            let side = &sides[index].side;
            if !side.supports(operation) {
                continue;
            }
            all.barrier()?.wait()?;
            let started = Instant::now();
            for _ in 0..repeat {
                side.run(operation, &tensors)?;
            }
            let seconds = started.elapsed().as_secs_f64() / repeat as f64;
            let slowest = Tensor::from_slice(&[seconds]);
            all.all_reduce(&slowest, ReduceOp::Max)?.wait()?;
            // The first round warms caches.
            if round > 0 {
                times[index].push(slowest.double_value(&[0]));
            }
        }
    }
    Ok(times)
}

fn line(
    rounds: usize,
    ranks: usize,
    sides: &[NamedSide],
    times: Vec<Vec<f64>>,
    operation: &str,
    kib: usize,
) -> Value {
    let mut us = Map::new();
    let mut ours = f64::NAN;
    let mut fastest_other = f64::INFINITY;
    for (index, (side, times)) in sides.iter().zip(times).enumerate() {
        if times.is_empty() {
            continue;
        }
        let median_us = median(times) * 1e6;
        us.insert(side.name.to_string(), json!(round(median_us, 1)));
        if index == 0 {
            ours = median_us;
        } else {
            fastest_other = fastest_other.min(median_us);
        }
    }
    json!({
        "bench": "collectives",
        "operation": operation,
        "kib": kib,
        "ranks": ranks,
        "us": us,
        "vs_fastest_other": round(ours / fastest_other, 2),
        "rounds": rounds,
    })
}

impl Tensors {
    fn new(bytes: usize, ranks: usize) -> Tensors {
        let part = (bytes / 4 / ranks).max(1) as i64;
        // Sums of zeros stay zeros. Unlike Tensor::zeros, this writes the pages before they are
        // measured.
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
