//! Tokenizers of documents.

use crate::Error;
use serde_json::Value;
use std::path::Path;
use tokenizers::{
    AddedToken, Tokenizer, TokenizerBuilder,
    models::bpe::{BPE, BpeTrainerBuilder},
    pre_tokenizers::byte_level::ByteLevel,
};

/// Text of the end-of-document token in data that `moerun data prepare` made.
pub const END_OF_DOCUMENT: &str = "<|endoftext|>";

#[derive(Debug, Clone, Default)]
pub struct TokenizerOptions {
    pub eos: Option<String>,
    pub bos: Option<String>,
    pub special_tokens_in_text: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Special {
    pub id: u32,
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    pub end: usize,
    pub start: usize,
}

pub struct DocumentTokenizer {
    tokenizer: Tokenizer,
    eos: Special,
}

impl DocumentTokenizer {
    pub fn load(
        path: &Path,
        _options: &TokenizerOptions,
    ) -> Result<(DocumentTokenizer, Vec<String>), Error> {
        let tokenizer = load_tokenizer(path)?;
        let text = [END_OF_DOCUMENT, "</s>"];
        let text = text
            .into_iter()
            .find(|text| tokenizer.token_to_id(text).is_some());
        let text = text.ok_or_else(|| {
            Error::Tokenizer(format!(
                "the tokenizer has no token {END_OF_DOCUMENT} or </s> to end documents with"
            ))
        })?;
        let eos = Special {
            id: tokenizer.token_to_id(text).unwrap(),
            text: text.into(),
        };
        Ok((DocumentTokenizer { tokenizer, eos }, Vec::new()))
    }

    pub fn encode(&self, text: &str, into: &mut Vec<u32>) -> Result<(), Error> {
        let encoding = self
            .tokenizer
            .encode_fast(text, false)
            .map_err(|error| Error::Tokenizer(format!("a document cannot be encoded: {error}")))?;
        into.extend(encoding.get_ids());
        Ok(())
    }

    pub fn last_cut(&self, text: &str) -> Option<Cut> {
        let end = text.trim_end().len();
        (end > 0 && end < text.len()).then_some(Cut { end, start: end })
    }

    pub fn eos(&self) -> Special {
        self.eos.clone()
    }

    pub fn bos(&self) -> Option<Special> {
        None
    }

    pub fn vocab_size(&self) -> usize {
        let ids = self.tokenizer.get_vocab(true).into_values();
        ids.max().map_or(0, |largest| largest as usize + 1)
    }

    pub fn hash(&self) -> String {
        let text = self.tokenizer.to_string(false).unwrap();
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }

    pub fn save(&self, path: &Path) -> Result<(), Error> {
        self.tokenizer
            .save(path, false)
            .map_err(|error| Error::Tokenizer(error.to_string()))
    }

    pub fn encoder(&self) -> &str {
        "tokenizers"
    }

    pub fn json(&self) -> String {
        self.tokenizer.to_string(false).unwrap()
    }

    pub fn of_json(
        text: &str,
        _options: &TokenizerOptions,
    ) -> Result<(DocumentTokenizer, Vec<String>), Error> {
        let tokenizer: Tokenizer = text.parse().unwrap();
        let eos = Special {
            id: tokenizer.token_to_id(END_OF_DOCUMENT).unwrap(),
            text: END_OF_DOCUMENT.into(),
        };
        Ok((DocumentTokenizer { tokenizer, eos }, Vec::new()))
    }

    pub fn verify_on(&mut self, _sample: &[&str]) -> Result<Option<String>, Error> {
        Ok(None)
    }

    pub fn library(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

pub fn load_tokenizer(path: &Path) -> Result<Tokenizer, Error> {
    let failed = |reason: String| {
        let path = path.display();
        Error::Tokenizer(format!("cannot read the tokenizer {path}: {reason}"))
    };
    let text = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
    // The library panics at some errors of syntax.
    serde_json::from_slice::<Value>(&text).map_err(|error| failed(error.to_string()))?;
    Tokenizer::from_bytes(&text).map_err(|error| failed(error.to_string()))
}

pub fn train<'a>(
    texts: impl Iterator<Item = &'a str> + Send,
    vocab_size: usize,
) -> Result<DocumentTokenizer, Error> {
    if vocab_size < 257 {
        return Err(Error::Options(format!(
            "--vocab-size {vocab_size} is less than the 256 bytes and the end of a document \
             that every byte-level tokenizer has"
        )));
    }
    let failed = |error: tokenizers::Error| {
        Error::Tokenizer(format!("training the tokenizer failed: {error}"))
    };
    let byte_level = ByteLevel::new(false, true, true);
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab_size)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END_OF_DOCUMENT, true)])
        .build();
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level))
        .build()
        .map_err(failed)?;
    tokenizer.train(&mut trainer, texts).map_err(failed)?;
    let json = tokenizer.to_string(false).map_err(failed)?;
    let tokenizer: Tokenizer = json.parse().map_err(failed)?;
    let eos = Special {
        id: tokenizer.token_to_id(END_OF_DOCUMENT).unwrap(),
        text: END_OF_DOCUMENT.into(),
    };
    Ok(DocumentTokenizer { tokenizer, eos })
}
