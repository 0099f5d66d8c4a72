//! Errors of connections between processes.

use std::io::ErrorKind;

/// A failed connection or request, at either end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing answers at the address, or the network fails.
    #[error("{0}")]
    Connection(std::io::Error),
    /// The peer closed the connection.
    #[error("the connection was closed")]
    Closed,
    /// The peer is connected, but does not answer.
    #[error("no reply in time")]
    TimedOut,
    /// The peer's limit of connections turned this one away. The peer is alive.
    #[error("the peer has too many connections")]
    Busy,
    /// The peer sent something that the protocol does not allow.
    #[error("{0}")]
    Protocol(String),
    /// The message is longer than the port accepts. Nothing of it was sent, and the connection
    /// remains usable.
    #[error("a message of {bytes} bytes is longer than {limit}, the limit of a {label} connection")]
    TooLong {
        /// Length of the encoded message in bytes.
        bytes: usize,
        /// The longest message of the port in bytes.
        limit: u32,
        /// The name of the port's [`Purpose`](crate::Purpose).
        label: &'static str,
    },
    /// The peer does not know the run's secret.
    #[error("authentication failed: the peer belongs to another run")]
    Unauthenticated,
    /// The peer cannot do what was requested; the connection remains usable.
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// True if the error shows that no process with the secret serves the address any more. A peer
    /// that is busy or slow is not lost, nor is one for which a message is too long.
    pub fn is_lost(&self) -> bool {
        match self {
            Error::Connection(_) | Error::Closed | Error::Unauthenticated | Error::Protocol(_) => {
                true
            }
            Error::TimedOut | Error::Busy | Error::TooLong { .. } | Error::Refused(_) => false,
        }
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Error {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Error::TimedOut,
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                Error::Closed
            }
            _ => Error::Connection(error),
        }
    }
}

impl From<nix::Error> for Error {
    fn from(error: nix::Error) -> Error {
        std::io::Error::from(error).into()
    }
}
