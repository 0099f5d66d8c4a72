//! The port of the launcher for the agents of other machines, under strangers, wrong tokens, idle
//! connections and garbage.

use crate::{
    fixture::{
        Experiment, finish_child, launcher_output, rank_process, resident_mib, signal, start,
        start_with_output_file, steps_done, text, wait_for_output, wait_for_step,
    },
    machines::{Network, finish_all},
};
use checkpoint::secure::{Purpose, Secret, connect_tcp};
use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command},
    time::{Duration, Instant},
};

const ENDLESS: &str = "train.steps=100000";
const SOON: Duration = Duration::from_secs(5);

/// Two machines at the loopback device.
fn two_machines() -> Network {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    Network {
        namespaces: Vec::new(),
        rdzv: free.local_addr().unwrap().to_string(),
    }
}

fn port(network: &Network) -> SocketAddr {
    network.rdzv.parse().unwrap()
}

/// Connects to the launcher as soon as it listens.
fn connect(port: SocketAddr) -> TcpStream {
    let began = Instant::now();
    loop {
        match TcpStream::connect(port) {
            Ok(stream) => return stream,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(20), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a message and returns all that comes back.
fn answer_to(port: SocketAddr, message: &[u8]) -> Vec<u8> {
    let mut stream = connect(port);
    stream.set_read_timeout(Some(2 * SOON)).unwrap();
    let _ = stream.write_all(message);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn head(experiment: &Experiment, network: &Network, changes: &[&str]) -> Child {
    start_with_output_file(experiment, &mut network.machine(experiment, 0, 2, changes))
}

fn secret(experiment: &Experiment) -> Secret {
    let token = std::fs::read_to_string(experiment.path("run/token")).unwrap();
    Secret::from_token(&token).unwrap()
}

/// Case sec-05: a stranger says that it is machine 1 before machine 1 does.
#[test]
fn a_stranger_at_the_agents_port_learns_nothing_and_takes_no_place() {
    let experiment = Experiment::new();
    let network = two_machines();
    let changes = ["train.steps=8"];
    let head = head(&experiment, &network, &changes);
    let hello = json!({"machine": 1, "ranks": 2, "version": "0.1.0", "identity": "x"});
    for message in [format!("{hello}\n"), String::new(), "\0".repeat(72)] {
        let answer = answer_to(port(&network), message.as_bytes());
        // The greeting, and the refusal: no word of the run.
        assert!(answer.len() <= 48, "{}", String::from_utf8_lossy(&answer));
    }
    let agent = start(&mut network.machine(&experiment, 1, 2, &changes));
    finish_all(vec![head, agent]);
    assert_eq!(steps_done(&experiment, "run"), 8);
    let said = launcher_output(&experiment);
    assert!(
        said.contains("refused connections at the agents' port: 3 ("),
        "{said}"
    );
}

#[test]
fn an_agent_with_another_token_waits_and_does_not_disturb() {
    let experiment = Experiment::new();
    let network = two_machines();
    let changes = ["train.steps=8"];
    let head = head(&experiment, &network, &changes);
    connect(port(&network));
    let mut other = network.machine(&experiment, 1, 2, &changes);
    let other = start(other.env("MOERUN_TOKEN", "a token of another run"));
    std::thread::sleep(Duration::from_secs(6));
    let agent = start(&mut network.machine(&experiment, 1, 2, &changes));
    finish_all(vec![head, agent]);
    signal(&other.id().to_string(), "TERM");
    let output = finish_child(other);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(143), "{said}");
    assert!(
        said.contains("the token differs: set MOERUN_TOKEN"),
        "{said}"
    );
}

/// In the other direction: an agent obeys only a launcher that has the token.
#[test]
fn an_agent_does_not_obey_a_stranger_at_the_launchers_address() {
    let experiment = Experiment::new();
    let network = two_machines();
    let changes = ["train.steps=8", "run.dir=run"];
    std::fs::create_dir(experiment.path("run")).unwrap();
    std::fs::write(experiment.path("run/token"), "0123456789abcdef").unwrap();
    let chmod = Command::new("chmod")
        .arg("600")
        .arg(experiment.path("run/token"))
        .status();
    assert!(chmod.unwrap().success());
    let stranger = TcpListener::bind(port(&network)).unwrap();
    let agent = start(&mut network.machine(&experiment, 1, 2, &changes));
    for _ in 0..3 {
        let (mut stream, _) = stranger.accept().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let greeting = [&b"moerun\0\x03"[..], &[7; 32]].concat();
        stream.write_all(&greeting).unwrap();
        let mut proof = [0; 72];
        stream.read_exact(&mut proof).unwrap();
        // The agent's own proof, sent back.
        let echoed = [&b"moerun\0A"[..], &proof[40..]].concat();
        stream.write_all(&echoed).unwrap();
        let order = json!({"StartRanks": {"number": 1, "assignments": []}}).to_string();
        let _ = stream.write_all(order.as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
    }
    drop(stranger);
    let head = head(&experiment, &network, &changes);
    let outputs = finish_all(vec![head, agent]);
    let joined = text(&outputs[1]);
    assert_eq!(joined.matches("joined the launcher").count(), 1, "{joined}");
}

/// Case sec-06: an endless line, and as many idle connections as a process may have files.
#[test]
fn floods_at_the_agents_port_take_neither_memory_nor_descriptors() {
    let experiment = Experiment::new();
    let network = two_machines();
    let changes = [ENDLESS, "checkpoint.every=50"];
    let train = network.machine(&experiment, 0, 2, &changes);
    let mut limited = Command::new("prlimit");
    limited
        .arg("--nofile=1024")
        .arg(train.get_program())
        .args(train.get_args())
        .current_dir(experiment.path(""))
        .env("OMP_NUM_THREADS", "1");
    let head = start_with_output_file(&experiment, &mut limited);
    let agent = start(&mut network.machine(&experiment, 1, 2, &changes));
    wait_for_step(&experiment, "run", 5);
    let before = resident_mib(&head);
    let mut endless = connect(port(&network));
    endless.set_write_timeout(Some(SOON)).unwrap();
    let line = vec![b'x'; 1 << 20];
    let sent = (0..400).take_while(|_| endless.write_all(&line).is_ok());
    assert!(sent.count() < 400, "it reads an endless line");
    let idle: Vec<TcpStream> = (0..1000).map(|_| connect(port(&network))).collect();
    let growth = resident_mib(&head).saturating_sub(before);
    assert!(growth < 32, "the launcher grew by {growth} MiB");
    // With all that open, checkpoints are written and a lost rank comes back.
    signal(&rank_process(&experiment, 3), "KILL");
    wait_for_output(&experiment, "resuming from the snapshot of step", 1);
    let step = steps_done(&experiment, "run");
    wait_for_step(&experiment, "run", step + 100);
    let said = launcher_output(&experiment);
    assert!(!said.contains("Too many open files"), "{said}");
    assert!(!said.contains("no checkpoint at step"), "{said}");
    drop(idle);
    signal(&head.id().to_string(), "TERM");
    for child in [head, agent] {
        assert_eq!(finish_child(child).status.code(), Some(143));
    }
}

/// 500 messages of a peer that has the token: none may make the launcher panic, hang or grow.
#[test]
fn messages_of_an_agent_that_make_no_sense_do_no_harm() {
    let experiment = Experiment::new();
    let network = two_machines();
    let changes = [ENDLESS, "run.timeout_s=60"];
    let mut head = head(&experiment, &network, &changes);
    connect(port(&network));
    let secret = secret(&experiment);
    let before = resident_mib(&head);
    for number in 0..500 {
        let mut connection = connect_tcp(port(&network), &secret, Purpose::AGENT, SOON).unwrap();
        let sent = connection.send(&mutated_hello(number));
        // It may have been refused already.
        if sent.is_ok() && number % 50 == 0 {
            let _ = connection.receive::<Value>(Some(SOON));
        }
    }
    assert!(
        head.try_wait().unwrap().is_none(),
        "{}",
        launcher_output(&experiment)
    );
    let growth = resident_mib(&head).saturating_sub(before);
    assert!(growth < 64, "the launcher grew by {growth} MiB");
    let agent = start(&mut network.machine(&experiment, 1, 2, &changes));
    wait_for_step(&experiment, "run", 5);
    let said = launcher_output(&experiment);
    assert!(
        !said.contains("panicked") && !said.contains("internal error"),
        "{said}"
    );
    signal(&head.id().to_string(), "TERM");
    for child in [head, agent] {
        assert_eq!(finish_child(child).status.code(), Some(143), "{said}");
    }
}

/// Returns an agent's first message with one of its values replaced, or something else.
fn mutated_hello(number: usize) -> Value {
    let mut hello = json!({
        "machine": 1,
        "ranks": 2,
        "version": env!("CARGO_PKG_VERSION"),
        "identity": "x",
        "keepers": [{
            "pid": 1,
            "machine": 1,
            "address": "127.0.0.1:1",
            "socket": "moerun/x",
            "identity": "x",
        }],
    });
    let wrong = [
        json!(null),
        json!(-1),
        json!(0),
        json!(u64::MAX),
        json!(1e300),
        json!("\u{0}\n".repeat(1000)),
        json!([[], {}]),
        json!({"machine": {}}),
    ];
    let value = wrong[number % wrong.len()].clone();
    let names = ["machine", "ranks", "version", "identity", "keepers"];
    match number / wrong.len() % (names.len() + 2) {
        5 => value,
        6 => {
            let entries = vec![hello["keepers"][0].clone(); number];
            hello["version"] = value;
            hello["keepers"] = json!(entries);
            hello
        }
        place => {
            hello[names[place]] = value;
            hello
        }
    }
}
