//! Positions between the characters of a text.
//!
//! The standard library has these functions from Rust 1.91 on.

/// Returns the last boundary of characters at or before `index`, or the text's end.
pub(crate) fn floor_char_boundary(text: &str, index: usize) -> usize {
    let mut index = index.min(text.len());
    while !text.is_char_boundary(index) {
        index -= 1;
    }
    index
}

/// Returns the first boundary of characters at or after `index`, or the text's end.
pub(crate) fn ceil_char_boundary(text: &str, index: usize) -> usize {
    let mut index = index.min(text.len());
    while !text.is_char_boundary(index) {
        index += 1;
    }
    index
}
