//! A document from the fields of a row, for all formats that have rows.

use super::document::{Documents, Fault, Odd, Place, is_mostly_invalid};
use crate::Error;

/// The contents of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'r> {
    Missing,
    Null,
    /// Bytes of text, perhaps with escapes.
    Text(&'r [u8]),
    /// Something else, with its article.
    Other(&'static str),
}

/// A row and the properties that are counted.
#[derive(Debug)]
pub(super) struct Row<'r> {
    /// The values of the keys, in their order. One at least is not missing.
    pub(super) values: Vec<Value<'r>>,
    /// True if there is a NaN or an infinity somewhere.
    pub(super) non_finite: bool,
}

/// Passes on the texts of a row as one document. `push` appends one of them.
pub(super) fn take_row(
    documents: &mut Documents,
    place: Place,
    row: &Row,
    push: fn(&mut Documents, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    if let Some(fault) = find_fault(row) {
        return documents.leave_out(place, &fault);
    }
    documents.begin(place);
    if row.non_finite {
        documents.notice(Odd::NonFinite)?;
    }
    let mut is_first = true;
    for value in &row.values {
        match value {
            Value::Text([]) => {}
            Value::Text(text) => {
                if !is_first {
                    documents.text("\n\n")?;
                }
                is_first = false;
                push(documents, text)?;
            }
            _ => documents.notice(Odd::MissingPart)?,
        }
    }
    documents.end()
}

fn find_fault(row: &Row) -> Option<Fault> {
    let mut texts = 0;
    for value in &row.values {
        match value {
            Value::Other(kind) => return Some(Fault::WrongType(kind)),
            Value::Text(text) if is_mostly_invalid(text) => return Some(Fault::NotText),
            Value::Text(_) => texts += 1,
            Value::Missing | Value::Null => {}
        }
    }
    (texts == 0).then_some(Fault::Null)
}
