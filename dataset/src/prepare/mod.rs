//! `moerun data prepare`: makes token files from documents.
//!
//! Readers, tokenizing threads and one writer are joined by bounded queues. Memory does not depend
//! on the corpus. With T threads there are R = min(1 + T/16, 4) readers and at most R (T + 3)
//! batches. A batch has at most 0.25 MiB of text from short documents and 2.25 MiB from long ones
//! (6.25 MiB where 4 MiB of text have no place to cut), and 4 bytes per token. To this come one row
//! or page of each reader, what the tokenizer needs for a piece of text on each thread, the list of
//! files, and with a count 16 MiB of marks. The bytes of the result depend only on inputs and
//! options, not on threads or interruptions.

mod count;
mod documents;
mod held_out;
mod merge;
mod pipeline;
mod plan;
mod sample;
mod shard_writer;
mod show;
mod staging;
mod token_counts;
mod verify;

pub use merge::{Merged, MergedPair, merge};
pub use plan::{MAX_PARTS, Part, Shards};
pub use show::{MAX_SHOWN, Selection, Shown, ShownDocument, show};
pub use staging::TOKENIZER_FILE;
pub use verify::{Verified, verify};

use self::{
    held_out::HeldOut,
    pipeline::{FileEnd, Item, Pipeline},
    plan::Plan,
    sample::{CHECKED_SAMPLE, TRAINING_SAMPLE, sample},
    shard_writer::{Format, ShardNames, ShardRecord, ShardWriter},
    staging::{Begun, Staging, Target, replace_synced, write_synced},
    token_counts::TokenCounts,
};
use crate::{
    Error,
    info::{DatasetInfo, INFO_FILE, INFO_VERSION, InputInfo, OptionsInfo, SpecialToken},
    input::{Found, InputCounts, InputFile, InputOptions, Split, find},
    tokenizer::{DocumentTokenizer, Special, TokenizerOptions, train},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// Inputs, output and tokenizer of [`prepare`].
#[derive(Debug, Clone)]
pub struct PrepareOptions {
    /// Files, folders, globs, `@` and a file that lists them, or `-` for standard input.
    pub inputs: Vec<String>,
    /// Reading of the inputs.
    pub input: InputOptions,
    /// Folder for `train`, `valid`, `tokenizer.json` and `dataset.json`.
    pub output: PathBuf,
    /// A Hugging Face `tokenizer.json`, or its folder. Without it a byte-level BPE is trained on
    /// the documents.
    pub tokenizer: Option<PathBuf>,
    /// Choice and treatment of special tokens.
    pub tokenizing: TokenizerOptions,
    /// Vocabulary size of a newly trained tokenizer.
    pub vocab_size: usize,
    /// Share of the documents for validation, chosen by their number.
    pub validation_fraction: f64,
    /// Largest number of bytes of text to read; the last document is taken whole.
    pub max_bytes: Option<u64>,
    /// Pairs of token files.
    pub shards: Shards,
    /// This machine's share of the work.
    pub part: Option<Part>,
    /// Threads that tokenize. The result does not depend on it.
    pub threads: usize,
    /// True to replace a data set in the output folder.
    pub force: bool,
}

/// Messages and progress for the user.
pub enum Event<'a> {
    /// Something that the user may want to know.
    Note(&'a str),
    /// Something that may be wrong.
    Warning(&'a str),
    /// Progress of a stage, in bytes of text. The total may be an estimate, or unknown.
    Progress {
        /// Name of the stage.
        stage: &'static str,
        /// Bytes of text so far.
        done: u64,
        /// All bytes of text.
        total: Option<u64>,
    },
}

/// Progress of a command, of which the log of an interrupted one is made.
#[derive(Debug, Default)]
struct State {
    shards: BTreeMap<usize, ShardRecord>,
    /// Documents of the files that were read to their end, or to the limit of text.
    files: BTreeMap<usize, u64>,
    /// Everything that was left out, replaced or noticed in these files.
    counts: InputCounts,
}

/// A line of the log.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Entry {
    Shard {
        shard: usize,
        record: ShardRecord,
    },
    File {
        file: usize,
        documents: u64,
        counts: InputCounts,
    },
}

impl State {
    fn add(&mut self, entry: Entry) {
        match entry {
            Entry::Shard { shard, record } => {
                self.shards.insert(shard, record);
            }
            Entry::File {
                file,
                documents,
                counts,
            } => {
                self.files.insert(file, documents);
                self.counts.add(&counts);
            }
        }
    }
}

/// Reads documents, tokenizes them and writes token files.
///
/// An interrupted command continues where it was: finished shards are checked and kept. An
/// existing data set stays as it is until the new one is complete.
///
/// # Errors
/// If an option or an input is invalid, there is no text, the output folder has a data set (without
/// `force`), or the output cannot be written.
pub fn prepare(
    options: &PrepareOptions,
    report: &mut dyn FnMut(Event),
) -> Result<DatasetInfo, Error> {
    let held_out = HeldOut::new(options.validation_fraction)?;
    let input = InputOptions {
        output: Some(options.output.clone()),
        ..options.input.clone()
    };
    let found = find(&options.inputs, &input)?;
    for note in &found.notes {
        report(Event::Note(note));
    }
    for warning in &found.warnings {
        report(Event::Warning(warning));
    }
    check_streams(options, &found.files)?;
    plan::check_part(found.files.len(), options.shards, options.part)?;
    let states: Vec<FileState> = found.files.iter().map(FileState::of).collect();
    let given = options
        .tokenizer
        .as_ref()
        .map(|path| given_tokenizer(path, options, &found.files, report))
        .transpose()?;
    let command = command_hash(options, &found.files, &states, given.as_ref());
    // The documents of a stream are gone once they were read.
    let resumes = found.files.iter().all(|file| file.bytes().is_some());
    let target = Target::DataSet(options.output.clone());
    let begun = Staging::begin::<Entry>(target, &command, options.force, resumes)?;
    let Begun::Open {
        staging,
        log,
        is_restarted,
    } = begun
    else {
        report(Event::Note(
            "the data set was complete; its files are now in place",
        ));
        return read_info(&options.output);
    };
    if is_restarted {
        report(Event::Note(
            "a stream cannot be read again: the unfinished data set is made anew",
        ));
    }
    let mut state = State::default();
    for entry in log {
        state.add(entry);
    }
    let mut preparation = Preparation {
        options,
        found: &found,
        files: &found.files,
        states,
        held_out,
        staging: &staging,
        state,
        unsaved: Vec::new(),
        numbered: Numbered::default(),
        counts: TokenCounts::default(),
        report,
    };
    match preparation.run(given) {
        Ok(info) => {
            staging.complete(&preparation_files(&info))?;
            Ok(info)
        }
        Err(error) => {
            let is_empty = preparation.state.shards.is_empty();
            if is_empty {
                staging.discard();
            }
            Err(error)
        }
    }
}

/// Loads the user's tokenizer, and compares its encoders on a sample of the corpus.
fn given_tokenizer(
    path: &Path,
    options: &PrepareOptions,
    files: &[InputFile],
    report: &mut dyn FnMut(Event),
) -> Result<DocumentTokenizer, Error> {
    let (mut tokenizer, notes) = DocumentTokenizer::load(path, &options.tokenizing)?;
    show_notes(&notes, report);
    if files.iter().all(|file| file.bytes().is_some()) {
        let texts = sample(files, &options.input, options.max_bytes, CHECKED_SAMPLE)?;
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let warning = tokenizer.verify_on(&texts);
        show_notes(warning.as_slice(), report);
    }
    report(Event::Note(&format!(
        "encoding with {}",
        tokenizer.encoder()
    )));
    Ok(tokenizer)
}

/// Shows the notes of a tokenizer, of which some are warnings.
fn show_notes(notes: &[String], report: &mut dyn FnMut(Event)) {
    for note in notes {
        report(match note.strip_prefix("warning: ") {
            Some(warning) => Event::Warning(warning),
            None => Event::Note(note),
        });
    }
}

fn recorded_token(token: Special) -> SpecialToken {
    SpecialToken {
        id: token.id,
        text: token.text,
    }
}

/// Returns the files of a data set.
fn preparation_files(info: &DatasetInfo) -> Vec<String> {
    let pair = |name: &String| [format!("{name}.bin"), format!("{name}.idx")];
    let pairs = info.files.keys().flat_map(pair);
    let others = [TOKENIZER_FILE.to_string(), INFO_FILE.to_string()];
    pairs.chain(others).collect()
}

/// Standard input and pipes can be read only once.
fn check_streams(options: &PrepareOptions, files: &[InputFile]) -> Result<(), Error> {
    let Some(stream) = files.iter().find(|file| file.bytes().is_none()) else {
        return Ok(());
    };
    let reason = if options.tokenizer.is_none() {
        "the documents are read twice to train a tokenizer: give --tokenizer"
    } else if needs_count(options) {
        "the documents are read twice with --shards N, --part and --max-mb"
    } else {
        return Ok(());
    };
    Err(Error::Options(format!(
        "{stream} cannot be used here: {reason}, or write it to a file first"
    )))
}

fn needs_count(options: &PrepareOptions) -> bool {
    let is_limited = options.max_bytes.is_some();
    let holds_out = options.validation_fraction > 0.0;
    plan::needs_count(options.shards, options.part, is_limited, holds_out)
}

/// Returns the options for `dataset.json`.
fn recorded(options: &PrepareOptions) -> OptionsInfo {
    let separator = match &options.input.split {
        Split::Separator(text) => Some(text.clone()),
        _ => None,
    };
    let split = match options.input.split {
        Split::File => "file",
        Split::Line => "line",
        Split::BlankLine => "blank-line",
        Split::Separator(_) => "separator",
    };
    OptionsInfo {
        text_key: options.input.text_key.to_string(),
        split: split.into(),
        separator,
        extensions: options.input.extensions.clone(),
        strict: options.input.strict,
        hidden: options.input.hidden,
        special_tokens: options.tokenizing.special_tokens_in_text,
        trained_vocab_size: options.tokenizer.is_none().then_some(options.vocab_size),
        validation_fraction: options.validation_fraction,
        max_bytes: options.max_bytes,
        shards: match options.shards {
            Shards::One => None,
            Shards::Equal(shards) => Some(shards.to_string()),
            Shards::PerInput => Some("input".into()),
        },
        part: options.part.map(|part| part.to_string()),
    }
}

/// Size and time of a file, by which a change is noticed. Streams have neither.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct FileState {
    bytes: Option<u64>,
    modified: Option<String>,
}

impl FileState {
    fn of(file: &InputFile) -> FileState {
        let bytes = file.bytes();
        let metadata = file.path().and_then(|path| std::fs::metadata(path).ok());
        let modified = metadata.and_then(|metadata| metadata.modified().ok());
        let modified = modified.filter(|_| bytes.is_some());
        FileState {
            bytes,
            modified: modified.map(|time| format!("{time:?}")),
        }
    }
}

/// Returns a hash of what the parts of a corpus share: options, files and their documents.
fn corpus_hash(
    options: &PrepareOptions,
    files: &[InputFile],
    states: &[FileState],
    plan: &Plan,
) -> String {
    let sizes = states.iter().map(|state| state.bytes);
    let files: Vec<_> = files.iter().map(InputFile::to_string).zip(sizes).collect();
    let shared = OptionsInfo {
        part: None,
        ..recorded(options)
    };
    let everything = (INFO_VERSION, shared, files, &plan.first_documents);
    let text = serde_json::to_vec(&everything).expect("plain data");
    blake3::hash(&text).to_hex().to_string()
}

/// Returns a hash of everything that decides on the result.
fn command_hash(
    options: &PrepareOptions,
    files: &[InputFile],
    states: &[FileState],
    given: Option<&DocumentTokenizer>,
) -> String {
    let files: Vec<_> = files.iter().map(InputFile::to_string).zip(states).collect();
    let tokenizer = given.map(|tokenizer| {
        let bos = tokenizer.bos().map(|bos| bos.id);
        (tokenizer.hash(), tokenizer.eos().id, bos)
    });
    let names = (&options.tokenizing.eos, &options.tokenizing.bos);
    let everything = (INFO_VERSION, recorded(options), files, tokenizer, names);
    let text = serde_json::to_vec(&everything).expect("plain data");
    blake3::hash(&text).to_hex().to_string()
}

fn read_info(folder: &Path) -> Result<DatasetInfo, Error> {
    let path = folder.join(INFO_FILE);
    let text = std::fs::read(&path).map_err(Error::io("cannot read", &path))?;
    serde_json::from_slice(&text)
        .map_err(|error| Error::Data(format!("{} is damaged: {error}", path.display())))
}

/// Writes `dataset.json` in a folder.
fn write_info(path: &Path, info: &DatasetInfo) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(info).expect("plain data");
    write_synced(path, (text + "\n").as_bytes())
}

/// The state of a command that runs.
struct Preparation<'a> {
    options: &'a PrepareOptions,
    found: &'a Found,
    files: &'a [InputFile],
    /// The files as they were before anything was read.
    states: Vec<FileState>,
    held_out: HeldOut,
    staging: &'a Staging,
    state: State,
    /// Entries of files for the log.
    unsaved: Vec<Entry>,
    numbered: Numbered,
    counts: TokenCounts,
    report: &'a mut dyn FnMut(Event),
}

impl Preparation<'_> {
    fn run(&mut self, given: Option<DocumentTokenizer>) -> Result<DatasetInfo, Error> {
        let tokenizer = match given {
            Some(tokenizer) => tokenizer,
            None => self.trained()?,
        };
        let path = self.staging.path(TOKENIZER_FILE);
        replace_synced(&path, tokenizer.json().as_bytes())?;
        let plan = self.plan()?;
        self.check_finished(&plan)?;
        self.write(&plan, &tokenizer)?;
        self.check_files()?;
        let info = self.info(&plan, &tokenizer)?;
        write_info(&self.staging.path(INFO_FILE), &info)?;
        Ok(info)
    }

    /// Checks that no file has changed since the command began.
    fn check_files(&mut self) -> Result<(), Error> {
        let mut files = self.files.iter().zip(&self.states);
        let Some((file, _)) = files.find(|(file, state)| FileState::of(file) != **state) else {
            return Ok(());
        };
        // The finished shards may hold text from before and after the change.
        self.state.shards.clear();
        Err(Error::Data(format!(
            "{file} changed while it was read: start again once nothing writes to it"
        )))
    }

    /// Returns the tokenizer that an interrupted command trained, or trains one.
    fn trained(&mut self) -> Result<DocumentTokenizer, Error> {
        let path = self.staging.path(TOKENIZER_FILE);
        if !self.state.shards.is_empty() && path.exists() {
            let (tokenizer, _) = DocumentTokenizer::load(&path, &self.options.tokenizing)?;
            return Ok(tokenizer);
        }
        let stage = "training the tokenizer";
        let options = self.options;
        let texts = sample(
            self.files,
            &options.input,
            options.max_bytes,
            TRAINING_SAMPLE,
        )?;
        let total = texts.iter().map(|text| text.len() as u64).sum();
        if total == 0 {
            return Err(self.without_text());
        }
        let progress = |done| Event::Progress {
            stage,
            done,
            total: Some(total),
        };
        (self.report)(progress(0));
        let (trained, _) = train(texts.iter(), options.vocab_size)?;
        (self.report)(progress(total));
        let (tokenizer, _) = DocumentTokenizer::of_json(trained.json(), &options.tokenizing)?;
        Ok(tokenizer)
    }

    fn plan(&mut self) -> Result<Plan, Error> {
        let options = self.options;
        let report = &mut self.report;
        let mut progress = |done| {
            report(Event::Progress {
                stage: "counting",
                done,
                total: options.max_bytes,
            });
        };
        let counts = needs_count(options)
            .then(|| count::count(self.files, &options.input, options.max_bytes, &mut progress))
            .transpose()?;
        let files = self.files.len();
        Ok(plan::plan(
            files,
            counts.as_deref(),
            options.shards,
            options.part,
        ))
    }

    fn names(&self, shard: usize) -> ShardNames {
        let is_one = self.options.shards == Shards::One;
        ShardNames::new((!is_one).then_some(shard))
    }

    /// Drops finished shards whose files have changed.
    fn check_finished(&mut self, plan: &Plan) -> Result<(), Error> {
        let finished = std::mem::take(&mut self.state.shards);
        let count = finished.len();
        for (shard, record) in finished {
            let names = self.names(shard);
            let train = self.staging.path(&names.train);
            let valid = self.staging.path(&names.valid);
            if record.verify(&train, &valid, &mut self.counts) {
                self.state.shards.insert(shard, record);
            } else {
                let warning = format!("{} is damaged and is made again", train.display());
                (self.report)(Event::Warning(&warning));
            }
        }
        if count > 0 {
            let kept = self.state.shards.len();
            let all = plan.shards.len();
            let note = format!("resuming: {kept} of {all} shards are finished");
            (self.report)(Event::Note(&note));
        }
        Ok(())
    }

    /// Writes all shards that are not finished.
    fn write(&mut self, plan: &Plan, tokenizer: &DocumentTokenizer) -> Result<(), Error> {
        let format = Format {
            bos: tokenizer.bos().map(|bos| bos.id),
            eos: tokenizer.eos().id,
            vocab_size: tokenizer.vocab_size(),
            held_out: self.held_out,
        };
        let mut work = plan.work.clone();
        for file in &mut work {
            let is_open = |shard: usize| !self.state.shards.contains_key(&shard);
            file.ranges.retain(|range| is_open(range.shard));
            file.counts &= !self.state.files.contains_key(&file.file);
        }
        work.retain(|file| file.counts || !file.ranges.is_empty());
        let counted = work.iter().filter(|work| work.counts);
        let counted: BTreeSet<usize> = counted.map(|work| work.file).collect();
        let options = self.options;
        let pipeline = Pipeline {
            files: self.files,
            input: &options.input,
            work: &work,
            tokenizer,
            threads: options.threads,
        };
        let mut done = Done::new(self.files, &work);
        let mut current: Option<CurrentShard> = None;
        let mut open = plan.shards.clone();
        pipeline::run(&pipeline, &mut |item| match item {
            Item::Tokens(batch) => {
                if current
                    .as_ref()
                    .is_none_or(|current| current.shard != batch.shard)
                {
                    self.finish(current.take())?;
                    for shard in open.by_ref().take_while(|&shard| shard != batch.shard) {
                        let empty = self.start(shard, &format)?;
                        self.finish(empty)?;
                    }
                    current = self.start(batch.shard, &format)?;
                }
                let first = self.first_document(plan, batch.file);
                let shard = current.as_mut().expect("started above");
                shard
                    .writer
                    .push(&batch, first, &format, &mut self.counts)?;
                done.add(&batch);
                (self.report)(done.event());
                Ok(())
            }
            Item::FileEnd(end) => {
                self.file_end(&counted, *end);
                Ok(())
            }
        })?;
        self.finish(current)?;
        for shard in open {
            let empty = self.start(shard, &format)?;
            self.finish(empty)?;
        }
        Ok(())
    }

    /// Returns the number of a file's first document.
    fn first_document(&mut self, plan: &Plan, file: usize) -> u64 {
        match &plan.first_documents {
            Some(numbers) => numbers[file],
            // All files before it have been read, by this command or before it was interrupted.
            None => self.numbered.before(file, &self.state.files),
        }
    }

    fn file_end(&mut self, work: &BTreeSet<usize>, end: FileEnd) {
        if work.contains(&end.file) {
            self.state.files.insert(end.file, end.documents);
            self.state.counts.add(&end.counts);
            self.unsaved.push(Entry::File {
                file: end.file,
                documents: end.documents,
                counts: end.counts,
            });
        }
    }

    /// Creates the files of a shard, unless it is finished.
    fn start(&self, shard: usize, format: &Format) -> Result<Option<CurrentShard>, Error> {
        if self.state.shards.contains_key(&shard) {
            return Ok(None);
        }
        let names = self.names(shard);
        let train = self.staging.path(&names.train);
        let valid = self.staging.path(&names.valid);
        let writer = ShardWriter::create(&train, &valid, format)?;
        Ok(Some(CurrentShard { shard, writer }))
    }

    fn finish(&mut self, current: Option<CurrentShard>) -> Result<(), Error> {
        if let Some(CurrentShard { shard, writer }) = current {
            let record = writer.finish()?;
            self.state.shards.insert(shard, record.clone());
            self.unsaved.push(Entry::Shard { shard, record });
            self.staging.append(&self.unsaved)?;
            self.unsaved.clear();
        }
        Ok(())
    }

    fn info(&mut self, plan: &Plan, tokenizer: &DocumentTokenizer) -> Result<DatasetInfo, Error> {
        let mut info = DatasetInfo {
            vocab_size: tokenizer.vocab_size(),
            unigram_entropy: self.counts.entropy(),
            eos: Some(recorded_token(tokenizer.eos())),
            bos: tokenizer.bos().map(recorded_token),
            tokenizer_hash: Some(tokenizer.hash()),
            encoder: Some(tokenizer.encoder().to_string()),
            options: Some(recorded(self.options)),
            corpus: self
                .options
                .part
                .map(|_| corpus_hash(self.options, self.files, &self.states, plan)),
            version: INFO_VERSION,
            ..DatasetInfo::default()
        };
        info.counts = self.counts_of_inputs();
        let mut inputs: BTreeMap<usize, InputInfo> = BTreeMap::new();
        for (&shard, record) in &self.state.shards {
            let names = self.names(shard);
            info.train_tokens += record.train.tokens;
            info.documents += record.train.documents;
            info.bytes += record.train.bytes;
            info.files.insert(names.train, record.train.clone());
            if let Some(valid) = &record.valid {
                info.validation_tokens += valid.tokens;
                info.documents += valid.documents;
                info.bytes += valid.bytes;
                info.files.insert(names.valid, valid.clone());
            }
            info.one_token_documents += record.one_token;
            info.documents_without_tokens += record.without_tokens;
            info.documents_not_tokenized += record.refused;
            for example in &record.examples {
                info.counts.add_example(|| example.clone());
            }
            for (&file, share) in &record.inputs {
                let input = inputs.entry(file).or_insert_with(|| InputInfo {
                    path: self.files[file].to_string(),
                    bytes: 0,
                    documents: 0,
                });
                input.bytes += share.bytes;
                input.documents += share.documents;
            }
        }
        for &file in self.state.files.keys() {
            inputs.entry(file).or_insert_with(|| InputInfo {
                path: self.files[file].to_string(),
                bytes: 0,
                documents: 0,
            });
        }
        info.inputs = inputs.into_values().collect();
        if let Some(name) = info.files.keys().next() {
            let pair = crate::tokens::TokenPair::open(&self.staging.path(name))?;
            info.dtype = Some(pair.dtype().into());
        }
        if info.documents_not_tokenized > info.documents {
            return Err(Error::Tokenizer(format!(
                "the tokenizer cannot encode {} of {} documents: {}",
                info.documents_not_tokenized,
                info.documents_not_tokenized + info.documents,
                info.counts.examples.join("; ")
            )));
        }
        let is_whole = self.options.part.is_none_or(|part| part.of == 1);
        if info.documents == 0 && is_whole {
            return Err(self.without_text());
        }
        let validates = !self.held_out.is_none();
        if validates && info.validation_tokens == 0 && is_whole {
            let fraction = self.options.validation_fraction;
            let documents = info.documents;
            let warning = format!(
                "no document is kept for validation: --validation-fraction {fraction} of \
                 {documents} documents; raise it, or split the files (--split)"
            );
            (self.report)(Event::Warning(&warning));
        }
        debug_assert_eq!(plan.shards.len(), self.state.shards.len());
        Ok(info)
    }

    /// Returns what finding and reading the files left out. The first part accounts for finding.
    fn counts_of_inputs(&self) -> InputCounts {
        let is_first = self.options.part.is_none_or(|part| part.index == 0);
        let mut counts = match is_first.then_some(&self.found.counts) {
            Some(counts) => counts.clone(),
            None => InputCounts::default(),
        };
        counts.add(&self.state.counts);
        counts
    }

    fn without_text(&self) -> Error {
        let lines = self.counts_of_inputs().lines();
        let lines = lines.into_iter().map(|line| format!("; {line}"));
        Error::Data(format!(
            "{}: no text ({} files were read){}",
            self.options.inputs.join(", "),
            self.files.len(),
            lines.collect::<String>()
        ))
    }
}

/// Number of documents before a file.
#[derive(Default)]
struct Numbered {
    file: usize,
    documents: u64,
}

impl Numbered {
    /// Returns the number of documents before `file`, which must not decrease from call to call.
    fn before(&mut self, file: usize, documents: &BTreeMap<usize, u64>) -> u64 {
        self.documents += documents
            .range(self.file..file)
            .map(|(_, n)| n)
            .sum::<u64>();
        self.file = file;
        self.documents
    }
}

/// The shard that is being written.
struct CurrentShard {
    shard: usize,
    writer: ShardWriter,
}

/// Progress of tokenization, in bytes of text.
struct Done {
    /// Sizes on disk of the files to read, or None if one is unknown.
    sizes: Option<BTreeMap<usize, u64>>,
    text: u64,
    /// Sizes of the files that are done.
    disk: u64,
    file: Option<usize>,
}

impl Done {
    fn new(files: &[InputFile], work: &[plan::FileWork]) -> Done {
        let size = |work: &plan::FileWork| Some((work.file, files[work.file].bytes()?));
        Done {
            sizes: work.iter().map(size).collect(),
            text: 0,
            disk: 0,
            file: None,
        }
    }

    fn add(&mut self, batch: &pipeline::Encoded) {
        if self.file != Some(batch.file) {
            let before = self.file.replace(batch.file);
            let size = |file| self.sizes.as_ref()?.get(&file).copied();
            self.disk += before.and_then(size).unwrap_or(0);
        }
        self.text += batch.parts.iter().map(|part| part.bytes).sum::<u64>();
    }

    /// The total is that of the disk, scaled by the text per byte of the files that are done.
    fn event(&self) -> Event<'static> {
        let total = self.sizes.as_ref().map(|sizes| sizes.values().sum::<u64>());
        let scaled = total.map(|total| {
            let text = u128::from(self.text);
            match self.disk {
                0 => u128::from(total).max(text),
                disk => (u128::from(total) * text / u128::from(disk)).max(text),
            }
        });
        Event::Progress {
            stage: "tokenizing",
            done: self.text,
            total: scaled.map(|total| u64::try_from(total).unwrap_or(u64::MAX)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_grows_while_it_is_read_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "some text to read\n".repeat(100)).unwrap();
        let output = folder.path().join("out");
        let options = PrepareOptions {
            inputs: vec![path.display().to_string()],
            input: InputOptions {
                split: Split::Line,
                ..InputOptions::default()
            },
            output: output.clone(),
            tokenizer: None,
            tokenizing: TokenizerOptions::default(),
            vocab_size: 300,
            validation_fraction: 0.0,
            max_bytes: None,
            shards: Shards::Equal(2),
            part: None,
            threads: 1,
            force: false,
        };
        for grows_after in ["counting", "tokenizing"] {
            let mut grown = false;
            let error = prepare(&options, &mut |event| {
                if let Event::Progress { stage, done, .. } = event
                    && stage == grows_after
                    && done > 0
                    && !std::mem::replace(&mut grown, true)
                {
                    let text = std::fs::read_to_string(&path).unwrap() + "one more\n";
                    std::fs::write(&path, text).unwrap();
                }
            });
            let error = error.err().unwrap().to_string();
            assert!(error.contains("a.txt changed while it was read"), "{error}");
            assert!(!output.join("train-00000.bin").exists());
            let _ = std::fs::remove_dir_all(&output);
        }
        prepare(&options, &mut |_| ()).unwrap();
    }
}
