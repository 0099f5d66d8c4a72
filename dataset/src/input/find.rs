//! The files that the user's inputs stand for.
//!
//! Links are followed. A file or folder that is reached again, by another path or link, is read
//! once: devices and inodes tell. Hidden files and folders in folders are left out, as Hugging Face
//! datasets does.

use super::{
    counts::InputCounts,
    file::{Contents, InputFile, OpenError, Suffixes},
    options::{InputOptions, Split},
    parquet_rows,
    recognize::{Format, format_of_extension},
    unused::Uses,
};
use crate::Error;
use std::{
    collections::{BTreeSet, HashSet},
    ffi::OsStr,
    fs::Metadata,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

/// Most paths that a note names.
const MAX_NAMES: usize = 10;

/// Names of files that describe a data set, whose suffix is one of [`CARD_SUFFIXES`] or none.
const CARDS: [&str; 6] = [
    "readme",
    "license",
    "licence",
    "notice",
    "citation",
    "changelog",
];

const CARD_SUFFIXES: [&str; 5] = ["md", "markdown", "txt", "text", "rst"];

/// Whole names of files that describe a data set.
const RECORDS: [&str; 3] = ["dataset_info.json", "dataset_infos.json", "state.json"];

/// The files to read.
#[derive(Debug)]
pub struct Found {
    /// The files, in order.
    pub files: Vec<InputFile>,
    /// Lines for the user about everything that was left out.
    pub notes: Vec<String>,
    /// Lines for the user about options that have no effect.
    pub warnings: Vec<String>,
    /// Counts of what was left out.
    pub counts: InputCounts,
}

/// Finds the files that `inputs` stand for, each once.
///
/// An input is a file, a folder, a pattern such as `data/**/*.jsonl`, `-` for standard input, or
/// `@` and the path of a list with a path or pattern on each line. The files of a folder and those
/// of a pattern are sorted. Files on disk are opened to check that they can be read.
///
/// # Errors
/// If an input does not exist, a file is of an unknown kind, or there are no files. In folders,
/// files of unknown kinds are left out and noted.
pub fn find(inputs: &[String], options: &InputOptions) -> Result<Found, Error> {
    if matches!(&options.split, Split::Separator(separator) if separator.is_empty()) {
        return Err(Error::Options("the separator of documents is empty".into()));
    }
    let output = options.output.as_ref();
    let output = output.and_then(|folder| std::fs::metadata(folder).ok());
    let mut finder = Finder {
        options,
        found: Found {
            files: Vec::new(),
            notes: Vec::new(),
            warnings: Vec::new(),
            counts: InputCounts::default(),
        },
        seen_files: HashSet::new(),
        seen_folders: HashSet::new(),
        output: output.map(|metadata| identity(&metadata)),
        other_splits: Vec::new(),
        repeated: Vec::new(),
        unknown: Vec::new(),
        hidden: Vec::new(),
        uses: Uses::default(),
    };
    for input in inputs {
        finder.add_input(input)?;
    }
    finder.finish(inputs)
}

/// Device and inode of a file.
type Identity = [u64; 2];

fn identity(metadata: &Metadata) -> Identity {
    [metadata.dev(), metadata.ino()]
}

struct Finder<'o> {
    options: &'o InputOptions,
    found: Found,
    seen_files: HashSet<Identity>,
    seen_folders: HashSet<Identity>,
    /// The folder of the result.
    output: Option<Identity>,
    other_splits: Vec<String>,
    repeated: Vec<String>,
    unknown: Vec<String>,
    hidden: Vec<String>,
    uses: Uses,
}

impl Finder<'_> {
    fn add_input(&mut self, input: &str) -> Result<(), Error> {
        if input == "-" {
            let file = InputFile::standard_input();
            if self.found.files.contains(&file) {
                self.repeated.push(file.to_string());
            } else {
                self.add_stream(file);
            }
            return Ok(());
        }
        let Some(list) = input.strip_prefix('@') else {
            return self.add_pattern(input);
        };
        let paths = std::fs::read_to_string(list)
            .map_err(Error::io("cannot read the list", Path::new(list)))?;
        for (index, path) in paths.lines().enumerate() {
            if !path.trim().is_empty() {
                self.add_pattern(path)
                    .map_err(|error| Error::Data(format!("{list}:{}: {error}", index + 1)))?;
            }
        }
        Ok(())
    }

    fn add_pattern(&mut self, pattern: &str) -> Result<(), Error> {
        let path = Path::new(pattern);
        // A file may have such characters in its name.
        if path.symlink_metadata().is_ok() || !pattern.contains(['*', '?', '[']) {
            return self.add_path(path);
        }
        self.uses.has_folders = true;
        let matching = glob::MatchOptions {
            case_sensitive: true,
            require_literal_separator: true,
            require_literal_leading_dot: !self.options.hidden,
        };
        let invalid = |error| Error::Options(format!("the pattern {pattern}: {error}"));
        let paths = glob::glob_with(pattern, matching).map_err(invalid)?;
        let mut paths = paths.collect::<Result<Vec<_>, _>>().map_err(|error| {
            let path = error.path().to_owned();
            Error::io("cannot read", &path)(error.into())
        })?;
        paths.sort();
        if paths.is_empty() {
            return Err(Error::Data(format!(
                "{pattern}: no file matches the pattern"
            )));
        }
        for path in &paths {
            self.add_path(path)?;
        }
        Ok(())
    }

    fn add_path(&mut self, path: &Path) -> Result<(), Error> {
        let metadata = std::fs::metadata(path).map_err(Error::io("cannot open", path))?;
        if !metadata.is_dir() {
            return self.add_file(path, &metadata, false);
        }
        self.uses.has_folders = true;
        let mut files = Vec::new();
        self.walk(path, &metadata, &mut files)?;
        let has_tables = self.options.extensions.is_none()
            && files.iter().any(|path| is_table(path) && !is_card(path));
        for path in self.choose_split(path, files) {
            if has_tables && is_card(&path) {
                let path = path.display();
                self.unknown
                    .push(format!("{path} (it describes the data set)"));
                continue;
            }
            let metadata = std::fs::metadata(&path).map_err(Error::io("cannot open", &path))?;
            self.add_file(&path, &metadata, true)?;
        }
        Ok(())
    }

    /// Lists the files of a folder and of those inside of it.
    fn walk(
        &mut self,
        folder: &Path,
        metadata: &Metadata,
        files: &mut Vec<PathBuf>,
    ) -> Result<(), Error> {
        if !self.seen_folders.insert(identity(metadata)) {
            self.repeated.push(folder.display().to_string());
            return Ok(());
        }
        let entries = std::fs::read_dir(folder).map_err(Error::io("cannot open", folder))?;
        let mut paths = entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::io("cannot read", folder))?;
        paths.sort();
        for path in paths {
            let name = path.file_name().unwrap_or_default();
            if name.as_bytes().starts_with(b".") && !self.options.hidden {
                self.hidden.push(path.display().to_string());
                continue;
            }
            let metadata = std::fs::metadata(&path).map_err(Error::io("cannot open", &path))?;
            if metadata.is_dir() {
                if self.output == Some(identity(&metadata)) {
                    let output = path.display();
                    let note = format!("left out {output}, the folder of the result");
                    self.found.notes.push(note);
                } else {
                    self.walk(&path, &metadata, files)?;
                }
                continue;
            }
            let suffixes = Suffixes::of(&path);
            let is_arrow = suffixes.last.as_deref() == Some("arrow");
            if is_arrow && (self.options.extensions.is_none() || self.options.lists("arrow")) {
                return Err(refuse_arrow(&path));
            }
            if suffixes.are_taken(self.options) {
                files.push(path);
            } else {
                self.unknown.push(path.display().to_string());
            }
        }
        Ok(())
    }

    fn add_stream(&mut self, file: InputFile) {
        self.found.files.push(file);
        self.uses.has_text = true;
        self.uses.has_rows = true;
    }

    fn add_file(&mut self, path: &Path, metadata: &Metadata, in_folder: bool) -> Result<(), Error> {
        let file = InputFile::new(path.to_owned());
        if !metadata.is_file() {
            // Opening a pipe would take bytes from it.
            if in_folder {
                self.unknown.push(format!("{file} (it is no regular file)"));
            } else {
                self.add_stream(file);
            }
            return Ok(());
        }
        if self.seen_files.contains(&identity(metadata)) {
            self.repeated.push(file.to_string());
            return Ok(());
        }
        match file.open(self.options) {
            Ok(contents) => {
                if in_folder && self.lacks_rows(&file)? {
                    let key = &self.options.text_key;
                    self.unknown
                        .push(format!("{file} (it has no row with the key {key})"));
                    return Ok(());
                }
                self.note_uses(path, &contents, in_folder);
                if let Contents::Parquet(table) = contents {
                    parquet_rows::check(table, &self.options.text_key)
                        .map_err(|cause| Error::Data(format!("{file}: {cause}")))?;
                }
                self.seen_files.insert(identity(metadata));
                self.found.files.push(file);
            }
            Err(OpenError::Unsupported(cause)) if in_folder && !self.options.strict => {
                self.unknown.push(format!("{file} ({cause})"));
            }
            Err(error) => return Err(file.name_error(error)),
        }
        Ok(())
    }

    fn note_uses(&mut self, path: &Path, contents: &Contents, in_folder: bool) {
        let is_text = matches!(
            contents,
            Contents::Rows {
                format: Format::Text,
                ..
            }
        );
        self.uses.has_text |= is_text;
        self.uses.has_rows |= !is_text;
        let Suffixes { last, inner, .. } = Suffixes::of(path);
        let is_known = inner.as_deref().and_then(format_of_extension).is_some();
        if in_folder || (is_text && !is_known) {
            self.uses.extensions.extend(last.into_iter().chain(inner));
        }
    }

    /// True for a `.json` file of a folder without any document, such as a `package.json`. With
    /// [`InputOptions::strict`], reading it names the reason.
    fn lacks_rows(&self, file: &InputFile) -> Result<bool, Error> {
        let suffix = file.path().and_then(|path| Suffixes::of(path).inner);
        if suffix.as_deref() != Some("json") || self.options.strict {
            return Ok(false);
        }
        let mut has_document = false;
        let mut ignored = InputCounts::default();
        let read = file.read(self.options, &mut ignored, &mut |_| {
            has_document = true;
            // The first one is enough.
            Err(Error::Data("a document was found".into()))
        });
        match read {
            _ if has_document => Ok(false),
            Ok(()) | Err(Error::Data(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Returns the files of a folder to read. Of tables with several splits, that is `train`.
    fn choose_split(&mut self, folder: &Path, files: Vec<PathBuf>) -> Vec<PathBuf> {
        let split = |path: &PathBuf| {
            let inner = path.strip_prefix(folder).ok().filter(|_| is_table(path))?;
            let mut names = inner.iter().filter_map(|name| name.to_str());
            names.find_map(find_split)
        };
        let splits: BTreeSet<&str> = files.iter().filter_map(split).collect();
        if splits.len() < 2 {
            return files;
        }
        let has_train = splits.contains(TRAIN);
        let names: Vec<_> = splits.into_iter().collect();
        let outcome = if has_train {
            "only train is read: to read others, name their files"
        } else {
            "all are read: to read one, name its files"
        };
        self.found.notes.push(format!(
            "{} holds the splits {}, and {outcome}",
            folder.display(),
            names.join(", ")
        ));
        if !has_train {
            return files;
        }
        let is_read = |path: &PathBuf| split(path).is_none_or(|split| split == TRAIN);
        let (read, others): (Vec<_>, Vec<_>) = files.into_iter().partition(is_read);
        let others = others.iter().map(|path| path.display().to_string());
        self.other_splits.extend(others);
        read
    }

    fn finish(mut self, inputs: &[String]) -> Result<Found, Error> {
        let counts = &mut self.found.counts;
        counts.hidden = self.hidden.len() as u64;
        counts.repeated = self.repeated.len() as u64;
        counts.unknown = self.unknown.len() as u64;
        counts.other_splits = self.other_splits.len() as u64;
        let lists = [
            (
                "left out hidden files and folders (--hidden reads them)",
                self.hidden,
            ),
            ("left out files of unknown kinds", self.unknown),
            (
                "left out files of other splits than train",
                self.other_splits,
            ),
            ("read once, though named again", self.repeated),
        ];
        for (line, paths) in lists {
            if !paths.is_empty() {
                let names = paths[..paths.len().min(MAX_NAMES)].join(", ");
                let more = match paths.len().saturating_sub(MAX_NAMES) {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                self.found.notes.push(format!("{line}: {names}{more}"));
            }
        }
        if self.found.files.is_empty() {
            let mut reasons = vec![format!("{}: no files to read", inputs.join(", "))];
            reasons.append(&mut self.found.notes);
            return Err(Error::Data(reasons.join("; ")));
        }
        self.found.warnings = self.uses.unused(self.options);
        Ok(self.found)
    }
}

/// True if a file describes a data set.
fn is_card(path: &Path) -> bool {
    let lower = |part: Option<&OsStr>| part.and_then(OsStr::to_str).map(str::to_lowercase);
    let is_record = lower(path.file_name()).is_some_and(|name| RECORDS.contains(&&*name));
    let is_name = lower(path.file_stem()).is_some_and(|stem| CARDS.contains(&&*stem));
    let suffix = lower(path.extension());
    is_record || is_name && suffix.is_none_or(|suffix| CARD_SUFFIXES.contains(&&*suffix))
}

/// True if a file has rows, by its suffix.
fn is_table(path: &Path) -> bool {
    let suffix = Suffixes::of(path).inner;
    let format = format_of_extension(suffix.as_deref().unwrap_or_default());
    matches!(format, Some(Format::Json | Format::Parquet))
}

/// The split that is read.
const TRAIN: &str = "train";

/// Returns the split that a file or folder is named after.
fn find_split(name: &str) -> Option<&'static str> {
    let word = name.split(['-', '_', '.']).next()?;
    match word.to_lowercase().as_str() {
        "train" | "training" => Some(TRAIN),
        "validation" | "valid" | "val" | "dev" => Some("validation"),
        "test" | "testing" => Some("test"),
        _ => None,
    }
}

/// Returns an error with the command that converts an Arrow file, or the data set it belongs to.
fn refuse_arrow(path: &Path) -> Error {
    let folder = path.parent().unwrap_or(Path::new(""));
    let root = folder.parent().unwrap_or(Path::new(""));
    let command = if root.join("dataset_dict.json").exists() {
        let to = format!("{}-{{name}}.parquet", root.display());
        format!(
            "import datasets; [split.to_parquet({to:?}.format(name=name)) \
             for name, split in datasets.load_from_disk({root:?}).items()]"
        )
    } else if folder.join("state.json").exists() {
        let to = format!("{}.parquet", folder.display());
        format!("import datasets; datasets.load_from_disk({folder:?}).to_parquet({to:?})")
    } else {
        let to = path.with_extension("parquet");
        format!("import datasets; datasets.Dataset.from_file({path:?}).to_parquet({to:?})")
    };
    Error::Data(format!(
        "{}: it is an Arrow file: convert it to Parquet with python3 -c '{command}'",
        path.display()
    ))
}
