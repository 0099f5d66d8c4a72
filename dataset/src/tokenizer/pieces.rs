//! Places to cut a document of which only the beginning is there.

use super::{DocumentTokenizer, library::Cut};
use crate::char_boundary::floor_char_boundary;

/// Text at the end that the library may need to judge a cut before it, in bytes.
const MARGIN: usize = 128 << 10;

impl DocumentTokenizer {
    /// Returns the last place at which the beginning of a document can be cut, whatever follows it.
    pub(crate) fn last_cut(&self, text: &str) -> Option<Cut> {
        let Some(fast) = &self.fast else {
            // What follows the last bytes is not known yet.
            let end = floor_char_boundary(text, text.len().saturating_sub(MARGIN));
            return self.library.last_cut(text, end);
        };
        fast.last_cut(text).map(|end| Cut { end, start: end })
    }
}
