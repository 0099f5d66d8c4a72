//! Real faults in the middle of a run: it resumes bit for bit from the last snapshot in memory.

use crate::fixture::{
    COMMAND_TIMEOUT, Experiment, curve, finish, finish_child, launcher_output, rank_process,
    registered_keepers, signal, start_with_output_file, steps_done, text, wait_for_output,
    wait_for_step,
};
use serde_json::Value;
use std::{
    process::{Child, Command},
    time::{Duration, Instant},
};

/// These tests restart often; another one covers the limit.
const MANY_RESTARTS: &str = "restart.max_restarts=10000";

fn assert_same_curve(experiment: &Experiment, broken: &str, unbroken: &str) {
    let broken = curve(experiment, broken);
    let unbroken = curve(experiment, unbroken);
    for (line, (broken, unbroken)) in broken.iter().zip(&unbroken).enumerate() {
        assert_eq!(broken, unbroken, "line {line}");
    }
    assert_eq!(broken.len(), unbroken.len());
}

struct NodeProcesses {
    ranks: Vec<String>,
    keeper: String,
}

fn nodes(experiment: &Experiment) -> Vec<NodeProcesses> {
    let status = || finish(&mut experiment.moerun(&["snapshot", "status", "run", "--json"]));
    let status = experiment.with_ranks_stopped(status);
    let lines = String::from_utf8(status.stdout).unwrap();
    let node = |line: &str| {
        let status = serde_json::from_str::<Value>(line).unwrap()["status"].clone();
        let ranks = status["ranks"].as_array().cloned().unwrap_or_default();
        NodeProcesses {
            ranks: ranks.iter().map(|rank| rank["pid"].to_string()).collect(),
            keeper: status["pid"].to_string(),
        }
    };
    lines.lines().map(node).collect()
}

/// Waits until a snapshot of more than `after` steps has all parts and their parity.
fn wait_for_snapshot(experiment: &Experiment, ranks: usize, after: u64) {
    let started = Instant::now();
    loop {
        let status = text(&finish(
            &mut experiment.moerun(&["snapshot", "status", "run"]),
        ));
        let whole = |line: &str| {
            let snapshot = line.strip_prefix("snapshot of step ");
            let step = snapshot.and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
            let parity = line.split(", parity on ").nth(1);
            let is_protected = parity.is_none_or(|parity| {
                let mut words = parity.split(' ');
                words.next() == words.nth(1)
            });
            step > Some(after) && line.contains(&format!("{ranks} parts")) && is_protected
        };
        if status.lines().any(whole) {
            return;
        }
        assert!(started.elapsed() < COMMAND_TIMEOUT, "no snapshot: {status}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Returns the step of the last snapshot that the run resumed from.
fn last_resumed(experiment: &Experiment) -> u64 {
    let said = launcher_output(experiment);
    let last = said.rsplit("resuming from the snapshot of step ").next();
    last.unwrap().split(' ').next().unwrap().parse().unwrap()
}

fn kill_nodes(experiment: &Experiment, lost: &[usize]) {
    let started = Instant::now();
    let nodes = loop {
        // A keeper knows a rank once it has reported.
        let nodes = nodes(experiment);
        if lost.iter().all(|&node| !nodes[node].ranks.is_empty()) {
            break nodes;
        }
        assert!(started.elapsed() < COMMAND_TIMEOUT, "a node has no ranks");
        std::thread::sleep(Duration::from_millis(20));
    };
    // All at once: otherwise the launcher may react in between.
    let lost = lost.iter().map(|&node| &nodes[node]);
    let pids = lost.flat_map(|node| node.ranks.iter().chain([&node.keeper]));
    Command::new("kill")
        .arg("-KILL")
        .args(pids)
        .output()
        .unwrap();
}

fn stop(child: Child) {
    signal(&child.id().to_string(), "TERM");
    finish_child(child);
}

/// Set `MOERUN_TEST_KILLS=200` for a long soak.
#[test]
fn ranks_killed_at_any_moment_again_and_again() {
    let kills: usize = std::env::var("MOERUN_TEST_KILLS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(12);
    let experiment = Experiment::with_standbys();
    let steps = format!("train.steps={}", 60 + 14 * kills);
    let common = [
        steps.as_str(),
        "snapshot.every=1",
        "validation.every=7",
        "checkpoint.every=25",
        MANY_RESTARTS,
    ];
    let unbroken = experiment
        .train(4, &common)
        .args(["--set", "run.dir=unbroken"])
        .output()
        .unwrap();
    assert!(unbroken.status.success(), "{}", text(&unbroken));
    let run = start_with_output_file(&experiment, &mut experiment.train(4, &common));
    wait_for_step(&experiment, "run", 3);
    let kills = kills.to_string();
    let chaos = [
        "chaos",
        "run",
        "--faults",
        &kills,
        "--gap",
        "3",
        "--seed",
        "11",
        "--timeout-s",
        "60",
    ];
    // No limit on the whole: each recovery has its own.
    let chaos = experiment.moerun(&chaos).output().unwrap();
    assert!(
        chaos.status.success(),
        "{}{}",
        text(&chaos),
        launcher_output(&experiment)
    );
    let ended = run.wait_with_output().unwrap();
    let said = launcher_output(&experiment);
    assert!(ended.status.success(), "{said}");
    eprintln!("{}", text(&chaos).lines().last().unwrap_or_default());
    assert_eq!(
        said.matches("; resuming from the snapshot of step")
            .count()
            .to_string(),
        kills,
        "{said}"
    );
    assert!(!said.contains("is unusable"), "{said}");
    let restarts = std::fs::read_to_string(experiment.path("run/restarts.jsonl")).unwrap();
    let redone = restarts.lines().map(|line| {
        let restart: Value = serde_json::from_str(line).unwrap();
        let step = |key: &str| restart[key].as_u64().unwrap();
        step("steps_done").saturating_sub(step("snapshot_step"))
    });
    let mut redone: Vec<u64> = redone.collect();
    redone.sort_unstable();
    // One snapshot is being copied, and one is complete but not yet announced. A disk that is slow
    // to take a checkpoint holds up the next snapshots.
    assert!(redone[redone.len() / 2] <= 3, "{restarts}");
    assert_same_curve(&experiment, "run", "unbroken");
    experiment.assert_no_orphans();
}

#[test]
fn stopped_aborted_and_delayed_ranks() {
    let experiment = Experiment::with_standbys();
    let common = [
        "train.steps=300",
        "checkpoint.every=0",
        MANY_RESTARTS,
        "restart.heartbeat_timeout_s=1.5",
    ];
    assert!(
        finish(
            experiment
                .train(4, &common)
                .args(["--set", "run.dir=unbroken"])
        )
        .status
        .success()
    );
    let run = start_with_output_file(&experiment, &mut experiment.train(4, &common));
    wait_for_step(&experiment, "run", 3);
    for kind in ["stop", "abort", "delay", "stop"] {
        let chaos = finish(&mut experiment.moerun(&[
            "chaos", "run", "--faults", "1", "--gap", "4", "--kinds", kind,
        ]));
        assert!(
            chaos.status.success(),
            "{}{}",
            text(&chaos),
            launcher_output(&experiment)
        );
    }
    assert!(
        run.wait_with_output().unwrap().status.success(),
        "{}",
        launcher_output(&experiment)
    );
    let said = launcher_output(&experiment);
    assert!(
        said.contains("failed: no heartbeat for 1.5 s; resuming from the snapshot of step"),
        "{said}"
    );
    assert!(
        said.contains("failed: killed by SIGABRT; resuming from the snapshot of step"),
        "{said}"
    );
    assert_same_curve(&experiment, "run", "unbroken");
}

/// The kernel kills a rank, if this machine lets a test limit memory.
#[test]
fn a_rank_that_runs_out_of_memory() {
    let experiment = Experiment::with_standbys();
    let common = ["train.steps=120", "checkpoint.every=0"];
    assert!(
        finish(
            experiment
                .train(2, &common)
                .args(["--set", "run.dir=unbroken"])
        )
        .status
        .success()
    );
    // Control groups version 2, or version 1.
    let groups = [
        ("/sys/fs/cgroup", "memory.max"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ];
    let group = groups.into_iter().find_map(|(root, limit)| {
        let group = std::path::Path::new(root).join(format!("moerun-test-{}", std::process::id()));
        std::fs::create_dir(&group).ok()?;
        let limit = group.join(limit);
        if !limit.exists() {
            let _ = std::fs::remove_dir(&group);
        }
        limit.exists().then_some((group, limit))
    });
    let Some((group, limit)) = group else {
        eprintln!("skipped: this machine does not let a test limit memory");
        return;
    };
    let run = start_with_output_file(&experiment, &mut experiment.train(2, &common));
    wait_for_step(&experiment, "run", 5);
    // An empty group takes any limit. The next page that the rank touches is over it.
    std::fs::write(limit, "65536").unwrap();
    let rank = rank_process(&experiment, 1);
    std::fs::write(group.join("cgroup.procs"), &rank).unwrap();
    let ended = run.wait_with_output().unwrap();
    let said = launcher_output(&experiment);
    let _ = std::fs::remove_dir(&group);
    assert!(
        ended.status.success() && said.contains("rank 1 failed: killed by SIGKILL"),
        "{said}"
    );
    assert_same_curve(&experiment, "run", "unbroken");
}

#[test]
fn a_run_resumes_from_keepers_memory_after_its_launcher_was_killed() {
    let experiment = Experiment::with_standbys();
    let common = ["train.steps=60", "checkpoint.every=0", "snapshot.every=1"];
    assert!(
        finish(
            experiment
                .train(4, &common)
                .args(["--set", "run.dir=unbroken"])
        )
        .status
        .success()
    );
    let mut run = start_with_output_file(&experiment, &mut experiment.train(4, &common));
    wait_for_step(&experiment, "run", 20);
    // A second launcher is refused.
    let second = experiment.with_ranks_stopped(|| finish(&mut experiment.train(4, &common)));
    assert!(
        !second.status.success() && text(&second).contains("another moerun is using run"),
        "{}",
        text(&second)
    );
    run.kill().unwrap();
    run.wait().unwrap();
    experiment.assert_only_keepers();
    let again = finish(&mut experiment.train(4, &common));
    let words = text(&again);
    assert!(
        again.status.success()
            && words.contains(
                "found keepers of an earlier launcher; resuming from the snapshot of step"
            ),
        "{words}"
    );
    assert_same_curve(&experiment, "run", "unbroken");
    experiment.assert_no_orphans();

    // On another number of ranks it resumes through the disk.
    let more = ["train.steps=120", "checkpoint.every=0", "snapshot.every=1"];
    let mut run = start_with_output_file(&experiment, &mut experiment.train(4, &more));
    wait_for_step(&experiment, "run", 80);
    run.kill().unwrap();
    run.wait().unwrap();
    experiment.assert_only_keepers();
    let changes = [
        "train.steps=90",
        "parallel.expert=1",
        "parallel.ranks_per_node=1",
    ];
    let words = text(&finish(&mut experiment.train(2, &changes)));
    assert!(
        words.contains("in memory; wrote it to a checkpoint")
            && words.contains("resuming from the checkpoint of step"),
        "{words}"
    );
}

#[test]
fn a_keeper_that_dies_alone_is_replaced_and_training_continues() {
    let experiment = Experiment::with_standbys();
    let common = [
        "train.steps=400",
        "checkpoint.every=50",
        "snapshot.every=2",
        "parallel.ranks_per_node=2",
    ];
    assert!(
        finish(
            experiment
                .train(4, &common)
                .args(["--set", "run.dir=unbroken"])
        )
        .status
        .success()
    );
    let run = start_with_output_file(&experiment, &mut experiment.train(4, &common));
    wait_for_step(&experiment, "run", 10);
    signal(&nodes(&experiment)[1].keeper, "KILL");
    wait_for_output(&experiment, "the keeper of node 1 is gone", 1);
    let step = steps_done(&experiment, "run");
    wait_for_step(&experiment, "run", step + 60);
    // The new keeper has snapshots: the run survives the death of a rank.
    signal(&rank_process(&experiment, 3), "KILL");
    assert!(
        run.wait_with_output().unwrap().status.success(),
        "{}",
        launcher_output(&experiment)
    );
    let words = launcher_output(&experiment);
    assert!(
        words.contains("rank 3 failed") && words.contains("resuming from the snapshot of step"),
        "{words}"
    );
    assert_same_curve(&experiment, "run", "unbroken");
    experiment.assert_no_orphans();
}

/// Waits until a launcher without standbys has started its ranks.
fn wait_for_rank_processes(experiment: &Experiment, launcher: &Child) {
    let own = launcher.id().to_string();
    let is_rank = |pid: &String| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let input = std::fs::read_link(format!("/proc/{pid}/fd/0")).unwrap_or_default();
        // That of the process that forks the ranks is a socket.
        let has_pipe = input.to_string_lossy().starts_with("pipe:");
        *pid != own && line.starts_with(b"moerun\0train\0") && has_pipe
    };
    let started = Instant::now();
    while !experiment.processes().iter().any(is_rank) {
        assert!(started.elapsed() < COMMAND_TIMEOUT, "no rank starts");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_keeper_that_hangs_while_ranks_start_is_replaced() {
    let experiment = Experiment::new();
    let changes = [
        "train.steps=100000",
        "checkpoint.every=0",
        "snapshot.every=2",
        "parallel.ranks_per_node=1",
    ];
    let run = start_with_output_file(&experiment, &mut experiment.train(2, &changes));
    wait_for_rank_processes(&experiment, &run);
    let keeper = registered_keepers(&experiment, 2)[1]["pid"].to_string();
    signal(&keeper, "STOP");
    wait_for_output(&experiment, "the keeper of node 1", 1);
    wait_for_snapshot(&experiment, 2, 0);
    signal(&rank_process(&experiment, 1), "KILL");
    wait_for_output(&experiment, "resuming from the snapshot of step", 1);
    stop(run);
    let said = launcher_output(&experiment);
    assert!(!said.contains("no snapshots in memory"), "{said}");
}

/// Loses every pattern of up to `parity` nodes at once in one run, with nothing on disk; then with
/// `too_many` one node more.
fn every_pattern(data: usize, parity: usize, too_many: bool) {
    let nodes = data + parity;
    let experiment = Experiment::with_standbys();
    let redundancy = format!("snapshot.redundancy={{parity: {{data: {data}, parity: {parity}}}}}");
    let batch = format!("train.global_batch={}", 2 * nodes);
    let mut common = vec![
        "parallel.expert=1",
        "parallel.ranks_per_node=1",
        "train.micro_batch=1",
        &batch,
        &redundancy,
        "snapshot.every=1",
        "checkpoint.every=0",
        "validation.every=1000000",
        MANY_RESTARTS,
    ];
    let patterns: Vec<Vec<usize>> = (1u32..1 << nodes)
        .filter(|pattern| pattern.count_ones() as usize <= parity)
        .map(|pattern| (0..nodes).filter(|node| pattern & 1 << node != 0).collect())
        .collect();
    common.push("train.steps=100000");
    let run = start_with_output_file(&experiment, &mut experiment.train(nodes, &common));
    let mut resumed = 0;
    for (index, lost) in patterns.iter().enumerate() {
        let step = steps_done(&experiment, "run");
        wait_for_step(&experiment, "run", step + 2);
        // Of the one that ranks resumed from, every keeper has all parts, which ranks fetched.
        wait_for_snapshot(&experiment, nodes, resumed);
        kill_nodes(&experiment, lost);
        wait_for_output(
            &experiment,
            "; resuming from the snapshot of step",
            index + 1,
        );
        resumed = last_resumed(&experiment);
    }
    let words = launcher_output(&experiment);
    assert_eq!(
        words.matches(": ranks restart in place; ").count(),
        patterns.len(),
        "{words}"
    );
    assert_eq!(
        words.matches("rebuilt from erasure coding").count(),
        patterns.len(),
        "{words}"
    );
    assert!(
        !experiment.path("run/checkpoints").exists(),
        "nothing was on disk"
    );
    if too_many {
        let step = steps_done(&experiment, "run");
        wait_for_step(&experiment, "run", step + 2);
        kill_nodes(&experiment, &(0..=parity).collect::<Vec<_>>());
        wait_for_output(
            &experiment,
            "no checkpoint, starting over; no complete snapshot is left in memory",
            1,
        );
    } else {
        let step = steps_done(&experiment, "run");
        wait_for_step(&experiment, "run", step + 3);
    }
    stop(run);
    let done = steps_done(&experiment, "run");
    let steps = format!("train.steps={done}");
    common.pop();
    common.extend([steps.as_str(), "run.dir=unbroken"]);
    assert!(
        finish(&mut experiment.train(nodes, &common))
            .status
            .success()
    );
    // The stopped run did not validate at its end.
    let steps = |run: &str| {
        curve(&experiment, run)
            .into_iter()
            .filter(|line| line["loss"].is_f64())
            .collect::<Vec<_>>()
    };
    assert_eq!(steps("run"), steps("unbroken"));
}

#[test]
fn every_lost_node_of_four_and_one() {
    every_pattern(4, 1, true);
}

#[test]
fn every_two_lost_nodes_of_four_and_two() {
    every_pattern(4, 2, false);
}

#[test]
fn one_lost_node_too_many_resumes_from_the_checkpoint() {
    let experiment = Experiment::with_standbys();
    let common = [
        "train.steps=80",
        "parallel.ranks_per_node=1",
        "snapshot.every=1",
        "checkpoint.every=5",
    ];
    assert!(
        finish(
            experiment
                .train(4, &common)
                .args(["--set", "run.dir=unbroken"])
        )
        .status
        .success()
    );
    let run = start_with_output_file(&experiment, &mut experiment.train(4, &common));
    wait_for_step(&experiment, "run", 23);
    kill_nodes(&experiment, &[1, 2]);
    assert!(
        run.wait_with_output().unwrap().status.success(),
        "{}",
        launcher_output(&experiment)
    );
    let words = launcher_output(&experiment);
    assert!(
        words.contains("lost nodes 1, 2: ")
            && words.contains("resuming from checkpoint run/checkpoints/step-"),
        "{words}"
    );
    assert!(
        words.contains("no complete snapshot is left in memory"),
        "{words}"
    );
    assert_same_curve(&experiment, "run", "unbroken");
}

#[test]
fn a_spare_node_takes_over_and_without_one_the_run_shrinks() {
    let experiment = Experiment::with_standbys();
    let common = [
        "train.steps=300",
        "parallel.ranks_per_node=1",
        "snapshot.every=1",
        "checkpoint.every=0",
        "parallel.expert=1",
        "restart.without_spare=shrink",
    ];
    assert!(
        finish(
            experiment
                .train(4, &common)
                .args(["--set", "run.dir=unbroken"])
        )
        .status
        .success()
    );
    let said_to = std::fs::File::create(experiment.path("output")).unwrap();
    let mut command = experiment.train(4, &common);
    command
        .args(["--spare-nodes", "1"])
        .stdout(said_to.try_clone().unwrap())
        .stderr(said_to);
    let run = command.spawn().unwrap();
    wait_for_step(&experiment, "run", 10);
    wait_for_snapshot(&experiment, 4, 0);
    kill_nodes(&experiment, &[2]);
    wait_for_output(
        &experiment,
        "lost node 2: 1 spare node took over; resuming from the snapshot of step",
        1,
    );
    let step = steps_done(&experiment, "run");
    wait_for_step(&experiment, "run", step + 10);
    wait_for_snapshot(&experiment, 4, 0);
    kill_nodes(&experiment, &[0]);
    // Three ranks do not divide the batch; two do.
    wait_for_output(
        &experiment,
        "lost node 0: continuing with 2 ranks (others idle) and the same global batch; \
         resuming from the snapshot",
        1,
    );
    assert!(
        run.wait_with_output().unwrap().status.success(),
        "{}",
        launcher_output(&experiment)
    );
    let before = last_resumed(&experiment);
    let shrunk = curve(&experiment, "run");
    let unbroken = curve(&experiment, "unbroken");
    assert_eq!(shrunk.len(), unbroken.len());
    for (shrunk, unbroken) in shrunk.iter().zip(&unbroken) {
        let step = unbroken["step"].as_u64().unwrap();
        let key = if unbroken["loss"].is_null() {
            "validation_loss"
        } else {
            "loss"
        };
        let ours = shrunk[key].as_f64().unwrap();
        let theirs = unbroken[key].as_f64().unwrap();
        // With fewer ranks the order of the sums differs, and the rounding error grows with the
        // steps.
        if step > before + 80 {
            break;
        }
        let tolerance = if step <= before { 0.0 } else { 1e-4 };
        assert!(
            (ours - theirs).abs() <= tolerance * theirs,
            "step {step}: {ours} and {theirs}"
        );
    }
    experiment.assert_no_orphans();
}

#[test]
fn flipped_bits_in_memory_are_repaired_from_parity() {
    let experiment = Experiment::with_standbys();
    // The pause between snapshots is long enough for a command.
    let common = [
        "train.steps=420",
        "parallel.ranks_per_node=1",
        "snapshot.every=200",
        "checkpoint.every=0",
    ];
    assert!(
        finish(
            experiment
                .train(4, &common)
                .args(["--set", "run.dir=unbroken"])
        )
        .status
        .success()
    );
    let run = start_with_output_file(&experiment, &mut experiment.train(4, &common));
    wait_for_step(&experiment, "run", 201);
    wait_for_snapshot(&experiment, 4, 0);
    let chaos = [
        "chaos",
        "run",
        "--kinds",
        "corrupt",
        "--faults",
        "1",
        "--gap",
        "0",
        "--step-ms",
        "0",
    ];
    let chaos = finish(&mut experiment.moerun(&chaos));
    assert!(text(&chaos).contains("snapshot flips"), "{}", text(&chaos));
    let verified = experiment.with_ranks_stopped(|| {
        let verified = finish(&mut experiment.moerun(&["snapshot", "verify", "run"]));
        signal(&rank_process(&experiment, 0), "KILL");
        verified
    });
    assert!(
        run.wait_with_output().unwrap().status.success(),
        "{}",
        launcher_output(&experiment)
    );
    let words = launcher_output(&experiment);
    assert!(
        !verified.status.success() && text(&verified).contains("is damaged"),
        "{}",
        text(&verified)
    );
    assert!(
        words.contains("1 damaged chunks repaired from parity"),
        "{words}"
    );
    assert_same_curve(&experiment, "run", "unbroken");
}

#[test]
fn a_poisoned_snapshot_is_not_retried_forever() {
    let experiment = Experiment::with_standbys();
    let common = [
        "train.steps=900",
        "snapshot.every=300",
        "checkpoint.every=0",
        "parallel.expert=1",
    ];
    let run = start_with_output_file(&experiment, &mut experiment.train(1, &common));
    wait_for_step(&experiment, "run", 602);
    let chaos = finish(&mut experiment.moerun(&[
        "chaos",
        "run",
        "--kinds",
        "poison",
        "--faults",
        "1",
        "--gap",
        "0",
        "--step-ms",
        "0",
    ]));
    assert!(text(&chaos).contains("is poisoned"), "{}", text(&chaos));
    signal(&rank_process(&experiment, 0), "KILL");
    let ended = run.wait_with_output().unwrap();
    let words = launcher_output(&experiment);
    assert!(ended.status.success(), "{words}");
    assert!(words.contains("1 newer snapshot did not help"), "{words}");
    assert!(
        words.contains("resuming from the snapshot of step 300"),
        "{words}"
    );
    assert_eq!(steps_done(&experiment, "run"), 900);
}

#[test]
fn a_run_that_keeps_diverging_ends_with_an_error() {
    let experiment = Experiment::with_standbys();
    let common = [
        // Weights grow a hundredfold in each step.
        "schedule={constant: {lr: 10}}",
        "optimizer.weight_decay=10",
        "snapshot.every=1",
        "parallel.expert=1",
        "train.grad_clip=0",
    ];
    let output = finish(&mut experiment.train(1, &common));
    let words = text(&output);
    assert!(
        !output.status.success() && words.contains("failed 5 times: rank 0 failed: "),
        "{words}"
    );
    assert!(
        words.contains("skipping the batch of step") && words.contains("lower the learning rate"),
        "{words}"
    );
    let stop = finish(experiment.train(1, &common).args([
        "--set",
        "run.dir=stop",
        "--set",
        "restart.on_divergence=stop",
    ]));
    assert!(
        !stop.status.success() && text(&stop).contains("restart.on_divergence is stop"),
        "{}",
        text(&stop)
    );
    experiment.assert_no_orphans();
}

#[test]
fn too_little_memory_is_reported() {
    for every in ["auto", "2"] {
        let experiment = Experiment::with_standbys();
        let every = format!("snapshot.every={every}");
        let changes = ["train.steps=6", "snapshot.memory_gib=0.0005", &every];
        let output = finish(&mut experiment.train(2, &changes));
        let words = text(&output);
        assert!(output.status.success(), "{words}");
        for part in [
            "warning: no snapshots in memory: ",
            "snapshot.memory_gib leaves",
            "For snapshots use more memory or nodes, or a larger snapshot.memory_gib",
        ] {
            assert!(words.contains(part), "{part}: {words}");
        }
        assert!(
            experiment
                .path("run/checkpoints/step-00000006/manifest.json")
                .exists()
        );
    }
}
