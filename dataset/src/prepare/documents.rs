//! Numbers of documents, as their pieces are read.

use crate::{Error, input::Piece};

/// Follows the documents of a file.
#[derive(Debug, Default)]
pub(super) struct Documents {
    ended: u64,
}

impl Documents {
    /// Takes the next piece of the file, and returns the number of its document.
    pub(super) fn next(&mut self, piece: &Piece) -> u64 {
        let document = self.ended;
        self.ended += u64::from(piece.ends_document);
        document
    }

    /// Returns the number of documents that have ended.
    pub(super) fn ended(&self) -> u64 {
        self.ended
    }
}

/// Returns the error that ends the reading of a file early; its caller drops it.
pub(super) fn stop() -> Error {
    Error::Data("reading was stopped".into())
}
