//! `scripts/gpu-check` without a GPU: the order of its parts, their time limits, and its reports of
//! programs that stand in for moerun's.

use crate::fixture::{finish, text};
use serde_json::Value;
use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// Most seconds of all parts together.
const LIMIT_S: f64 = 15.0 * 60.0 - 30.0;

/// A folder with stand-ins for the packed programs, `nvidia-smi` and Python's torch.
struct StandIns(tempfile::TempDir);

impl StandIns {
    fn new() -> StandIns {
        let stand_ins = StandIns(tempfile::tempdir().unwrap());
        stand_ins.program("bin/nvidia-smi", "echo 'A GPU, 999.9, 80 GiB'");
        stand_ins.program("pack/kernels", "exit 0");
        stand_ins.program("pack/golden", "exit 0");
        stand_ins.program(
            "pack/moerun",
            r#"
case "$1" in
bench) echo '{"tokens_per_s": 1.5}' ;;
train)
    for word in "$@"; do case "$word" in run.dir=*) dir=${word#run.dir=} ;; esac; done
    mkdir -p "$dir"
    for step in $(seq 20); do echo '{"loss": 2.0, "grad_norm": 1.0}'; done > "$dir/metrics.jsonl"
    ;;
esac"#,
        );
        stand_ins.sees_gpu(true);
        stand_ins
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn sees_gpu(&self, sees: bool) {
        let folder = self.path("python/torch");
        std::fs::create_dir_all(&folder).unwrap();
        let answer = if sees { "True" } else { "False" };
        let module = format!(
            "__version__ = '2.11.0+cu130'\nclass cuda:\n    is_available = lambda: {answer}\n"
        );
        std::fs::write(folder.join("__init__.py"), module).unwrap();
    }

    /// Runs the program and returns whether it succeeded, and its lines.
    fn run(&self, options: &[&str]) -> (bool, Vec<Value>) {
        let path = std::env::var("PATH").unwrap();
        let mut command = gpu_check();
        command
            .arg(self.path("results"))
            .args(options)
            .env("GPU_CHECK_PACK", self.path("pack"))
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("PYTHONPATH", self.path("python"));
        let output = finish(&mut command);
        let lines = json_lines(&String::from_utf8_lossy(&output.stdout));
        assert!(!lines.is_empty(), "{}", text(&output));
        let stored = std::fs::read_to_string(self.path("results/parts.jsonl")).unwrap();
        assert_eq!(json_lines(&stored), lines);
        (output.status.success(), lines)
    }
}

fn gpu_check() -> Command {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    Command::new(project.join("scripts/gpu-check"))
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Returns the parts that the program has, in order.
fn listed() -> Vec<Value> {
    let output = finish(gpu_check().arg("--list"));
    assert!(output.status.success(), "{}", text(&output));
    json_lines(&String::from_utf8_lossy(&output.stdout))
}

fn names(lines: &[Value]) -> Vec<&str> {
    lines
        .iter()
        .map(|line| line["part"].as_str().unwrap())
        .collect()
}

#[test]
fn its_parts_end_within_fifteen_minutes() {
    let parts = listed();
    let limits = parts.iter().map(|part| part["limit_s"].as_f64().unwrap());
    let sum: f64 = limits.sum();
    assert!(sum <= LIMIT_S, "{sum} seconds");
    // Faults first, then sanitizers, comparisons, and speed last.
    let order = [
        "load",
        "kernels",
        "memcheck",
        "train-cuda",
        "rates",
        "against-pytorch",
    ];
    let names = names(&parts);
    let position = |name: &&str| names.iter().position(|other| other == name).unwrap();
    assert!(order.iter().map(position).is_sorted(), "{names:?}");
}

#[test]
fn each_part_gives_a_result() {
    let stand_ins = StandIns::new();
    stand_ins.program(
        "pack/sanitizer/bin/compute-sanitizer",
        r#"[ "$2" = memcheck ] && echo 'Invalid __global__ read' && exit 9; exit 0"#,
    );
    let (success, lines) = stand_ins.run(&[]);
    let parts = listed();
    assert_eq!(names(&lines), names(&parts));
    for line in &lines {
        let expected = match line["part"].as_str().unwrap() {
            "memcheck" => "fail",
            // Python's transformers may be missing.
            "against-pytorch" => line["status"].as_str().unwrap(),
            _ => "ok",
        };
        assert_eq!(line["status"], expected, "{line}");
    }
    assert!(!success);
    let of = |name: &str| lines.iter().find(|line| line["part"] == name).unwrap();
    let why = of("memcheck")["why"].as_str().unwrap();
    assert!(
        why.contains("exit status 9") && why.contains("Invalid"),
        "{why}"
    );
    assert_eq!(of("versions")["gpu"], "A GPU, 999.9, 80 GiB");
    assert_eq!(of("step")["measured"][0]["tokens_per_s"], 1.5);
    assert_eq!(of("cuda-repeats-its-bits")["loss"], 0.0);
}

#[test]
fn a_part_that_hangs_is_ended_at_its_limit() {
    let stand_ins = StandIns::new();
    // A child that ignores the first signal and outlives its parent.
    let hanging = "(trap '' TERM; sleep 600) & echo $! > \"$(dirname \"$0\")/pid\"; wait";
    stand_ins.program("pack/sanitizer/bin/compute-sanitizer", hanging);
    let started = Instant::now();
    let options = ["--only", "racecheck", "--only", "golden", "--seconds", "60"];
    let (success, lines) = stand_ins.run(&options);
    assert!(!success && started.elapsed() < Duration::from_secs(30));
    assert_eq!(names(&lines), ["racecheck", "golden"]);
    assert_eq!(lines[0]["status"], "timeout", "{}", lines[0]);
    assert_eq!(lines[1]["status"], "ok", "{}", lines[1]);
    let pid = std::fs::read_to_string(stand_ins.path("pack/sanitizer/bin/pid")).unwrap();
    let is_alive = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    };
    while is_alive() && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!is_alive(), "process {pid} was left");
}

#[test]
fn without_a_gpu_or_the_programs_it_says_so() {
    let stand_ins = StandIns::new();
    stand_ins.sees_gpu(false);
    let (success, lines) = stand_ins.run(&[]);
    assert!(!success && lines.len() == 1);
    assert!(
        lines[0]["why"].as_str().unwrap().contains("no GPU"),
        "{}",
        lines[0]
    );
    stand_ins.sees_gpu(true);
    std::fs::remove_file(stand_ins.path("pack/moerun")).unwrap();
    let (success, lines) = stand_ins.run(&[]);
    let why = lines[0]["why"].as_str().unwrap();
    assert!(!success && why.contains("scripts/gpu-check build"), "{why}");
}
