//! Measurement of what lending an expert costs, in routed tokens.
//!
//! Moving `c` routed tokens to a rank with idle time saves their work: three times the GEMMs of a
//! forward pass. It costs a transfer of weights and one of their gradients in fp32. With weights of
//! `b` bytes per element, `F` FLOP/s and a link of `W` bytes/s, both are equal for
//! `(b + 4) F / (6 W)` tokens, whatever the expert's size. In addition, the helper has one more
//! expert, whose weights it reads, and on a CPU packs, however few rows there are.

use crate::lending::transfer::Lending;
use kernels::gemm;
use parallel::{Accelerator, Communicator, Work};
use std::{sync::Arc, time::Instant};
use tch::{Kind, Tensor};
use torch_ext::Error;

/// Few and many rows, with which GEMMs are timed. Few take as long as the weights alone.
const FEW_ROWS: i64 = 16;
const MANY_ROWS: i64 = 256;
/// Repetitions of each timing. The shortest counts, because other processes may use the machine.
const REPEATS: usize = 7;

/// Size of an expert on this rank.
#[derive(Debug, Clone, Copy)]
pub struct ExpertSize {
    pub hidden: i64,
    /// Columns of the expert that this rank holds.
    pub ffn: i64,
    /// The dtype of the weights.
    pub kind: Kind,
    /// True if backward fetches lent weights again.
    pub refetched_in_backward: bool,
}

/// Measures the number of routed tokens whose computation takes as long as lending an expert.
///
/// # Collective
/// Every rank of `lending`.
///
/// # Errors
/// If a collective fails.
pub fn break_even(
    lending: &Arc<dyn Communicator>,
    expert: ExpertSize,
    device: &dyn Accelerator,
) -> Result<f64, Error> {
    let ExpertSize {
        hidden, ffn, kind, ..
    } = expert;
    let random = |shape: &[i64]| device.zeros(shape, kind).uniform_(-1.0, 1.0);
    let gate_up_proj = random(&[2 * ffn, hidden]);
    let down_proj = random(&[hidden, ffn]);
    let time_forward = |rows: i64| {
        let x = random(&[rows, hidden]);
        shortest_time(|| {
            let gate_up = gemm(&x, &gate_up_proj.tr());
            let _ = gemm(&gate_up.narrow(1, 0, ffn), &down_proj.tr());
            device.synchronize()
        })
    };
    let forward = fit_line(time_forward(FEW_ROWS)?, time_forward(MANY_ROWS)?);
    let weights = [gate_up_proj.unsqueeze(0), down_proj.unsqueeze(0)];
    let transfer = time_transfer(lending, expert, device, &weights)?;
    Ok((transfer + 3.0 * forward.fixed) / (3.0 * forward.per_row))
}

/// Times the lending of one expert, from packing its weights to adding up its gradients.
fn time_transfer(
    lending: &Arc<dyn Communicator>,
    expert: ExpertSize,
    device: &dyn Accelerator,
    weights: &[Tensor; 2],
) -> Result<f64, Error> {
    let sums = weights
        .each_ref()
        .map(|weight| device.zeros(&weight.size(), Kind::Float));
    let lending = Lending::ring(lending);
    let fetches = if expert.refetched_in_backward { 2 } else { 1 };
    shortest_time(|| {
        for _ in 0..fetches {
            let _ = lending.fetch(weights)?.wait()?;
        }
        let gradients = device.zeros(&[1, 3 * expert.hidden * expert.ffn], Kind::Float);
        lending
            .send_gradients(&gradients)?
            .wait_and_add_to(&sums.each_ref())?;
        device.synchronize()
    })
}

/// Seconds of a GEMM as a function of its rows.
struct GemmTime {
    per_row: f64,
    fixed: f64,
}

/// Fits a line through the seconds of [`FEW_ROWS`] and [`MANY_ROWS`].
fn fit_line(few: f64, many: f64) -> GemmTime {
    let per_row = (many - few) / (MANY_ROWS - FEW_ROWS) as f64;
    let fixed = few - FEW_ROWS as f64 * per_row;
    if per_row > 0.0 && fixed > 0.0 {
        GemmTime { per_row, fixed }
    } else {
        // A slope or an intercept below zero is noise.
        GemmTime {
            per_row: many / MANY_ROWS as f64,
            fixed: 0.0,
        }
    }
}

fn shortest_time(mut body: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    tch::no_grad(|| {
        body()?;
        let mut shortest = f64::INFINITY;
        for _ in 0..REPEATS {
            let started = Instant::now();
            body()?;
            shortest = shortest.min(started.elapsed().as_secs_f64());
        }
        Ok(shortest)
    })
}

/// Returns one number for all ranks from what each measured. It is a power of two, so that most
/// runs agree on equal numbers.
///
/// # Collective
/// Every rank of `world`.
///
/// # Errors
/// If the collective fails.
pub fn agree_on_break_even(world: &Arc<dyn Communicator>, measured: f64) -> Result<i64, Error> {
    let sum = Tensor::from_slice(&[measured.max(1.0).log2()]);
    world
        .all_reduce(&sum, parallel::ReduceOp::Sum)
        .and_then(Work::wait)?;
    let mean = sum.double_value(&[0]) / world.size() as f64;
    let exponent = mean.round().clamp(0.0, 20.0);
    Ok(1 << exponent as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Cpu, run_on_threads};
    use std::time::Duration;

    #[test]
    fn times_are_split_into_rows_and_a_fixed_part() {
        let check = |few: f64, many: f64, per_row: f64, fixed: f64| {
            let time = fit_line(few, many);
            assert!((time.per_row - per_row).abs() < 1e-9);
            assert!((time.fixed - fixed).abs() < 1e-9);
        };
        check(2.0 + 16.0 * 0.5, 2.0 + 256.0 * 0.5, 0.5, 2.0);
        for few in [1.0, 600.0] {
            check(few, 512.0, 2.0, 0.0);
        }
    }

    #[test]
    fn ranks_measure_and_agree() {
        let agreed = run_on_threads(2, Duration::from_secs(60), |world| {
            let group = world.all("lending").unwrap();
            let expert = ExpertSize {
                hidden: 64,
                ffn: 64,
                kind: Kind::Float,
                refetched_in_backward: false,
            };
            let measured = break_even(&group, expert, &Cpu).unwrap();
            assert!(measured > 0.0 && measured.is_finite(), "{measured}");
            agree_on_break_even(&group, [10.0, 90.0][group.rank()]).unwrap()
        });
        // The geometric mean, 30, to the nearest power of two.
        assert_eq!(agreed, [32, 32]);
    }
}
