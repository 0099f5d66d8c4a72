//! Errors of reading and writing checkpoints.

use std::{io::ErrorKind, path::Path};

/// A failure to write or read a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused an operation.
    #[error("{action} {path}: {cause}")]
    Io {
        /// The operation that failed, such as `cannot write`.
        action: &'static str,
        path: String,
        /// Not a source: it is part of the message.
        cause: std::io::Error,
    },
    /// A file contradicts its header, its checksum or the manifest.
    #[error("{path} is damaged: {reason}")]
    Damaged { path: String, reason: String },
    /// A folder of a checkpoint has no manifest.
    #[error("{path} has {contents}: copied in part? move it away to begin again")]
    Partial {
        path: String,
        contents: &'static str,
    },
    /// The tensors differ from the expected ones.
    #[error("{path}: {reason}")]
    Mismatch { path: String, reason: String },
}

impl Error {
    /// True if the files of a checkpoint prove that no version of moerun can use it.
    pub fn is_damage(&self) -> bool {
        matches!(self, Error::Damaged { .. } | Error::Partial { .. })
    }

    /// True if this user may not read it, which says nothing about the contents.
    pub fn is_denied(&self) -> bool {
        matches!(self, Error::Io { cause, .. } if cause.kind() == ErrorKind::PermissionDenied)
    }

    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Error::Io { cause, .. } if cause.kind() == ErrorKind::NotFound)
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.display().to_string();
        move |cause| Error::Io {
            action,
            path,
            cause,
        }
    }

    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Error {
        Error::Damaged {
            path: path.display().to_string(),
            reason: reason.into(),
        }
    }

    pub(crate) fn mismatch(path: &Path, reason: impl Into<String>) -> Error {
        Error::Mismatch {
            path: path.display().to_string(),
            reason: reason.into(),
        }
    }
}
