//! The error type of this crate.

use std::path::Path;

/// An error whose message is complete: it names the file, the row or the option.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option is invalid.
    #[error("{0}")]
    Options(String),
    /// A file is damaged or too small, or holds no usable text.
    #[error("{0}")]
    Data(String),
    /// A tokenizer cannot be read, trained or applied.
    #[error("{0}")]
    Tokenizer(String),
    /// A file could not be read or written.
    #[error("{action} {path}: {cause}")]
    Io {
        /// The failed action, such as `cannot write`.
        action: &'static str,
        /// The file or folder.
        path: String,
        /// The operating system's error. Not a source: it is part of the message.
        cause: std::io::Error,
    },
}

impl Error {
    /// Returns a function for `map_err` that adds the action and the path.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.display().to_string();
        move |cause| Error::Io {
            action,
            path,
            cause,
        }
    }
}
