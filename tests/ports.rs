//! The ports of ranks and of their store: where they listen, and what strangers can do there.

use crate::{
    fixture::{
        Experiment, curve, finish, finish_child, launcher_output, resident_mib, start,
        start_with_output_file, steps_done, text, wait_for_step,
    },
    machines::{Network, finish_all, start_all},
};
use nix::sched::{CloneFlags, setns};
use std::{
    collections::BTreeSet,
    fs::File,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

/// Returns the addresses at which a process listens.
fn listening(pid: &str) -> BTreeSet<SocketAddr> {
    let sockets = std::fs::read_dir(format!("/proc/{pid}/fd"));
    let sockets = sockets.into_iter().flatten().flatten();
    let own: BTreeSet<String> = sockets
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .collect();
    let mut found = BTreeSet::new();
    for kind in ["tcp", "tcp6"] {
        let table = std::fs::read_to_string(format!("/proc/{pid}/net/{kind}"));
        for line in table.unwrap_or_default().lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let is_listening = words.get(3) == Some(&"0A");
            if is_listening && own.contains(&format!("socket:[{}]", words[9])) {
                found.insert(parse_address(words[1]));
            }
        }
    }
    found
}

/// Parses an address as `/proc/net/tcp` writes it: words of the machine's byte order, then the
/// port.
fn parse_address(text: &str) -> SocketAddr {
    let (ip, port) = text.split_once(':').unwrap();
    let word = |digits: &[u8]| {
        let digits = str::from_utf8(digits).unwrap();
        u32::from_str_radix(digits, 16).unwrap().to_ne_bytes()
    };
    let bytes: Vec<u8> = ip.as_bytes().chunks(8).flat_map(word).collect();
    let ip = match <[u8; 4]>::try_from(&bytes[..]) {
        Ok(bytes) => IpAddr::V4(Ipv4Addr::from(bytes)),
        Err(_) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(&bytes[..]).unwrap())),
    };
    SocketAddr::new(ip, u16::from_str_radix(port, 16).unwrap())
}

/// Returns where all processes of an experiment listen, and asserts that it is this machine only.
fn assert_only_loopback(experiment: &Experiment) -> BTreeSet<SocketAddr> {
    let mut all = BTreeSet::new();
    for pid in experiment.processes() {
        let found = listening(&pid);
        let outside = found.iter().find(|address| !address.ip().is_loopback());
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        assert_eq!(outside, None, "{command}");
        all.extend(found);
    }
    all
}

fn stop(mut launcher: Child) {
    let _ = launcher.kill();
    let _ = launcher.wait();
}

#[test]
fn a_run_on_one_machine_listens_on_loopback_only() {
    let experiment = Experiment::new();
    let mut train = experiment.train(2, &["train.steps=100000", "run.backend=gloo"]);
    // The interface is for runs on several machines.
    let launcher = start(train.env("GLOO_SOCKET_IFNAME", "eth0"));
    wait_for_step(&experiment, "run", 5);
    let found = assert_only_loopback(&experiment);
    // The store, and at least one port of Gloo for each rank.
    assert!(found.len() >= 3, "{found:?}");
    stop(launcher);
}

#[test]
fn commands_on_ranks_listen_on_loopback_only() {
    let experiment = Experiment::new();
    for args in [
        &["bench", "collectives", "--kib", "64", "--rounds", "3"][..],
        &["conformance", "--backend", "gloo"],
        &["doctor", "small.yaml"],
    ] {
        let mut command = experiment.moerun(args);
        let mut child = start(command.env("GLOO_SOCKET_IFNAME", "eth0"));
        let mut seen = BTreeSet::new();
        while child.try_wait().unwrap().is_none() {
            seen.extend(assert_only_loopback(&experiment));
            std::thread::sleep(Duration::from_millis(20));
        }
        let output = finish_child(child);
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        assert!(!seen.is_empty(), "{args:?}");
    }
}

/// Starts two ranks as torchrun's variables describe them, without a launcher.
fn start_ranks(experiment: &Experiment, master: &str, changes: &[&str]) -> Vec<Child> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = port.local_addr().unwrap().port().to_string();
    let rank = |rank: usize| {
        let mut train = experiment.train(1, changes);
        let rank = rank.to_string();
        train.envs([
            ("RANK", rank.as_str()),
            ("LOCAL_RANK", &rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("MASTER_ADDR", master),
            ("MASTER_PORT", &port),
        ]);
        start(&mut train)
    };
    (0..2).map(rank).collect()
}

#[test]
fn a_rank_serves_the_store_at_its_address_only() {
    for master in ["127.0.0.1", "localhost"] {
        let experiment = Experiment::new();
        let changes = ["train.steps=100000", "run.backend=gloo"];
        let ranks = start_ranks(&experiment, master, &changes);
        wait_for_step(&experiment, "run", 2);
        assert!(assert_only_loopback(&experiment).len() >= 3);
        for rank in ranks {
            stop(rank);
        }
    }
}

/// Returns the address of the launcher's store.
fn store_of(launcher: &Child) -> SocketAddr {
    let found = listening(&launcher.id().to_string());
    assert_eq!(found.len(), 1, "{found:?}");
    *found.first().unwrap()
}

/// c10d's first message: its number of validation, and then a query.
fn c10d(query: &[u8]) -> Vec<u8> {
    let mut message = vec![0];
    message.extend(0x3C85_F7CEu32.to_le_bytes());
    message.extend(query);
    message
}

#[test]
fn strangers_at_the_store_neither_learn_nor_change_nor_stop_anything() {
    let experiment = Experiment::new();
    let mut train = experiment.train(2, &["train.steps=100000", "checkpoint.every=50000"]);
    let mut launcher = start_with_output_file(&experiment, &mut train);
    wait_for_step(&experiment, "run", 5);
    let store = store_of(&launcher);
    let before = resident_mib(&launcher);
    // All keys; a value of rank 0 of the next attempts; a large value.
    let mut version = c10d(b"\x01");
    for part in [&b"/moerun/2/version"[..], b"0.0.9"] {
        version.extend((part.len() as u64).to_le_bytes());
        version.extend(part);
    }
    let mut large = c10d(b"\x01\x04\0\0\0\0\0\0\0junk");
    large.extend((7u64 << 20).to_le_bytes());
    large.extend(vec![0; 7 << 20]);
    for message in [c10d(b"\x11"), version, large] {
        let mut stream = TcpStream::connect(store).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let _ = stream.write_all(&message);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.len() <= 48, "{}", String::from_utf8_lossy(&answer));
    }
    let idle: Vec<_> = (0..1000).map(|_| TcpStream::connect(store)).collect();
    send_mutations(store);
    // With all that open, a rank fails and the next ones have to find each other.
    let victim = rank_pids(&experiment).remove(0);
    let killed = Command::new("kill").args(["-KILL", &victim]).status();
    assert!(killed.unwrap().success());
    let failed_at = steps_done(&experiment, "run");
    wait_for_step(&experiment, "run", failed_at + 20);
    assert_eq!(launcher.try_wait().unwrap(), None);
    let said = launcher_output(&experiment);
    assert!(!said.contains("0.0.9"), "{said}");
    let growth = resident_mib(&launcher).saturating_sub(before);
    assert!(growth < 32, "the launcher grew by {growth} MiB");
    drop(idle);
    stop(launcher);
}

/// Sends 500 beginnings of a handshake with one byte changed.
fn send_mutations(store: SocketAddr) {
    for number in 0..500usize {
        let Ok(mut stream) = TcpStream::connect_timeout(&store, Duration::from_secs(5)) else {
            continue;
        };
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let mut hello = [0u8; 40];
        if stream.read_exact(&mut hello).is_err() {
            continue;
        }
        let mut message = [&hello[..], &hello[8..]].concat();
        let place = number % message.len();
        message[place] ^= 1 << (number % 8);
        message.truncate(message.len() - number % 3);
        let _ = stream.write_all(&message);
    }
}

/// Returns the processes that train.
fn rank_pids(experiment: &Experiment) -> Vec<String> {
    let trains = |pid: &String| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd"));
        let mut links = files
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok());
        links.any(|link| link.ends_with("data/train.bin"))
    };
    experiment.processes().into_iter().filter(trains).collect()
}

/// Runs `body` on a thread in a network namespace.
fn in_namespace<T: Send>(name: &str, body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            let namespace = File::open(format!("/var/run/netns/{name}")).unwrap();
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            body()
        });
        inside.join().unwrap()
    })
}

#[test]
fn another_machine_cannot_pose_as_a_rank() {
    let network = Network::new(3);
    let [_, _, stranger, _] = network.namespaces.as_slice() else {
        eprintln!("skipped: needs network namespaces");
        return;
    };
    let experiment = Experiment::new();
    let changes = ["train.steps=100000", "run.backend=gloo"];
    let children = start_all(&network, &experiment, 2, &changes);
    wait_for_step(&experiment, "run", 3);
    let ports: BTreeSet<SocketAddr> = rank_pids(&experiment)
        .iter()
        .flat_map(|pid| listening(pid))
        .collect();
    assert!(ports.len() >= 4, "{ports:?}");
    assert!(
        ports.iter().all(|port| !port.ip().is_unspecified()),
        "{ports:?}"
    );
    let soon = Duration::from_millis(300);
    let answers = |port: &SocketAddr| TcpStream::connect_timeout(port, soon).is_ok();
    let reached = in_namespace(stranger, || {
        ports.iter().filter(|port| answers(port)).count()
    });
    assert_eq!(reached, 0, "of {ports:?}");
    let own = &network.namespaces[0];
    let reached = in_namespace(own, || ports.iter().filter(|port| answers(port)).count());
    assert_eq!(reached, ports.len());
    for child in children {
        stop(child);
    }
}

/// Runs `openssl` in a folder; false if that is not possible.
fn openssl(folder: &Path, args: &str) -> bool {
    let mut command = Command::new("openssl");
    command.args(args.split_whitespace()).current_dir(folder);
    command.output().is_ok_and(|output| output.status.success())
}

/// Makes an authority `NAME-ca.pem`, and a key and certificate `NAME-key.pem` and `NAME-cert.pem`.
fn certify(folder: &Path, name: &str) -> bool {
    let made = openssl(
        folder,
        &format!(
            "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={name} -keyout {name}-cakey.pem \
             -out {name}-ca.pem"
        ),
    ) && openssl(
        folder,
        &format!(
            "req -newkey rsa:2048 -nodes -subj /CN=rank -keyout {name}-key.pem -out {name}.csr"
        ),
    ) && openssl(
        folder,
        &format!(
            "x509 -req -days 2 -in {name}.csr -CA {name}-ca.pem -CAkey {name}-cakey.pem \
             -CAcreateserial -out {name}-cert.pem"
        ),
    );
    let key = folder.join(format!("{name}-key.pem"));
    made && std::fs::set_permissions(key, std::fs::Permissions::from_mode(0o600)).is_ok()
}

fn tls_keys(name: &str) -> String {
    format!("run.tls={{cert: {name}-cert.pem, key: {name}-key.pem, ca: {name}-ca.pem}}")
}

/// Returns a command of a machine on which the files of `own` have the contents of those of
/// `other`, a certificate of another authority.
fn with_files_of(command: &Command, own: &str, other: &str) -> Command {
    let mounts = ["cert", "key", "ca"]
        .map(|part| format!("mount --bind {other}-{part}.pem {own}-{part}.pem && "))
        .concat();
    let mut arguments = command.get_args();
    // `ip netns exec NAMESPACE` gives the machine mounts of its own.
    let namespace: Vec<_> = arguments.by_ref().take(3).collect();
    let mut inside = Command::new(command.get_program());
    inside
        .args(namespace)
        .args(["sh", "-c", &format!("{mounts} exec \"$@\""), "sh"])
        .args(arguments)
        .envs(
            command
                .get_envs()
                .filter_map(|(key, value)| Some((key, value?))),
        );
    if let Some(folder) = command.get_current_dir() {
        inside.current_dir(folder);
    }
    inside
}

#[test]
fn gloo_encrypts_between_machines() {
    let network = Network::new(2);
    let experiment = Experiment::new();
    let folder = experiment.path("");
    if !certify(&folder, "own") || !certify(&folder, "other") {
        eprintln!("skipped: needs openssl");
        return;
    }
    let common = ["train.steps=8", "run.backend=gloo"];
    let run = |name: &str, tls: Option<&str>| {
        let dir = format!("run.dir={name}");
        let mut changes = common.to_vec();
        changes.extend([dir.as_str()].into_iter().chain(tls));
        finish_all(start_all(&network, &experiment, 2, &changes));
    };
    run("clear", None);
    let own = tls_keys("own");
    run("encrypted", Some(&own));
    assert_eq!(curve(&experiment, "clear"), curve(&experiment, "encrypted"));

    if !network.is_isolated() {
        eprintln!("skipped: machines with other files need namespaces");
        return;
    }
    let limits = [
        "run.dir=refused",
        "run.timeout_s=5",
        "restart.max_restarts=0",
        own.as_str(),
    ];
    let changes = [&common[..], &limits[..]].concat();
    let machine = |machine| network.machine(&experiment, machine, 2, &changes);
    let children = [
        start(&mut with_files_of(&machine(1), "own", "other")),
        start(&mut machine(0)),
    ];
    for child in children {
        let output = finish_child(child);
        assert!(!output.status.success(), "{}", text(&output));
    }
    assert_eq!(steps_done(&experiment, "refused"), 0);
}

#[test]
fn files_of_tls_that_cannot_be_used_are_named() {
    let experiment = Experiment::new();
    std::fs::write(experiment.path("text.pem"), "no certificate").unwrap();
    std::fs::write(experiment.path("key.pem"), "-----BEGIN PRIVATE KEY-----").unwrap();
    let tls = "run.tls={cert: missing.pem, key: key.pem, ca: text.pem}";
    let check = ["config", "check", "small.yaml", "-n", "2", "--set", tls];
    let output = finish(&mut experiment.moerun(&check));
    assert!(!output.status.success());
    for expected in [
        "run.tls.cert: missing.pem: cannot open it: No such file",
        "run.tls.key: key.pem: other users may read it: chmod 600 it",
        "run.tls.ca: text.pem: it is not in PEM format",
    ] {
        assert!(
            text(&output).contains(expected),
            "{expected}: {}",
            text(&output)
        );
    }
    let mut nccl = experiment.moerun(&check);
    let output = finish(nccl.args(["--set", "run.backend=nccl"]));
    assert!(
        text(&output).contains("run.tls encrypts Gloo only"),
        "{}",
        text(&output)
    );
}

/// A file that a namespace sees instead of `/etc/hosts`. Dropping this removes it.
struct HostsFile(String);

impl HostsFile {
    fn new(namespace: &str, text: &str) -> HostsFile {
        let folder = format!("/etc/netns/{namespace}");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(format!("{folder}/hosts"), text).unwrap();
        HostsFile(folder)
    }
}

impl Drop for HostsFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_head_node_whose_name_is_a_loopback_address_is_reached() {
    let mut network = Network::new(2);
    let [head, other, _] = network.namespaces.as_slice() else {
        eprintln!("skipped: needs network namespaces");
        return;
    };
    let address = network.rdzv.split(':').next().unwrap();
    let _files = [
        HostsFile::new(head, "127.0.0.1 localhost\n127.0.1.1 headnode\n"),
        HostsFile::new(other, &format!("127.0.0.1 localhost\n{address} headnode\n")),
    ];
    let expected = format!(
        "headnode is 127.0.1.1 on this machine, which no other machine reaches: listening at \
         {address}"
    );
    network.rdzv = "headnode:29400".into();
    let experiment = Experiment::new();
    let outputs = finish_all(start_all(&network, &experiment, 2, &["train.steps=4"]));
    assert!(
        text(&outputs[0]).contains(&expected),
        "{}",
        text(&outputs[0])
    );
    assert_eq!(steps_done(&experiment, "run"), 4);
}

#[test]
fn lines_of_a_hostfile_are_hosts() {
    let experiment = Experiment::new();
    let ssh = experiment.path("ssh");
    std::fs::write(&ssh, "#!/bin/sh\ntouch called\n").unwrap();
    std::fs::set_permissions(&ssh, std::fs::Permissions::from_mode(0o755)).unwrap();
    for line in [
        "-oProxyCommand=touch${IFS}x",
        "-V",
        "me@-oX",
        "a;touch${IFS}x",
        "a\u{7}b",
    ] {
        let hosts = format!("127.0.0.1 slots=1\n{line} slots=1\n");
        std::fs::write(experiment.path("hosts"), hosts).unwrap();
        let began = Instant::now();
        let mut train = experiment.train(1, &["parallel.expert=1"]);
        let output = finish(train.args(["--hostfile", "hosts", "--ssh", "./ssh"]));
        assert!(!output.status.success());
        let said = text(&output);
        assert!(
            said.contains("line 2: ") && said.contains("is no host"),
            "{said}"
        );
        assert!(began.elapsed() < Duration::from_secs(20));
        assert!(!experiment.path("called").exists() && !experiment.path("x").exists());
    }
}
