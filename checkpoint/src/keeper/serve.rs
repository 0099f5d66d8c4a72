//! The process of a keeper: its threads and connections.

use super::{
    connection::PeerPool,
    daemon::{Keeper, PortRefusals},
    decide::{End, Lifetime, RankSession, State},
    handlers,
    identity::Identity,
    protect,
    protocol::{RankReply, RankRequest, Reply, Request},
    rank_handlers,
    sizes::keeper_purpose,
    snapshot::SnapshotId,
};
use crate::secure::{Admitted, Connection, Door, Error, Limits, Purpose, Secret};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::Builder,
    time::{Duration, Instant},
};

/// The time in which a killed keeper must end, whose memory the kernel frees first.
const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(5);

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
/// If an address is in use, or `ready` fails.
pub fn run(
    settings: Settings,
    ready: impl FnOnce(SocketAddr) -> std::io::Result<()>,
) -> Result<(), Error> {
    let (_, no_signals) = channel();
    run_with_signals(settings, no_signals, ready)
}

/// Runs a keeper as [`run`] does. It reports the signals that `signals` yields to its launcher and
/// does not exit while one is connected. Without one it exits 20 s after a signal that asks for it.
///
/// # Errors
/// As [`run`].
pub fn run_with_signals(
    settings: Settings,
    signals: Receiver<i32>,
    ready: impl FnOnce(SocketAddr) -> std::io::Result<()>,
) -> Result<(), Error> {
    let Settings {
        socket,
        secret,
        listen,
        memory_limit,
        orphan_timeout,
    } = settings;
    let peer_listener = TcpListener::bind(listen)
        .map_err(|error| in_use(error, &format!("TCP address {listen}")))?;
    let address = peer_listener.local_addr()?;
    let rank_listener = listen_for_ranks(&socket)?;
    let (to_encode, ids) = channel();
    let lifetime = Lifetime::new(orphan_timeout, Instant::now());
    let state = State::new(Identity::new(&secret)?, memory_limit, lifetime);
    let keeper = Arc::new(Keeper::new(state, PeerPool::new(secret.clone()), to_encode));
    let limits = Limits::default();
    let serving = keeper.clone();
    let peers = move |admitted| serve_peer(&serving, admitted);
    let peers = Door::open(
        peer_listener,
        secret.clone(),
        keeper_purpose(),
        limits,
        peers,
    )?;
    let serving = keeper.clone();
    let ranks = move |admitted| serve_rank(&serving, admitted);
    let ranks = Door::open(rank_listener, secret, Purpose::RANK, limits, ranks)?;
    keeper.set_refusals(PortRefusals {
        peers: peers.refusals().clone(),
        ranks: ranks.refusals().clone(),
    });
    let encoding = keeper.clone();
    let encoder = Builder::new().name("encoders".into());
    encoder.spawn(move || encode_all(&encoding, &ids))?;
    let signalled = keeper.clone();
    Builder::new().spawn(move || forward_signals(&signalled, &signals))?;
    ready(address)?;
    match keeper.wait_for_end() {
        End::Requested => {}
        End::Orphaned => tracing::warn!("no launcher for {orphan_timeout:?}: the keeper exits"),
        End::Signalled(signal) => {
            tracing::warn!("signal {signal}, and no launcher: the keeper exits");
        }
    }
    Ok(())
}

/// Listens at a name that a keeper may still have that was just killed.
fn listen_for_ranks(socket: &str) -> Result<UnixListener, Error> {
    let name = std::os::unix::net::SocketAddr::from_abstract_name(socket)?;
    let deadline = Instant::now() + PREDECESSOR_TIMEOUT;
    loop {
        match UnixListener::bind_addr(&name) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(in_use(error, &format!("Unix socket @{socket}"))),
        }
    }
}

/// Names the address that another process has.
fn in_use(error: std::io::Error, address: &str) -> Error {
    if error.kind() == ErrorKind::AddrInUse {
        let reason = format!("the {address} is in use by another process");
        return Error::Refused(reason);
    }
    Error::Refused(format!("cannot listen at the {address}: {error}"))
}

fn forward_signals(keeper: &Keeper, signals: &Receiver<i32>) {
    for signal in signals {
        keeper.apply(|state| state.signal(signal, Instant::now()));
    }
}

/// Makes the parity of one snapshot after the other. A generation does not wait for an earlier one:
/// a keeper of that may have hung, or its machine may be out of reach.
fn encode_all(keeper: &Arc<Keeper>, ids: &Receiver<SnapshotId>) {
    let mut current: Option<(u64, Sender<SnapshotId>)> = None;
    for id in ids {
        let is_same = |(generation, _): &(u64, _)| *generation == id.generation;
        let sender = match current.take().filter(is_same) {
            Some((_, sender)) => sender,
            None => start_encoder(keeper),
        };
        // Without a thread the launcher abandons the snapshot after a while.
        let _ = sender.send(id);
        current = Some((id.generation, sender));
    }
}

fn start_encoder(keeper: &Arc<Keeper>) -> Sender<SnapshotId> {
    let (sender, ids) = channel();
    let keeper = keeper.clone();
    let encode = move || {
        for id in ids {
            let result = protect::encode(&keeper, id);
            keeper.apply(|state| state.end_encoding(id, result));
        }
    };
    if let Err(error) = Builder::new().name("encoder".into()).spawn(encode) {
        tracing::warn!("cannot start a thread: {error}");
    }
    sender
}

/// Serves a connection of the launcher, another keeper or a tool.
fn serve_peer(keeper: &Keeper, admitted: Admitted<TcpStream>) {
    let mut connection = admitted.connection;
    while let Ok(request) = connection.receive::<Request>(None) {
        let reply = match handlers::handle(keeper, request) {
            Ok(None) => return send_events(keeper, &mut connection),
            Ok(Some(reply)) => reply,
            Err(error) => Reply::Refused(error.to_string()),
        };
        let sent = match connection.send(&reply) {
            // Nothing of the message was sent.
            Err(error @ Error::TooLong { .. }) => {
                connection.send(&Reply::Refused(error.to_string()))
            }
            sent => sent,
        };
        if sent.is_err() {
            return;
        }
    }
}

fn send_events(keeper: &Keeper, connection: &mut Connection<TcpStream>) {
    // Subscribing before the reply makes sure that no event after the reply is missed.
    let events = keeper.subscribe();
    if connection.send(&Reply::Done).is_err() {
        return;
    }
    for event in events {
        if connection.send(&event).is_err() {
            return;
        }
    }
}

/// Serves a connection of a rank.
fn serve_rank(keeper: &Keeper, admitted: Admitted<UnixStream>) {
    let mut connection = admitted.connection;
    let Ok(credentials) = getsockopt(connection.socket(), PeerCredentials) else {
        return;
    };
    let pid = credentials.pid();
    let Ok(RankRequest::Hello {
        rank,
        session: number,
    }) = connection.receive(None)
    else {
        return;
    };
    let session = RankSession { rank, pid, number };
    keeper.apply(|state| state.connect_rank(session, Instant::now()));
    if connection.send(&RankReply::Ack).is_ok() {
        answer_rank(keeper, &mut connection, session);
    }
    keeper.apply(|state| state.disconnect_rank(session));
}

/// Answers the requests of a rank until its connection is closed.
fn answer_rank(keeper: &Keeper, connection: &mut Connection<UnixStream>, session: RankSession) {
    let rank = session.rank;
    while let Ok(request) = connection.receive::<RankRequest>(None) {
        let has_reply = request.has_reply();
        let answer = rank_handlers::handle(keeper, session, request);
        let sent = answer.and_then(|answer| answer.send(connection));
        if let Err(error) = sent {
            tracing::warn!("rank {rank}: {error}");
            if !has_reply {
                continue;
            }
            let reply = RankReply::Refused(error.to_string());
            if connection.send(&reply).is_err() {
                return;
            }
        }
    }
}
