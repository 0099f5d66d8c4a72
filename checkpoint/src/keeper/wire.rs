//! Frames between the processes of a run, and proof that a peer is one of them.
//!
//! A frame is the length and the CRC-32C of its body, then the body, a message in bincode 2's standard encoding. (Only
//! this file knows bincode.) A connection begins with a challenge both ways: each side shows, by a keyed BLAKE3 of both
//! nonces, that it knows the run's secret. Who could change packets on the way is not kept out; run keepers in a network
//! of your own.

use super::Error;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// No message is longer: a chunk and what surrounds it, or a header of a part with very many tensors.
const MAX_FRAME_BYTES: u32 = 256 << 20;
/// What each side of a connection says first.
const MAGIC: &[u8; 8] = b"moerun\x00\x01";
/// A handshake takes no longer.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the processes of a run have in common. Written down, it is text.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Secret([u8; 32]);

impl Secret {
    /// A new one.
    ///
    /// # Errors
    /// When the system has no random bytes.
    pub fn random() -> Result<Secret, Error> {
        Ok(Secret(nonce()?))
    }

    /// As text, for those who are to know it.
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// A name for the run that gives nothing of the secret away.
    pub fn name(&self) -> String {
        blake3::keyed_hash(&self.0, b"name").to_hex()[..16].to_string()
    }

    /// What [`Secret::to_hex`] gave.
    pub fn from_hex(text: &str) -> Option<Secret> {
        let bytes: Option<Vec<u8>> = (0..text.len() / 2)
            .map(|i| {
                text.get(2 * i..2 * i + 2)
                    .and_then(|pair| u8::from_str_radix(pair, 16).ok())
            })
            .collect();
        Some(Secret(bytes?.try_into().ok()?))
    }

    fn proof(&self, side: &str, first: &[u8; 32], second: &[u8; 32]) -> blake3::Hash {
        blake3::keyed_hash(&self.0, &[side.as_bytes(), first, second].concat())
    }
}

impl From<Secret> for String {
    fn from(secret: Secret) -> String {
        secret.to_hex()
    }
}

impl TryFrom<String> for Secret {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Secret, &'static str> {
        Secret::from_hex(&text).ok_or("that is no secret of a run")
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret")
    }
}

fn nonce() -> Result<[u8; 32], Error> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|e| Error::Protocol(format!("no random bytes: {e}")))?;
    Ok(bytes)
}

/// Sends one message.
///
/// # Errors
/// When the peer is gone, or does not read in time.
pub(crate) fn send(stream: &mut impl Write, message: &impl Serialize) -> Result<(), Error> {
    let mut frame = vec![0u8; 8];
    bincode::serde::encode_into_std_write(message, &mut frame, bincode::config::standard())
        .map_err(|e| Error::Protocol(format!("a message cannot be encoded: {e}")))?;
    let (head, body) = frame.split_at_mut(8);
    head[..4].copy_from_slice(&(body.len() as u32).to_le_bytes());
    head[4..].copy_from_slice(&crate::checksum::crc32c(body).to_le_bytes());
    stream.write_all(&frame)?;
    Ok(())
}

/// Receives one message.
///
/// # Errors
/// When the peer is gone, does not write in time, or sends something else.
pub(crate) fn receive<T: DeserializeOwned>(stream: &mut impl Read) -> Result<T, Error> {
    let mut head = [0u8; 8];
    stream.read_exact(&mut head)?;
    let len = u32::from_le_bytes(head[..4].try_into().expect("four bytes"));
    if len > MAX_FRAME_BYTES {
        return Err(Error::Protocol(format!(
            "a message of {len} bytes was announced"
        )));
    }
    // Memory grows with what really comes.
    let mut body = Vec::new();
    stream.take(u64::from(len)).read_to_end(&mut body)?;
    if body.len() < len as usize {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    if crate::checksum::crc32c(&body).to_le_bytes() != head[4..] {
        return Err(Error::Protocol("a message was changed on its way".into()));
    }
    let decoded = bincode::serde::decode_from_slice(&body, bincode::config::standard());
    let (message, _) =
        decoded.map_err(|e| Error::Protocol(format!("a message cannot be understood: {e}")))?;
    Ok(message)
}

/// A stream with deadlines.
pub(crate) trait TimeoutStream: Read + Write {
    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> std::io::Result<()>;
}

impl TimeoutStream for TcpStream {
    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> std::io::Result<()> {
        self.set_read_timeout(read)?;
        self.set_write_timeout(write)
    }
}

impl TimeoutStream for std::os::unix::net::UnixStream {
    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> std::io::Result<()> {
        self.set_read_timeout(read)?;
        self.set_write_timeout(write)
    }
}

/// The side that accepted the connection.
///
/// # Errors
/// When the other does not know the secret, or does not answer in time.
pub(crate) fn server_handshake(
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
    // The comparison of hashes takes the same time wherever they differ.
    if &hello[..8] != MAGIC
        || secret.proof("client", &own, &theirs) != blake3::Hash::from_bytes(proof)
    {
        return Err(Error::Unauthenticated);
    }
    stream.write_all(secret.proof("keeper", &theirs, &own).as_bytes())?;
    Ok(())
}

/// The side that made the connection.
///
/// # Errors
/// As [`server_handshake`].
pub(crate) fn client_handshake(
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
    let proof = secret.proof("client", &theirs, &own);
    stream.write_all(&[MAGIC.as_slice(), &own, proof.as_bytes()].concat())?;
    let mut answer = [0u8; 32];
    stream.read_exact(&mut answer)?;
    if secret.proof("keeper", &own, &theirs) != blake3::Hash::from_bytes(answer) {
        return Err(Error::Unauthenticated);
    }
    Ok(())
}

/// A connection to the keeper at `address`.
///
/// # Errors
/// When nobody is there, or it is of another run.
pub(crate) fn connect(
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

    fn handshake(ours: Secret, theirs: Secret) -> (Result<(), Error>, Result<(), Error>) {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let there = std::thread::spawn(move || server_handshake(&mut a, &theirs));
        let here = client_handshake(&mut b, &ours);
        drop(b);
        (here, there.join().unwrap())
    }

    #[test]
    fn only_those_who_know_the_secret_meet() {
        let secret = Secret::random().unwrap();
        assert_eq!(Secret::from_hex(&secret.to_hex()), Some(secret.clone()));
        assert!(Secret::from_hex("12").is_none() && Secret::from_hex(&"é".repeat(32)).is_none());
        let (here, there) = handshake(secret.clone(), secret.clone());
        assert!(here.is_ok() && there.is_ok());
        let (here, there) = handshake(secret, Secret::random().unwrap());
        assert!(here.is_err() && matches!(there, Err(Error::Unauthenticated)));
    }

    #[test]
    fn changed_and_endless_frames_are_refused() {
        let mut frame = Vec::new();
        send(&mut frame, &("text", 7u64)).unwrap();
        let back: (String, u64) = receive(&mut frame.as_slice()).unwrap();
        assert_eq!(back, ("text".into(), 7));
        for index in 0..frame.len() {
            let mut changed = frame.clone();
            changed[index] ^= 4;
            assert!(
                receive::<(String, u64)>(&mut changed.as_slice()).is_err(),
                "byte {index}"
            );
        }
        assert!(receive::<(String, u64)>(&mut &frame[..frame.len() - 1]).is_err());
        assert!(
            receive::<String>(&mut [0xff; 64].as_slice())
                .unwrap_err()
                .to_string()
                .contains("was announced")
        );
    }
}
