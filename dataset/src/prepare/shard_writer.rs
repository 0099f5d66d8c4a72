//! Writes tokenized documents into the pairs of their shards.

use super::{held_out::HeldOut, pipeline::Encoded, token_counts::TokenCounts};
use crate::{
    Error,
    info::FileInfo,
    tokens::{TokenPair, TokenWriter, WrittenPair},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::Path};

/// Documents and bytes of text that came from a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileShare {
    pub(super) documents: u64,
    pub(super) bytes: u64,
}

/// Contents of a finished shard, with the checksums of its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ShardRecord {
    pub(super) train: FileInfo,
    pub(super) valid: Option<FileInfo>,
    /// Its text, by the number of the input file.
    pub(super) inputs: BTreeMap<usize, FileShare>,
    pub(super) one_token: u64,
    pub(super) without_tokens: u64,
    /// Documents that the tokenizer refused.
    #[serde(default)]
    pub(super) refused: u64,
    /// The reasons for the first of them.
    #[serde(default)]
    pub(super) examples: Vec<String>,
}

/// Most reasons that a record keeps.
const MAX_EXAMPLES: usize = 10;

/// Properties of documents and files that all shards share.
pub(super) struct Format {
    pub(super) bos: Option<u32>,
    pub(super) eos: u32,
    pub(super) vocab_size: usize,
    pub(super) held_out: HeldOut,
}

/// Writer of a shard's pairs.
pub(super) struct ShardWriter {
    train: Half,
    valid: Option<Half>,
    inputs: BTreeMap<usize, FileShare>,
    one_token: u64,
    without_tokens: u64,
    refused: u64,
    examples: Vec<String>,
    open: OpenDocument,
}

/// The document that has not ended.
#[derive(Default)]
struct OpenDocument {
    /// True once a part of it has come.
    begun: bool,
    /// Tokens of its text.
    tokens: u64,
    bytes: u64,
    /// Its training tokens, if it has several parts.
    counts: TokenCounts,
    is_refused: bool,
}

/// The names of a shard's pairs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ShardNames {
    pub(super) train: String,
    pub(super) valid: String,
}

impl ShardNames {
    /// Returns the names of shard `number`, or of the only one.
    pub(super) fn new(number: Option<usize>) -> ShardNames {
        let suffix = number.map_or(String::new(), |number| format!("-{number:05}"));
        ShardNames {
            train: format!("train{suffix}"),
            valid: format!("valid{suffix}"),
        }
    }
}

impl ShardWriter {
    /// Creates the files at these prefixes.
    pub(super) fn create(
        train: &Path,
        valid: &Path,
        format: &Format,
    ) -> Result<ShardWriter, Error> {
        let holds_out = !format.held_out.is_none();
        let valid = holds_out.then(|| Half::create(valid, format.vocab_size));
        Ok(ShardWriter {
            train: Half::create(train, format.vocab_size)?,
            valid: valid.transpose()?,
            inputs: BTreeMap::new(),
            one_token: 0,
            without_tokens: 0,
            refused: 0,
            examples: Vec::new(),
            open: OpenDocument::default(),
        })
    }

    /// Appends a batch. `first` is the number of the first document of the batch's file.
    pub(super) fn push(
        &mut self,
        batch: &Encoded,
        first: u64,
        format: &Format,
        counts: &mut TokenCounts,
    ) -> Result<(), Error> {
        let share = self.inputs.entry(batch.file).or_default();
        let mut start = 0;
        for part in &batch.parts {
            let tokens = &batch.tokens[start..part.end];
            start = part.end;
            share.bytes += part.bytes;
            share.documents += u64::from(part.ends);
            let open = &mut self.open;
            open.bytes += part.bytes;
            let is_valid = format.held_out.contains(first + part.document);
            let half = match &mut self.valid {
                Some(valid) if is_valid => valid,
                _ => &mut self.train,
            };
            // Most documents have one part, of which nothing is written if it is refused.
            let is_single = !open.begun && part.ends;
            if !open.begun && !is_single {
                half.writer.begin_document()?;
            }
            open.begun = true;
            if let Some(reason) = part.refused.as_ref().filter(|_| !open.is_refused) {
                open.is_refused = true;
                if self.examples.len() < MAX_EXAMPLES {
                    self.examples.push(reason.clone());
                }
            }
            if !open.is_refused {
                let counted = if is_single {
                    &mut *counts
                } else {
                    &mut open.counts
                };
                let mut append = |tokens: &[u32]| {
                    if !is_valid {
                        counted.add(tokens);
                    }
                    half.writer.append(tokens)
                };
                let begins = open.tokens == 0 && !tokens.is_empty();
                if let Some(bos) = format.bos.filter(|_| begins) {
                    append(&[bos])?;
                }
                append(tokens)?;
                open.tokens += tokens.len() as u64;
                if part.ends && open.tokens > 0 {
                    append(&[format.eos])?;
                }
            }
            if !part.ends {
                continue;
            }
            if open.is_refused {
                half.writer.drop_document()?;
                self.refused += 1;
            } else if open.tokens == 0 {
                self.without_tokens += 1;
            } else {
                half.writer.end_document()?;
                half.bytes += open.bytes;
                self.one_token += u64::from(open.tokens == 1);
                if !is_single {
                    counts.merge(std::mem::take(&mut open.counts));
                }
            }
            self.open = OpenDocument::default();
        }
        Ok(())
    }

    /// Writes the indices and syncs all files to disk.
    pub(super) fn finish(self) -> Result<ShardRecord, Error> {
        Ok(ShardRecord {
            train: self.train.finish()?,
            valid: self.valid.map(Half::finish).transpose()?,
            inputs: self.inputs,
            one_token: self.one_token,
            without_tokens: self.without_tokens,
            refused: self.refused,
            examples: self.examples,
        })
    }
}

/// The training or the validation documents of a shard.
struct Half {
    writer: TokenWriter,
    bytes: u64,
}

impl Half {
    fn create(prefix: &Path, vocab_size: usize) -> Result<Half, Error> {
        let writer = TokenWriter::create(prefix, vocab_size)?;
        Ok(Half { writer, bytes: 0 })
    }

    fn finish(self) -> Result<FileInfo, Error> {
        Ok(file_info(self.writer.finish()?, self.bytes))
    }
}

/// Returns the record of a pair with `bytes` bytes of text.
pub(super) fn file_info(written: WrittenPair, bytes: u64) -> FileInfo {
    FileInfo {
        documents: written.documents,
        tokens: written.tokens,
        bytes,
        bin: written.bin,
        idx: written.idx,
    }
}

impl ShardRecord {
    /// Reads the finished files again. True if they are as they were written; then their training
    /// tokens are added to `counts`.
    pub(super) fn verify(&self, train: &Path, valid: &Path, counts: &mut TokenCounts) -> bool {
        let mut own = TokenCounts::default();
        let is_train = matches(&self.train, train, &mut own);
        let mut ignored = TokenCounts::default();
        let is_valid = |info| matches(info, valid, &mut ignored);
        let is_whole = is_train && self.valid.as_ref().is_none_or(is_valid);
        if is_whole {
            counts.merge(own);
        }
        is_whole
    }
}

fn matches(info: &FileInfo, prefix: &Path, counts: &mut TokenCounts) -> bool {
    let read = TokenPair::open(prefix).and_then(|pair| {
        pair.read(&mut |part| {
            counts.add(part.tokens);
            Ok(())
        })
    });
    read.is_ok_and(|read| file_info(read, info.bytes) == *info)
}
