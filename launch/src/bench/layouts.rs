//! `moerun bench layouts`: the reference step on two ranks of one thread, beside one process with two threads.

use super::{largest, last_json_line, median, round, train, with_temp_dir, write_tokens};
use crate::cli::LayoutsArgs;
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};

const VOCAB: usize = 8192;
const TOKENS: f64 = 8.0 * 256.0;

/// Names, what is parallel, and sequences of a microbatch.
fn layouts() -> [(&'static str, Value, usize); 3] {
    [
        ("data", json!({}), 4),
        ("expert", json!({"expert": 2}), 4),
        (
            "pipeline",
            json!({"pipeline": 2, "schedule": "zb-v", "vocabulary": "vocab-1"}),
            2,
        ),
    ]
}

pub(crate) fn run(args: &LayoutsArgs) -> Result<ExitCode> {
    if args.rounds == 0 || args.steps < 4 {
        bail!("--rounds must be at least 1 and --steps at least 4");
    }
    with_temp_dir(|folder| measure(args, folder))
}

#[derive(Default)]
struct LayoutTimes {
    step_ms: Vec<f64>,
    wait_ratio: Vec<f64>,
    loss: f64,
    /// Of the last step of each turn, as rank 0 traced it: milliseconds by kind of part.
    parts: BTreeMap<String, Vec<f64>>,
}

impl LayoutTimes {
    /// The steps of a run in `folder`, of which the last is traced.
    fn add(&mut self, steps: &[Value], folder: &Path) -> Result<()> {
        // The first steps also make the memory that later ones use again.
        for step in &steps[2..steps.len() - 1] {
            self.step_ms.extend(step["step_ms"].as_f64());
            self.wait_ratio.push(largest(&step["rank_wait_ratio"]));
        }
        self.loss = steps[0]["loss"].as_f64().unwrap_or(f64::NAN);
        let path = folder.join("run/logs/rank-0.trace.json");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let trace: Value = serde_json::from_str(&text)
            .with_context(|| format!("{} is no trace", path.display()))?;
        let mut sums: BTreeMap<String, f64> = BTreeMap::new();
        let events = trace["traceEvents"].as_array().into_iter().flatten();
        // The thread that computes; what goes on beside it takes none of its time.
        let computes = events
            .clone()
            .find(|event| event["cat"] == "optimizer")
            .map(|event| event["tid"].clone());
        let events = events.filter(|event| Some(&event["tid"]) == computes.as_ref());
        for event in events.filter(|event| event["cat"] != "pass") {
            let kind = event["cat"].as_str().unwrap_or_default().to_string();
            *sums.entry(kind).or_default() += event["args"]["self_ms"].as_f64().unwrap_or(0.0);
        }
        let named: f64 = sums.values().sum();
        let whole = steps[steps.len() - 1]["step_ms"].as_f64().unwrap_or(0.0);
        sums.insert("other".into(), whole - named);
        for (kind, ms) in sums {
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

fn measure(args: &LayoutsArgs, folder: &Path) -> Result<ExitCode> {
    write_tokens(folder, VOCAB)?;
    let chosen: Vec<_> = layouts()
        .into_iter()
        .filter(|(name, ..)| args.case.as_ref().is_none_or(|case| case == name))
        .collect();
    if chosen.is_empty() {
        bail!(
            "--case {}: there are data, expert and pipeline",
            args.case.as_deref().unwrap_or_default()
        );
    }
    let mut alone = LayoutTimes::default();
    let mut measured: Vec<LayoutTimes> = chosen.iter().map(|_| LayoutTimes::default()).collect();
    let mut baseline = Vec::new();
    for turn in 1..=args.rounds {
        eprintln!("round {turn} of {}", args.rounds);
        alone.add(
            &train(folder, &experiment(args, folder, &json!({}), 8), 1, Some(2))?,
            folder,
        )?;
        for ((_, parallel, micro_batch), into) in chosen.iter().zip(&mut measured) {
            into.add(
                &train(
                    folder,
                    &experiment(args, folder, parallel, *micro_batch),
                    2,
                    Some(1),
                )?,
                folder,
            )?;
        }
        if let Some(text) = &args.baseline {
            let mut command = Command::new("sh");
            command.args(["-c", text]);
            baseline
                .extend(last_json_line(command, text, "tokens_per_s")?["tokens_per_s"].as_f64());
        }
    }
    let one_parts = alone.parts();
    let single = median(alone.step_ms);
    let baseline = (!baseline.is_empty()).then(|| median(baseline));
    for ((name, ..), measured) in chosen.iter().zip(measured) {
        let parts = measured.parts();
        let step_ms = median(measured.step_ms);
        let rate = TOKENS / step_ms * 1e3;
        let mut line = json!({
            "bench": "layouts",
            "case": name,
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
        "run": {"dir": folder.join("run"), "device": "cpu", "log_every": 1000, "trace_step": args.steps},
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
