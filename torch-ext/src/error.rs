//! The error type of the C++ bindings.

/// The message of a C++ exception, without its stack trace.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    /// Returns an error with a message of the caller.
    pub fn new(message: impl Into<String>) -> Error {
        Error(message.into())
    }

    /// Drops the C++ stack trace that c10 appends to a message.
    pub(crate) fn from_cpp(message: &str) -> Error {
        let text = message.split("\nException raised from").next();
        Error(text.unwrap_or(message).trim().to_string())
    }
}
