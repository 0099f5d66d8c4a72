//! Faults of runs on several machines: stops of every process, lost and silent machines, machines
//! in another order, and containers that end with their first process.

use crate::{
    fixture::{
        Experiment, curve, finish, finish_child, launcher_output, rank_process, signal, start,
        start_with_output_file, steps_done, text, wait_for_output, wait_for_step,
    },
    machines::{Network, finish_all, ip, kill_machine, start_all},
};
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    process::{Child, Command},
    time::{Duration, Instant},
};

/// A run that only a signal ends.
const ENDLESS: [&str; 3] = [
    "train.steps=100000",
    "checkpoint.every=0",
    "snapshot.every=1",
];

fn checkpoint(experiment: &Experiment, step: u64) -> PathBuf {
    experiment.path(&format!("run/checkpoints/step-{step:08}/manifest.json"))
}

fn newest_checkpoint(experiment: &Experiment) -> Option<u64> {
    let folder = std::fs::read_dir(experiment.path("run/checkpoints")).ok()?;
    let names = folder.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let steps = names.filter_map(|name| name.strip_prefix("step-")?.parse().ok());
    steps.max()
}

/// Asserts that all processes of a run were stopped by SIGTERM, and that a checkpoint of its last
/// step exists.
fn assert_stopped(experiment: &Experiment, run: Vec<Child>) {
    for child in run {
        let output = finish_child(child);
        assert_eq!(output.status.code(), Some(143), "{}", text(&output));
    }
    let step = steps_done(experiment, "run");
    assert!(checkpoint(experiment, step).exists(), "of step {step}");
    experiment.assert_no_orphans();
}

/// Case fault-07: what srun sends to every task, and systemd to a control group.
#[test]
fn a_signal_to_every_process_stops_all_machines_with_a_checkpoint() {
    let experiment = Experiment::new();
    let network = Network::new(2);
    let run = start_all(&network, &experiment, 2, &ENDLESS);
    wait_for_step(&experiment, "run", 10);
    for pid in experiment.processes() {
        signal(&pid, "TERM");
    }
    assert_stopped(&experiment, run);
}

#[test]
fn a_signal_to_an_agent_or_a_rank_of_it_stops_all_machines_with_a_checkpoint() {
    for stops_rank in [false, true] {
        let experiment = Experiment::new();
        let network = Network::new(2);
        let run = start_all(&network, &experiment, 2, &ENDLESS);
        wait_for_step(&experiment, "run", 10);
        let pid = if stops_rank {
            rank_process(&experiment, 3)
        } else {
            run[1].id().to_string()
        };
        signal(&pid, "TERM");
        assert_stopped(&experiment, run);
    }
}

/// Case fault-08: a machine is lost, with its keeper or without, and does not come back.
#[test]
fn a_run_that_gives_a_lost_machine_up_leaves_a_checkpoint() {
    for keeper_stays in [false, true] {
        let experiment = Experiment::new();
        let network = Network::new(2);
        let changes = [&ENDLESS[..], &["run.timeout_s=5"]].concat();
        let mut run = start_all(&network, &experiment, 2, &changes);
        wait_for_step(&experiment, "run", 20);
        let mut agent = run.pop().unwrap();
        if keeper_stays {
            agent.kill().unwrap();
            agent.wait().unwrap();
        } else {
            kill_machine(&mut agent);
        }
        let step = steps_done(&experiment, "run");
        let output = finish_child(run.pop().unwrap());
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("machines 1 did not join within 5s"), "{said}");
        // Steps after the last complete snapshot are lost.
        let newest = newest_checkpoint(&experiment);
        assert!(newest.is_some_and(|newest| newest <= step), "{said}");
    }
}

#[test]
fn a_stop_while_a_lost_machine_is_waited_for_leaves_a_checkpoint() {
    let experiment = Experiment::new();
    let network = Network::new(2);
    let mut agent = start(&mut network.machine(&experiment, 1, 2, &ENDLESS));
    let mut command = network.machine(&experiment, 0, 2, &ENDLESS);
    let head = start_with_output_file(&experiment, &mut command);
    wait_for_step(&experiment, "run", 20);
    kill_machine(&mut agent);
    wait_for_output(&experiment, "waiting for machines 1", 1);
    signal(&head.id().to_string(), "TERM");
    let output = finish_child(head);
    let said = launcher_output(&experiment);
    assert_eq!(output.status.code(), Some(143), "{said}");
    assert!(newest_checkpoint(&experiment).is_some(), "{said}");
}

/// Case fault-14: the hosts of an earlier launch are off.
#[test]
fn keepers_of_hosts_that_are_off_are_waited_for_all_at_once() {
    let network = Network::new(1);
    let [own, hub] = network.namespaces.as_slice() else {
        eprintln!("skipped: needs network namespaces");
        return;
    };
    // Packets to these addresses disappear, as to hosts that are off.
    assert!(ip(&format!("-n {hub} route add blackhole 198.18.0.0/24")));
    let experiment = Experiment::new();
    let changes = ["train.steps=10", "checkpoint.every=5"];
    assert!(finish(&mut experiment.train(2, &changes)).status.success());
    let secret = "5".repeat(64);
    let keeper = |number: usize| {
        json!({
            "pid": 2,
            "machine": number,
            "address": format!("198.18.0.{}:4000", number + 1),
            "socket": format!("moerun/gone/{number}"),
            "identity": "another machine",
        })
    };
    let keepers: Vec<Value> = (0..4).map(keeper).collect();
    let registry = json!({
        "secret": secret,
        "generation": 1,
        "skipped_batches": {},
        "keepers": keepers,
        "spares": 0,
    });
    let path = experiment.path("run/keepers.json");
    std::fs::write(&path, registry.to_string()).unwrap();
    let mut chmod = Command::new("chmod");
    assert!(chmod.arg("600").arg(&path).status().unwrap().success());
    let train = experiment.train(2, &["train.steps=12", "checkpoint.every=5"]);
    let mut inside = Command::new("ip");
    inside
        .args(["netns", "exec", own])
        .arg(train.get_program())
        .args(train.get_args())
        .current_dir(experiment.path(""))
        .env("OMP_NUM_THREADS", "1");
    let began = Instant::now();
    let output = finish(&mut inside);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    let all = "198.18.0.1:4000, 198.18.0.2:4000, 198.18.0.3:4000, 198.18.0.4:4000";
    for part in [
        format!("waiting for keepers of an earlier launch at {all}"),
        format!("the keepers of an earlier launch at {all} are gone"),
        "resuming from the checkpoint of step 10".into(),
    ] {
        assert!(said.contains(&part), "{part}: {said}");
    }
    // One after the other they would take 20 s.
    assert!(began.elapsed() < Duration::from_secs(15), "{said}");
}

/// Case fault-16: the lines of a hostfile changed places.
#[test]
fn machines_in_another_order_keep_what_is_in_their_memory() {
    let experiment = Experiment::new();
    let network = Network::new(3);
    if !network.is_isolated() {
        eprintln!("skipped: needs network namespaces");
        return;
    }
    let changes = [
        "train.steps=120",
        "train.global_batch=12",
        "train.micro_batch=1",
        "checkpoint.every=0",
        "snapshot.every=1",
    ];
    let alone = [&changes[..], &["run.dir=alone"]].concat();
    finish_all(start_all(&network, &experiment, 3, &alone));
    let run = start_all(&network, &experiment, 3, &changes);
    wait_for_step(&experiment, "run", 30);
    for mut child in run {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    experiment.assert_only_keepers();
    let machine = |place: usize, number: usize| {
        network.numbered(experiment.train(2, &changes), &experiment, place, number, 3)
    };
    let mut run = vec![start(&mut machine(0, 0))];
    run.push(start(&mut machine(1, 2)));
    run.push(start(&mut machine(2, 1)));
    let outputs = finish_all(run);
    let said = text(&outputs[0]);
    for part in [
        "found keepers of an earlier launcher",
        "resuming from the snapshot of step",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains("lost node"), "{said}");
    assert_eq!(curve(&experiment, "run"), curve(&experiment, "alone"));
}

/// Case fault-18: power or cable, so that no connection is closed.
#[test]
fn a_silent_machine_is_replaced_after_the_heartbeat_timeout() {
    let experiment = Experiment::new();
    let network = Network::new(3);
    let Some(hub) = network.namespaces.get(3) else {
        eprintln!("skipped: needs network namespaces");
        return;
    };
    let changes = [
        "train.steps=150",
        "checkpoint.every=0",
        "snapshot.every=1",
        "run.timeout_s=120",
        "run.backend=gloo",
        "restart.heartbeat_timeout_s=3",
    ];
    let alone = [&changes[..], &["run.dir=alone"]].concat();
    assert!(finish(&mut experiment.train(4, &alone)).status.success());
    let machine = |number| {
        let mut command = network.machine(&experiment, number, 3, &changes);
        command.args(["--spare-nodes", "1"]);
        command
    };
    let mut silent = start(&mut machine(1));
    let spare = start(&mut machine(2));
    let head = start_with_output_file(&experiment, &mut machine(0));
    wait_for_step(&experiment, "run", 30);
    assert!(ip(&format!("-n {hub} link set m1 down")));
    // The machine comes back only after the run's end.
    let outputs = finish_all(vec![head, spare]);
    let said = launcher_output(&experiment);
    for part in [
        "machine 1 is gone (no sign of life for 3 s)",
        "lost node 1: 1 spare node took over",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains("the keeper of node 1 is gone"), "{said}");
    assert_eq!(outputs.len(), 2);
    assert_eq!(curve(&experiment, "run"), curve(&experiment, "alone"));
    kill_machine(&mut silent);
}

/// Case fault-28: a container ends with its first process.
#[test]
fn in_containers_a_killed_launcher_costs_its_own_machine_alone() {
    let experiment = Experiment::new();
    let network = Network::new(2);
    if !network.is_isolated() {
        eprintln!("skipped: needs network namespaces");
        return;
    }
    let changes = ["train.steps=150", "checkpoint.every=0", "snapshot.every=1"];
    let alone = [&changes[..], &["run.dir=alone"]].concat();
    let container = |number, changes: &[&str]| {
        let command = network.machine(&experiment, number, 2, changes);
        let mut arguments: Vec<_> = command.get_args().map(|part| part.to_owned()).collect();
        // After `netns exec NAMESPACE`.
        let unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
        arguments.splice(3..3, unshare.map(Into::into));
        let mut inside = Command::new(command.get_program());
        inside
            .args(arguments)
            .current_dir(experiment.path(""))
            .env("OMP_NUM_THREADS", "1");
        inside
    };
    let agent = start(&mut container(1, &alone));
    finish_all(vec![start(&mut container(0, &alone)), agent]);
    let agent = start(&mut container(1, &changes));
    let mut head = start(&mut container(0, &changes));
    wait_for_step(&experiment, "run", 30);
    head.kill().unwrap();
    head.wait().unwrap();
    let second = start_with_output_file(&experiment, &mut container(0, &changes));
    finish_all(vec![second, agent]);
    let said = launcher_output(&experiment);
    assert!(
        said.contains("resuming from the snapshot of step") && said.contains("rebuilt from"),
        "{said}"
    );
    assert_eq!(curve(&experiment, "run"), curve(&experiment, "alone"));
}

/// Case fault-24: the file changes for the next experiment, is half-edited, and is removed.
#[test]
fn an_edited_configuration_has_no_effect_on_a_run() {
    let experiment = Experiment::new();
    let network = Network::new(2);
    let changes = ["train.steps=300", "checkpoint.every=0", "snapshot.every=1"];
    let alone = [&changes[..], &["run.dir=alone"]].concat();
    assert!(finish(&mut experiment.train(4, &alone)).status.success());
    let agent = start(&mut network.machine(&experiment, 1, 2, &changes));
    let mut command = network.machine(&experiment, 0, 2, &changes);
    let head = start_with_output_file(&experiment, &mut command);
    wait_for_step(&experiment, "run", 10);
    let path = experiment.path("small.yaml");
    let original = std::fs::read_to_string(&path).unwrap();
    let edits = [
        Some(original.replace("lr: 3e-3", "lr: 1e-3")),
        Some(original.replace("hidden: 32", "hidden: 64")),
        Some("model: {hidden".into()),
        None,
    ];
    for (number, edit) in edits.into_iter().enumerate() {
        match edit {
            Some(text) => std::fs::write(&path, text).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        signal(&rank_process(&experiment, number), "KILL");
        wait_for_output(
            &experiment,
            "resuming from the snapshot of step",
            number + 1,
        );
        let step = steps_done(&experiment, "run");
        wait_for_step(&experiment, "run", step + 20);
    }
    finish_all(vec![head, agent]);
    assert_eq!(curve(&experiment, "run"), curve(&experiment, "alone"));
    experiment.assert_no_orphans();
}
