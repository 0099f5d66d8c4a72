//! The reason why a run ends before it is done.

/// Shown as `error: message`, then `hint: hint`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Problem {
    pub(crate) fn new(message: impl Into<String>) -> Problem {
        Problem {
            message: message.into(),
            hint: None,
        }
    }

    pub(crate) fn hint(self, hint: impl Into<String>) -> Problem {
        Problem {
            hint: Some(hint.into()),
            ..self
        }
    }

    /// Puts a reason before the message.
    pub(crate) fn because(self, reason: &str) -> Problem {
        let message = format!("{reason}: {}", self.message);
        Problem { message, ..self }
    }
}
