//! Errors of talking to a keeper.

use std::io::ErrorKind;

/// A failed request, at either end of the connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection was closed, failed or timed out.
    #[error("{}", describe(.0))]
    Connection(#[from] std::io::Error),
    #[error("the connection was closed")]
    Closed,
    #[error("busy")]
    Busy,
    #[error("late")]
    TimedOut,
    /// The peer sent something that the protocol does not allow.
    #[error("{0}")]
    Protocol(String),
    /// The peer does not know the run's secret.
    #[error("authentication failed: the peer belongs to another run")]
    Unauthenticated,
    /// The keeper cannot do what was requested; the connection remains usable.
    #[error("{0}")]
    Refused(String),
}

fn describe(error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "no reply in time".into(),
        ErrorKind::UnexpectedEof => "the connection was closed".into(),
        _ => error.to_string(),
    }
}

impl From<nix::Error> for Error {
    fn from(error: nix::Error) -> Error {
        Error::Connection(error.into())
    }
}
