//! The error type of this crate.

use checkpoint::keeper;
use parallel::agreement::AgreementError;
use std::path::Path;

/// An error whose message is complete: it names the file, key or rank.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot run.
    #[error("{0}")]
    Config(String),
    /// The folder of a Hugging Face model is damaged, or moerun cannot compute its model.
    #[error("{0}")]
    Folder(String),
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
    /// A token file or a tokenizer cannot be used.
    #[error(transparent)]
    Dataset(#[from] dataset::Error),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// No checkpoint or snapshot can be used, or its state does not fit this run.
    #[error("{0}")]
    Resume(String),
    /// A keeper refused a request: it has no memory for a snapshot, for example.
    #[error("{0}")]
    Keeper(String),
    /// A keeper cannot be reached. The launcher replaces one that is gone.
    #[error("{0}")]
    KeeperAway(String),
    /// Another rank failed, or sent a message that cannot be decoded.
    #[error(transparent)]
    OtherRank(AgreementError),
    /// The ranks' shares of the state are not the state.
    #[error("{0}")]
    SavePlan(String),
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
    /// The loss or the gradient norm is not finite.
    #[error(
        "{} at step {step}: lower the learning rate or train.grad_clip; the last checkpoint is \
         untouched",
        divergence(*loss, *grad_norm)
    )]
    Diverged {
        /// The step that diverged.
        step: u64,
        loss: f64,
        /// Its gradient norm before clipping.
        grad_norm: f64,
    },
}

/// Says which of both is not finite.
fn divergence(loss: f64, grad_norm: f64) -> String {
    if loss.is_finite() {
        format!("the gradient norm is {grad_norm} (the loss is {loss:.4})")
    } else {
        format!("the loss is {loss}")
    }
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

    /// Returns a function that makes an error of the keeper that `which` names, for `map_err`.
    pub(crate) fn keeper(which: &'static str) -> impl Fn(keeper::Error) -> Error {
        move |error| {
            let text = format!("{which}: {error}");
            match error {
                keeper::Error::Connection(_)
                | keeper::Error::Closed
                | keeper::Error::TimedOut
                | keeper::Error::Busy => Error::KeeperAway(text),
                keeper::Error::Protocol(_)
                | keeper::Error::TooLong { .. }
                | keeper::Error::Unauthenticated
                | keeper::Error::Refused(_) => Error::Keeper(text),
            }
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
    fn a_divergence_names_what_is_not_finite() {
        let text = |loss, grad_norm| {
            let step = 3;
            Error::Diverged {
                step,
                loss,
                grad_norm,
            }
            .to_string()
        };
        let norm = text(6.238, f64::INFINITY);
        assert!(
            norm.starts_with("the gradient norm is inf (the loss is 6.2380) at step 3: "),
            "{norm}"
        );
        assert!(text(f64::NAN, f64::NAN).starts_with("the loss is NaN at step 3: "));
    }

    #[test]
    fn an_error_of_the_system_is_named_once() {
        let error = Error::io("cannot read", "x")(std::io::Error::other("it is gone"));
        assert_eq!(error.to_string(), "cannot read x: it is gone");
        assert!(error.source().is_none(), "it would be printed again");
    }
}
