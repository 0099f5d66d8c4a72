//! `moerun bench pipeline`: placements of a large vocabulary in a two-stage pipeline.

use super::{
    figures::{largest_of_ranks, median, round},
    runner::{lines, train, with_temp_dir, write_tokens},
};
use crate::cli::PipelineArgs;
use anyhow::{Context, Result, anyhow};
use parallel::pipeline::{
    PassKind, Schedule,
    simulate::{Costs, VocabularyCosts, simulate},
};
use serde_json::{Value, json};
use std::{path::Path, process::ExitCode};

const LAYOUTS: [&str; 6] = [
    "baseline",
    "redis",
    "interlaced",
    "naive",
    "vocab-1",
    "vocab-2",
];

#[derive(Default)]
struct PipelineTimes {
    step_ms: Vec<f64>,
    /// MiB of tensors of the most loaded rank.
    memory_mib: Vec<f64>,
    /// MiB of the largest process.
    resident_mib: Vec<f64>,
    wait_ratio: Vec<f64>,
    passes_ms: Vec<f64>,
    predicted_ms: Vec<f64>,
    loss: f64,
}

impl PipelineTimes {
    /// Adds a step and its figures of each rank.
    fn add(&mut self, schedule: &Schedule, step: &Value, ranks: &Value) {
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        self.step_ms.extend(step["step_ms"].as_f64());
        self.memory_mib
            .push(mib(largest_of_ranks(step, "peak_memory")));
        self.resident_mib
            .push(mib(largest_of_ranks(step, "peak_resident")));
        self.wait_ratio.push(largest_of_ranks(step, "wait_ratio"));
        let times = PassTimes::new(schedule, ranks);
        self.passes_ms.push(times.measured_ms);
        self.predicted_ms.push(times.predicted_ms);
        self.loss = step["loss"].as_f64().unwrap_or(f64::NAN);
    }
}

pub(crate) fn run(args: &PipelineArgs) -> Result<ExitCode> {
    with_temp_dir(|folder| measure(args, folder))
}

fn measure(args: &PipelineArgs, folder: &Path) -> Result<ExitCode> {
    write_tokens(folder, args.vocab)?;
    let config = experiment(args, folder);
    let parsed: trainer::config::Config = serde_json::from_value(config.clone())
        .context("the configuration of the bench is invalid")?;
    let output_layer_ratio = parsed
        .model
        .head_cost_in_layers(parsed.data.sequence_length)
        / (parsed.model.layers as f64 / 2.0);
    let mut measured: Vec<PipelineTimes> =
        LAYOUTS.iter().map(|_| PipelineTimes::default()).collect();
    for round in 1..=args.rounds {
        for (layout, measured) in LAYOUTS.iter().zip(&mut measured) {
            eprintln!("round {round} of {}: {layout}", args.rounds);
            let mut config = config.clone();
            config["parallel"]["vocabulary"] = json!(layout);
            let plan: trainer::config::Config = serde_json::from_value(config.clone())?;
            let schedule = plan
                .pipeline_plan(plan.largest_batch())
                .map_err(|error| anyhow!(error))?
                .schedule;
            // The first step also allocates the memory that later ones reuse.
            let steps = train(folder, &config, 2, Some(1))?;
            for (step, ranks) in steps.iter().zip(&lines(folder, "ranks.jsonl")?).skip(1) {
                measured.add(&schedule, step, ranks);
            }
        }
    }
    let baseline = median(measured[0].step_ms.clone());
    let redis = median(measured[1].step_ms.clone());
    let ideal = (1.0 + output_layer_ratio) / (1.0 + output_layer_ratio / 2.0);
    for (layout, measured) in LAYOUTS.iter().zip(measured) {
        let step_ms = median(measured.step_ms);
        let passes_ms = median(measured.passes_ms);
        let predicted_ms = median(measured.predicted_ms);
        let line = json!({
            "bench": "pipeline",
            "case": layout,
            "step_ms": round(step_ms, 1),
            "ours": round(step_ms, 1),
            "baseline": round(baseline, 1),
            "over_baseline": round(baseline / step_ms, 3),
            "over_redis": round(redis / step_ms, 3),
            "output_layer_ratio": round(output_layer_ratio, 2),
            "ideal_over_baseline": round(ideal, 3),
            "peak_tensors_mib": round(median(measured.memory_mib), 0),
            "peak_resident_mib": round(median(measured.resident_mib), 0),
            "wait_ratio": round(median(measured.wait_ratio), 3),
            "passes_ms": round(passes_ms, 1),
            "predicted_ms": round(predicted_ms, 1),
            "predicted_over_measured": round(predicted_ms / passes_ms, 3),
            "loss": round(measured.loss, 5),
            "ranks": 2,
            "threads": 1,
            "rounds": args.rounds,
            "steps": args.steps,
        });
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

fn experiment(args: &PipelineArgs, folder: &Path) -> Value {
    json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "log_every": 1},
        "parallel": {"pipeline": 2, "schedule": "1f1b"},
        "model": {
            "vocab_size": args.vocab, "hidden": 256, "layers": 4, "heads": 8, "kv_heads": 4,
            "tie_embeddings": true, "moe": {"experts": 8, "top_k": 2, "ffn": 512},
        },
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": 256},
        "train": {"steps": args.steps, "global_batch": 16, "micro_batch": 1},
        "schedule": {"constant": {"lr": 1e-3}},
        "checkpoint": {"every": 0},
        "snapshot": {"every": 0},
    })
}

/// Time of a step from the first pass to the last.
struct PassTimes {
    measured_ms: f64,
    /// As the simulator predicts it from the mean time of each kind of pass.
    predicted_ms: f64,
}

impl PassTimes {
    /// Simulates `schedule` from the figures of each rank in one step.
    fn new(schedule: &Schedule, ranks: &Value) -> PassTimes {
        let mean_ms = |rank: usize, kind: PassKind| {
            let passes = &ranks["rank_pass_ms"][rank];
            passes[kind.name()].as_f64().unwrap_or(0.0)
        };
        let order = &schedule.order;
        let measured = order.ranks.iter().enumerate().map(|(rank, passes)| {
            let busy: f64 = passes.iter().map(|pass| mean_ms(rank, pass.kind)).sum();
            // A rank is busy or waits.
            busy / (1.0 - ranks["rank_wait_ratio"][rank].as_f64().unwrap_or(0.0))
        });
        let costs = costs(order.ranks.len(), mean_ms);
        PassTimes {
            measured_ms: measured.fold(0.0, f64::max),
            predicted_ms: simulate(schedule, &costs).total,
        }
    }
}

/// Returns the costs of passes, from the time of each kind on each rank, which holds one stage.
fn costs(ranks: usize, time: impl Fn(usize, PassKind) -> f64) -> Costs {
    let half_backward = |rank| time(rank, PassKind::Backward) / 2.0;
    let half: Vec<f64> = (0..ranks).map(half_backward).collect();
    let vocabulary = (0..ranks).map(|rank| VocabularyCosts {
        logits: time(rank, PassKind::Logits),
        normalize: time(rank, PassKind::Normalize),
        logits_backward: time(rank, PassKind::LogitsBackward),
        embed: time(rank, PassKind::Embed),
        embed_backward: time(rank, PassKind::EmbedBackward),
    });
    Costs {
        forward: (0..ranks)
            .map(|rank| time(rank, PassKind::Forward))
            .collect(),
        backward_input: half.clone(),
        backward_weight: half,
        vocabulary: vocabulary.collect(),
        send: 0.0,
        collective: 0.0,
    }
}
