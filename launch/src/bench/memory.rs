//! `moerun bench memory`: measured memory of many layouts, compared with `moerun plan mesh`.

use super::{
    figures::{largest_of_ranks, mib, round},
    runner::{train, with_temp_dir, write_tokens},
};
use crate::cli::MemoryArgs;
use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};
use std::{path::Path, process::ExitCode};
use trainer::config::Config;

const VOCAB: usize = 8192;

pub(crate) fn run(args: &MemoryArgs) -> Result<ExitCode> {
    with_temp_dir(|folder| measure(args, folder))
}

struct Layout {
    ranks: usize,
    parallel: Value,
    attention: &'static str,
}

impl Layout {
    fn name(&self) -> String {
        let parallel = self.parallel.to_string().replace('"', "");
        let name = format!("{}: {parallel}", self.ranks);
        match self.attention {
            "grouped" => name,
            kind => format!("{name}, {kind}"),
        }
    }
}

/// Returns the section `model.attention` of a name.
fn attention(name: &str) -> Value {
    match name {
        "windows" => json!({"grouped": {
            "window": {"size": 128, "layers": {"every": 2}}, "sinks": true,
        }}),
        "latent" => json!({"latent": {
            "query_rank": 192, "kv_rank": 128, "nope_dim": 32, "rope_dim": 16, "value_dim": 32,
        }}),
        _ => json!({"grouped": {}}),
    }
}

fn layouts() -> Vec<Layout> {
    let mut layouts = layouts_of_grouped_attention();
    for attention in ["windows", "latent"] {
        let layout = |ranks, parallel| Layout {
            ranks,
            parallel,
            attention,
        };
        layouts.extend([
            layout(1, json!({})),
            layout(4, json!({"zero": 3})),
            layout(4, json!({"tensor": 4, "expert": 4})),
            layout(4, json!({"context": 4, "expert": 4})),
            layout(
                4,
                json!({"context": 4, "expert": 4, "context_attention": "ulysses"}),
            ),
            layout(2, json!({"pipeline": 2})),
            layout(1, json!({"recompute": {"parts": ["attention"]}})),
            layout(1, json!({"recompute": {"layers": "all"}})),
        ]);
    }
    layouts
}

fn layouts_of_grouped_attention() -> Vec<Layout> {
    let attention = "grouped";
    let layout = |ranks, parallel| Layout {
        ranks,
        parallel,
        attention,
    };
    let half_memory = json!({"pipeline": 2, "tensor": 2, "expert": 2, "schedule": "v-half"});
    vec![
        layout(1, json!({})),
        layout(4, json!({})),
        layout(4, json!({"zero": 1})),
        layout(4, json!({"zero": 2})),
        layout(4, json!({"zero": 3})),
        layout(4, json!({"zero": 3, "zero_group_size": 2})),
        layout(4, json!({"expert": 4})),
        layout(4, json!({"expert": 2, "zero": 1})),
        layout(4, json!({"tensor": 2, "expert": 2, "expert_tensor": 2})),
        layout(4, json!({"tensor": 4, "expert": 4})),
        layout(4, json!({"context": 4, "expert": 4})),
        layout(2, json!({"pipeline": 2})),
        layout(4, json!({"pipeline": 4, "vocabulary": "vocab-2"})),
        layout(4, half_memory),
        layout(1, json!({"recompute": {"parts": ["norm"]}})),
        layout(1, json!({"recompute": {"parts": ["attention"]}})),
        layout(1, json!({"recompute": {"parts": ["dispatch", "experts"]}})),
        layout(1, json!({"recompute": {"layers": "all"}})),
    ]
}

fn measure(args: &MemoryArgs, folder: &Path) -> Result<ExitCode> {
    write_tokens(folder, VOCAB)?;
    for layout in layouts() {
        let (name, ranks) = (layout.name(), layout.ranks);
        if args.case.as_ref().is_some_and(|case| *case != name) {
            continue;
        }
        let config = experiment(folder, &layout);
        let parsed: Config = serde_json::from_value(config.clone())
            .context("the configuration of the bench is invalid")?;
        let planned = parsed.memory(ranks).map_err(|error| anyhow!(error))?;
        let most_loaded = planned
            .iter()
            .map(|equal| equal.memory.total())
            .max()
            .unwrap_or(0) as f64;
        let steps = train(folder, &config, ranks, Some(1))?;
        let last = steps.last().expect("train refuses fewer than two steps");
        let measured = largest_of_ranks(last, "peak_memory");
        let resident = largest_of_ranks(last, "peak_resident");
        let line = json!({
            "bench": "memory",
            "case": name,
            "ranks": ranks,
            "measured_mib": mib(measured),
            "planned_mib": mib(most_loaded),
            "planned_over_measured": round(most_loaded / measured, 3),
            "resident_mib": mib(resident),
        });
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

fn experiment(folder: &Path, layout: &Layout) -> Value {
    json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "log_every": 1000},
        "parallel": layout.parallel,
        "model": {"vocab_size": VOCAB, "hidden": 384, "layers": 4, "heads": 12,
                  "kv_heads": (layout.attention != "latent").then_some(4),
                  "attention": attention(layout.attention),
                  "moe": {"experts": 8, "top_k": 2, "ffn": 768,
                          // As the plan assumes.
                          "router": {"force_balance": true}}},
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": 512},
        "train": {"steps": 3, "global_batch": 16, "micro_batch": 4},
        "schedule": {"constant": {"lr": 1e-3}},
        "checkpoint": {"every": 0},
        "snapshot": {"every": 0},
    })
}
