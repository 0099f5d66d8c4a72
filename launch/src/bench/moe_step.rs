//! `moerun bench moe-layer --step`: training steps of a small model with a biased router, with
//! both dispatches.

use super::{
    moe_line::{CaseInfo, MoeLayerTimes, RankGroup, line},
    runner::write_tokens,
    workload::{Workload, parse},
};
use crate::{cli::MoeLayerArgs, local_ranks::join_world};
use anyhow::{Context, Result};
use parallel::RankEnv;
use serde_json::json;
use std::path::Path;
use tch::Tensor;
use trainer::{Trainer, config::Config};

const VOCAB: usize = 4096;
const SEQUENCE: usize = 256;

/// True if a router's bias can produce this load.
pub(super) fn supports(workload: Workload) -> bool {
    !matches!(workload, Workload::Share { .. } | Workload::RaggedSources)
}

pub(super) fn measure(args: &MoeLayerArgs, cases: &[String], env: &RankEnv) -> Result<()> {
    let world = join_world(env, 0)?;
    let group = RankGroup {
        all: world.all("bench")?,
        device: parallel::accelerator("cpu", 0)?,
    };
    let name = format!("moerun-bench-step-{}-{}", std::process::id(), env.rank);
    let folder = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    let outcome = measure_in(args, cases, env, &group, &folder);
    let _ = std::fs::remove_dir_all(&folder);
    outcome
}

fn measure_in(
    args: &MoeLayerArgs,
    cases: &[String],
    env: &RankEnv,
    group: &RankGroup,
    folder: &Path,
) -> Result<()> {
    write_tokens(folder, VOCAB)?;
    let ranks = group.all.size();
    let rank = group.all.rank();
    let experts = args.experts.unwrap_or(Workload::Balanced.experts(ranks));
    // Each trainer needs a world of its own, in which the names of its groups are free.
    let trainer = |number: usize, dispatch: &str| -> Result<Trainer> {
        let config = experiment(args, folder, experts, dispatch)?;
        Ok(Trainer::new(
            config,
            &join_world(env, number)?,
            parallel::accelerator("cpu", 0)?,
        )?)
    };
    let mut trainers = [trainer(1, "standard")?, trainer(2, "least_loaded")?];
    let tokens = args.tokens / SEQUENCE * SEQUENCE * ranks;
    for case in cases {
        let workload = parse(case)?;
        let mut measured = [MoeLayerTimes::default(), MoeLayerTimes::default()];
        let mut losses = [0.0; 2];
        let mut loss_rel_diff = 0.0f64;
        for round in 0..args.rounds * workload.cycle() + 1 {
            // The order changes each round.
            for which in [round % 2, 1 - round % 2] {
                let trainer = &mut trainers[which];
                let measured = &mut measured[which];
                bias(trainer, &workload.weights(experts, ranks, round));
                group.device.reset_peak()?;
                let mut record = None;
                let seconds = group.time(|| {
                    record = Some(trainer.train_step(false)?.0);
                    Ok(())
                })?;
                losses[which] = record.as_ref().map_or(f64::NAN, |record| record.loss);
                if let Some(record) = record.filter(|_| round > 0) {
                    measured.seconds.push(seconds);
                    // Rank 0, which prints, has the figures of each rank.
                    let lines = record.ranks.iter();
                    let layers = lines.flat_map(|line| &line.lists.tokens_per_rank);
                    let routed = |rank: usize| layers.clone().map(|layer| layer[rank] as f64).sum();
                    measured.routed_tokens = (0..ranks).map(routed).collect();
                    measured.peak = group.gather(group.device.memory()?.peak as f64)?;
                    measured.lent = record.moe.map_or(0.0, |moe| moe.lent_bytes.total as f64);
                }
            }
            let difference = (losses[1] - losses[0]).abs() / losses[0];
            loss_rel_diff = loss_rel_diff.max(difference);
        }
        if rank == 0 {
            let min_tokens = trainers[1].min_tokens().unwrap_or(0);
            let info = CaseInfo {
                experts,
                tokens,
                min_tokens,
                cycle: workload.cycle(),
            };
            let mut line = line("moe-step", case, args, &info, &measured);
            // Both trainers get the same tokens.
            line["loss_rel_diff"] = json!(loss_rel_diff);
            println!("{line}");
        }
    }
    Ok(())
}

/// Biases every router, so that experts are chosen about as often as `weights` say.
///
/// With scores from 0 to 1, a clamped bias in proportion to `log2(weight / mean)` does that.
fn bias(trainer: &Trainer, weights: &[f64]) {
    let mean = weights.iter().sum::<f64>() / weights.len() as f64;
    let bias: Vec<f32> = weights
        .iter()
        .map(|weight| ((weight / mean).log2() * 0.05).clamp(-2.0, 2.0) as f32)
        .collect();
    let bias = Tensor::from_slice(&bias);
    for (_, _, layer_bias) in trainer.model().biases() {
        tch::no_grad(|| layer_bias.shallow_clone().copy_(&bias));
    }
}

fn experiment(
    args: &MoeLayerArgs,
    folder: &Path,
    experts: usize,
    dispatch: &str,
) -> Result<Config> {
    let mut least_loaded = json!({});
    if let Some(tokens) = args.min_tokens.filter(|_| dispatch == "least_loaded") {
        least_loaded = json!({"min_tokens": tokens});
    }
    let sequences = (args.tokens / SEQUENCE).max(1);
    let config = json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "log_every": 1},
        "parallel": {"expert": args.ranks},
        "model": {
            "vocab_size": VOCAB, "hidden": args.hidden, "layers": 2, "heads": 8, "kv_heads": 4,
            "moe": {
                "experts": experts, "top_k": 2, "ffn": args.ffn,
                "load_balance": 0.0, "bias_update_rate": 1e-9, "router": {"score": "sigmoid"},
                "dispatch": dispatch, "least_loaded": least_loaded,
            },
        },
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": SEQUENCE},
        "train": {
            "steps": 1_000_000, "global_batch": sequences * args.ranks, "micro_batch": sequences,
        },
        "schedule": {"constant": {"lr": 1e-4}},
    });
    serde_json::from_value(config).context("the configuration of the bench is invalid")
}
