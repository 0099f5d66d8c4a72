//! A file of documents: opens it, finds out its format and reads it.

use super::{
    compression::Compression,
    counts::InputCounts,
    document::{Documents, Odd, Piece},
    encoding::{Decoder, Mark, find_mark},
    json,
    options::InputOptions,
    parquet_rows,
    recognize::{
        Arrow, Format, find_arrow, find_binary, find_unsupported, format_of_extension,
        looks_like_json,
    },
    text,
};
use crate::Error;
use std::{
    fmt,
    fs::File,
    io::{BufRead, BufReader, Cursor, Read},
    path::{Path, PathBuf},
};

/// Bytes at the start of a file by which its format is recognized.
const START: usize = 64 << 10;

/// Size of the buffers for reading.
const BUFFER: usize = 256 << 10;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Path(PathBuf),
    StandardInput,
}

/// A file of documents, or standard input.
///
/// The format is found out by the suffix, the compression and everything else by the first bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputFile {
    source: Source,
}

/// The contents of a file, ready to be read.
pub(super) enum Contents {
    Parquet(File),
    Rows {
        format: Format,
        reader: Box<dyn BufRead>,
        mark: Option<Mark>,
        is_json_as_text: bool,
    },
}

/// A reason not to read a file.
pub(super) enum OpenError {
    /// The file is of a kind that is not read. The message lacks the file's name.
    Unsupported(String),
    /// The file cannot be read.
    Failed(Error),
}

impl fmt::Display for InputFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Path(path) => path.display().fmt(f),
            Source::StandardInput => f.write_str("standard input"),
        }
    }
}

impl InputFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            source: Source::Path(path),
        }
    }

    pub(super) fn standard_input() -> Self {
        Self {
            source: Source::StandardInput,
        }
    }

    /// Returns the path, unless this is standard input.
    pub fn path(&self) -> Option<&Path> {
        match &self.source {
            Source::Path(path) => Some(path),
            Source::StandardInput => None,
        }
    }

    /// Returns the number of bytes on disk, before decompression. Streams have none.
    pub fn bytes(&self) -> Option<u64> {
        let metadata = std::fs::metadata(self.path()?).ok()?;
        metadata.is_file().then_some(metadata.len())
    }

    /// Passes the documents on to `take`, in their order, and counts everything else.
    ///
    /// # Errors
    /// If the file cannot be read, is damaged or of an unknown kind, if more than half of its rows
    /// cannot be used, or if `take` fails. With [`InputOptions::strict`], if anything is not valid
    /// text. The message names the file, and the line or row.
    pub fn read(
        &self,
        options: &InputOptions,
        counts: &mut InputCounts,
        take: &mut dyn FnMut(Piece) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let contents = self.open(options).map_err(|error| self.name_error(error))?;
        let mut documents = Documents::new(self.to_string(), options.strict, counts, take);
        match contents {
            Contents::Parquet(file) => {
                parquet_rows::read(file, &options.text_key, &mut documents)?;
            }
            Contents::Rows {
                format,
                mut reader,
                mark,
                is_json_as_text,
            } => {
                match mark.map(|mark| mark.encoding) {
                    Some(Some(_)) => documents.notice(Odd::Transcoded)?,
                    Some(None) => documents.notice(Odd::ByteOrderMark)?,
                    None => {}
                }
                if is_json_as_text {
                    documents.notice(Odd::JsonAsText)?;
                }
                if format == Format::Json {
                    json::read(&mut reader, &options.text_key, &mut documents)?;
                } else {
                    text::read(&mut reader, &options.split, &mut documents)?;
                }
            }
        }
        documents.finish()
    }

    /// Adds the file's name to an error of opening it.
    pub(super) fn name_error(&self, error: OpenError) -> Error {
        match error {
            OpenError::Unsupported(cause) => Error::Data(format!("{self}: {cause}")),
            OpenError::Failed(error) => error,
        }
    }

    /// Opens the file and recognizes its format.
    pub(super) fn open(&self, options: &InputOptions) -> Result<Contents, OpenError> {
        let failed = |action| {
            move |cause| {
                OpenError::Failed(Error::Io {
                    action,
                    path: self.to_string(),
                    cause,
                })
            }
        };
        let cannot_read = failed("cannot read");
        let (mut raw, file): (Box<dyn Read>, Option<File>) = match &self.source {
            Source::StandardInput => (Box::new(std::io::stdin()), None),
            Source::Path(path) => {
                let file = File::open(path).map_err(failed("cannot open"))?;
                let clone = file.try_clone().map_err(failed("cannot open"))?;
                let is_regular = file.metadata().map_err(failed("cannot open"))?.is_file();
                (Box::new(file), is_regular.then_some(clone))
            }
        };
        let suffixes = self.suffixes();
        let mut start = peek(&mut raw).map_err(failed("cannot read"))?;
        if start.starts_with(b"PAR1") {
            return file.map(Contents::Parquet).ok_or_else(|| {
                OpenError::Unsupported("Parquet cannot be read from a stream: name a file".into())
            });
        }
        let compression = Compression::of_start(&start);
        let mut reader: Box<dyn Read> = Box::new(Cursor::new(start.clone()).chain(raw));
        if let Some(compression) = compression {
            let buffered = BufReader::with_capacity(BUFFER, reader);
            reader = compression
                .decompress(buffered)
                .map_err(failed("cannot read"))?;
            start = peek(&mut reader).map_err(failed("cannot read"))?;
            if Compression::of_start(&start).is_some() || start.starts_with(b"PAR1") {
                let name = compression.name();
                let cause = format!("it is compressed twice: unpack the {name} file first");
                return Err(OpenError::Unsupported(cause));
            }
            reader = Box::new(Cursor::new(start.clone()).chain(reader));
        } else if let Some(expected) = suffixes.compression {
            let name = expected.name();
            let cause = format!("it is not {name} data, as its suffix says: rename the file");
            return Err(OpenError::Unsupported(cause));
        }
        if let Some(cause) = self.find_unsupported(&start) {
            return Err(OpenError::Unsupported(cause));
        }
        let mark = find_mark(&start);
        if let Some(mark) = mark {
            reader
                .read_exact(&mut vec![0; mark.len])
                .map_err(cannot_read)?;
            start.drain(..mark.len);
            if let Some(encoding) = mark.encoding {
                reader = Box::new(Decoder::new(reader, encoding));
                start = peek(&mut reader).map_err(failed("cannot read"))?;
                reader = Box::new(Cursor::new(start.clone()).chain(reader));
            }
        }
        let format = suffixes
            .find_format(&start, file.is_none(), options)
            .map_err(OpenError::Unsupported)?;
        if let Some(cause) = find_binary(&start, format) {
            return Err(OpenError::Unsupported(cause.into()));
        }
        Ok(Contents::Rows {
            format,
            reader: Box::new(BufReader::with_capacity(BUFFER, reader)),
            mark,
            is_json_as_text: format == Format::Text && looks_like_json(&start),
        })
    }

    fn suffixes(&self) -> Suffixes {
        self.path().map(Suffixes::of).unwrap_or_default()
    }

    /// Returns the reason not to read a file that starts with these bytes.
    fn find_unsupported(&self, start: &[u8]) -> Option<String> {
        if let Some(unsupported) = find_unsupported(start) {
            return Some(format!("it is {}: {}", unsupported.name, unsupported.hint));
        }
        let arrow = find_arrow(start)?;
        let from = self.to_string();
        let to = format!("{from}.parquet");
        let command = match arrow {
            Arrow::Stream => {
                format!("import datasets; datasets.Dataset.from_file({from:?}).to_parquet({to:?})")
            }
            Arrow::File => format!(
                "import pyarrow.feather as f, pyarrow.parquet as p; \
                 p.write_table(f.read_table({from:?}), {to:?})"
            ),
        };
        Some(format!(
            "it is an Arrow file: convert it to Parquet with python3 -c '{command}'"
        ))
    }
}

/// The suffixes of a file's name, in lower case.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Suffixes {
    /// The suffix of the file itself, perhaps of a compression.
    pub(super) last: Option<String>,
    /// The suffix of the contents: that under the compression, if there is one.
    pub(super) inner: Option<String>,
    compression: Option<Compression>,
}

impl Suffixes {
    pub(super) fn of(path: &Path) -> Self {
        let suffix = |path: &Path| Some(path.extension()?.to_str()?.to_lowercase());
        let last = suffix(path);
        let compression = last.as_deref().and_then(Compression::of_extension);
        let inner = match (compression, path.file_stem()) {
            (Some(_), Some(stem)) => suffix(Path::new(stem)),
            _ => last.clone(),
        };
        Self {
            last,
            inner,
            compression,
        }
    }

    /// True if files with these suffixes are taken from folders.
    pub(super) fn are_taken(&self, options: &InputOptions) -> bool {
        let mut suffixes = [&self.inner, &self.last].into_iter().flatten();
        match &options.extensions {
            Some(_) => suffixes.any(|suffix| options.lists(suffix)),
            None => suffixes.any(|suffix| format_of_extension(suffix).is_some()),
        }
    }

    fn find_format(
        &self,
        start: &[u8],
        is_stream: bool,
        options: &InputOptions,
    ) -> Result<Format, String> {
        let suffix = self.inner.as_deref().unwrap_or_default();
        match format_of_extension(suffix) {
            Some(Format::Parquet) => Err("it is not a Parquet file, as its suffix says".into()),
            Some(format) => Ok(format),
            None if looks_like_json(start) => Ok(Format::Json),
            None if is_stream || options.lists(suffix) => Ok(Format::Text),
            None => Err(format!(
                "its kind is unknown: the suffix is {suffix:?}, and it does not look like JSON \
                 (to read it as text, add its suffix to --extensions or rename it to .txt)"
            )),
        }
    }
}

/// Reads the first bytes, fewer only at the end.
fn peek(reader: &mut dyn Read) -> std::io::Result<Vec<u8>> {
    let mut start = Vec::new();
    reader.take(START as u64).read_to_end(&mut start)?;
    Ok(start)
}
