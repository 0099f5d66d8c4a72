//! What can go wrong while training.

/// An error with the whole sentence for the person who started the run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot work.
    #[error("{0}")]
    Config(String),
    /// A data file is missing, damaged or too small.
    #[error("{0}")]
    Data(String),
    /// A file could not be read or written.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried, such as `cannot write`.
        action: &'static str,
        /// The file or folder.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] parallel::CommError),
    /// libtorch refused an operation.
    #[error(transparent)]
    Torch(#[from] torch_ext::Error),
    /// libtorch refused an operation, as tch reports it.
    #[error("libtorch: {0}")]
    Tch(#[from] tch::TchError),
    /// The loss is not a number any more.
    #[error(
        "the loss is {loss} at step {step}: lower the learning rate or train.grad_clip; the last checkpoint is untouched"
    )]
    Diverged {
        /// The step it happened in.
        step: u64,
        /// Its loss.
        loss: f64,
    },
}

impl Error {
    /// An input or output error of `path`.
    pub fn io(
        action: &'static str,
        path: impl AsRef<std::path::Path>,
    ) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().display().to_string();
        move |source| Error::Io {
            action,
            path,
            source,
        }
    }
}

impl From<parallel::agreement::AgreementError> for Error {
    fn from(error: parallel::agreement::AgreementError) -> Error {
        match error {
            parallel::agreement::AgreementError::Comm(error) => Error::Comm(error),
            other => Error::Data(other.to_string()),
        }
    }
}
