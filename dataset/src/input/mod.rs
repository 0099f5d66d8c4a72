//! Documents from files: text, JSON Lines and Parquet, compressed or not.
//!
//! Text is passed on as it is, in UTF-8. The same rules hold for all formats, for each row:
//!
//! - Bytes that are not UTF-8, and halves of surrogate pairs, become U+FFFD.
//! - A byte order mark at the start of a file or of a text is removed. Files that start with the
//!   mark of UTF-16 or UTF-32 are decoded.
//! - NUL and CR LF stay. NaN and Infinity in other fields of JSON are accepted.
//! - A row that is not JSON, or is no text, is left out. So are nulls and empty documents. A file
//!   of which more than half of the rows cannot be used is an error.
//! - A document is empty if it has nothing but white space, however much. White space at the start
//!   of a document with text stays, up to [`MAX_PIECE`]; the rest of it is left out.
//!
//! [`InputCounts`] counts every case. [`InputOptions::strict`] turns each into an error, except
//! empty documents.
//!
//! Memory does not depend on the size of a file or of a text document. A row of JSON is held
//! whole, up to [`MAX_ROW`], and so is a page of Parquet, up to [`MAX_PAGE`].

mod compression;
mod counts;
mod document;
mod encoding;
mod fields;
mod file;
mod find;
mod json;
mod options;
mod parquet_rows;
mod recognize;
mod text;
mod unused;

pub use self::{
    counts::InputCounts,
    document::{MAX_PIECE, Piece},
    file::InputFile,
    find::{Found, find},
    json::MAX_ROW,
    options::{InputOptions, Split, TextKey},
    parquet_rows::MAX_PAGE,
};

#[cfg(test)]
mod tests;
