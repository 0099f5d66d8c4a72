//! The rules for text: makes valid pieces of documents from bytes, and counts what is odd.

use super::counts::InputCounts;
use crate::{Error, char_boundary::floor_char_boundary};
use memchr::{memchr, memchr_iter, memmem, memrchr};
use std::fmt;

/// Largest number of bytes of a piece.
pub const MAX_PIECE: usize = 2 << 20;

/// Rows after which a file without any usable row is refused.
const EARLY_CHECK: u64 = 1000;

/// Fewest invalid bytes that make a text unusable, if they are more than a tenth of it.
const MIN_INVALID: usize = 64;

/// A part of a document.
///
/// A document of more than [`MAX_PIECE`] bytes comes in several pieces. They are cut at line ends
/// or, in longer lines, between characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The text of the part.
    pub text: &'a str,
    /// True if the next piece belongs to another document.
    pub ends_document: bool,
}

/// A position in a file, counted from one.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    File,
    /// The line at which a text begins; errors name the line inside of the text.
    Text(u64),
    /// The line of a row.
    Line(u64),
    /// A row of a table.
    Row(u64),
    /// An element of a JSON array.
    Element(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => Ok(()),
            Self::Text(line) | Self::Line(line) => write!(f, ":{line}"),
            Self::Row(row) => write!(f, ": row {row}"),
            Self::Element(element) => write!(f, ": element {element}"),
        }
    }
}

/// A property of a document that is counted, or refused in strict mode.
#[derive(Debug, Clone, Copy)]
pub(super) enum Odd {
    InvalidUtf8,
    LoneSurrogate,
    NonFinite,
    Nul,
    ByteOrderMark,
    CrLf,
    Transcoded,
    MissingPart,
    JsonAsText,
    LeadingSpace,
}

impl Odd {
    const NUMBER: usize = 10;

    fn count(self, counts: &mut InputCounts) -> &mut u64 {
        match self {
            Self::InvalidUtf8 => &mut counts.invalid_utf8,
            Self::LoneSurrogate => &mut counts.lone_surrogates,
            Self::NonFinite => &mut counts.non_finite,
            Self::Nul => &mut counts.nul,
            Self::ByteOrderMark => &mut counts.byte_order_marks,
            Self::CrLf => &mut counts.crlf,
            Self::Transcoded => &mut counts.transcoded,
            Self::MissingPart => &mut counts.missing_parts,
            Self::JsonAsText => &mut counts.json_as_text,
            Self::LeadingSpace => &mut counts.leading_space,
        }
    }

    fn message(self) -> &'static str {
        match self {
            Self::InvalidUtf8 => {
                "bytes that are not UTF-8 (without --strict, U+FFFD replaces them)"
            }
            Self::LoneSurrogate => {
                "half of a surrogate pair (without --strict, U+FFFD replaces it)"
            }
            Self::NonFinite => "NaN or Infinity, which JSON lacks (accepted without --strict)",
            Self::Nul => "a NUL character (kept without --strict)",
            Self::ByteOrderMark => "a byte order mark (removed without --strict)",
            Self::CrLf => "a line end of CR LF (kept without --strict)",
            Self::Transcoded => "text in UTF-16 or UTF-32 (decoded without --strict)",
            Self::MissingPart => {
                "one of several keys is missing or null (without --strict, the \
                 row is read without it)"
            }
            Self::JsonAsText => {
                "the text looks like JSON: with the suffix .jsonl, its fields are \
                 read (read as text without --strict)"
            }
            Self::LeadingSpace => {
                "more than 2 MiB of white space before the text (without --strict, the rest of it \
                 is left out)"
            }
        }
    }
}

/// A reason to leave a row out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    NotJson(String),
    /// No text under the key; these are the fields that the row has.
    NoKey {
        key: String,
        fields: String,
    },
    Null,
    WrongType(&'static str),
    NotObject,
    NotText,
    TooLong(usize),
}

impl Fault {
    fn count<'c>(&self, counts: &'c mut InputCounts) -> &'c mut u64 {
        match self {
            Self::NotJson(_) => &mut counts.not_json,
            Self::NoKey { .. } => &mut counts.no_key,
            Self::Null => &mut counts.nulls,
            Self::WrongType(_) | Self::NotObject => &mut counts.wrong_type,
            Self::NotText => &mut counts.not_text,
            Self::TooLong(_) => &mut counts.too_long,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotJson(cause) => write!(f, "not JSON: {cause}"),
            Self::NoKey { key, fields } => {
                write!(
                    f,
                    "no text under the key {key:?}: {fields} (choose another with --text-key)"
                )
            }
            Self::Null => f.write_str("the text is null"),
            Self::WrongType(kind) => {
                write!(
                    f,
                    "the text is {kind} (choose another field with --text-key)"
                )
            }
            Self::NotObject => f.write_str("the row is not a JSON object"),
            Self::NotText => f.write_str(
                "more than a tenth of the bytes is not UTF-8 (convert the file, for example with \
                 iconv -f CP1252 -t UTF-8)",
            ),
            Self::TooLong(limit) => write!(f, "longer than {} MiB", limit >> 20),
        }
    }
}

/// True if replacing the bytes that are not UTF-8 would destroy the text.
pub(super) fn is_mostly_invalid(bytes: &[u8]) -> bool {
    if std::str::from_utf8(bytes).is_ok() {
        return false;
    }
    let invalid: usize = bytes.utf8_chunks().map(|chunk| chunk.invalid().len()).sum();
    invalid >= MIN_INVALID && invalid * 10 > bytes.len()
}

/// Receiver of the documents of one file.
pub(super) struct Documents<'a> {
    file: String,
    strict: bool,
    pub(super) max_piece: usize,
    counts: &'a mut InputCounts,
    take: &'a mut dyn FnMut(Piece) -> Result<(), Error>,
    place: Place,
    text: String,
    /// The start of a character of which the rest has not come.
    incomplete: Vec<u8>,
    ends_in_cr: bool,
    /// True once the start of the document was checked for a byte order mark.
    start_checked: bool,
    /// True once a piece of the document was passed on.
    started: bool,
    /// Bytes of white space at the start of `text`, as far as they were searched for.
    blank: usize,
    /// If white space at the start of the document was left out: the bytes of it that stay.
    kept_space: Option<usize>,
    noticed: [bool; Odd::NUMBER],
    /// Line ends of the document's earlier pieces.
    lines_before: u64,
    rows: u64,
    unusable: u64,
    first_unusable: Option<String>,
}

impl<'a> Documents<'a> {
    pub(super) fn new(
        file: String,
        strict: bool,
        counts: &'a mut InputCounts,
        take: &'a mut dyn FnMut(Piece) -> Result<(), Error>,
    ) -> Self {
        Self {
            file,
            strict,
            max_piece: MAX_PIECE,
            counts,
            take,
            place: Place::File,
            text: String::new(),
            incomplete: Vec::new(),
            ends_in_cr: false,
            start_checked: false,
            started: false,
            blank: 0,
            kept_space: None,
            noticed: [false; Odd::NUMBER],
            lines_before: 0,
            rows: 0,
            unusable: 0,
            first_unusable: None,
        }
    }

    /// Returns an error that names the file and a place in it.
    pub(super) fn error(&self, place: Place, cause: impl fmt::Display) -> Error {
        Error::Data(format!("{}{place}: {cause}", self.file))
    }

    /// Returns an error of reading the file.
    pub(super) fn io_error(&self, cause: std::io::Error) -> Error {
        Error::Io {
            action: "cannot read",
            path: self.file.clone(),
            cause,
        }
    }

    /// Starts a document, which counts as a row.
    pub(super) fn begin(&mut self, place: Place) {
        self.place = place;
        self.text.clear();
        self.incomplete.clear();
        self.ends_in_cr = false;
        self.start_checked = false;
        self.started = false;
        self.blank = 0;
        self.kept_space = None;
        self.noticed = [false; Odd::NUMBER];
        self.lines_before = 0;
        self.rows += 1;
        self.counts.rows += 1;
    }

    /// Counts a property of the current document, or of the file before the first document.
    pub(super) fn notice(&mut self, odd: Odd) -> Result<(), Error> {
        if self.strict {
            let place = match self.place {
                Place::Text(line) => {
                    let lines = memchr_iter(b'\n', self.text.as_bytes()).count() as u64;
                    Place::Text(line + self.lines_before + lines)
                }
                place => place,
            };
            return Err(self.error(place, odd.message()));
        }
        let noticed = &mut self.noticed[odd as usize];
        if !*noticed {
            *noticed = true;
            *odd.count(self.counts) += 1;
        }
        Ok(())
    }

    /// Leaves a row out, or refuses it in strict mode.
    pub(super) fn leave_out(&mut self, place: Place, fault: &Fault) -> Result<(), Error> {
        if self.strict {
            return Err(self.error(place, format!("{fault} (left out without --strict)")));
        }
        self.rows += 1;
        self.counts.rows += 1;
        *fault.count(self.counts) += 1;
        let example = || format!("{}{place}: {fault}", self.file);
        self.counts.add_example(example);
        // Nulls say nothing about the file's format, so they are no sign of a wrong key.
        if *fault != Fault::Null {
            self.unusable += 1;
            self.first_unusable.get_or_insert_with(example);
        }
        if self.unusable == EARLY_CHECK && self.rows == EARLY_CHECK {
            return self.check_share();
        }
        Ok(())
    }

    fn check_share(&self) -> Result<(), Error> {
        match &self.first_unusable {
            Some(first) if self.unusable * 2 > self.rows => Err(Error::Data(format!(
                "{}: {} of {} rows cannot be used, the first is {first}",
                self.file, self.unusable, self.rows
            ))),
            _ => Ok(()),
        }
    }

    /// Checks the whole file and counts it.
    ///
    /// # Errors
    /// If more than half of the rows could not be used.
    pub(super) fn finish(self) -> Result<(), Error> {
        self.check_share()?;
        self.counts.files += 1;
        Ok(())
    }

    /// Appends bytes to the document. Characters may span several calls.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut rest = bytes;
        while !self.incomplete.is_empty() {
            let Some(&next) = rest.first() else {
                return Ok(());
            };
            self.incomplete.push(next);
            match std::str::from_utf8(&self.incomplete) {
                Ok(text) => {
                    let text = text.to_string();
                    self.incomplete.clear();
                    self.push(&text)?;
                }
                Err(error) if error.error_len().is_none() => {}
                Err(_) => {
                    self.end_character()?;
                    break;
                }
            }
            rest = &rest[1..];
        }
        if let Ok(text) = std::str::from_utf8(rest) {
            return self.push(text);
        }
        let mut end = 0;
        for chunk in rest.utf8_chunks() {
            self.push(chunk.valid())?;
            let invalid = chunk.invalid();
            end += chunk.valid().len() + invalid.len();
            let is_cut = || std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if end == rest.len() && is_cut() {
                self.incomplete.extend(invalid);
            } else if !invalid.is_empty() {
                self.replace(Odd::InvalidUtf8)?;
            }
        }
        Ok(())
    }

    /// Appends text to the document.
    pub(super) fn text(&mut self, text: &str) -> Result<(), Error> {
        self.end_character()?;
        self.push(text)
    }

    /// Appends U+FFFD in place of something that is no text.
    pub(super) fn replace(&mut self, odd: Odd) -> Result<(), Error> {
        self.end_character()?;
        self.notice(odd)?;
        self.push("\u{FFFD}")
    }

    /// Replaces a character of which only the start has come.
    fn end_character(&mut self) -> Result<(), Error> {
        if self.incomplete.is_empty() {
            return Ok(());
        }
        self.incomplete.clear();
        self.notice(Odd::InvalidUtf8)?;
        self.push("\u{FFFD}")
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        if text.is_empty() {
            return Ok(());
        }
        if self.strict {
            // Errors name the line, so the text before is appended first.
            let crlf = find_crlf(text, self.ends_in_cr);
            let nul = memchr(0, text.as_bytes());
            if let Some(at) = [crlf, nul].into_iter().flatten().min() {
                self.append(&text[..at])?;
                return self.notice(if nul == Some(at) { Odd::Nul } else { Odd::CrLf });
            }
        } else {
            if !self.noticed[Odd::Nul as usize] && memchr(0, text.as_bytes()).is_some() {
                self.notice(Odd::Nul)?;
            }
            let crlf_known = self.noticed[Odd::CrLf as usize];
            if !crlf_known && find_crlf(text, self.ends_in_cr).is_some() {
                self.notice(Odd::CrLf)?;
            }
        }
        self.ends_in_cr = text.ends_with('\r');
        self.append(text)
    }

    fn append(&mut self, mut text: &str) -> Result<(), Error> {
        while !text.is_empty() {
            let room = (2 * self.max_piece).saturating_sub(self.text.len()).max(4);
            let head = floor_char_boundary(text, room);
            self.text.push_str(&text[..head]);
            text = &text[head..];
            while self.text.len() > self.max_piece {
                self.check_start()?;
                self.limit_space();
                if !self.is_blank() {
                    self.note_lost_space()?;
                    self.pass_piece()?;
                }
            }
        }
        Ok(())
    }

    /// Removes a byte order mark from the document's start.
    fn check_start(&mut self) -> Result<(), Error> {
        if !self.start_checked {
            self.start_checked = true;
            if self.text.starts_with('\u{FEFF}') {
                self.notice(Odd::ByteOrderMark)?;
                self.text.drain(..'\u{FEFF}'.len_utf8());
            }
        }
        Ok(())
    }

    /// True if the document has been nothing but white space.
    fn is_blank(&mut self) -> bool {
        self.find_blank();
        !self.started && self.blank == self.text.len()
    }

    /// Finds the end of the white space at the document's start.
    fn find_blank(&mut self) {
        if !self.started {
            self.blank = self.text.len() - self.text[self.blank..].trim_start().len();
        }
    }

    /// Leaves out white space at the document's start that is more than a piece. Only the text
    /// after it tells that the document is not empty. Nothing is passed on before that is known.
    fn limit_space(&mut self) {
        self.find_blank();
        let longest = || floor_char_boundary(&self.text, self.max_piece);
        let end = self.kept_space.unwrap_or_else(longest);
        if self.started || self.blank <= end {
            return;
        }
        let lost = &self.text.as_bytes()[end..self.blank];
        self.lines_before += memchr_iter(b'\n', lost).count() as u64;
        self.text.drain(end..self.blank);
        self.blank = end;
        self.kept_space = Some(end);
    }

    /// Counts white space that was left out of a document with text.
    fn note_lost_space(&mut self) -> Result<(), Error> {
        if self.kept_space.take().is_none() {
            return Ok(());
        }
        if self.strict {
            // The error names the line at which the text begins.
            self.text.truncate(self.blank);
        }
        self.notice(Odd::LeadingSpace)
    }

    /// Passes on a piece of a document that continues, if there is more than one piece of text.
    fn pass_piece(&mut self) -> Result<(), Error> {
        if self.text.len() <= self.max_piece {
            return Ok(());
        }
        let longest = floor_char_boundary(&self.text, self.max_piece);
        let line_end = memrchr(b'\n', &self.text.as_bytes()[..longest]);
        let end = line_end.map_or(longest, |at| at + 1);
        let piece = &self.text[..end];
        if self.strict {
            self.lines_before += memchr_iter(b'\n', piece.as_bytes()).count() as u64;
        }
        self.counts.bytes += piece.len() as u64;
        (self.take)(Piece {
            text: piece,
            ends_document: false,
        })?;
        self.started = true;
        self.text.drain(..end);
        Ok(())
    }

    /// Ends the document, and counts it as empty or passes on what is left.
    pub(super) fn end(&mut self) -> Result<(), Error> {
        self.end_character()?;
        self.check_start()?;
        self.limit_space();
        if self.is_blank() {
            self.counts.empty += 1;
            return Ok(());
        }
        self.note_lost_space()?;
        self.counts.documents += 1;
        self.counts.bytes += self.text.len() as u64;
        (self.take)(Piece {
            text: &self.text,
            ends_document: true,
        })
    }
}

/// Returns the place of the first LF after a CR.
fn find_crlf(text: &str, after_cr: bool) -> Option<usize> {
    if after_cr && text.starts_with('\n') {
        return Some(0);
    }
    memchr(b'\r', text.as_bytes())?;
    memmem::find(text.as_bytes(), b"\r\n").map(|at| at + 1)
}
