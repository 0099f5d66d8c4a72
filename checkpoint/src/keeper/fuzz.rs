//! Changed messages at both ports of a keeper: no panic, no hang, and memory within its limit.

use super::{
    digest::ChecksumDigest,
    fault::Fault,
    protocol::{RankRequest, Reply, Request},
    recover::Rebuild,
    serve::{Settings, run},
    snapshot::{PartInfo, Snapshot, SnapshotContents, SnapshotId},
    topology::{Node, Topology},
};
use crate::{
    checksum::crc32c,
    secure::{Connection, Purpose, Secret, Socket, connect_local, connect_tcp},
    stripes::Redundancy,
};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    net::SocketAddr,
    panic::{set_hook, take_hook},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::channel,
    },
    time::{Duration, Instant},
};

const FRAMES_PER_PORT: usize = 500;
const LIMIT: u64 = 32 << 20;
/// Most growth of this process, of which other tests are a part.
const MAX_GROWTH: u64 = 1 << 30;
const TIMEOUT: Duration = Duration::from_secs(20);
/// A request may wait for a part that never arrives; the test does not.
const REPLY_TIMEOUT: Duration = Duration::from_millis(50);

/// Pseudorandom numbers, the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % bound
    }

    /// Changes, inserts, removes or repeats some bytes.
    fn change(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(3) {
            let at = self.below(bytes.len().max(1));
            // 251 to 254 announce longer numbers in bincode.
            let byte = [0, 1, 127, 250, 251, 252, 253, 255, self.below(256) as u8][self.below(9)];
            match self.below(5) {
                _ if bytes.is_empty() => bytes.push(byte),
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = byte,
                2 => bytes.insert(at, byte),
                3 => bytes.truncate(at),
                _ => bytes.extend_from_within(at..),
            }
        }
    }
}

fn topology() -> Topology {
    let node = |node: usize| Node {
        // Nothing listens at these ports.
        address: SocketAddr::from(([127, 0, 0, 1], 1 + node as u16)),
        ranks: vec![2 * node, 2 * node + 1],
    };
    Topology {
        generation: 1,
        nodes: vec![node(0), node(1)],
        redundancy: Redundancy::Parity { data: 1, parity: 1 },
        groups: vec![vec![0, 1]],
        chunk_bytes: 1024,
    }
}

fn snapshot(step: u64) -> Snapshot {
    let part = |rank: usize| PartInfo {
        rank,
        bytes: 3000,
        digest: ChecksumDigest::of(&[1, 2, 3]),
    };
    Snapshot::from(SnapshotContents {
        id: SnapshotId {
            generation: 1,
            step,
        },
        topology: topology().into(),
        parts: (0..4).map(part).collect(),
    })
}

fn requests() -> Vec<Request> {
    let snapshot = snapshot(1);
    let id = snapshot.id;
    let rank = 1;
    let sources = vec![None, Some(topology().nodes[1].address)];
    let rebuild = Rebuild {
        snapshot: snapshot.clone(),
        rank,
        chunks: Some(vec![0, 2]),
        sources: sources.clone(),
    };
    vec![
        Request::Setup {
            topology: topology(),
            node: 0,
        },
        Request::Inventory,
        Request::Status,
        Request::Commit(snapshot.clone()),
        Request::Abandon(id),
        Request::SelectRestore {
            snapshot: Some(snapshot.clone()),
            holders: vec![topology().nodes[1].address; 4],
        },
        Request::Verify(id),
        Request::Length { id, rank },
        Request::Chunk { id, rank, chunk: 1 },
        Request::Checksums {
            id,
            rank,
            waits: true,
        },
        Request::Header { id, rank },
        Request::Parity {
            id,
            local: 0,
            stripe: 1,
        },
        Request::PutParity {
            id,
            local: 0,
            stripe: 1,
            bytes: vec![9; 1024],
        },
        Request::Rebuild(Box::new(rebuild)),
        Request::Protect {
            snapshot,
            node: 0,
            sources,
        },
        Request::Pin(id),
        Request::Unpin,
        Request::Inject(Fault::Poison { rank }),
        Request::Inject(Fault::Corrupt { rank, at: 5 }),
    ]
}

fn rank_requests() -> Vec<RankRequest> {
    let id = snapshot(2).id;
    vec![
        RankRequest::Hello {
            rank: 0,
            session: 1,
        },
        RankRequest::Allocate {
            bytes: 3000,
            slots: 2,
        },
        RankRequest::Reserve {
            id,
            bytes: 3000,
            durable: true,
        },
        RankRequest::Release { slot: 0 },
        RankRequest::Filled {
            slot: 0,
            filled_to: 1024,
            crcs: vec![1],
        },
        RankRequest::Heartbeat {
            step: 3,
            progress: 9,
        },
        RankRequest::IsComplete { id },
        RankRequest::Header { rank: 0 },
        RankRequest::Open { rank: 1 },
    ]
}

fn encode(message: &impl Serialize) -> Vec<u8> {
    bincode::serde::encode_to_vec(message, bincode::config::standard()).unwrap()
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Option<T> {
    let config = bincode::config::standard().with_limit::<{ 1 << 24 }>();
    let decoded = bincode::serde::decode_from_slice(body, config);
    decoded.ok().map(|(message, _)| message)
}

/// True if the keeper may carry it out in this process: it ends nothing, writes no file, and
/// connects to this machine only.
fn is_harmless(body: &[u8]) -> bool {
    let is_here = |address: &SocketAddr| address.ip().is_loopback();
    match decode::<Request>(body) {
        Some(Request::Stop | Request::Persist { .. }) => false,
        Some(Request::Inject(fault)) => {
            matches!(fault, Fault::Poison { .. } | Fault::Corrupt { .. })
        }
        Some(Request::SelectRestore { holders, .. }) => holders.iter().all(is_here),
        Some(Request::Rebuild(rebuild)) => rebuild.sources.iter().flatten().all(is_here),
        Some(Request::Protect { sources, .. }) => sources.iter().flatten().all(is_here),
        Some(Request::Setup { topology, .. }) => {
            topology.nodes.iter().all(|node| is_here(&node.address))
        }
        Some(Request::Commit(snapshot)) => {
            let nodes = &snapshot.topology.nodes;
            nodes.iter().all(|node| is_here(&node.address))
        }
        _ => true,
    }
}

/// Returns a frame with a right checksum, or one of which the head is changed too.
fn frame(body: &[u8], random: &mut Random) -> Vec<u8> {
    let len = body.len() as u32;
    let mut frame = [len.to_le_bytes(), crc32c(body).to_le_bytes()].concat();
    if random.below(10) == 0 {
        let at = random.below(frame.len());
        frame[at] ^= 1 << random.below(8);
    }
    frame.extend(body);
    frame
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 4096
}

struct Fuzzed {
    secret: Secret,
    socket: String,
    address: SocketAddr,
}

impl Fuzzed {
    fn start() -> Fuzzed {
        let secret = Secret::random().unwrap();
        let socket = format!("moerun-test/fuzz/{}", secret.name());
        let settings = Settings {
            socket: socket.clone(),
            secret: secret.clone(),
            listen: "127.0.0.1:0".parse().unwrap(),
            memory_limit: Some(LIMIT),
            orphan_timeout: Duration::from_secs(600),
        };
        let (ready, address) = channel();
        std::thread::spawn(move || {
            run(settings, |address| {
                ready.send(address).unwrap();
                Ok(())
            })
        });
        Fuzzed {
            secret,
            socket,
            address: address.recv().unwrap(),
        }
    }

    fn peer(&self) -> Connection<std::net::TcpStream> {
        connect_tcp(self.address, &self.secret, Purpose::KEEPER, TIMEOUT).unwrap()
    }

    /// Checks that the keeper answers, within its limit.
    fn check(&self) {
        let mut peer = self.peer();
        peer.send(&Request::Status).unwrap();
        let start = Instant::now();
        match peer.receive(Some(TIMEOUT)).unwrap() {
            Reply::Status(status) => {
                assert!(status.slot_bytes + status.parity_bytes <= LIMIT);
            }
            other => panic!("{other:?}"),
        }
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    fn set_up(&self) {
        let mut peer = self.peer();
        for request in &requests()[..1] {
            peer.send(request).unwrap();
            assert!(matches!(peer.receive(Some(TIMEOUT)), Ok(Reply::Done)));
        }
    }

    /// Sends a frame and waits a moment for a reply. Returns true if the connection can be used.
    fn send<S: Socket>(connection: &mut Connection<S>, frame: &[u8]) -> bool {
        let written = connection.socket().write_some(frame);
        let mut reply = [0; 4096];
        let _ = connection.reader.limit_reads(REPLY_TIMEOUT);
        let received = connection.socket().read_some(&mut reply);
        written.is_ok() && received.is_ok_and(|len| len > 0)
    }
}

#[test]
fn changed_frames_neither_stop_nor_fill_a_keeper() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let others: Arc<dyn Fn(&std::panic::PanicHookInfo<'_>) + Send + Sync> = take_hook().into();
    set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("");
        let is_keeper = ["keeper", "rank", "encoder"].contains(&name) || name.ends_with(" door");
        PANICS.fetch_add(usize::from(is_keeper), Ordering::SeqCst);
        others(info);
    }));
    let keeper = Fuzzed::start();
    let before = resident_bytes();
    let mut random = Random(1);
    let messages: Vec<Vec<u8>> = requests().iter().map(encode).collect();
    let mut peer = keeper.peer();
    let mut sent = 0;
    while sent < FRAMES_PER_PORT {
        let mut body = messages[random.below(messages.len())].clone();
        random.change(&mut body);
        if !is_harmless(&body) {
            continue;
        }
        sent += 1;
        if !Fuzzed::send(&mut peer, &frame(&body, &mut random)) {
            peer = keeper.peer();
        }
        if sent % 50 == 0 {
            keeper.check();
            keeper.set_up();
        }
    }
    let connect = || connect_local(&keeper.socket, &keeper.secret, Purpose::RANK, TIMEOUT).unwrap();
    let messages: Vec<Vec<u8>> = rank_requests().iter().map(encode).collect();
    let mut rank = connect();
    for number in 0..FRAMES_PER_PORT {
        let mut body = messages[random.below(messages.len())].clone();
        random.change(&mut body);
        if !Fuzzed::send(&mut rank, &frame(&body, &mut random)) {
            rank = connect();
            let hello = frame(&messages[0], &mut Random(0));
            Fuzzed::send(&mut rank, &hello);
        }
        if number % 50 == 0 {
            keeper.check();
        }
    }
    keeper.check();
    let growth = resident_bytes().saturating_sub(before);
    assert!(growth < MAX_GROWTH, "{growth} bytes");
    assert_eq!(PANICS.load(Ordering::SeqCst), 0);
    let mut peer = keeper.peer();
    peer.send(&Request::Stop).unwrap();
}
