//! Numbers of documents, as their pieces are read.

use crate::{Error, input::Piece};

/// Follows the documents of a file.
#[derive(Debug, Default)]
pub(super) struct Documents {
    ended: u64,
    is_open: bool,
}

/// The place of a piece in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Number of its document.
    pub(super) document: u64,
    /// True if the document begins with it.
    pub(super) begins: bool,
}

impl Documents {
    /// Takes the next piece of the file.
    pub(super) fn next(&mut self, piece: &Piece) -> Place {
        let place = Place {
            document: self.ended,
            begins: !self.is_open,
        };
        self.is_open = !piece.ends_document;
        self.ended += u64::from(piece.ends_document);
        place
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
