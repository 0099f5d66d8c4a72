//! `moerun bench step`: reference training steps, compared with other implementations and with
//! their own GEMMs.

use super::{
    figures::{median, round},
    floor,
    runner::{baseline_line, last_json_line, with_temp_dir},
};
use crate::cli::{StepArgs, StepCase, StepShape};
use anyhow::{Context, Result};
use kernels::profile;
use serde_json::{Value, json};
use std::{
    path::Path,
    process::{Command, ExitCode},
};
use tch::Kind;
use trainer::{ReferenceShape, ReferenceStep, config::Dtype};

pub(crate) fn run(args: StepArgs) -> Result<ExitCode> {
    for case in [StepCase::Fp32, StepCase::Bf16] {
        if args.case.is_some_and(|wanted| wanted != case) {
            continue;
        }
        let line = if args.baseline.is_empty() {
            measure_step(&args, case)?
        } else {
            with_temp_dir(|folder| measure_alternating(&args, case, folder))?
        };
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

fn measure_step(args: &StepArgs, case: StepCase) -> Result<Value> {
    tch::set_num_threads(args.threads as i32);
    let (dtype, kind) = match case {
        StepCase::Bf16 => (Dtype::Bf16, Kind::BFloat16),
        StepCase::Fp32 => (Dtype::Fp32, Kind::Float),
    };
    let shape = match args.shape {
        StepShape::Reference => ReferenceShape::REFERENCE,
        StepShape::Long => ReferenceShape::LONG,
        StepShape::Wide => ReferenceShape::WIDE,
        StepShape::Olmoe => ReferenceShape::OLMOE,
        StepShape::Coarse => ReferenceShape::COARSE,
    };
    let accelerator = parallel::accelerator(&args.device, 0)?;
    let device = accelerator.zeros(&[1], Kind::Float).device();
    let mut step = ReferenceStep::new(shape, dtype, args.force_balance, accelerator)?;
    if let Some(path) = &args.start {
        step.write(path)?;
    }
    let times = step.measure(2, args.steps)?;
    let profiled = args
        .profile
        .as_ref()
        .map(|path| profile(&mut step, path))
        .transpose()?;
    drop(step);
    let seconds = median(times.seconds);
    let model_flops = shape.model_flops();
    let mut peak = floor::peak(kind, device);
    let floor = (args.device == "cpu").then(|| floor::measure(shape, kind));
    if let Some(floor) = &floor {
        peak = peak.max(shape.gemm_flops() / floor.own_seconds.min(floor.libtorch_seconds));
    }
    let compared = times.losses.iter().take(COMPARED_STEPS);
    let losses = compared.map(|loss| round(*loss, 5));
    let mut line = json!({
        "bench": "step",
        "case": case.name(),
        "shape": args.shape.name(),
        "force_balance": args.force_balance,
        "device": args.device,
        "tokens_per_s": round(times.tokens as f64 / seconds, 1),
        "step_ms": round(seconds * 1e3, 1),
        "tokens": times.tokens,
        "model_gflop_s": round(model_flops / seconds * 1e-9, 1),
        "peak_gflop_s": round(peak * 1e-9, 1),
        "mfu": round(model_flops / seconds / peak, 3),
        "peak_rss_mib": times.peak_memory >> 20,
        "peak_tensors_mib": times.peak_tensors >> 20,
        "steps": args.steps,
        "ranks": 1,
        "threads": args.threads,
        "parameters": times.parameters,
        "losses": losses.collect::<Vec<_>>(),
    });
    if let Some(floor) = floor {
        line["gemm_ms"] = json!(round(floor.own_seconds * 1e3, 1));
        line["libtorch_gemm_ms"] = json!(round(floor.libtorch_seconds * 1e3, 1));
    }
    if let Some(ProfiledStep { parts, flops }) = profiled {
        line["parts"] = json!(parts);
        line["executed_gflop_s"] = json!(round(flops / seconds * 1e-9, 1));
        line["hfu"] = json!(round(flops / seconds / peak, 3));
    }
    Ok(line)
}

const PROFILED_STEPS: usize = 3;

struct ProfiledStep {
    /// The longest part first.
    parts: Vec<Value>,
    flops: f64,
}

/// Profiles some steps and writes their trace to `path`.
fn profile(step: &mut ReferenceStep, path: &Path) -> Result<ProfiledStep> {
    profile::start();
    let mut seconds = 0.0;
    for _ in 0..PROFILED_STEPS {
        seconds += step.run()?.0;
    }
    let events = profile::stop();
    profile::write(&events, 0, path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut parts: Vec<_> = profile::totals(&events).into_iter().collect();
    parts.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
    let named: f64 = parts.iter().map(|(_, total)| total.seconds).sum();
    let steps = PROFILED_STEPS as f64;
    let flops = parts.iter().map(|(_, total)| total.cost.flops).sum::<f64>() / steps;
    let lines = parts
        .into_iter()
        .map(|((kind, name), total)| part_line(&format!("{kind} {name}"), &total, seconds));
    let mut parts: Vec<Value> = lines.collect();
    parts.push(json!({
        "part": "unattributed",
        "ms": round((seconds - named) / steps * 1e3, 2),
        "share": round(1.0 - named / seconds, 4),
    }));
    Ok(ProfiledStep { parts, flops })
}

/// Returns the line of a part, whose total is over all profiled steps, as are `seconds`.
fn part_line(part: &str, total: &profile::Total, seconds: f64) -> Value {
    let steps = PROFILED_STEPS as f64;
    let flops = total.cost.flops;
    let bytes = total.cost.bytes;
    let mut line = json!({
        "part": part,
        "ms": round(total.seconds / steps * 1e3, 2),
        "share": round(total.seconds / seconds, 4),
        "calls": total.calls / PROFILED_STEPS,
    });
    if flops > 0.0 {
        line["gflop"] = json!(round(flops / steps * 1e-9, 3));
        line["gflop_s"] = json!(round(flops / total.seconds * 1e-9, 1));
    }
    if bytes > 0.0 {
        line["mb"] = json!(round(bytes / steps * 1e-6, 1));
        line["gb_s"] = json!(round(bytes / total.seconds * 1e-9, 1));
    }
    line
}

/// The option of `bench step` and of baselines.
const FORCE_BALANCE: &str = "--force-balance";

const COMPARED_STEPS: usize = 20;

/// Returns the largest relative difference of the losses of two implementations.
fn max_rel_diff(ours: &Value, theirs: &Value) -> Option<f64> {
    let ours = ours["losses"].as_array()?.iter().filter_map(Value::as_f64);
    let theirs = theirs["losses"].as_array()?.iter();
    let pairs = ours.zip(theirs.filter_map(Value::as_f64));
    let differences = pairs.map(|(ours, theirs)| (ours / theirs - 1.0).abs());
    Some(differences.fold(0.0, f64::max))
}

/// Measures moerun and the baselines in alternating rounds, each in a process of its own.
///
/// Other work of the machine then affects all of them alike.
fn measure_alternating(args: &StepArgs, case: StepCase, folder: &Path) -> Result<Value> {
    let start = folder.join("start.safetensors");
    let mut ours = Vec::new();
    let mut baselines: Vec<Baseline> = args
        .baseline
        .iter()
        .map(|text| Baseline {
            command: fill_in(text, args, case, &start),
            lines: Vec::new(),
        })
        .collect();
    for round in 1..=args.rounds {
        eprintln!("{}: round {round} of {}", case.name(), args.rounds);
        let command = own_command(args, case, &start)?;
        let line = last_json_line(command, "moerun bench step", "tokens_per_s")?;
        ours.push(line);
        for Baseline { command, lines } in &mut baselines {
            lines.push(baseline_line(command, "tokens_per_s")?);
        }
    }
    Ok(comparison(args, case, &ours, &baselines))
}

struct Baseline {
    command: String,
    lines: Vec<Value>,
}

/// True if a baseline reads the initial weights. A large model's take gigabytes, so they are only
/// written if it does.
fn shares_start(args: &StepArgs) -> bool {
    args.baseline.iter().any(|text| text.contains("{start}"))
}

fn fill_in(text: &str, args: &StepArgs, case: StepCase, start: &Path) -> String {
    let force_balance = args.force_balance.then_some(FORCE_BALANCE);
    text.replace("{case}", case.name())
        .replace("{shape}", args.shape.name())
        .replace("{start}", &start.to_string_lossy())
        .replace("{steps}", &args.steps.to_string())
        .replace("{threads}", &args.threads.to_string())
        .replace("{device}", &args.device)
        .replace("{force_balance}", force_balance.unwrap_or_default())
}

fn own_command(args: &StepArgs, case: StepCase, start: &Path) -> Result<Command> {
    let this = std::env::current_exe().context("cannot find this program's file")?;
    let mut command = Command::new(this);
    command
        .args(["bench", "step", "--case", case.name()])
        .args(["--steps", &args.steps.to_string()])
        .args(["--threads", &args.threads.to_string()])
        .args(["--device", &args.device, "--shape", args.shape.name()])
        .args(args.force_balance.then_some(FORCE_BALANCE));
    if shares_start(args) {
        command.arg("--start").arg(start);
    }
    Ok(command)
}

/// Returns the line that compares moerun with the fastest baseline.
fn comparison(args: &StepArgs, case: StepCase, ours: &[Value], baselines: &[Baseline]) -> Value {
    let fastest = baselines
        .iter()
        .max_by(|a, b| tokens_per_s(&a.lines).total_cmp(&tokens_per_s(&b.lines)))
        .expect("there is a baseline");
    let theirs = &fastest.lines;
    let all: Vec<Value> = baselines
        .iter()
        .map(|Baseline { command, lines }| {
            json!({"name": command, "tokens_per_s": round(tokens_per_s(lines), 1)})
        })
        .collect();
    let tokens = ours[0]["tokens"].as_f64();
    let kib_per_token =
        |lines: &[Value]| Some(round(peak_rss_mib(lines)? as f64 * 1024.0 / tokens?, 1));
    let share = |key: &str| {
        let shares = ours
            .iter()
            .filter_map(|line| Some(line[key].as_f64()? / line["step_ms"].as_f64()?));
        (args.device == "cpu").then(|| round(median(shares.collect()), 3))
    };
    let mfu = ours.iter().filter_map(|line| line["mfu"].as_f64());
    let loss_rel_diff = shares_start(args)
        .then(|| max_rel_diff(&ours[0], &theirs[0]))
        .flatten();
    json!({
        "bench": "step",
        "case": case.name(),
        "shape": args.shape.name(),
        "force_balance": args.force_balance,
        "metric": "tokens_per_s",
        "ours": round(tokens_per_s(ours), 1),
        "baseline": round(tokens_per_s(theirs), 1),
        "baseline_name": fastest.command,
        "ratio": round(tokens_per_s(ours) / tokens_per_s(theirs), 3),
        "rounds": args.rounds,
        "steps": args.steps,
        "ranks": 1,
        "threads": args.threads,
        "peak_rss_mib": peak_rss_mib(ours),
        "baseline_peak_rss_mib": peak_rss_mib(theirs),
        "kib_per_token": kib_per_token(ours),
        "baseline_kib_per_token": kib_per_token(theirs),
        "mfu": median(mfu.collect()),
        "baselines": all,
        "libtorch_gemm_share": share("libtorch_gemm_ms"),
        "gemm_share": share("gemm_ms"),
        "losses_compared": ours[0]["losses"].as_array().map(Vec::len),
        "loss_rel_diff": loss_rel_diff,
    })
}

fn tokens_per_s(lines: &[Value]) -> f64 {
    let rates = lines
        .iter()
        .filter_map(|line| line["tokens_per_s"].as_f64());
    median(rates.collect())
}

fn peak_rss_mib(lines: &[Value]) -> Option<u64> {
    let peaks = lines
        .iter()
        .filter_map(|line| line["peak_rss_mib"].as_u64());
    peaks.max()
}
