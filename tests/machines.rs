//! Runs on several machines: each in a network namespace if this machine allows it, else all on the
//! loopback device.

use crate::fixture::{
    Experiment, curve, finish, finish_child, launcher_output, registered_keepers, signal, start,
    start_with_output_file, steps_done, text, wait_for_output, wait_for_step,
};
use std::{
    os::unix::fs::PermissionsExt,
    process::{Child, Command, Output},
    sync::atomic::{AtomicUsize, Ordering},
};

/// Machines joined by a network. Dropping this removes them.
pub(crate) struct Network {
    /// Empty if the machines are only processes.
    pub(crate) namespaces: Vec<String>,
    pub(crate) rdzv: String,
}

pub(crate) fn ip(args: &str) -> bool {
    Command::new("ip")
        .args(args.split(' '))
        .output()
        .is_ok_and(|output| output.status.success())
}

impl Network {
    pub(crate) fn new(machines: usize) -> Network {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::SeqCst);
        let id = format!("mr{}x{number}", std::process::id());
        let hub = format!("{id}h");
        let names: Vec<String> = (0..machines)
            .map(|machine| format!("{id}n{machine}"))
            .collect();
        // Each links to a namespace that forwards, so nothing is visible outside.
        let mut made = ip(&format!("netns add {hub}"))
            && ip(&format!(
                "netns exec {hub} sysctl -q -w net.ipv4.ip_forward=1"
            ));
        for (machine, name) in names.iter().enumerate() {
            let own = format!("10.77.{number}.{}", 4 * machine + 2);
            let gateway = format!("10.77.{number}.{}", 4 * machine + 1);
            made = made
                && ip(&format!("netns add {name}"))
                && ip(&format!(
                    "-n {name} link add eth type veth peer name m{machine} netns {hub}"
                ))
                && ip(&format!("-n {hub} addr add {gateway}/30 dev m{machine}"))
                && ip(&format!("-n {hub} link set m{machine} up"))
                && ip(&format!("-n {name} addr add {own}/30 dev eth"))
                && ip(&format!("-n {name} link set eth up"))
                && ip(&format!("-n {name} link set lo up"))
                && ip(&format!("-n {name} route add default via {gateway}"));
        }
        let mut network = Network {
            namespaces: names,
            rdzv: format!("10.77.{number}.2:29400"),
        };
        network.namespaces.push(hub);
        if !made {
            eprintln!("no network namespaces here: the machines share the loopback device");
            network.remove();
            let port = std::net::TcpListener::bind("127.0.0.1:0")
                .unwrap()
                .local_addr()
                .unwrap()
                .port();
            network.rdzv = format!("127.0.0.1:{port}");
        }
        network
    }

    /// True if each machine has a namespace of its own.
    pub(crate) fn is_isolated(&self) -> bool {
        !self.namespaces.is_empty()
    }

    /// Returns the command that trains with two ranks on a machine.
    pub(crate) fn machine(
        &self,
        experiment: &Experiment,
        machine: usize,
        machines: usize,
        changes: &[&str],
    ) -> Command {
        self.inside(experiment.train(2, changes), experiment, machine, machines)
    }

    /// Returns `train` as the command of a machine.
    pub(crate) fn inside(
        &self,
        train: Command,
        experiment: &Experiment,
        machine: usize,
        machines: usize,
    ) -> Command {
        self.numbered(train, experiment, machine, machine, machines)
    }

    /// As [`Network::inside`], on the machine with number `place`.
    pub(crate) fn numbered(
        &self,
        mut train: Command,
        experiment: &Experiment,
        place: usize,
        number: usize,
        machines: usize,
    ) -> Command {
        let rank = number.to_string();
        let count = machines.to_string();
        train.args([
            "--nnodes",
            &count,
            "--node-rank",
            &rank,
            "--rdzv",
            &self.rdzv,
        ]);
        let Some(namespace) = self.namespaces.get(place) else {
            return train;
        };
        let mut inside = Command::new("ip");
        inside
            .args(["netns", "exec", namespace])
            .arg(train.get_program())
            .args(train.get_args());
        inside
            .current_dir(experiment.path(""))
            .env("OMP_NUM_THREADS", "1");
        inside
    }

    fn remove(&mut self) {
        for name in self.namespaces.drain(..) {
            ip(&format!("netns del {name}"));
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Keepers outlive their launchers, and cannot be reached from outside a namespace.
        for name in &self.namespaces {
            let inside = Command::new("ip").args(["netns", "pids", name]).output();
            let inside = inside.map_or(String::new(), |output| {
                String::from_utf8_lossy(&output.stdout).into_owned()
            });
            for pid in inside.split_whitespace() {
                let _ = Command::new("kill").args(["-KILL", pid]).status();
            }
        }
        self.remove();
    }
}

/// Starts all machines of a run, the launcher last: agents wait for it.
pub(crate) fn start_all(
    network: &Network,
    experiment: &Experiment,
    machines: usize,
    changes: &[&str],
) -> Vec<Child> {
    let start = |machine| start(&mut network.machine(experiment, machine, machines, changes));
    let mut children: Vec<Child> = (1..machines).map(start).collect();
    children.insert(0, start(0));
    children
}

pub(crate) fn finish_all(children: Vec<Child>) -> Vec<Output> {
    let outputs: Vec<Output> = children.into_iter().map(finish_child).collect();
    let said: Vec<String> = outputs.iter().map(text).collect();
    assert!(
        outputs.iter().all(|output| output.status.success()),
        "{said:#?}"
    );
    outputs
}

/// Returns the processes that an agent has started.
fn children_of(pid: u32) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_child = |child: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        let after = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        after.split_whitespace().nth(1) == Some(&pid.to_string())
    };
    numbers
        .filter(is_child)
        .map(|child| child.to_string())
        .collect()
}

/// Kills an agent and all that it started.
pub(crate) fn kill_machine(agent: &mut Child) {
    // `ip netns exec` becomes the command itself.
    let all = children_of(agent.id());
    agent.kill().unwrap();
    for pid in &all {
        signal(pid, "KILL");
    }
    agent.wait().unwrap();
}

#[test]
fn a_run_on_two_machines_matches_one_machine_bit_for_bit() {
    let experiment = Experiment::new();
    let network = Network::new(2);
    assert!(
        finish(&mut experiment.train(4, &["train.steps=20", "run.dir=ours"]))
            .status
            .success()
    );
    let outputs = finish_all(start_all(
        &network,
        &experiment,
        2,
        &["train.steps=20", "run.dir=theirs"],
    ));
    assert!(
        text(&outputs[1]).contains("machine 1 ("),
        "{}",
        text(&outputs[1])
    );
    assert_eq!(curve(&experiment, "ours"), curve(&experiment, "theirs"));
    experiment.assert_no_orphans();
}

#[test]
fn a_lost_rank_and_a_lost_machine_are_recovered() {
    let experiment = Experiment::new();
    let network = Network::new(2);
    let common = [
        "train.steps=400",
        "checkpoint.every=0",
        "snapshot.every=1",
        "run.timeout_s=30",
    ];
    let alone = finish(
        experiment
            .train(4, &common)
            .args(["--set", "run.dir=alone"]),
    );
    assert!(alone.status.success(), "{}", text(&alone));
    let agent = || start(&mut network.machine(&experiment, 1, 2, &common));
    let mut first = agent();
    let head = start_with_output_file(
        &experiment,
        &mut network.machine(&experiment, 0, 2, &common),
    );
    wait_for_step(&experiment, "run", 10);
    let is_keeper = |pid: &String| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.ends_with(b"keeper\0serve\0"))
    };
    signal(
        &children_of(first.id()).into_iter().find(is_keeper).unwrap(),
        "KILL",
    );
    wait_for_output(&experiment, "the keeper of node 1 is gone", 1);
    let step = steps_done(&experiment, "run");
    wait_for_step(&experiment, "run", step + 30);
    signal(&crate::fixture::rank_process(&experiment, 3), "KILL");
    wait_for_output(&experiment, "resuming from the snapshot of step", 1);
    let step = steps_done(&experiment, "run");
    wait_for_step(&experiment, "run", step + 35);
    // The ranks, the keeper and the agent die; then a scheduler restarts the agent.
    kill_machine(&mut first);
    finish_all(vec![head, agent()]);
    let said = launcher_output(&experiment);
    assert!(
        said.contains("training continues") && said.contains("rank 3 failed: killed by SIGKILL"),
        "{said}"
    );
    assert!(
        said.contains("machine 1 is gone (the connection was closed); lost node 1: ")
            && said.contains("rebuilt from"),
        "{said}"
    );
    assert_eq!(
        said.matches("resuming from the snapshot of step").count(),
        2,
        "{said}"
    );
    assert_eq!(curve(&experiment, "run"), curve(&experiment, "alone"));
}

#[test]
fn a_spare_machine_takes_the_place_of_a_lost_one() {
    let experiment = Experiment::new();
    let network = Network::new(3);
    let common = [
        "train.steps=150",
        "checkpoint.every=0",
        "snapshot.every=1",
        "run.timeout_s=30",
    ];
    assert!(
        finish(
            experiment
                .train(4, &common)
                .args(["--set", "run.dir=alone"])
        )
        .status
        .success()
    );
    let machine = |number| {
        let mut command = network.machine(&experiment, number, 3, &common);
        start(command.args(["--spare-nodes", "1"]))
    };
    let mut run: Vec<Child> = (0..3).map(machine).collect();
    wait_for_step(&experiment, "run", 30);
    kill_machine(&mut run[1]);
    let spare = run.pop().unwrap();
    let outputs = finish_all(vec![run.remove(0), spare]);
    let said = text(&outputs[0]);
    assert!(
        said.contains("lost node 1: 1 spare node took over"),
        "{said}"
    );
    assert_eq!(curve(&experiment, "run"), curve(&experiment, "alone"));
}

#[test]
fn a_signal_to_the_launcher_stops_every_machine_with_a_checkpoint() {
    let experiment = Experiment::new();
    let network = Network::new(2);
    let run = start_all(&network, &experiment, 2, &["train.steps=100000"]);
    wait_for_step(&experiment, "run", 10);
    signal(&run[0].id().to_string(), "TERM");
    for child in run {
        let output = finish_child(child);
        assert_eq!(output.status.code(), Some(143), "{}", text(&output));
    }
    let step = steps_done(&experiment, "run");
    assert!(
        experiment
            .path(&format!("run/checkpoints/step-{step:08}"))
            .exists()
    );
    // A killed launcher takes all ranks with it. Its agents wait for another launcher, which
    // continues from the memory of the keepers.
    let mut run = start_all(&network, &experiment, 2, &["train.steps=100000"]);
    wait_for_step(&experiment, "run", step + 5);
    let mut head = run.remove(0);
    head.kill().unwrap();
    head.wait().unwrap();
    let second = start_with_output_file(
        &experiment,
        &mut network.machine(&experiment, 0, 2, &["train.steps=100000"]),
    );
    wait_for_output(&experiment, "found keepers of an earlier launcher", 1);
    let step = steps_done(&experiment, "run");
    wait_for_step(&experiment, "run", step + 5);
    signal(&second.id().to_string(), "TERM");
    for child in [vec![second], run].into_iter().flatten() {
        let output = finish_child(child);
        assert_eq!(output.status.code(), Some(143), "{}", text(&output));
    }
}

#[test]
fn a_hostfile_starts_the_other_machines() {
    let experiment = Experiment::new();
    assert!(
        finish(&mut experiment.train(4, &["train.steps=6", "run.dir=ours"]))
            .status
            .success()
    );
    std::fs::write(
        experiment.path("hosts"),
        "127.0.0.1 slots=2\nelsewhere slots=2\n",
    )
    .unwrap();
    // Stands in for ssh: takes the host's name, then a command for its shell.
    let ssh = experiment.path("ssh");
    std::fs::write(
        &ssh,
        "#!/bin/sh\necho \"to $1 $2\" >> asked\ncd / && exec sh -c \"$3\"\n",
    )
    .unwrap();
    std::fs::set_permissions(&ssh, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut train = experiment.train(1, &["train.steps=6", "run.dir=theirs"]);
    let output = finish(train.args(["--hostfile", "hosts", "--ssh"]).arg(&ssh));
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(
        std::fs::read_to_string(experiment.path("asked")).unwrap(),
        "to -- elsewhere\n"
    );
    assert_eq!(curve(&experiment, "ours"), curve(&experiment, "theirs"));
    experiment.assert_no_orphans();
}

#[test]
fn wrong_machines_are_refused() {
    let experiment = Experiment::new();
    let network = Network {
        namespaces: Vec::new(),
        rdzv: Network::new(0).rdzv.replace("10.77.", "127.77."),
    };
    let refused = |command: &mut Command, expected: &str| {
        let output = finish(command);
        assert!(
            !output.status.success() && text(&output).contains(expected),
            "{expected}: {}",
            text(&output)
        );
    };
    refused(
        experiment.train(2, &[]).args(["--nnodes", "2"]),
        "--nnodes 2 needs --rdzv HOST:PORT",
    );
    refused(
        &mut network.machine(&experiment, 3, 2, &[]),
        "--node-rank 3 is not below --nnodes 2",
    );
    refused(
        experiment
            .train(2, &[])
            .args(["--nnodes", "2", "--rdzv", "nowhere"]),
        "it must have the form HOST:PORT",
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let rdzv = taken.local_addr().unwrap().to_string();
    refused(
        experiment
            .train(2, &[])
            .args(["--nnodes", "2", "--rdzv", &rdzv]),
        "cannot listen at 127.0.0.1:",
    );
    refused(
        &mut network.machine(&experiment, 0, 2, &["run.timeout_s=1"]),
        "machines 1 did not join within 1s",
    );
    // While a launcher waits: a wrong number of ranks, a node rank out of range, a taken one.
    let endless = ["train.steps=100000", "restart.heartbeat_timeout_s=1.5"];
    let mut head = start(&mut network.machine(&experiment, 0, 2, &endless));
    let mut other = experiment.train(3, &[]);
    refused(
        other.args(["--nnodes", "2", "--node-rank", "1", "--rdzv", &network.rdzv]),
        "it was started with -n 3, and the launcher with -n 2",
    );
    refused(
        &mut network.machine(&experiment, 2, 3, &[]),
        "--node-rank 2 is not between 1 and 1",
    );
    let mut first = start(&mut network.machine(&experiment, 1, 2, &endless));
    registered_keepers(&experiment, 2);
    refused(
        &mut network.machine(&experiment, 1, 2, &endless),
        "--node-rank 1 has already joined",
    );
    head.kill().unwrap();
    head.wait().unwrap();
    // An agent waits for another launcher, unless it is stopped.
    signal(&first.id().to_string(), "TERM");
    assert_eq!(first.wait().unwrap().code(), Some(143));
}
