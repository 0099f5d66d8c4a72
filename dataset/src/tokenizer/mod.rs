//! Tokenizers for documents: loading, special tokens, encoders and training.
//!
//! [`DocumentTokenizer`] encodes with the fast encoder if that gives the ids of the `tokenizers`
//! library for the vocabulary at hand, and with the library otherwise.

mod classes;
mod fast;
mod file;
mod library;
mod merge;
mod patterns;
mod pieces;
mod special;
mod train;

pub use file::MAX_VOCABULARY;
pub(crate) use library::Cut;
pub use special::Special;
pub use train::{TRAINING_BYTES, train};

use crate::{
    Error,
    info::{DatasetInfo, INFO_FILE, SpecialToken},
    quiet_panic::without_panic,
};
use fast::{FastEncoder, vocabulary_of};
use file::{AddedTokenId, Ids, TokenizerFile};
use library::Library;
use serde_json::Value;
use special::{NameOrId, Named, StartRules, Tokens, choose_end, choose_start, listed};
use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};
use tokenizers::{PostProcessor, Tokenizer};

/// Text of the end-of-document token in data that `moerun data prepare` made.
pub const END_OF_DOCUMENT: &str = "<|endoftext|>";

/// Text for the comparison of both encoders at load time.
const SAMPLE: &str = include_str!("sample.txt");

/// The user's choices for a tokenizer.
#[derive(Debug, Clone, Default)]
pub struct TokenizerOptions {
    /// Text or id of the token that ends documents.
    pub eos: Option<String>,
    /// Text or id of the token that begins documents, or `none`.
    pub bos: Option<String>,
    /// True if the text of a special token inside of a document becomes that token. Otherwise it
    /// is encoded like any other text. Added tokens that are not special, such as runs of spaces,
    /// are part of the vocabulary in both cases.
    pub special_tokens_in_text: bool,
}

/// A tokenizer for documents, shared by all threads.
pub struct DocumentTokenizer {
    library: Library,
    fast: Option<FastEncoder>,
    encoder: String,
    eos: Special,
    bos: Option<Special>,
    vocab_size: usize,
    json: String,
}

impl DocumentTokenizer {
    /// Loads a `tokenizer.json`, or a folder that has one, and chooses the special tokens.
    ///
    /// `dataset.json`, `tokenizer_config.json`, `special_tokens_map.json`,
    /// `generation_config.json` and `config.json` in the same folder may name them. Also returns
    /// notes for the user: what was chosen and why, and what was ignored.
    ///
    /// # Errors
    /// If a file is missing or damaged, or no file and no known name tells what ends documents.
    pub fn load(
        path: &Path,
        options: &TokenizerOptions,
    ) -> Result<(DocumentTokenizer, Vec<String>), Error> {
        let file = tokenizer_file(path)?;
        let text = std::fs::read_to_string(&file).map_err(Error::io("cannot read", &file))?;
        let folder = file.parent().unwrap_or(Path::new("."));
        let names = names_in(folder)?;
        let failed = |reason: String| {
            Error::Tokenizer(format!(
                "cannot use the tokenizer {}: {reason}",
                file.display()
            ))
        };
        Self::new(&text, &names, options).map_err(failed)
    }

    /// Makes a tokenizer from the text of a `tokenizer.json` alone, as [`load`](Self::load) does.
    ///
    /// # Errors
    /// As those of [`load`](Self::load).
    pub fn of_json(
        text: &str,
        options: &TokenizerOptions,
    ) -> Result<(DocumentTokenizer, Vec<String>), Error> {
        let failed = |reason| Error::Tokenizer(format!("cannot use the tokenizer: {reason}"));
        Self::new(text, &Names::default(), options).map_err(failed)
    }

    fn new(
        text: &str,
        names: &Names,
        options: &TokenizerOptions,
    ) -> Result<(DocumentTokenizer, Vec<String>), String> {
        let file = TokenizerFile::parse(text)?;
        let mut notes = Vec::new();
        let load = || -> Result<(Tokenizer, String), String> {
            let mut tokenizer = load_checked(text, &file)?;
            reset(&mut tokenizer, &file, &mut notes)?;
            let json = canonical_json(&tokenizer)?;
            Ok((tokenizer, json))
        };
        // Both take a good part of a second for a large vocabulary.
        let (loaded, vocabulary) = rayon::join(load, || vocabulary_of(&file.model));
        let (mut tokenizer, json) = loaded?;
        tokenizer.set_encode_special_tokens(!options.special_tokens_in_text);
        let tokens = LoadedTokens(&tokenizer);
        let eos = options.eos.as_deref();
        let eos = choose_end(eos, &names.eos, &tokens, &mut notes)?.ok_or_else(|| {
            format!(
                "no file tells which token ends documents; choose it with --eos; {}",
                listed(&tokens)
            )
        })?;
        let bos = options.bos.as_deref();
        let mut rules = names.start.clone();
        add_template(&file.post_processor, &mut rules.template);
        let bos = choose_start(bos, &names.bos, &rules, &eos, &tokens, &mut notes)?;
        let ordinary = tokenizer.get_added_tokens_decoder().into_values();
        let ordinary = ordinary.filter(|token| !token.special);
        let mut ordinary: Vec<String> = ordinary.map(|token| token.content).collect();
        ordinary.sort();
        if let Some(first) = ordinary.first() {
            notes.push(format!(
                "{} added tokens are not special, such as {first:?}: text inside of documents \
                 becomes them",
                ordinary.len()
            ));
        }
        let added = tokenizer.get_added_tokens_decoder().into_keys().max();
        let added = added.map_or(0, |id| id as usize + 1);
        let vocab_size = file.model.vocab.as_ref().map_or(0, Ids::end).max(added);
        let fast = FastEncoder::new(&tokenizer, vocabulary);
        let library = Library::new(tokenizer, &file.model);
        let mut loaded = DocumentTokenizer {
            library,
            fast: None,
            encoder: String::new(),
            eos,
            bos,
            vocab_size,
            json,
        };
        match fast {
            Ok(fast) => {
                loaded.fast = Some(fast);
                loaded.encoder = "moerun's byte-level BPE".into();
                let lines = SAMPLE.split_inclusive('\n');
                let sample: Vec<&str> = lines.chain([SAMPLE]).collect();
                notes.extend(loaded.verify_on(&sample));
            }
            Err(reason) => loaded.use_library(&reason),
        }
        Ok((loaded, notes))
    }

    fn use_library(&mut self, reason: &str) {
        self.fast = None;
        self.encoder = format!("the tokenizers library, which is slower ({reason})");
    }

    /// Compares the fast encoder with the library on texts, whole and cut. Uses the library from
    /// now on if they differ, and returns a warning. Texts that one of them refuses tell nothing.
    pub fn verify_on(&mut self, sample: &[&str]) -> Option<String> {
        let fast = self.fast.as_ref()?;
        let differs = |text: &&str| {
            let mut ids = [Vec::new(), Vec::new(), Vec::new()];
            let cut = fast.last_cut(text).unwrap_or(0);
            let encoded = fast
                .encode(text, &mut ids[0])
                .and_then(|()| self.library.encode(text, &mut ids[1]))
                .and_then(|()| fast.encode(&text[..cut], &mut ids[2]))
                .and_then(|()| fast.encode(&text[cut..], &mut ids[2]));
            encoded.is_ok() && (ids[0] != ids[1] || ids[0] != ids[2])
        };
        let number = sample.iter().position(differs)?;
        self.use_library(&format!(
            "the fast encoder's ids of sample text {number} differ"
        ));
        Some(format!("warning: encoding with {}", self.encoder))
    }

    /// Appends the ids of a text, without the end or beginning of a document.
    ///
    /// # Errors
    /// If a part of the text would be lost, or a long text cannot be cut into parts.
    pub fn encode(&self, text: &str, into: &mut Vec<u32>) -> Result<(), Error> {
        match &self.fast {
            Some(fast) => fast.encode(text, into),
            None => self.library.encode(text, into),
        }
    }

    /// Returns the token that ends documents.
    pub fn eos(&self) -> Special {
        self.eos.clone()
    }

    /// Returns the token that begins documents, if the tokenizer has one.
    pub fn bos(&self) -> Option<Special> {
        self.bos.clone()
    }

    /// Returns the number of token ids, which may have gaps.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Returns the BLAKE3 hash of the tokenizer's canonical JSON, in hexadecimal.
    pub fn hash(&self) -> String {
        hash_of(&self.json)
    }

    /// Returns the tokenizer's canonical JSON: the text of its `tokenizer.json`.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// Returns the encoder in use, and the reason if it is not the fast one.
    pub fn encoder(&self) -> &str {
        &self.encoder
    }

    /// Returns the library's tokenizer, for decoding and comparisons.
    pub fn library(&self) -> &Tokenizer {
        self.library.tokenizer()
    }
}

/// Loads a Hugging Face `tokenizer.json` for the library, as it is.
///
/// # Errors
/// If the file is missing or is no tokenizer.
pub fn load_tokenizer(path: &Path) -> Result<Tokenizer, Error> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string());
    let tokenizer = text.and_then(|text| load_checked(&text, &TokenizerFile::parse(&text)?));
    tokenizer.map_err(|reason| {
        let path = path.display();
        Error::Tokenizer(format!("cannot read the tokenizer {path}: {reason}"))
    })
}

/// Returns true if a `tokenizer.json` is the tokenizer of this [hash](DocumentTokenizer::hash).
///
/// # Errors
/// If the file is missing or is no tokenizer.
pub fn tokenizer_has_hash(path: &Path, hash: &str) -> Result<bool, Error> {
    let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
    // A file that moerun wrote is canonical, so that the tokenizer need not be built.
    if hash_of(&text) == hash {
        return Ok(true);
    }
    let canonical = || -> Result<String, String> {
        let file = TokenizerFile::parse(&text)?;
        let mut tokenizer = load_checked(&text, &file)?;
        reset(&mut tokenizer, &file, &mut Vec::new())?;
        canonical_json(&tokenizer)
    };
    let json = canonical().map_err(|reason| {
        let path = path.display();
        Error::Tokenizer(format!("cannot read the tokenizer {path}: {reason}"))
    })?;
    Ok(hash_of(&json) == hash)
}

fn canonical_json(tokenizer: &Tokenizer) -> Result<String, String> {
    tokenizer
        .to_string(false)
        .map_err(|error| error.to_string())
}

fn hash_of(json: &str) -> String {
    blake3::hash(json.as_bytes()).to_hex().to_string()
}

fn load_checked(text: &str, file: &TokenizerFile) -> Result<Tokenizer, String> {
    let loaded = without_panic(|| Tokenizer::from_bytes(text));
    let tokenizer = loaded?.map_err(|error| error.to_string())?;
    for AddedTokenId { id, content } in &file.added_tokens {
        let found = tokenizer.token_to_id(content);
        if found.is_some_and(|found| u64::from(found) != *id) {
            return Err(format!(
                "the added token {content:?} has the id {id} in the file, but the tokenizers \
                 library gives it {}; give added tokens the ids after the vocabulary, without gaps",
                found.unwrap_or_default()
            ));
        }
    }
    Ok(tokenizer)
}

/// Removes what changes the ids of whole documents.
fn reset(
    tokenizer: &mut Tokenizer,
    file: &TokenizerFile,
    notes: &mut Vec<String>,
) -> Result<(), String> {
    if file.truncation.is_some() {
        notes.push("the file's truncation is ignored: documents are encoded whole".into());
    }
    if file.padding.is_some() {
        notes.push("the file's padding is ignored".into());
    }
    tokenizer
        .with_truncation(None)
        .map_err(|error| error.to_string())?;
    tokenizer.with_padding(None);
    let added = tokenizer
        .get_post_processor()
        .map(|post| post.added_tokens(false));
    if added.is_some_and(|added| added > 0) {
        notes.push("the file's post-processor, which adds special tokens, is ignored".into());
        tokenizer.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
    }
    Ok(())
}

fn tokenizer_file(path: &Path) -> Result<PathBuf, Error> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let file = path.join("tokenizer.json");
    if file.is_file() {
        return Ok(file);
    }
    Err(Error::Tokenizer(format!(
        "{} has no tokenizer.json (make one with Python: transformers.AutoTokenizer.\
         from_pretrained(folder).save_pretrained(folder))",
        path.display()
    )))
}

/// Appends the texts of the tokens that a post-processor's template puts before a text.
fn add_template(post_processor: &Value, into: &mut Vec<String>) {
    for part in post_processor["processors"]
        .as_array()
        .into_iter()
        .flatten()
    {
        add_template(part, into);
    }
    if post_processor["type"] != "TemplateProcessing" {
        return;
    }
    let pieces = post_processor["single"].as_array().into_iter().flatten();
    let before = pieces.map_while(|piece| piece["SpecialToken"]["id"].as_str());
    into.extend(before.flat_map(|id| {
        let tokens = &post_processor["special_tokens"][id]["tokens"];
        let tokens = tokens.as_array().into_iter().flatten();
        tokens.filter_map(|token| token.as_str().map(str::to_owned))
    }));
}

/// Names of special tokens in the files of a folder, the most reliable first.
#[derive(Default)]
struct Names {
    eos: Vec<Named>,
    bos: Vec<Named>,
    start: StartRules,
}

impl Names {
    /// Takes the tokens of a prepared data set: its `tokenizer.json` does not tell what was added.
    fn add_record(&mut self, info: DatasetInfo) {
        let Some(eos) = info.eos else {
            return;
        };
        let named = |token: SpecialToken| Named {
            file: INFO_FILE,
            token: NameOrId::Name(token.text),
        };
        self.start.adds = Some(info.bos.is_some());
        self.eos.push(named(eos));
        self.bos.extend(info.bos.map(named));
    }
}

/// The file that tells whether a tokenizer adds a token to the beginning of texts.
const CONFIGURATION: &str = "tokenizer_config.json";

/// Files that may name special tokens, by text or by id.
const FILES: [&str; 4] = [
    CONFIGURATION,
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
];

fn names_in(folder: &Path) -> Result<Names, Error> {
    let mut names = Names::default();
    // Other programs have files of this name, too.
    let record = std::fs::read(folder.join(INFO_FILE)).ok();
    if let Some(info) = record.and_then(|text| serde_json::from_slice(&text).ok()) {
        names.add_record(info);
    }
    for file in FILES {
        let path = folder.join(file);
        if !path.is_file() {
            continue;
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io("cannot read", &path))?;
        let json: Value = serde_json::from_str(&text)
            .map_err(|error| Error::Tokenizer(format!("{}: {error}", path.display())))?;
        if file == CONFIGURATION {
            let rules = &mut names.start;
            rules.adds = rules.adds.or(json["add_bos_token"].as_bool());
            rules.is_null = json.get("bos_token").is_some_and(Value::is_null);
        }
        for (list, key) in [(&mut names.eos, "eos_token"), (&mut names.bos, "bos_token")] {
            let by_id = json.get(format!("{key}_id"));
            let values =
                [json.get(key), by_id]
                    .into_iter()
                    .flatten()
                    .flat_map(|value| match value {
                        Value::Array(values) => values.clone(),
                        value => vec![value.clone()],
                    });
            list.extend(values.filter_map(|value| {
                Some(Named {
                    file,
                    token: name_or_id(&value)?,
                })
            }));
        }
    }
    Ok(names)
}

/// Reads a token's text, an object with it, or its id.
fn name_or_id(value: &Value) -> Option<NameOrId> {
    match value {
        Value::String(name) => Some(NameOrId::Name(name.clone())),
        Value::Object(fields) => name_or_id(fields.get("content")?),
        Value::Number(id) => Some(NameOrId::Id(id.as_u64()?.try_into().ok()?)),
        _ => None,
    }
}

struct LoadedTokens<'a>(&'a Tokenizer);

impl Tokens for LoadedTokens<'_> {
    fn by_text(&self, text: &str) -> Option<special::Token> {
        let id = self.0.token_to_id(text)?;
        let special = Special {
            id,
            text: text.to_owned(),
        };
        let is_special = self.0.get_added_vocabulary().is_special_token(text);
        Some(special::Token {
            special,
            is_special,
        })
    }

    fn by_id(&self, id: u32) -> Option<special::Token> {
        self.by_text(&self.0.id_to_token(id)?)
    }

    fn special(&self) -> Vec<String> {
        let added = self.0.get_added_tokens_decoder();
        let mut special: Vec<_> = added.into_iter().filter(|token| token.1.special).collect();
        special.sort_by_key(|token| token.0);
        let mut seen = HashSet::new();
        let texts = special.into_iter().map(|token| token.1.content);
        texts.filter(|text| seen.insert(text.clone())).collect()
    }
}

#[cfg(test)]
mod tests;
