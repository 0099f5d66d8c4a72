//! The encoder of the `tokenizers` library, guarded: no panic, no lost text, bounded memory.

use super::{
    fast::{alphabet, occurs},
    file::{Ids, ModelPart},
};
use crate::{
    Error,
    char_boundary::{ceil_char_boundary, floor_char_boundary},
    quiet_panic::without_panic,
};
use fancy_regex::Regex;
use serde_json::Value;
use tokenizers::Tokenizer;

/// Longer texts are encoded in parts of about this many bytes; the library needs some hundred
/// bytes of memory for each.
const PART: usize = 1 << 18;

/// Bytes of text on each side of a cut that are encoded to check it.
const CONTEXTS: [usize; 4] = [1024, 801, 443, 150];

/// Places that are tried for a cut, per kind of place.
const TRIES: usize = 16;

/// A place to cut a text: the text from `end` to `start`, one space or nothing, is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) end: usize,
    pub(crate) start: usize,
}

/// The library's tokenizer with what guards it.
pub(super) struct Library {
    tokenizer: Tokenizer,
    /// Expressions of the normalizer and the pre-tokenizer. The library ignores their failures.
    expressions: Vec<Regex>,
    /// True if the model leaves out characters that are not in its vocabulary.
    loses_unknown: bool,
}

impl Library {
    /// Wraps a tokenizer, whose file has this model.
    pub(super) fn new(tokenizer: Tokenizer, model: &ModelPart) -> Library {
        let parts = [
            serde_json::to_value(tokenizer.get_normalizer()),
            serde_json::to_value(tokenizer.get_pre_tokenizer()),
        ];
        let mut expressions = Vec::new();
        for part in parts.iter().flatten() {
            collect_expressions(part, &mut expressions);
        }
        let byte_level = parts.iter().flatten().any(has_byte_level);
        Library {
            tokenizer,
            expressions,
            loses_unknown: loses_unknown(model, byte_level),
        }
    }

    pub(super) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Appends the ids of a text of any length.
    ///
    /// # Errors
    /// If a part of the text would be lost, or a long text cannot be cut.
    pub(super) fn encode(&self, text: &str, into: &mut Vec<u32>) -> Result<(), Error> {
        let mut rest = text;
        while rest.len() > PART {
            let end = floor_char_boundary(rest, PART);
            let cut = self.last_cut(rest, end).ok_or_else(|| {
                Error::Tokenizer(format!(
                    "a text of {} bytes cannot be cut anywhere in {PART} bytes without a change \
                     of its tokens (split the document, or use a tokenizer with pre-tokenization)",
                    text.len()
                ))
            })?;
            self.encode_part(&rest[..cut.end], into)?;
            rest = &rest[cut.start..];
        }
        self.encode_part(rest, into)
    }

    /// Returns a place before `end` for a cut, so that the ids of both parts are those of the
    /// whole. The text around it is encoded in both ways to check that.
    pub(super) fn last_cut(&self, text: &str, end: usize) -> Option<Cut> {
        let before = |wanted: fn(char, char) -> bool, gap: usize| {
            let mut after = text[end..].chars().next().unwrap_or(' ');
            let places = text[..end]
                .char_indices()
                .rev()
                .filter_map(move |(at, char)| {
                    let found = wanted(char, after).then_some(Cut {
                        end: at + char.len_utf8(),
                        start: at + char.len_utf8() + gap,
                    });
                    after = char;
                    found
                });
            places.take(TRIES)
        };
        let lines = before(|left, right| !left.is_whitespace() && right == '\n', 0);
        let words = before(|left, right| left.is_alphanumeric() && right == ' ', 0);
        let dropped = before(|left, right| left.is_alphanumeric() && right == ' ', 1);
        let any = before(|_, _| true, 0);
        lines
            .chain(words)
            .chain(dropped)
            .chain(any)
            .find(|&cut| cut.end > 0 && cut.start < text.len() && self.is_safe(text, cut))
    }

    /// Encodes the neighbourhood of a cut in both ways. Several contexts are tried: in a long run
    /// of one character, tokens depend on where the run starts, and one context can hide that.
    fn is_safe(&self, text: &str, cut: Cut) -> bool {
        let ids = |parts: &[&str]| {
            let mut ids = Vec::new();
            let encoded = parts
                .iter()
                .try_for_each(|part| self.encode_part(part, &mut ids));
            encoded.ok().map(|()| ids)
        };
        CONTEXTS.iter().all(|context| {
            let start = floor_char_boundary(text, cut.end.saturating_sub(*context));
            let end = ceil_char_boundary(text, (cut.start + context).min(text.len()));
            let whole = ids(&[&text[start..end]]);
            whole.is_some() && whole == ids(&[&text[start..cut.end], &text[cut.start..end]])
        })
    }

    fn encode_part(&self, text: &str, into: &mut Vec<u32>) -> Result<(), Error> {
        for expression in &self.expressions {
            if let Some(error) = expression.find_iter(text).find_map(Result::err) {
                return Err(Error::Tokenizer(format!(
                    "the tokenizer's regular expression fails on a document of {} bytes: {error} \
                     (a very long run of one kind of character? split or leave out the document)",
                    text.len()
                )));
            }
        }
        let failed =
            |error: String| Error::Tokenizer(format!("a document cannot be encoded: {error}"));
        if self.loses_unknown {
            let encoding = without_panic(|| self.tokenizer.encode(text, false))
                .and_then(|result| result.map_err(|error| error.to_string()))
                .map_err(failed)?;
            if let Some(char) = uncovered(text, encoding.get_offsets()) {
                return Err(failed(format!(
                    "the tokenizer has no token for {char:?}, which would be lost"
                )));
            }
            into.extend_from_slice(encoding.get_ids());
            return Ok(());
        }
        let encoding = without_panic(|| self.tokenizer.encode_fast(text, false))
            .and_then(|result| result.map_err(|error| error.to_string()))
            .map_err(failed)?;
        into.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

/// Returns the first character other than spaces that no token covers.
fn uncovered(text: &str, offsets: &[(usize, usize)]) -> Option<char> {
    let mut covered = vec![false; text.len()];
    for range in offsets {
        covered[range.0..range.1].fill(true);
    }
    let mut chars = text.char_indices();
    let lost = chars.find(|(at, char)| !covered[*at] && !char.is_whitespace());
    lost.map(|(_, char)| char)
}

fn loses_unknown(model: &ModelPart, byte_level: bool) -> bool {
    let is_bpe = model.kind.as_deref().unwrap_or("BPE") == "BPE";
    let Some(Ids(ids)) = model
        .vocab
        .as_ref()
        .filter(|_| is_bpe && model.unk_token.is_none())
    else {
        return false;
    };
    let has_bytes = (0..=255u8)
        .filter(|&byte| occurs(byte))
        .all(|byte| ids.contains_key(&*format!("<{byte:#04X}>")));
    let has_alphabet = alphabet()
        .iter()
        .filter(|(_, byte)| occurs(**byte))
        .all(|(char, _)| ids.contains_key(char.encode_utf8(&mut [0; 4])));
    !(model.byte_fallback == Some(true) && has_bytes || byte_level && has_alphabet)
}

fn has_byte_level(part: &Value) -> bool {
    match part {
        Value::Array(items) => items.iter().any(has_byte_level),
        Value::Object(fields) => part["type"] == "ByteLevel" || fields.values().any(has_byte_level),
        _ => false,
    }
}

/// Collects the regular expressions of a normalizer or pre-tokenizer.
fn collect_expressions(part: &Value, into: &mut Vec<Regex>) {
    match part {
        Value::Array(items) => {
            for item in items {
                collect_expressions(item, into);
            }
        }
        Value::Object(fields) => {
            if part["type"] == "ByteLevel" && part["use_regex"] == Value::Bool(true) {
                into.extend(
                    super::patterns::Pattern::Gpt2
                        .expression()
                        .and_then(compiled),
                );
            }
            into.extend(
                fields
                    .get("Regex")
                    .and_then(Value::as_str)
                    .and_then(compiled),
            );
            for value in fields.values() {
                collect_expressions(value, into);
            }
        }
        _ => (),
    }
}

/// The library has compiled the same expression before.
fn compiled(expression: impl AsRef<str>) -> Option<Regex> {
    Regex::new(expression.as_ref()).ok()
}
