//! A state whose checksums do not fit into one message. Chunks and messages are scaled down
//! together, so that a small model stands for one of terabytes.

use crate::fixture::{
    COMMAND_TIMEOUT, Experiment, curve, finish, launcher_output, rank_process, signal,
    start_with_output_file, text, wait_for_output, wait_for_step,
};
use serde_json::Value;
use std::{
    process::Command,
    time::{Duration, Instant},
};

const CHUNK_BYTES: u64 = 64;
const MESSAGE_BYTES: u64 = 500 << 10;
/// Bytes of most checksums in a message.
const CHECKSUM_BYTES: u64 = 5;
const RANKS: usize = 8;
const NODES: usize = 4;

fn scaled_down(mut command: Command) -> Command {
    command
        .env("MOERUN_TEST_CHUNK_BYTES", CHUNK_BYTES.to_string())
        .env("MOERUN_TEST_MESSAGE_BYTES", MESSAGE_BYTES.to_string());
    command
}

/// Returns the keepers' reports, in the order of their nodes.
fn statuses(experiment: &Experiment) -> Vec<Value> {
    let arguments = ["snapshot", "status", "run", "--json"];
    let output = finish(&mut scaled_down(experiment.moerun(&arguments)));
    let lines = String::from_utf8(output.stdout).unwrap();
    let statuses = lines.lines().map(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(line["error"].is_null(), "{line}");
        line["status"].clone()
    });
    statuses.collect()
}

fn pids(statuses: &[Value]) -> Vec<i64> {
    let pids = statuses.iter().map(|status| status["pid"].as_i64());
    pids.collect::<Option<_>>().unwrap()
}

/// Waits until every keeper has the parity of a snapshot of at least `step` steps, and returns
/// the snapshot's length in bytes. While it looks, the ranks are stopped, so that they cannot
/// end before the keepers of a busy machine catch up.
fn wait_for_snapshot(experiment: &Experiment, step: u64) -> u64 {
    let started = Instant::now();
    loop {
        let statuses = experiment.with_ranks_stopped(|| statuses(experiment));
        let has_parity = |status: &&Value| {
            let protected = status["inventory"]["protected"].as_array();
            protected.is_some_and(|of| of.iter().any(|id| id["step"].as_u64() >= Some(step)))
        };
        if statuses.iter().filter(has_parity).count() == NODES {
            let parts = &statuses[0]["inventory"]["complete"][0]["parts"];
            let parts = parts.as_array().unwrap().iter();
            return parts.map(|part| part["bytes"].as_u64().unwrap()).sum();
        }
        assert!(
            started.elapsed() < COMMAND_TIMEOUT,
            "no snapshot of {step} steps: {statuses:?}"
        );
        std::thread::sleep(Duration::from_millis(300));
    }
}

#[test]
fn keepers_outlive_a_state_whose_checksums_exceed_a_message() {
    let experiment = Experiment::new();
    let common = [
        "train.steps=60",
        "checkpoint.every=0",
        "snapshot.every=5",
        "parallel.ranks_per_node=2",
        "parallel.zero=1",
        "train.micro_batch=1",
        "model.hidden=64",
        "model.moe.ffn=128",
    ];
    let unbroken = finish(experiment.train(RANKS, &common).args([
        "--set",
        "run.dir=unbroken",
        "--set",
        "snapshot.every=0",
    ]));
    assert!(unbroken.status.success(), "{}", text(&unbroken));
    let mut train = scaled_down(experiment.train(RANKS, &common));
    let run = start_with_output_file(&experiment, &mut train);
    let bytes = wait_for_snapshot(&experiment, 20);
    let of_one_snapshot = bytes / CHUNK_BYTES * CHECKSUM_BYTES;
    assert!(
        of_one_snapshot < MESSAGE_BYTES && 2 * of_one_snapshot > MESSAGE_BYTES,
        "the checksums of {bytes} bytes do not show what they should"
    );
    let before = pids(&statuses(&experiment));
    signal(&rank_process(&experiment, 3), "KILL");
    wait_for_output(&experiment, "resuming from the snapshot of step", 1);
    wait_for_step(&experiment, "run", 50);
    let after = statuses(&experiment);
    assert_eq!(pids(&after), before, "{}", launcher_output(&experiment));
    let headers = after
        .iter()
        .map(|status| status["header_requests"].as_u64());
    let headers: u64 = headers.map(Option::unwrap).sum();
    // With sharded optimizer states ranks have few companions.
    let of_half_the_parts = (RANKS * RANKS / 2) as u64;
    assert!(
        headers > 0 && headers < of_half_the_parts,
        "{headers} headers"
    );
    let ended = run.wait_with_output().unwrap();
    let said = launcher_output(&experiment);
    assert!(ended.status.success(), "{said}");
    let restarts = std::fs::read_to_string(experiment.path("run/restarts.jsonl")).unwrap();
    let restart: Value = serde_json::from_str(&restarts).expect("one restart");
    assert!(restart["snapshot_step"].as_u64() >= Some(20), "{restarts}");
    let resumed_from = restart["resumed_from"].as_str().unwrap();
    assert!(
        resumed_from.starts_with("resuming from the snapshot of step"),
        "{restarts}"
    );
    assert!(!said.contains("is gone"), "{said}");
    assert_eq!(curve(&experiment, "run"), curve(&experiment, "unbroken"));
    experiment.assert_no_orphans();
}
