//! The words that identifiers are made of.

/// Splits a name at `_` and where a capital begins a word, in lower case.
pub(super) fn segments(name: &str) -> Vec<String> {
    let mut segments = vec![String::new()];
    let chars: Vec<char> = name.chars().collect();
    for (at, &c) in chars.iter().enumerate() {
        let after_lower = at > 0 && !chars[at - 1].is_uppercase();
        let before_lower = chars.get(at + 1).is_some_and(|next| next.is_lowercase());
        if c == '_' || (c.is_uppercase() && (after_lower || before_lower)) {
            segments.push(String::new());
        }
        if c != '_' {
            let last = segments.len() - 1;
            segments[last].extend(c.to_lowercase());
        }
    }
    segments.retain(|segment| !segment.is_empty());
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_in_any_case() {
        assert_eq!(segments("mixture_layers"), ["mixture", "layers"]);
        assert_eq!(segments("MixtureLayer"), ["mixture", "layer"]);
        assert_eq!(segments("ZERO_RANKS"), ["zero", "ranks"]);
        assert_eq!(segments("IOError2"), ["io", "error2"]);
    }
}
