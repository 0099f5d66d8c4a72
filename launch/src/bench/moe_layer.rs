//! `moerun bench moe-layer`: forward and backward of an MoE layer, with standard and with
//! least-loaded dispatch.

use super::{
    figures::mib,
    moe_line::{CaseInfo, MoeLayerTimes, RankGroup, line},
    moe_step,
    workload::{NAMED_WORKLOADS, RankBatch, Workload, parse},
};
use crate::{
    cli::MoeLayerArgs,
    hint::hinted,
    local_ranks::{join_world, run_on_ranks},
    machine_memory::refuse_bytes,
};
use anyhow::{Result, anyhow, bail};
use moe::{
    MoeLayer, MoeStats, MoeWeights, Router, SavePolicy,
    balance::BalanceScope,
    dispatch::{Dispatcher, LeastLoaded},
    experts::{GemmPrecision, GluNetworks},
    lending::{
        calibrate::{ExpertSize, agree_on_break_even, break_even},
        least_loaded::Planner,
    },
    plan::ExpertTopology,
};
use parallel::{
    Accelerator, Activation, Communicator, Cpu, GradientBuckets, Local, RankEnv, Replication,
    Weight, World, tensor::TensorParallel,
};
use parking_lot::Mutex;
use std::{process::ExitCode, sync::Arc};
use tch::{Kind, Tensor};
use trainer::config::LeastLoadedConfig;

/// The table of the LLEP paper, as PERCENT:EXPERTS.
const SHARES: [&str; 12] = [
    "30:16", "50:16", "80:16", "95:16", "30:4", "50:4", "80:4", "95:4", "30:1", "50:1", "80:1",
    "95:1",
];

pub(crate) fn run(args: &MoeLayerArgs) -> Result<ExitCode> {
    // Inputs, outputs and their gradients of all ranks, and the experts' weights.
    let rows = (args.tokens * args.ranks * args.hidden.max(args.ffn)) as u128;
    let experts = args.experts.unwrap_or(2 * args.ranks) as u128;
    let weights = experts * (args.hidden * args.ffn) as u128;
    refuse_bytes("bench moe-layer", 4 * (8 * rows + 6 * weights))?;
    let cases = cases(args);
    for case in &cases {
        refuse_impossible(args, case)?;
    }
    if args.step {
        return run_on_ranks(args.ranks, |env| moe_step::measure(args, &cases, env));
    }
    run_on_ranks(args.ranks, |env| measure(args, &cases, env))
}

fn cases(args: &MoeLayerArgs) -> Vec<String> {
    if !args.case.is_empty() {
        return args.case.clone();
    }
    let mut cases: Vec<String> = NAMED_WORKLOADS
        .iter()
        .map(|(name, _)| name.to_string())
        .collect();
    if !args.step {
        cases.extend(SHARES.map(str::to_string));
    }
    cases
}

fn refuse_impossible(args: &MoeLayerArgs, case: &str) -> Result<()> {
    let workload = parse(case)?;
    let ranks = args.ranks;
    let experts = args.experts.unwrap_or(workload.experts(ranks));
    if experts < 4 || !experts.is_multiple_of(ranks) {
        bail!("--experts {experts}: must be at least 4 and a multiple of {ranks} ranks");
    }
    if let Workload::Share { hot, .. } = workload
        && hot > experts / ranks
    {
        let local = experts / ranks;
        bail!("--case {case}: rank 0 has {local} of {experts} experts, not {hot}");
    }
    if args.step && !moe_step::supports(workload) {
        return Err(hinted(
            anyhow!("--step --case {case}: a router's bias cannot produce this load"),
            "use balanced, w0 to w3 or w5 to w7",
        ));
    }
    Ok(())
}

fn measure(args: &MoeLayerArgs, cases: &[String], env: &RankEnv) -> Result<()> {
    let world = join_world(env, 0)?;
    let group = RankGroup {
        all: world.all("all")?,
        device: parallel::accelerator("cpu", 0)?,
    };
    let least_loaded = least_loaded(args, &group, &world)?;
    let min_tokens = least_loaded.planner.lock().min_tokens;
    for case in cases {
        let workload = parse(case)?;
        let experts = args.experts.unwrap_or(workload.experts(args.ranks));
        let bench = LayerBench::new(args, workload, experts, &group, &least_loaded)?;
        let measured = bench.measure(args.rounds, &group)?;
        if world.rank() != 0 {
            continue;
        }
        let tokens = (0..args.ranks).map(|rank| workload.tokens(args.tokens, rank, args.ranks));
        let info = CaseInfo {
            experts,
            tokens: tokens.sum(),
            min_tokens,
            cycle: workload.cycle(),
        };
        let mut line = line("moe-layer", case, args, &info, &measured);
        for (key, measured) in ["baseline_sent_mib", "sent_mib"].iter().zip(&measured) {
            line[key] = measured.sent.iter().map(|&bytes| mib(bytes)).collect();
        }
        println!("{line}");
    }
    Ok(())
}

/// Returns the planner of expert lending, with the break-even that all ranks agree on.
fn least_loaded(args: &MoeLayerArgs, group: &RankGroup, world: &World) -> Result<LeastLoaded> {
    let lending = world.all("lending")?;
    let size = ExpertSize {
        hidden: args.hidden as i64,
        ffn: args.ffn as i64,
        kind: Kind::Float,
        refetched_in_backward: false,
    };
    let min_tokens = match args.min_tokens {
        Some(tokens) => i64::from(tokens),
        None => {
            let own = break_even(&lending, size, group.device.as_ref())?;
            agree_on_break_even(&group.all, own)?
        }
    };
    let planner = Planner {
        min_tokens,
        ..LeastLoadedConfig::default().planner(Vec::new())
    };
    Ok(LeastLoaded {
        planner: Arc::new(Mutex::new(planner)),
        lending,
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
    rank: usize,
    ranks: usize,
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
        let experts_here = GluNetworks::swiglu(
            Weight::new(random(&[local, 2 * ffn, hidden])),
            Weight::new(random(&[local, hidden, ffn])),
        );
        let weights = experts_here.weights().into_iter().rev();
        let held: Vec<_> = weights.map(|weight| (weight.clone(), 0)).collect();
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
                router_bias: None,
                bias: Mutex::new(None),
                experts: experts_here.clone(),
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
            rank,
            ranks,
        })
    }

    /// Measures standard and least-loaded dispatch in alternating rounds.
    fn measure(&self, rounds: usize, group: &RankGroup) -> Result<[MoeLayerTimes; 2]> {
        let mut measured = [MoeLayerTimes::default(), MoeLayerTimes::default()];
        for round in 0..rounds * self.workload.cycle() + 1 {
            let experts = self.expert_ids(round);
            // The order changes each round.
            for which in [round % 2, 1 - round % 2] {
                let measured = &mut measured[which];
                group.device.reset_peak()?;
                let mut moe_stats = MoeStats::default();
                let seconds = group.time(|| {
                    moe_stats = self.forward_backward(which, &experts)?;
                    Ok(())
                })?;
                // The first round warms caches.
                if round == 0 {
                    continue;
                }
                measured.seconds.push(seconds);
                measured.routed_tokens = group.gather(moe_stats.computed_tokens as f64)?;
                measured.peak = group.gather(group.device.memory()?.peak as f64)?;
                measured.lent = group.gather(moe_stats.lent_bytes as f64)?.iter().sum();
                // Each rank is a node of its own.
                let sent = moe_stats.internode_bytes + moe_stats.lent_bytes;
                measured.sent = group.gather(sent as f64)?;
            }
        }
        Ok(measured)
    }

    fn expert_ids(&self, round: usize) -> Vec<i64> {
        self.workload.expert_ids(RankBatch {
            tokens: self.x.size()[0] as usize,
            experts: self.experts,
            rank: self.rank,
            ranks: self.ranks,
            round,
        })
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
