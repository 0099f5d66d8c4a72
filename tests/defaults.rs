//! Defaults: they train, and refuse nothing.

use crate::{
    agreement::{trace_of, write_data},
    fixture::{Experiment, curve, finish, text},
};
use serde_json::{Value, json};
use std::path::Path;
use trainer::config::Config;

/// Returns a model in which only the loss itself has a gradient for the router.
fn one_expert_per_token(folder: &Path, moe: &Value) -> Config {
    let mut of_model = json!({"experts": 6, "top_k": 1, "ffn": 24, "load_balance": 0.0});
    for (key, value) in moe.as_object().unwrap() {
        of_model[key] = value.clone();
    }
    let config = json!({
        "run": {"dir": folder.join("run"), "device": "cpu", "seed": 3},
        "model": {"vocab_size": 67, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2,
                  "init_std": 0.08, "moe": of_model},
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": 20},
        "train": {"steps": 2, "global_batch": 8, "micro_batch": 2},
        "checkpoint": {"every": 0},
    });
    serde_json::from_value(config).unwrap()
}

#[test]
fn the_router_of_a_single_choice_has_a_gradient() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    for moe in [
        json!({}),
        json!({"router": {"score": "sigmoid"}}),
        json!({"shared_experts": 1, "router": {"scale": 2.0}}),
        json!({"experts": 8, "top_k": 2}),
    ] {
        let trace = trace_of(1, one_expert_per_token(folder.path(), &moe));
        let mut routers = 0;
        for (name, gradient) in &trace.first_gradients {
            if name.ends_with(".gate") {
                let norm: f32 = gradient.iter().map(|value| value * value).sum();
                assert!(norm.sqrt() > 1e-4, "{moe}: {name} has norm {}", norm.sqrt());
                routers += 1;
            }
        }
        assert_eq!(routers, 2, "{moe}");
    }
    for score in ["softmax", "sigmoid"] {
        let router = json!({"router": {"score": score, "normalize": true}});
        let problems = one_expert_per_token(folder.path(), &router).problems(1);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(
            problems[0].contains("no gradient for the router"),
            "{problems:?}"
        );
    }
}

/// Returns the configuration in README.md.
fn readme_example() -> String {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let readme = std::fs::read_to_string(project.join("README.md")).unwrap();
    let (_, example) = readme.split_once("```yaml\n").unwrap();
    example.split_once("```").unwrap().0.to_string()
}

#[test]
fn the_example_of_the_readme_runs_with_any_number_of_steps() {
    let experiment = Experiment::new();
    let example = readme_example().replace("data/mine", "data");
    std::fs::write(experiment.path("small.yaml"), example).unwrap();
    for steps in ["1", "2", "3", "9", "20", "99", "101", "1000000"] {
        let steps = format!("train.steps={steps}");
        let args = ["config", "check", "small.yaml", "-n", "2", "--set", &steps];
        let checked = finish(&mut experiment.moerun(&args));
        assert!(checked.status.success(), "{steps}: {}", text(&checked));
    }
    let small = ["model.vocab_size=512", "data.sequence_length=32"];
    for steps in ["train.steps=1", "train.steps=20"] {
        let dir = format!("run.dir={}", steps.replace("train.", ""));
        let changes = [&small[..], &[steps, &dir, "checkpoint.every=0"]].concat();
        let trained = finish(&mut experiment.train(2, &changes));
        assert!(trained.status.success(), "{steps}: {}", text(&trained));
    }
}

/// Returns a model without a schedule.
fn without_schedule(experiment: &Experiment, hidden: usize) {
    let text = format!(
        "run: {{dir: run, device: cpu, seed: 1}}\n\
         model:\n\
         \x20 vocab_size: 512\n\
         \x20 hidden: {hidden}\n\
         \x20 layers: 2\n\
         \x20 heads: 4\n\
         \x20 moe: {{experts: 4, top_k: 2, ffn: {hidden}}}\n\
         data: {{train: [{{path: data/train}}], sequence_length: 32}}\n\
         train: {{steps: 80, global_batch: 8, micro_batch: 8}}\n\
         checkpoint: {{every: 0}}\n"
    );
    std::fs::write(experiment.path("small.yaml"), text).unwrap();
}

/// Trains and returns the mean loss of the last 10 steps, and what was printed.
fn loss_of(experiment: &Experiment, dir: &str, changes: &[&str]) -> (f64, String) {
    let dir_change = format!("run.dir={dir}");
    let output = finish(&mut experiment.train(1, &[changes, &[&*dir_change]].concat()));
    assert!(output.status.success(), "{}", text(&output));
    let lines = curve(experiment, dir);
    let losses = lines.iter().filter_map(|line| line["loss"].as_f64());
    let last: Vec<f64> = losses.skip(70).collect();
    assert_eq!(last.len(), 10);
    (last.iter().sum::<f64>() / 10.0, text(&output))
}

#[test]
fn a_configuration_without_a_schedule_does_not_train_at_rates_for_mup() {
    let experiment = Experiment::new();
    without_schedule(&experiment, 256);
    let (loss, said) = loss_of(&experiment, "default", &[]);
    assert!(!said.contains("warning"), "{said}");
    // The rate is capped at 0.02 after 8 steps.
    let power = "schedule={power: {a: 100}}";
    let (too_fast, said) = loss_of(&experiment, "power", &[power]);
    let warning = "warning: schedule.power has constants of arXiv 2408.13359";
    assert_eq!(said.matches(warning).count(), 1, "{said}");
    assert!(loss < too_fast - 0.2, "default {loss}, power {too_fast}");
    // A fixed rate near the best one is not much better.
    let wsd = "schedule={wsd: {lr: 1e-3, warmup_steps: 8, decay_steps: 16}}";
    let (fixed, _) = loss_of(&experiment, "wsd", &[wsd]);
    assert!((loss - fixed).abs() < 1e-6, "default {loss}, wsd {fixed}");
}

#[test]
fn check_prints_what_defaults_stand_for() {
    let experiment = Experiment::new();
    without_schedule(&experiment, 128);
    let check = |changes: &[&str]| {
        let mut command = experiment.moerun(&["config", "check", "small.yaml"]);
        for change in changes {
            command.args(["--set", change]);
        }
        let output = finish(&mut command);
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    };
    let said = check(&[]);
    for line in [
        "lr: 0.002",
        "warmup_steps: 8",
        "decay_steps: 16",
        "normalize: true",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let said = check(&[
        "model.moe.top_k=1",
        "schedule={power: {}}",
        "train.steps=33",
    ]);
    for line in [
        "normalize: false",
        "warmup_steps: 4",
        "warning: schedule.power has constants of arXiv 2408.13359",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    // Rates for maximal update parametrization are those of the base width.
    let said = check(&["model.mup={width: 2}", "model.hidden=512"]);
    assert!(said.contains("lr: 0.001"), "{said}");
}
