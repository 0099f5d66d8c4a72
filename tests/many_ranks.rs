//! Metrics of a run with more ranks than a step's line lists.

use crate::agreement::{TIMEOUT, VOCAB, softmax, trainer_on, write_data};
use parallel::run_on_threads;
use serde_json::{Value, json};
use std::path::Path;
use trainer::{Progress, StepMetrics, config::Config};

const RANKS: usize = 66;
const STEPS: u64 = 5;

struct Silent;

impl Progress for Silent {
    fn step(&mut self, _: &StepMetrics, _: u64) {}
    fn validation(&mut self, _: u64, _: f64) {}
    fn note(&mut self, _: &str) {}
    fn warn(&mut self, message: &str) {
        panic!("{message}");
    }
}

/// Two stages, of which the first has two MoE layers and the second one.
fn config(folder: &Path) -> Config {
    let config = json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "seed": 5, "log_every": 2},
        "parallel": {"pipeline": 2, "expert": 3, "stage_layers": [2, 1]},
        "model": {"vocab_size": VOCAB, "hidden": 16, "layers": 3, "heads": 2, "kv_heads": 1,
                  "moe": softmax("microbatch"), "init_std": 0.1},
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": 8},
        "train": {"steps": STEPS, "global_batch": RANKS, "micro_batch": 1},
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
    let numbers = list.as_array().unwrap().iter();
    numbers.map(|number| number.as_f64().unwrap()).collect()
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

#[test]
fn steps_have_distributions_and_some_steps_have_lists() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let config = config(folder.path());
    assert_eq!(config.problems(RANKS), Vec::<String>::new());
    run_on_threads(RANKS, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, config.clone());
        trainer.run(&|| false, &mut Silent).unwrap();
    });
    let run = folder.path().join("run");
    let steps = lines(&run.join("metrics.jsonl"));
    let ranks = lines(&run.join("ranks.jsonl"));
    assert_eq!(steps.len(), STEPS as usize);
    let listed: Vec<u64> = ranks
        .iter()
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(listed, [1, 2, 4, 5]);
    let lists = [
        "tokens_per_rank",
        "rank_peak_memory",
        "rank_wait_ratio",
        "rank_pass_ms",
    ];
    for step in &steps {
        assert!(lists.iter().all(|list| step[list].is_null()), "{step}");
        assert!(
            step.to_string().len() < 8000,
            "{} bytes",
            step.to_string().len()
        );
    }
    for line in &ranks {
        let step = &steps[line["step"].as_u64().unwrap() as usize - 1];
        let found = &step["rank_distributions"];
        let of_all = |key: &str| -> Vec<(usize, f64)> {
            let values = numbers(&line[key]);
            assert_eq!(values.len(), RANKS);
            values.into_iter().enumerate().collect()
        };
        assert_distribution(&found["peak_memory"], &of_all("rank_peak_memory"), 0.0);
        assert_distribution(&found["peak_resident"], &of_all("rank_peak_resident"), 0.0);
        assert_distribution(&found["wait_ratio"], &of_all("rank_wait_ratio"), 1e-8);
        for (layer, tokens) in line["tokens_per_rank"]
            .as_array()
            .unwrap()
            .iter()
            .enumerate()
        {
            let stage = if layer < 2 {
                0..RANKS / 2
            } else {
                RANKS / 2..RANKS
            };
            let tokens = numbers(tokens);
            let of_stage: Vec<(usize, f64)> = stage.map(|rank| (rank, tokens[rank])).collect();
            assert_distribution(&found["tokens"][layer], &of_stage, 0.0);
            let largest = of_stage
                .iter()
                .map(|(_, tokens)| *tokens)
                .fold(0.0, f64::max);
            let mean = tokens.iter().sum::<f64>() / of_stage.len() as f64;
            let imbalance = step["rank_imbalance"][layer].as_f64().unwrap();
            assert!((imbalance - largest / mean).abs() < 1e-9, "{imbalance}");
        }
        let passes = line["rank_pass_ms"].as_array().unwrap().iter().enumerate();
        let forward: Vec<(usize, f64)> = passes
            .map(|(rank, passes)| (rank, passes["F"].as_f64().unwrap()))
            .collect();
        assert_distribution(&found["pass_ms"]["F"], &forward, 1e-5);
    }
}
