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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_stay_whole() {
        let ends = [0, 1, 2, 3, 4, usize::MAX];
        assert_eq!(
            ends.map(|end| floor_char_boundary("aéb", end)),
            [0, 1, 1, 3, 4, 4]
        );
        assert_eq!(
            ends.map(|end| ceil_char_boundary("aéb", end)),
            [0, 1, 3, 3, 4, 4]
        );
    }
}
