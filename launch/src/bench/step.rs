//! `moerun bench step`: the reference training step, beside other implementations' of it.

use super::{last_line, median, round};
use crate::cli::{BenchArgs, BenchCase};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::process::{Command, ExitCode};
use trainer::ReferenceStep;
use trainer::config::Dtype;

pub(crate) fn run(args: BenchArgs) -> Result<ExitCode> {
    if args.runs == 0 || args.threads == 0 || args.rounds == 0 {
        bail!("--runs, --threads and --rounds must be at least 1");
    }
    for case in [BenchCase::Fp32, BenchCase::Bf16] {
        if args.case.is_some_and(|wanted| wanted != case) {
            continue;
        }
        let line = if args.baseline.is_empty() { measure_step(&args, case)? } else { take_turns(&args, case)? };
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

fn measure_step(args: &BenchArgs, case: BenchCase) -> Result<Value> {
    tch::set_num_threads(args.threads as i32);
    let dtype = if case == BenchCase::Bf16 { Dtype::Bf16 } else { Dtype::Fp32 };
    let times = ReferenceStep::new(dtype, parallel::accelerator(&args.device, 0)?)?.measure(2, args.runs)?;
    let seconds = median(times.seconds);
    Ok(json!({
        "bench": "step",
        "case": case.name(),
        "device": args.device,
        "tokens_per_s": round(times.tokens as f64 / seconds, 1),
        "step_ms": round(seconds * 1e3, 1),
        "peak_rss_mib": times.peak_memory >> 20,
        "peak_tensors_mib": times.peak_tensors >> 20,
        "runs": args.runs,
        "ranks": 1,
        "threads": args.threads,
        "parameters": times.parameters,
        "losses": times.losses.iter().take(4).map(|loss| round(*loss, 5)).collect::<Vec<_>>(),
    }))
}

/// Ours and the baselines, each in a process of its own, one after the other, round after round: what else the machine
/// does meets all of them alike.
fn take_turns(args: &BenchArgs, case: BenchCase) -> Result<Value> {
    let this = std::env::current_exe().context("cannot find this program's own file")?;
    let (runs, threads) = (args.runs.to_string(), args.threads.to_string());
    let fill = |text: &str| {
        text.replace("{case}", case.name())
            .replace("{runs}", &runs)
            .replace("{threads}", &threads)
            .replace("{device}", &args.device)
    };
    let mut ours = Vec::new();
    let mut baselines: Vec<(String, Vec<Value>)> = args.baseline.iter().map(|text| (fill(text), Vec::new())).collect();
    for round in 1..=args.rounds {
        eprintln!("{}: round {round} of {}", case.name(), args.rounds);
        let mut command = Command::new(&this);
        command.args(["bench", "step", "--case", case.name(), "--runs", &runs, "--threads", &threads]);
        command.args(["--device", &args.device]);
        ours.push(last_line(command, "moerun bench step", "tokens_per_s")?);
        for (text, lines) in &mut baselines {
            let mut command = Command::new("sh");
            command.args(["-c", text]);
            lines.push(last_line(command, text, "tokens_per_s")?);
        }
    }
    let rate = |lines: &[Value]| median(lines.iter().filter_map(|line| line["tokens_per_s"].as_f64()).collect());
    let memory = |lines: &[Value]| lines.iter().filter_map(|line| line["peak_rss_mib"].as_u64()).max();
    let (fastest, lines) =
        baselines.iter().max_by(|a, b| rate(&a.1).total_cmp(&rate(&b.1))).expect("there is a baseline");
    let all: Vec<Value> =
        baselines.iter().map(|(name, lines)| json!({"name": name, "tokens_per_s": round(rate(lines), 1)})).collect();
    Ok(json!({
        "bench": "step",
        "case": case.name(),
        "metric": "tokens_per_s",
        "ours": round(rate(&ours), 1),
        "baseline": round(rate(lines), 1),
        "baseline_name": fastest,
        "ratio": round(rate(&ours) / rate(lines), 3),
        "rounds": args.rounds,
        "runs": args.runs,
        "ranks": 1,
        "threads": args.threads,
        "peak_rss_mib": memory(&ours),
        "baseline_peak_rss_mib": memory(lines),
        "baselines": all,
    }))
}
