//! The known name that is most like an unknown one.

use crate::hint::hinted;
use anyhow::Error;

/// Similarity (Jaro-Winkler) from which a known name is suggested for an unknown one.
const MIN_SIMILARITY: f64 = 0.7;

/// Adds a hint with a name that was probably meant, if there is one.
pub(super) fn suggest(error: Error, name: Option<&str>) -> Error {
    match name {
        Some(name) => hinted(error, format!("did you mean {name}?")),
        None => error,
    }
}

/// Returns the known name that is most like the unknown one in a message of serde.
pub(super) fn nearest_known_name(message: &str) -> Option<&str> {
    let first_line = message.lines().next().unwrap_or(message);
    ["unknown field", "unknown variant"]
        .iter()
        .filter_map(|kind| first_line.split_once(kind))
        .find_map(|(_, rest)| nearest_of_list(rest))
}

/// Returns the known name that is most like the unknown one.
///
/// `text` is "`wrong`, expected one of `a`, `b`".
fn nearest_of_list(text: &str) -> Option<&str> {
    let mut quoted = text.split('`').skip(1).step_by(2);
    let wrong = quoted.next()?;
    nearest(wrong, quoted)
}

/// Returns the known name that is most like the unknown one, if any is alike.
pub(crate) fn nearest<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|name| (strsim::jaro_winkler(wrong, name), name))
        .filter(|(similarity, _)| *similarity > MIN_SIMILARITY)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}
