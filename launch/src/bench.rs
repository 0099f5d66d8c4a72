//! `moerun bench`: one JSON object a line on standard output, and nothing else there.

use crate::cli::{BenchArgs, BenchCase, BenchName};
use anyhow::{Result, bail};
use serde_json::json;
use std::process::ExitCode;
use trainer::ReferenceStep;
use trainer::config::Dtype;

pub(crate) fn run(args: BenchArgs) -> Result<ExitCode> {
    let BenchName::Step = args.name;
    if args.runs == 0 || args.threads == 0 {
        bail!("--runs and --threads must be at least 1");
    }
    tch::set_num_threads(args.threads as i32);
    for (case, name, dtype) in [(BenchCase::Fp32, "fp32", Dtype::Fp32), (BenchCase::Bf16, "bf16", Dtype::Bf16)] {
        if args.case.is_some_and(|wanted| wanted != case) {
            continue;
        }
        let mut times = ReferenceStep::new(dtype)?.measure(2, args.runs)?;
        times.seconds.sort_by(f64::total_cmp);
        let median = times.seconds[times.seconds.len() / 2];
        let peak = parallel::accelerator("cpu", 0)?.memory()?.peak;
        let line = json!({
            "bench": "step",
            "case": name,
            "metric": "tokens_per_s",
            "ours": round(times.tokens as f64 / median, 1),
            // The peer is a Python program: whoever runs both divides.
            "baseline": null,
            "baseline_name": null,
            "ratio": null,
            "runs": args.runs,
            "ranks": 1,
            "threads": args.threads,
            "step_ms": round(median * 1e3, 1),
            "parameters": times.parameters,
            "peak_rss_mib": peak >> 20,
            "losses": times.losses.iter().take(4).map(|loss| round(*loss, 5)).collect::<Vec<_>>(),
        });
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

fn round(value: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (value * unit).round() / unit
}
