//! `moerun model inspect`: describes the folder of a model.

use crate::cli::ModelInspectArgs;
use anyhow::Result;
use std::process::ExitCode;
use trainer::{ModelFolder, ParameterCount};

/// Bytes of a parameter's fp32 weight, its gradient and two moments of AdamW.
const TRAINING_BYTES: f64 = 16.0;
const GIB: f64 = (1u64 << 30) as f64;
const BILLION: f64 = 1e9;
const MILLION: f64 = 1e6;
/// Names of tensors that are listed.
const LISTED: usize = 8;

pub(crate) fn run(args: &ModelInspectArgs) -> Result<ExitCode> {
    let folder = ModelFolder::open(&args.folder)?;
    folder.check_repeated()?;
    let model = folder.model();
    let ParameterCount { total, active } = model.num_parameters();
    let dtypes = folder.bytes_by_dtype();
    let stored: Vec<String> = dtypes
        .iter()
        .map(|(dtype, bytes)| format!("{:.2} GiB {dtype}", *bytes as f64 / GIB))
        .collect();
    println!("family:     {}", folder.family());
    println!("parameters: {}, {} per token", count(total), count(active));
    println!(
        "tensors:    {} ({})",
        folder.num_tensors(),
        stored.join(", ")
    );
    println!(
        "training:   {:.1} GiB of fp32 weights, gradients and moments of AdamW over all ranks, \
         and activations",
        total as f64 * TRAINING_BYTES / GIB
    );
    let carried = folder.carried();
    if !carried.is_empty() {
        println!(
            "not trained, and copied by an export: {} tensors",
            carried.len()
        );
        for name in carried.iter().take(LISTED) {
            println!("  {name}");
        }
        if carried.len() > LISTED {
            println!("  and {} more", carried.len() - LISTED);
        }
    }
    println!("the section model of a run:");
    let section = serde_saphyr::to_string(model)?;
    for line in section.lines() {
        println!("  {line}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns a number of parameters in the unit that suits it.
fn count(parameters: u128) -> String {
    let number = parameters as f64;
    if number >= BILLION {
        format!("{:.2} billion", number / BILLION)
    } else if number >= MILLION {
        format!("{:.2} million", number / MILLION)
    } else {
        parameters.to_string()
    }
}
