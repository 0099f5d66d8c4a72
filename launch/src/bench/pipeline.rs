//! `moerun bench pipeline`: what it brings to share a large vocabulary out over a pipeline's stages.

use super::{largest, median, round, train, with_temp_dir, write_tokens};
use crate::cli::PipelineArgs;
use anyhow::{Context, Result, anyhow, bail};
use parallel::pipeline::simulate::{Costs, VocabularyCosts, simulate};
use parallel::pipeline::{PassKind, Schedule};
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;

const LAYOUTS: [&str; 6] = [
    "baseline",
    "redis",
    "interlaced",
    "naive",
    "vocab-1",
    "vocab-2",
];

/// What one layout did in its turns.
#[derive(Default)]
struct PipelineTimes {
    step_ms: Vec<f64>,
    /// Of the most loaded rank, in MiB.
    memory: Vec<f64>,
    resident: Vec<f64>,
    wait_ratio: Vec<f64>,
    /// From the first pass to the last, measured and simulated with the passes' measured times.
    passes_ms: Vec<f64>,
    predicted_ms: Vec<f64>,
    loss: f64,
}

pub(crate) fn run(args: &PipelineArgs) -> Result<ExitCode> {
    if args.rounds == 0 || args.steps < 2 {
        bail!("--rounds must be at least 1 and --steps at least 2");
    }
    with_temp_dir(|folder| measure(args, folder))
}

fn measure(args: &PipelineArgs, folder: &Path) -> Result<ExitCode> {
    write_tokens(folder, args.vocab)?;
    let config = experiment(args, folder);
    let parsed: trainer::config::Config =
        serde_json::from_value(config.clone()).context("the bench's own experiment")?;
    // The output layer's work over that of one stage's layers.
    let r = parsed.model.head_cost_in_layers() / (parsed.model.layers as f64 / 2.0);
    let mut measured: Vec<PipelineTimes> =
        LAYOUTS.iter().map(|_| PipelineTimes::default()).collect();
    for turn in 1..=args.rounds {
        for (layout, into) in LAYOUTS.iter().zip(&mut measured) {
            eprintln!("round {turn} of {}: {layout}", args.rounds);
            let mut config = config.clone();
            config["parallel"]["vocabulary"] = json!(layout);
            let plan: trainer::config::Config = serde_json::from_value(config.clone())?;
            let schedule = plan
                .pipeline_plan(plan.train.global_batch)
                .map_err(|error| anyhow!(error))?
                .schedule;
            // The first step also makes the memory that later ones use again.
            for step in &train(folder, &config, 2, Some(1))?[1..] {
                into.step_ms.extend(step["step_ms"].as_f64());
                into.memory
                    .push(largest(&step["rank_peak_memory"]) / f64::from(1 << 20));
                into.resident
                    .push(largest(&step["rank_peak_resident"]) / f64::from(1 << 20));
                into.wait_ratio.push(largest(&step["rank_wait_ratio"]));
                let (measured, predicted) = passes(&schedule, step);
                into.passes_ms.push(measured);
                into.predicted_ms.push(predicted);
                into.loss = step["loss"].as_f64().unwrap_or(f64::NAN);
            }
        }
    }
    let baseline = median(measured[0].step_ms.clone());
    let redis = median(measured[1].step_ms.clone());
    for (layout, of_layout) in LAYOUTS.iter().zip(measured) {
        let step_ms = median(of_layout.step_ms);
        let line = json!({
            "bench": "pipeline",
            "case": layout,
            "step_ms": round(step_ms, 1),
            "ours": round(step_ms, 1),
            "baseline": round(baseline, 1),
            "over_baseline": round(baseline / step_ms, 3),
            "over_redis": round(redis / step_ms, 3),
            "output_layer_ratio": round(r, 2),
            "ideal_over_baseline": round((1.0 + r) / (1.0 + r / 2.0), 3),
            "peak_tensors_mib": round(median(of_layout.memory), 0),
            "peak_resident_mib": round(median(of_layout.resident), 0),
            "wait_ratio": round(median(of_layout.wait_ratio), 3),
            "passes_ms": round(median(of_layout.passes_ms.clone()), 1),
            "predicted_ms": round(median(of_layout.predicted_ms.clone()), 1),
            "predicted_over_measured": round(median(of_layout.predicted_ms) / median(of_layout.passes_ms), 3),
            "loss": round(of_layout.loss, 5),
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
        "run": {"dir": folder.join("run"), "device": "cpu", "log_every": 1000},
        "parallel": {"pipeline": 2, "schedule": "1f1b"},
        "model": {"vocab_size": args.vocab, "hidden": 256, "layers": 4, "heads": 8, "kv_heads": 4, "tie_embeddings": true,
                  "moe": {"experts": 8, "top_k": 2, "ffn": 512}},
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": 256},
        "train": {"steps": args.steps, "global_batch": 16, "micro_batch": 1},
        "schedule": {"constant": {"lr": 1e-3}},
        "checkpoint": {"every": 0},
        "snapshot": {"every": 0},
    })
}

/// How long the passes of a measured step took in all, and how long the simulator says that they take, one at a time as
/// long as they did on average.
fn passes(schedule: &Schedule, step: &Value) -> (f64, f64) {
    let order = &schedule.order;
    let time = |rank: usize, kind: PassKind| {
        step["rank_pass_ms"][rank][kind.name()]
            .as_f64()
            .unwrap_or(0.0)
    };
    let ranks = 0..order.ranks.len();
    let of_stage = |kind: PassKind| {
        ranks
            .clone()
            .map(|rank| time(rank, kind))
            .collect::<Vec<_>>()
    };
    let half: Vec<f64> = of_stage(PassKind::Backward)
        .iter()
        .map(|time| time / 2.0)
        .collect();
    let vocabulary = ranks.clone().map(|rank| VocabularyCosts {
        logits: time(rank, PassKind::Logits),
        normalize: time(rank, PassKind::Normalize),
        logits_backward: time(rank, PassKind::LogitsBackward),
        embed: time(rank, PassKind::Embed),
        embed_backward: time(rank, PassKind::EmbedBackward),
    });
    let costs = Costs {
        forward: of_stage(PassKind::Forward),
        backward_input: half.clone(),
        backward_weight: half,
        vocabulary: vocabulary.collect(),
        send: 0.0,
        collective: 0.0,
    };
    // A rank is busy as long as its passes take, and waits the rest.
    let measured = ranks.map(|rank| {
        let busy: f64 = order.ranks[rank]
            .iter()
            .map(|pass| time(rank, pass.kind))
            .sum();
        busy / (1.0 - step["rank_wait_ratio"][rank].as_f64().unwrap_or(0.0))
    });
    (
        measured.fold(0.0, f64::max),
        simulate(schedule, &costs).total,
    )
}
