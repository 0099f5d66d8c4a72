//! `moerun bench moe-layer`: an MoE layer, forward and backward, with standard and with least-loaded dispatch.

use super::workload::{NAMED_WORKLOADS, Workload, parse};
use super::{median, moe_step, round};
use crate::cli::MoeLayerArgs;
use crate::local_ranks::{join_world, run_on_ranks};
use anyhow::{Result, bail};
use moe::balance::BalanceScope;
use moe::dispatch::{Dispatcher, LeastLoaded};
use moe::experts::GemmPrecision;
use moe::lending::calibrate::{ExpertSize, agree_on_break_even, break_even};
use moe::lending::least_loaded::Planner;
use moe::plan::ExpertTopology;
use moe::{MoeLayer, MoeStats, MoeWeights, Router, SavePolicy};
use parallel::tensor::TensorParallel;
use parallel::{
    Accelerator, Activation, Communicator, Cpu, GradientBuckets, Local, RankEnv, ReduceOp,
    Replication, Weight,
};
use parking_lot::Mutex;
use serde_json::json;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use tch::{Kind, Tensor};
use trainer::config::LeastLoadedConfig;

/// The paper's table, and the field's workloads.
const SHARES: [&str; 12] = [
    "30:16", "50:16", "80:16", "95:16", "30:4", "50:4", "80:4", "95:4", "30:1", "50:1", "80:1",
    "95:1",
];

pub(crate) fn run(args: &MoeLayerArgs) -> Result<ExitCode> {
    if [args.ranks, args.rounds, args.tokens, args.hidden, args.ffn].contains(&0) {
        bail!("--ranks, --rounds, --tokens, --hidden and --ffn must be at least 1");
    }
    let mut cases: Vec<String> = args.case.clone();
    if cases.is_empty() {
        cases = NAMED_WORKLOADS
            .iter()
            .map(|(name, _)| name.to_string())
            .collect();
        cases.extend(
            SHARES
                .iter()
                .filter(|_| !args.step)
                .map(|share| share.to_string()),
        );
    }
    for case in &cases {
        let workload = parse(case)?;
        let experts = args.experts.unwrap_or(workload.experts(args.ranks));
        let ranks = args.ranks;
        if experts < 4 || !experts.is_multiple_of(ranks) {
            bail!("{experts} experts cannot be shared out over {ranks} ranks, as many each");
        }
        if let Workload::Share { hot, .. } = workload
            && hot > experts / ranks
        {
            bail!(
                "--case {case}: rank 0 has {} of {experts} experts, not {hot}",
                experts / ranks
            );
        }
        if args.step && !moe_step::supports(workload) {
            bail!(
                "--step --case {case}: a step's tokens are what the model reads; give balanced, w0 to w3 or w5 to w7"
            );
        }
    }
    if args.step {
        return run_on_ranks(args.ranks, |env| moe_step::measure(args, &cases, env));
    }
    run_on_ranks(args.ranks, |env| measure(args, &cases, env))
}

/// The ranks, and what they measure with.
pub(super) struct RankGroup {
    pub(super) all: Arc<dyn Communicator>,
    pub(super) device: Box<dyn Accelerator>,
}

impl RankGroup {
    /// The longest time that any rank took for `body`, which all begin together.
    pub(super) fn time(&self, body: impl FnOnce() -> Result<()>) -> Result<f64> {
        self.all.barrier()?.wait()?;
        let started = Instant::now();
        body()?;
        let seconds = Tensor::from_slice(&[started.elapsed().as_secs_f64()]);
        self.all.all_reduce(&seconds, ReduceOp::Max)?.wait()?;
        Ok(seconds.double_value(&[0]))
    }

    /// Every rank's number.
    pub(super) fn gather(&self, number: f64) -> Result<Vec<f64>> {
        let mut own = vec![0.0; self.all.size()];
        own[self.all.rank()] = number;
        let all = Tensor::from_slice(&own);
        self.all.all_reduce(&all, ReduceOp::Sum)?.wait()?;
        Ok(Vec::try_from(all)?)
    }
}

/// What one dispatch did with a case.
#[derive(Default)]
pub(super) struct MoeLayerTimes {
    pub(super) seconds: Vec<f64>,
    pub(super) routed_tokens: Vec<f64>,
    pub(super) peak: Vec<f64>,
    pub(super) lent: f64,
    /// Bytes of rows and of weights that each rank sent in forward.
    pub(super) sent: Vec<f64>,
}

fn measure(args: &MoeLayerArgs, cases: &[String], env: &RankEnv) -> Result<()> {
    let world = join_world(env, 0)?;
    let group = RankGroup {
        all: world.all("all")?,
        device: parallel::accelerator("cpu", 0)?,
    };
    let lending = world.all("lending")?;
    let size = ExpertSize {
        hidden: args.hidden as i64,
        ffn: args.ffn as i64,
        kind: Kind::Float,
        refetched_in_backward: false,
    };
    let min_tokens = match args.min_tokens {
        Some(tokens) => i64::from(tokens),
        None => agree_on_break_even(
            &group.all,
            break_even(&lending, size, group.device.as_ref())?,
        )?,
    };
    let planner = Planner {
        min_tokens,
        ..LeastLoadedConfig::default().planner(Vec::new())
    };
    let least_loaded = LeastLoaded {
        planner: Arc::new(Mutex::new(planner)),
        lending,
    };
    for case in cases {
        let workload = parse(case)?;
        let experts = args.experts.unwrap_or(workload.experts(args.ranks));
        let bench = LayerBench::new(args, workload, experts, &group, &least_loaded)?;
        let mut measured = [MoeLayerTimes::default(), MoeLayerTimes::default()];
        for round in 0..args.rounds * workload.cycle() + 1 {
            let experts = bench.expert_ids(round);
            // Who comes first changes each round.
            for which in [round % 2, 1 - round % 2] {
                let measured = &mut measured[which];
                group.device.reset_peak()?;
                let mut moe_stats = MoeStats::default();
                let seconds = group.time(|| {
                    moe_stats = bench.forward_backward(which, &experts)?;
                    Ok(())
                })?;
                // The first round warms caches.
                if round > 0 {
                    measured.seconds.push(seconds);
                    measured.routed_tokens = group.gather(moe_stats.computed_tokens as f64)?;
                    measured.peak = group.gather(group.device.memory()?.peak as f64)?;
                    measured.lent = group.gather(moe_stats.lent_bytes as f64)?.iter().sum();
                    // Each rank is a node of its own.
                    measured.sent =
                        group.gather((moe_stats.internode_bytes + moe_stats.lent_bytes) as f64)?;
                }
            }
        }
        if world.rank() == 0 {
            let tokens: usize = (0..args.ranks)
                .map(|rank| workload.tokens(args.tokens, rank, args.ranks))
                .sum();
            let size = CaseInfo {
                experts,
                tokens,
                min_tokens,
                cycle: workload.cycle(),
            };
            let mut line = line("moe-layer", case, args, &size, &measured);
            for (key, measured) in ["baseline_sent_mib", "sent_mib"].iter().zip(&measured) {
                line[key] = measured.sent.iter().map(|&bytes| mib(bytes)).collect();
            }
            println!("{line}");
        }
    }
    Ok(())
}

fn mib(bytes: f64) -> f64 {
    round(bytes / f64::from(1 << 20), 1)
}

/// What a case is measured with.
pub(super) struct CaseInfo {
    pub(super) experts: usize,
    /// Of all ranks.
    pub(super) tokens: usize,
    pub(super) min_tokens: i64,
    /// Rounds that count as one.
    pub(super) cycle: usize,
}

/// The line of a case, from what standard and least-loaded dispatch did with it.
pub(super) fn line(
    bench: &str,
    case: &str,
    args: &MoeLayerArgs,
    &CaseInfo {
        experts,
        tokens,
        min_tokens,
        cycle,
    }: &CaseInfo,
    [standard, ours]: &[MoeLayerTimes; 2],
) -> serde_json::Value {
    let rate = |measured: &MoeLayerTimes| {
        let seconds = measured
            .seconds
            .chunks(cycle)
            .map(|rounds| rounds.iter().sum::<f64>() / rounds.len() as f64);
        tokens as f64 / median(seconds.collect())
    };
    let largest = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let rows: f64 = standard.routed_tokens.iter().sum();
    // The speed-up of the experts' work if every rank had as much of it. (For SHARE:EXPERTS this is what
    // P (r + (1 - r) (M - h) / (N - h)) gives for r of the tokens to h of the M experts of one of P ranks, N in all.)
    let ideal = largest(&standard.routed_tokens) * args.ranks as f64 / rows.max(1.0);
    json!({
        "bench": bench,
        "case": case,
        "metric": "tokens_per_s",
        "ours": round(rate(ours), 0),
        "baseline": round(rate(standard), 0),
        "baseline_name": "standard",
        "ratio": round(rate(ours) / rate(standard), 3),
        "ideal": round(ideal, 3),
        "rounds": args.rounds,
        "ranks": args.ranks,
        "threads": 1,
        "tokens_per_rank": args.tokens,
        "hidden": args.hidden,
        "ffn": args.ffn,
        "experts": experts,
        "min_tokens": min_tokens,
        "routed_tokens": ours.routed_tokens,
        "baseline_routed_tokens": standard.routed_tokens,
        "lent_mib": mib(ours.lent),
        "peak_mib": mib(largest(&ours.peak)),
        "baseline_peak_mib": mib(largest(&standard.peak)),
    })
}

/// One layer with both dispatches, which share its weights.
struct LayerBench {
    layers: [MoeLayer; 2],
    gradients: GradientBuckets,
    workload: Workload,
    experts: usize,
    x: Tensor,
    routing_weights_tk: Tensor,
    place: (usize, usize),
}

impl LayerBench {
    fn new(
        args: &MoeLayerArgs,
        workload: Workload,
        experts: usize,
        group: &RankGroup,
        least_loaded: &LeastLoaded,
    ) -> Result<LayerBench> {
        let rank = group.all.rank();
        let ranks = group.all.size();
        tch::manual_seed(rank as i64 + 1);
        let hidden = args.hidden as i64;
        let ffn = args.ffn as i64;
        let local = (experts / ranks) as i64;
        let random = |shape: &[i64]| group.device.zeros(shape, Kind::Float).uniform_(-0.05, 0.05);
        let [gate_up_proj, down_proj] = [[local, 2 * ffn, hidden], [local, hidden, ffn]]
            .map(|shape| Weight::new(random(&shape)));
        let held = [(down_proj.clone(), 0), (gate_up_proj.clone(), 0)];
        let gradients = GradientBuckets::new(
            &held,
            &[Replication::alone()],
            25 << 20,
            true,
            group.device.as_ref(),
        )?;
        let alone: Arc<dyn Communicator> = Arc::new(Local::new(rank, "alone"));
        let top_k = workload.top_k();
        let layer = |least_loaded: Option<LeastLoaded>| MoeLayer {
            router: Router::new(experts, top_k),
            dispatcher: Dispatcher::new(
                group.all.clone(),
                experts,
                ExpertTopology {
                    slices: 1,
                    nodes: (0..ranks).collect(),
                },
                least_loaded,
                None,
                1,
            ),
            balance_scope: BalanceScope::Sequence,
            tensor: TensorParallel::new(alone.clone(), 1),
            sequence: alone.clone(),
            gemm: GemmPrecision::Model,
            save: SavePolicy {
                dispatched: true,
                experts: true,
            },
            weights: MoeWeights {
                router: Weight::new(Cpu.zeros(&[0, hidden], Kind::Float)),
                bias: None,
                gate_up_proj: gate_up_proj.clone(),
                down_proj: down_proj.clone(),
                shared: None,
            },
        };
        let layers = [layer(None), layer(Some(least_loaded.clone()))];
        let tokens = workload.tokens(args.tokens, rank, ranks) as i64;
        let x = random(&[tokens, hidden]).set_requires_grad(true);
        let routing_weights_tk = random(&[tokens, top_k as i64]).set_requires_grad(true);
        Ok(LayerBench {
            layers,
            gradients,
            workload,
            experts,
            x,
            routing_weights_tk,
            place: (rank, ranks),
        })
    }

    /// What this rank's tokens choose in round `round`.
    fn expert_ids(&self, round: usize) -> Vec<i64> {
        self.workload
            .expert_ids(self.x.size()[0] as usize, self.experts, self.place, round)
    }

    fn forward_backward(&self, which: usize, experts: &[i64]) -> Result<MoeStats> {
        let top_k = self.workload.top_k();
        self.gradients.begin(1);
        let layer = &self.layers[which];
        let plan = layer.dispatcher.plan(experts, top_k)?;
        let routed = layer.forward_routed(
            &Activation::kept(&self.x),
            &self.routing_weights_tk,
            experts.to_vec(),
            &plan,
            |_| Ok(None),
        )?;
        routed.hidden_td.sum(Kind::Float).f_backward()?;
        self.gradients.finish()?;
        for leaf in [&self.x, &self.routing_weights_tk] {
            leaf.shallow_clone().zero_grad();
        }
        Ok(routed.moe_stats)
    }
}
