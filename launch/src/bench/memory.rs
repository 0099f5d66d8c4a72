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
    variant: Variant,
}

/// A change of the configuration of the bench.
#[derive(Clone, Copy)]
struct Variant {
    name: &'static str,
    apply: fn(&mut Value),
}

const STANDARD: Variant = Variant {
    name: "",
    apply: |_| {},
};

const WINDOWS: Variant = Variant {
    name: "windows",
    apply: |config| {
        config["model"]["attention"] = json!({"grouped": {
            "window": {"size": 128, "layers": {"every": 2}}, "sinks": true,
        }});
    },
};

const LATENT: Variant = Variant {
    name: "latent",
    apply: |config| {
        config["model"]["kv_heads"] = Value::Null;
        config["model"]["attention"] = json!({"latent": {
            "query_rank": 192, "kv_rank": 128, "nope_dim": 32, "rope_dim": 16, "value_dim": 32,
        }});
    },
};

/// Muon, with so few tokens that a step needs the most memory in the optimizer.
const MUON: Variant = Variant {
    name: "muon",
    apply: |config| {
        config["optimizer"] = json!({"groups": [{"muon": {}}]});
        config["data"]["sequence_length"] = json!(32);
        config["train"]["micro_batch"] = json!(1);
    },
};

impl Layout {
    fn name(&self) -> String {
        let parallel = self.parallel.to_string().replace('"', "");
        let name = format!("{}: {parallel}", self.ranks);
        match self.variant.name {
            "" => name,
            variant => format!("{name}, {variant}"),
        }
    }
}

fn layouts() -> Vec<Layout> {
    let of_variant = |variant: Variant, layouts: Vec<(usize, Value)>| {
        let layout = move |(ranks, parallel)| Layout {
            ranks,
            parallel,
            variant,
        };
        layouts.into_iter().map(layout)
    };
    let muon = [json!({}), json!({"zero": 3})].map(|parallel| (4, parallel));
    of_variant(STANDARD, standard_layouts())
        .chain(of_variant(WINDOWS, attention_layouts()))
        .chain(of_variant(LATENT, attention_layouts()))
        .chain(of_variant(MUON, muon.to_vec()))
        .collect()
}

fn standard_layouts() -> Vec<(usize, Value)> {
    vec![
        (1, json!({})),
        (4, json!({})),
        (4, json!({"zero": 1})),
        (4, json!({"zero": 2})),
        (4, json!({"zero": 3})),
        (4, json!({"zero": 3, "zero_group_size": 2})),
        (4, json!({"expert": 4})),
        (4, json!({"expert": 2, "zero": 1})),
        (4, json!({"tensor": 2, "expert": 2, "expert_tensor": 2})),
        (4, json!({"tensor": 4, "expert": 4})),
        (4, json!({"context": 4, "expert": 4})),
        (2, json!({"pipeline": 2})),
        (4, json!({"pipeline": 4, "vocabulary": "vocab-2"})),
        (
            4,
            json!({"pipeline": 2, "tensor": 2, "expert": 2, "schedule": "v-half"}),
        ),
        (1, json!({"recompute": {"parts": ["norm"]}})),
        (1, json!({"recompute": {"parts": ["attention"]}})),
        (1, json!({"recompute": {"parts": ["dispatch", "experts"]}})),
        (1, json!({"recompute": {"layers": "all"}})),
    ]
}

fn attention_layouts() -> Vec<(usize, Value)> {
    vec![
        (1, json!({})),
        (4, json!({"zero": 3})),
        (4, json!({"tensor": 4, "expert": 4})),
        (4, json!({"context": 4, "expert": 4})),
        (
            4,
            json!({"context": 4, "expert": 4, "context_attention": "ulysses"}),
        ),
        (2, json!({"pipeline": 2})),
        (1, json!({"recompute": {"parts": ["attention"]}})),
        (1, json!({"recompute": {"layers": "all"}})),
    ]
}

fn measure(args: &MemoryArgs, folder: &Path) -> Result<ExitCode> {
    write_tokens(folder, VOCAB)?;
    for layout in layouts() {
        let name = layout.name();
        let ranks = layout.ranks;
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
    let mut config = json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "log_every": 1000},
        "parallel": layout.parallel,
        "model": {"vocab_size": VOCAB, "hidden": 384, "layers": 4, "heads": 12, "kv_heads": 4,
                  "moe": {"experts": 8, "top_k": 2, "ffn": 768,
                          // As the plan assumes.
                          "router": {"force_balance": true}}},
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": 512},
        "train": {"steps": 3, "global_batch": 16, "micro_batch": 4},
        "schedule": {"constant": {"lr": 1e-3}},
        "checkpoint": {"every": 0},
        "snapshot": {"every": 0},
    });
    (layout.variant.apply)(&mut config);
    config
}
