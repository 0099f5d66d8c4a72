//! Checks between ranks: version, clocks, and the speed of two collectives.

use super::finding::Finding;
use anyhow::{Context, Result};
use parallel::{Accelerator, Backend, Communicator, RankEnv, ReduceOp, World};
use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tch::Tensor;

const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(60);
/// Larger differences put the failures of different machines in the wrong order.
const MAX_CLOCK_SKEW_S: f64 = 1.0;

pub(super) fn measure(env: &RankEnv, backend: Backend, device: &str) -> Result<()> {
    let device = parallel::accelerator(device, env.local_rank)?;
    let world = World::join(env, COLLECTIVE_TIMEOUT, backend, device.as_ref())
        .context("cannot join the other ranks")?;
    let all = world.all("doctor")?;
    let prints = env.rank == 0;
    if prints {
        let versions = format!(
            "{} of version {} over {}",
            world.size(),
            env!("CARGO_PKG_VERSION"),
            world.backend()
        );
        Finding::ok("ranks", versions).print();
    }
    let clocks = clocks(&all)?;
    if prints {
        clocks.print();
    }
    if world.size() == 1 {
        return Ok(());
    }
    for (name, operation) in [
        ("all_reduce", reduce as Operation),
        ("all_to_all", exchange as Operation),
    ] {
        let mut detail = Vec::new();
        for bytes in [64 << 10, 1 << 20, 16 << 20i64] {
            let seconds = median_time(&all, device.as_ref(), bytes, operation)?;
            detail.push(speed(bytes, seconds));
        }
        if prints {
            Finding::ok(name, detail.join(", ")).print();
        }
    }
    if clocks.failed() {
        anyhow::bail!("the clocks differ");
    }
    Ok(())
}

fn speed(bytes: i64, seconds: f64) -> String {
    let size = if bytes < 1 << 20 {
        format!("{} KiB", bytes >> 10)
    } else {
        format!("{} MiB", bytes >> 20)
    };
    let ms = seconds * 1e3;
    let gb_per_s = bytes as f64 / seconds / 1e9;
    format!("{size} in {ms:.2} ms ({gb_per_s:.2} GB/s)")
}

/// Compares the ranks' clocks, which are read right after a barrier.
fn clocks(all: &Arc<dyn Communicator>) -> Result<Finding> {
    all.barrier()?.wait()?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("the clock is before 1970")?
        .as_secs_f64();
    let ranks = Tensor::zeros([all.size() as i64], (tch::Kind::Double, tch::Device::Cpu));
    all.all_gather(&ranks, &Tensor::from_slice(&[now]))?
        .wait()?;
    let apart = ranks.max().double_value(&[]) - ranks.min().double_value(&[]);
    let detail = format!("at most {:.0} ms apart", apart * 1e3);
    Ok(if apart > MAX_CLOCK_SKEW_S {
        let slow = ranks.argmin(0, false).int64_value(&[]);
        let fix =
            format!("synchronize the clocks (chrony or another NTP client); rank {slow} is behind");
        Finding::fail("clocks", detail, fix)
    } else {
        Finding::ok("clocks", detail)
    })
}

type Operation = fn(&Arc<dyn Communicator>, &Tensor, &Tensor) -> Result<()>;

fn reduce(all: &Arc<dyn Communicator>, _output: &Tensor, input: &Tensor) -> Result<()> {
    Ok(all.all_reduce(input, ReduceOp::Max)?.wait()?)
}

fn exchange(all: &Arc<dyn Communicator>, output: &Tensor, input: &Tensor) -> Result<()> {
    let rows = vec![input.size()[0] / all.size() as i64; all.size()];
    Ok(all.all_to_all(output, input, &rows, &rows)?.wait()?)
}

/// Returns the median seconds of an operation on `bytes` of each rank, on the slowest rank.
fn median_time(
    all: &Arc<dyn Communicator>,
    device: &dyn Accelerator,
    bytes: i64,
    operation: Operation,
) -> Result<f64> {
    let ranks = all.size() as i64;
    let numbers = bytes / 4 / ranks * ranks;
    let input = device.zeros(&[numbers], tch::Kind::Float);
    let output = input.zeros_like();
    // The first call makes connections and buffers, and does not count.
    operation(all, &output, &input)?;
    let mut times = Vec::new();
    for _ in 0..7 {
        device.synchronize()?;
        all.barrier()?.wait()?;
        let began = Instant::now();
        operation(all, &output, &input)?;
        device.synchronize()?;
        all.check()?;
        times.push(began.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let slowest = Tensor::from_slice(&[times[3]]);
    all.all_reduce(&slowest, ReduceOp::Max)?.wait()?;
    Ok(slowest.double_value(&[0]))
}
