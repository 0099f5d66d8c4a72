//! The error type of this crate.

use parallel::agreement::AgreementError;
use std::path::Path;

/// An error whose message is complete: it names the file, key or rank.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot run.
    #[error("{0}")]
    Config(String),
    /// A data file is damaged or too small, or holds no usable text.
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
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// No checkpoint or snapshot can be used, or its state does not fit this run.
    #[error("{0}")]
    Resume(String),
    /// A keeper cannot be reached, or has no memory for a snapshot.
    #[error("{0}")]
    Keeper(String),
    /// Another rank failed, or sent a message that cannot be decoded.
    #[error(transparent)]
    OtherRank(AgreementError),
    /// Experts cannot move as the placement says.
    #[error("{0}")]
    Placement(String),
    /// A collective failed on this or another rank.
    #[error(transparent)]
    Comm(#[from] parallel::CommError),
    /// An operation of libtorch failed.
    #[error(transparent)]
    Torch(#[from] torch_ext::Error),
    /// An operation of libtorch failed, as tch reports it.
    #[error("libtorch: {0}")]
    Tch(#[from] tch::TchError),
    /// The loss is not finite.
    #[error(
        "the loss is {loss} at step {step}: lower the learning rate or train.grad_clip; the last \
         checkpoint is untouched"
    )]
    Diverged {
        /// The step with that loss.
        step: u64,
        /// The loss, NaN or infinite.
        loss: f64,
    },
}

impl Error {
    /// Returns a function that makes an input or output error on `path`, for `map_err`.
    pub fn io(
        action: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().display().to_string();
        move |cause| Error::Io {
            action,
            path,
            cause,
        }
    }
}

impl From<AgreementError> for Error {
    fn from(error: AgreementError) -> Error {
        match error {
            AgreementError::Comm(error) => Error::Comm(error),
            error => Error::OtherRank(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Error;
    use std::error::Error as _;

    #[test]
    fn an_error_of_the_system_is_named_once() {
        let error = Error::io("cannot read", "x")(std::io::Error::other("it is gone"));
        assert_eq!(error.to_string(), "cannot read x: it is gone");
        assert!(error.source().is_none(), "it would be printed again");
    }
}
