//! One run at a time in a folder: under every launcher, with and without flock.

use crate::fixture::{
    Experiment, curve, finish, finish_child, free_port, ranks, signal, start, text, wait_for_step,
};
use std::{
    process::{Child, Command},
    time::{Duration, Instant},
};

const LONG: [&str; 3] = [
    "train.steps=100000",
    "checkpoint.every=20",
    "parallel.expert=1",
];

/// Starts the one rank of a run by plain variables.
fn plain_rank(experiment: &Experiment, changes: &[&str]) -> Child {
    let port = free_port();
    let mut run = ranks(experiment, 1, changes, |_, _| {
        format!(
            "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 \
             MASTER_PORT={port}"
        )
    });
    run.remove(0)
}

fn assert_refused(second: Child, first: u32) {
    let output = finish_child(second);
    let said = text(&output);
    let by = format!("another moerun is using run: process {first} on ");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains(&by) && said.contains("wait until it exits"),
        "{said}"
    );
}

/// Asserts that a run was not disturbed: each step is in the metrics once.
fn assert_stops_undisturbed(experiment: &Experiment, run: Child) {
    signal(&run.id().to_string(), "TERM");
    let output = finish_child(run);
    assert_eq!(output.status.code(), Some(143), "{}", text(&output));
    let lines = curve(experiment, "run");
    let losses = lines.iter().filter(|line| line.get("loss").is_some());
    let steps: Vec<u64> = losses.map(|line| line["step"].as_u64().unwrap()).collect();
    assert!(
        steps.iter().copied().eq(1..=steps.len() as u64),
        "{steps:?}"
    );
}

#[test]
fn plain_ranks_refuse_a_folder_in_use() {
    let experiment = Experiment::new();
    let first = plain_rank(&experiment, &LONG);
    wait_for_step(&experiment, "run", 5);
    assert_refused(plain_rank(&experiment, &LONG), first.id());
    // moerun's own launcher, too.
    assert_refused(start(&mut experiment.train(1, &LONG)), first.id());
    assert_stops_undisturbed(&experiment, first);
    // The lock ends with its holder.
    let again = finish_child(plain_rank(
        &experiment,
        &["train.steps=1", "parallel.expert=1"],
    ));
    assert!(again.status.success(), "{}", text(&again));
}

#[test]
fn plain_ranks_refuse_the_folder_of_a_launcher() {
    let experiment = Experiment::new();
    let first = start(&mut experiment.train(1, &LONG));
    wait_for_step(&experiment, "run", 5);
    assert_refused(plain_rank(&experiment, &LONG), first.id());
    assert_stops_undisturbed(&experiment, first);
}

/// Returns the command under strace, which makes flock fail. None without strace.
fn without_flock(command: &Command, error: &str) -> Option<Command> {
    let works = Command::new("strace")
        .args(["-f", "-o", "/dev/null", "true"])
        .output();
    if !works.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: strace is missing, or not allowed");
        return None;
    }
    let mut strace = Command::new("strace");
    strace
        .args(["-f", "-o", "/dev/null", "-e", "trace=flock", "-e"])
        .arg(format!("inject=flock:error={error}"))
        .arg(command.get_program())
        .args(command.get_args())
        .env("OMP_NUM_THREADS", "1")
        .current_dir(command.get_current_dir().unwrap());
    Some(strace)
}

#[test]
fn a_file_system_without_flock_has_leases() {
    let experiment = Experiment::new();
    for (error, steps) in [("ENOSYS", 2), ("ENOLCK", 4), ("EOPNOTSUPP", 6)] {
        let steps = format!("train.steps={steps}");
        let Some(mut command) = without_flock(&experiment.train(2, &[&steps]), error) else {
            return;
        };
        let output = finish(&mut command);
        let said = text(&output);
        assert!(output.status.success(), "{error}: {said}");
        let reason = format!("has no flock ({error}");
        assert!(
            said.contains("warning: ") && said.contains(&reason),
            "{said}"
        );
        assert!(!experiment.path("run/lock.lease").exists(), "{error}");
    }
    // Other errors are no lock of another process.
    let command = without_flock(&experiment.train(2, &["train.steps=8"]), "EIO");
    let output = finish(&mut command.unwrap());
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("error: cannot lock run/lock: EIO"), "{said}");
}

#[test]
fn a_lease_keeps_others_out_and_ends_with_its_holder() {
    let experiment = Experiment::new();
    // Without keepers, which outlive the run and so strace.
    let train = |changes: &[&str]| {
        let changes = [changes, &["snapshot.every=0"]].concat();
        without_flock(&experiment.train(1, &changes), "ENOSYS")
    };
    let Some(mut first) = train(&LONG) else {
        return;
    };
    let first = start(&mut first);
    wait_for_step(&experiment, "run", 5);
    let lease = std::fs::read_to_string(experiment.path("run/lock.lease")).unwrap();
    let lease: serde_json::Value = serde_json::from_str(&lease).unwrap();
    let holder = lease["pid"].as_u64().unwrap() as u32;
    assert_refused(start(&mut train(&LONG).unwrap()), holder);
    // One with flock sees the lease, too.
    assert_refused(plain_rank(&experiment, &LONG), holder);
    signal(&holder.to_string(), "KILL");
    finish_child(first);
    let began = Instant::now();
    let changes = ["train.steps=1", "parallel.expert=1"];
    let again = finish(&mut train(&changes).unwrap());
    assert!(again.status.success(), "{}", text(&again));
    // The process is gone, so there is no wait for the lease to expire.
    assert!(began.elapsed() < Duration::from_secs(25));
}

#[test]
fn a_lease_of_another_machine_expires() {
    let experiment = Experiment::new();
    let run = experiment.path("run");
    std::fs::create_dir_all(&run).unwrap();
    let holder = r#"{"host":"elsewhere","boot":"b","pid_namespace":"p","pid":7,"started":1,
        "since":1700000000}"#;
    std::fs::write(run.join("lock"), holder).unwrap();
    let changes = ["train.steps=1", "parallel.expert=1"];
    // Its holder renews it: refused as soon as that shows.
    let waiting = plain_rank(&experiment, &changes);
    for _ in 0..40 {
        std::thread::sleep(Duration::from_millis(100));
        let file = std::fs::File::options()
            .append(true)
            .open(run.join("lock"))
            .unwrap();
        file.set_modified(std::time::SystemTime::now()).unwrap();
    }
    let output = finish_child(waiting);
    let said = text(&output);
    let refused = "another moerun is using run: process 7 on elsewhere";
    assert!(!output.status.success() && said.contains(refused), "{said}");
    // Its holder is gone.
    let output = finish_child(plain_rank(&experiment, &changes));
    let said = text(&output);
    assert!(
        output.status.success() && said.contains("waiting for up to 30 s"),
        "{said}"
    );
}

/// Another user of a shared folder could make `logs` a link, and have files elsewhere overwritten.
#[test]
fn logs_are_not_written_through_a_link() {
    let experiment = Experiment::new();
    let elsewhere = experiment.path("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::create_dir(experiment.path("run")).unwrap();
    std::os::unix::fs::symlink(&elsewhere, experiment.path("run/logs")).unwrap();
    let launched = finish(&mut experiment.train(1, &["train.steps=2", "parallel.expert=1"]));
    let ranked = finish_child(plain_rank(
        &experiment,
        &["train.steps=2", "parallel.expert=1"],
    ));
    for output in [launched, ranked] {
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains("run/logs") && said.contains("symbolic link"),
            "{said}"
        );
    }
    let left = std::fs::read_dir(&elsewhere).unwrap().count();
    assert_eq!(left, 0, "files were written through the link");
}

#[test]
fn a_process_whose_folder_another_machine_took_exits() {
    let experiment = Experiment::new();
    let changes = ["train.steps=1000000", "parallel.expert=1"];
    let suspended = plain_rank(&experiment, &changes);
    wait_for_step(&experiment, "run", 1);
    // As by a machine that does not see the flock of this one.
    let holder = r#"{"host":"elsewhere","boot":"b","pid_namespace":"p","pid":7,"started":1,
        "since":1700000000}"#;
    std::fs::write(experiment.path("run/lock"), holder).unwrap();
    let output = finish_child(suspended);
    let said = text(&output);
    let taken = "error: another moerun took run/lock";
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(taken), "{said}");
}
