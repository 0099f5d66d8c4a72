//! Readers, tokenizing threads and an ordered consumer, joined by bounded queues.
//!
//! A reader cuts a file into batches. Each batch goes to the tokenizing threads, and a ticket for
//! its result goes to the consumer, which redeems tickets in order. So the result does not depend
//! on the number of threads. A reader continues with its next files while its earlier batches
//! wait, so that many small files keep all threads busy. Each reader has a number of permits
//! ([`batches_of_reader`]): a batch takes one until it is consumed, which bounds the memory.

use super::{
    documents::{Documents, stop},
    plan::FileWork,
};
use crate::{
    Error,
    input::{InputCounts, InputFile, InputOptions, Piece},
    quiet_panic::without_panic,
    tokenizer::{Cut, DocumentTokenizer},
};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Bytes of text that make a batch, unless a single piece is longer.
const BATCH_BYTES: usize = 256 << 10;

/// Most threads that read.
const MAX_READERS: usize = 4;

/// Time after which a reader that waits looks whether the run has stopped.
const STOP_INTERVAL: Duration = Duration::from_millis(50);

/// Most files of which results wait.
const MAX_WAITING_FILES: usize = 256;

/// Most text that waits for a place where a document can be cut, in bytes.
const MAX_CARRIED: usize = 4 << 20;

/// Leaves a text whole until more of its document is there, unless it is too long for that.
fn carry_whole(text: &str) -> Option<Cut> {
    (text.len() < MAX_CARRIED).then_some(Cut { end: 0, start: 0 })
}

/// Inputs of a run of the pipeline.
pub(super) struct Pipeline<'a> {
    pub(super) files: &'a [InputFile],
    pub(super) input: &'a InputOptions,
    pub(super) work: &'a [FileWork],
    pub(super) tokenizer: &'a DocumentTokenizer,
    pub(super) threads: usize,
}

/// Results, in the order of the work.
pub(super) enum Item {
    Tokens(Encoded),
    FileEnd(Box<FileEnd>),
}

/// The tokens of a batch, and the documents that they belong to.
pub(super) struct Encoded {
    pub(super) file: usize,
    pub(super) shard: usize,
    pub(super) tokens: Vec<u32>,
    pub(super) parts: Vec<EncodedPart>,
}

/// A document or a part of it in a batch.
pub(super) struct EncodedPart {
    /// Number of the document in its file.
    pub(super) document: u64,
    /// End of its tokens in the batch.
    pub(super) end: usize,
    /// Bytes of its text.
    pub(super) bytes: u64,
    pub(super) ends: bool,
    /// The reason why the whole document is left out; it names the document.
    pub(super) refused: Option<String>,
}

/// Statistics of a file that was read.
pub(super) struct FileEnd {
    pub(super) file: usize,
    pub(super) counts: InputCounts,
    /// Documents that were read, also those of other shards.
    pub(super) documents: u64,
}

struct Batch {
    file: usize,
    shard: usize,
    text: String,
    parts: Vec<TextPart>,
}

struct TextPart {
    document: u64,
    end: usize,
    /// Bytes that were read for it, of which a cut may leave a space out.
    bytes: u64,
    ends: bool,
    /// The reason why the document cannot be tokenized.
    refused: Option<String>,
}

/// A promise of a batch, or the end of a file.
enum Ticket {
    Batch(Receiver<Result<Encoded, Error>>, Permit),
    End(Result<Box<FileEnd>, Error>),
}

/// A reader's permit for a batch, which is given back when it is dropped.
struct Permit(Receiver<()>);

impl Drop for Permit {
    fn drop(&mut self) {
        // The reader has put it there.
        let _ = self.0.try_recv();
    }
}

/// The permits of a reader.
struct Permits {
    taken: Sender<()>,
    returned: Receiver<()>,
}

impl Permits {
    fn new(count: usize) -> Permits {
        let (taken, returned) = bounded(count);
        Permits { taken, returned }
    }

    /// Waits until a permit is free. Returns None once the run has stopped.
    fn take(&self, stopped: &AtomicBool) -> Option<Permit> {
        while self.taken.send_timeout((), STOP_INTERVAL).is_err() {
            if stopped.load(Ordering::Relaxed) {
                return None;
            }
        }
        Some(Permit(self.returned.clone()))
    }
}

type Job = (Batch, Sender<Result<Encoded, Error>>);

/// Returns the number of threads that read.
fn reader_count(threads: usize) -> usize {
    (1 + threads / 16).min(MAX_READERS)
}

/// Returns the largest number of a reader's batches that are not consumed.
fn batches_of_reader(threads: usize) -> usize {
    threads + 2
}

/// Runs the pipeline and passes the results to `consume` on this thread.
///
/// # Errors
/// The first error in the order of the work, or one of `consume`.
pub(super) fn run(
    pipeline: &Pipeline,
    consume: &mut dyn FnMut(Item) -> Result<(), Error>,
) -> Result<(), Error> {
    let threads = pipeline.threads.max(1);
    let stopped = &AtomicBool::new(false);
    let next = &Mutex::new(pipeline.work.iter());
    std::thread::scope(|scope| {
        let (jobs, waiting) = bounded::<Job>(threads);
        for _ in 0..threads {
            let waiting = waiting.clone();
            scope.spawn(|| tokenize(pipeline, waiting));
        }
        drop(waiting);
        let (files, queues) = bounded::<Receiver<Ticket>>(MAX_WAITING_FILES);
        for _ in 0..reader_count(threads) {
            let jobs = jobs.clone();
            let files = files.clone();
            scope.spawn(move || {
                let permits = Permits::new(batches_of_reader(threads));
                // The lock keeps the queues in the order of the files.
                while let Some((work, tickets)) = {
                    let mut next = next.lock().expect("no reader panics here");
                    next.next().and_then(|work| {
                        let (tickets, queue) = unbounded();
                        files.send(queue).ok().map(|()| (work, tickets))
                    })
                } {
                    let to = Destination {
                        jobs: &jobs,
                        tickets: &tickets,
                        permits: &permits,
                        stopped,
                    };
                    read(pipeline, work, to);
                }
            });
        }
        drop((jobs, files));
        let result = redeem(queues, pipeline, consume);
        // Readers that wait for a queue have failed already: their receivers are gone.
        stopped.store(true, Ordering::Relaxed);
        result
    })
}

fn redeem(
    queues: Receiver<Receiver<Ticket>>,
    pipeline: &Pipeline,
    consume: &mut dyn FnMut(Item) -> Result<(), Error>,
) -> Result<(), Error> {
    let lost = || Error::Data("internal error: a thread ended early".into());
    for _ in pipeline.work {
        let queue = queues.recv().map_err(|_| lost())?;
        loop {
            match queue.recv().map_err(|_| lost())? {
                Ticket::Batch(batch, permit) => {
                    let encoded = batch.recv().map_err(|_| lost())??;
                    consume(Item::Tokens(encoded))?;
                    drop(permit);
                }
                Ticket::End(end) => {
                    consume(Item::FileEnd(end?))?;
                    break;
                }
            }
        }
    }
    Ok(())
}

fn tokenize(pipeline: &Pipeline, jobs: Receiver<Job>) {
    for (batch, result) in jobs {
        // Without a receiver the run has failed.
        let _ = result.send(encode(pipeline, batch));
    }
}

/// Tokenizes a batch. Documents that the tokenizer refuses are marked, in strict mode an error.
fn encode(pipeline: &Pipeline, batch: Batch) -> Result<Encoded, Error> {
    let mut tokens = Vec::with_capacity(batch.text.len() / 3);
    let mut parts = Vec::with_capacity(batch.parts.len());
    let mut start = 0;
    for part in batch.parts {
        let before = tokens.len();
        let text = &batch.text[start..part.end];
        let encoded = match part.refused {
            Some(reason) => Err(reason),
            None => encode_text(pipeline.tokenizer, text, &mut tokens),
        };
        let refused = encoded.err().map(|reason| {
            tokens.truncate(before);
            let file = &pipeline.files[batch.file];
            format!(
                "{file}: document {}, counted from 0: {reason}",
                part.document
            )
        });
        if let Some(reason) = refused.as_ref().filter(|_| pipeline.input.strict) {
            return Err(Error::Tokenizer(format!(
                "{reason} (left out without --strict)"
            )));
        }
        parts.push(EncodedPart {
            document: part.document,
            end: tokens.len(),
            bytes: part.bytes,
            ends: part.ends,
            refused,
        });
        start = part.end;
    }
    Ok(Encoded {
        file: batch.file,
        shard: batch.shard,
        tokens,
        parts,
    })
}

fn encode_text(
    tokenizer: &DocumentTokenizer,
    text: &str,
    into: &mut Vec<u32>,
) -> Result<(), String> {
    let encoded = without_panic(|| tokenizer.encode(text, into))?;
    encoded.map_err(|error| error.to_string())
}

/// Channels of a reader for one file.
struct Destination<'a> {
    jobs: &'a Sender<Job>,
    tickets: &'a Sender<Ticket>,
    permits: &'a Permits,
    /// True once the run has failed.
    stopped: &'a AtomicBool,
}

fn read(pipeline: &Pipeline, work: &FileWork, to: Destination) {
    let tickets = to.tickets;
    let mut reader = Reader {
        pipeline,
        work,
        to,
        documents: Documents::default(),
        batch: None,
        carried: String::new(),
        refused: None,
        is_done: false,
    };
    let end = without_panic(|| reader.read()).unwrap_or_else(|panic| {
        let file = &pipeline.files[work.file];
        let cause = format!("internal error: reading {file} failed: {panic}");
        Err(Error::Data(cause))
    });
    // Without a receiver the run has failed.
    let _ = tickets.send(Ticket::End(end.map(Box::new)));
}

/// Cuts a file into batches.
struct Reader<'a> {
    pipeline: &'a Pipeline<'a>,
    work: &'a FileWork,
    to: Destination<'a>,
    documents: Documents,
    batch: Option<Batch>,
    /// Text of a long document that must be tokenized with the text after it.
    carried: String,
    /// The document of which the rest is not tokenized.
    refused: Option<u64>,
    /// True once the file need not be read further.
    is_done: bool,
}

impl Reader<'_> {
    fn read(&mut self) -> Result<FileEnd, Error> {
        let mut counts = InputCounts::default();
        let file = &self.pipeline.files[self.work.file];
        let read = file.read(self.pipeline.input, &mut counts, &mut |piece| {
            if self.to.stopped.load(Ordering::Relaxed) {
                return Err(stop());
            }
            self.take(&piece)
        });
        if self.is_done {
            // Reading ended early, before it counted the file.
            counts.files += 1;
        } else {
            read?;
        }
        self.check_documents()?;
        self.send_batch()?;
        Ok(FileEnd {
            file: self.work.file,
            counts,
            documents: self.documents.ended(),
        })
    }

    /// Compares the documents that were read with those that were counted before.
    fn check_documents(&self) -> Result<(), Error> {
        let Some(known) = self.work.known else {
            return Ok(());
        };
        let expected = if self.work.counts {
            known
        } else {
            self.last_document()
        };
        let found = self.documents.ended();
        if found == expected {
            return Ok(());
        }
        let file = &self.pipeline.files[self.work.file];
        Err(Error::Data(format!(
            "{file} changed while it was read: {expected} documents were counted, and now there \
             are {found}; start again once nothing writes to it"
        )))
    }

    /// Returns the end of the last range of documents to tokenize.
    fn last_document(&self) -> u64 {
        let last = self.work.ranges.last();
        last.map_or(0, |range| range.documents.end)
    }

    fn take(&mut self, piece: &Piece) -> Result<(), Error> {
        let document = self.documents.next(piece);
        if let Some(shard) = self.shard(document) {
            self.add(shard, document, piece)?;
        }
        let next = self.documents.ended();
        let is_past = !self.work.counts && next >= self.last_document();
        if is_past || next >= self.work.stop {
            self.is_done = true;
            return Err(stop());
        }
        Ok(())
    }

    fn shard(&self, document: u64) -> Option<usize> {
        let ranges = &self.work.ranges;
        let next = ranges.partition_point(|range| range.documents.end <= document);
        let range = ranges.get(next)?;
        range.documents.contains(&document).then_some(range.shard)
    }

    fn add(&mut self, shard: usize, document: u64, piece: &Piece) -> Result<(), Error> {
        let carried = std::mem::take(&mut self.carried);
        let is_other = |batch: &Batch| batch.shard != shard;
        if self.batch.as_ref().is_some_and(is_other) {
            self.send_batch()?;
        }
        let batch = self.batch.get_or_insert_with(|| Batch {
            file: self.work.file,
            shard,
            text: String::new(),
            parts: Vec::new(),
        });
        let start = batch.text.len();
        let mut refused = None;
        if self.refused == Some(document) {
            if !piece.ends_document {
                return Ok(());
            }
        } else {
            batch.text.push_str(&carried);
            batch.text.push_str(piece.text);
        }
        if !piece.ends_document {
            let text = &batch.text[start..];
            let cut = self.pipeline.tokenizer.last_cut(text);
            match cut.or_else(|| carry_whole(text)) {
                Some(cut) => {
                    self.carried = batch.text[start + cut.start..].to_string();
                    batch.text.truncate(start + cut.end);
                }
                None => {
                    self.refused = Some(document);
                    refused = Some(format!(
                        "it has {} MiB of text that cannot be tokenized in parts: split the \
                         document",
                        MAX_CARRIED >> 20
                    ));
                    batch.text.truncate(start);
                }
            }
        }
        batch.parts.push(TextPart {
            document,
            end: batch.text.len(),
            bytes: piece.text.len() as u64,
            ends: piece.ends_document,
            refused,
        });
        if batch.text.len() >= BATCH_BYTES {
            self.send_batch()
        } else {
            Ok(())
        }
    }

    fn send_batch(&mut self) -> Result<(), Error> {
        let Some(batch) = self.batch.take() else {
            return Ok(());
        };
        let (result, ticket) = bounded(1);
        let permit = self.to.permits.take(self.to.stopped).ok_or_else(stop)?;
        let sent = self.to.tickets.send(Ticket::Batch(ticket, permit)).is_ok();
        if sent && self.to.jobs.send((batch, result)).is_ok() {
            Ok(())
        } else {
            Err(stop())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        input::find,
        prepare::plan::ShardRange,
        tokenizer::{TokenizerOptions, train},
    };

    struct Corpus {
        folder: tempfile::TempDir,
        files: Vec<InputFile>,
        input: InputOptions,
    }

    impl Corpus {
        fn new(texts: &[&str]) -> Corpus {
            let folder = tempfile::tempdir().unwrap();
            for (number, text) in texts.iter().enumerate() {
                std::fs::write(folder.path().join(format!("{number:04}.txt")), text).unwrap();
            }
            let input = InputOptions::default();
            let path = folder.path().display().to_string();
            Corpus {
                files: find(&[path], &input).unwrap().files,
                input,
                folder,
            }
        }

        fn work(&self, known: Option<u64>) -> Vec<FileWork> {
            let work = |file| FileWork {
                file,
                ranges: vec![ShardRange {
                    shard: 0,
                    documents: 0..u64::MAX,
                }],
                counts: true,
                stop: u64::MAX,
                known,
            };
            (0..self.files.len()).map(work).collect()
        }

        fn pipeline<'a>(
            &'a self,
            work: &'a [FileWork],
            tokenizer: &'a DocumentTokenizer,
            threads: usize,
        ) -> Pipeline<'a> {
            Pipeline {
                files: &self.files,
                input: &self.input,
                work,
                tokenizer,
                threads,
            }
        }

        /// Returns the parts of documents with their tokens, in order.
        fn run(
            &self,
            tokenizer: &DocumentTokenizer,
            threads: usize,
            known: Option<u64>,
        ) -> Result<Vec<(EncodedPart, Vec<u32>)>, Error> {
            let work = self.work(known);
            let pipeline = self.pipeline(&work, tokenizer, threads);
            let mut found = Vec::new();
            run(&pipeline, &mut |item| {
                if let Item::Tokens(batch) = item {
                    let mut start = 0;
                    for part in batch.parts {
                        let end = part.end;
                        found.push((part, batch.tokens[start..end].to_vec()));
                        start = end;
                    }
                }
                Ok(())
            })?;
            Ok(found)
        }
    }

    fn trained() -> DocumentTokenizer {
        train(["some words to learn"].into_iter(), 300).unwrap().0
    }

    #[test]
    fn many_small_files_stay_in_order() {
        let texts: Vec<String> = (0..1000).map(|number| format!("text {number}")).collect();
        let corpus = Corpus::new(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        let tokenizer = trained();
        for threads in [1, 3, 40] {
            let found = corpus.run(&tokenizer, threads, Some(1)).unwrap();
            assert_eq!(found.len(), texts.len());
            for ((part, tokens), text) in found.iter().zip(&texts) {
                let mut expected = Vec::new();
                tokenizer.encode(text, &mut expected).unwrap();
                assert_eq!((tokens, part.bytes), (&expected, text.len() as u64));
            }
        }
    }

    /// While the consumer holds the first result, the reader opens a pipe that is the 30th file.
    #[test]
    fn readers_continue_with_files_while_results_wait() {
        use std::{
            fs::File,
            io::Write,
            os::unix::fs::OpenOptionsExt,
            time::{Duration, Instant},
        };
        const O_NONBLOCK: i32 = 0o4000;
        let mut corpus = Corpus::new(&["text"; 30]);
        let pipe = corpus.folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        let found = find(&[pipe.display().to_string()], &corpus.input).unwrap();
        corpus.files.extend(found.files);
        let tokenizer = trained();
        let work = corpus.work(None);
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut opened = 0;
        run(&corpus.pipeline(&work, &tokenizer, 40), &mut |_| {
            while opened == 0 {
                // Fails until the reader has opened the other end.
                let writer = File::options()
                    .write(true)
                    .custom_flags(O_NONBLOCK)
                    .open(&pipe);
                if let Ok(mut writer) = writer {
                    writer.write_all(b"more").unwrap();
                    opened += 1;
                }
                assert!(Instant::now() < deadline, "the reader waits");
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn an_error_of_the_consumer_ends_the_run() {
        let corpus = Corpus::new(&["text"; 600]);
        let tokenizer = trained();
        let work = corpus.work(None);
        for threads in [1, 20] {
            let mut left = 3;
            let result = run(&corpus.pipeline(&work, &tokenizer, threads), &mut |_| {
                left -= 1;
                if left > 0 { Ok(()) } else { Err(stop()) }
            });
            assert!(result.is_err() && left == 0);
        }
    }

    #[test]
    fn a_file_with_other_documents_than_were_counted_is_an_error() {
        let corpus = Corpus::new(&["one"]);
        let error = corpus
            .run(&trained(), 1, Some(2))
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.contains("0000.txt changed while it was read"),
            "{error}"
        );
    }

    #[test]
    fn documents_that_cannot_be_tokenized_are_marked() {
        let json = serde_json::json!({
            "added_tokens": [],
            "pre_tokenizer": {
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": true,
            },
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "\u{120}": 2}, "merges": []},
        });
        let options = TokenizerOptions {
            eos: Some("b".into()),
            ..TokenizerOptions::default()
        };
        let (tokenizer, _) = DocumentTokenizer::of_json(&json.to_string(), &options).unwrap();
        let long = "a".repeat(MAX_CARRIED + (3 << 20));
        let mut corpus = Corpus::new(&["a a", "c", &long, "b"]);
        let found = corpus.run(&tokenizer, 2, None).unwrap();
        let refused: Vec<&str> = found
            .iter()
            .filter_map(|part| part.0.refused.as_deref())
            .collect();
        assert!(
            refused[0].contains("0001.txt: document 0, counted from 0: "),
            "{refused:?}"
        );
        assert!(refused[1].contains("0002.txt: document 0, counted from 0: it has 4 MiB"));
        assert_eq!(refused.len(), 2);
        let ends = found.iter().filter(|part| part.0.ends).count();
        assert_eq!(ends, 4);
        assert_eq!(found.first().unwrap().1, [0, 2, 0]);
        assert_eq!(found.last().unwrap().1, [1]);
        corpus.input.strict = true;
        let error = corpus.run(&tokenizer, 2, None).err().unwrap().to_string();
        assert!(error.contains("0001.txt: document 0"), "{error}");
    }
}
