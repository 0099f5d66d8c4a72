//! Errors with a hint: `error: what: cause`, then `hint: fix`.

use anyhow::Result;
pub(crate) use dataset::printable::{one_line, printable};
use std::fmt;

/// An error and how to fix it. Displays as the error alone; [`message`] adds the hint.
#[derive(Debug)]
struct Hinted {
    error: anyhow::Error,
    hint: String,
}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl std::error::Error for Hinted {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// Adds a hint to an error, which stays readable through later context.
pub(crate) fn hinted(error: anyhow::Error, hint: impl Into<String>) -> anyhow::Error {
    let hint = hint.into();
    anyhow::Error::new(Hinted { error, hint })
}

pub(crate) trait WithHint<T> {
    /// Adds a hint to the error, if there is one.
    fn hint(self, hint: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<anyhow::Error>> WithHint<T> for Result<T, E> {
    fn hint(self, hint: impl Into<String>) -> Result<T> {
        self.map_err(|error| hinted(error.into(), hint))
    }
}

/// Returns `what: cause`, and a second line `hint: fix` if the error has a hint. Text from files is
/// [`printable`].
pub(crate) fn message(error: &anyhow::Error) -> String {
    let text = match error.downcast_ref::<Hinted>() {
        Some(Hinted { hint, .. }) => format!("{error:#}\nhint: {hint}"),
        None => format!("{error:#}"),
    };
    printable(&text)
}

#[cfg(test)]
mod tests {
    use super::{WithHint, message};
    use anyhow::{Context, Result, anyhow};

    #[test]
    fn a_hint_is_the_last_line_whatever_context_is_added() {
        let result: Result<()> = Err(anyhow!("no space left")).context("cannot write x");
        let result = result.hint("free some space").context("checkpoint");
        let text = message(&result.unwrap_err());
        assert_eq!(
            text,
            "checkpoint: cannot write x: no space left\nhint: free some space"
        );
        assert_eq!(message(&anyhow!("plain")), "plain");
    }

    #[test]
    fn text_from_files_cannot_control_the_terminal() {
        assert_eq!(message(&anyhow!("a\u{1b}[31mred\n")), "a\\u001b[31mred\n");
    }
}
