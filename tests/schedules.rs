//! Learning rates and batch ramps of real runs: units, ends, changes on a resume.

use crate::fixture::{
    Experiment, curve, finish, finish_child, rank_process, signal, start, text, wait_for_step,
};
use serde_json::Value;

/// Trains to the end and returns what was printed.
fn train(experiment: &Experiment, ranks: usize, changes: &[&str]) -> String {
    let output = finish(&mut experiment.train(ranks, changes));
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

/// Returns the metrics of the steps of a run, without validations.
fn steps(experiment: &Experiment, run: &str) -> Vec<Value> {
    let lines = curve(experiment, run).into_iter();
    lines.filter(|line| line["loss"].is_number()).collect()
}

fn rates(experiment: &Experiment, run: &str) -> Vec<f64> {
    let steps = steps(experiment, run);
    steps
        .iter()
        .map(|line| line["lr"].as_f64().unwrap())
        .collect()
}

fn assert_rates(rates: &[f64], expected: &[f64], what: &str) {
    assert_eq!(rates.len(), expected.len(), "{what}: {rates:?}");
    for (step, (rate, expected)) in rates.iter().zip(expected).enumerate() {
        let error = (rate / expected - 1.0).abs();
        assert!(error < 1e-6, "{what}, step {}: {rate} {expected}", step + 1);
    }
}

/// Asserts that each step after the warm-up has the rate of the power law at the tokens seen.
fn assert_power_law(experiment: &Experiment, run: &str, warmup: usize) {
    let steps = steps(experiment, run);
    let mut before = 0.0;
    for (index, line) in steps.iter().enumerate() {
        let seen = line["tokens"].as_f64().unwrap();
        let law = (seen - before) / 4096.0 * 4.0 * seen.powf(-0.51);
        before = seen;
        let rate = line["lr"].as_f64().unwrap();
        let is_law = (rate / law - 1.0).abs() < 1e-6;
        assert!(
            is_law || index + 1 < warmup,
            "{run}: {rate} {law} in {line}"
        );
    }
}

const POWER: &str = "schedule={power: {max_lr: 1.0, warmup_steps: 3}}";

#[test]
fn power_after_a_change_of_batch_or_length_follows_the_tokens_seen() {
    let experiment = Experiment::new();
    for (ranks, layout) in [(1, "parallel={}"), (4, "parallel={expert: 2}")] {
        for (run, change, tokens) in [
            ("batch", "train.global_batch=32", 20 * 256 + 10 * 1024),
            ("length", "data.sequence_length=64", 20 * 256 + 10 * 512),
        ] {
            let dir = format!("run.dir={run}{ranks}");
            let run = format!("{run}{ranks}");
            train(&experiment, ranks, &[layout, POWER, &dir]);
            train(
                &experiment,
                ranks,
                &[layout, POWER, &dir, "train.steps=30", change],
            );
            assert_power_law(&experiment, &run, 3);
            let steps = steps(&experiment, &run);
            assert_eq!(steps.len(), 30);
            assert_eq!(steps[29]["tokens"], tokens, "{run}");
        }
    }
}

#[test]
fn every_step_trains_and_the_last_rate_is_the_final_ratio() {
    let experiment = Experiment::new();
    let exponential = |x: f64| ((1.0 - x).exp() - 1.0) / (std::f64::consts::E - 1.0);
    let law = |step: f64| 256.0 / 4096.0 * 4.0 * (step * 256.0).powf(-0.51);
    let mut power: Vec<f64> = [1.0, 2.0, 3.0].map(|step| step / 3.0 * law(3.0)).to_vec();
    power.extend([4.0, 5.0, 6.0, 7.0, 8.0].map(law));
    power.extend([1.0, 2.0, 3.0, 4.0].map(|k| law(8.0) * exponential(k / 5.0)));
    let warmup = [1e-2 / 3.0, 2e-2 / 3.0, 1e-2];
    let mut wsd = warmup.to_vec();
    wsd.extend([1e-2; 5]);
    wsd.extend([1.0, 2.0, 3.0, 4.0f64].map(|k| 1e-2 * (1.0 - (k / 5.0).sqrt())));
    let falling = |last: f64, beyond: f64, shape: fn(f64) -> f64| {
        let mut rates = warmup.to_vec();
        let fall = |k: i32| 1e-2 * (last + (1.0 - last) * shape(f64::from(k) / (9.0 + beyond)));
        rates.extend((1..=9).map(fall));
        rates
    };
    let cosine = |x: f64| (1.0 + (std::f64::consts::PI * x).cos()) / 2.0;
    let linear = |x: f64| 1.0 - x;
    for (run, schedule, expected) in [
        (
            "power",
            "{power: {max_lr: 1.0, warmup_steps: 3, decay_steps: 4}}",
            power,
        ),
        (
            "wsd",
            "{wsd: {lr: 1e-2, warmup_steps: 3, decay_steps: 4}}",
            wsd,
        ),
        (
            "cosine",
            "{cosine: {lr: 1e-2, warmup_steps: 3, final_ratio: 0.1}}",
            falling(0.1, 0.0, cosine),
        ),
        (
            "linear",
            "{linear: {lr: 1e-2, warmup_steps: 3, final_ratio: 0.1}}",
            falling(0.1, 0.0, linear),
        ),
        (
            "linear-to-zero",
            "{linear: {lr: 1e-2, warmup_steps: 3}}",
            falling(0.0, 1.0, linear),
        ),
        (
            "cosine-in-tokens",
            "{cosine: {lr: 1e-2, warmup_tokens: 768, final_ratio: 0.1}}",
            falling(0.1, 0.0, cosine),
        ),
    ] {
        let schedule = format!("schedule={schedule}");
        let dir = format!("run.dir={run}");
        let changes = [&*schedule, &dir, "train.steps=12", "checkpoint.every=0"];
        train(&experiment, 1, &[&changes[..], &["parallel={}"]].concat());
        let rates = rates(&experiment, run);
        assert_rates(&rates, &expected, run);
        assert!(rates[11] > 0.0);
        if ["cosine", "linear"].contains(&run) {
            assert_eq!(rates[11], 1e-2 * 0.1, "{run}");
        }
    }
}

#[test]
fn a_resume_whose_rate_jumps_prints_both_values() {
    let experiment = Experiment::new();
    let wsd = "schedule={wsd: {lr: 1e-2, decay_steps: 4}}";
    let first = train(&experiment, 1, &["parallel={}", wsd, "train.steps=10"]);
    assert!(!first.contains("the learning rate jumps"), "{first}");
    let longer = train(&experiment, 1, &["parallel={}", wsd, "train.steps=20"]);
    let jump = "the learning rate jumps from 1.056e-3 in step 10 to 1.000e-2 in step 11";
    assert!(longer.contains(jump), "{longer}");
    // Another 20 steps at a rate that is a tenth lower: no jump worth a warning.
    let constant = |lr: &str| format!("schedule={{constant: {{lr: {lr}}}}}");
    let changes = |lr: &str| [constant(lr), "run.dir=constant".to_string()];
    let run = |lr: &str, steps: &str| {
        let [schedule, dir] = changes(lr);
        train(&experiment, 1, &["parallel={}", &schedule, &dir, steps])
    };
    run("1e-2", "train.steps=5");
    let said = run("9e-3", "train.steps=10");
    assert!(
        said.contains("changed since") && !said.contains("jumps"),
        "{said}"
    );
    let said = run("7e-3", "train.steps=15");
    assert!(
        said.contains("jumps from 9.000e-3 in step 10 to 7.000e-3"),
        "{said}"
    );
}

/// Six steps of 8 sequences begin before 1400 tokens, and then steps have 16.
const RAMP: &str = "train.global_batch=[{tokens: 0, sequences: 8}, {tokens: 1400, sequences: 16}]";

/// A schedule whose beginning does not depend on the end of the run.
const STEADY: &str = "schedule={power: {max_lr: 1.0, warmup_steps: 2}}";

#[test]
fn a_ramp_equals_runs_of_one_batch_each() {
    let experiment = Experiment::new();
    let by_microbatch = "model.moe.load_balance_over=microbatch";
    for (ranks, layout, balance) in [
        (1, "parallel={}", "model.moe.load_balance_over=sequence"),
        (4, "parallel={expert: 2}", by_microbatch),
        (
            2,
            "parallel={pipeline: 2}",
            "model.moe.load_balance_over=batch",
        ),
    ] {
        let common = [layout, balance, STEADY, "validation.every=100"];
        let run = |dir: &str, steps: &str, batch: &str| {
            let dir = format!("run.dir={dir}-{ranks}");
            let own = [&*dir, steps, batch];
            train(&experiment, ranks, &[&common[..], &own].concat());
        };
        run("ramp", "train.steps=12", RAMP);
        run("chain", "train.steps=6", "train.global_batch=8");
        run("chain", "train.steps=12", "train.global_batch=16");
        let ramp = steps(&experiment, &format!("ramp-{ranks}"));
        assert_eq!(ramp[11]["tokens"], 6 * 256 + 6 * 512);
        assert_eq!(
            ramp,
            steps(&experiment, &format!("chain-{ranks}")),
            "{layout}"
        );
        assert_power_law(&experiment, &format!("ramp-{ranks}"), 2);
    }
}

#[test]
fn a_run_stopped_within_a_ramp_resumes_bit_for_bit() {
    let experiment = Experiment::new();
    let ramp = "train.global_batch=[{tokens: 0, sequences: 8}, {tokens: 3000, sequences: 16}, \
                {tokens: 9000, sequences: 32}]";
    let common = [ramp, STEADY, "checkpoint.every=4"];
    let run = |ranks: usize, dir: &str, steps: &str| {
        let dir = format!("run.dir={dir}");
        train(&experiment, ranks, &[&common[..], &[&dir, steps]].concat())
    };
    run(4, "unbroken", "train.steps=40");
    for steps in ["train.steps=7", "train.steps=18", "train.steps=40"] {
        run(4, "stopped", steps);
    }
    let unbroken = steps(&experiment, "unbroken");
    assert_eq!(unbroken, steps(&experiment, "stopped"));
    // After a kill, the ranks resume from a snapshot within the ramp.
    let steps_of_run = ["train.steps=40"];
    let launcher = start(&mut experiment.train(4, &[&common[..], &steps_of_run].concat()));
    wait_for_step(&experiment, "run", 16);
    signal(&rank_process(&experiment, 2), "KILL");
    let output = finish_child(launcher);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(unbroken, steps(&experiment, "run"));
}
