//! Shared by the benches of an MoE layer and of a step: timing over ranks and the printed line.

use super::figures::{median, mib, round};
use crate::cli::MoeLayerArgs;
use anyhow::Result;
use parallel::{Accelerator, Communicator, ReduceOp};
use serde_json::{Value, json};
use std::{sync::Arc, time::Instant};
use tch::Tensor;

/// All ranks of the bench, and this rank's device.
pub(super) struct RankGroup {
    pub(super) all: Arc<dyn Communicator>,
    pub(super) device: Box<dyn Accelerator>,
}

impl RankGroup {
    /// Runs `body` on all ranks at once and returns the seconds of the slowest.
    pub(super) fn time(&self, body: impl FnOnce() -> Result<()>) -> Result<f64> {
        self.all.barrier()?.wait()?;
        let started = Instant::now();
        body()?;
        let seconds = Tensor::from_slice(&[started.elapsed().as_secs_f64()]);
        self.all.all_reduce(&seconds, ReduceOp::Max)?.wait()?;
        Ok(seconds.double_value(&[0]))
    }

    /// Returns `number` of each rank.
    pub(super) fn gather(&self, number: f64) -> Result<Vec<f64>> {
        let mut own = vec![0.0; self.all.size()];
        own[self.all.rank()] = number;
        let all = Tensor::from_slice(&own);
        self.all.all_reduce(&all, ReduceOp::Sum)?.wait()?;
        Ok(Vec::try_from(all)?)
    }
}

/// Measurements of one dispatch in one case.
#[derive(Default)]
pub(super) struct MoeLayerTimes {
    pub(super) seconds: Vec<f64>,
    pub(super) routed_tokens: Vec<f64>,
    pub(super) peak: Vec<f64>,
    pub(super) lent: f64,
    /// Bytes of routed tokens and of weights that each rank sent in forward.
    pub(super) sent: Vec<f64>,
}

pub(super) struct CaseInfo {
    pub(super) experts: usize,
    /// Tokens of all ranks.
    pub(super) tokens: usize,
    pub(super) min_tokens: i64,
    /// Rounds that are averaged before the median is taken.
    pub(super) cycle: usize,
}

impl CaseInfo {
    fn tokens_per_s(&self, measured: &MoeLayerTimes) -> f64 {
        let cycles = measured.seconds.chunks(self.cycle);
        let seconds = cycles.map(|rounds| rounds.iter().sum::<f64>() / rounds.len() as f64);
        self.tokens as f64 / median(seconds.collect())
    }
}

/// Returns the line of a case, from the measurements of standard and least-loaded dispatch.
pub(super) fn line(
    bench: &str,
    case: &str,
    args: &MoeLayerArgs,
    info: &CaseInfo,
    [standard, ours]: &[MoeLayerTimes; 2],
) -> Value {
    let our_rate = info.tokens_per_s(ours);
    let standard_rate = info.tokens_per_s(standard);
    let largest = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let routed: f64 = standard.routed_tokens.iter().sum();
    // The speed-up of the experts' GEMMs with equal load on all ranks. For PERCENT:EXPERTS it is
    // P (r + (1 - r) (M - h) / (N - h)): a share r of the tokens goes to h of the M experts of one
    // of P ranks, and there are N experts.
    let ideal = largest(&standard.routed_tokens) * args.ranks as f64 / routed.max(1.0);
    json!({
        "bench": bench,
        "case": case,
        "metric": "tokens_per_s",
        "ours": round(our_rate, 0),
        "baseline": round(standard_rate, 0),
        "baseline_name": "standard",
        "ratio": round(our_rate / standard_rate, 3),
        "ideal": round(ideal, 3),
        "rounds": args.rounds,
        "ranks": args.ranks,
        "threads": 1,
        "tokens_per_rank": args.tokens,
        "hidden": args.hidden,
        "ffn": args.ffn,
        "experts": info.experts,
        "min_tokens": info.min_tokens,
        "routed_tokens": ours.routed_tokens,
        "baseline_routed_tokens": standard.routed_tokens,
        "lent_mib": mib(ours.lent),
        "peak_mib": mib(largest(&ours.peak)),
        "baseline_peak_mib": mib(largest(&standard.peak)),
    })
}
