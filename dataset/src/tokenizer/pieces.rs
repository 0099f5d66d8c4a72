//! The encoding of one document that comes in pieces, with the ids of the whole.

use super::{DocumentTokenizer, library::Cut};
use crate::{Error, char_boundary::floor_char_boundary};

/// Text is encoded once this much is pending. Memory of the encoder stays in proportion to it.
const PENDING: usize = 1 << 20;

/// Text without a place to cut is refused when it is this long.
const MAX_PENDING: usize = 1 << 26;

/// An encoder for one document that comes in pieces.
///
/// It holds text back until it finds a place at which a cut changes no id: about 1 MiB, and at
/// most 64 MiB.
pub struct DocumentEncoder<'a> {
    tokenizer: &'a DocumentTokenizer,
    pending: String,
}

impl<'a> DocumentEncoder<'a> {
    pub(super) fn new(tokenizer: &'a DocumentTokenizer) -> DocumentEncoder<'a> {
        DocumentEncoder {
            tokenizer,
            pending: String::new(),
        }
    }

    /// Adds a piece, and appends the ids that are known by now.
    ///
    /// # Errors
    /// If a part of the text would be lost, or 64 MiB of text cannot be cut.
    pub fn push(&mut self, piece: &str, into: &mut Vec<u32>) -> Result<(), Error> {
        self.pending.push_str(piece);
        if self.pending.len() <= PENDING {
            return Ok(());
        }
        match self.tokenizer.last_cut(&self.pending) {
            Some(Cut { end, start }) => {
                self.tokenizer.encode(&self.pending[..end], into)?;
                self.pending.drain(..start);
                Ok(())
            }
            None if self.pending.len() <= MAX_PENDING => Ok(()),
            None => Err(Error::Tokenizer(format!(
                "a document has {} bytes in which it cannot be cut without a change of its \
                 tokens (split the document)",
                self.pending.len()
            ))),
        }
    }

    /// Appends the remaining ids.
    ///
    /// # Errors
    /// As those of [`push`](Self::push).
    pub fn finish(self, into: &mut Vec<u32>) -> Result<(), Error> {
        self.tokenizer.encode(&self.pending, into)
    }
}

impl DocumentTokenizer {
    /// Returns the last place at which the beginning of a document can be cut, whatever follows it.
    pub(crate) fn last_cut(&self, text: &str) -> Option<Cut> {
        let Some(fast) = &self.fast else {
            // What follows the last bytes is not known yet.
            let end = floor_char_boundary(text, text.len().saturating_sub(PENDING / 8));
            return self.library.last_cut(text, end);
        };
        fast.last_cut(text).map(|end| Cut { end, start: end })
    }
}
