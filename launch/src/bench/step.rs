//! `moerun bench step`: reference training steps, beside other implementations' of them and beside what their products alone take.

use super::{floor, last_json_line, median, round, with_temp_dir};
use crate::cli::{StepArgs, StepCase, StepShape};
use anyhow::{Context, Result, bail};
use kernels::profile;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, ExitCode};
use tch::Kind;
use trainer::config::Dtype;
use trainer::{ReferenceShape, ReferenceStep};

pub(crate) fn run(args: StepArgs) -> Result<ExitCode> {
    if args.steps == 0 || args.threads == 0 || args.rounds == 0 {
        bail!("--steps, --threads and --rounds must be at least 1");
    }
    for case in [StepCase::Fp32, StepCase::Bf16] {
        if args.case.is_some_and(|wanted| wanted != case) {
            continue;
        }
        if args.baseline.is_empty() {
            println!("{}", measure_step(&args, case)?)
        } else {
            drop(with_temp_dir(|folder| {
                println!("{}", measure_alternating(&args, case, folder)?);
                Ok(ExitCode::SUCCESS)
            })?)
        }
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
        "losses": times.losses.iter().take(COMPARED_STEPS).map(|loss| round(*loss, 5)).collect::<Vec<_>>(),
    });
    if let Some(floor) = floor {
        line["gemm_ms"] = json!(round(floor.own_seconds * 1e3, 1));
        line["libtorch_gemm_ms"] = json!(round(floor.libtorch_seconds * 1e3, 1));
    }
    if let Some((parts, flops)) = profiled {
        line["parts"] = parts;
        line["executed_gflop_s"] = json!(round(flops / seconds * 1e-9, 1));
        line["hfu"] = json!(round(flops / seconds / peak, 3));
    }
    Ok(line)
}

/// Steps that are profiled.
const PROFILED_STEPS: usize = 3;

/// What a step is made of, the longest part first, and its floating-point operations: the mean of some steps, which are written to a
/// file, too.
fn profile(step: &mut ReferenceStep, path: &Path) -> Result<(Value, f64)> {
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
    let each = PROFILED_STEPS as f64;
    let executed = parts.iter().map(|(_, total)| total.cost.flops).sum::<f64>() / each;
    let line = |((kind, name), total): ((&str, &str), profile::Total)| {
        let flops = total.cost.flops;
        let bytes = total.cost.bytes;
        let mut line = json!({
            "part": format!("{kind} {name}"),
            "ms": round(total.seconds / each * 1e3, 2),
            "share": round(total.seconds / seconds, 4),
            "calls": total.calls / PROFILED_STEPS,
        });
        if flops > 0.0 {
            line["gflop"] = json!(round(flops / each * 1e-9, 3));
            line["gflop_s"] = json!(round(flops / total.seconds * 1e-9, 1));
        }
        if bytes > 0.0 {
            line["mb"] = json!(round(bytes / each * 1e-6, 1));
            line["gb_s"] = json!(round(bytes / total.seconds * 1e-9, 1));
        }
        line
    };
    let mut lines: Vec<Value> = parts.into_iter().map(line).collect();
    lines.push(json!({"part": "unattributed", "ms": round((seconds - named) / each * 1e3, 2), "share": round(1.0 - named / seconds, 4)}));
    Ok((json!(lines), executed))
}

/// The option, as baselines have it, too.
const FORCE_BALANCE: &str = "--force-balance";

/// Steps whose losses are compared.
const COMPARED_STEPS: usize = 20;

/// The largest difference of two implementations' losses, over the loss.
fn max_rel_diff(ours: &Value, theirs: &Value) -> Option<f64> {
    let numbers = |line: &Value| {
        Some(
            line["losses"]
                .as_array()?
                .iter()
                .filter_map(Value::as_f64)
                .collect::<Vec<_>>(),
        )
    };
    let pairs = numbers(ours)?.into_iter().zip(numbers(theirs)?);
    Some(
        pairs
            .map(|(ours, theirs)| (ours / theirs - 1.0).abs())
            .fold(0.0, f64::max),
    )
}

/// Ours and the baselines, each in a process of its own, one after the other, round after round: what else the machine
/// does meets all of them alike.
fn measure_alternating(args: &StepArgs, case: StepCase, folder: &Path) -> Result<Value> {
    let this = std::env::current_exe().context("cannot find this program's own file")?;
    let steps = args.steps.to_string();
    let threads = args.threads.to_string();
    let start = folder.join("start.safetensors");
    // A large model's weights are gigabytes: they are written for who reads them.
    let starts_alike = args.baseline.iter().any(|text| text.contains("{start}"));
    let forced = if args.force_balance {
        FORCE_BALANCE
    } else {
        ""
    };
    let fill = |text: &str| {
        text.replace("{case}", case.name())
            .replace("{shape}", args.shape.name())
            .replace("{start}", &start.to_string_lossy())
            .replace("{steps}", &steps)
            .replace("{threads}", &threads)
            .replace("{device}", &args.device)
            .replace("{force_balance}", forced)
    };
    let mut ours = Vec::new();
    let mut baselines: Vec<(String, Vec<Value>)> = args
        .baseline
        .iter()
        .map(|text| (fill(text), Vec::new()))
        .collect();
    for round in 1..=args.rounds {
        eprintln!("{}: round {round} of {}", case.name(), args.rounds);
        let mut command = Command::new(&this);
        command.args([
            "bench",
            "step",
            "--case",
            case.name(),
            "--steps",
            &steps,
            "--threads",
            &threads,
        ]);
        command.args(["--device", &args.device, "--shape", args.shape.name()]);
        command.args(args.force_balance.then_some(FORCE_BALANCE));
        if starts_alike {
            command.arg("--start").arg(&start);
        }
        ours.push(last_json_line(
            command,
            "moerun bench step",
            "tokens_per_s",
        )?);
        for (text, lines) in &mut baselines {
            let mut command = Command::new("sh");
            command.args(["-c", text]);
            lines.push(last_json_line(command, text, "tokens_per_s")?);
        }
    }
    let rate = |lines: &[Value]| {
        median(
            lines
                .iter()
                .filter_map(|line| line["tokens_per_s"].as_f64())
                .collect(),
        )
    };
    let memory = |lines: &[Value]| {
        lines
            .iter()
            .filter_map(|line| line["peak_rss_mib"].as_u64())
            .max()
    };
    let (fastest, lines) = baselines
        .iter()
        .max_by(|a, b| rate(&a.1).total_cmp(&rate(&b.1)))
        .expect("there is a baseline");
    let all: Vec<Value> = baselines
        .iter()
        .map(|(name, lines)| json!({"name": name, "tokens_per_s": round(rate(lines), 1)}))
        .collect();
    let tokens = ours[0]["tokens"].as_f64();
    let kib_per_token = |lines: &[Value]| Some(round(memory(lines)? as f64 * 1024.0 / tokens?, 1));
    let products = |key: &str| {
        let shares = ours
            .iter()
            .filter_map(|line| Some(line[key].as_f64()? / line["step_ms"].as_f64()?))
            .collect();
        round(median(shares), 3)
    };
    Ok(json!({
        "bench": "step",
        "case": case.name(),
        "shape": args.shape.name(),
        "force_balance": args.force_balance,
        "metric": "tokens_per_s",
        "ours": round(rate(&ours), 1),
        "baseline": round(rate(lines), 1),
        "baseline_name": fastest,
        "ratio": round(rate(&ours) / rate(lines), 3),
        "rounds": args.rounds,
        "steps": args.steps,
        "ranks": 1,
        "threads": args.threads,
        "peak_rss_mib": memory(&ours),
        "baseline_peak_rss_mib": memory(lines),
        "kib_per_token": kib_per_token(&ours),
        "baseline_kib_per_token": kib_per_token(lines),
        "mfu": median(ours.iter().filter_map(|line| line["mfu"].as_f64()).collect()),
        "baselines": all,
        "libtorch_gemm_share": (args.device == "cpu").then(|| products("libtorch_gemm_ms")),
        "gemm_share": (args.device == "cpu").then(|| products("gemm_ms")),
        "losses_compared": ours[0]["losses"].as_array().map(Vec::len),
        "loss_rel_diff": starts_alike.then(|| max_rel_diff(&ours[0], &lines[0])).flatten(),
    }))
}
