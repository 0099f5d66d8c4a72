//! `moerun inspect routing`: which experts a run used over time, and how consistent its router became.

use super::heat::{slices, svg, text};
use crate::cli::InspectRoutingArgs;
use anyhow::{Context, Result, bail};
use moe::consistency::{segment_cache, segment_routing};
use std::process::ExitCode;
use trainer::{RoutingLine, RoutingSample, sample_routing};

/// Columns of a heat map on a terminal.
const WIDTH: usize = 96;

pub(crate) fn run(args: &InspectRoutingArgs) -> Result<ExitCode> {
    if args.segment == 0 || args.slices == 0 {
        bail!("--segment and --slices must be at least 1");
    }
    let path = args.run.join("routing.jsonl");
    let lines = std::fs::read_to_string(&path).with_context(|| {
        format!(
            "cannot read {}: name the folder of a run that has done a step",
            path.display()
        )
    })?;
    // A line that a crash cut off is no line.
    let lines: Vec<(u64, Vec<Vec<u64>>)> = lines
        .lines()
        .filter_map(|line| serde_json::from_str::<RoutingLine>(line).ok())
        .map(|line| (line.step, line.tokens_per_expert))
        .collect();
    if lines.is_empty() {
        bail!(
            "{} has no line: the run has not done a step yet, or its model has no MoE layers",
            path.display()
        );
    }
    let slices = slices(&lines, args.slices);
    println!(
        "load of each expert (columns) over the mean:  ' ' < 0.25 <= ░ < 0.75 <= ▒ < 1.25 <= ▓ < 2 <= █"
    );
    print!("{}", text(&slices, WIDTH));
    if let Some(file) = &args.svg {
        let picture = svg(
            &slices,
            &format!("Expert load over the mean, {}", args.run.display()),
        );
        std::fs::write(file, picture)
            .with_context(|| format!("cannot write {}", file.display()))?;
        println!("drawn in {}", file.display());
    }
    consistency(args)
}

fn consistency(args: &InspectRoutingArgs) -> Result<ExitCode> {
    let sample = match sample_routing(&args.run, args.tokens) {
        Ok(sample) => sample,
        Err(error) => {
            println!("no routing consistency without a checkpoint to run: {error}");
            return Ok(ExitCode::SUCCESS);
        }
    };
    let RoutingSample {
        step,
        experts,
        top_k,
        num_experts,
        sequence,
        is_validation,
    } = sample;
    let segment = args.segment;
    let cache = args.cache.unwrap_or(2 * top_k).min(num_experts);
    let tokens = experts.first().map_or(0, Vec::len) / top_k.max(1);
    println!(
        "\nrouting consistency (arXiv 2505.16056) of step {step} on {tokens} {} tokens, in segments of {segment}:",
        if is_validation {
            "validation"
        } else {
            "training"
        }
    );
    println!(
        "  SRP: best F1 of one set of experts a segment; SCH: best hit rate of a cache of {cache} of {num_experts}"
    );
    let mut sums = [0.0; 2];
    let digits = experts.len().saturating_sub(1).to_string().len();
    for (layer, experts) in experts.iter().enumerate() {
        let figures = segment_routing(experts, top_k, num_experts, sequence, segment).zip(
            segment_cache(experts, top_k, num_experts, sequence, segment, cache),
        );
        let Some((srp, sch)) = figures else {
            bail!("--segment {segment} is longer than the data's sequences of {sequence} tokens");
        };
        println!("  layer {layer:digits$}  SRP {srp:.3}  SCH {sch:.3}");
        (sums[0], sums[1]) = (sums[0] + srp, sums[1] + sch);
    }
    let [srp, sch] = sums.map(|sum| sum / experts.len().max(1) as f64);
    println!("  mean {:digits$}   SRP {srp:.3}  SCH {sch:.3}", "");
    Ok(ExitCode::SUCCESS)
}
