//! Rows of JSON Lines, or elements of one JSON array.

mod row;
mod scan;

use self::scan::{Elements, Found, MAX_KEPT};
use super::{
    document::{Documents, Fault, Place},
    fields::take_row,
    options::TextKey,
};
use crate::Error;
use memchr::memchr;
use std::io::{self, BufRead};

/// Largest number of bytes of a row of JSON. Longer rows are left out and counted.
pub const MAX_ROW: usize = 256 << 20;

/// Passes on the documents of a file.
///
/// A file that starts with `[` and then `{` or `]` is one array. Any other has a row on each line.
pub(super) fn read(
    reader: &mut dyn BufRead,
    key: &TextKey,
    documents: &mut Documents,
) -> Result<(), Error> {
    read_limited(reader, key, documents, MAX_ROW)
}

pub(super) fn read_limited(
    reader: &mut dyn BufRead,
    key: &TextKey,
    documents: &mut Documents,
    max_row: usize,
) -> Result<(), Error> {
    let first = fill(reader).map_err(|cause| documents.io_error(cause))?;
    let is_array = first.trim_ascii_start().strip_prefix(b"[");
    let is_array = is_array.is_some_and(|rest| {
        let rest = rest.trim_ascii_start();
        rest.is_empty() || rest.starts_with(b"{") || rest.starts_with(b"]")
    });
    if is_array {
        read_array(reader, key, documents, max_row)
    } else {
        read_lines(reader, key, documents, max_row)
    }
}

/// Returns the next bytes; none at the end.
fn fill(reader: &mut dyn BufRead) -> io::Result<&[u8]> {
    loop {
        match reader.fill_buf() {
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    reader.fill_buf()
}

fn read_lines(
    reader: &mut dyn BufRead,
    key: &TextKey,
    documents: &mut Documents,
    max_row: usize,
) -> Result<(), Error> {
    let mut row = Vec::new();
    let mut too_long = false;
    let mut line = 1;
    loop {
        let bytes = fill(reader).map_err(|cause| documents.io_error(cause))?;
        let end = memchr(b'\n', bytes);
        let part = &bytes[..end.unwrap_or(bytes.len())];
        let ends = end.is_some() || bytes.is_empty();
        too_long |= row.len() + part.len() > max_row;
        if too_long {
            row.clear();
        } else {
            row.extend_from_slice(part);
        }
        let is_last = bytes.is_empty();
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if ends {
            let place = Place::Line(line);
            if too_long {
                documents.leave_out(place, &Fault::TooLong(max_row))?;
            } else if !row.trim_ascii().is_empty() {
                take(&row, place, key, documents)?;
            }
            row.clear();
            row.shrink_to(MAX_KEPT);
            too_long = false;
            line += 1;
        }
        if is_last {
            return Ok(());
        }
    }
}

fn read_array(
    reader: &mut dyn BufRead,
    key: &TextKey,
    documents: &mut Documents,
    max_row: usize,
) -> Result<(), Error> {
    let mut elements = Elements::new(max_row);
    let mut number = 0;
    loop {
        let bytes = fill(reader).map_err(|cause| documents.io_error(cause))?;
        if bytes.is_empty() {
            let place = Place::Element(number + 1);
            return elements
                .finish()
                .map_err(|cause| documents.error(place, cause));
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let place = Place::Element(number + 1);
            let found = elements.feed(&mut rest);
            match found.map_err(|cause| documents.error(place, cause))? {
                Found::Nothing => break,
                Found::TooLong => documents.leave_out(place, &Fault::TooLong(max_row))?,
                Found::Element(row) => take(row, place, key, documents)?,
            }
            number += 1;
        }
        let used = bytes.len();
        reader.consume(used);
    }
}

fn take(row: &[u8], place: Place, key: &TextKey, documents: &mut Documents) -> Result<(), Error> {
    match row::parse(row, key) {
        Ok(row) => take_row(documents, place, &row, row::push_string),
        Err(fault) => documents.leave_out(place, &fault),
    }
}
