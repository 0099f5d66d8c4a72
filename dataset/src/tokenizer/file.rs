//! The contents of a `tokenizer.json`, checked before the `tokenizers` library sees them.
//!
//! The library allocates memory in proportion to the largest id, panics at some errors, and
//! assigns ids of its own to added tokens. This reader refuses such files with a message.

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::Value;
use std::{borrow::Cow, collections::HashMap, fmt};

/// Ids must be less than this. Vocabularies of published models are an order of magnitude smaller.
pub const MAX_VOCABULARY: u64 = 1 << 22;

/// The parts of a `tokenizer.json` that need checks. Tokens are parts of the file's text, of which
/// large vocabularies have a million.
#[derive(Deserialize)]
pub(super) struct TokenizerFile<'a> {
    #[serde(default)]
    pub(super) added_tokens: Vec<AddedTokenId>,
    pub(super) truncation: Option<IgnoredAny>,
    pub(super) padding: Option<IgnoredAny>,
    #[serde(default)]
    pub(super) post_processor: Value,
    #[serde(borrow)]
    pub(super) model: ModelPart<'a>,
}

/// An added token and its id in the file.
#[derive(Deserialize)]
pub(super) struct AddedTokenId {
    pub(super) id: u64,
    pub(super) content: String,
}

/// The model of a `tokenizer.json`. Fields other than `vocab` are those of BPE.
#[derive(Deserialize)]
pub(super) struct ModelPart<'a> {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    #[serde(borrow)]
    pub(super) vocab: Option<Ids<'a>>,
    #[serde(borrow, default)]
    pub(super) merges: Option<Vec<MergeText<'a>>>,
    pub(super) dropout: Option<f32>,
    pub(super) unk_token: Option<String>,
    pub(super) continuing_subword_prefix: Option<String>,
    pub(super) end_of_word_suffix: Option<String>,
    pub(super) byte_fallback: Option<bool>,
    pub(super) ignore_merges: Option<bool>,
}

/// The text of a token.
#[derive(Deserialize)]
struct Token<'a>(#[serde(borrow)] Cow<'a, str>);

/// Two tokens that merge, in either of the forms of files.
pub(super) enum MergeText<'a> {
    Pair([Cow<'a, str>; 2]),
    Text(Cow<'a, str>),
}

impl<'de: 'a, 'a> Deserialize<'de> for MergeText<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<MergeText<'a>, D::Error> {
        deserializer.deserialize_any(MergeVisitor)
    }
}

struct MergeVisitor;

impl<'de> Visitor<'de> for MergeVisitor {
    type Value = MergeText<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("two tokens that merge")
    }

    fn visit_str<E>(self, text: &str) -> Result<MergeText<'de>, E> {
        Ok(MergeText::Text(text.to_owned().into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<MergeText<'de>, A::Error> {
        let lacks = |position| A::Error::invalid_length(position, &"two tokens");
        let Token(left) = list.next_element()?.ok_or_else(|| lacks(0))?;
        let Token(right) = list.next_element()?.ok_or_else(|| lacks(1))?;
        match list.next_element::<IgnoredAny>()? {
            None => Ok(MergeText::Pair([left, right])),
            Some(_) => Err(lacks(3)),
        }
    }
}

impl MergeText<'_> {
    /// Returns both tokens, or `None` for a comment or an error that the library reports.
    pub(super) fn tokens(&self) -> Option<[&str; 2]> {
        match self {
            MergeText::Pair([left, right]) => Some([left, right]),
            MergeText::Text(text) if text.starts_with("#version") => None,
            MergeText::Text(text) => text.split_once(' ').map(|tokens| tokens.into()),
        }
    }
}

/// Tokens and their ids, of which each is below [`MAX_VOCABULARY`].
pub(super) struct Ids<'a>(pub(super) HashMap<Cow<'a, str>, u32>);

impl<'de: 'a, 'a> Deserialize<'de> for Ids<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Ids<'a>, D::Error> {
        deserializer.deserialize_any(IdsVisitor)
    }
}

struct IdsVisitor;

impl<'de> Visitor<'de> for IdsVisitor {
    type Value = Ids<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("tokens with their ids, or a list of tokens with their scores")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ids<'de>, A::Error> {
        let mut ids = HashMap::new();
        while let Some((Token(token), id)) = map.next_entry::<Token, u64>()? {
            let id = check_id(&token, id).map_err(A::Error::custom)?;
            ids.insert(token, id);
        }
        Ok(Ids(ids))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Ids<'de>, A::Error> {
        let mut ids = HashMap::new();
        let mut next = 0;
        while let Some((Token(token), _)) = list.next_element::<(Token, f64)>()? {
            let id = check_id(&token, next).map_err(A::Error::custom)?;
            ids.insert(token, id);
            next += 1;
        }
        Ok(Ids(ids))
    }
}

fn check_id(token: &str, id: u64) -> Result<u32, String> {
    if id < MAX_VOCABULARY {
        return Ok(id as u32);
    }
    Err(format!(
        "the token {token:?} has the id {id}; ids must be below {MAX_VOCABULARY}"
    ))
}

impl Ids<'_> {
    /// Checks that no two tokens have one id.
    fn check(&self) -> Result<(), String> {
        let mut seen = vec![false; self.end()];
        let mut ids = self.0.values();
        let twice = ids.find(|id| std::mem::replace(&mut seen[**id as usize], true));
        let Some(&id) = twice else {
            return Ok(());
        };
        let mut both: Vec<_> = self.0.iter().filter(|(_, other)| **other == id).collect();
        both.sort();
        let [(first, _), (second, _), ..] = both[..] else {
            unreachable!("two tokens have the id {id}")
        };
        Err(format!(
            "the tokens {first:?} and {second:?} both have the id {id}"
        ))
    }

    /// Returns the largest id plus one.
    pub(super) fn end(&self) -> usize {
        self.0.values().max().map_or(0, |&id| id as usize + 1)
    }
}

impl TokenizerFile<'_> {
    /// Reads and checks the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// If the text is not JSON of this form, an id is too large, or two tokens have one id.
    pub(super) fn parse(text: &str) -> Result<TokenizerFile<'_>, String> {
        let file: TokenizerFile = serde_json::from_str(text).map_err(|error| error.to_string())?;
        for token in &file.added_tokens {
            check_id(&token.content, token.id)?;
        }
        file.model.vocab.as_ref().map_or(Ok(()), Ids::check)?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(model: &str) -> String {
        let text = format!(r#"{{"added_tokens": [], "model": {model}}}"#);
        TokenizerFile::parse(&text).err().unwrap()
    }

    #[test]
    fn ids_are_checked() {
        let large = error(r#"{"type": "BPE", "vocab": {"a": 2147483648}, "merges": []}"#);
        assert!(large.contains("\"a\" has the id 2147483648"), "{large}");
        let twice = error(r#"{"vocab": {"a": 1, "b": 1}}"#);
        assert!(
            twice.contains("\"a\" and \"b\" both have the id 1"),
            "{twice}"
        );
        assert!(error(r#"{"vocab": {"a": -1}}"#).contains("-1"));
        let added = r#"{"added_tokens": [{"id": 4194304, "content": "x"}], "model": {}}"#;
        assert!(
            TokenizerFile::parse(added)
                .err()
                .unwrap()
                .contains("4194304")
        );
        assert!(TokenizerFile::parse("{").is_err());
        assert!(TokenizerFile::parse("[]").is_err());
    }

    #[test]
    fn merges_have_two_forms() {
        let text = r##"{"model": {"merges": ["#version: 0.2", "a b", ["c", "d e"]]}}"##;
        let merges = TokenizerFile::parse(text).unwrap().model.merges.unwrap();
        let tokens: Vec<_> = merges.iter().map(MergeText::tokens).collect();
        assert_eq!(tokens, [None, Some(["a", "b"]), Some(["c", "d e"])]);
    }
}
