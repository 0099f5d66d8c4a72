//! The process of a keeper: its threads and connections.

use super::connection::PeerPool;
use super::daemon::Keeper;
use super::error::Error;
use super::protocol::{RankReply, RankRequest, Reply, Request};
use super::report::Event;
use super::snapshot::SnapshotId;
use super::wire::{self, PEER_TIMEOUT, Secret, TimeoutStream};
use super::{handlers, protect, rank_handlers};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Uid;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Interval at which the launcher receives the state of the ranks.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(100);
/// Number of connections that may be open before their peers are authenticated.
const MAX_UNAUTHENTICATED: usize = 64;
/// A pause after a failed accept, for instance for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// The settings of a keeper.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The name of the Unix socket for ranks. It is in the abstract namespace, so that no file is
    /// left on disk.
    pub socket: String,
    /// The secret of the run.
    pub secret: Secret,
    /// The address for the launcher and other keepers. Port 0 selects a free port.
    pub listen: SocketAddr,
    /// The most memory for slots and parity, in bytes. The default is half of the free memory.
    pub memory_limit: Option<u64>,
    /// The time after which a keeper without a launcher exits.
    pub orphan_timeout: Duration,
}

/// Runs a keeper until it is stopped, or has no launcher for too long. `ready` is called with the
/// address at which it listens.
///
/// # Errors
/// If an address is in use.
pub fn run(settings: Settings, ready: impl FnOnce(SocketAddr)) -> Result<(), Error> {
    let listener = TcpListener::bind(settings.listen)?;
    let socket = std::os::unix::net::SocketAddr::from_abstract_name(&settings.socket)?;
    let rank_listener = UnixListener::bind_addr(&socket)?;
    let (to_encode, ids) = channel();
    let peers = PeerPool::new(settings.secret.clone());
    let keeper = Arc::new(Keeper::new(peers, settings.memory_limit, to_encode));
    ready(listener.local_addr()?);
    std::thread::spawn({
        let keeper = keeper.clone();
        let secret = settings.secret.clone();
        move || accept_peers(&keeper, &listener, &secret)
    });
    std::thread::spawn({
        let keeper = keeper.clone();
        let secret = settings.secret;
        move || accept_ranks(&keeper, &rank_listener, &secret)
    });
    std::thread::spawn({
        let keeper = keeper.clone();
        move || encode_all(&keeper, &ids)
    });
    send_heartbeats(&keeper, settings.orphan_timeout);
    Ok(())
}

/// Sends heartbeats until the keeper is stopped, or has no launcher for too long.
fn send_heartbeats(keeper: &Keeper, orphan_timeout: Duration) {
    let mut last_subscribed = Instant::now();
    let mut last_heartbeat = Instant::now();
    loop {
        let mut state = keeper.lock();
        if state.is_stopping() {
            return;
        }
        if last_heartbeat.elapsed() >= HEARTBEAT_INTERVAL {
            last_heartbeat = Instant::now();
            let ranks = state.ranks.statuses(last_heartbeat);
            state.broadcast(&Event::Heartbeat { ranks });
        }
        if state.has_subscribers() {
            last_subscribed = Instant::now();
        } else if last_subscribed.elapsed() > orphan_timeout {
            tracing::warn!("no launcher for {orphan_timeout:?}: the keeper exits");
            return;
        }
        // Any change wakes this thread too, of which stopping is one.
        keeper.wait(&mut state, HEARTBEAT_INTERVAL);
    }
}

/// Makes the parity of one snapshot after the other.
fn encode_all(keeper: &Keeper, ids: &Receiver<SnapshotId>) {
    for id in ids {
        let event = match protect::encode(keeper, id) {
            Ok(()) => {
                keeper.lock().mark_protected(id);
                Event::Protected { id }
            }
            Err(error) => Event::Unprotected {
                id,
                reason: error.to_string(),
            },
        };
        keeper.lock().broadcast(&event);
    }
}

fn accept_peers(keeper: &Arc<Keeper>, listener: &TcpListener, secret: &Secret) {
    let unauthenticated = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            std::thread::sleep(ACCEPT_PAUSE);
            continue;
        };
        if unauthenticated.fetch_add(1, Ordering::SeqCst) >= MAX_UNAUTHENTICATED {
            unauthenticated.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let keeper = keeper.clone();
        let secret = secret.clone();
        let unauthenticated = unauthenticated.clone();
        std::thread::spawn(move || {
            let mut stream = stream;
            let _ = stream.set_nodelay(true);
            let handshake = wire::server_handshake(&mut stream, &secret);
            unauthenticated.fetch_sub(1, Ordering::SeqCst);
            match handshake {
                Ok(()) => serve_peer(&keeper, stream),
                Err(error) => {
                    let address = stream.peer_addr().ok();
                    tracing::warn!("refused a connection from {address:?}: {error}");
                }
            }
        });
    }
}

/// Serves a connection of the launcher, another keeper or a tool.
fn serve_peer(keeper: &Keeper, mut stream: TcpStream) {
    if stream.set_timeouts(None, Some(PEER_TIMEOUT)).is_err() {
        return;
    }
    while let Ok(request) = wire::receive::<Request>(&mut stream) {
        if matches!(request, Request::Subscribe) {
            return send_events(keeper, stream);
        }
        let reply = handlers::handle(keeper, request)
            .unwrap_or_else(|error| Reply::Refused(error.to_string()));
        if wire::send(&mut stream, &reply).is_err() {
            return;
        }
    }
}

fn send_events(keeper: &Keeper, mut stream: TcpStream) {
    let (sender, events) = channel();
    // Subscribing before the reply makes sure that no event after the reply is missed.
    keeper.lock().subscribe(sender);
    if wire::send(&mut stream, &Reply::Done).is_err() {
        return;
    }
    for event in events {
        if wire::send(&mut stream, &event).is_err() {
            return;
        }
    }
}

fn accept_ranks(keeper: &Arc<Keeper>, listener: &UnixListener, secret: &Secret) {
    for stream in listener.incoming().flatten() {
        let keeper = keeper.clone();
        let secret = secret.clone();
        std::thread::spawn(move || {
            let mut stream = stream;
            match authenticate_rank(&mut stream, &secret) {
                Ok(pid) => serve_rank(&keeper, stream, pid),
                Err(error) => tracing::warn!("refused a local connection: {error}"),
            }
        });
    }
}

/// Checks that a local process has the keeper's user and secret, and returns its process id.
fn authenticate_rank(stream: &mut UnixStream, secret: &Secret) -> Result<i32, Error> {
    let peer = getsockopt(stream, PeerCredentials)?;
    if peer.uid() != Uid::effective().as_raw() {
        return Err(Error::Unauthenticated);
    }
    wire::server_handshake(stream, secret)?;
    Ok(peer.pid())
}

/// Serves a connection of a rank.
fn serve_rank(keeper: &Keeper, mut stream: UnixStream, pid: i32) {
    if stream.set_timeouts(None, Some(PEER_TIMEOUT)).is_err() {
        return;
    }
    let Ok(RankRequest::Hello { rank }) = wire::receive(&mut stream) else {
        return;
    };
    keeper.lock().ranks.connect(rank, pid, Instant::now());
    if wire::send(&mut stream, &RankReply::Ack).is_ok() {
        answer_rank(keeper, &mut stream, rank);
    }
    keeper.lock().disconnect_rank(rank, pid);
}

/// Answers the requests of a rank until its connection is closed.
fn answer_rank(keeper: &Keeper, stream: &mut UnixStream, rank: usize) {
    while let Ok(request) = wire::receive::<RankRequest>(stream) {
        let answer = rank_handlers::handle(keeper, rank, request);
        let sent = answer.and_then(|answer| answer.send(stream));
        if let Err(error) = sent {
            tracing::warn!("rank {rank}: {error}");
            let reply = RankReply::Refused(error.to_string());
            if wire::send(stream, &reply).is_err() {
                return;
            }
        }
    }
}
