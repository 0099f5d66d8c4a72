//! `moerun doctor` with real faults of the machine, one at a time.

use crate::fixture::{Experiment, finish, text};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

fn doctor(experiment: &Experiment, args: &[&str]) -> Command {
    let mut command = experiment.moerun(&["doctor"]);
    command.args(args);
    command
}

/// Asserts that the command fails and prints each of `expected`.
fn assert_fault(command: &mut Command, expected: &[&str]) {
    let output = finish(command);
    let printed = text(&output);
    assert!(!output.status.success(), "{printed}");
    for expected in expected {
        assert!(
            printed.contains(expected),
            "{expected:?} is not in {printed}"
        );
    }
}

/// Returns a copy of the program in which the name of a library is changed to one that is missing.
fn without(experiment: &Experiment, library: &str) -> PathBuf {
    let own = Path::new(env!("CARGO_BIN_EXE_moerun"));
    let copy = experiment.path("moerun");
    std::fs::copy(own, &copy).unwrap();
    let core = own.with_file_name("moerun-core");
    let mut bytes = std::fs::read(&core).unwrap();
    let name = format!("{library}.so");
    let offsets: Vec<usize> = (0..bytes.len() - name.len())
        .filter(|&offset| bytes[offset..].starts_with(name.as_bytes()))
        .collect();
    assert!(!offsets.is_empty(), "{library} is not needed");
    for offset in offsets {
        bytes[offset + library.len() + 1] = b'_';
    }
    std::fs::copy(&core, experiment.path("moerun-core")).unwrap();
    std::fs::write(experiment.path("moerun-core"), bytes).unwrap();
    copy
}

#[test]
fn without_problems_it_says_so_and_measures_collectives() {
    let experiment = Experiment::new();
    let output = finish(&mut doctor(&experiment, &["small.yaml", "-n", "2"]));
    let printed = text(&output);
    assert!(output.status.success(), "{printed}");
    for expected in [
        "libtorch: /",
        "ranks: 2 of version",
        "clocks: at most",
        "all_reduce: 64 KiB in",
        "all_to_all: ",
        "GB/s",
        "no problems found",
    ] {
        assert!(
            printed.contains(expected),
            "{expected:?} is not in {printed}"
        );
    }
}

#[test]
fn missing_libraries_are_named() {
    let experiment = Experiment::new();
    let broken = |library| {
        let mut command = Command::new(without(&experiment, library));
        command.arg("doctor");
        command
    };
    assert_fault(
        &mut broken("libtorch_cpu"),
        &[
            "fail libtorch_cpu._o cannot be found",
            "fix: run ./scripts/setup",
        ],
    );
    #[cfg(feature = "mpi")]
    assert_fault(
        &mut broken("libmpi"),
        &["fail libmpi._o", "./scripts/setup --mpi"],
    );
    std::fs::remove_file(experiment.path("moerun-core")).unwrap();
    assert_fault(
        Command::new(experiment.path("moerun")).arg("doctor"),
        &["moerun-core is missing"],
    );
}

#[test]
fn missing_mpi_is_named() {
    let experiment = Experiment::new();
    let mut command = doctor(&experiment, &["small.yaml", "--set", "run.backend=mpi"]);
    let expected = if cfg!(feature = "mpi") {
        "no mpirun in PATH"
    } else {
        "built without it"
    };
    assert_fault(
        command.env("MOERUN_MPIRUN", "/nowhere/mpirun"),
        &["fail MPI: ", expected, "fix: ", "scripts/setup --mpi"],
    );
}

#[test]
fn a_port_in_use_is_named() {
    let experiment = Experiment::new();
    let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let expected = [
        &format!("fail port: {port} cannot be used"),
        "choose another --master-port",
        "1 problem found",
    ];
    assert_fault(
        &mut doctor(&experiment, &["--master-port", &port]),
        &expected,
    );
}

#[test]
fn a_full_dev_shm_is_a_warning_to_those_who_use_it() {
    let experiment = Experiment::new();
    // A separate mount namespace, in which /dev/shm is full.
    let script = "mount -t tmpfs -o size=1m tmpfs /dev/shm && (dd if=/dev/zero of=/dev/shm/full \
                  bs=1k || true) && exec \"$@\"";
    let moerun = experiment.moerun(&[]);
    let doctor = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(["-m", "sh", "-c", script, "sh"])
            .arg(moerun.get_program())
            .args(moerun.get_args())
            .arg("doctor")
            .args(args)
            .current_dir(experiment.path(""));
        finish(&mut command)
    };
    if !Command::new("unshare")
        .args(["-m", "true"])
        .status()
        .is_ok_and(|status| status.success())
    {
        eprintln!("skipped: this machine does not allow mounts");
        return;
    }
    // Nothing of moerun lies there.
    let output = doctor(&[]);
    let printed = text(&output);
    let detail = "ok   shared memory: 0 MiB are free in /dev/shm; only MPI and NCCL use it";
    assert!(
        output.status.success() && printed.contains(detail),
        "{printed}"
    );
    // This fails later on a machine without a GPU.
    let printed = text(&doctor(&["small.yaml", "--set", "run.device=cuda"]));
    for expected in [
        "warn shared memory: 0 MiB are free in /dev/shm",
        "mount -o remount,size=",
        "--shm-size",
    ] {
        assert!(printed.contains(expected), "{printed}");
    }
}

#[test]
fn ranks_of_other_versions_are_named() {
    let experiment = Experiment::new();
    // The store entry that rank 0 of another version would write.
    let soon = std::time::Duration::from_secs(20);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let store = torch_ext::Store::serve_tcp(listener, soon).unwrap();
    store.set("moerun/0/version", b"0.0.9").unwrap();
    let mut command = doctor(&experiment, &[]);
    for (name, value) in [
        ("RANK", "1"),
        ("LOCAL_RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
    ] {
        command.env(name, value);
    }
    command
        .env("MASTER_PORT", store.port().unwrap().to_string())
        .env("TORCHELASTIC_USE_AGENT_STORE", "True");
    let expected = [
        "rank 0 runs moerun 0.0.9 and rank 1 runs",
        "install the same version on every machine",
    ];
    assert_fault(&mut command, &expected);
}

#[test]
fn a_run_folder_that_cannot_be_written_is_named() {
    let experiment = Experiment::new();
    let mut command = doctor(&experiment, &["small.yaml", "--set", "run.dir=/proc/none"]);
    assert_fault(
        &mut command,
        &[
            "fail disk: /proc/none cannot be written",
            "choose another run.dir",
        ],
    );
}

#[test]
fn ranks_of_several_machines_are_not_started_on_one() {
    let experiment = Experiment::new();
    let output = finish(&mut doctor(&experiment, &["small.yaml", "-n", "4096"]));
    let printed = text(&output);
    for expected in [
        "warn ranks: 4096 ranks are more than this machine's",
        "none was started, and only this machine was examined",
        "open files: ",
    ] {
        assert!(printed.contains(expected), "{printed}");
    }
    assert!(!printed.contains("all_reduce"), "{printed}");
}

/// Returns a command whose processes may open this many files.
fn with_open_files(command: &Command, limit: u64) -> Command {
    let mut limited = Command::new("sh");
    limited
        .args(["-c", &format!("ulimit -n {limit} && exec \"$@\""), "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    limited.current_dir(command.get_current_dir().unwrap());
    limited
}

#[test]
fn a_limit_of_open_files_that_is_too_low_is_named_at_once() {
    let experiment = Experiment::new();
    let changes = ["train.global_batch=64", "train.micro_batch=1"];
    let limited = |ranks| with_open_files(&experiment.train(ranks, &changes), 100);
    assert_fault(
        &mut limited(64),
        &[
            "needs up to ",
            " open files, and the limit is 100",
            "hint: run 'ulimit -n ",
            "LimitNOFILE",
        ],
    );
    experiment.assert_no_orphans();
    let doctor = doctor(&experiment, &["small.yaml", "-n", "64"]);
    assert_fault(
        &mut with_open_files(&doctor, 100),
        &[
            "fail open files: ",
            "and the limit is 100",
            "fix: run 'ulimit -n ",
        ],
    );
    // The soft limit is raised to the hard one.
    let command = experiment.train(2, &["train.steps=2"]);
    let mut soft = Command::new("sh");
    soft.args(["-c", "ulimit -S -n 20 && exec \"$@\"", "sh"])
        .arg(command.get_program())
        .args(command.get_args())
        .current_dir(experiment.path(""));
    let output = finish(&mut soft);
    assert!(output.status.success(), "{}", text(&output));
}
