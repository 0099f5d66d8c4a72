//! Runs that lend and move experts: real processes, their files, and the commands that read them.

use crate::fixture::{Experiment, finish, finish_child, text};
use serde_json::Value;

/// An MoE layer without any balancing, so that the load stays as uneven as at the start.
const UNEVEN: &str = "model.moe={experts: 8, top_k: 1, ffn: 32, load_balance: 0.0, \
                      dispatch: least_loaded, \
                      least_loaded: {min_tokens: 4, threshold: 1.05}, \
                      placement: {every: 5, min_gain: 0.01}}";

fn metrics(experiment: &Experiment, run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(experiment.path(run).join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn a_run_that_lends_and_moves_experts_resumes_bit_for_bit_and_can_be_inspected() {
    let experiment = Experiment::new();
    let whole = finish(&mut experiment.train(4, &[UNEVEN, "run.dir=whole"]));
    assert!(whole.status.success(), "{}", text(&whole));
    assert!(
        text(&whole).contains("experts are lent from 4 tokens on (configured)"),
        "{}",
        text(&whole)
    );
    assert!(
        text(&whole).contains(", lent "),
        "no progress line reports lent tokens: {}",
        text(&whole)
    );
    // The last step moves experts. Its checkpoint still comes from the keepers' memory; ranks that
    // write one themselves report it.
    assert_eq!(
        text(&whole)
            .matches("checkpoint whole/checkpoints/step-00000020")
            .count(),
        1,
        "{}",
        text(&whole)
    );
    let lines = metrics(&experiment, "whole");
    let steps: Vec<&Value> = lines
        .iter()
        .filter(|line| line["loss"].is_number())
        .collect();
    let sum = |key: &str| -> u64 {
        let totals = steps
            .iter()
            .map(|step| step[key]["total"].as_u64().unwrap());
        totals.sum()
    };
    assert!(sum("lent_tokens") > 0 && sum("lent_bytes") > 0 && sum("internode_bytes") == 0);
    assert!(
        steps
            .iter()
            .map(|step| step["moved_experts"].as_u64().unwrap())
            .sum::<u64>()
            > 0
    );
    let imbalance = &steps[0]["rank_imbalance"];
    let ordered = ["median", "p90", "largest"].map(|key| imbalance[key].as_f64().unwrap());
    assert!(ordered.is_sorted(), "{imbalance}");

    // The same run in two halves.
    for steps in ["train.steps=10", "train.steps=20"] {
        let half = finish(&mut experiment.train(4, &[UNEVEN, "run.dir=halves", steps]));
        assert!(half.status.success(), "{}", text(&half));
    }
    let losses = |run: &str| -> Vec<Value> {
        metrics(&experiment, run)
            .iter()
            .map(|line| line["loss"].clone())
            .filter(Value::is_number)
            .collect()
    };
    assert_eq!(losses("halves"), losses("whole"));

    let mut inspect = experiment.moerun(&[
        "inspect", "routing", "whole", "--slices", "2", "--svg", "heat.svg",
    ]);
    let inspected = finish(inspect.args(["--segment", "8", "--tokens", "512"]));
    let printed = text(&inspected);
    assert!(inspected.status.success(), "{printed}");
    for words in [
        "steps 1 to",
        "layer 1 |",
        "times the mean",
        "SRP",
        "of step 20 on 512 validation tokens",
    ] {
        assert!(printed.contains(words), "{words:?} is not in:\n{printed}");
    }
    assert!(
        std::fs::read_to_string(experiment.path("heat.svg"))
            .unwrap()
            .starts_with("<svg")
    );
    let mut unread = experiment.moerun(&["inspect", "routing", "whole"]);
    let mut unread = unread
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(unread.stdout.take());
    let printed = text(&finish_child(unread));
    assert!(!printed.contains("panicked"), "as with `| head`: {printed}");
    let nowhere = finish(&mut experiment.moerun(&["inspect", "routing", "nowhere"]));
    assert!(
        !nowhere.status.success() && text(&nowhere).contains("cannot read nowhere/routing.jsonl")
    );
}

#[test]
fn the_layer_bench_prints_a_line_per_case_and_refuses_wrong_arguments() {
    let experiment = Experiment::new();
    let small = [
        "bench",
        "moe-layer",
        "--tokens",
        "256",
        "--hidden",
        "32",
        "--ffn",
        "32",
        "--rounds",
        "1",
    ];
    let bench = finish(experiment.moerun(&small).args([
        "--min-tokens",
        "4",
        "--case",
        "95:1",
        "--case",
        "w4",
    ]));
    assert!(bench.status.success(), "{}", text(&bench));
    let lines: Vec<Value> = String::from_utf8_lossy(&bench.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        lines
            .iter()
            .map(|line| line["case"].as_str().unwrap())
            .collect::<Vec<_>>(),
        ["95:1", "w4"]
    );
    for line in &lines {
        assert!(
            line["ratio"].is_number() && line["ideal"].as_f64() >= Some(1.0),
            "{line}"
        );
        let routed = |key: &str| -> f64 {
            let ranks = line[key].as_array().unwrap();
            ranks.iter().map(|tokens| tokens.as_f64().unwrap()).sum()
        };
        assert_eq!(routed("routed_tokens"), routed("baseline_routed_tokens"));
        assert_ne!(
            line["routed_tokens"], line["baseline_routed_tokens"],
            "{line}"
        );
    }
    let step = finish(experiment.moerun(&small).args(["--step", "--case", "w2"]));
    assert!(step.status.success(), "{}", text(&step));
    let line: Value = serde_json::from_slice(&step.stdout).unwrap();
    assert!(line["loss_rel_diff"].as_f64() < Some(1e-5), "{line}");
    let wrong: [(&[&str], &str); 4] = [
        (&["--case", "95"], "PERCENT:EXPERTS"),
        (
            &["--case", "95:9", "--experts", "16"],
            "rank 0 has 8 of 16 experts, not 9",
        ),
        (
            &["--ranks", "0"],
            "invalid value '0' for '--ranks <N>': 0 is not in 1..",
        ),
        (
            &["--experts", "7"],
            "--experts 7: must be at least 4 and a multiple of 2 ranks",
        ),
    ];
    for (args, words) in wrong {
        let refused = finish(experiment.moerun(&small).args(args));
        assert!(
            !refused.status.success() && text(&refused).contains(words),
            "{args:?}: {}",
            text(&refused)
        );
    }
    experiment.assert_no_orphans();
}
