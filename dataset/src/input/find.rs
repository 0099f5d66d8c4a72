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
};
use crate::Error;
use std::{
    collections::{BTreeSet, HashSet},
    fs::Metadata,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

/// Most paths that a note names.
const MAX_NAMES: usize = 10;

/// Names of files that describe a data set, without suffix.
const CARDS: [&str; 9] = [
    "readme",
    "license",
    "licence",
    "notice",
    "citation",
    "changelog",
    "dataset_info",
    "dataset_infos",
    "state",
];

/// The files to read.
#[derive(Debug)]
pub struct Found {
    /// The files, in order.
    pub files: Vec<InputFile>,
    /// Lines for the user about everything that was left out.
    pub notes: Vec<String>,
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
    let mut finder = Finder {
        options,
        found: Found {
            files: Vec::new(),
            notes: Vec::new(),
            counts: InputCounts::default(),
        },
        seen_files: HashSet::new(),
        seen_folders: HashSet::new(),
        repeated: Vec::new(),
        unknown: Vec::new(),
        hidden: Vec::new(),
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
    repeated: Vec<String>,
    unknown: Vec<String>,
    hidden: Vec<String>,
}

impl Finder<'_> {
    fn add_input(&mut self, input: &str) -> Result<(), Error> {
        if input == "-" {
            let file = InputFile::standard_input();
            if self.found.files.contains(&file) {
                self.repeated.push(file.to_string());
            } else {
                self.found.files.push(file);
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
        let mut files = Vec::new();
        self.walk(path, &metadata, &mut files)?;
        self.note_splits(path, &files);
        let is_table = |path: &PathBuf| {
            let suffix = Suffixes::of(path).inner;
            let format = format_of_extension(suffix.as_deref().unwrap_or_default());
            matches!(format, Some(Format::Json | Format::Parquet))
        };
        let has_tables = self.options.extensions.is_none()
            && files.iter().any(|path| is_table(path) && !is_card(path));
        for path in files {
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
                self.walk(&path, &metadata, files)?;
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

    fn add_file(&mut self, path: &Path, metadata: &Metadata, in_folder: bool) -> Result<(), Error> {
        let file = InputFile::new(path.to_owned());
        if !metadata.is_file() {
            // Opening a pipe would take bytes from it.
            if in_folder {
                self.unknown.push(format!("{file} (it is no regular file)"));
            } else {
                self.found.files.push(file);
            }
            return Ok(());
        }
        if self.seen_files.contains(&identity(metadata)) {
            self.repeated.push(file.to_string());
            return Ok(());
        }
        match file.open(self.options) {
            Ok(contents) => {
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

    /// Notes that a folder has files of several splits, which would all be read.
    fn note_splits(&mut self, folder: &Path, files: &[PathBuf]) {
        let names = files
            .iter()
            .filter_map(|path| path.strip_prefix(folder).ok());
        let names = names.flat_map(|path| path.iter().filter_map(|name| name.to_str()));
        let splits: BTreeSet<&str> = names.filter_map(find_split).collect();
        if splits.len() > 1 {
            let splits: Vec<_> = splits.into_iter().collect();
            self.found.notes.push(format!(
                "{} holds the splits {}, and all are read: to read one, name its files",
                folder.display(),
                splits.join(", ")
            ));
        }
    }

    fn finish(mut self, inputs: &[String]) -> Result<Found, Error> {
        let counts = &mut self.found.counts;
        counts.hidden = self.hidden.len() as u64;
        counts.repeated = self.repeated.len() as u64;
        counts.unknown = self.unknown.len() as u64;
        let lists = [
            (
                "left out hidden files and folders (--hidden reads them)",
                self.hidden,
            ),
            ("left out files of unknown kinds", self.unknown),
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
        Ok(self.found)
    }
}

/// True if a file describes a data set.
fn is_card(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    let stem = stem.unwrap_or_default().to_lowercase();
    CARDS.contains(&stem.as_str())
}

/// Returns the split that a file or folder is named after.
fn find_split(name: &str) -> Option<&'static str> {
    let word = name.split(['-', '_', '.']).next()?;
    match word.to_lowercase().as_str() {
        "train" | "training" => Some("train"),
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
