//! Errors with a hint: `error: what: cause`, then `hint: fix`.

use anyhow::Result;
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

/// Escapes what makes a terminal do something else than show text: control characters except line
/// ends and tabs, and marks that change the direction of writing.
pub(crate) fn printable(text: &str) -> String {
    escape(text, |c| c == '\n' || c == '\t')
}

/// Like [`printable`], also for line ends and tabs: for names and values from files, which could
/// otherwise pretend to be a line of moerun.
pub(crate) fn one_line(text: &str) -> String {
    escape(text, |_| false)
}

fn escape(text: &str, keeps: fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if is_control(c) && !keeps(c) {
            match c {
                '\n' => escaped.push_str("\\n"),
                '\r' => escaped.push_str("\\r"),
                '\t' => escaped.push_str("\\t"),
                // The form of JSON: lines of JSON stay valid.
                c => escaped.push_str(&format!("\\u{:04x}", u32::from(c))),
            }
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// True for control characters, line and paragraph separators, and bidirectional marks.
fn is_control(c: char) -> bool {
    let is_mark = matches!(
        c,
        '\u{61c}'
            | '\u{200e}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}'
    );
    c.is_control() || is_mark
}

#[cfg(test)]
mod tests {
    use super::{WithHint, message, one_line, printable};
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
        let text = "a\u{1b}[31mred\r\u{7f}\u{9b}2J\u{202e}\n\tgrößer 模型 🙂";
        let shown = "a\\u001b[31mred\\r\\u007f\\u009b2J\\u202e\n\tgrößer 模型 🙂";
        assert_eq!(printable(text), shown);
        assert_eq!(
            one_line(text),
            shown.replace('\n', "\\n").replace('\t', "\\t")
        );
        assert_eq!(message(&anyhow!("{text}")), shown);
    }
}
