//! A run under connections that know no secret, signals to keepers, and limits of control groups.

use crate::fixture::{
    COMMAND_TIMEOUT, Experiment, finish, finish_child, launcher_output, rank_process,
    registered_keepers, signal, start_with_output_file, steps_done, text, wait_for_step,
};
use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Connects, as another user where it may, in a loop until its standard input is closed. Each
/// connection stays open and sends a byte now and then (`hold`), or is closed at once (`churn`).
const ATTACKER: &str = r#"
import os, select, socket, sys, time
mode, targets = sys.argv[1], sys.argv[2:]
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
def connect(target):
    if target[0] == '@':
        s = socket.socket(socket.AF_UNIX); s.connect('\0' + target[1:])
    else:
        s = socket.socket(); s.settimeout(5); s.connect(('127.0.0.1', int(target)))
    s.setblocking(False)
    return s
held, tries = [], 0
while not select.select([sys.stdin], [], [], 0)[0]:
    for target in targets:
        tries += 1
        try: held.append(connect(target))
        except OSError: pass
    if mode == 'churn':
        for s in held: s.close()
        held = []
    elif len(held) > 200 * len(targets) or tries % 100 == 0:
        alive = []
        for s in held[-200 * len(targets):]:
            try: s.send(b'm'); alive.append(s)
            except OSError: s.close()
        held = alive; time.sleep(.05)
print(tries)
"#;

struct Attack(Child);

impl Attack {
    fn start(mode: &str, targets: &[String]) -> Attack {
        let mut command = Command::new("python3");
        command.args(["-c", ATTACKER, mode]).args(targets);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Attack(command.spawn().expect("python3 is needed"))
    }

    /// Ends the attack and returns the number of its connections.
    fn end(mut self) -> u64 {
        drop(self.0.stdin.take());
        let output = self.0.wait_with_output().unwrap();
        String::from_utf8_lossy(&output.stdout)
            .trim()
            .parse()
            .unwrap()
    }
}

fn ports(experiment: &Experiment) -> Vec<String> {
    let mut ports = Vec::new();
    for keeper in registered_keepers(experiment, 1) {
        let address = keeper["address"].as_str().unwrap();
        ports.push(address.rsplit_once(':').unwrap().1.to_string());
    }
    ports
}

fn checkpoints(experiment: &Experiment) -> usize {
    std::fs::read_dir(experiment.path("run/checkpoints")).map_or(0, |entries| entries.count())
}

fn snapshot_status(experiment: &Experiment) -> String {
    text(&finish(
        &mut experiment.moerun(&["snapshot", "status", "run"]),
    ))
}

/// Waits until `is_done` returns true.
fn wait_until(what: &str, is_done: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_done() {
        assert!(start.elapsed() < COMMAND_TIMEOUT, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn stop(experiment: &Experiment, launcher: Child) {
    signal(&launcher.id().to_string(), "TERM");
    finish_child(launcher);
    finish(&mut experiment.moerun(&["keeper", "stop", "run"]));
}

/// Case sec-03: connections without the secret take all places of two keepers.
#[test]
fn full_keepers_still_write_checkpoints_and_restore_ranks() {
    let experiment = Experiment::new();
    let changes = [
        "train.steps=1000000",
        "checkpoint.every=40",
        "checkpoint.keep=3",
        "parallel.ranks_per_node=1",
    ];
    let mut train = experiment.train(2, &changes);
    let launcher = start_with_output_file(&experiment, &mut train);
    wait_for_step(&experiment, "run", 45);
    let attack = Attack::start("hold", &ports(&experiment));
    std::thread::sleep(Duration::from_secs(2));
    // Checkpoints are written meanwhile.
    let step = steps_done(&experiment, "run");
    wait_for_step(&experiment, "run", step + 90);
    assert!(checkpoints(&experiment) >= 2);
    let said = launcher_output(&experiment);
    assert!(!said.contains("no checkpoint"), "{said}");
    // A killed rank resumes from memory.
    signal(&rank_process(&experiment, 0), "KILL");
    let resumed = || launcher_output(&experiment).contains("snapshot of step");
    wait_until("no snapshot was restored", resumed);
    let step = steps_done(&experiment, "run");
    wait_for_step(&experiment, "run", step + 20);
    let said = launcher_output(&experiment);
    assert!(
        !said.contains("beginning again") && !said.contains("is of no use"),
        "{said}"
    );
    let status = snapshot_status(&experiment);
    assert!(
        status.contains("refused connections at the TCP socket"),
        "{status}"
    );
    assert!(attack.end() > 200);
    stop(&experiment, launcher);
}

/// Case sec-10: another user connects to the ranks' socket, thousands of times a second.
#[test]
fn refused_connections_are_counted_and_do_not_fill_the_log() {
    let experiment = Experiment::new();
    let mut train = experiment.train(2, &["train.steps=1000000"]);
    let launcher = start_with_output_file(&experiment, &mut train);
    wait_for_step(&experiment, "run", 20);
    let mut targets = ports(&experiment);
    let socket = registered_keepers(&experiment, 1)[0]["socket"]
        .as_str()
        .unwrap()
        .to_string();
    targets.push(format!("@{socket}"));
    let attack = Attack::start("churn", &targets);
    std::thread::sleep(Duration::from_secs(3));
    let attempts = attack.end();
    assert!(attempts > 500, "{attempts} connections");
    let log = std::fs::read_to_string(experiment.path("run/logs/keeper-0.log")).unwrap();
    // One line per port and minute.
    assert!(log.len() < 2000 && log.lines().count() <= 4, "{log}");
    let status = snapshot_status(&experiment);
    assert!(
        status.contains("refused connections at the TCP socket"),
        "{status}"
    );
    assert!(
        status.contains("refused connections at the Unix socket"),
        "{status}"
    );
    stop(&experiment, launcher);
}

/// A keeper that a test starts, as the launcher does.
struct Keeper {
    process: Child,
}

impl Keeper {
    fn start(experiment: &Experiment) -> Keeper {
        let mut command = experiment.moerun(&["keeper", "serve"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let settings = serde_json::json!({
            "socket": format!("moerun-test/{}", std::process::id()),
            "secret": "5a".repeat(32),
            "listen": "127.0.0.1:0",
            "memory": null,
            "orphan_timeout_s": 3600,
        });
        let mut stdin = process.stdin.take().unwrap();
        writeln!(stdin, "{settings}").unwrap();
        let mut ready = String::new();
        let stdout = process.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut ready).unwrap();
        assert!(ready.contains("address"), "{ready}");
        Keeper { process }
    }

    fn signal(&self, name: &str) {
        signal(&self.process.id().to_string(), name);
    }

    fn lives(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }
}

#[test]
fn a_keeper_without_a_launcher_outlives_a_signal_by_20_s() {
    let experiment = Experiment::without_data();
    let mut keeper = Keeper::start(&experiment);
    for name in ["INT", "HUP", "USR1"] {
        keeper.signal(name);
    }
    std::thread::sleep(Duration::from_secs(1));
    keeper.signal("TERM");
    let start = Instant::now();
    std::thread::sleep(Duration::from_secs(15));
    assert!(keeper.lives());
    while keeper.lives() {
        assert!(
            start.elapsed() < Duration::from_secs(40),
            "it does not exit"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(
        start.elapsed() > Duration::from_secs(19),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn signals_to_keepers_do_not_disturb_a_run() {
    let experiment = Experiment::new();
    let mut train = experiment.train(2, &["train.steps=1000000"]);
    let launcher = start_with_output_file(&experiment, &mut train);
    wait_for_step(&experiment, "run", 10);
    let pid = registered_keepers(&experiment, 1)[0]["pid"].to_string();
    for name in ["INT", "HUP"] {
        signal(&pid, name);
    }
    let step = steps_done(&experiment, "run");
    wait_for_step(&experiment, "run", step + 30);
    assert_eq!(
        registered_keepers(&experiment, 1)[0]["pid"].to_string(),
        pid
    );
    assert!(std::fs::metadata(format!("/proc/{pid}")).is_ok());
    stop(&experiment, launcher);
}

/// Case fault-20: the limit of a control group, at its own level and above it.
#[test]
fn keepers_see_the_limits_of_control_groups() {
    let root = std::path::Path::new("/sys/fs/cgroup/memory");
    let group = root.join(format!("moerun-test-{}", std::process::id()));
    let inner = group.join("inner");
    let limit = group.join("memory.limit_in_bytes");
    let made = std::fs::create_dir_all(&inner).and_then(|()| std::fs::write(&limit, "1363148800"));
    if made.is_err() {
        let _ = std::fs::remove_dir(&inner);
        let _ = std::fs::remove_dir(&group);
        eprintln!("skipped: this machine does not let a test limit memory");
        return;
    }
    for (folder, every) in [
        (&group, "snapshot.every=auto"),
        (&inner, "snapshot.every=1"),
    ] {
        let experiment = Experiment::new();
        let procs = folder.join("cgroup.procs");
        let shell = format!("echo $$ > {} && exec \"$@\"", procs.display());
        // The ranks take 1030 MB. Half of the rest is too little for snapshots.
        let changes = [
            "train.steps=6",
            "train.global_batch=4",
            "model.hidden=384",
            "model.moe.ffn=768",
            "model.moe.experts=16",
            "restart.standby=false",
            "checkpoint.every=0",
            every,
        ];
        let train = experiment.train(2, &changes);
        let mut command = Command::new("sh");
        command.args(["-c", &shell, "sh"]);
        command.arg(train.get_program()).args(train.get_args());
        command.current_dir(experiment.path(""));
        command.env("OMP_NUM_THREADS", "1");
        let output = finish(&mut command);
        let said = text(&output);
        assert!(output.status.success(), "{said}");
        assert!(said.contains("half of the machine's free memory"), "{said}");
    }
    for folder in [&inner, &group] {
        let _ = std::fs::remove_dir(folder);
    }
}
