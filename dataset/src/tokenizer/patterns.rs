//! Scanners for the regular expressions by which byte-level tokenizers split text.
//!
//! Each scanner finds the same matches as a backtracking engine with the expression, in linear
//! time and without limits. A property test compares them.

use super::classes::{
    KANA_OR_HAN, LETTER, LOWER, MARK, NUMBER, SPACE, SYMBOL, Text, UNCASED, UPPER,
};

const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";

/// A split of text into pieces. Text between matches is a piece as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pattern {
    /// GPT-2's expression, which `ByteLevel` has built in.
    Gpt2,
    /// The expression of `cl100k_base`, Llama 3 and Qwen.
    Cl100k {
        /// Largest number of digits of a piece.
        digits: usize,
        /// True if marks belong to letters.
        marks: bool,
    },
    /// The expression of `o200k_base` and Mistral's Tekken.
    O200k {
        /// Largest number of digits of a piece.
        digits: usize,
        /// True if English contractions stay with their word.
        contractions: bool,
    },
    /// DeepSeek's third expression, which leaves numbers unmatched.
    DeepSeek,
    /// DeepSeek's first expression: numbers of at most `digits` digits.
    Numbers {
        /// Largest number of digits of a piece.
        digits: usize,
    },
    /// DeepSeek's second expression: runs of kana and Han.
    KanaOrHan,
    /// The pre-tokenizer `Digits`, which has no expression.
    Digits {
        /// True if each digit is a piece.
        each: bool,
    },
}

const WITH_EXPRESSION: [Pattern; 13] = [
    Pattern::Gpt2,
    Pattern::Cl100k {
        digits: 1,
        marks: false,
    },
    Pattern::Cl100k {
        digits: 3,
        marks: false,
    },
    Pattern::Cl100k {
        digits: 1,
        marks: true,
    },
    Pattern::Cl100k {
        digits: 3,
        marks: true,
    },
    Pattern::O200k {
        digits: 1,
        contractions: false,
    },
    Pattern::O200k {
        digits: 3,
        contractions: false,
    },
    Pattern::O200k {
        digits: 1,
        contractions: true,
    },
    Pattern::O200k {
        digits: 3,
        contractions: true,
    },
    Pattern::DeepSeek,
    Pattern::Numbers { digits: 1 },
    Pattern::Numbers { digits: 3 },
    Pattern::KanaOrHan,
];

impl Pattern {
    /// Returns the pattern with exactly this expression.
    pub(super) fn of_expression(expression: &str) -> Option<Pattern> {
        WITH_EXPRESSION
            .into_iter()
            .find(|pattern| pattern.expression().as_deref() == Some(expression))
    }

    /// Returns the regular expression that the scanner replaces, if it replaces one.
    pub(super) fn expression(self) -> Option<String> {
        let numbers = |digits: usize| match digits {
            1 => r"\p{N}".to_owned(),
            _ => format!(r"\p{{N}}{{1,{digits}}}"),
        };
        Some(match self {
            Pattern::Gpt2 => concat!(
                r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+",
                r"|\s+(?!\S)|\s+"
            )
            .to_owned(),
            Pattern::Cl100k { digits, marks } => {
                let numbers = numbers(digits);
                let [word, other] = if marks {
                    [r"[\p{L}\p{M}]+", r"[^\s\p{L}\p{M}\p{N}]+"]
                } else {
                    [r"\p{L}+", r"[^\s\p{L}\p{N}]+"]
                };
                format!(
                    r"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{word}|{numbers}| ?{other}[\r\n]*{}",
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                )
            }
            Pattern::O200k {
                digits,
                contractions,
            } => {
                let numbers = numbers(digits);
                let end = if contractions {
                    format!("{CONTRACTIONS}?")
                } else {
                    String::new()
                };
                let upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]";
                let lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]";
                let before = r"[^\r\n\p{L}\p{N}]?";
                let rest = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
                format!(
                    "{before}{upper}*{lower}+{end}|{before}{upper}+{lower}*{end}|{numbers}|{rest}"
                )
            }
            Pattern::DeepSeek => [
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
                "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
                "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
            ]
            .concat(),
            Pattern::Numbers { digits } => numbers(digits),
            Pattern::KanaOrHan => "[一-龥぀-ゟ゠-ヿ]+".to_owned(),
            Pattern::Digits { .. } => return None,
        })
    }

    /// True if a letter or number and a following space or mark are always in different pieces.
    pub(super) fn splits_words(self) -> bool {
        match self {
            Pattern::Gpt2 | Pattern::Cl100k { .. } | Pattern::O200k { .. } | Pattern::DeepSeek => {
                true
            }
            Pattern::Numbers { .. } | Pattern::KanaOrHan | Pattern::Digits { .. } => false,
        }
    }

    /// Returns the end of the piece that starts at `start`, which is before the text's end.
    #[inline(always)]
    fn piece(self, text: Text, start: usize) -> usize {
        match self {
            Pattern::Gpt2 => gpt2(text, start),
            Pattern::Cl100k { digits, marks } => cl100k(text, start, digits, marks),
            Pattern::O200k {
                digits,
                contractions,
            } => o200k(text, start, digits, contractions),
            Pattern::DeepSeek => or_gap(text, start, |position| deep_seek(text, position)),
            Pattern::Numbers { digits } => or_gap(text, start, |position| {
                Some(text.run_of(position, NUMBER, digits)).filter(|&end| end > position)
            }),
            Pattern::KanaOrHan => match text.run(start, KANA_OR_HAN) {
                end if end > start => end,
                _ => text.run_without(start, KANA_OR_HAN),
            },
            Pattern::Digits { each } => digits(text, start, each),
        }
    }
}

/// Splits a text by the first pattern, each piece by the second one, and so on.
pub(super) fn split<F: FnMut(&[u8])>(patterns: &[Pattern], text: Text, take: &mut F) {
    let Some((&pattern, rest)) = patterns.split_first() else {
        return take(text.bytes);
    };
    let mut start = 0;
    while start < text.len() {
        let end = pattern.piece(text, start);
        if rest.is_empty() {
            take(&text.bytes[start..end]);
        } else {
            split(rest, text.slice(start, end), take);
        }
        start = end;
    }
}

/// Returns the last position of a text at which it may be cut: the pieces of both parts are those
/// of the whole, whatever follows the text, if a pattern [splits words](Pattern::splits_words).
///
/// A letter or number and a following space or punctuation mark are in different pieces, and
/// neither decides about pieces of the other side. `allowed` can refuse a position.
pub(super) fn last_cut(text: &str, allowed: impl Fn(usize) -> bool) -> Option<usize> {
    let classes = Text::new(text);
    let mut after = None;
    for (position, char) in text.char_indices().rev() {
        let cut = position + char.len_utf8();
        let word = classes
            .char(position)
            .is_some_and(|char| char.is(LETTER | NUMBER));
        if word && after.is_some_and(starts_piece) && allowed(cut) {
            return Some(cut);
        }
        after = Some(char);
    }
    None
}

/// True for spaces and marks that begin a piece after a letter and compose with no letter.
fn starts_piece(char: char) -> bool {
    match char {
        '\'' => false,
        ' ' | '\t' | '\n' | '\r' => true,
        _ => char.is_ascii_punctuation() || "。、，！？；：…“”（）「」".contains(char),
    }
}

/// Returns the end of a match at `start`, or else the start of the next match.
#[inline(always)]
fn or_gap(text: Text, start: usize, matched: impl Fn(usize) -> Option<usize>) -> usize {
    if let Some(end) = matched(start) {
        return end;
    }
    let mut position = start;
    while let Some(char) = text.char(position) {
        position += char.len;
        if position < text.len() && matched(position).is_some() {
            break;
        }
    }
    position
}

/// Matches `\s+(?!\S)|\s+` at a space: a run of spaces without the last one if text follows.
fn spaces(text: Text, start: usize) -> usize {
    let mut last = start;
    let mut end = start;
    while let Some(char) = text.char(end)
        && char.is(SPACE)
    {
        last = end;
        end += char.len;
    }
    if end == text.len() || last == start {
        end
    } else {
        last
    }
}

/// Matches `\s*[\r\n]+|\s+(?!\S)|\s+` at a space.
fn lines_or_spaces(text: Text, start: usize) -> usize {
    let end = text.run(start, SPACE);
    let newline = text.bytes[start..end]
        .iter()
        .rposition(|byte| matches!(byte, b'\r' | b'\n'));
    match newline {
        Some(last) => start + last + 1,
        None => spaces(text, start),
    }
}

/// Returns the end of a run of the given ASCII characters.
fn run_of_bytes(text: Text, mut position: usize, among: &[u8]) -> usize {
    while text
        .byte(position)
        .is_some_and(|byte| among.contains(&byte))
    {
        position += 1;
    }
    position
}

fn is_newline(text: Text, position: usize) -> bool {
    matches!(text.byte(position), Some(b'\r' | b'\n'))
}

/// Matches an English contraction in any case at an apostrophe.
fn contraction(text: Text, start: usize) -> Option<usize> {
    if text.byte(start) != Some(b'\'') {
        return None;
    }
    let lower = |offset: usize| {
        text.byte(start + offset)
            .map(|byte| byte.to_ascii_lowercase())
    };
    match (lower(1)?, lower(2)) {
        (b's' | b't' | b'm' | b'd', _) => Some(start + 2),
        (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) => Some(start + 3),
        // The long s folds to s.
        (0xc5, Some(0xbf)) => Some(start + 3),
        _ => None,
    }
}

fn gpt2(text: Text, start: usize) -> usize {
    let bytes = &text.bytes[start..];
    if bytes[0] == b'\'' {
        match bytes.get(1..) {
            Some([b's' | b't' | b'm' | b'd', ..]) => return start + 2,
            Some([b'r' | b'v', b'e', ..] | [b'l', b'l', ..]) => return start + 3,
            _ => (),
        }
    }
    let word = start + usize::from(bytes[0] == b' ');
    match text.char(word) {
        Some(char) if char.is(LETTER) => text.run(word + char.len, LETTER),
        Some(char) if char.is(NUMBER) => text.run(word + char.len, NUMBER),
        Some(char) if !char.is(SPACE) => text.run_without(word + char.len, SPACE | LETTER | NUMBER),
        _ => spaces(text, start),
    }
}

fn cl100k(text: Text, start: usize, digits: usize, marks: bool) -> usize {
    let Some(first) = text.char(start) else {
        return start;
    };
    let word = if marks { LETTER | MARK } else { LETTER };
    if first.is(word) {
        return text.run(start + first.len, word);
    }
    if let Some(end) = contraction(text, start) {
        return end;
    }
    if first.is(NUMBER) {
        return text.run_of(start, NUMBER, digits);
    }
    let second = text.char(start + first.len);
    if let Some(second) = second
        && second.is(word)
        && !is_newline(text, start)
    {
        return text.run(start + first.len + second.len, word);
    }
    let symbols = start + usize::from(text.bytes[start] == b' ');
    let end = text.run_without(symbols, SPACE | NUMBER | word);
    if end > symbols {
        return run_of_bytes(text, end, b"\r\n");
    }
    lines_or_spaces(text, start)
}

const UPPER_OR_OTHER: u8 = UPPER | UNCASED | MARK;
const LOWER_OR_OTHER: u8 = LOWER | UNCASED | MARK;

/// Matches `upper*lower+` with backtracking: upper and lower share letters without case and marks.
fn lower_word(text: Text, start: usize) -> Option<usize> {
    let mut end = start;
    let mut last_shared = None;
    while let Some(char) = text.char(end)
        && char.is(UPPER_OR_OTHER)
    {
        end += char.len;
        if char.is(UNCASED | MARK) {
            last_shared = Some(end);
        }
    }
    let lower = text.run(end, LOWER_OR_OTHER);
    if lower > end {
        Some(lower)
    } else {
        last_shared
    }
}

/// Matches `upper+lower*` greedily, without any need to backtrack.
fn upper_word(text: Text, start: usize) -> Option<usize> {
    let end = text.run(start, UPPER_OR_OTHER);
    (end > start).then(|| text.run(end, LOWER_OR_OTHER))
}

fn o200k(text: Text, start: usize, digits: usize, contractions: bool) -> usize {
    let Some(first) = text.char(start) else {
        return start;
    };
    let after = start + first.len;
    let takes_prefix = !first.is(LETTER | NUMBER) && !is_newline(text, start);
    let starts_word = |position: usize| {
        text.char(position)
            .is_some_and(|char| char.is(LETTER | MARK))
    };
    let with_prefix = (takes_prefix && starts_word(after)).then_some(after);
    let without_prefix = first.is(LETTER | MARK).then_some(start);
    let starts = || with_prefix.into_iter().chain(without_prefix);
    let word = starts()
        .find_map(|position| lower_word(text, position))
        .or_else(|| starts().find_map(|position| upper_word(text, position)));
    if let Some(end) = word {
        let contracted = if contractions {
            contraction(text, end)
        } else {
            None
        };
        return contracted.unwrap_or(end);
    }
    if first.is(NUMBER) {
        return text.run_of(start, NUMBER, digits);
    }
    let symbols = start + usize::from(text.bytes[start] == b' ');
    let end = text.run_without(symbols, SPACE | LETTER | NUMBER);
    if end > symbols {
        return run_of_bytes(text, end, b"\r\n/");
    }
    lines_or_spaces(text, start)
}

fn deep_seek(text: Text, start: usize) -> Option<usize> {
    let first = text.char(start)?;
    let after = start + first.len;
    if text.bytes[start].is_ascii_punctuation() {
        let letters = text.bytes[after..]
            .iter()
            .take_while(|byte| byte.is_ascii_alphabetic());
        let letters = letters.count();
        if letters > 0 {
            return Some(after + letters);
        }
    }
    if first.is(LETTER | MARK) {
        return Some(text.run(after, LETTER | MARK));
    }
    let prefix = !first.is(SYMBOL) && !is_newline(text, start);
    if prefix && text.char(after).is_some_and(|char| char.is(LETTER | MARK)) {
        return Some(text.run(after, LETTER | MARK));
    }
    let symbols = start + usize::from(text.bytes[start] == b' ');
    let end = text.run(symbols, SYMBOL);
    if end > symbols {
        return Some(run_of_bytes(text, end, b"\r\n"));
    }
    first.is(SPACE).then(|| lines_or_spaces(text, start))
}

/// Splits as the pre-tokenizer `Digits`, which asks the standard library for numeric characters.
fn digits(text: Text, start: usize, each: bool) -> usize {
    let rest = std::str::from_utf8(&text.bytes[start..]).unwrap_or_default();
    let mut chars = rest.chars();
    let numeric = chars.next().is_some_and(char::is_numeric);
    if numeric && each {
        return text.len() - chars.as_str().len();
    }
    match rest.find(|char: char| char.is_numeric() != numeric) {
        Some(end) => start + end,
        None => text.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fancy_regex::Regex;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    static EXPRESSIONS: LazyLock<Vec<Regex>> = LazyLock::new(|| {
        let expressions = WITH_EXPRESSION
            .iter()
            .filter_map(|pattern| pattern.expression());
        expressions.map(|text| Regex::new(&text).unwrap()).collect()
    });

    /// Pieces by the regular expression itself.
    fn expected(expression: &Regex, text: &str) -> Vec<String> {
        let mut pieces = Vec::new();
        let mut end = 0;
        for found in expression.find_iter(text) {
            let found = found.unwrap();
            pieces.push(text[end..found.start()].to_owned());
            pieces.push(found.as_str().to_owned());
            end = found.end();
        }
        pieces.push(text[end..].to_owned());
        pieces.retain(|piece| !piece.is_empty());
        pieces
    }

    fn found(patterns: &[Pattern], text: &str) -> Vec<String> {
        let mut pieces = Vec::new();
        split(patterns, Text::new(text), &mut |piece| {
            pieces.push(String::from_utf8(piece.to_vec()).unwrap())
        });
        pieces
    }

    /// Text with many runs, in which the alternatives of the expressions compete.
    fn text() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            "[ \t\r\n\u{a0}\u{3000}\u{85}]{1,4}",
            "[a-zA-Z]{1,5}",
            "'(s|S|ſ|t|re|RE|rE|ve|m|ll|lL|d|l|r|e|')",
            "[0-9²٣Ⅷ一]{1,5}",
            "[ʰǅⅣªA-Ca-c\u{301}\u{20dd}א漢ひカア]{1,6}",
            "[!-/:-@_~€→😀\u{200b}\u{0}\u{e000}]{1,4}",
            r"\PC{1,4}",
            any::<char>().prop_map(String::from),
        ];
        prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn scanners_split_as_their_expressions(text in text()) {
            for (pattern, expression) in WITH_EXPRESSION.into_iter().zip(EXPRESSIONS.iter()) {
                let expected = expected(expression, &text);
                prop_assert_eq!(found(&[pattern], &text), expected, "{:?}", pattern);
            }
        }

        #[test]
        fn pieces_are_the_text(text in text()) {
            let patterns = [
                Pattern::Numbers { digits: 3 },
                Pattern::Digits { each: true },
                Pattern::KanaOrHan,
                Pattern::DeepSeek,
            ];
            prop_assert_eq!(found(&patterns, &text).concat(), text);
        }
    }

    #[test]
    fn every_expression_is_recognized() {
        for pattern in WITH_EXPRESSION {
            let expression = pattern.expression().unwrap();
            assert_eq!(Pattern::of_expression(&expression), Some(pattern));
            assert_eq!(Pattern::of_expression(&format!("{expression}|a")), None);
        }
        let qwen = concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        let pattern = Pattern::Cl100k {
            digits: 1,
            marks: false,
        };
        assert_eq!(Pattern::of_expression(qwen), Some(pattern));
    }

    #[test]
    fn digits_split_as_the_pre_tokenizer() {
        let pieces = |each| found(&[Pattern::Digits { each }], "Call 123²x");
        assert_eq!(pieces(true), ["Call ", "1", "2", "3", "²", "x"]);
        assert_eq!(pieces(false), ["Call ", "123²", "x"]);
    }

    #[test]
    fn a_million_spaces_are_one_piece() {
        let text = " ".repeat(1_000_000);
        for pattern in WITH_EXPRESSION {
            assert_eq!(found(&[pattern], &text), [&*text]);
        }
    }
}
