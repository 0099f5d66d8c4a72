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
    let text = std::fs::read(&path)
        .with_context(|| format!("cannot read {}", path.display()))
        .hint("give the folder of a run that has completed a step")?;
    let (lines, damaged) = parse(&text);
    if damaged > 0 {
        let path = path.display();
        eprintln!("warning: {path}: {damaged} damaged lines are left out");
    }
    if lines.is_empty() {
        bail!(
            "{} has no line: the run has not completed a step, or its model has no MoE layers",
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

/// Parses the lines of `routing.jsonl`. Returns those of the first one's shape, and how many others
/// there are. A last line without its end is not counted: the run may be writing it.
fn parse(text: &[u8]) -> (Vec<RoutingLine>, usize) {
    let mut lines: Vec<RoutingLine> = Vec::new();
    let mut damaged = 0;
    for text in text.split_inclusive(|&byte| byte == b'\n') {
        let line = serde_json::from_slice::<RoutingLine>(text).ok();
        let fits = |line: &RoutingLine| {
            lines
                .first()
                .is_none_or(|first| has_same_shape(line, first))
        };
        match line.filter(fits) {
            Some(line) => lines.push(line),
            None if text.ends_with(b"\n") => damaged += 1,
            None => {}
        }
    }
    (lines, damaged)
}

fn has_same_shape(a: &RoutingLine, b: &RoutingLine) -> bool {
    let experts = |line: &RoutingLine| -> Vec<usize> {
        line.tokens_per_expert.iter().map(Vec::len).collect()
    };
    experts(a) == experts(b)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutated::{MUTATIONS, mutated};
    use proptest::prelude::*;

    const LINES: &[u8] = b"\
{\"step\":1,\"tokens_per_expert\":[[3,5],[8,0]]}
{\"step\":2,\"tokens_per_expert\":[[4,4],[1,7]]}
{\"step\":3,\"tokens_per_expert\":[[2,6],[0,8]]}
";

    #[test]
    fn damaged_lines_are_counted() {
        assert_eq!(parse(LINES).0.len(), 3);
        let other_shape = b"{\"step\":4,\"tokens_per_expert\":[[2,6]]}\n";
        let cut_off = b"{\"step\":5,\"tok";
        let (lines, damaged) = parse(&[LINES, other_shape, b"?\n", cut_off].concat());
        assert_eq!((lines.len(), damaged), (3, 2));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(MUTATIONS))]

        #[test]
        fn mutated_lines_are_drawn(text in mutated(LINES.to_vec())) {
            let slices = slices(&parse(&text).0, 2);
            heat::text(&slices, WIDTH);
            heat::svg(&slices, "mutated");
        }
    }
}
