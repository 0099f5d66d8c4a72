//! Errors that say how to fix them.

use std::fmt::{Display, Formatter};

/// An error with a hint, printed as `error: what` and `hint: fix`.
#[derive(Debug)]
pub(crate) struct Failure {
    pub what: String,
    pub hint: String,
}

impl Failure {
    pub(crate) fn new(what: impl Into<String>, hint: impl Into<String>) -> Failure {
        Failure {
            what: what.into(),
            hint: hint.into(),
        }
    }
}

impl Display for Failure {
    fn fmt(&self, out: &mut Formatter<'_>) -> std::fmt::Result {
        out.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}
