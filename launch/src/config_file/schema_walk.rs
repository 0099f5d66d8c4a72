//! A test that gives every number of the schema values at and beyond its limits.

use super::{forms::is_of_type, load};
use crate::{cli::ConfigArgs, hint::message, machine_memory::refuse_too_large};
use dataset::tokens::TokenWriter;
use parallel::{Cpu, run_on_threads};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, path::Path, time::Duration};
use trainer::{
    Trainer,
    config::{Config, resolve_schema, schema},
};

/// Values to try, as YAML.
const VALUES: [&str; 9] = [
    ".nan",
    ".inf",
    "-.inf",
    "-1",
    "0",
    "1e308",
    "2147483648",
    "9223372036854775808",
    "[]",
];
/// Stands for the value in a template.
const HOLE: &str = "@VALUE@";
const VOCABULARY: usize = 64;

/// A configuration with all sections, in which most numbers can be changed alone.
fn base(folder: &Path) -> Value {
    json!({
        "run": {"dir": folder.join("run"), "device": "cpu"},
        "parallel": {"recompute": {}},
        "model": {
            "vocab_size": VOCABULARY,
            "hidden": 16,
            "layers": 2,
            "heads": 2,
            "ffn": 16,
            "mup": {"width": 1},
            "moe": {
                "experts": 4,
                "top_k": 2,
                "ffn": 16,
                "router": {},
                "dispatch": "least_loaded",
                "least_loaded": {},
                "placement": {"every": 1},
            },
        },
        "data": {
            "train": [{"path": folder.join("tokens")}],
            "validation": [{"path": folder.join("tokens")}],
            "sequence_length": 8,
        },
        "train": {"steps": 2, "global_batch": 2, "micro_batch": 1},
        "optimizer": {},
        "schedule": {"constant": {"lr": 1e-3}},
        "checkpoint": {},
        "snapshot": {},
        "restart": {},
        "validation": {"every": 1, "sequences": 1},
    })
}

fn write_tokens(folder: &Path) {
    let mut writer = TokenWriter::create(&folder.join("tokens"), VOCABULARY).unwrap();
    let tokens: Vec<u32> = (0..2000u32).map(|n| n * 7 % VOCABULARY as u32).collect();
    writer.push(&tokens).unwrap();
    writer.finish().unwrap();
}

fn list(node: &'static Value) -> impl Iterator<Item = &'static Value> {
    node.as_array().into_iter().flatten()
}

/// Templates of a value in which a number is replaced by [`HOLE`], one per number.
struct Templates<'a> {
    folder: &'a Path,
    /// The dotted key of the section, and its template.
    found: Vec<(String, Value)>,
}

impl Templates<'_> {
    /// Adds the numbers below a section of the base configuration.
    fn add_section(&mut self, node: &'static Value, key: &str) {
        for (name, child) in resolve_schema(node)["properties"]
            .as_object()
            .into_iter()
            .flatten()
        {
            let key = if key.is_empty() {
                name.clone()
            } else {
                format!("{key}.{name}")
            };
            if self.is_section(child) {
                self.add_section(self.section(child), &key);
            } else {
                for template in self.holes(child) {
                    self.found.push((key.clone(), template));
                }
            }
        }
    }

    /// Returns the schema of a section, without the null of an optional one.
    fn section(&self, node: &'static Value) -> &'static Value {
        let node = resolve_schema(node);
        let mut options = list(&node["anyOf"]).map(resolve_schema);
        options
            .find(|option| option.get("properties").is_some())
            .unwrap_or(node)
    }

    fn is_section(&self, node: &'static Value) -> bool {
        let options: Vec<_> = list(&resolve_schema(node)["anyOf"]).collect();
        let is_optional = options.iter().any(|option| is_of_type(option, "null"));
        let section = self.section(node);
        section.get("properties").is_some() && (options.is_empty() || is_optional)
    }

    /// Returns the forms of a value with a hole in it.
    fn holes(&self, node: &'static Value) -> Vec<Value> {
        let node = resolve_schema(node);
        let mut found = Vec::new();
        if is_of_type(node, "integer") || is_of_type(node, "number") {
            found.push(json!(HOLE));
        }
        for item in self.holes_of(&node["items"]) {
            found.push(json!([item]));
        }
        for option in list(&node["anyOf"]).chain(list(&node["oneOf"])) {
            found.extend(self.holes(option));
        }
        for (name, child) in node["properties"].as_object().into_iter().flatten() {
            for hole in self.holes(child) {
                let mut object = self.required(node);
                object.insert(name.clone(), hole);
                found.push(object.into());
            }
        }
        found
    }

    fn holes_of(&self, items: &'static Value) -> Vec<Value> {
        if items.is_object() {
            self.holes(items)
        } else {
            Vec::new()
        }
    }

    /// Returns an object with its required keys.
    fn required(&self, node: &'static Value) -> Map<String, Value> {
        let without_folder = list(&node["else"]["required"]);
        let required = list(&node["required"]).chain(without_folder);
        required
            .filter_map(Value::as_str)
            .map(|name| (name.to_string(), self.sample(&node["properties"][name])))
            .collect()
    }

    /// Returns a valid value.
    fn sample(&self, node: &'static Value) -> Value {
        let node = resolve_schema(node);
        if node["format"] == "path" {
            return json!(self.folder.join("tokens"));
        }
        if is_of_type(node, "integer") {
            return node["minimum"].clone();
        }
        if is_of_type(node, "number") {
            return json!(1e-3);
        }
        self.required(node).into()
    }
}

/// The outcome of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Refused,
    Trained,
}

/// Loads the configuration with this change, and trains two steps if nothing refuses it.
///
/// Returns the message of a refusal, or None.
fn try_change(file: &Path, change: String) -> Option<String> {
    let args = ConfigArgs {
        config: file.to_path_buf(),
        set: vec![change],
    };
    let config = match load(&args) {
        Ok(config) => config,
        Err(error) => return Some(message(&error)),
    };
    let problems = config.problems(1);
    if !problems.is_empty() {
        return Some(problems.join("; "));
    }
    if let Err(error) = refuse_too_large(&config, 1, 1) {
        return Some(format!("{} {}", args.set[0], message(&error)));
    }
    train_two_steps(config)
}

/// Returns the error of an unusable configuration. Panics if a figure is not finite.
fn train_two_steps(config: Config) -> Option<String> {
    let results = run_on_threads(1, Duration::from_secs(60), move |world| {
        let mut trainer = match Trainer::new(config.clone(), world, Box::new(Cpu)) {
            Ok(trainer) => trainer,
            Err(error) => return Some(error.to_string()),
        };
        for _ in 0..2 {
            let (metrics, _) = trainer.train_step(false).unwrap();
            for figure in [metrics.loss, metrics.grad_norm, metrics.lr] {
                assert!(figure.is_finite(), "{metrics:?}");
            }
        }
        None
    });
    results.into_iter().next().unwrap()
}

#[test]
fn every_number_is_refused_by_name_or_trains() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    write_tokens(folder.path());
    let file = folder.path().join("x.yaml");
    std::fs::write(&file, base(folder.path()).to_string()).unwrap();
    let mut templates = Templates {
        folder: folder.path(),
        found: Vec::new(),
    };
    templates.add_section(schema(), "");
    let keys = templates.found.len();
    let mut counts: BTreeMap<Outcome, usize> = BTreeMap::new();
    for (key, template) in &templates.found {
        for value in VALUES {
            let text = template.to_string().replace(&format!("\"{HOLE}\""), value);
            let change = format!("{key}={text}");
            let outcome = match try_change(&file, change.clone()) {
                None => Outcome::Trained,
                Some(refusal) => {
                    let name = key.rsplit('.').next().unwrap();
                    assert!(refusal.contains(name), "{change}: {refusal}");
                    Outcome::Refused
                }
            };
            *counts.entry(outcome).or_default() += 1;
        }
    }
    let refused = counts[&Outcome::Refused];
    let trained = counts[&Outcome::Trained];
    eprintln!(
        "{keys} numbers x {} values: {refused} refused, {trained} trained",
        VALUES.len()
    );
    assert_eq!(refused + trained, keys * VALUES.len());
    assert!(
        keys > 80 && trained > 50,
        "{keys} numbers, {trained} trained"
    );
}
