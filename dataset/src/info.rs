//! `dataset.json`: the record of how token files were made, which lies in their folder.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Name of the record in the folder of the token files.
pub const INFO_FILE: &str = "dataset.json";

/// The record of a data set. Those of older versions lack some fields.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DatasetInfo {
    /// Number of documents.
    pub documents: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Training tokens, with those that mark the beginning and end of documents.
    pub train_tokens: u64,
    /// Validation tokens, with those that mark the beginning and end of documents.
    pub validation_tokens: u64,
    /// Vocabulary size of the tokenizer: the largest token id plus one.
    pub vocab_size: usize,
    /// Entropy of the frequencies of training tokens, in nats: the loss of a model that knows
    /// nothing but these frequencies.
    pub unigram_entropy: f64,
    /// Token that ends each document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eos: Option<SpecialToken>,
    /// Token that begins each document, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos: Option<SpecialToken>,
    /// BLAKE3 hash of the tokenizer, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer_hash: Option<String>,
    /// The pairs of token files, by their name without ending.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, FileInfo>,
    /// The files that were read, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<InputInfo>,
}

/// A special token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SpecialToken {
    pub id: u32,
    pub text: String,
}

/// A pair of token files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FileInfo {
    /// Number of documents.
    pub documents: u64,
    /// Number of tokens, with those that mark the beginning and end of documents.
    pub tokens: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// BLAKE3 hash of the `.bin` file, in hexadecimal digits.
    pub bin: String,
    /// BLAKE3 hash of the `.idx` file, in hexadecimal digits.
    pub idx: String,
}

/// A file that was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InputInfo {
    pub path: String,
    /// Bytes of text, after decompression.
    pub bytes: u64,
    /// Documents of the file that have text.
    pub documents: u64,
}
