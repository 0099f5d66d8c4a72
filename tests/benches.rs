//! The lines of `moerun bench` and the traces of steps. No time is asserted.

use crate::fixture::{Experiment, finish, text};
use serde_json::Value;
use std::process::Output;

fn lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", text(output));
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn read(path: std::path::PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn every_collective_is_measured_against_gloo() {
    let experiment = Experiment::new();
    let bench = [
        "bench",
        "collectives",
        "-n",
        "2",
        "--kib",
        "4,600",
        "--rounds",
        "1",
    ];
    let lines = lines(&finish(&mut experiment.moerun(&bench)));
    assert_eq!(lines.len(), 6 * 2);
    for line in &lines {
        let operation = line["operation"].as_str().unwrap();
        let sides: Vec<&str> = line["us"]
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        let expected: &[&str] = match operation {
            "all_gather" | "reduce_scatter" => &["moerun", "gloo composed", "gloo"],
            _ => &["moerun", "gloo composed"],
        };
        assert_eq!(sides, expected, "{operation}");
        // The others may be delayed so much that the ratio is zero.
        assert!(
            line["vs_fastest_other"]
                .as_f64()
                .is_some_and(|ratio| ratio >= 0.0),
            "{operation}"
        );
        assert!(
            line["us"]["moerun"].as_f64().is_some_and(|us| us > 0.0),
            "{operation}"
        );
    }
    let wrong = finish(&mut experiment.moerun(&["bench", "collectives", "--operation", "sum"]));
    assert!(
        !wrong.status.success() && text(&wrong).contains("--operation sum: no such operation"),
        "{}",
        text(&wrong)
    );
}

#[test]
fn a_profiled_step_is_the_sum_of_its_parts() {
    let experiment = Experiment::new();
    let trace = experiment.path("trace.json");
    let start = experiment.path("start.safetensors");
    let mut bench = experiment.moerun(&[
        "bench",
        "step",
        "--case",
        "fp32",
        "--steps",
        "1",
        "--threads",
        "1",
    ]);
    let lines = lines(&finish(
        bench
            .arg("--profile")
            .arg(&trace)
            .arg("--start")
            .arg(&start),
    ));
    let parts = lines[0]["parts"].as_array().unwrap();
    let share = |part: &Value| part["share"].as_f64().unwrap();
    assert!(
        (parts.iter().map(share).sum::<f64>() - 1.0).abs() < 0.01,
        "{parts:?}"
    );
    assert!(parts.iter().all(|part| share(part) >= 0.0), "{parts:?}");
    let gflop = |name: &str| {
        parts.iter().find(|part| part["part"] == name).unwrap()["gflop"]
            .as_f64()
            .unwrap()
    };
    // FLOPs of 2048 tokens x top-2 x 3 matrices of 256 x 512 in 4 layers: forward and input
    // gradients, then weight gradients.
    let once = 2.0 * 2048.0 * 2.0 * 3.0 * 256.0 * 512.0 * 4.0 * 1e-9;
    assert!(
        (gflop("gemm of experts") / (2.0 * once) - 1.0).abs() < 1e-3,
        "{parts:?}"
    );
    assert!(
        (gflop("gemm for experts' gradients") / once - 1.0).abs() < 1e-3,
        "{parts:?}"
    );
    assert!(read(trace)["traceEvents"].as_array().unwrap().len() > 100);
    assert!(
        std::fs::metadata(start).unwrap().len() > 4 * 17_000_000,
        "weights in fp32"
    );
}

#[test]
fn recomputation_is_measured_and_a_fitting_option_is_found() {
    let experiment = Experiment::new();
    let bench = |more: &[&str]| {
        let mut bench = experiment.moerun(&[
            "bench",
            "recompute",
            "small.yaml",
            "-n",
            "2",
            "--rounds",
            "1",
            "--steps",
            "4",
        ]);
        for change in [
            "train.micro_batch=4",
            "data.sequence_length=256",
            "parallel.pipeline=2",
            "parallel.expert=1",
        ] {
            bench.args(["--set", change]);
        }
        finish(bench.args(more))
    };
    let mib = |line: &Value| line["measured_mib"].as_f64().unwrap();
    let measured = lines(&bench(&[]));
    let cases: Vec<&str> = measured
        .iter()
        .map(|line| line["case"].as_str().unwrap())
        .collect();
    assert_eq!(
        cases,
        [
            "none",
            "norm",
            "attention",
            "dispatch",
            "experts",
            "all layers"
        ]
    );
    let none = mib(&measured[0]);
    let all = mib(&measured[5]);
    assert!(all < none && mib(&measured[4]) < none, "{measured:?}");

    let fit = (none + all) / 2.0;
    let chosen = lines(&bench(&["--fit-mib", &fit.to_string()]))
        .pop()
        .unwrap();
    assert!(
        chosen["case"] == "fit"
            && mib(&chosen) <= fit
            && chosen["recompute"] != measured[0]["recompute"],
        "{chosen}"
    );

    let tight = bench(&["--fit-mib", "0.5"]);
    let printed = text(&tight);
    assert!(
        !tight.status.success() && printed.contains("--fit-mib 0.5: with all layers recomputed"),
        "{printed}"
    );
}

#[test]
fn growth_with_the_ranks_is_measured_and_simulated() {
    let experiment = Experiment::new();
    let sizes = ["--measured", "2,4", "--ranks", "16,64"];
    let bench = [&["bench", "scale"][..], &sizes].concat();
    let lines = lines(&finish(&mut experiment.moerun(&bench)));
    let values = |quantity: &str| -> Vec<(u64, &str, f64)> {
        let of_quantity = lines.iter().filter(|line| line["quantity"] == quantity);
        of_quantity
            .map(|line| {
                let ranks = line["ranks"].as_u64().unwrap();
                let origin = line["origin"].as_str().unwrap();
                (ranks, origin, line["value"].as_f64().unwrap())
            })
            .collect()
    };
    let sizes: Vec<_> = values("time until all ranks have joined")
        .iter()
        .map(|(ranks, origin, _)| (*ranks, *origin))
        .collect();
    let expected = [
        (2, "measured"),
        (4, "measured"),
        (16, "simulated"),
        (64, "simulated"),
    ];
    assert_eq!(sizes, expected);
    for quantity in ["requests to the store", "bytes through the store"] {
        let values = values(quantity);
        assert!(
            values.is_sorted_by(|a, b| a.2 < b.2),
            "{quantity}: {values:?}"
        );
    }
    for quantity in [
        "open files of the launcher",
        "bytes of a keeper's inventory",
    ] {
        let values = values(quantity);
        assert!(
            values[1].2 > 2.0 * values[0].2 && values[1].2 < 4.0 * values[0].2,
            "{quantity}: {values:?}"
        );
    }
    let heads = values("bytes of all heads");
    assert_eq!(heads[1].2, 4.0 * heads[0].2);
    for quantity in [
        "time to assemble all heads",
        "time of plan mesh",
        "lines of plan mesh",
    ] {
        assert_eq!(values(quantity).len(), 2, "{quantity}");
    }
    let exponents = lines.iter().filter(|line| line["exponent"].is_number());
    assert!(exponents.count() > 8, "{lines:?}");
}

#[test]
fn each_rank_traces_the_requested_step() {
    let experiment = Experiment::new();
    let output = finish(&mut experiment.train(
        2,
        &["train.steps=3", "run.trace_step=2", "parallel.expert=2"],
    ));
    assert!(output.status.success(), "{}", text(&output));
    for rank in 0..2 {
        let trace = read(experiment.path(&format!("run/logs/rank-{rank}.trace.json")));
        let events = trace["traceEvents"].as_array().unwrap();
        for kind in ["gemm", "attention", "communication", "optimizer"] {
            assert!(
                events.iter().any(|event| event["cat"] == kind),
                "rank {rank} has no {kind}"
            );
        }
        assert!(
            events
                .iter()
                .all(|event| event["pid"] == rank && event["dur"].as_f64().unwrap() >= 0.0)
        );
    }
}
