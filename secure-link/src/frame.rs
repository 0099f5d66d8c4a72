//! Messages in frames on an authenticated socket. Only this file knows bincode.

use super::{
    error::Error,
    proof::{Session, Side},
    purpose::{Encoding, Purpose},
    secret::Secret,
    socket::{Armed, DeadlineReader, DeadlineWriter, Socket},
};
use crc_fast::CrcAlgorithm::Crc32Iscsi;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    io::{ErrorKind, Read, Write},
    sync::Arc,
    time::{Duration, Instant},
};

/// Limit for a frame, once it has begun.
const FRAME_TIMEOUT: Duration = Duration::from_secs(30);
const LENGTH_BYTES: usize = 4;
const MAX_CHECK_BYTES: usize = 16;
/// Most memory that is reserved for a message before it arrives: a chunk and more.
const RESERVED_BYTES: usize = 1 << 20;
/// Bounds of what one message may allocate while it is decoded.
const SMALL_LIMIT: usize = 16 << 20;
const LARGE_LIMIT: usize = 256 << 20;

/// The check values of the frames in one direction.
#[derive(Debug)]
pub(super) enum Seal {
    Checksum,
    Keyed { key: [u8; 32], number: u64 },
}

impl Seal {
    fn new(session: &Session, secret: &Secret, purpose: Purpose, sender: Side) -> Seal {
        if !purpose.sealed {
            return Seal::Checksum;
        }
        let key = session.frame_key(secret, purpose, sender);
        Seal::Keyed { key, number: 0 }
    }

    fn len(&self) -> usize {
        match self {
            Seal::Checksum => 4,
            Seal::Keyed { .. } => MAX_CHECK_BYTES,
        }
    }

    /// Returns the check value of the next frame, in its first [`Seal::len`] bytes. The rest is 0.
    fn next(&mut self, body: &[u8]) -> blake3::Hash {
        let mut check = [0; 32];
        match self {
            Seal::Checksum => check[..4]
                .copy_from_slice(&(crc_fast::checksum(Crc32Iscsi, body) as u32).to_le_bytes()),
            Seal::Keyed { key, number } => {
                let mut hasher = blake3::Hasher::new_keyed(key);
                hasher.update(&number.to_le_bytes());
                hasher.update(body);
                *number += 1;
                let hash = hasher.finalize();
                check[..MAX_CHECK_BYTES].copy_from_slice(&hash.as_bytes()[..MAX_CHECK_BYTES]);
            }
        }
        blake3::Hash::from_bytes(check)
    }

    /// True if a check value is that of the next frame. Comparing takes the same time wherever the
    /// values differ.
    pub(super) fn matches(&mut self, body: &[u8], received: &[u8]) -> bool {
        let mut check = [0; 32];
        check[..received.len()].copy_from_slice(received);
        self.next(body) == blake3::Hash::from_bytes(check)
    }
}

/// The half of a connection that receives.
#[derive(Debug)]
pub struct FrameReader<S> {
    pub(super) socket: Arc<S>,
    armed: Armed,
    pub(super) seal: Seal,
    pub(super) purpose: Purpose,
}

impl<S: Socket> FrameReader<S> {
    /// Receives a message, which has to arrive within `timeout`. Without a timeout, it may begin at
    /// any time, and then has 30 s.
    ///
    /// # Errors
    /// If the connection is closed, the message is late, or is none of type `T`. The connection
    /// cannot be used after that.
    pub fn receive<T: DeserializeOwned>(&mut self, timeout: Option<Duration>) -> Result<T, Error> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let check_len = self.seal.len();
        let mut head = [0u8; LENGTH_BYTES + MAX_CHECK_BYTES];
        let head = &mut head[..LENGTH_BYTES + check_len];
        let begun = self.reader(deadline).read(head)?;
        if begun == 0 {
            return Err(Error::Closed);
        }
        // A message that has begun has a deadline in any case.
        let deadline = deadline.unwrap_or_else(|| Instant::now() + FRAME_TIMEOUT);
        self.reader(Some(deadline)).read_exact(&mut head[begun..])?;
        let len = body_bytes(head, self.purpose)?;
        let check = &head[LENGTH_BYTES..];
        // Memory for long messages grows with the bytes that arrive, not with the announced length.
        let mut body = Vec::with_capacity(len.min(RESERVED_BYTES));
        let reader = self.reader(Some(deadline));
        reader.take(len as u64).read_to_end(&mut body)?;
        if body.len() < len {
            return Err(Error::Closed);
        }
        if !self.seal.matches(&body, check) {
            return Err(Error::Protocol("a message has a wrong checksum".into()));
        }
        decode_body(&body, self.purpose)
    }

    fn reader(&mut self, deadline: Option<Instant>) -> DeadlineReader<'_, S> {
        DeadlineReader {
            socket: &*self.socket,
            armed: &mut self.armed,
            deadline,
        }
    }

    /// Sets how long one read of the socket itself may take, for messages outside of frames.
    ///
    /// # Errors
    /// If the connection is closed.
    pub fn limit_reads(&mut self, limit: Duration) -> Result<(), Error> {
        self.socket.set_read_limit(Some(limit))?;
        self.armed = Armed::at(limit);
        Ok(())
    }

    /// Returns the socket, for closing it from another thread or passing files.
    pub fn socket(&self) -> &Arc<S> {
        &self.socket
    }
}

/// The half of a connection that sends.
#[derive(Debug)]
pub struct FrameWriter<S> {
    socket: Arc<S>,
    armed: Armed,
    pub(super) seal: Seal,
    purpose: Purpose,
}

impl<S: Socket> FrameWriter<S> {
    /// Sends a message as one frame.
    ///
    /// # Errors
    /// If the connection is closed, the peer does not read within 30 s, or the message is too long.
    pub fn send(&mut self, message: &impl Serialize) -> Result<(), Error> {
        self.send_within(message, FRAME_TIMEOUT)
    }

    /// Sends a message as one frame, which the peer has to read within `timeout`.
    ///
    /// # Errors
    /// As [`FrameWriter::send`].
    pub fn send_within(
        &mut self,
        message: &impl Serialize,
        timeout: Duration,
    ) -> Result<(), Error> {
        let frame = framed(message, self.purpose, &mut self.seal)?;
        let mut writer = DeadlineWriter {
            socket: &*self.socket,
            armed: &mut self.armed,
            deadline: Instant::now() + timeout,
        };
        match writer.write_all(&frame) {
            Err(error) if error.kind() == ErrorKind::WriteZero => Err(Error::Closed),
            result => Ok(result?),
        }
    }

    /// Returns the socket, for closing it from another thread or passing files.
    pub fn socket(&self) -> &Arc<S> {
        &self.socket
    }
}

/// A connection whose sides have authenticated each other.
#[derive(Debug)]
pub struct Connection<S> {
    pub reader: FrameReader<S>,
    pub writer: FrameWriter<S>,
}

impl<S: Socket> Connection<S> {
    pub(super) fn new(
        socket: S,
        session: &Session,
        secret: &Secret,
        purpose: Purpose,
        own: Side,
    ) -> Connection<S> {
        let socket = Arc::new(socket);
        Connection {
            reader: FrameReader {
                socket: socket.clone(),
                armed: Armed::default(),
                seal: Seal::new(session, secret, purpose, own.other()),
                purpose,
            },
            writer: FrameWriter {
                socket,
                armed: Armed::default(),
                seal: Seal::new(session, secret, purpose, own),
                purpose,
            },
        }
    }

    /// Sends a message; see [`FrameWriter::send`].
    ///
    /// # Errors
    /// As [`FrameWriter::send`].
    pub fn send(&mut self, message: &impl Serialize) -> Result<(), Error> {
        self.writer.send(message)
    }

    /// Receives a message; see [`FrameReader::receive`].
    ///
    /// # Errors
    /// As [`FrameReader::receive`].
    pub fn receive<T: DeserializeOwned>(&mut self, timeout: Option<Duration>) -> Result<T, Error> {
        self.reader.receive(timeout)
    }

    /// Returns the socket, for closing it from another thread or passing files.
    pub fn socket(&self) -> &Arc<S> {
        self.reader.socket()
    }
}

/// The part of a frame before its body.
pub(super) struct Head {
    pub(super) bytes: usize,
    pub(super) body_bytes: usize,
}

impl Head {
    pub(super) const LENGTH_BYTES: usize = LENGTH_BYTES;

    /// Returns the head of the frame that `input` begins with; None until it is complete.
    pub(super) fn parse(
        input: &[u8],
        seal: &Seal,
        purpose: Purpose,
    ) -> Result<Option<Head>, Error> {
        let bytes = LENGTH_BYTES + seal.len();
        let Some(head) = input.get(..bytes) else {
            return Ok(None);
        };
        let body_bytes = body_bytes(head, purpose)?;
        Ok(Some(Head { bytes, body_bytes }))
    }
}

/// Returns the length of a frame's body, from its head.
fn body_bytes(head: &[u8], purpose: Purpose) -> Result<usize, Error> {
    let length = head[..LENGTH_BYTES].try_into().expect("four bytes");
    let len = u32::from_le_bytes(length);
    let most = purpose.max_frame_bytes;
    if len > most {
        let reason = format!("a message of {len} bytes is longer than {most}");
        return Err(Error::Protocol(reason));
    }
    Ok(len as usize)
}

/// Returns the bytes of a frame with a message.
pub(super) fn framed(
    message: &impl Serialize,
    purpose: Purpose,
    seal: &mut Seal,
) -> Result<Vec<u8>, Error> {
    let head_len = LENGTH_BYTES + seal.len();
    let mut frame = vec![0u8; head_len];
    encode(message, purpose, &mut frame)?;
    let (head, body) = frame.split_at_mut(head_len);
    let most = purpose.max_frame_bytes;
    let len = u32::try_from(body.len()).ok().filter(|&len| len <= most);
    let Some(len) = len else {
        return Err(Error::TooLong {
            bytes: body.len(),
            limit: most,
            label: purpose.label,
        });
    };
    head[..LENGTH_BYTES].copy_from_slice(&len.to_le_bytes());
    let check = seal.next(body);
    let check_len = head_len - LENGTH_BYTES;
    head[LENGTH_BYTES..].copy_from_slice(&check.as_bytes()[..check_len]);
    Ok(frame)
}

/// Returns a message as the body of a frame has it, whatever the limit.
///
/// # Errors
/// If the message cannot be encoded.
pub fn encode_body(message: &impl Serialize, purpose: Purpose) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    encode(message, purpose, &mut body)?;
    Ok(body)
}

fn encode(message: &impl Serialize, purpose: Purpose, frame: &mut Vec<u8>) -> Result<(), Error> {
    let failed = |error: String| Error::Protocol(format!("cannot encode a message: {error}"));
    match purpose.encoding {
        Encoding::Bincode => {
            let config = bincode::config::standard();
            bincode::serde::encode_into_std_write(message, frame, config)
                .map_err(|error| failed(error.to_string()))?;
        }
        Encoding::Json => {
            serde_json::to_writer(frame, message).map_err(|error| failed(error.to_string()))?;
        }
    }
    Ok(())
}

/// Returns the message in the body of a frame.
///
/// # Errors
/// If it is not such a message, or longer than `purpose` allows.
pub fn decode_body<T: DeserializeOwned>(body: &[u8], purpose: Purpose) -> Result<T, Error> {
    let failed = |error: String| Error::Protocol(format!("cannot decode a message: {error}"));
    let standard = bincode::config::standard();
    if purpose.encoding == Encoding::Json {
        return serde_json::from_slice(body).map_err(|error| failed(error.to_string()));
    }
    // Without a limit, a short message could announce a list of any length.
    let decoded = if body.len() <= SMALL_LIMIT / 8 {
        bincode::serde::decode_from_slice(body, standard.with_limit::<SMALL_LIMIT>())
    } else {
        bincode::serde::decode_from_slice(body, standard.with_limit::<LARGE_LIMIT>())
    };
    let (message, read) = decoded.map_err(|error| failed(error.to_string()))?;
    if read < body.len() {
        return Err(failed(format!("{} bytes are left", body.len() - read)));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::Endpoint;
    use proptest::prelude::*;
    use std::os::unix::net::UnixStream;

    const SEALED_BINCODE: Purpose = Purpose {
        sealed: true,
        max_frame_bytes: 1000,
        ..Purpose::KEEPER
    };

    struct Pair {
        client: Connection<UnixStream>,
        server: Connection<UnixStream>,
    }

    fn pair(purpose: Purpose) -> Pair {
        let secret = Secret::from_hex(&"5a".repeat(32)).unwrap();
        let (client, server) = UnixStream::pair().unwrap();
        let session = Session {
            server: [1; 32],
            client: [2; 32],
            endpoint: Endpoint::Local,
        };
        Pair {
            client: Connection::new(client, &session, &secret, purpose, Side::Client),
            server: Connection::new(server, &session, &secret, purpose, Side::Server),
        }
    }

    const SOON: Option<Duration> = Some(Duration::from_secs(5));

    /// Returns the bytes of one frame with a message.
    fn frame(purpose: Purpose) -> Vec<u8> {
        let Pair { mut client, server } = pair(purpose);
        client.send(&("text", 7u64)).unwrap();
        let mut bytes = vec![0; 1000];
        let len = server.socket().read_some(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    fn receive(purpose: Purpose, bytes: &[u8]) -> Result<(String, u64), Error> {
        let Pair { client, mut server } = pair(purpose);
        client.socket().write_some(bytes).unwrap();
        drop(client);
        server.receive(SOON)
    }

    #[test]
    fn messages_arrive_in_both_directions_and_encodings() {
        for purpose in [Purpose::KEEPER, Purpose::AGENT, SEALED_BINCODE] {
            let Pair {
                mut client,
                mut server,
            } = pair(purpose);
            for number in 0..3u64 {
                client.send(&("text", number)).unwrap();
                let message: (String, u64) = server.receive(SOON).unwrap();
                assert_eq!(message, ("text".into(), number));
                server.send(&number).unwrap();
                assert_eq!(client.receive::<u64>(SOON).unwrap(), number);
            }
        }
    }

    #[test]
    fn changed_and_endless_frames_are_refused() {
        for purpose in [Purpose::KEEPER, Purpose::AGENT, SEALED_BINCODE] {
            let frame = frame(purpose);
            assert!(receive(purpose, &frame).is_ok());
            for index in 0..frame.len() {
                let mut changed = frame.clone();
                changed[index] ^= 4;
                assert!(receive(purpose, &changed).is_err(), "byte {index}");
            }
            assert!(receive(purpose, &frame[..frame.len() - 1]).is_err());
            let error = receive(purpose, &[0xff; 64]).unwrap_err();
            let most = purpose.max_frame_bytes;
            let expected = format!("a message of 4294967295 bytes is longer than {most}");
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn a_sealed_frame_cannot_be_repeated_or_sent_back() {
        let frame = frame(SEALED_BINCODE);
        let Pair { client, mut server } = pair(SEALED_BINCODE);
        client.socket().write_some(&frame.repeat(2)).unwrap();
        assert!(server.receive::<(String, u64)>(SOON).is_ok());
        assert!(server.receive::<(String, u64)>(SOON).is_err());
        let Pair { mut client, server } = pair(SEALED_BINCODE);
        server.socket().write_some(&frame).unwrap();
        assert!(client.receive::<(String, u64)>(SOON).is_err());
    }

    #[test]
    fn a_short_frame_cannot_allocate_much() {
        // A list of 2^40 bytes, of which none follow.
        let body: Vec<u8> = [[253].as_slice(), &(1u64 << 40).to_le_bytes()].concat();
        let error = decode_body::<serde_bytes::ByteBuf>(&body, Purpose::KEEPER).unwrap_err();
        assert!(error.to_string().contains("LimitExceeded"), "{error}");
    }

    #[test]
    fn messages_over_the_limit_and_late_ones_fail() {
        let Pair {
            mut client,
            mut server,
        } = pair(SEALED_BINCODE);
        let error = client.send(&vec![7u8; 1001]).unwrap_err();
        // Bincode puts the length in front of the bytes.
        let expected =
            "a message of 1004 bytes is longer than 1000, the limit of a keeper connection";
        assert_eq!(error.to_string(), expected);
        assert!(!error.is_lost());
        // Nothing of it was sent, so that the next message arrives.
        client.send(&7u64).unwrap();
        assert_eq!(server.receive::<u64>(SOON).unwrap(), 7);
        let start = Instant::now();
        let late = server.receive::<u64>(Some(Duration::from_millis(50)));
        assert!(matches!(late, Err(Error::TimedOut)));
        assert!(start.elapsed() < Duration::from_secs(2));
        // A peer that does not read.
        let full = loop {
            let timeout = Duration::from_millis(50);
            if let Err(error) = client.writer.send_within(&vec![7u8; 900], timeout) {
                break error;
            }
        };
        assert!(matches!(full, Error::TimedOut));
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(body in prop::collection::vec(any::<u8>(), 0..200)) {
            type Message = (Option<Vec<String>>, u64, Vec<(u32, bool)>);
            let _ = decode_body::<Message>(&body, Purpose::KEEPER);
            let _ = decode_body::<Message>(&body, Purpose::AGENT);
        }
    }
}
