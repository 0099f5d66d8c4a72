//! Signals to ranks of any launcher: orderly stops, requests for a checkpoint, and statuses.

use crate::fixture::{
    COMMAND_TIMEOUT, Experiment, curve, finish, finish_child, free_port, launcher_output,
    rank_process, ranks, registered_keepers, signal, start, start_with_output_file, steps_done,
    text, wait_for_step,
};
use std::{
    process::{Child, Command},
    time::{Duration, Instant},
};

const LONG: [&str; 2] = ["train.steps=100000", "checkpoint.every=0"];

/// Starts two ranks that the variables of torchrun describe.
fn two_ranks(experiment: &Experiment) -> Vec<Child> {
    two_ranks_with(experiment, &LONG)
}

fn two_ranks_with(experiment: &Experiment, changes: &[&str]) -> Vec<Child> {
    let port = free_port();
    ranks(experiment, 2, changes, |_, rank| {
        format!(
            "RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 \
             MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
        )
    })
}

/// Returns the names of the checkpoints of `run`.
fn checkpoints(experiment: &Experiment) -> Vec<String> {
    let entries = std::fs::read_dir(experiment.path("run/checkpoints"));
    let entries = entries.into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().join("manifest.json").exists())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn wait_for_checkpoint(experiment: &Experiment) {
    let started = Instant::now();
    while checkpoints(experiment).is_empty() {
        assert!(started.elapsed() < COMMAND_TIMEOUT, "no checkpoint came");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Asserts that all ranks ended with `status`, and that the last step is in a checkpoint.
fn assert_stopped(experiment: &Experiment, run: Vec<Child>, status: i32) {
    for (rank, child) in run.into_iter().enumerate() {
        let output = finish_child(child);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(status), "rank {rank}: {said}");
        assert!(!said.contains("error"), "rank {rank}: {said}");
    }
    let done = steps_done(experiment, "run");
    let expected = format!("step-{done:08}");
    assert_eq!(checkpoints(experiment).last(), Some(&expected));
}

#[test]
fn a_stop_signal_to_one_rank_stops_all_with_its_status() {
    for (name, number, rank) in [
        ("TERM", 15, 1),
        ("INT", 2, 0),
        ("HUP", 1, 1),
        ("USR2", 12, 0),
        ("XCPU", 24, 1),
    ] {
        let experiment = Experiment::new();
        let run = two_ranks(&experiment);
        wait_for_step(&experiment, "run", 10);
        signal(&run[rank].id().to_string(), name);
        assert_stopped(&experiment, run, 128 + number);
    }
}

#[test]
fn signals_that_a_launcher_repeats_are_one_request() {
    // As `timeout`, `srun` and systemd with SendSIGHUP do.
    for second in ["TERM", "HUP", "INT"] {
        let experiment = Experiment::new();
        let run = two_ranks(&experiment);
        wait_for_step(&experiment, "run", 10);
        for name in ["TERM", second] {
            for rank in &run {
                // A rank may have exited after the first.
                let _ = Command::new("kill")
                    .args([&format!("-{name}"), &rank.id().to_string()])
                    .output();
            }
        }
        assert_stopped(&experiment, run, 143);
    }
}

#[test]
fn a_second_interrupt_stops_a_rank_that_waits_for_another() {
    let experiment = Experiment::new();
    let mut run = two_ranks(&experiment);
    wait_for_step(&experiment, "run", 10);
    signal(&run[1].id().to_string(), "STOP");
    let waiting = run.remove(0);
    let pid = waiting.id().to_string();
    signal(&pid, "INT");
    std::thread::sleep(Duration::from_millis(1300));
    let asked = Instant::now();
    signal(&pid, "INT");
    let output = finish_child(waiting);
    assert_eq!(output.status.code(), Some(130), "{}", text(&output));
    assert!(asked.elapsed() < Duration::from_secs(3));
}

/// Returns the command with a signal ignored, as by nohup and for background jobs.
fn ignoring(name: &str, command: &Command) -> Command {
    // `env`, and what it resets.
    let mut ignoring = Command::new(command.get_program());
    let mut arguments = command.get_args();
    ignoring
        .args(arguments.next())
        .arg(format!("--ignore-signal={name}"))
        .args(arguments);
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => ignoring.env(name, value),
            None => ignoring.env_remove(name),
        };
    }
    ignoring.current_dir(command.get_current_dir().unwrap());
    ignoring
}

fn wait_for_ten_more_steps(experiment: &Experiment) {
    wait_for_step(experiment, "run", steps_done(experiment, "run") + 10);
}

/// Returns the process of the first node's keeper.
fn keeper_process(experiment: &Experiment) -> String {
    registered_keepers(experiment, 1)[0]["pid"].to_string()
}

#[test]
fn ignored_signals_stay_ignored() {
    for (name, status) in [("HUP", 143), ("INT", 143), ("USR2", 143)] {
        let experiment = Experiment::new();
        let mut command = ignoring(name, &experiment.train(2, &LONG));
        let run = start_with_output_file(&experiment, &mut command);
        wait_for_step(&experiment, "run", 5);
        signal(&run.id().to_string(), name);
        signal(&rank_process(&experiment, 1), name);
        signal(&keeper_process(&experiment), name);
        wait_for_ten_more_steps(&experiment);
        signal(&run.id().to_string(), "TERM");
        let ended = finish_child(run);
        let said = launcher_output(&experiment);
        assert_eq!(ended.status.code(), Some(status), "{name}: {said}");
        let done = steps_done(&experiment, "run");
        assert_eq!(
            checkpoints(&experiment).last(),
            Some(&format!("step-{done:08}"))
        );
    }
}

#[test]
fn the_launcher_stops_ranks_that_inherited_an_ignored_sigterm() {
    let experiment = Experiment::new();
    let mut command = ignoring("TERM", &experiment.train(2, &LONG));
    let run = start(&mut command);
    wait_for_step(&experiment, "run", 5);
    signal(&run.id().to_string(), "TERM");
    wait_for_ten_more_steps(&experiment);
    signal(&run.id().to_string(), "INT");
    assert_stopped(&experiment, vec![run], 130);
}

#[test]
fn a_request_for_a_checkpoint_writes_one_and_training_continues() {
    // To one rank, and to all at once as srun sends it.
    for to_all in [false, true] {
        let experiment = Experiment::new();
        let run = two_ranks(&experiment);
        wait_for_step(&experiment, "run", 10);
        let asked: Vec<String> = run.iter().map(|rank| rank.id().to_string()).collect();
        for pid in if to_all { &asked[..] } else { &asked[1..] } {
            signal(pid, "USR1");
        }
        wait_for_checkpoint(&experiment);
        wait_for_ten_more_steps(&experiment);
        assert_eq!(checkpoints(&experiment).len(), 1);
        signal(&asked[0], "TERM");
        assert_stopped(&experiment, run, 143);
        let steps: Vec<u64> = curve(&experiment, "run")
            .iter()
            .filter(|line| line.get("loss").is_some())
            .map(|line| line["step"].as_u64().unwrap())
            .collect();
        assert!(
            steps.iter().copied().eq(1..=steps.len() as u64),
            "{steps:?}"
        );
    }
}

#[test]
fn a_rank_of_the_launcher_has_keepers_write_the_checkpoint() {
    let experiment = Experiment::new();
    let run = start(&mut experiment.train(2, &LONG));
    wait_for_step(&experiment, "run", 10);
    signal(&rank_process(&experiment, 1), "USR1");
    wait_for_checkpoint(&experiment);
    wait_for_ten_more_steps(&experiment);
    signal(&run.id().to_string(), "TERM");
    assert_stopped(&experiment, vec![run], 143);
}

#[test]
fn a_validation_that_a_stop_omits_is_made_up_for() {
    // Ranks that write the checkpoint, and ranks whose keepers do.
    for has_launcher in [false, true] {
        let experiment = Experiment::new();
        let start_run = |changes: &[&str]| {
            if has_launcher {
                vec![start(&mut experiment.train(2, changes))]
            } else {
                two_ranks_with(&experiment, changes)
            }
        };
        let changes = ["checkpoint.every=0", "validation.every=1"];
        let run = start_run(&[&changes[..], &["train.steps=100000"]].concat());
        wait_for_step(&experiment, "run", 10);
        signal(&run[0].id().to_string(), "TERM");
        assert_stopped(&experiment, run, 143);
        let stopped = steps_done(&experiment, "run");
        let last = curve(&experiment, "run").pop().unwrap();
        assert!(last["validation_loss"].is_null(), "the stop validated");
        let steps = format!("train.steps={}", stopped + 5);
        let changes = [&changes[..], &[&steps]].concat();
        let mut said = String::new();
        for child in start_run(&changes) {
            let output = finish_child(child);
            said += &text(&output);
            assert!(output.status.success(), "{said}");
        }
        let printed = format!("step {stopped}  validation loss ");
        assert_eq!(said.matches(&printed).count(), 1, "{said}");
        let alone = [&changes[..], &["run.dir=alone"]].concat();
        let output = finish(&mut experiment.train(2, &alone));
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(curve(&experiment, "run"), curve(&experiment, "alone"));
    }
}

/// Waits until a process holds signals back or handles them: before, it cannot do either.
fn wait_for_held_signals(pid: u32) {
    let started = Instant::now();
    let holds = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let mut masks = status.lines().filter_map(|line| {
            let mask = line
                .strip_prefix("SigBlk:")
                .or(line.strip_prefix("SigCgt:"))?;
            u64::from_str_radix(mask.trim(), 16).ok()
        });
        masks.any(|mask| mask >> 14 & 1 == 1)
    };
    while !holds() {
        assert!(started.elapsed() < COMMAND_TIMEOUT, "no signal is handled");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_rank_that_starts_stops_in_order() {
    let experiment = Experiment::new();
    // Rank 0 of two: it waits for the other one.
    for (delay, name, status) in [
        (0, "TERM", 143),
        (20, "HUP", 129),
        (300, "XCPU", 152),
        (1000, "INT", 130),
    ] {
        let port = free_port();
        let mut run = ranks(&experiment, 1, &LONG, |_, _| {
            format!(
                "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 \
                 MASTER_PORT={port}"
            )
        });
        let rank = run.remove(0);
        wait_for_held_signals(rank.id());
        std::thread::sleep(Duration::from_millis(delay));
        let asked = Instant::now();
        signal(&rank.id().to_string(), name);
        let output = finish_child(rank);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(status), "{delay} ms: {said}");
        assert!(!said.contains("error"), "{said}");
        assert!(asked.elapsed() < Duration::from_secs(5), "{delay} ms");
        assert!(!experiment.path("run/logs/rank-0.failure").exists());
    }
}

#[test]
fn a_launcher_that_starts_stops_in_order() {
    let experiment = Experiment::new();
    for delay in [0, 50, 250, 400] {
        let run = start(&mut experiment.train(2, &LONG));
        wait_for_held_signals(run.id());
        std::thread::sleep(Duration::from_millis(delay));
        signal(&run.id().to_string(), "TERM");
        let output = finish_child(run);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(143), "{delay} ms: {said}");
        experiment.assert_no_orphans();
    }
}
