//! Counts documents before they are divided among shards.

use super::documents::stop;
use crate::{
    Error,
    input::{InputCounts, InputFile, InputOptions},
};

/// Most marks of a file.
const MARKS: usize = 4096;

/// Marks that all files share, 16 MiB. Every file has one in any case.
const ALL_MARKS: usize = 1 << 20;

/// The start of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) document: u64,
    /// Bytes of text before it, in its file.
    pub(super) bytes: u64,
}

/// Size of a file's text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct FileCount {
    pub(super) documents: u64,
    /// Bytes of their text.
    pub(super) bytes: u64,
    /// Starts of documents, evenly spread: all of them, or every 2nd, 4th, ...
    pub(super) marks: Vec<Mark>,
    /// True if the limit of text was reached in the file.
    pub(super) is_cut: bool,
    /// Documents between two marks.
    every: u64,
    /// Most marks of this file.
    most: usize,
}

impl FileCount {
    fn new(most: usize) -> FileCount {
        FileCount {
            every: 1,
            most,
            ..FileCount::default()
        }
    }

    /// Returns the count of a file whose documents have these bytes.
    #[cfg(test)]
    pub(super) fn of(sizes: &[u64]) -> FileCount {
        let mut count = FileCount::new(MARKS);
        for &bytes in sizes {
            count.add(bytes);
        }
        count
    }

    fn add(&mut self, bytes: u64) {
        if self.documents.is_multiple_of(self.every) {
            if self.marks.len() == self.most {
                self.every *= 2;
                let every = self.every;
                self.marks
                    .retain(|mark| mark.document.is_multiple_of(every));
            }
            if self.documents.is_multiple_of(self.every) {
                self.marks.push(Mark {
                    document: self.documents,
                    bytes: self.bytes,
                });
            }
        }
        self.documents += 1;
        self.bytes += bytes;
    }
}

/// Counts the documents of all files. Files after a limit of text have no documents.
pub(super) fn count(
    files: &[InputFile],
    options: &InputOptions,
    limit: Option<u64>,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<FileCount>, Error> {
    let mut counts = Vec::new();
    let most = (ALL_MARKS / files.len().max(1)).clamp(1, MARKS);
    let mut left = limit.unwrap_or(u64::MAX);
    let mut done = 0;
    for file in files {
        let mut count = FileCount::new(most);
        if left > 0 {
            count_file(file, options, left, &mut count, &mut |bytes| {
                progress(done + bytes)
            })?;
        } else {
            count.is_cut = true;
        }
        left = left.saturating_sub(count.bytes);
        done += count.bytes;
        counts.push(count);
    }
    Ok(counts)
}

fn count_file(
    file: &InputFile,
    options: &InputOptions,
    limit: u64,
    count: &mut FileCount,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Error> {
    let mut stopped = false;
    let mut open = 0;
    let mut counts = InputCounts::default();
    let read = file.read(options, &mut counts, &mut |piece| {
        open += piece.text.len() as u64;
        if !piece.ends_document {
            return Ok(());
        }
        count.add(open);
        open = 0;
        progress(count.bytes);
        // A document that begins before the limit is taken as a whole.
        stopped = count.bytes >= limit;
        if stopped { Err(stop()) } else { Ok(()) }
    });
    count.is_cut = stopped;
    if stopped { Ok(()) } else { read }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_stay_few_and_evenly_spread() {
        let count = FileCount::of(&[3; 100_000]);
        assert!(count.marks.len() > MARKS / 2 && count.marks.len() <= MARKS);
        let step = count.marks[1].document;
        for (index, mark) in count.marks.iter().enumerate() {
            assert_eq!(mark.document, index as u64 * step);
            assert_eq!(mark.bytes, mark.document * 3);
        }
        assert_eq!(count.bytes, 300_000);
        for most in 1..9 {
            let mut count = FileCount::new(most);
            for _ in 0..1000 {
                count.add(1);
                assert!((1..=most).contains(&count.marks.len()));
            }
            assert_eq!(count.marks[0].document, 0);
        }
    }

    #[test]
    fn many_files_share_their_marks() {
        let folder = tempfile::tempdir().unwrap();
        let lines = "a\n".repeat(5000);
        for number in 0..ALL_MARKS / 1024 {
            let name = format!("{number}.txt");
            let text = if number == 0 { &lines } else { "b" };
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let options = InputOptions {
            split: crate::input::Split::Line,
            ..InputOptions::default()
        };
        let path = folder.path().join("0.txt").display().to_string();
        let rest = folder.path().display().to_string();
        let found = crate::input::find(&[path, rest], &options).unwrap();
        let counts = count(&found.files, &options, None, &mut |_| ()).unwrap();
        assert_eq!(counts[0].documents, 5000);
        assert!(counts[0].marks.len() <= 1024, "{}", counts[0].marks.len());
        assert!(counts.iter().all(|count| !count.marks.is_empty()));
    }
}
