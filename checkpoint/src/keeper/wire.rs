//! Frames between the processes of a run, and the handshake that authenticates them.
//!
//! A frame is the length and the CRC-32C of its body, then the body: a message in bincode 2's
//! standard encoding. Only this file knows bincode. A connection begins with a mutual challenge, in
//! which each side proves by a keyed BLAKE3 hash of both nonces that it knows the run's secret. The
//! handshake does not protect against changed packets, so keepers belong in a private network.

use super::error::Error;
use crate::checksum::crc32c;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    time::Duration,
};

/// Limit for an answer of another process, and for what the answer waits for.
pub(super) const PEER_TIMEOUT: Duration = Duration::from_secs(30);
/// Limit for a whole handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest message: a chunk, or the header of a part with very many tensors.
const MAX_FRAME_BYTES: u32 = 256 << 20;
/// The first bytes that each side of a connection sends.
const MAGIC: &[u8; 8] = b"moerun\x00\x01";

pub use crate::secure::Secret;

fn old_proof(secret: &Secret, role: &str, a: &[u8; 32], b: &[u8; 32]) -> blake3::Hash {
    blake3::hash(format!("{}{role}{a:?}{b:?}", secret.to_hex()).as_bytes())
}

fn nonce() -> Result<[u8; 32], Error> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|e| Error::Protocol(format!("no random bytes: {e}")))?;
    Ok(bytes)
}

/// Sends a message as one frame.
///
/// # Errors
/// If the connection is closed, or the peer does not read in time.
pub(super) fn send(stream: &mut impl Write, message: &impl Serialize) -> Result<(), Error> {
    let mut frame = vec![0u8; 8];
    bincode::serde::encode_into_std_write(message, &mut frame, bincode::config::standard())
        .map_err(|e| Error::Protocol(format!("cannot encode a message: {e}")))?;
    let (head, body) = frame.split_at_mut(8);
    head[..4].copy_from_slice(&(body.len() as u32).to_le_bytes());
    head[4..].copy_from_slice(&crc32c(body).to_le_bytes());
    stream.write_all(&frame)?;
    Ok(())
}

/// Receives a message from one frame.
///
/// # Errors
/// If the connection is closed, the peer does not write in time, or sends something else.
pub(super) fn receive<T: DeserializeOwned>(stream: &mut impl Read) -> Result<T, Error> {
    let mut head = [0u8; 8];
    stream.read_exact(&mut head)?;
    let len = u32::from_le_bytes(head[..4].try_into().expect("four bytes"));
    if len > MAX_FRAME_BYTES {
        let reason = format!("a message of {len} bytes is longer than {MAX_FRAME_BYTES}");
        return Err(Error::Protocol(reason));
    }
    // Memory grows with the bytes that arrive, not with the announced length.
    let mut body = Vec::new();
    stream.take(u64::from(len)).read_to_end(&mut body)?;
    if body.len() < len as usize {
        return Err(std::io::Error::from(ErrorKind::UnexpectedEof).into());
    }
    if crc32c(&body).to_le_bytes() != head[4..] {
        return Err(Error::Protocol("a message has a wrong checksum".into()));
    }
    let (message, _) = bincode::serde::decode_from_slice(&body, bincode::config::standard())
        .map_err(|e| Error::Protocol(format!("cannot decode a message: {e}")))?;
    Ok(message)
}

/// A stream whose reads and writes can time out.
pub(super) trait TimeoutStream: Read + Write {
    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> std::io::Result<()>;
}

impl TimeoutStream for TcpStream {
    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> std::io::Result<()> {
        self.set_read_timeout(read)?;
        self.set_write_timeout(write)
    }
}

impl TimeoutStream for UnixStream {
    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> std::io::Result<()> {
        self.set_read_timeout(read)?;
        self.set_write_timeout(write)
    }
}

/// Authenticates the peer on a connection that this side accepted.
///
/// # Errors
/// If the peer does not know the secret, or does not answer in time.
pub(super) fn server_handshake(
    stream: &mut impl TimeoutStream,
    secret: &Secret,
) -> Result<(), Error> {
    stream.set_timeouts(Some(HANDSHAKE_TIMEOUT), Some(HANDSHAKE_TIMEOUT))?;
    let own = nonce()?;
    stream.write_all(&[MAGIC.as_slice(), &own].concat())?;
    let mut hello = [0u8; 72];
    stream.read_exact(&mut hello)?;
    let theirs: [u8; 32] = hello[8..40].try_into().expect("32 bytes");
    let proof: [u8; 32] = hello[40..].try_into().expect("32 bytes");
    // Comparing hashes takes the same time wherever they differ.
    let expected = old_proof(secret, "client", &own, &theirs);
    if &hello[..8] != MAGIC || expected != blake3::Hash::from_bytes(proof) {
        return Err(Error::Unauthenticated);
    }
    stream.write_all(old_proof(secret, "keeper", &theirs, &own).as_bytes())?;
    Ok(())
}

/// Authenticates the peer on a connection that this side opened.
///
/// # Errors
/// As [`server_handshake`].
pub(super) fn client_handshake(
    stream: &mut impl TimeoutStream,
    secret: &Secret,
) -> Result<(), Error> {
    stream.set_timeouts(Some(HANDSHAKE_TIMEOUT), Some(HANDSHAKE_TIMEOUT))?;
    let mut hello = [0u8; 40];
    stream.read_exact(&mut hello)?;
    if &hello[..8] != MAGIC {
        return Err(Error::Unauthenticated);
    }
    let theirs: [u8; 32] = hello[8..].try_into().expect("32 bytes");
    let own = nonce()?;
    let proof = old_proof(secret, "client", &theirs, &own);
    stream.write_all(&[MAGIC.as_slice(), &own, proof.as_bytes()].concat())?;
    let mut answer = [0u8; 32];
    stream.read_exact(&mut answer)?;
    let expected = old_proof(secret, "keeper", &own, &theirs);
    if expected != blake3::Hash::from_bytes(answer) {
        return Err(Error::Unauthenticated);
    }
    Ok(())
}

/// Connects to the keeper at `address`; each later read or write may take `timeout`.
///
/// # Errors
/// If no keeper of this run listens there.
pub(super) fn connect(
    address: SocketAddr,
    secret: &Secret,
    timeout: Duration,
) -> Result<TcpStream, Error> {
    let mut stream = TcpStream::connect_timeout(&address, timeout.min(HANDSHAKE_TIMEOUT))?;
    stream.set_nodelay(true)?;
    client_handshake(&mut stream, secret)?;
    stream.set_timeouts(Some(timeout), Some(timeout))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    /// Returns the results of the client and of the server.
    fn handshake(client: Secret, server: Secret) -> [Result<(), Error>; 2] {
        let (mut accepted, mut opened) = UnixStream::pair().unwrap();
        let serving = std::thread::spawn(move || server_handshake(&mut accepted, &server));
        let result = client_handshake(&mut opened, &client);
        drop(opened);
        [result, serving.join().unwrap()]
    }

    #[test]
    fn peers_need_the_same_secret() {
        let secret = Secret::random().unwrap();
        let [client, server] = handshake(secret.clone(), secret.clone());
        assert!(client.is_ok() && server.is_ok());
        let [client, server] = handshake(secret, Secret::random().unwrap());
        assert!(client.is_err());
        assert!(matches!(server, Err(Error::Unauthenticated)));
    }

    #[test]
    fn secrets_are_read_back_from_text() {
        let secret = Secret::random().unwrap();
        assert_eq!(Secret::from_hex(&secret.to_hex()), Some(secret));
        assert_eq!(Secret::from_hex("12"), None);
        assert_eq!(Secret::from_hex(&"é".repeat(32)), None);
    }

    #[test]
    fn changed_and_endless_frames_are_refused() {
        let mut frame = Vec::new();
        send(&mut frame, &("text", 7u64)).unwrap();
        let message: (String, u64) = receive(&mut frame.as_slice()).unwrap();
        assert_eq!(message, ("text".into(), 7));
        for index in 0..frame.len() {
            let mut changed = frame.clone();
            changed[index] ^= 4;
            let result = receive::<(String, u64)>(&mut changed.as_slice());
            assert!(result.is_err(), "byte {index}");
        }
        let mut truncated = &frame[..frame.len() - 1];
        assert!(receive::<(String, u64)>(&mut truncated).is_err());
        let endless = [0xff; 64];
        let error = receive::<String>(&mut endless.as_slice()).unwrap_err();
        assert!(error.to_string().contains("is longer than"), "{error}");
    }
}
