//! `moerun bench layouts`: the reference step on two ranks of one thread, beside one process with two threads.

use super::{in_a_folder, largest, last_line, median, round, train, write_tokens};
use crate::cli::LayoutsArgs;
use anyhow::{Result, bail};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, ExitCode};

const VOCAB: usize = 8192;
const TOKENS: f64 = 8.0 * 256.0;

/// Names, what is parallel, and sequences of a microbatch.
fn layouts() -> [(&'static str, Value, usize); 3] {
    [
        ("data", json!({}), 4),
        ("expert", json!({"expert": 2}), 4),
        ("pipeline", json!({"pipeline": 2, "schedule": "zb-v", "vocabulary": "vocab-1"}), 2),
    ]
}

pub(crate) fn run(args: &LayoutsArgs) -> Result<ExitCode> {
    if args.rounds == 0 || args.steps < 3 {
        bail!("--rounds must be at least 1 and --steps at least 3");
    }
    in_a_folder(|folder| measure(args, folder))
}

#[derive(Default)]
struct Measured {
    step_ms: Vec<f64>,
    waiting: Vec<f64>,
    loss: f64,
}

impl Measured {
    fn add(&mut self, steps: &[Value]) {
        // The first steps also make the memory that later ones use again.
        for step in &steps[2..] {
            self.step_ms.extend(step["step_ms"].as_f64());
            self.waiting.push(largest(&step["rank_waiting"]));
        }
        self.loss = steps[0]["loss"].as_f64().unwrap_or(f64::NAN);
    }
}

fn measure(args: &LayoutsArgs, folder: &Path) -> Result<ExitCode> {
    write_tokens(folder, VOCAB)?;
    let chosen: Vec<_> = layouts()
        .into_iter()
        .filter(|(name, ..)| args.case.as_ref().is_none_or(|case| case == name))
        .collect();
    if chosen.is_empty() {
        bail!("--case {}: there are data, expert and pipeline", args.case.as_deref().unwrap_or_default());
    }
    let mut alone = Measured::default();
    let mut measured: Vec<Measured> = chosen.iter().map(|_| Measured::default()).collect();
    let mut baseline = Vec::new();
    for turn in 1..=args.rounds {
        eprintln!("round {turn} of {}", args.rounds);
        alone.add(&train(folder, &experiment(args, folder, &json!({}), 8), 1, 2)?);
        for ((_, parallel, micro_batch), into) in chosen.iter().zip(&mut measured) {
            into.add(&train(folder, &experiment(args, folder, parallel, *micro_batch), 2, 1)?);
        }
        if let Some(text) = &args.baseline {
            let mut command = Command::new("sh");
            command.args(["-c", text]);
            baseline.extend(last_line(command, text, "tokens_per_s")?["tokens_per_s"].as_f64());
        }
    }
    let single = median(alone.step_ms);
    let baseline = (!baseline.is_empty()).then(|| median(baseline));
    for ((name, ..), measured) in chosen.iter().zip(measured) {
        let step_ms = median(measured.step_ms);
        let rate = TOKENS / step_ms * 1e3;
        let mut line = json!({
            "bench": "layouts",
            "case": name,
            "ranks": 2,
            "step_ms": round(step_ms, 1),
            "tokens_per_s": round(rate, 0),
            "one_process_step_ms": round(single, 1),
            "of_one_process": round(single / step_ms, 3),
            "waiting": round(median(measured.waiting), 3),
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
        "run": {"dir": folder.join("run"), "device": "cpu", "log_every": 1000},
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
