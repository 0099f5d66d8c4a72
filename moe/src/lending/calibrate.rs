//! What it costs to lend an expert, measured: the number of choices whose work takes as long as its transfers.
//!
//! Moving `c` choices to a rank with time to spare saves their work there, forward and backward, three times the forward's
//! matrix products; it costs one transfer of weights and one of their gradients in fp32. In figures, for weights of `b`
//! bytes an element, `F` FLOP/s and a link of `W` bytes/s: `(b + 4) F / (6 W)`, whatever the expert's size. Besides, the other rank
//! has one more expert, whose weights it reads, and on a CPU packs, however few its rows are.

use crate::lending::transfer::Lending;
use kernels::gemm;
use parallel::{Accelerator, Communicator, Work};
use std::sync::Arc;
use std::time::Instant;
use tch::{Kind, Tensor};
use torch_ext::Error;

/// Rows that matrix products are timed with: so few that what they take is what any number takes, and many.
const TIMED_ROWS: (i64, i64) = (16, 256);
/// How often each is timed; the shortest counts: others may be using the machine.
const REPEATS: usize = 7;

/// An expert as this rank holds it.
#[derive(Debug, Clone, Copy)]
pub struct ExpertSize {
    /// D.
    pub hidden: i64,
    /// F, or the rank's slice of it.
    pub ffn: i64,
    /// Of the weights.
    pub kind: Kind,
    /// Whether lent weights are fetched again in backward.
    pub refetched_in_backward: bool,
}

/// The number of choices, as this rank sees it.
///
/// # Collective
/// Every rank of `lending`.
///
/// # Errors
/// When a collective fails.
pub fn break_even(
    lending: &Arc<dyn Communicator>,
    expert: ExpertSize,
    device: &dyn Accelerator,
) -> Result<f64, Error> {
    let ExpertSize {
        hidden,
        ffn,
        kind,
        refetched_in_backward,
    } = expert;
    let random = |shape: &[i64]| device.zeros(shape, kind).uniform_(-1.0, 1.0);
    let gate_up_proj = random(&[2 * ffn, hidden]);
    let down_proj = random(&[hidden, ffn]);
    let work = |rows: i64| {
        let x = random(&[rows, hidden]);
        shortest_time(|| {
            let inside = gemm(&x, &gate_up_proj.tr());
            let _ = gemm(&inside.narrow(1, 0, ffn), &down_proj.tr());
            device.synchronize()
        })
    };
    let (each, besides) = fit_line([work(TIMED_ROWS.0)?, work(TIMED_ROWS.1)?]);
    // All that lending one expert takes, from packing its weights to adding up its gradients.
    let held = [gate_up_proj.unsqueeze(0), down_proj.unsqueeze(0)];
    let sums = [
        device.zeros(&held[0].size(), Kind::Float),
        device.zeros(&held[1].size(), Kind::Float),
    ];
    let lending = Lending::ring(lending);
    let transfer = shortest_time(|| {
        for _ in 0..if refetched_in_backward { 2 } else { 1 } {
            let _ = lending.fetch(&held[0], &held[1])?.wait()?;
        }
        let gradients = device.zeros(&[1, 3 * hidden * ffn], Kind::Float);
        lending
            .send_gradients(&gradients)?
            .wait_and_add_to(&sums[0], &sums[1])?;
        device.synchronize()
    })?;
    Ok((transfer + 3.0 * besides) / (3.0 * each))
}

/// What each row takes, and what all take besides, of the times that both numbers of rows have taken.
fn fit_line([few, many]: [f64; 2]) -> (f64, f64) {
    let each = (many - few) / (TIMED_ROWS.1 - TIMED_ROWS.0) as f64;
    let besides = few - TIMED_ROWS.0 as f64 * each;
    // Where many rows seem to take no longer than few, or few less than their share, that is noise.
    if each > 0.0 && besides > 0.0 {
        (each, besides)
    } else {
        (many / TIMED_ROWS.1 as f64, 0.0)
    }
}

fn shortest_time(mut body: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    tch::no_grad(|| {
        body()?;
        let mut seconds = Vec::new();
        for _ in 0..REPEATS {
            let started = Instant::now();
            body()?;
            seconds.push(started.elapsed().as_secs_f64());
        }
        Ok(seconds.into_iter().fold(f64::INFINITY, f64::min))
    })
}

/// One number for all ranks out of what each measured: a power of two, so that the next run has the same more often than
/// not.
///
/// # Collective
/// Every rank of `world`.
///
/// # Errors
/// When the collective fails.
pub fn agree_on_break_even(world: &Arc<dyn Communicator>, measured: f64) -> Result<i64, Error> {
    let sum = Tensor::from_slice(&[measured.max(1.0).log2()]);
    world
        .all_reduce(&sum, parallel::ReduceOp::Sum)
        .and_then(Work::wait)?;
    let exponent = (sum.double_value(&[0]) / world.size() as f64)
        .round()
        .clamp(0.0, 20.0);
    Ok(1 << exponent as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Cpu, run_on_threads};
    use std::time::Duration;

    #[test]
    fn times_are_parted_into_rows_and_the_rest() {
        let near =
            |(a, b): (f64, f64), (c, d): (f64, f64)| (a - c).abs() < 1e-9 && (b - d).abs() < 1e-9;
        assert!(near(
            fit_line([2.0 + 16.0 * 0.5, 2.0 + 256.0 * 0.5]),
            (0.5, 2.0)
        ));
        for noise in [[1.0, 512.0], [600.0, 512.0]] {
            assert!(near(fit_line(noise), (2.0, 0.0)));
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
