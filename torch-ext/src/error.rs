//! Errors of the C++ edge.

/// What libtorch said went wrong: the first line of the C++ exception's message.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    /// An error with a message of our own.
    pub fn new(message: impl Into<String>) -> Error {
        Error(message.into())
    }

    /// Keeps the sentence and drops the C++ stack trace that c10 appends.
    pub(crate) fn from_cpp(message: &str) -> Error {
        let sentence = message
            .split("\nException raised from")
            .next()
            .unwrap_or(message);
        Error(sentence.trim().to_string())
    }
}
