//! Authenticated, limited connections between the processes of a run.
//!
//! A [`Door`] accepts connections at a port and lets in peers that prove the run's [`Secret`].
//! [`connect_tcp`] and [`connect_local`] are the other side. Both return a [`Connection`], which
//! carries messages in frames.
//!
//! # Handshake
//!
//! | sender | bytes | contents |
//! |---|---|---|
//! | server | 40 | `moerun\0\3`, nonce of the server |
//! | client | 72 | `moerun\0\3`, nonce of the client, proof of the client |
//! | server | 40 | `moerun\0A`, proof of the server |
//!
//! A proof is a BLAKE3 hash, keyed by the secret, of the purpose's label, the side, both nonces and
//! the server's address and port, which the client dialed. It is of no use at a port with another
//! purpose, on the other side, in another connection, or at another address, so a proof that is
//! sent back, repeated or relayed fails. Addresses must not be translated between the two sides.
//! The secret itself is never sent. A server may end the handshake at any time with 8 bytes:
//! `moerun\0B` if a limit turns the client away, which then tries again, and `moerun\0D` if the
//! proof is wrong.
//!
//! # Limits
//!
//! - The whole handshake has one deadline, and a server reads at most 72 bytes before it.
//! - One thread holds all unauthenticated connections. If there are too many, it evicts the oldest
//!   of the address that has the most. Authenticated connections have their own places.
//! - Some file descriptors stay free: a connection beyond them is turned away.
//! - A frame has a largest length, which depends on the [`Purpose`], and a deadline once it began.
//!   Memory grows with the bytes that arrive.
//! - A refusal is counted ([`Refusals`]). The log has at most one line per minute and port.
//!
//! # Frames
//!
//! A frame is the length of its body (4 bytes), a check value and the body: a message in bincode
//! 2's standard encoding or in JSON. The check value is a CRC-32C (4 bytes). For a
//! [sealed](Purpose::sealed) purpose it is a BLAKE3 hash (16 bytes), keyed by the same values and
//! the secret, of the frame's number and its body: no frame can be changed, repeated or inserted by
//! others. Nothing is encrypted.

mod buffered;
mod client;
mod descriptors;
mod door;
mod error;
mod frame;
mod greeting;
mod pace;
mod places;
mod proof;
mod purpose;
mod refusals;
mod secret;
mod socket;

pub use buffered::Buffered;
pub use client::{authenticate, connect_local, connect_tcp};
pub use door::{Admitted, Door, Limits, Listener, Ticket};
pub use error::Error;
pub use frame::{Connection, FrameReader, FrameWriter, decode_body, encode_body};
pub use purpose::{Encoding, Purpose};
pub use refusals::{Refusal, RefusalCounts, Refusals};
pub use secret::Secret;
pub use socket::{Endpoint, PeerAddress, Socket};
