//! `moerun data merge`: joins data sets, or pairs of token files.

use super::{
    Event, read_info,
    shard_writer::file_info,
    staging::{Begun, Staging, TOKENIZER_FILE, Target, replace_synced},
    token_counts::TokenCounts,
    write_info,
};
use crate::{
    Error,
    info::{DatasetInfo, FileInfo, INFO_FILE, INFO_VERSION, InputInfo, OptionsInfo},
    tokens::{TokenPair, WrittenPair, pair_prefix, with_extension},
};
use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

/// A result of [`merge`].
pub enum Merged {
    /// A data set, with its new record.
    DataSet(Box<DatasetInfo>),
    /// A pair, which has no record.
    Pair(MergedPair),
}

/// Facts about a pair that was made of others. Some are known only if all have a record.
pub struct MergedPair {
    pub documents: u64,
    pub tokens: u64,
    pub bytes_of_text: Option<u64>,
    pub vocab_size: Option<usize>,
    /// Entropy of the frequencies of the tokens, in nats.
    pub unigram_entropy: f64,
}

/// Joins data sets into the folder `output`, or pairs of token files into the pair `output`, in the
/// order of `inputs`. Every input is checked as it is read.
///
/// All training documents come into one pair and all validation documents into another. The parts
/// of a corpus that was prepared with `--part` give the same bytes as the whole.
///
/// # Errors
/// If an input is missing, damaged or named twice, inputs differ in their tokens, parts are
/// missing, in the wrong order or of different corpora, or the output exists (without `force`) or
/// cannot be written.
pub fn merge(
    output: &Path,
    inputs: &[PathBuf],
    force: bool,
    report: &mut dyn FnMut(Event),
) -> Result<Merged, Error> {
    let inputs: Vec<PathBuf> = inputs.iter().map(|input| pair_prefix(input)).collect();
    let inputs = &inputs[..];
    check_repeated(inputs)?;
    let are_folders = inputs.iter().filter(|input| input.is_dir()).count();
    if are_folders == 0 {
        return merge_pairs(output, inputs, force, report).map(Merged::Pair);
    }
    if are_folders < inputs.len() {
        return Err(Error::Options(
            "some inputs are folders and some are not: merge data sets or pairs".into(),
        ));
    }
    let sets: Vec<Set> = inputs
        .iter()
        .map(|input| Set::open(input))
        .collect::<Result<_, _>>()?;
    let records: Vec<Record> = sets.iter().map(|set| (&*set.folder, &set.info)).collect();
    check_same(&records)?;
    check_parts(&sets)?;
    if common(&sets, |info| info.options.clone().map(without_part)).is_none() {
        report(Event::Warning(
            "the data sets were made with different options, so the new dataset.json has none",
        ));
    }
    let hashes: Vec<String> = sets.iter().map(Set::identity).collect();
    let command = blake3::hash(hashes.join("\n").as_bytes())
        .to_hex()
        .to_string();
    let target = Target::DataSet(output.to_path_buf());
    let Begun::Open { staging, .. } = Staging::begin::<()>(target, &command, force, true)? else {
        return Ok(Merged::DataSet(Box::new(read_info(output)?)));
    };
    match merge_sets(&sets, &staging) {
        Ok(info) => {
            staging.complete(&super::preparation_files(&info))?;
            Ok(Merged::DataSet(Box::new(info)))
        }
        Err(error) => {
            staging.discard();
            Err(error)
        }
    }
}

/// A data set to merge, with its record.
struct Set {
    folder: PathBuf,
    info: DatasetInfo,
}

impl Set {
    fn open(folder: &Path) -> Result<Set, Error> {
        let set = Set {
            folder: folder.to_path_buf(),
            info: read_info(folder)?,
        };
        if set.info.files.is_empty() {
            return Err(Error::Data(format!(
                "{} is of an earlier version and does not list the files: merge the pairs \
                 instead, such as {}",
                folder.join(INFO_FILE).display(),
                folder.join("train").display()
            )));
        }
        Ok(set)
    }

    fn identity(&self) -> String {
        serde_json::to_string(&self.info).expect("plain data")
    }

    /// Returns the names of the training or the validation pairs, in order.
    fn pairs(&self, kind: &str) -> Vec<&str> {
        let names = self.info.files.keys().map(String::as_str);
        let mut names: Vec<&str> = names.filter(|name| name.starts_with(kind)).collect();
        // Numbers have at least five digits, and more if need be.
        names.sort_by_key(|name| (name.len(), *name));
        names
    }
}

/// Checks that no input is named twice, by whatever path.
fn check_repeated(inputs: &[PathBuf]) -> Result<(), Error> {
    let mut seen = HashSet::new();
    for input in inputs {
        let path = if input.is_dir() {
            input.clone()
        } else {
            with_extension(input, "idx")
        };
        // A missing file is named when it is opened.
        let path = path.canonicalize().unwrap_or(path);
        if !seen.insert(path) {
            return Err(Error::Options(format!(
                "{} is named twice: its documents would be there twice",
                input.display()
            )));
        }
    }
    Ok(())
}

/// A data set's record, with the path that it describes.
type Record<'a> = (&'a Path, &'a DatasetInfo);

fn check_same(records: &[Record]) -> Result<(), Error> {
    let Some(first) = records.first() else {
        return Ok(());
    };
    for record in &records[1..] {
        let own = (record.1, first.1);
        let checks = [
            ("tokenizers", own.0.tokenizer_hash != own.1.tokenizer_hash),
            ("vocabulary sizes", own.0.vocab_size != own.1.vocab_size),
            ("types of tokens", own.0.dtype != own.1.dtype),
            ("tokens that end documents", own.0.eos != own.1.eos),
            ("tokens that begin documents", own.0.bos != own.1.bos),
        ];
        if let Some((property, _)) = checks.iter().find(|(_, differs)| *differs) {
            return Err(Error::Data(format!(
                "{} and {} have different {property}",
                first.0.display(),
                record.0.display()
            )));
        }
    }
    Ok(())
}

/// Checks that the parts of a corpus are all there, each once and in order.
fn check_parts(sets: &[Set]) -> Result<(), Error> {
    let part = |set: &Set| set.info.options.as_ref()?.part.clone();
    let parts: Vec<String> = sets.iter().filter_map(part).collect();
    if parts.is_empty() {
        return Ok(());
    }
    let count = parts[0]
        .split('/')
        .nth(1)
        .and_then(|count| count.parse::<usize>().ok());
    let count = count.unwrap_or(0);
    let expected: Vec<String> = (0..count).map(|index| format!("{index}/{count}")).collect();
    if parts == expected && parts.len() == sets.len() {
        return check_corpus(sets);
    }
    let shown = expected
        .iter()
        .take(4)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    let more = if expected.len() > 4 { ", ..." } else { "" };
    Err(Error::Options(format!(
        "the inputs are the parts {}; merge all parts in order: {shown}{more}",
        parts.join(", ")
    )))
}

/// Checks that parts were made by the same command, from the same files.
fn check_corpus(sets: &[Set]) -> Result<(), Error> {
    let first = &sets[0];
    let differs = |set: &&Set| set.info.corpus != first.info.corpus;
    match sets.iter().find(differs) {
        None => Ok(()),
        Some(other) => Err(Error::Data(format!(
            "{} and {} are parts of different corpora: the options, the input files or their \
             sizes differ; prepare the parts with the same command, except for --part and the \
             output",
            first.folder.display(),
            other.folder.display()
        ))),
    }
}

fn merge_sets(sets: &[Set], staging: &Staging) -> Result<DatasetInfo, Error> {
    let mut info = DatasetInfo {
        vocab_size: sets[0].info.vocab_size,
        eos: sets[0].info.eos.clone(),
        bos: sets[0].info.bos.clone(),
        tokenizer_hash: sets[0].info.tokenizer_hash.clone(),
        dtype: sets[0].info.dtype.clone(),
        encoder: common(sets, |info| info.encoder.clone()),
        options: common(sets, |info| info.options.clone().map(without_part)),
        version: INFO_VERSION,
        ..DatasetInfo::default()
    };
    for set in sets {
        info.documents += set.info.documents;
        info.bytes += set.info.bytes;
        info.train_tokens += set.info.train_tokens;
        info.validation_tokens += set.info.validation_tokens;
        info.one_token_documents += set.info.one_token_documents;
        info.documents_without_tokens += set.info.documents_without_tokens;
        info.documents_not_tokenized += set.info.documents_not_tokenized;
        info.counts.add(&set.info.counts);
        for input in &set.info.inputs {
            add_input(&mut info.inputs, input);
        }
    }
    let mut counts = TokenCounts::default();
    for kind in ["train", "valid"] {
        let pairs = sets.iter().flat_map(|set| {
            let recorded = |name| (set.folder.join(name), Some(&set.info.files[name]));
            set.pairs(kind).into_iter().map(recorded)
        });
        let pairs: Vec<(PathBuf, Option<&FileInfo>)> = pairs.collect();
        if pairs.is_empty() {
            continue;
        }
        let mut ignored = TokenCounts::default();
        let counted = if kind == "train" {
            &mut counts
        } else {
            &mut ignored
        };
        let merged = join(&staging.path(kind), &pairs, counted)?;
        info.files.insert(kind.into(), merged);
    }
    info.unigram_entropy = counts.entropy();
    let from = sets[0].folder.join(TOKENIZER_FILE);
    let tokenizer = std::fs::read(&from).map_err(Error::io("cannot read", &from))?;
    replace_synced(&staging.path(TOKENIZER_FILE), &tokenizer)?;
    write_info(&staging.path(INFO_FILE), &info)?;
    Ok(info)
}

/// Adds an input, or the rest of one whose beginning is in an earlier part.
fn add_input(inputs: &mut Vec<InputInfo>, input: &InputInfo) {
    match inputs.last_mut().filter(|last| last.path == input.path) {
        Some(last) => {
            last.bytes += input.bytes;
            last.documents += input.documents;
        }
        None => inputs.push(input.clone()),
    }
}

fn without_part(options: OptionsInfo) -> OptionsInfo {
    OptionsInfo {
        part: None,
        ..options
    }
}

/// Returns a value that all data sets share.
fn common<T: PartialEq>(sets: &[Set], value: fn(&DatasetInfo) -> Option<T>) -> Option<T> {
    let first = value(&sets[0].info);
    let is_common = sets.iter().all(|set| value(&set.info) == first);
    first.filter(|_| is_common)
}

/// Writes the documents of all pairs into one.
fn join(
    output: &Path,
    pairs: &[(PathBuf, Option<&FileInfo>)],
    counts: &mut TokenCounts,
) -> Result<FileInfo, Error> {
    let opened = pairs.iter().map(|(prefix, _)| TokenPair::open(prefix));
    let opened: Vec<TokenPair> = opened.collect::<Result<_, _>>()?;
    let first = &opened[0];
    if let Some(other) = opened.iter().position(|pair| pair.dtype() != first.dtype()) {
        return Err(Error::Data(format!(
            "{} has tokens of the type {}, {} of the type {}",
            pairs[0].0.display(),
            first.dtype(),
            pairs[other].0.display(),
            opened[other].dtype()
        )));
    }
    let mut writer = first.writer_like(output)?;
    let mut bytes = 0;
    for (pair, (prefix, recorded)) in opened.iter().zip(pairs) {
        let read = pair.append_to(&mut writer, &mut |part| counts.add(part.tokens))?;
        if let Some(recorded) = recorded {
            check_recorded(&read, recorded, prefix)?;
            bytes += recorded.bytes;
        }
    }
    Ok(file_info(writer.finish()?, bytes))
}

/// Compares a pair that was read with its record.
pub(super) fn check_recorded(
    written: &WrittenPair,
    recorded: &FileInfo,
    prefix: &Path,
) -> Result<(), Error> {
    let failed = |file: &str, cause: String| {
        let prefix = prefix.display();
        Err(Error::Data(format!("{prefix}{file} is damaged: {cause}")))
    };
    let differs = "its checksum is not that of dataset.json".to_string();
    if written.documents != recorded.documents {
        let cause = format!(
            "it has {} documents; dataset.json records {}",
            written.documents, recorded.documents
        );
        return failed(".idx", cause);
    }
    if written.tokens != recorded.tokens {
        let cause = format!(
            "it has {} tokens; dataset.json records {}",
            written.tokens, recorded.tokens
        );
        return failed(".bin", cause);
    }
    if written.idx != recorded.idx {
        return failed(".idx", differs);
    }
    if written.bin != recorded.bin {
        return failed(".bin", differs);
    }
    Ok(())
}

fn merge_pairs(
    output: &Path,
    inputs: &[PathBuf],
    force: bool,
    report: &mut dyn FnMut(Event),
) -> Result<MergedPair, Error> {
    let of_own = DatasetInfo::of_tokens(output)?;
    if of_own.is_some_and(|info| info.file(output).is_some()) {
        return Err(Error::Options(format!(
            "{} belongs to a data set, of which {INFO_FILE} records the checksums: choose another \
             name",
            output.display()
        )));
    }
    let records = inputs.iter().map(|input| DatasetInfo::of_tokens(input));
    let records: Vec<Option<DatasetInfo>> = records.collect::<Result<_, _>>()?;
    let mut known: Vec<Record> = Vec::new();
    let mut pairs: Vec<(PathBuf, Option<&FileInfo>)> = Vec::new();
    for (input, record) in inputs.iter().zip(&records) {
        let file = record.as_ref().and_then(|record| record.file(input));
        pairs.push((input.clone(), file));
        match record {
            Some(record) if file.is_some() => known.push((input, record)),
            _ => report(Event::Note(&format!(
                "{}: no {INFO_FILE} lists it, so its tokenizer and its checksums are not compared",
                input.display()
            ))),
        }
    }
    check_same(&known)?;
    // Nothing is kept of an interrupted command, so that its name matters little.
    let target = Target::Pair(output.to_path_buf());
    let Begun::Open { staging, .. } = Staging::begin::<()>(target, "merge", force, false)? else {
        return Err(Error::Data("internal error: a pair was resumed".into()));
    };
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    let mut counts = TokenCounts::default();
    let merged = match join(&staging.path(&name), &pairs, &mut counts) {
        Ok(merged) => merged,
        Err(error) => {
            staging.discard();
            return Err(error);
        }
    };
    staging.complete(&[format!("{name}.bin"), format!("{name}.idx")])?;
    let all_known = known.len() == inputs.len();
    Ok(MergedPair {
        documents: merged.documents,
        tokens: merged.tokens,
        bytes_of_text: all_known.then_some(merged.bytes),
        vocab_size: known
            .first()
            .filter(|_| all_known)
            .map(|(_, info)| info.vocab_size),
        unigram_entropy: counts.entropy(),
    })
}
