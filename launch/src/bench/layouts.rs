//! `moerun bench layouts`: the reference step on two ranks with one thread each, compared with one
//! process of two threads.

use super::{
    figures::{largest_of_ranks, median, round},
    runner::{baseline_line, train, with_temp_dir, write_tokens},
};
use crate::{cli::LayoutsArgs, hint::hinted};
use anyhow::{Context, Result, anyhow};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, path::Path, process::ExitCode};

const VOCAB: usize = 8192;
const TOKENS_PER_STEP: f64 = 8.0 * 256.0;

struct Layout {
    name: &'static str,
    parallel: Value,
    micro_batch: usize,
}

fn layouts() -> [Layout; 3] {
    [
        Layout {
            name: "data",
            parallel: json!({}),
            micro_batch: 4,
        },
        Layout {
            name: "expert",
            parallel: json!({"expert": 2}),
            micro_batch: 4,
        },
        Layout {
            name: "pipeline",
            parallel: json!({"pipeline": 2, "schedule": "zb-v", "vocabulary": "vocab-1"}),
            micro_batch: 2,
        },
    ]
}

pub(crate) fn run(args: &LayoutsArgs) -> Result<ExitCode> {
    with_temp_dir(|folder| measure(args, folder))
}

#[derive(Default)]
struct LayoutTimes {
    step_ms: Vec<f64>,
    wait_ratio: Vec<f64>,
    loss: f64,
    /// Milliseconds of rank 0 by kind of part, from the traced last step of each round.
    parts: BTreeMap<String, Vec<f64>>,
}

impl LayoutTimes {
    /// Adds the steps of the run in `folder`, of which the last is traced.
    fn add(&mut self, steps: &[Value], folder: &Path) -> Result<()> {
        // The first steps also allocate the memory that later ones reuse.
        for step in &steps[2..steps.len() - 1] {
            self.step_ms.extend(step["step_ms"].as_f64());
            self.wait_ratio.push(largest_of_ranks(step, "wait_ratio"));
        }
        self.loss = steps[0]["loss"].as_f64().unwrap_or(f64::NAN);
        let mut parts = traced_parts(&folder.join("run/logs/rank-0.trace.json"))?;
        let named: f64 = parts.values().sum();
        let whole = steps[steps.len() - 1]["step_ms"].as_f64().unwrap_or(0.0);
        parts.insert("other".into(), whole - named);
        for (kind, ms) in parts {
            self.parts.entry(kind).or_default().push(ms);
        }
        Ok(())
    }

    fn parts(&self) -> Value {
        self.parts
            .iter()
            .map(|(kind, ms)| (kind.clone(), json!(round(median(ms.clone()), 1))))
            .collect::<Map<_, _>>()
            .into()
    }
}

/// Returns the milliseconds of each kind of part in a trace, on the thread that computes.
///
/// Other threads overlap with it and take none of its time.
fn traced_parts(path: &Path) -> Result<BTreeMap<String, f64>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let trace: Value = serde_json::from_str(&text)
        .with_context(|| format!("{} is not a trace", path.display()))?;
    let events = trace["traceEvents"].as_array().into_iter().flatten();
    let computing_thread = events
        .clone()
        .find(|event| event["cat"] == "optimizer")
        .map(|event| event["tid"].clone());
    let events = events.filter(|event| Some(&event["tid"]) == computing_thread.as_ref());
    let mut parts: BTreeMap<String, f64> = BTreeMap::new();
    for event in events.filter(|event| event["cat"] != "pass") {
        let kind = event["cat"].as_str().unwrap_or_default().to_string();
        let self_ms = event["args"]["self_ms"].as_f64().unwrap_or(0.0);
        *parts.entry(kind).or_default() += self_ms;
    }
    Ok(parts)
}

fn measure(args: &LayoutsArgs, folder: &Path) -> Result<ExitCode> {
    write_tokens(folder, VOCAB)?;
    let chosen: Vec<Layout> = layouts()
        .into_iter()
        .filter(|layout| args.case.as_deref().is_none_or(|case| case == layout.name))
        .collect();
    if chosen.is_empty() {
        let case = args.case.as_deref().unwrap_or_default();
        return Err(hinted(
            anyhow!("--case {case}: no such layout"),
            "use data, expert or pipeline",
        ));
    }
    let mut alone = LayoutTimes::default();
    let mut measured: Vec<LayoutTimes> = chosen.iter().map(|_| LayoutTimes::default()).collect();
    let mut baseline = Vec::new();
    for round in 1..=args.rounds {
        eprintln!("round {round} of {}", args.rounds);
        let one_process = experiment(args, folder, &json!({}), 8);
        alone.add(&train(folder, &one_process, 1, Some(2))?, folder)?;
        for (layout, measured) in chosen.iter().zip(&mut measured) {
            let config = experiment(args, folder, &layout.parallel, layout.micro_batch);
            measured.add(&train(folder, &config, 2, Some(1))?, folder)?;
        }
        if let Some(text) = &args.baseline {
            let line = baseline_line(text, "tokens_per_s")?;
            baseline.extend(line["tokens_per_s"].as_f64());
        }
    }
    let one_parts = alone.parts();
    let single = median(alone.step_ms);
    let baseline = (!baseline.is_empty()).then(|| median(baseline));
    for (layout, measured) in chosen.iter().zip(measured) {
        let parts = measured.parts();
        let step_ms = median(measured.step_ms);
        let rate = TOKENS_PER_STEP / step_ms * 1e3;
        let mut line = json!({
            "bench": "layouts",
            "case": layout.name,
            "ranks": 2,
            "step_ms": round(step_ms, 1),
            "tokens_per_s": round(rate, 0),
            "one_process_step_ms": round(single, 1),
            "vs_one_process": round(single / step_ms, 3),
            "wait_ratio": round(median(measured.wait_ratio), 3),
            "parts_ms": parts,
            "one_process_parts_ms": one_parts,
            "loss": round(measured.loss, 5),
            "one_process_loss": round(alone.loss, 5),
            "rounds": args.rounds,
            "steps": args.steps,
        });
        if let Some(baseline) = baseline {
            line["baseline_tokens_per_s"] = json!(round(baseline, 0));
            line["over_baseline"] = json!(round(rate / baseline, 3));
        }
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

fn experiment(args: &LayoutsArgs, folder: &Path, parallel: &Value, micro_batch: usize) -> Value {
    json!({
        "run": {
            "dir": folder.join("run"), "device": "cpu", "log_every": 1000,
            "trace_step": args.steps,
        },
        "parallel": parallel,
        "model": {"vocab_size": VOCAB, "hidden": 256, "layers": 4, "heads": 8, "kv_heads": 4,
                  "moe": {"experts": 8, "top_k": 2, "ffn": 512}},
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": 256},
        "train": {"steps": args.steps, "global_batch": 8, "micro_batch": micro_batch},
        "schedule": {"constant": {"lr": 3e-4}},
        "checkpoint": {"every": 0},
        "snapshot": {"every": 0},
    })
}
