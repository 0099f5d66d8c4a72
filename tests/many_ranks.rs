//! Metrics of runs with few and with many ranks.

use crate::agreement::{TIMEOUT, VOCAB, softmax, trainer_on, write_data};
use parallel::run_on_threads;
use serde_json::{Value, json};
use std::path::Path;
use trainer::{Progress, StepMetrics, ValidationMetrics, config::Config};

const STEPS: u64 = 5;

struct Silent;

impl Progress for Silent {
    fn step(&mut self, _: &StepMetrics, _: u64) {}
    fn validation(&mut self, _: &ValidationMetrics) {}
    fn note(&mut self, _: &str) {}
    fn warn(&mut self, message: &str) {
        panic!("{message}");
    }
}

/// Two stages, of which the first has two MoE layers and the second one.
fn config(folder: &Path, ranks: usize) -> Config {
    let config = json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "seed": 5, "log_every": 2},
        "parallel": {"pipeline": 2, "expert": 2, "stage_layers": [2, 1]},
        "model": {"vocab_size": VOCAB, "hidden": 16, "layers": 3, "heads": 2, "kv_heads": 1,
                  "moe": softmax("microbatch"), "init_std": 0.1},
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": 8},
        "train": {"steps": STEPS, "global_batch": ranks, "micro_batch": 1},
        "schedule": {"constant": {"lr": 3e-3}},
        "checkpoint": {"every": 0},
        "snapshot": {"every": 0},
    });
    let mut config: Config = serde_json::from_value(config).unwrap();
    config.model.moe.as_mut().unwrap().experts = 6;
    config
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|number| number.as_f64().unwrap())
        .collect()
}

/// Compares a distribution with the numbers of the ranks that have the figure.
fn assert_distribution(found: &Value, ranks: &[(usize, f64)], digits: f64) {
    let mut sorted: Vec<f64> = ranks.iter().map(|(_, value)| *value).collect();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len() - 1;
    let largest = sorted[last];
    let number = |key: &str| found[key].as_f64().unwrap();
    assert_eq!(number("count"), sorted.len() as f64, "{found}");
    assert!(
        (number("largest") - largest).abs() <= digits,
        "{found}: {largest}"
    );
    let rank = found["largest_rank"].as_u64().unwrap() as usize;
    let has_it = |(other, value): &(usize, f64)| *other == rank && largest - value <= digits;
    assert!(ranks.iter().any(has_it), "{found}");
    let off = (largest - sorted[0]) / 64.0 + digits;
    for (key, place) in [("median", 0.5), ("p90", 0.9)] {
        let expected = sorted[(last as f64 * place).round() as usize];
        assert!(
            (number(key) - expected).abs() <= off,
            "{key} of {found}: {expected}"
        );
    }
    let mean = sorted.iter().sum::<f64>() / sorted.len() as f64;
    assert!(
        (number("mean") - mean).abs() <= digits + mean * 1e-9,
        "{found}: {mean}"
    );
}

/// Lines of a run's files.
struct Lines {
    metrics: Vec<Value>,
    routing: Vec<Value>,
    ranks: Vec<Value>,
}

fn train(ranks: usize) -> Lines {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let config = config(folder.path(), ranks);
    assert_eq!(config.problems(ranks), Vec::<String>::new());
    run_on_threads(ranks, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, config.clone());
        trainer.run(&|| false, &mut Silent).unwrap();
    });
    let of = |file: &str| lines(&folder.path().join("run").join(file));
    Lines {
        metrics: of("metrics.jsonl"),
        routing: of("routing.jsonl"),
        ranks: of("ranks.jsonl"),
    }
}

/// Compares the distributions of a step with the lists of all `ranks`.
fn check_step(step: &Value, routing: &Value, line: &Value, ranks: usize) {
    let found = &step["rank_distributions"];
    let of_all = |key: &str| -> Vec<(usize, f64)> {
        let values = numbers(&line[key]);
        assert_eq!(values.len(), ranks);
        values.into_iter().enumerate().collect()
    };
    assert_distribution(&found["peak_memory"], &of_all("rank_peak_memory"), 0.0);
    assert_distribution(&found["peak_resident"], &of_all("rank_peak_resident"), 0.0);
    assert_distribution(&found["wait_ratio"], &of_all("rank_wait_ratio"), 1e-8);
    let layers = line["tokens_per_rank"].as_array().unwrap();
    let mut largest_imbalance = 0.0;
    for (layer, tokens) in layers.iter().enumerate() {
        let stage = if layer < 2 {
            0..ranks / 2
        } else {
            ranks / 2..ranks
        };
        let tokens = numbers(tokens);
        let of_stage = stage
            .map(|rank| (rank, tokens[rank]))
            .collect::<Vec<(usize, f64)>>();
        let routing = &routing["layers"][layer];
        assert_distribution(&routing["rank_tokens"], &of_stage, 0.0);
        let largest = of_stage
            .iter()
            .map(|(_, tokens)| *tokens)
            .fold(0.0, f64::max);
        let mean = tokens.iter().sum::<f64>() / of_stage.len() as f64;
        let imbalance = routing["rank_imbalance"].as_f64().unwrap();
        assert!((imbalance - largest / mean).abs() < 1e-9, "{imbalance}");
        largest_imbalance = f64::max(largest_imbalance, imbalance);
    }
    assert_eq!(step["rank_imbalance"]["largest"], largest_imbalance);
    let passes = line["rank_pass_ms"].as_array().unwrap().iter().enumerate();
    let forward: Vec<(usize, f64)> = passes
        .map(|(rank, passes)| (rank, passes["F"].as_f64().unwrap()))
        .collect();
    assert_distribution(&found["pass_ms"]["F"], &forward, 1e-5);
}

#[test]
fn steps_have_distributions_of_one_size_and_some_steps_have_lists() {
    let mut sizes = Vec::new();
    for ranks in [4, 128] {
        let lines = train(ranks);
        assert_eq!(lines.metrics.len(), STEPS as usize);
        let steps_of = |lines: &[Value]| -> Vec<u64> {
            let steps = lines.iter().map(|line| line["step"].as_u64().unwrap());
            steps.collect()
        };
        assert_eq!(steps_of(&lines.ranks), [1, 2, 4, 5]);
        assert_eq!(steps_of(&lines.routing), [1, 2, 4, 5]);
        for (line, routing) in lines.ranks.iter().zip(&lines.routing) {
            let step = &lines.metrics[line["step"].as_u64().unwrap() as usize - 1];
            check_step(step, routing, line, ranks);
        }
        for step in &lines.metrics {
            assert!(step["tokens_per_rank"].is_null(), "{step}");
            sizes.push(step.to_string().len());
        }
    }
    let smallest = sizes.iter().min().unwrap();
    let largest = sizes.iter().max().unwrap();
    // Numbers differ in their digits.
    assert!(largest - smallest < 200 && *largest < 4096, "{sizes:?}");
}
