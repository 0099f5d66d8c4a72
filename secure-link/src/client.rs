//! The side of a connection that opens it.

use super::{
    error::Error,
    frame::Connection,
    proof::{
        ACCEPTED, BUSY, DENIED, HELLO_LEN, MAGIC, MAGIC_LEN, NONCE_LEN, Session, Side, is_proof,
    },
    purpose::Purpose,
    secret::{self, Secret},
    socket::{Armed, DeadlineReader, DeadlineWriter, Socket},
};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt::SendTimeout,
};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::{fd::AsRawFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

/// Pauses after a server turned this client away.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
/// Limit of one handshake, connecting included.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects to a port with this purpose, and authenticates both sides, within `timeout`. A client
/// that a limit turns away tries again until then.
///
/// # Errors
/// [`Error::Connection`] if nothing listens at `address`, [`Error::Busy`] if the server turned this
/// client away until the end, [`Error::Closed`] if it closed every connection, [`Error::TimedOut`]
/// if it does not answer, [`Error::Unauthenticated`] if it does not know the secret, and
/// [`Error::Protocol`] if it is no moerun of this version.
pub fn connect_tcp(
    address: SocketAddr,
    secret: &Secret,
    purpose: Purpose,
    timeout: Duration,
) -> Result<Connection<TcpStream>, Error> {
    retry(timeout, |deadline| {
        let left = time_left(deadline)?;
        let socket = TcpStream::connect_timeout(&address, left)?;
        authenticate(socket, secret, purpose, deadline)
    })
}

/// Connects to a Unix socket in the abstract namespace, as [`connect_tcp`] does.
///
/// # Errors
/// As [`connect_tcp`].
pub fn connect_local(
    name: &str,
    secret: &Secret,
    purpose: Purpose,
    timeout: Duration,
) -> Result<Connection<UnixStream>, Error> {
    let address = UnixAddr::new_abstract(name.as_bytes())?;
    retry(timeout, |deadline| {
        let flags = SockFlag::SOCK_CLOEXEC;
        let descriptor = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // A full backlog makes connecting wait.
        let left = time_left(deadline)?;
        let limit = nix::sys::time::TimeVal::new(
            left.as_secs() as i64,
            i64::from(left.subsec_micros()).max(1),
        );
        setsockopt(&descriptor, SendTimeout, &limit)?;
        connect(descriptor.as_raw_fd(), &address)?;
        authenticate(UnixStream::from(descriptor), secret, purpose, deadline)
    })
}

/// Repeats attempts that a limit ended. A server that says nothing for the limit of a handshake
/// does not answer a second time either.
fn retry<T>(
    timeout: Duration,
    mut attempt: impl FnMut(Instant) -> Result<T, Error>,
) -> Result<T, Error> {
    let deadline = Instant::now() + timeout;
    let mut pause = FIRST_PAUSE;
    loop {
        let attempt_deadline = deadline.min(Instant::now() + HANDSHAKE_TIMEOUT);
        let error = match attempt(attempt_deadline) {
            Ok(connection) => return Ok(connection),
            Err(error) => error,
        };
        // The message of a server that evicts this client may be lost: it looks closed then.
        let may_pass = matches!(error, Error::Busy | Error::Closed);
        if !may_pass || Instant::now() + pause >= deadline {
            return Err(error);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn time_left(deadline: Instant) -> Result<Duration, Error> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(Error::TimedOut);
    }
    Ok(left)
}

/// Authenticates both sides of a connection that this side opened.
///
/// # Errors
/// As [`connect_tcp`].
pub fn authenticate<S: Socket>(
    socket: S,
    secret: &Secret,
    purpose: Purpose,
    deadline: Instant,
) -> Result<Connection<S>, Error> {
    socket.prepare()?;
    let mut read_limit = Armed::default();
    let mut reader = DeadlineReader {
        socket: &socket,
        armed: &mut read_limit,
        deadline: Some(deadline),
    };
    let server = read_message(&mut reader, MAGIC)?;
    let session = Session {
        server,
        client: secret::random_bytes()?,
        endpoint: socket.peer_endpoint()?,
    };
    let proof = session.proof(secret, purpose, Side::Client);
    let mut writer = DeadlineWriter {
        socket: &socket,
        armed: &mut Armed::default(),
        deadline,
    };
    writer.write_all(&[MAGIC.as_slice(), &session.client, proof.as_bytes()].concat())?;
    let answer = read_message(&mut reader, ACCEPTED)?;
    if !is_proof(session.proof(secret, purpose, Side::Server), &answer) {
        return Err(Error::Unauthenticated);
    }
    socket.set_read_limit(None)?;
    socket.set_write_limit(None)?;
    Ok(Connection::new(
        socket,
        &session,
        secret,
        purpose,
        Side::Client,
    ))
}

/// Reads a message of the server that begins with `start`, and returns the rest.
fn read_message(reader: &mut impl Read, start: &[u8; MAGIC_LEN]) -> Result<[u8; NONCE_LEN], Error> {
    let mut message = [0u8; HELLO_LEN];
    reader.read_exact(&mut message[..MAGIC_LEN])?;
    let found = &message[..MAGIC_LEN];
    if found == BUSY {
        return Err(Error::Busy);
    }
    if found == DENIED {
        return Err(Error::Unauthenticated);
    }
    if found != start {
        let reason = if found[..MAGIC_LEN - 1] == MAGIC[..MAGIC_LEN - 1] {
            "the peer is another version of moerun"
        } else {
            "the peer is not a moerun of this run"
        };
        return Err(Error::Protocol(reason.into()));
    }
    reader.read_exact(&mut message[MAGIC_LEN..])?;
    Ok(message[MAGIC_LEN..].try_into().expect("32 bytes"))
}
