//! The commands `moerun data ...` and `moerun bench data`.

use crate::{
    Error,
    argument_ranges::{fraction, megabytes, whole},
    bench,
    info::DatasetInfo,
    input::{InputOptions, Split, TextKey},
    prepare::{
        self, MAX_PARTS, MAX_SHOWN, Merged, MergedPair, Part, PrepareOptions, Selection, Shards,
        Shown, prepare,
    },
    printable::printable,
    progress::ProgressView,
    tokenizer::{MAX_VOCABULARY, TokenizerOptions},
};
use clap::{Args, Subcommand, ValueEnum};
use std::{
    fmt::Write as _,
    io::{ErrorKind, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Threads, at most. They are more than any machine has processors.
const MAX_THREADS: u64 = 4096;

/// The commands `moerun data ...`.
#[derive(Subcommand)]
pub enum DataCommand {
    /// Tokenize text, JSONL and Parquet into files that moerun and Megatron-LM read
    ///
    /// Interrupted, the same command continues. An existing data set stays as it is until the new
    /// one is complete.
    Prepare(Box<PrepareArgs>),
    /// Join data sets, parts of one, or pairs of token files
    Merge(MergeArgs),
    /// Check token files: checksums, index, document boundaries, token ids, counts
    Verify(VerifyArgs),
    /// Show a window or a document as text, with the boundaries of documents
    Show(ShowArgs),
}

#[derive(Args)]
pub struct PrepareArgs {
    /// Files, folders, globs, @FILE with a list of them, or - for standard input
    #[arg(required = true, value_name = "PATH")]
    pub inputs: Vec<String>,
    /// Folder for train.bin/.idx, valid.bin/.idx, tokenizer.json and dataset.json
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Hugging Face tokenizer.json, or its folder, to use instead of training a byte-level BPE
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Token that ends documents, by text or id [default: named by the tokenizer's files]
    #[arg(long, value_name = "TOKEN", requires = "tokenizer")]
    pub eos: Option<String>,
    /// Token that begins documents, by text or id, or none [default: the one the tokenizer adds]
    #[arg(long, value_name = "TOKEN", requires = "tokenizer")]
    pub bos: Option<String>,
    /// Read special tokens in the text of documents as such, not as text
    #[arg(long)]
    pub special_tokens: bool,
    /// Vocabulary size of the trained tokenizer; it is trained on at most 64 MiB of the text
    #[arg(
        long,
        default_value_t = 8192,
        value_name = "N",
        value_parser = whole(1..=MAX_VOCABULARY),
        conflicts_with = "tokenizer"
    )]
    pub vocab_size: usize,
    /// Fraction of documents kept for validation; 0 writes no validation files
    #[arg(long, default_value_t = 0.02, value_name = "FRACTION", value_parser = fraction)]
    pub validation_fraction: f64,
    /// Extensions of the files to read from folders, comma separated [default: all known ones]
    #[arg(long, value_delimiter = ',', value_name = "EXT")]
    pub extensions: Option<Vec<String>>,
    /// Field of JSONL objects or column of Parquet tables that holds the text
    ///
    /// `a.b` is the field b of the object a. The texts of several fields, separated by commas, are
    /// joined by a blank line.
    #[arg(long, default_value = "text", value_name = "NAME")]
    pub text_key: String,
    /// Documents of a text file
    #[arg(long, default_value = "file", value_name = "KIND")]
    pub split: SplitKind,
    /// Text that separates the documents of a text file
    #[arg(long, value_name = "TEXT", conflicts_with = "split")]
    pub separator: Option<String>,
    /// Stop at input that is not valid text, instead of counting and repairing it
    #[arg(long)]
    pub strict: bool,
    /// Also read hidden files of folders
    #[arg(long)]
    pub hidden: bool,
    /// Most text to use
    #[arg(long, value_name = "MB", value_parser = megabytes)]
    pub max_mb: Option<f64>,
    /// Write N pairs train-00000, train-00001, ... with equal shares of the text
    #[arg(long, value_name = "N", value_parser = whole(1..=MAX_PARTS as u64))]
    pub shards: Option<usize>,
    /// Write a pair train-00000, train-00001, ... for each input file
    #[arg(long, conflicts_with = "shards")]
    pub shard_per_input: bool,
    /// Do part I of N, from 0 on; join the parts with moerun data merge
    #[arg(long, value_name = "I/N")]
    pub part: Option<Part>,
    /// Threads that tokenize; the result does not depend on it [default: processors]
    #[arg(long, value_name = "N", value_parser = whole(1..=MAX_THREADS))]
    pub threads: Option<usize>,
    /// Replace the data set in the output folder once the new one is complete
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SplitKind {
    /// The file is one document
    File,
    /// Each line is one
    Line,
    /// Blank lines separate them
    BlankLine,
}

#[derive(Args)]
pub struct MergeArgs {
    /// Folder of the new data set, or path of the new pair without ending
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// Folders of data sets, or paths of pairs, in order
    #[arg(required = true, value_name = "IN")]
    pub inputs: Vec<PathBuf>,
    /// Replace the data set or the pair OUT
    #[arg(long)]
    pub force: bool,
}

#[derive(Args)]
pub struct VerifyArgs {
    /// Folder of a data set, or path of a pair
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
}

#[derive(Args)]
pub struct ShowArgs {
    /// Folder of a data set, or path of a pair
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// Number of the window, from 0 on
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub window: u64,
    /// Tokens of a window
    #[arg(
        long,
        default_value_t = 512,
        value_name = "N",
        value_parser = whole(1..=MAX_SHOWN as u64)
    )]
    pub length: usize,
    /// Show this document instead, from 0 on
    #[arg(long, value_name = "N", conflicts_with_all = ["window", "length"])]
    pub document: Option<u64>,
    /// Tokenizer to use instead of the one in the folder
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
}

/// Arguments of `moerun bench data`.
#[derive(Args)]
pub struct BenchDataArgs {
    /// Files and folders of text, such as sources of programs
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    pub text: Vec<String>,
    /// Hugging Face tokenizer.json
    #[arg(long, value_name = "FILE")]
    pub tokenizer: PathBuf,
    /// Text to use; shorter text is repeated
    #[arg(long, default_value_t = 50.0, value_name = "MB", value_parser = megabytes)]
    pub mb: f64,
    /// Threads [default: processors]
    #[arg(long, value_name = "N", value_parser = whole(1..=MAX_THREADS))]
    pub threads: Option<usize>,
    /// Alternating rounds
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = whole(1..=10000))]
    pub rounds: usize,
    /// Command to compare with, such as Megatron-LM's preprocess_data
    ///
    /// {input} (JSON lines with the field text), {output} (a path for its files), {tokenizer} and
    /// {threads} are replaced.
    #[arg(long, value_name = "COMMAND")]
    pub baseline: Option<String>,
}

/// Runs a command and prints its result.
///
/// # Errors
/// Those of the command.
pub fn run(command: DataCommand) -> Result<(), Error> {
    match command {
        DataCommand::Prepare(args) => run_prepare(*args),
        DataCommand::Merge(args) => {
            let view = &mut ProgressView::new();
            let report = &mut |event: prepare::Event| view.show(event);
            match prepare::merge(&args.output, &args.inputs, args.force, report)? {
                Merged::DataSet(info) => print(&summary(&args.output, &info)),
                Merged::Pair(pair) => print(&describe_pair(&args.output, &pair)),
            }
        }
        DataCommand::Verify(args) => {
            for pair in prepare::verify(&args.path)? {
                let prefix = pair.prefix.display();
                let mut text = format!(
                    "{prefix}: {} documents, {} tokens: no damage found\n",
                    pair.documents, pair.tokens
                );
                for check in pair.unchecked {
                    let _ = writeln!(text, "  not checked: {check}");
                }
                print(&text)?;
            }
            Ok(())
        }
        DataCommand::Show(args) => {
            let selection = match args.document {
                Some(document) => Selection::Document(document),
                None => Selection::Window {
                    number: args.window,
                    length: args.length,
                },
            };
            let shown = prepare::show(&args.path, selection, args.tokenizer.as_deref())?;
            print(&describe(&shown))
        }
    }
}

/// Compares data preparation with other programs and prints a JSON line.
///
/// # Errors
/// If a file cannot be read or written, or the programs' tokens differ.
pub fn bench(args: &BenchDataArgs) -> Result<(), Error> {
    let line = bench::run(&bench::Options {
        text: args.text.clone(),
        tokenizer: args.tokenizer.clone(),
        bytes: (args.mb * 1e6) as u64,
        threads: threads(args.threads),
        rounds: args.rounds,
        baseline: args.baseline.clone(),
    })?;
    print(&format!("{line}\n"))
}

/// Prints an error, and returns the exit code of the program.
pub fn exit_code(result: Result<(), Error>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", printable(&error.to_string()));
            ExitCode::FAILURE
        }
    }
}

fn threads(given: Option<usize>) -> usize {
    given.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

fn run_prepare(args: PrepareArgs) -> Result<(), Error> {
    let split = match (args.separator, args.split) {
        (Some(text), _) => Split::Separator(text),
        (None, SplitKind::File) => Split::File,
        (None, SplitKind::Line) => Split::Line,
        (None, SplitKind::BlankLine) => Split::BlankLine,
    };
    let shards = match (args.shards, args.shard_per_input) {
        (Some(shards), _) => Shards::Equal(shards),
        (None, true) => Shards::PerInput,
        (None, false) => Shards::One,
    };
    let extension = |extension: &String| extension.trim_start_matches('.').to_lowercase();
    let options = PrepareOptions {
        inputs: args.inputs,
        input: InputOptions {
            text_key: args.text_key.parse::<TextKey>()?,
            split,
            extensions: args
                .extensions
                .map(|list| list.iter().map(extension).collect()),
            strict: args.strict,
            hidden: args.hidden,
            output: None,
        },
        output: args.output,
        tokenizer: args.tokenizer,
        tokenizing: TokenizerOptions {
            eos: args.eos,
            bos: args.bos,
            special_tokens_in_text: args.special_tokens,
        },
        vocab_size: args.vocab_size,
        validation_fraction: args.validation_fraction,
        max_bytes: args.max_mb.map(|mb| (mb * 1e6) as u64),
        shards,
        part: args.part,
        threads: threads(args.threads),
        force: args.force,
    };
    let mut view = ProgressView::new();
    let prepared = prepare(&options, &mut |event| view.show(event));
    view.clear();
    print(&summary(&options.output, &prepared?))
}

/// Returns the result of a command in words, with every count that is not zero.
fn summary(output: &Path, info: &DatasetInfo) -> String {
    let mut text = format!(
        "{}: {} documents, {:.1} MB of text -> {} training tokens, {} validation tokens; \
         vocabulary {}; unigram entropy {:.3} nats per token\n",
        output.display(),
        info.documents,
        info.bytes as f64 / 1e6,
        info.train_tokens,
        info.validation_tokens,
        info.vocab_size,
        info.unigram_entropy
    );
    let own = [
        (info.one_token_documents, "documents of a single token"),
        (
            info.documents_without_tokens,
            "documents left out because the tokenizer leaves no token of them",
        ),
        (
            info.documents_not_tokenized,
            "documents left out because the tokenizer cannot encode them",
        ),
    ];
    let own = own.iter().filter(|(count, _)| *count > 0);
    let own = own.map(|(count, line)| format!("{line}: {count}"));
    for line in info.counts.lines().into_iter().chain(own) {
        let _ = writeln!(text, "  {line}");
    }
    text
}

/// Returns the result of merging pairs in words.
fn describe_pair(output: &Path, pair: &MergedPair) -> String {
    let text = match pair.bytes_of_text {
        Some(bytes) => format!("{:.1} MB of text", bytes as f64 / 1e6),
        None => "text of unknown size".into(),
    };
    let vocabulary = match pair.vocab_size {
        Some(size) => format!("vocabulary {size}"),
        None => "vocabulary unknown".into(),
    };
    format!(
        "{}: {} documents, {text} -> {} tokens; {vocabulary}; unigram entropy {:.3} nats per \
         token\n",
        output.display(),
        pair.documents,
        pair.tokens,
        pair.unigram_entropy
    )
}

/// Returns documents as text, each between two lines that tell where it begins and ends.
fn describe(shown: &Shown) -> String {
    let mut text = String::new();
    let mut position = shown.start;
    for document in &shown.documents {
        let begins = if document.begins {
            "begins"
        } else {
            "continues"
        };
        let number = document.number;
        let _ = writeln!(
            text,
            "--- document {number} {begins} at token {position} ---"
        );
        text.push_str(&document.text);
        position += document.tokens as u64;
        let ends = if document.ends { "ends" } else { "continues" };
        let _ = writeln!(
            text,
            "\n--- document {number} {ends} at token {position} ---"
        );
    }
    text
}

/// Prints on standard output. A reader that has gone, as in `moerun data show | head`, is no error.
fn print(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    let written = out
        .write_all(printable(text).as_bytes())
        .and_then(|()| out.flush());
    match written {
        Err(cause) if cause.kind() != ErrorKind::BrokenPipe => Err(Error::io(
            "cannot write",
            Path::new("standard output"),
        )(cause)),
        _ => Ok(()),
    }
}
