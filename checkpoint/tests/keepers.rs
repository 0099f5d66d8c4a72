//! Keepers on sockets: snapshots of several nodes, lost nodes, damaged memory, unknown peers.

use checkpoint::{
    ImageHeader, ImageLayout, OwnParts, PartSource, Redundancy, TensorSlice,
    keeper::{
        Error, Event, Fault, FillReporter, Inventory, KeeperClient, Node, PartInfo, Peer, Secret,
        SlotMemory, Snapshot, SnapshotContents, SnapshotId, Topology,
        recover::{Candidate, Rebuild, candidates},
        serve::{Settings, run},
    },
    redundancy_groups,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;
use std::{
    collections::VecDeque,
    fs::File,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        linux::net::SocketAddrExt,
        unix::{fs::FileExt, net::UnixStream},
    },
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tch::Kind;

const CHUNK: usize = 1 << 10;
const TEST_TIMEOUT: Duration = Duration::from_secs(20);

struct Cluster {
    secret: Secret,
    sockets: Vec<String>,
    addresses: Vec<SocketAddr>,
}

impl Cluster {
    fn new(keepers: usize, memory_limit: Option<u64>) -> Cluster {
        let secret = Secret::random().unwrap();
        let mut cluster = Cluster {
            secret: secret.clone(),
            sockets: Vec::new(),
            addresses: Vec::new(),
        };
        for keeper in 0..keepers {
            let socket = format!("moerun-test/{}/{keeper}", &secret.to_hex()[..16]);
            let settings = Settings {
                socket: socket.clone(),
                secret: secret.clone(),
                listen: "127.0.0.1:0".parse().unwrap(),
                memory_limit,
                orphan_timeout: Duration::from_secs(60),
            };
            let (ready, address) = channel();
            std::thread::spawn(move || {
                run(settings, |address| {
                    ready.send(address).unwrap();
                    Ok(())
                })
                .unwrap()
            });
            cluster.sockets.push(socket);
            cluster.addresses.push(address.recv().unwrap());
        }
        cluster
    }

    fn peer(&self, keeper: usize) -> Peer {
        Peer::connect(self.addresses[keeper], &self.secret, TEST_TIMEOUT).unwrap()
    }

    fn topology(&self, nodes: usize, per_node: usize, redundancy: Redundancy) -> Topology {
        let node = |node: usize| Node {
            address: self.addresses[node],
            ranks: (node * per_node..(node + 1) * per_node).collect(),
        };
        Topology {
            generation: 1,
            nodes: (0..nodes).map(node).collect(),
            redundancy,
            groups: redundancy_groups(&vec![0; nodes], redundancy).unwrap(),
            chunk_bytes: CHUNK,
        }
    }

    /// Begins the generation of `topology` on all its nodes.
    fn set_up(&self, topology: &Topology) {
        for node in 0..topology.nodes.len() {
            self.peer(node).set_up(topology, node).unwrap();
        }
    }

    fn events(&self, keepers: usize) -> Receiver<Event> {
        let (sender, events) = channel();
        for keeper in 0..keepers {
            let events = self.peer(keeper).subscribe(1).unwrap();
            let sender = sender.clone();
            std::thread::spawn(move || events.for_each_event(|event| drop(sender.send(event))));
        }
        events
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for &address in &self.addresses {
            let peer = Peer::connect(address, &self.secret, TEST_TIMEOUT);
            let _ = peer.and_then(|mut peer| peer.stop());
        }
    }
}

/// Returns the bytes of a rank's part, whose length and values depend on the rank and the step.
fn bytes_of(rank: usize, step: u64) -> Vec<u8> {
    let len = 3 * CHUNK + rank * 700 + step as usize * 13;
    let mut state = (rank as u64 + 1).wrapping_mul(step + 77);
    let byte = |_| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    let mut bytes: Vec<u8> = (0..len).map(byte).collect();
    // Like an image, the part begins with the length of its header.
    bytes[..8].copy_from_slice(&16u64.to_le_bytes());
    bytes
}

/// An id of the first generation.
fn id(step: u64) -> SnapshotId {
    SnapshotId {
        generation: 1,
        step,
    }
}

struct Rank {
    rank: usize,
    client: KeeperClient,
    reporter: FillReporter,
    slots: Vec<SlotMemory>,
}

impl Rank {
    fn new(cluster: &Cluster, topology: &Topology, rank: usize, slots: usize) -> Rank {
        let socket = &cluster.sockets[topology.node_of(rank).unwrap()];
        let mut client = KeeperClient::connect(socket, &cluster.secret, rank).unwrap();
        let reporter = FillReporter::connect(socket, &cluster.secret, &client).unwrap();
        let slots = client.allocate(1 << 16, slots).unwrap();
        Rank {
            rank,
            client,
            reporter,
            slots,
        }
    }

    /// Takes a snapshot, if a slot is free.
    fn take(&mut self, id: SnapshotId) -> bool {
        self.take_bytes(id, &bytes_of(self.rank, id.step))
    }

    fn take_bytes(&mut self, id: SnapshotId, bytes: &[u8]) -> bool {
        let slot = self.client.reserve(id, bytes.len() as u64, false);
        let Some(slot) = slot.unwrap() else {
            return false;
        };
        for (chunk, part) in bytes.chunks(CHUNK).enumerate() {
            self.slots[slot].copy_in(chunk * CHUNK, part);
            let filled_to = (chunk * CHUNK + part.len()) as u64;
            let crcs = vec![checkpoint::crc32c(part)];
            self.reporter.filled(slot, filled_to, crcs).unwrap();
        }
        true
    }
}

/// Takes snapshot `id` on every rank, waits until it is complete and protected, and commits it.
fn snapshot(
    cluster: &Cluster,
    topology: &Topology,
    ranks: &mut [Rank],
    events: &Receiver<Event>,
    id: SnapshotId,
) -> Snapshot {
    for rank in ranks.iter_mut() {
        assert!(rank.take(id));
    }
    commit(cluster, topology, events, id)
}

/// Waits until snapshot `id` is complete and protected, and commits it.
fn commit(
    cluster: &Cluster,
    topology: &Topology,
    events: &Receiver<Event>,
    id: SnapshotId,
) -> Snapshot {
    let mut parts = Vec::<PartInfo>::new();
    let mut protected = 0;
    let start = Instant::now();
    while parts.len() < topology.ranks() || protected < topology.nodes.len() {
        // Heartbeats arrive at all times, so the timeout below does not suffice.
        assert!(
            start.elapsed() < TEST_TIMEOUT,
            "{} parts, {protected} protected",
            parts.len()
        );
        match events.recv_timeout(TEST_TIMEOUT).unwrap() {
            Event::Complete {
                id: other, part, ..
            } if other == id => parts.push(part),
            Event::Protected { id: other } if other == id => protected += 1,
            Event::Unprotected { reason, .. } => panic!("{reason}"),
            _ => {}
        }
    }
    parts.sort_by_key(|part| part.rank);
    let snapshot = Snapshot::from(SnapshotContents {
        id,
        topology: topology.clone().into(),
        parts,
    });
    for keeper in 0..topology.nodes.len() {
        cluster.peer(keeper).commit(&snapshot).unwrap();
    }
    snapshot
}

/// Rebuilds what lost nodes had on the keepers that are left, and returns the holder of each part.
fn recover(cluster: &Cluster, left: &[usize], found: &Candidate) -> Result<Vec<SocketAddr>, Error> {
    let addresses: Vec<SocketAddr> = left
        .iter()
        .map(|&keeper| cluster.addresses[keeper])
        .collect();
    let mut holders = Vec::new();
    for rank in 0..found.holders.len() {
        let keeper = match found.holders[rank] {
            Some(index) => left[index],
            None => {
                let keeper = left[rank % left.len()];
                let sources = found.sources(rank, &addresses);
                let rebuild = Rebuild {
                    snapshot: found.snapshot.clone(),
                    rank,
                    chunks: None,
                    sources,
                };
                cluster.peer(keeper).rebuild(rebuild)?;
                keeper
            }
        };
        holders.push(cluster.addresses[keeper]);
    }
    for &keeper in left {
        cluster
            .peer(keeper)
            .select_restore(Some(&found.snapshot), &holders)
            .unwrap();
    }
    Ok(holders)
}

fn inventories(cluster: &Cluster, left: &[usize]) -> Vec<Inventory> {
    left.iter()
        .map(|&keeper| cluster.peer(keeper).inventory())
        .map(Result::unwrap)
        .collect()
}

/// Checks that a rank on keeper `keeper` reads every part.
fn assert_restored(cluster: &Cluster, keeper: usize, snapshot: &Snapshot) {
    let socket = &cluster.sockets[keeper];
    let mut client = KeeperClient::connect(socket, &cluster.secret, 1000 + keeper).unwrap();
    for part in &snapshot.parts {
        let expected = bytes_of(part.rank, snapshot.id.step);
        assert_eq!(client.header(part.rank).unwrap(), expected[..24]);
        let mut bytes = vec![0; expected.len()];
        let file = client.open(part.rank).unwrap();
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == expected, "rank {}", part.rank);
    }
}

fn every_pattern(data: usize, parity: usize, redundancy: Redundancy) {
    let nodes = data + parity;
    for pattern in 0u32..1 << nodes {
        let lost = pattern.count_ones() as usize;
        if lost > parity + 1 || lost == nodes {
            continue;
        }
        let cluster = Cluster::new(nodes, None);
        let topology = cluster.topology(nodes, 2, redundancy);
        cluster.set_up(&topology);
        let events = cluster.events(nodes);
        let mut ranks: Vec<Rank> = (0..2 * nodes)
            .map(|rank| Rank::new(&cluster, &topology, rank, 2))
            .collect();
        for step in [4, 5] {
            snapshot(&cluster, &topology, &mut ranks, &events, id(step));
        }
        let left: Vec<usize> = (0..nodes).filter(|node| pattern & 1 << node == 0).collect();
        let found = candidates(&inventories(&cluster, &left));
        if lost > parity {
            assert!(
                found.is_empty(),
                "{lost} of {data} + {parity} nodes are too many"
            );
            continue;
        }
        assert_eq!(found[0].snapshot.id.step, 5);
        recover(&cluster, &left, &found[0]).unwrap();
        assert_restored(&cluster, left[0], &found[0].snapshot);
    }
}

#[test]
fn every_pattern_of_lost_nodes_of_four_and_one() {
    every_pattern(4, 1, Redundancy::Parity { data: 4, parity: 1 });
}

#[test]
fn every_pattern_of_lost_nodes_of_four_and_two() {
    every_pattern(4, 2, Redundancy::Parity { data: 4, parity: 2 });
}

#[test]
fn every_pattern_of_lost_nodes_of_copies() {
    every_pattern(1, 2, Redundancy::Copies(2));
}

/// The third node makes a group of three, in which one parity covers two chunks.
#[test]
fn every_pattern_of_lost_nodes_of_a_copy_and_an_odd_node() {
    every_pattern(2, 1, Redundancy::Copies(1));
}

#[test]
fn a_flipped_bit_is_found_and_fixed_and_two_losses_are_rebuilt_around_it() {
    let cluster = Cluster::new(5, None);
    let topology = cluster.topology(5, 1, Redundancy::Parity { data: 3, parity: 2 });
    cluster.set_up(&topology);
    let events = cluster.events(5);
    let mut ranks: Vec<Rank> = (0..5)
        .map(|rank| Rank::new(&cluster, &topology, rank, 2))
        .collect();
    let id = id(3);
    let snapshot = snapshot(&cluster, &topology, &mut ranks, &events, id);
    let corrupt = |rank: usize| {
        let fault = Fault::Corrupt { rank, at: 2100 };
        cluster.peer(rank).inject(fault).unwrap();
    };
    corrupt(2);
    let bad = cluster.peer(2).verify(id).unwrap().chunks;
    assert_eq!(bad, [(2, 2)]);
    let sources: Vec<Option<SocketAddr>> = cluster.addresses.iter().copied().map(Some).collect();
    let rebuild = |chunks| Rebuild {
        snapshot: snapshot.clone(),
        rank: 2,
        chunks,
        sources: sources.clone(),
    };
    cluster.peer(2).rebuild(rebuild(Some(vec![2]))).unwrap();
    assert!(cluster.peer(2).verify(id).unwrap().chunks.is_empty());
    // A damaged chunk elsewhere in the stripe counts as one more loss.
    corrupt(3);
    let left = [0, 1, 3, 4];
    let found = candidates(&inventories(&cluster, &left));
    let bad = cluster.peer(3).verify(id).unwrap().chunks;
    let mut with_hole = sources.clone();
    with_hole[2] = None;
    let fix = Rebuild {
        chunks: Some(vec![bad[0].1]),
        rank: 3,
        sources: with_hole,
        snapshot: snapshot.clone(),
    };
    cluster.peer(3).rebuild(fix).unwrap();
    recover(&cluster, &left, &found[0]).unwrap();
    assert_restored(&cluster, 0, &snapshot);
    // The keeper that replaces the lost one makes its parity again, so another loss is survived.
    let replacement = left[2 % left.len()];
    let mut sources = found[0].sources(2, &left.map(|keeper| cluster.addresses[keeper]));
    sources[2] = Some(cluster.addresses[replacement]);
    let mut peer = cluster.peer(replacement);
    peer.protect(&snapshot, 2, &sources).unwrap();
}

#[test]
fn a_rank_without_a_free_slot_skips_and_one_that_dies_leaves_nothing_half_written() {
    let cluster = Cluster::new(1, None);
    let topology = cluster.topology(1, 1, Redundancy::None);
    cluster.set_up(&topology);
    let events = cluster.events(1);
    let mut ranks = vec![Rank::new(&cluster, &topology, 0, 2)];
    snapshot(&cluster, &topology, &mut ranks, &events, id(1));
    // The second snapshot is not committed, so the slot of the first is not free.
    assert!(ranks[0].take(id(2)));
    assert!(!ranks[0].take(id(3)));
    assert!(ranks[0].reporter.is_complete(id(2)).unwrap());
    cluster.peer(0).abandon(id(2)).unwrap();
    // A report about an abandoned part does not answer a later question.
    assert!(!ranks[0].reporter.is_complete(id(2)).unwrap());
    ranks[0].reporter.filled(1, 5000, vec![0]).unwrap();
    assert!(ranks[0].reporter.is_complete(id(1)).unwrap());
    assert!(!ranks[0].reporter.is_complete(id(2)).unwrap());
    // The rank dies in the middle of a copy.
    let slot = ranks[0]
        .client
        .reserve(id(4), 5000, false)
        .unwrap()
        .unwrap();
    ranks[0].reporter.filled(slot, 1024, vec![0]).unwrap();
    drop(ranks);
    let start = Instant::now();
    while !cluster.peer(0).status().unwrap().filling.is_empty() {
        assert!(start.elapsed() < TEST_TIMEOUT);
        std::thread::sleep(Duration::from_millis(5));
    }
    let inventories = inventories(&cluster, &[0]);
    let complete: Vec<u64> = inventories[0].parts.iter().map(|(id, _)| id.step).collect();
    assert_eq!(complete, [1]);
    assert_eq!(cluster.peer(0).status().unwrap().skipped, 1);
    assert_eq!(candidates(&inventories)[0].snapshot.id, id(1));
}

/// The parts at a keeper, with the number of files that were opened.
struct KeptParts {
    client: KeeperClient,
    opened: Arc<AtomicUsize>,
}

impl PartSource for KeptParts {
    fn header(&mut self, rank: usize) -> Result<ImageHeader, checkpoint::Error> {
        ImageHeader::read(&self.client.header(rank).unwrap(), Path::new("part"))
    }

    fn open(&mut self, rank: usize) -> Result<File, checkpoint::Error> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        Ok(self.client.open(rank).unwrap())
    }
}

/// A rank asks for its own part and for that of its replica, not for those of all ranks.
#[test]
fn a_restart_in_the_same_layout_reads_parts_of_replicas_only() {
    const NODES: usize = 4;
    const PER_NODE: usize = 2;
    const RANKS: usize = NODES * PER_NODE;
    let cluster = Cluster::new(NODES, None);
    let topology = cluster.topology(NODES, PER_NODE, Redundancy::Copies(1));
    cluster.set_up(&topology);
    let events = cluster.events(NODES);
    // Each rank has one replica. Both hold two tensors, of which each saves one.
    let replica_of = |rank: usize| (rank + RANKS / 2) % RANKS;
    let pair_of = |rank: usize| rank % (RANKS / 2);
    let slice = |rank: usize| TensorSlice::whole(format!("of rank {rank}"), &[1000]);
    let image = |rank: usize| {
        let held = [(slice(rank), Kind::Float)];
        let state = json!({"step": 3});
        let layout = ImageLayout::plan(&held, RANKS, &[replica_of(rank)], &state).unwrap();
        let mut bytes = layout.encode_header(&state).unwrap();
        bytes.extend((0..1000).flat_map(|_| (rank as f32).to_le_bytes()));
        bytes
    };
    let mut ranks = Vec::new();
    for rank in 0..RANKS {
        let mut rank = Rank::new(&cluster, &topology, rank, 2);
        assert!(rank.take_bytes(id(3), &image(rank.rank)));
        // A rank that disconnects has not finished its part.
        ranks.push(rank);
    }
    let snapshot = commit(&cluster, &topology, &events, id(3));
    drop(ranks);
    let nodes = (0..RANKS).map(|rank| topology.node_of(rank).unwrap());
    let holders: Vec<SocketAddr> = nodes.map(|node| cluster.addresses[node]).collect();
    for node in 0..NODES {
        let mut peer = cluster.peer(node);
        peer.select_restore(Some(&snapshot), &holders).unwrap();
    }
    let opened = Arc::new(AtomicUsize::new(0));
    for rank in 0..RANKS {
        let socket = &cluster.sockets[topology.node_of(rank).unwrap()];
        let source = KeptParts {
            client: KeeperClient::connect(socket, &cluster.secret, rank).unwrap(),
            opened: opened.clone(),
        };
        let mut parts = OwnParts::read("snapshot", 3, rank, Box::new(source)).unwrap();
        let pair = pair_of(rank);
        let held = [slice(pair), slice(pair + RANKS / 2)];
        assert!(parts.have_exactly(&held));
        for (slice, saved_by) in held.iter().zip([pair, pair + RANKS / 2]) {
            let values = parts.checkpoint.tensor(slice).unwrap();
            let expected = values.full_like(saved_by as f64);
            assert_eq!(values, expected);
        }
    }
    for node in 0..NODES {
        let status = cluster.peer(node).status().unwrap();
        assert_eq!(status.header_requests, 2 * PER_NODE as u64);
    }
    assert_eq!(opened.load(Ordering::SeqCst), 2 * RANKS);
}

/// A pipe without a reader is a disk that hangs, and training does not wait for it.
#[test]
fn a_disk_that_hangs_slows_no_snapshot() {
    let cluster = Cluster::new(1, None);
    let topology = cluster.topology(1, 1, Redundancy::None);
    cluster.set_up(&topology);
    let events = cluster.events(1);
    let mut ranks = vec![Rank::new(&cluster, &topology, 0, 3)];
    snapshot(&cluster, &topology, &mut ranks, &events, id(1));
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("shard-00000.safetensors");
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    cluster.peer(0).pin(id(1)).unwrap();
    let mut peer = cluster.peer(0);
    let to = folder.path().to_path_buf();
    let writing = std::thread::spawn(move || peer.persist(id(1), &[0], &to));
    for step in 2..30 {
        snapshot(&cluster, &topology, &mut ranks, &events, id(step));
    }
    assert!(!writing.is_finished());
    assert_eq!(cluster.peer(0).status().unwrap().skipped, 0);
    // The part that is written is still there and intact.
    let written = std::fs::read(&pipe).unwrap();
    assert!(written == bytes_of(0, 1));
    // A pipe cannot be synced, which the keeper reports.
    assert!(writing.join().unwrap().is_err());
    cluster.peer(0).unpin().unwrap();
    let last = snapshot(&cluster, &topology, &mut ranks, &events, id(30));
    assert_eq!(last.parts.len(), 1);
}

/// Idle, slow and garbage connections at both ports, until it is dropped.
struct Flood {
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<usize>>,
}

impl Flood {
    fn new(cluster: &Cluster) -> Flood {
        let is_over = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (&address, socket) in cluster.addresses.iter().zip(&cluster.sockets) {
            let over = is_over.clone();
            threads.push(std::thread::spawn(move || {
                flood(&over, || TcpStream::connect(address))
            }));
            let over = is_over.clone();
            let name = std::os::unix::net::SocketAddr::from_abstract_name(socket).unwrap();
            threads.push(std::thread::spawn(move || {
                flood(&over, || UnixStream::connect_addr(&name))
            }));
        }
        Flood { is_over, threads }
    }

    /// Ends the flood and returns the number of its connections.
    fn end(self) -> usize {
        self.is_over.store(true, Ordering::SeqCst);
        let threads = self.threads.into_iter();
        threads.map(|thread| thread.join().unwrap()).sum()
    }
}

/// Holds up to 500 connections, which say nothing, something wrong, or only the first byte.
fn flood<S: Write>(is_over: &AtomicBool, connect: impl Fn() -> std::io::Result<S>) -> usize {
    let mut held: VecDeque<S> = VecDeque::new();
    let mut connections = 0;
    while !is_over.load(Ordering::SeqCst) {
        if let Ok(mut stream) = connect() {
            connections += 1;
            let said: &[u8] = match connections % 3 {
                0 => &[0x47; 100],
                1 => b"m",
                _ => &[],
            };
            let _ = stream.write_all(said);
            held.push_back(stream);
        }
        if held.len() > 500 {
            held.pop_front();
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    connections
}

/// With `MOERUN_FLOOD_S` the flood takes longer than 3 s.
#[test]
fn a_thousand_unknown_peers_delay_no_snapshot() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(20_000), hard).unwrap();
    let seconds = std::env::var("MOERUN_FLOOD_S").map_or(3, |text| text.parse().unwrap());
    let cluster = Cluster::new(2, None);
    let topology = cluster.topology(2, 1, Redundancy::Copies(1));
    cluster.set_up(&topology);
    let events = cluster.events(2);
    let mut ranks: Vec<Rank> = (0..2)
        .map(|rank| Rank::new(&cluster, &topology, rank, 2))
        .collect();
    let flood = Flood::new(&cluster);
    let start = Instant::now();
    let mut step = 0;
    while start.elapsed() < Duration::from_secs(seconds) {
        step += 1;
        snapshot(&cluster, &topology, &mut ranks, &events, id(step));
        // New connections succeed too: of a tool, and of a rank that starts.
        assert_eq!(
            cluster
                .peer(1)
                .inventory()
                .unwrap()
                .complete
                .last()
                .unwrap()
                .id,
            id(step)
        );
        KeeperClient::connect(&cluster.sockets[0], &cluster.secret, 7).unwrap();
    }
    let status = cluster.peer(0).status().unwrap();
    let connections = flood.end();
    assert!(
        step > 5 && connections > 1000,
        "{step} snapshots, {connections} connections"
    );
    assert_eq!(status.skipped, 0);
    let refusals = status.refusals;
    for counts in [refusals.peers, refusals.ranks] {
        assert!(
            counts.malformed > 0 && counts.evicted + counts.closed > 0,
            "{counts:?}"
        );
    }
}

#[test]
fn a_second_launcher_finds_a_keeper_takes_it_over_and_ends_it() {
    let cluster = Cluster::new(1, None);
    let topology = cluster.topology(1, 1, Redundancy::None);
    cluster.set_up(&topology);
    let first = cluster.events(1);
    let mut ranks = vec![Rank::new(&cluster, &topology, 0, 2)];
    snapshot(&cluster, &topology, &mut ranks, &first, id(1));
    // Both launchers receive events.
    let second = cluster.events(1);
    snapshot(&cluster, &topology, &mut ranks, &second, id(2));
    assert!(
        first
            .iter()
            .any(|event| matches!(event, Event::Complete { id: other, .. } if other == id(2)))
    );
    let identity = cluster.peer(0).inventory().unwrap().identity;
    assert_eq!(identity.run, cluster.secret.name());
    assert_eq!(identity.pid, std::process::id() as i32);
    let mut next = topology.clone();
    next.generation = 2;
    cluster.set_up(&next);
    assert_eq!(cluster.peer(0).inventory().unwrap().identity, identity);
    cluster.peer(0).stop().unwrap();
    let start = Instant::now();
    // Its port is closed soon after.
    while Peer::connect(cluster.addresses[0], &cluster.secret, TEST_TIMEOUT).is_ok() {
        assert!(start.elapsed() < TEST_TIMEOUT);
    }
}

#[test]
fn an_address_in_use_is_an_error_that_names_it() {
    let cluster = Cluster::new(1, None);
    let settings = |socket: &str, listen| Settings {
        socket: socket.into(),
        secret: cluster.secret.clone(),
        listen,
        memory_limit: None,
        orphan_timeout: Duration::from_secs(60),
    };
    let socket = &cluster.sockets[0];
    let any = "127.0.0.1:0".parse().unwrap();
    let error = run(settings(socket, any), |_| panic!("it is not ready")).unwrap_err();
    let expected = format!("the Unix socket @{socket} is in use by another process");
    assert_eq!(error.to_string(), expected);
    let address = cluster.addresses[0];
    let error = run(settings("moerun-test/other", address), |_| {
        panic!("it is not ready")
    });
    let expected = format!("the TCP address {address} is in use by another process");
    assert_eq!(error.unwrap_err().to_string(), expected);
}

/// A keeper that is stopped (SIGSTOP) accepts connections and does not answer: it is not lost.
#[test]
fn a_keeper_waits_for_the_name_of_one_that_is_about_to_end() {
    let socket = format!("moerun-test/{}/taken", std::process::id());
    let name = std::os::unix::net::SocketAddr::from_abstract_name(&socket).unwrap();
    let taken = std::os::unix::net::UnixListener::bind_addr(&name).unwrap();
    let settings = Settings {
        socket,
        secret: Secret::random().unwrap(),
        listen: "127.0.0.1:0".parse().unwrap(),
        memory_limit: None,
        orphan_timeout: Duration::from_secs(60),
    };
    let (ready, address) = channel();
    std::thread::spawn(move || {
        run(settings, |address| {
            ready.send(address).unwrap();
            Ok(())
        })
        .unwrap();
    });
    assert!(address.recv_timeout(Duration::from_millis(300)).is_err());
    drop(taken);
    address.recv_timeout(TEST_TIMEOUT).unwrap();
}

#[test]
fn a_keeper_is_lost_only_if_nothing_listens() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let secret = Secret::random().unwrap();
    let timeout = Duration::from_millis(200);
    let error = Peer::connect(address, &secret, timeout).err().unwrap();
    assert!(
        matches!(error, Error::TimedOut) && !error.is_lost(),
        "{error}"
    );
    drop(silent);
    let error = Peer::connect(address, &secret, timeout).err().unwrap();
    assert!(error.is_lost(), "{error}");
}

#[test]
fn a_link_is_not_written_through() {
    let cluster = Cluster::new(1, None);
    let topology = cluster.topology(1, 1, Redundancy::None);
    cluster.set_up(&topology);
    let events = cluster.events(1);
    let mut ranks = vec![Rank::new(&cluster, &topology, 0, 2)];
    snapshot(&cluster, &topology, &mut ranks, &events, id(1));
    let folder = tempfile::tempdir().unwrap();
    let precious = folder.path().join("precious");
    std::fs::write(&precious, "text").unwrap();
    let link = folder.path().join("shard-00000.safetensors");
    std::os::unix::fs::symlink(&precious, link).unwrap();
    let error = cluster.peer(0).persist(id(1), &[0], folder.path());
    assert!(error.unwrap_err().to_string().starts_with("cannot write "));
    assert_eq!(std::fs::read_to_string(precious).unwrap(), "text");
}

#[test]
fn unknown_peers_garbage_and_silence_change_nothing() {
    let cluster = Cluster::new(1, Some(1 << 20));
    let topology = cluster.topology(1, 1, Redundancy::None);
    cluster.set_up(&topology);
    let address = cluster.addresses[0];
    assert!(Peer::connect(address, &Secret::random().unwrap(), TEST_TIMEOUT).is_err());
    let socket = &cluster.sockets[0];
    assert!(KeeperClient::connect(socket, &Secret::random().unwrap(), 0).is_err());
    for garbage in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        vec![0; 72],
    ] {
        let mut stream = TcpStream::connect(address).unwrap();
        let _ = stream.write_all(&garbage);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    // There are more silent connections than a keeper serves before authentication.
    let silent: Vec<TcpStream> = (0..80)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    drop(silent);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(cluster.peer(0).inventory().unwrap().memberships.len(), 1);
    // A refusal for want of memory names the limit.
    let mut client = KeeperClient::connect(socket, &cluster.secret, 0).unwrap();
    let refused = client.allocate(1 << 19, 3).err().unwrap().to_string();
    let expected = "no memory for 3 slots of 0.5 MiB: snapshot.memory_gib leaves 1.0 MiB";
    assert_eq!(refused, expected);
    assert_eq!(client.allocate(1 << 18, 2).unwrap().len(), 2);
}
