//! `moerun inspect routing`: the use of experts over time, and routing consistency.

use super::heat::{self, slices};
use crate::{cli::InspectRoutingArgs, hint::WithHint};
use anyhow::{Context, Result, bail};
use moe::consistency::{segment_cache, segment_routing};
use std::process::ExitCode;
use trainer::{RoutingLine, RoutingSample, sample_routing};

/// Columns of a heat map in text.
const WIDTH: usize = 96;

pub(crate) fn run(args: &InspectRoutingArgs) -> Result<ExitCode> {
    let path = args.run.join("routing.jsonl");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))
        .hint("give the folder of a run that has completed a step")?;
    // A crash may have cut off the last line.
    let lines: Vec<RoutingLine> = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    if lines.is_empty() {
        bail!(
            "{} is empty: the run has not completed a step, or its model has no MoE layers",
            path.display()
        );
    }
    let slices = slices(&lines, args.slices);
    println!(
        "load of each expert (columns) over the mean:  \
         ' ' < 0.25 <= ░ < 0.75 <= ▒ < 1.25 <= ▓ < 2 <= █"
    );
    print!("{}", heat::text(&slices, WIDTH));
    if let Some(file) = &args.svg {
        let title = format!("Expert load over the mean, {}", args.run.display());
        let picture = heat::svg(&slices, &title);
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
            println!("no routing consistency without a usable checkpoint: {error}");
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
        notes,
    } = sample;
    for note in notes {
        println!("warning: {note}");
    }
    let segment = args.segment;
    let cache = args.cache.unwrap_or(2 * top_k).min(num_experts);
    let tokens = experts.first().map_or(0, Vec::len) / top_k.max(1);
    let data = if is_validation {
        "validation"
    } else {
        "training"
    };
    println!(
        "\nrouting consistency (arXiv 2505.16056) of step {step} on {tokens} {data} tokens, in \
         segments of {segment}:"
    );
    println!(
        "  SRP: best F1 of one set of experts per segment; \
         SCH: best hit rate of a cache of {cache} of {num_experts}"
    );
    let mut sum_srp = 0.0;
    let mut sum_sch = 0.0;
    let digits = experts.len().saturating_sub(1).to_string().len();
    for (layer, experts) in experts.iter().enumerate() {
        let srp = segment_routing(experts, top_k, num_experts, sequence, segment);
        let sch = segment_cache(experts, top_k, num_experts, sequence, segment, cache);
        let Some((srp, sch)) = srp.zip(sch) else {
            bail!("--segment {segment}: longer than the data's sequences of {sequence} tokens");
        };
        println!("  layer {layer:digits$}  SRP {srp:.3}  SCH {sch:.3}");
        sum_srp += srp;
        sum_sch += sch;
    }
    let layers = experts.len().max(1) as f64;
    let srp = sum_srp / layers;
    let sch = sum_sch / layers;
    println!("  mean {:digits$}   SRP {srp:.3}  SCH {sch:.3}", "");
    Ok(ExitCode::SUCCESS)
}
