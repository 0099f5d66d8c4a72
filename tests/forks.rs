//! Ranks as copies of one process per machine that has loaded libtorch.

use crate::fixture::{
    COMMAND_TIMEOUT, Experiment, curve, find_rank, finish, is_assigned, launcher_output,
    rank_process, signal, start_with_output_file, steps_done, text, wait_for_output, wait_for_step,
};
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

const LONG: [&str; 3] = [
    "train.steps=100000",
    "checkpoint.every=0",
    "snapshot.every=1",
];
/// Time within which the launcher notices the end of a process, and others follow.
const NOTICE_TIME: Duration = Duration::from_millis(100);

fn standard_input(pid: &str) -> PathBuf {
    std::fs::read_link(format!("/proc/{pid}/fd/0")).unwrap_or_default()
}

/// Returns the process that forks the ranks: its standard input is a socket.
fn fork_server(experiment: &Experiment) -> Option<String> {
    let mut processes = experiment.processes().into_iter();
    processes.find(|pid| standard_input(pid).to_string_lossy().starts_with("socket:"))
}

fn parent(pid: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    line.unwrap().trim().to_string()
}

/// Returns the processes that wait for the assignment of a rank.
fn standbys(experiment: &Experiment) -> Vec<String> {
    let mut processes = experiment.processes();
    processes.retain(|pid| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let waits = standard_input(pid).to_string_lossy().starts_with("pipe:");
        waits && command.starts_with(b"moerun\0train\0") && !is_assigned(experiment, pid)
    });
    processes
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < COMMAND_TIMEOUT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_run_survives_its_fork_server_and_then_a_rank() {
    let experiment = Experiment::new();
    let mut launcher = start_with_output_file(&experiment, &mut experiment.train(2, &LONG));
    wait_for_step(&experiment, "run", 2);
    let own = launcher.id().to_string();
    for rank in 0..2 {
        assert_eq!(parent(&rank_process(&experiment, rank)), own);
    }
    let server = fork_server(&experiment).expect("ranks are forked");
    signal(&server, "KILL");
    let step = steps_done(&experiment, "run");
    wait_for_step(&experiment, "run", step + 2);
    signal(&rank_process(&experiment, 1), "KILL");
    wait_for_output(&experiment, "resuming from the snapshot of step", 1);
    let step = steps_done(&experiment, "run");
    wait_for_step(&experiment, "run", step + 2);
    signal(&rank_process(&experiment, 0), "KILL");
    wait_for_output(&experiment, "resuming from the snapshot of step", 2);
    signal(&own, "TERM");
    assert_eq!(launcher.wait().unwrap().code(), Some(143));
    let said = launcher_output(&experiment);
    let warning = "the fork server of this machine: it ended (signal: 9 (SIGKILL))";
    assert_eq!(said.matches(warning).count(), 1, "{said}");
    experiment.assert_no_orphans();
}

#[test]
fn standbys_are_forked_and_a_killed_rank_is_noticed_at_once() {
    let experiment = Experiment::with_standbys();
    let mut launcher = start_with_output_file(&experiment, &mut experiment.train(2, &LONG));
    wait_for_step(&experiment, "run", 2);
    wait_until("no standbys", || standbys(&experiment).len() == 2);
    let own = launcher.id().to_string();
    let waiting = standbys(&experiment);
    assert!(waiting.iter().all(|standby| parent(standby) == own));
    let other = rank_process(&experiment, 0);
    let killed = Instant::now();
    signal(&rank_process(&experiment, 1), "KILL");
    // The launcher kills the other rank once it knows.
    let folder = PathBuf::from(format!("/proc/{other}"));
    wait_until("the other rank lives", || !folder.exists());
    let noticed = killed.elapsed();
    wait_for_output(&experiment, "resuming from the snapshot of step", 1);
    wait_until("a standby is not used", || {
        let ranks = [0, 1].map(|rank| find_rank(&experiment, rank));
        ranks.iter().flatten().all(|rank| waiting.contains(rank))
    });
    signal(&own, "TERM");
    assert_eq!(launcher.wait().unwrap().code(), Some(143));
    // Other tests share the processors.
    assert!(noticed < 5 * NOTICE_TIME, "{noticed:?}");
    experiment.assert_no_orphans();
}

#[test]
fn a_launcher_without_a_fork_server_trains_the_same() {
    let experiment = Experiment::new();
    let run = |dir: &str, value: &str| {
        let changes = [&format!("run.dir={dir}")[..]];
        let mut command = experiment.train(2, &changes);
        let output = finish(command.env("MOERUN_FORK_SERVER", value));
        assert!(output.status.success(), "{}", text(&output));
    };
    run("forked", "1");
    run("loaded", "0");
    assert_eq!(curve(&experiment, "forked"), curve(&experiment, "loaded"));
    let output = finish(experiment.train(2, &[]).env("MOERUN_FORK_SERVER", "off"));
    let said = text(&output);
    assert!(!output.status.success());
    assert!(
        said.contains("MOERUN_FORK_SERVER=off is neither 0 nor 1"),
        "{said}"
    );
    experiment.assert_no_orphans();
}
