//! A connection of a server that waits for many sockets in one thread: nothing here blocks.

use super::{
    error::Error,
    frame::{Connection, Head, Seal, decode_body, framed},
    purpose::Purpose,
    socket::Socket,
};
use serde::{Serialize, de::DeserializeOwned};
use std::{io::ErrorKind, sync::Arc};

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 64 << 10;
/// Chunks that are read of one connection before others have a turn.
const MAX_CHUNKS: usize = 16;

/// An authenticated connection with buffers for what has not been read or written completely.
///
/// Its memory is bounded by a frame's largest length in each direction, as long as the owner queues
/// one message at a time.
#[derive(Debug)]
pub struct Buffered<S> {
    socket: Arc<S>,
    incoming: Seal,
    outgoing: Seal,
    purpose: Purpose,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Bytes of `output` that are sent.
    sent: usize,
}

impl<S: Socket> Connection<S> {
    /// Returns the connection for an owner that waits for its socket itself.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn into_buffered(self) -> Result<Buffered<S>, Error> {
        self.socket().set_nonblocking(true)?;
        let Connection { reader, writer } = self;
        Ok(Buffered {
            socket: reader.socket,
            incoming: reader.seal,
            outgoing: writer.seal,
            purpose: reader.purpose,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
        })
    }
}

impl<S: Socket> Buffered<S> {
    /// Reads what has arrived.
    ///
    /// # Errors
    /// If the connection is closed.
    pub fn fill(&mut self) -> Result<(), Error> {
        let mut chunk = [0; CHUNK_BYTES];
        for _ in 0..MAX_CHUNKS {
            match self.socket.read_some(&mut chunk) {
                Ok(0) => return Err(Error::Closed),
                Ok(len) => self.input.extend_from_slice(&chunk[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Takes the next message from what was read; None until it is complete.
    ///
    /// # Errors
    /// If it is too long, was changed, or is none of type `T`. The connection cannot be used after
    /// that.
    pub fn next_message<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        let Some(head) = Head::parse(&self.input, &self.incoming, self.purpose)? else {
            return Ok(None);
        };
        let Some(body) = self.input.get(head.bytes..head.bytes + head.body_bytes) else {
            return Ok(None);
        };
        let check = &self.input[Head::LENGTH_BYTES..head.bytes];
        if !self.incoming.matches(body, check) {
            return Err(Error::Protocol("a message has a wrong checksum".into()));
        }
        let message = decode_body(body, self.purpose)?;
        self.input.drain(..head.bytes + head.body_bytes);
        if self.input.is_empty() {
            // A large message does not hold its memory for the rest of the run.
            self.input = Vec::new();
        }
        Ok(Some(message))
    }

    /// True if bytes have arrived that are no complete message yet, or were not taken.
    pub fn has_input(&self) -> bool {
        !self.input.is_empty()
    }

    /// Adds a message to those that [`Buffered::flush`] sends.
    ///
    /// # Errors
    /// If the message is too long.
    pub fn queue(&mut self, message: &impl Serialize) -> Result<(), Error> {
        let frame = framed(message, self.purpose, &mut self.outgoing)?;
        self.output.extend_from_slice(&frame);
        Ok(())
    }

    /// Sends as much as the system takes. Returns true if nothing is left.
    ///
    /// # Errors
    /// If the connection is closed.
    pub fn flush(&mut self) -> Result<bool, Error> {
        while self.sent < self.output.len() {
            match self.socket.write_some(&self.output[self.sent..]) {
                Ok(0) => return Err(Error::Closed),
                Ok(len) => self.sent += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.output = Vec::new();
        self.sent = 0;
        Ok(true)
    }

    /// Returns the socket, to wait for.
    pub fn socket(&self) -> &S {
        &self.socket
    }
}
