//! `moerun bench data`: preparation of data, reading and writing included, compared with Hugging
//! Face's batch call in the same program and with another program.

use crate::{
    Error,
    input::{self, InputCounts, InputFile, InputOptions},
    prepare::{PrepareOptions, Shards, TOKENIZER_FILE, prepare},
    tokenizer::{DocumentTokenizer, TokenizerOptions},
    tokens::{TokenWriter, hash_file},
};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};
use tokenizers::Tokenizer;

/// Documents of a batch for Hugging Face's tokenizer.
const LIBRARY_BATCH: usize = 1000;

pub(crate) struct Options {
    pub(crate) text: Vec<String>,
    pub(crate) tokenizer: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) threads: usize,
    pub(crate) rounds: usize,
    pub(crate) baseline: Option<String>,
}

/// Measures all sides in alternation, and returns one line with medians.
///
/// The sides read the same JSON lines and write token files. The tokens of Hugging Face's tokenizer
/// are compared with ours.
pub(crate) fn run(options: &Options) -> Result<Value, Error> {
    let name = format!("moerun-bench-data-{}", std::process::id());
    let folder = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&folder).map_err(Error::io("cannot make", &folder))?;
    let line = measure(options, &folder);
    // Best effort: the folder is temporary.
    let _ = std::fs::remove_dir_all(&folder);
    line
}

fn measure(options: &Options, folder: &Path) -> Result<Value, Error> {
    let corpus = folder.join("corpus.jsonl");
    let (documents, bytes) = write_corpus(options, &corpus)?;
    let (tokenizer, _) = DocumentTokenizer::load(&options.tokenizer, &TokenizerOptions::default())?;
    let ours = folder.join("ours");
    let library = folder.join("library");
    // The library uses the threads of the pool it is called in.
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .build();
    let pool = pool.map_err(|error| Error::Options(format!("cannot start threads: {error}")))?;
    let mut seconds = Seconds::default();
    let mut tokens = 0;
    for _ in 0..options.rounds {
        let _ = std::fs::remove_dir_all(&ours);
        let begun = Instant::now();
        tokens = prepare(&preparation(options, &corpus, &ours), &mut |_| ())?.train_tokens;
        seconds.ours.push(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        pool.install(|| prepare_with_library(&tokenizer, &corpus, &library))?;
        seconds.library.push(begun.elapsed().as_secs_f64());
        let train = ours.join("train.bin");
        if hash_file(&train)? != hash_file(&library.with_extension("bin"))? {
            return Err(Error::Tokenizer(
                "the tokens differ from those of Hugging Face's tokenizer".into(),
            ));
        }
        if let Some(command) = &options.baseline {
            let begun = Instant::now();
            run_baseline(command, options, &corpus, &ours, folder)?;
            seconds.baseline.push(begun.elapsed().as_secs_f64());
        }
    }
    let rate = |times: &[f64]| (!times.is_empty()).then(|| bytes as f64 / 1e6 / median(times));
    let ratio = |times: &[f64]| (!times.is_empty()).then(|| median(times) / median(&seconds.ours));
    Ok(json!({
        "bench": "data",
        "tokenizer": options.tokenizer.display().to_string(),
        "encoder": tokenizer.encoder(),
        "vocab_size": tokenizer.vocab_size(),
        "threads": options.threads,
        "documents": documents,
        "mb": bytes as f64 / 1e6,
        "tokens": tokens,
        "rounds": options.rounds,
        "mb_per_s": rate(&seconds.ours),
        "library_mb_per_s": rate(&seconds.library),
        "baseline_mb_per_s": rate(&seconds.baseline),
        "speedup_over_library": ratio(&seconds.library),
        "speedup_over_baseline": ratio(&seconds.baseline),
    }))
}

/// Seconds of each side, by round.
#[derive(Default)]
struct Seconds {
    ours: Vec<f64>,
    library: Vec<f64>,
    baseline: Vec<f64>,
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn preparation(options: &Options, corpus: &Path, output: &Path) -> PrepareOptions {
    PrepareOptions {
        inputs: vec![corpus.display().to_string()],
        input: InputOptions::default(),
        output: output.to_path_buf(),
        tokenizer: Some(options.tokenizer.clone()),
        tokenizing: TokenizerOptions::default(),
        vocab_size: 0,
        validation_fraction: 0.0,
        max_bytes: None,
        shards: Shards::One,
        part: None,
        threads: options.threads,
        force: false,
    }
}

/// Writes JSON lines of about the wanted size, and returns their number and bytes of text.
fn write_corpus(options: &Options, path: &Path) -> Result<(u64, u64), Error> {
    let found = input::find(&options.text, &InputOptions::default())?;
    let failed = || Error::io("cannot write", path);
    let mut out = BufWriter::new(File::create(path).map_err(failed())?);
    let mut documents = 0;
    let mut bytes = 0;
    while bytes < options.bytes {
        let before = bytes;
        for file in &found.files {
            let mut take = |text: &str| {
                if bytes >= options.bytes {
                    return Ok(());
                }
                let line = json!({ "text": text });
                bytes += text.len() as u64;
                documents += 1;
                writeln!(out, "{line}").map_err(failed())
            };
            read_whole(file, &mut take)?;
        }
        if bytes == before {
            let inputs = options.text.join(", ");
            return Err(Error::Data(format!("{inputs}: no text")));
        }
    }
    out.flush().map_err(failed())?;
    Ok((documents, bytes))
}

/// Passes the documents of a file; pieces of a long one are documents of their own.
fn read_whole(
    file: &InputFile,
    take: &mut dyn FnMut(&str) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut counts = InputCounts::default();
    file.read(&InputOptions::default(), &mut counts, &mut |piece| {
        if piece.text.trim().is_empty() {
            Ok(())
        } else {
            take(piece.text)
        }
    })
}

/// Prepares the corpus with Hugging Face's fastest call, which uses all threads. Like the other
/// sides, it loads the tokenizer first.
fn prepare_with_library(
    tokenizer: &DocumentTokenizer,
    corpus: &Path,
    output: &Path,
) -> Result<(), Error> {
    let found = input::find(&[corpus.display().to_string()], &InputOptions::default())?;
    let mut writer = TokenWriter::create(output, tokenizer.vocab_size())?;
    let ends = [tokenizer.bos(), Some(tokenizer.eos())];
    let [bos, eos] = ends.map(|token| token.map(|token| token.id));
    let mut batch: Vec<String> = Vec::new();
    let loaded = Tokenizer::from_bytes(tokenizer.json());
    let mut library = loaded.map_err(|error| Error::Tokenizer(error.to_string()))?;
    library.set_encode_special_tokens(true);
    let mut encode = |batch: Vec<String>| {
        let encodings = library.encode_batch_fast(batch, false);
        let encodings = encodings.map_err(|error| Error::Tokenizer(error.to_string()))?;
        for encoding in encodings {
            writer.append(bos.as_slice())?;
            writer.append(encoding.get_ids())?;
            writer.append(eos.as_slice())?;
            writer.end_document()?;
        }
        Ok(())
    };
    for file in &found.files {
        let mut whole = String::new();
        let mut counts = InputCounts::default();
        file.read(&InputOptions::default(), &mut counts, &mut |piece| {
            whole.push_str(piece.text);
            if !piece.ends_document {
                return Ok(());
            }
            batch.push(std::mem::take(&mut whole));
            if batch.len() < LIBRARY_BATCH {
                return Ok(());
            }
            encode(std::mem::take(&mut batch))
        })?;
    }
    encode(batch)?;
    writer.finish()?;
    Ok(())
}

fn run_baseline(
    command: &str,
    options: &Options,
    corpus: &Path,
    ours: &Path,
    folder: &Path,
) -> Result<(), Error> {
    let text = command
        .replace("{input}", &corpus.display().to_string())
        .replace("{output}", &folder.join("baseline").display().to_string())
        .replace(
            "{tokenizer}",
            &ours.join(TOKENIZER_FILE).display().to_string(),
        )
        .replace("{threads}", &options.threads.to_string());
    let output = Command::new("sh")
        .args(["-c", &text])
        .stdin(Stdio::null())
        .output()
        .map_err(Error::io("cannot start", Path::new("sh")))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    let last: Vec<&str> = message.lines().rev().take(5).collect();
    let last: Vec<&str> = last.into_iter().rev().collect();
    Err(Error::Options(format!(
        "the command {text:?} failed:\n{}",
        last.join("\n")
    )))
}
