//! The fast encoder: byte-level BPE with known pre-tokenization, for any vocabulary.
//!
//! Text is split at added tokens, normalized, split by scanners instead of regular expressions,
//! and each piece is merged or found in a cache. Every part is exact; what this encoder cannot
//! reproduce it refuses at load time, with the reason.

use super::{
    classes::Text,
    file::{Ids, MergeText, ModelPart},
    merge::{Cache, MissingByte, PairMerge, Vocabulary},
    patterns::{Pattern, last_cut, split},
};
use crate::{Error, char_boundary::floor_char_boundary};
use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;
use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{Mutex, PoisonError},
};
use tokenizers::{AddedToken, Tokenizer};
use unicode_normalization_alignments::{
    IsNormalized, UnicodeNormalization, is_nfc_quick, is_nfkc_quick,
};

/// Byte-level BPE with known pre-tokenization.
pub(super) struct FastEncoder {
    vocabulary: Vocabulary,
    patterns: Vec<Pattern>,
    normalizer: Option<Normalizer>,
    /// Added tokens that are searched in text before it is normalized.
    raw: Option<AddedTokens>,
    /// Added tokens that are searched in normalized text.
    normalized: Option<AddedTokens>,
    /// Caches that no thread uses at the moment.
    caches: Mutex<Vec<Cache>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Normalizer {
    Nfc,
    Nfkc,
}

impl Normalizer {
    /// Returns the normalizer of a `tokenizer.json`.
    fn of(value: &Value) -> Result<Option<Normalizer>, String> {
        match value["type"].as_str() {
            None => Ok(None),
            Some("NFC") => Ok(Some(Normalizer::Nfc)),
            Some("NFKC") => Ok(Some(Normalizer::Nfkc)),
            Some("Sequence") => match value["normalizers"].as_array().map(Vec::as_slice) {
                None | Some([]) => Ok(None),
                Some([only]) => Normalizer::of(only),
                Some(_) => Err("several normalizers".into()),
            },
            Some(other) => Err(format!("the normalizer {other}")),
        }
    }

    /// Normalizes with the tables that the library uses.
    fn apply(self, text: &str) -> Cow<'_, str> {
        let checked = match self {
            _ if text.is_ascii() => return text.into(),
            Normalizer::Nfc => is_nfc_quick(text.chars()),
            Normalizer::Nfkc => is_nfkc_quick(text.chars()),
        };
        match self {
            _ if checked == IsNormalized::Yes => text.into(),
            Normalizer::Nfc => text.nfc().map(|(char, _)| char).collect(),
            Normalizer::Nfkc => text.nfkc().map(|(char, _)| char).collect(),
        }
    }
}

/// Added tokens and their search, leftmost first and longest first.
struct AddedTokens {
    search: AhoCorasick,
    contents: Vec<String>,
    /// The id of each token; `None` for special tokens that are text inside of documents.
    ids: Vec<Option<u32>>,
}

impl AddedTokens {
    /// Returns `None` if no token is searched.
    fn new(tokens: Vec<(String, Option<u32>)>) -> Result<Option<AddedTokens>, String> {
        if tokens.iter().all(|token| token.1.is_none()) {
            return Ok(None);
        }
        let contents: Vec<String> = tokens.iter().map(|token| token.0.clone()).collect();
        let search = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(&contents)
            .map_err(|error| error.to_string())?;
        let ids = tokens.iter().map(|token| token.1).collect();
        Ok(Some(AddedTokens {
            search,
            contents,
            ids,
        }))
    }

    /// Passes the text between added tokens and their ids to `take`.
    fn split<'a>(
        this: &Option<AddedTokens>,
        text: &'a str,
        take: &mut dyn FnMut(Part<'a>) -> Result<(), MissingByte>,
    ) -> Result<(), MissingByte> {
        let mut start = 0;
        for found in this.iter().flat_map(|tokens| tokens.search.find_iter(text)) {
            let id = this.as_ref().and_then(|tokens| tokens.ids[found.pattern()]);
            if let Some(id) = id {
                take(Part::Text(&text[start..found.start()]))?;
                take(Part::Token(id))?;
                start = found.end();
            }
        }
        take(Part::Text(&text[start..]))
    }

    /// True if an added token may begin in `left` and end in `right`.
    fn span(&self, left: &str, right: &str) -> bool {
        let spans = |token: &str| {
            (1..token.len()).any(|middle| {
                token.is_char_boundary(middle)
                    && left.ends_with(&token[..middle])
                    && right.starts_with(&token[middle..])
            })
        };
        self.contents.iter().any(|token| spans(token))
    }

    fn longest(&self) -> usize {
        self.contents.iter().map(String::len).max().unwrap_or(0)
    }
}

enum Part<'a> {
    Text(&'a str),
    Token(u32),
}

impl FastEncoder {
    /// Makes the encoder from a loaded tokenizer and the vocabulary of its file.
    ///
    /// # Errors
    /// The reason for which this encoder does not fit, such as `the model is Unigram`.
    pub(super) fn new(
        tokenizer: &Tokenizer,
        vocabulary: Result<Vocabulary, String>,
    ) -> Result<FastEncoder, String> {
        let value = |part: Result<Value, serde_json::Error>| part.map_err(|e| e.to_string());
        let normalizer = value(serde_json::to_value(tokenizer.get_normalizer()))?;
        let normalizer = Normalizer::of(&normalizer)?;
        let pre_tokenizer = value(serde_json::to_value(tokenizer.get_pre_tokenizer()))?;
        let patterns = patterns_of(&pre_tokenizer)?;
        if !patterns.iter().any(|pattern| pattern.splits_words()) {
            return Err("words are not split, so long documents cannot be cut safely".into());
        }
        let vocabulary = vocabulary?;
        let as_text = tokenizer.get_encode_special_tokens();
        let mut raw = Vec::new();
        let mut normalized = Vec::new();
        let mut added: Vec<(u32, AddedToken)> =
            tokenizer.get_added_tokens_decoder().into_iter().collect();
        added.sort_by_key(|token| token.0);
        for (id, token) in added {
            let id = (!(as_text && token.special)).then_some(id);
            if id.is_some() && (token.single_word || token.lstrip || token.rstrip) {
                return Err(format!(
                    "the added token {:?} takes spaces or only whole words",
                    token.content
                ));
            }
            match normalizer {
                _ if !token.normalized => raw.push((token.content, id)),
                None => normalized.push((token.content, id)),
                Some(normalizer) => {
                    normalized.push((normalizer.apply(&token.content).into_owned(), id))
                }
            }
        }
        Ok(FastEncoder {
            vocabulary,
            patterns,
            normalizer,
            raw: AddedTokens::new(raw)?,
            normalized: AddedTokens::new(normalized)?,
            caches: Mutex::default(),
        })
    }

    /// Appends the ids of a text.
    ///
    /// # Errors
    /// If a byte of the text is not in the vocabulary.
    pub(super) fn encode(&self, text: &str, into: &mut Vec<u32>) -> Result<(), Error> {
        let caches = || self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        let free = caches().pop();
        let mut cache = free.unwrap_or_else(Cache::new);
        let result = self.encode_with(text, &mut cache, into);
        caches().push(cache);
        result.map_err(|MissingByte(byte)| {
            Error::Tokenizer(format!(
                "a document has the byte {byte:#04x}, which the tokenizer has no token for; \
                 it would be lost"
            ))
        })
    }

    fn encode_with(
        &self,
        text: &str,
        cache: &mut Cache,
        into: &mut Vec<u32>,
    ) -> Result<(), MissingByte> {
        AddedTokens::split(&self.raw, text, &mut |part| match part {
            Part::Token(id) => {
                into.push(id);
                Ok(())
            }
            Part::Text(text) => {
                let text = match self.normalizer {
                    Some(normalizer) => normalizer.apply(text),
                    None => text.into(),
                };
                AddedTokens::split(&self.normalized, &text, &mut |part| match part {
                    Part::Token(id) => {
                        into.push(id);
                        Ok(())
                    }
                    Part::Text(text) => self.encode_ordinary(text, cache, into),
                })
            }
        })
    }

    /// Appends the ids of a text without added tokens.
    fn encode_ordinary(
        &self,
        text: &str,
        cache: &mut Cache,
        into: &mut Vec<u32>,
    ) -> Result<(), MissingByte> {
        let mut result = Ok(());
        split(&self.patterns, Text::new(text), &mut |piece| {
            if result.is_ok() {
                result = self.vocabulary.encode(piece, cache, into);
            }
        });
        result
    }

    /// Returns the last position of a text at which it may be cut: the ids of both parts are those
    /// of the whole, whatever follows the text.
    pub(super) fn last_cut(&self, text: &str) -> Option<usize> {
        last_cut(text, |cut| {
            self.is_stable_before(text, cut) && !self.added_token_spans(text, cut)
        })
    }

    /// True if normalization leaves the character before `cut`: a cut depends on its class.
    fn is_stable_before(&self, text: &str, cut: usize) -> bool {
        if self.normalizer != Some(Normalizer::Nfkc) {
            return true;
        }
        let last = text[..cut].chars().next_back();
        last.is_none_or(|last| {
            let mut bytes = [0; 4];
            let char = &*last.encode_utf8(&mut bytes);
            Normalizer::Nfkc.apply(char) == char
        })
    }

    fn added_token_spans(&self, text: &str, cut: usize) -> bool {
        let spans = |tokens: &AddedTokens, normalizer: Option<Normalizer>| {
            // Normalization shortens text by less than this.
            let reach = 16 * tokens.longest();
            let start = floor_char_boundary(text, cut.saturating_sub(reach));
            let end = floor_char_boundary(text, (cut + reach).min(text.len()));
            let apply = |part| match normalizer {
                Some(normalizer) => normalizer.apply(part),
                None => Cow::Borrowed(part),
            };
            // What follows the text may complete a token.
            cut + reach > text.len()
                || tokens.span(&apply(&text[start..cut]), &apply(&text[cut..end]))
        };
        self.raw.as_ref().is_some_and(|tokens| spans(tokens, None))
            || self
                .normalized
                .as_ref()
                .is_some_and(|tokens| spans(tokens, self.normalizer))
    }
}

/// Returns the patterns of a pre-tokenizer that ends with `ByteLevel`.
fn patterns_of(pre_tokenizer: &Value) -> Result<Vec<Pattern>, String> {
    let steps = match pre_tokenizer["type"].as_str() {
        None => return Err("there is no pre-tokenizer".into()),
        Some("Sequence") => pre_tokenizer["pretokenizers"].as_array().cloned(),
        Some(_) => Some(vec![pre_tokenizer.clone()]),
    };
    let steps = steps.unwrap_or_default();
    let Some((last, before)) = steps.split_last() else {
        return Err("there is no pre-tokenizer".into());
    };
    let mut patterns = before
        .iter()
        .map(pattern_of)
        .collect::<Result<Vec<_>, _>>()?;
    match last["type"].as_str() {
        Some("ByteLevel") if last["add_prefix_space"] == Value::Bool(false) => (),
        Some("ByteLevel") => return Err("ByteLevel adds a space".into()),
        _ => return Err("pre-tokenization is not byte-level".into()),
    }
    if last["use_regex"] != Value::Bool(false) {
        patterns.push(Pattern::Gpt2);
    }
    Ok(patterns)
}

fn pattern_of(step: &Value) -> Result<Pattern, String> {
    match step["type"].as_str() {
        Some("Digits") => Ok(Pattern::Digits {
            each: step["individual_digits"] == Value::Bool(true),
        }),
        Some("Split") => {
            let behavior = (step["behavior"].as_str(), step["invert"].as_bool());
            let expression = step["pattern"]["Regex"].as_str();
            let pattern = expression.and_then(Pattern::of_expression);
            // With these, text between matches is removed, but there is none.
            let whole = matches!(
                pattern,
                Some(Pattern::Gpt2 | Pattern::Cl100k { .. } | Pattern::O200k { .. })
            );
            match (pattern, behavior) {
                (Some(pattern), (Some("Isolated"), Some(false))) => Ok(pattern),
                (Some(pattern), (Some("Removed"), Some(true))) if whole => Ok(pattern),
                _ => Err(format!("splitting by {}", step["pattern"])),
            }
        }
        other => Err(format!(
            "the pre-tokenizer {}",
            other.unwrap_or("without a type")
        )),
    }
}

/// Returns the vocabulary of a byte-level BPE.
///
/// # Errors
/// The reason for which the model is none that the fast encoder reproduces.
pub(super) fn vocabulary_of(model: &ModelPart) -> Result<Vocabulary, String> {
    let kind = model.kind.as_deref().unwrap_or("BPE");
    let parts = model.vocab.as_ref().zip(model.merges.as_ref());
    let Some((Ids(ids), merges)) = parts.filter(|_| kind == "BPE") else {
        return Err(format!("the model is {kind}"));
    };
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return Err("merges are dropped at random".into());
    }
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
        return Err("words have a prefix or suffix".into());
    }
    let alphabet = alphabet();
    let mut bytes = [None; 256];
    for (char, &byte) in &alphabet {
        bytes[byte as usize] = ids.get(char.encode_utf8(&mut [0; 4])).copied();
    }
    let replaced = model.unk_token.is_some() || model.byte_fallback == Some(true);
    if replaced && (0..=255u8).any(|byte| occurs(byte) && bytes[byte as usize].is_none()) {
        return Err("some bytes are no tokens".into());
    }
    let mut joined = String::new();
    let pairs = merges.iter().filter_map(MergeText::tokens).enumerate();
    let pairs = pairs.map(|(rank, [left, right])| {
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        Some(PairMerge {
            left: *ids.get(left)?,
            right: *ids.get(right)?,
            rank: rank as u32,
            id: *ids.get(&*joined)?,
        })
    });
    let pairs = pairs.collect::<Option<Vec<_>>>();
    let pairs = pairs.ok_or("a merge has tokens that are not in the vocabulary")?;
    let whole = (model.ignore_merges == Some(true)).then(|| {
        let of_bytes = |token: &str| {
            let bytes = token.chars().map(|char| alphabet.get(&char).copied());
            bytes.collect::<Option<Box<[u8]>>>()
        };
        let tokens = ids
            .iter()
            .filter_map(|(token, &id)| Some((of_bytes(token)?, id)));
        tokens.collect()
    });
    Ok(Vocabulary::new(bytes, pairs.into_iter(), whole))
}

/// True if the byte occurs in UTF-8.
pub(super) fn occurs(byte: u8) -> bool {
    !matches!(byte, 0xc0 | 0xc1 | 0xf5..)
}

/// Returns the bytes of the characters by which byte-level tokens are written: printable Latin-1
/// characters are themselves, and the others follow from U+0100.
pub(super) fn alphabet() -> HashMap<char, u8> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..);
    let mut next = 0x100u32;
    let char = |byte: u8| {
        if printable(&byte) {
            return char::from(byte);
        }
        next += 1;
        char::from_u32(next - 1).expect("below the surrogates")
    };
    let chars: Vec<char> = (0..=255u8).map(char).collect();
    chars.into_iter().zip(0..=255u8).collect()
}
