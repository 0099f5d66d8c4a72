//! Disks and terminals that fail in the middle of a run: training continues, and each step is in
//! the metrics once.

use crate::fixture::{
    COMMAND_TIMEOUT, Experiment, finish_child, launcher_output, newest_step, rank_process, signal,
    start_with_output_file, text, wait_for_output,
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

const MANY_STEPS: &str = "train.steps=1000000";
const RARE_CHECKPOINTS: &str = "checkpoint.every=1000000";
const NO_VALIDATION: &str = "validation.every=1000000";

/// A small file system on the run's folder, taken away at the end.
struct Disk {
    folder: PathBuf,
}

impl Disk {
    /// Mounts a file system in memory; `None` where a test may not.
    fn in_memory(experiment: &Experiment, size: &str) -> Option<Disk> {
        let options = format!("size={size}");
        Disk::mount(experiment, &["-t", "tmpfs", "-o", &options, "tmpfs"])
    }

    /// Mounts an ext4 file system in a file, which can hang and fail.
    fn ext4(experiment: &Experiment) -> Option<Disk> {
        let image = experiment.path("image");
        File::create(&image).unwrap().set_len(48 << 20).unwrap();
        let image = image.to_str().unwrap();
        if !run("mkfs.ext4", &["-q", "-F", image]) {
            eprintln!("skipped: this machine has no mkfs.ext4");
            return None;
        }
        Disk::mount(experiment, &["-o", "loop,errors=remount-ro", image])
    }

    fn mount(experiment: &Experiment, args: &[&str]) -> Option<Disk> {
        let folder = experiment.path("run");
        std::fs::create_dir(&folder).unwrap();
        let path = folder.to_str().unwrap();
        if !run("mount", &[args, &[path]].concat()) {
            eprintln!("skipped: this machine does not let a test mount a disk");
            return None;
        }
        Some(Disk { folder })
    }

    /// Fills the disk to the last byte.
    fn fill(&self) {
        let mut ballast = File::create(self.folder.join("ballast")).unwrap();
        for block in [65536, 4096, 1] {
            while ballast.write_all(&vec![0; block]).is_ok() {}
        }
    }

    fn free(&self) {
        std::fs::remove_file(self.folder.join("ballast")).unwrap();
    }

    /// Makes every access hang, or ends that.
    fn freeze(&self, is_frozen: bool) -> bool {
        let flag = if is_frozen { "-f" } else { "-u" };
        run("fsfreeze", &[flag, self.folder.to_str().unwrap()])
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.freeze(false);
        run("umount", &["-l", self.folder.to_str().unwrap()]);
    }
}

fn run(program: &str, args: &[&str]) -> bool {
    let output = Command::new(program).args(args).output();
    output.is_ok_and(|output| output.status.success())
}

fn lines(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
    // The last line may be in progress.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parsed = whole.lines();
    parsed
        .map(|line| serde_json::from_str(line).expect(line))
        .collect()
}

/// Asserts that each step is in the metrics once, as its line or in a record of missing ones.
/// Returns the number of missing steps.
fn assert_each_step_once(folder: &Path) -> u64 {
    let mut times = BTreeMap::<u64, u64>::new();
    let mut missing = 0;
    for line in lines(folder) {
        let step = line["step"].as_u64().unwrap();
        if let Some(dropped) = line["dropped_steps"].as_u64() {
            let first = line["first_step"].as_u64().unwrap();
            assert_eq!(dropped, step - first + 1, "{line}");
            missing += dropped;
            for step in first..=step {
                *times.entry(step).or_default() += 1;
            }
        } else if line["loss"].is_number() {
            *times.entry(step).or_default() += 1;
        }
    }
    let last = times.keys().next_back().copied().unwrap();
    for step in 1..=last {
        assert_eq!(times.get(&step), Some(&1), "step {step} of {last}");
    }
    missing
}

fn last_step(folder: &Path) -> u64 {
    newest_step(&folder.join("metrics.jsonl")).unwrap_or(0)
}

/// Returns the last step that the run printed, which does not depend on its disk.
fn printed_step(experiment: &Experiment) -> u64 {
    let said = launcher_output(experiment);
    let steps = said.lines().filter_map(|line| {
        let (step, _) = line.strip_prefix("step ")?.split_once('/')?;
        step.parse().ok()
    });
    steps.max().unwrap_or(0)
}

fn wait_until(experiment: &Experiment, what: &str, is_met: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_met() {
        if began.elapsed() > WAIT_TIMEOUT {
            panic!("{what} did not happen: {}", launcher_output(experiment));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wait_for_printed_step(experiment: &Experiment, step: u64) {
    wait_until(experiment, &format!("step {step}"), || {
        printed_step(experiment) >= step
    });
}

fn begin(experiment: &Experiment, changes: &[&str]) -> Child {
    let common = [MANY_STEPS, RARE_CHECKPOINTS, NO_VALIDATION];
    let changes = [&common, changes].concat();
    let mut run = start_with_output_file(experiment, &mut experiment.train(2, &changes));
    while printed_step(experiment) < 50 {
        let ended = run.try_wait().unwrap();
        assert!(ended.is_none(), "{}", launcher_output(experiment));
        std::thread::sleep(Duration::from_millis(20));
    }
    run
}

fn stop(experiment: &Experiment, run: Child) {
    signal(&run.id().to_string(), "TERM");
    finish_child(run);
    let stop = experiment.moerun(&["keeper", "stop", "run"]).output();
    assert!(stop.is_ok());
}

fn assert_said_once(said: &str, what: &str) {
    let found = said.matches(what).count();
    assert_eq!(found, 1, "{what:?} is there {found} times: {said}");
}

#[test]
fn a_full_disk_delays_lines_of_metrics() {
    let experiment = Experiment::new();
    let Some(disk) = Disk::in_memory(&experiment, "8m") else {
        return;
    };
    let run = begin(&experiment, &[]);
    disk.fill();
    std::thread::sleep(Duration::from_secs(2));
    let step = printed_step(&experiment);
    wait_for_printed_step(&experiment, step + 100);
    disk.free();
    wait_for_output(&experiment, "metrics.jsonl can be written again", 1);
    let step = printed_step(&experiment);
    wait_until(&experiment, "a line after the outage", || {
        last_step(&disk.folder) > step
    });
    signal(&rank_process(&experiment, 1), "KILL");
    wait_for_output(&experiment, "resuming from the snapshot", 1);
    let step = printed_step(&experiment);
    wait_until(&experiment, "a line after the restart", || {
        last_step(&disk.folder) > step
    });
    stop(&experiment, run);
    assert_eq!(assert_each_step_once(&disk.folder), 0);
    let said = launcher_output(&experiment);
    assert_said_once(&said, "metrics.jsonl: No space left on device");
    assert!(!said.contains("tracing-subscriber"), "{said}");
    let log = std::fs::read_to_string(disk.folder.join("logs/rank-0.log")).unwrap();
    assert!(!log.contains("tracing-subscriber") && log.contains("step 60/"));
}

#[test]
fn a_restart_does_not_wait_for_a_full_disk() {
    let experiment = Experiment::new();
    let Some(disk) = Disk::in_memory(&experiment, "8m") else {
        return;
    };
    let run = begin(&experiment, &[]);
    disk.fill();
    wait_for_output(&experiment, "metrics.jsonl: No space left on device", 1);
    let step = printed_step(&experiment);
    wait_for_printed_step(&experiment, step + 50);
    signal(&rank_process(&experiment, 1), "KILL");
    wait_for_output(&experiment, "resuming from the snapshot", 1);
    let step = printed_step(&experiment);
    wait_for_printed_step(&experiment, step + 50);
    disk.free();
    let step = printed_step(&experiment);
    wait_until(&experiment, "a line after the outage", || {
        last_step(&disk.folder) > step
    });
    stop(&experiment, run);
    // The lines that the killed rank held are lost, and counted.
    let missing = assert_each_step_once(&disk.folder);
    let said = launcher_output(&experiment);
    if missing > 0 {
        assert_said_once(&said, &format!("lacks {missing} line"));
    }
}

#[test]
fn a_long_outage_is_counted_line_by_line() {
    let experiment = Experiment::new();
    let Some(disk) = Disk::in_memory(&experiment, "8m") else {
        return;
    };
    let run = begin(&experiment, &["run.line_buffer_mib=1"]);
    disk.fill();
    let step = printed_step(&experiment);
    // Each line has some 800 bytes.
    wait_for_printed_step(&experiment, step + 1800);
    disk.free();
    wait_for_output(
        &experiment,
        "were dropped, because run.line_buffer_mib was full",
        1,
    );
    let step = printed_step(&experiment);
    wait_until(&experiment, "a line after the outage", || {
        last_step(&disk.folder) > step
    });
    stop(&experiment, run);
    let missing = assert_each_step_once(&disk.folder);
    assert!(missing > 100, "{missing}");
    let said = launcher_output(&experiment);
    assert_said_once(&said, &format!("warning: {missing} lines (steps "));
}

#[test]
fn a_hanging_disk_does_not_stop_training() {
    let experiment = Experiment::new();
    let Some(disk) = Disk::ext4(&experiment) else {
        return;
    };
    let run = begin(&experiment, &[]);
    if !disk.freeze(true) {
        eprintln!("skipped: this machine does not let a test freeze a disk");
        return stop(&experiment, run);
    }
    let step = printed_step(&experiment);
    // Longer than it takes to report the outage.
    std::thread::sleep(Duration::from_secs(3));
    wait_for_printed_step(&experiment, step + 200);
    disk.freeze(false);
    wait_for_output(&experiment, "metrics.jsonl can be written again", 1);
    let step = printed_step(&experiment);
    wait_until(&experiment, "a line after the outage", || {
        last_step(&disk.folder) > step
    });
    stop(&experiment, run);
    assert_eq!(assert_each_step_once(&disk.folder), 0);
    let said = launcher_output(&experiment);
    assert_said_once(&said, "metrics.jsonl: no answer for 2 s");
}

#[test]
fn a_disk_that_turns_read_only_does_not_stop_training() {
    let experiment = Experiment::new();
    let Some(disk) = Disk::ext4(&experiment) else {
        return;
    };
    let run = begin(&experiment, &[]);
    if !fail_ext4(&disk.folder) {
        eprintln!("skipped: this machine does not let a test fail a disk");
        return stop(&experiment, run);
    }
    wait_for_output(&experiment, "metrics.jsonl: Read-only file system", 1);
    let step = printed_step(&experiment);
    wait_for_printed_step(&experiment, step + 100);
    stop(&experiment, run);
    let said = launcher_output(&experiment);
    assert!(
        said.contains("could not be written to run/metrics.jsonl: Read-only"),
        "{said}"
    );
}

#[test]
fn a_restart_does_not_wait_for_a_read_only_disk() {
    let experiment = Experiment::new();
    let Some(disk) = Disk::ext4(&experiment) else {
        return;
    };
    let run = begin(&experiment, &[]);
    if !fail_ext4(&disk.folder) {
        eprintln!("skipped: this machine does not let a test fail a disk");
        return stop(&experiment, run);
    }
    wait_for_output(&experiment, "metrics.jsonl: Read-only file system", 1);
    let step = printed_step(&experiment);
    signal(&rank_process(&experiment, 1), "KILL");
    wait_for_output(&experiment, "resuming from the snapshot", 1);
    wait_for_printed_step(&experiment, step + 100);
    stop(&experiment, run);
}

#[test]
fn a_restart_does_not_wait_for_a_hanging_disk() {
    let experiment = Experiment::new();
    let Some(disk) = Disk::ext4(&experiment) else {
        return;
    };
    let run = begin(&experiment, &[]);
    if !disk.freeze(true) {
        eprintln!("skipped: this machine does not let a test freeze a disk");
        return stop(&experiment, run);
    }
    wait_for_output(&experiment, "metrics.jsonl: no answer for 2 s", 1);
    let step = printed_step(&experiment);
    signal(&rank_process(&experiment, 1), "KILL");
    wait_for_output(&experiment, "resuming from the snapshot", 1);
    wait_for_printed_step(&experiment, step + 100);
    disk.freeze(false);
    stop(&experiment, run);
}

/// Reports an error to the file system of `folder`, as a broken disk does.
fn fail_ext4(folder: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let folder = folder.to_str().unwrap();
    let mount = mounts.lines().find(|line| line.contains(folder));
    let Some(device) = mount.and_then(|line| line.split(['/', ' ']).nth(2)) else {
        return false;
    };
    std::fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "test").is_ok()
}

#[test]
fn a_limit_on_file_sizes_is_an_outage_like_others() {
    let experiment = Experiment::new();
    let run = begin(&experiment, &[]);
    let rank = rank_process(&experiment, 0);
    let limit = |bytes: &str| run_prlimit(&rank, bytes);
    // More than the output so far, less than the metrics.
    if !limit("40000") {
        eprintln!("skipped: this machine does not let a test limit file sizes");
        return stop(&experiment, run);
    }
    wait_for_output(&experiment, "metrics.jsonl: File too large", 1);
    let step = printed_step(&experiment);
    wait_for_printed_step(&experiment, step + 100);
    assert!(limit("unlimited"));
    let step = printed_step(&experiment);
    let folder = experiment.path("run");
    wait_until(&experiment, "a line after the outage", || {
        last_step(&folder) > step
    });
    stop(&experiment, run);
    assert_eq!(assert_each_step_once(&folder), 0);
}

fn run_prlimit(pid: &str, bytes: &str) -> bool {
    // The soft limit alone, which can be raised again.
    run("prlimit", &["--pid", pid, &format!("--fsize={bytes}:")])
}

#[test]
fn files_that_were_removed_are_made_again() {
    let experiment = Experiment::new();
    let run = begin(&experiment, &[]);
    let folder = experiment.path("run");
    std::fs::remove_file(folder.join("metrics.jsonl")).unwrap();
    std::fs::remove_dir_all(folder.join("logs")).unwrap();
    let step = printed_step(&experiment);
    wait_until(&experiment, "new files", || {
        last_step(&folder) > step && folder.join("logs/rank-0.log").exists()
    });
    stop(&experiment, run);
}

#[test]
fn metrics_never_go_through_a_link() {
    let experiment = Experiment::new();
    let other = experiment.path("other");
    std::fs::write(&other, "kept\n").unwrap();
    std::fs::create_dir(experiment.path("run")).unwrap();
    std::os::unix::fs::symlink(&other, experiment.path("run/metrics.jsonl")).unwrap();
    let output = experiment.train(2, &["train.steps=3"]).output().unwrap();
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("cannot write run/metrics.jsonl: "), "{said}");
    assert_eq!(std::fs::read_to_string(&other).unwrap(), "kept\n");
}

/// Asserts that a run of some steps ends well, whatever its standard error does.
fn assert_done(experiment: &Experiment, mut run: Child) {
    let began = Instant::now();
    let status = loop {
        if let Some(status) = run.try_wait().unwrap() {
            break status;
        }
        assert!(
            began.elapsed() < COMMAND_TIMEOUT,
            "the run waits for its terminal"
        );
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
    let checkpoints = checkpoint::list(&experiment.path("run/checkpoints")).unwrap();
    assert!(checkpoints.last().unwrap().ends_with("step-00001000"));
    experiment.assert_no_orphans();
}

const STEPS: [&str; 4] = [
    "train.steps=1000",
    "run.log_every=1",
    RARE_CHECKPOINTS,
    NO_VALIDATION,
];

#[test]
fn a_closed_pipe_ends_no_run() {
    let experiment = Experiment::new();
    let mut command = experiment.train(2, &STEPS);
    let mut run = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut some = [0; 100];
    let mut pipe = run.stderr.take().unwrap();
    pipe.read_exact(&mut some).unwrap();
    drop(pipe);
    assert_done(&experiment, run);
}

#[test]
fn a_full_file_in_place_of_the_terminal_ends_no_run() {
    let experiment = Experiment::new();
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let run = experiment.train(2, &STEPS).stderr(full).spawn().unwrap();
    assert_done(&experiment, run);
}

#[test]
fn a_reader_that_reads_nothing_stops_no_run() {
    let experiment = Experiment::new();
    let mut command = experiment.train(2, &STEPS);
    // A pipe holds 64 KiB; the run prints some 100.
    let mut run = command.stderr(Stdio::piped()).spawn().unwrap();
    let pipe = run.stderr.take();
    assert_done(&experiment, run);
    drop(pipe);
}

#[test]
fn a_closed_terminal_ends_a_run_with_a_checkpoint() {
    let experiment = Experiment::new();
    let train = experiment.train(2, &[MANY_STEPS, RARE_CHECKPOINTS]);
    let words = [train.get_program()].into_iter().chain(train.get_args());
    let words: Vec<_> = words.map(|word| word.to_str().unwrap()).collect();
    // `script` runs it on a terminal of its own, which ends with it.
    let mut command = Command::new("script");
    command
        .current_dir(experiment.path(""))
        .args(["-qfc", &words.join(" "), "screen"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .env("OMP_NUM_THREADS", "1");
    let Ok(mut script) = command.spawn() else {
        eprintln!("skipped: this machine has no script");
        return;
    };
    let folder = experiment.path("run");
    wait_until(&experiment, "step 50", || last_step(&folder) >= 50);
    script.kill().unwrap();
    script.wait().unwrap();
    wait_until(&experiment, "a checkpoint", || {
        checkpoint::list(&folder.join("checkpoints")).is_ok_and(|list| !list.is_empty())
    });
    experiment.assert_no_orphans();
    let step = last_step(&folder);
    assert!(folder.join(format!("checkpoints/step-{step:08}")).exists());
}
