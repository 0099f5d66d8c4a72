//! `scripts/gpu-check` without a GPU: the order of its parts, their time limits, and its reports of
//! moerun and of programs that stand in for it. A stand-in for NVIDIA's driver has GPUs or none.

use crate::fixture::{finish, finish_child, text};
use serde_json::Value;
use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Most seconds of all parts together. Before them it asks torch for a GPU.
const LIMIT_S: f64 = 15.0 * 60.0 - 60.0;

/// Seconds of all parts that suffice on any machine.
const UNLIMITED_S: &str = "20000";

/// Python's torch: it finds the GPUs of the driver, and its libraries are the tests'.
const TORCH: &str = r#"
import ctypes
__version__ = "2.11.0+cu130"
class cuda:
    def is_available():
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
"#;

const NVIDIA_SMI: &str = r#"exec python3 -c '
import ctypes, sys
driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
driver.cuInit(0)
if driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
    sys.exit("No devices were found")
for _ in range(count.value):
    print("A GPU, 999.9, 80 GiB")
'"#;

/// A program that never ends, with two children: one ignores the first signal, the other one has
/// a session of its own. `pids` has the three.
const HANGING: &str = r#"
pids=$(dirname "$0")/pids
echo $$ > "$pids"
(trap '' TERM; sleep 600) & echo $! >> "$pids"
setsid sleep 600 & echo $! >> "$pids"
echo done >> "$pids"
wait"#;

/// A folder with stand-ins for the packed programs, the driver, `nvidia-smi` and Python's torch.
struct StandIns {
    folder: tempfile::TempDir,
    gpus: usize,
}

impl StandIns {
    fn new(gpus: usize) -> StandIns {
        let folder = tempfile::tempdir().unwrap();
        let stand_ins = StandIns { folder, gpus };
        stand_ins.make_driver();
        stand_ins.program("bin/nvidia-smi", NVIDIA_SMI);
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
        stand_ins
    }

    /// Compiles the driver, and makes the folder of torch.
    fn make_driver(&self) {
        for folder in ["bin", "pack", "driver", "python/torch"] {
            std::fs::create_dir_all(self.path(folder)).unwrap();
        }
        let source = project().join("kernels/src/cuda/stand_in_driver.cpp");
        let mut compiler = Command::new(std::env::var("CXX").unwrap_or("c++".into()));
        compiler.args(["-std=c++17", "-shared", "-fPIC", "-o"]);
        let compiled = finish(compiler.arg(self.path("driver/libcuda.so.1")).arg(source));
        assert!(compiled.status.success(), "{}", text(&compiled));
        std::fs::write(self.path("python/torch/__init__.py"), TORCH).unwrap();
        let libtorch = std::env::var("LIBTORCH").expect("cargo sets it: see ./scripts/setup");
        let libraries = Path::new(&libtorch).join("lib");
        std::os::unix::fs::symlink(libraries, self.path("python/torch/lib")).unwrap();
    }

    /// Packs moerun itself. The programs of tests stay stand-ins.
    fn pack_moerun(&self) {
        std::fs::remove_file(self.path("pack/moerun")).unwrap();
        let built = Path::new(env!("CARGO_BIN_EXE_moerun"));
        for name in ["moerun", "moerun-core"] {
            let packed = self.path("pack").join(name);
            std::os::unix::fs::symlink(built.with_file_name(name), packed).unwrap();
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn command(&self, options: &[&str]) -> Command {
        let path = std::env::var("PATH").unwrap();
        let mut command = gpu_check();
        command
            .arg(self.path("results"))
            .args(options)
            .env("GPU_CHECK_PACK", self.path("pack"))
            .env("LD_LIBRARY_PATH", self.path("driver"))
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("PYTHONPATH", self.path("python"))
            .env("STAND_IN_GPUS", self.gpus.to_string());
        command
    }

    /// Runs the program and returns whether it succeeded, and its lines.
    fn run(&self, options: &[&str]) -> (bool, Vec<Value>) {
        let output = finish(&mut self.command(options));
        let lines = json_lines(&String::from_utf8_lossy(&output.stdout));
        assert!(!lines.is_empty(), "{}", text(&output));
        let stored = std::fs::read_to_string(self.path("results/parts.jsonl")).unwrap();
        assert_eq!(json_lines(&stored), lines);
        (output.status.success(), lines)
    }

    /// Waits until the program that hangs has started, and returns its processes.
    fn hanging_processes(&self) -> Vec<String> {
        let path = self.path("pack/sanitizer/bin/pids");
        let started = Instant::now();
        loop {
            let pids = std::fs::read_to_string(&path).unwrap_or_default();
            if let Some(pids) = pids.strip_suffix("done\n") {
                return pids.lines().map(str::to_owned).collect();
            }
            assert!(started.elapsed() < Duration::from_secs(60), "{pids:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Asserts that a program that hung has left none of its processes.
fn assert_ended(pids: &[String]) {
    assert_eq!(pids.len(), 3);
    let is_alive = |pid: &&String| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    };
    let alive: Vec<_> = pids.iter().filter(is_alive).collect();
    assert!(
        alive.is_empty(),
        "processes {alive:?} of {pids:?} were left"
    );
}

fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn gpu_check() -> Command {
    // Shells make background jobs ignore SIGINT, and `nohup` SIGHUP.
    let mut command = Command::new("/usr/bin/env");
    command.arg("--default-signal=INT,HUP");
    command.arg(project().join("scripts/gpu-check"));
    command
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
    let stand_ins = StandIns::new(1);
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
    let stand_ins = StandIns::new(1);
    stand_ins.program("pack/sanitizer/bin/compute-sanitizer", HANGING);
    let started = Instant::now();
    let options = ["--only", "racecheck", "--only", "golden", "--seconds", "60"];
    let (success, lines) = stand_ins.run(&options);
    assert!(!success && started.elapsed() < Duration::from_secs(30));
    assert_eq!(names(&lines), ["racecheck", "golden"]);
    assert_eq!(lines[0]["status"], "timeout", "{}", lines[0]);
    assert_eq!(lines[1]["status"], "ok", "{}", lines[1]);
    assert_ended(&stand_ins.hanging_processes());
}

#[test]
fn an_interrupt_leaves_no_processes() {
    for signal in ["-TERM", "-INT", "-HUP"] {
        let stand_ins = StandIns::new(1);
        stand_ins.program("pack/sanitizer/bin/compute-sanitizer", HANGING);
        let options = ["--only", "racecheck", "--only", "golden"];
        let mut command = stand_ins.command(&options);
        let running = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pids = stand_ins.hanging_processes();
        let sent = Command::new("kill")
            .args([signal, &running.id().to_string()])
            .status();
        assert!(sent.unwrap().success());
        let output = finish_child(running);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        let lines = json_lines(&String::from_utf8_lossy(&output.stdout));
        assert_eq!(names(&lines), ["racecheck"]);
        assert_eq!(lines[0]["status"], "interrupted", "{}", lines[0]);
        let why = lines[0]["why"].as_str().unwrap();
        assert!(why.ends_with(signal.trim_start_matches('-')), "{why}");
        assert_ended(&pids);
    }
}

#[test]
fn without_a_gpu_moerun_still_runs_on_the_host() {
    let stand_ins = StandIns::new(0);
    stand_ins.pack_moerun();
    let (success, lines) = stand_ins.run(&["--seconds", UNLIMITED_S]);
    assert!(!success);
    assert_eq!(names(&lines), names(&listed()));
    for line in &lines {
        if ["data", "train-cpu", "train-fp8-cpu"].contains(&line["part"].as_str().unwrap()) {
            assert_eq!(line["status"], "ok", "{line}");
        } else {
            assert_eq!(line["status"], "skipped", "{line}");
            assert!(
                line["why"].as_str().unwrap().starts_with("no GPU"),
                "{line}"
            );
        }
    }
}

#[test]
fn without_cuda_each_part_of_moerun_names_the_missing_library() {
    // Everything else about the commands and keys of the parts must be right.
    let stand_ins = StandIns::new(1);
    stand_ins.pack_moerun();
    let all = listed();
    let mut parts = names(&all);
    parts.retain(|name| !["train-cpu", "train-fp8-cpu"].contains(name));
    let mut options = vec!["--seconds", UNLIMITED_S];
    options.extend(parts.iter().flat_map(|name| ["--only", name]));
    let (success, lines) = stand_ins.run(&options);
    assert!(!success);
    assert_eq!(names(&lines), parts);
    for line in &lines {
        let part = line["part"].as_str().unwrap();
        let status = line["status"].as_str().unwrap();
        let computes_on_gpu = (part.starts_with("train-") && !part.ends_with("-cpu"))
            || ["two-ranks-", "step", "conformance"]
                .iter()
                .any(|prefix| part.starts_with(prefix));
        if computes_on_gpu {
            let why = line["why"].as_str().unwrap_or_default();
            assert!(status == "fail" && why.contains("libtorch_cuda"), "{line}");
        } else if part.contains("-matches-") || part.contains("-repeats-") {
            assert!(
                status == "skipped" && line["why"].as_str().unwrap().contains("has no metrics")
            );
        }
    }
}

#[test]
fn without_the_programs_it_says_so() {
    let stand_ins = StandIns::new(1);
    std::fs::remove_file(stand_ins.path("pack/moerun")).unwrap();
    let (success, lines) = stand_ins.run(&[]);
    let why = lines[0]["why"].as_str().unwrap();
    assert!(!success && why.contains("scripts/gpu-check build"), "{why}");
}
