//! Readers, tokenizing threads and an ordered consumer, joined by bounded queues.
//!
//! A reader cuts a file into batches. Each batch goes to the tokenizing threads, and a ticket for
//! its result goes to the consumer, which redeems tickets in order. So the result does not depend
//! on the number of threads. Bounded are the files that readers are ahead ([`reader_count`]) and
//! the tickets of each file ([`tickets`]), and with them the batches in memory.

use super::{
    documents::{Documents, stop},
    plan::FileWork,
};
use crate::{
    Error,
    input::{InputCounts, InputFile, InputOptions, Piece},
    tokenizer::{Cut, DocumentTokenizer},
};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

/// Bytes of text that make a batch, unless a single piece is longer.
const BATCH_BYTES: usize = 256 << 10;

/// Most threads that read.
const MAX_READERS: usize = 4;

/// Most text that waits for a place where a document can be cut, in bytes.
const MAX_CARRIED: usize = 16 << 20;

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
    ends: bool,
}

/// A promise of a batch, or the end of a file.
enum Ticket {
    Batch(Receiver<Result<Encoded, Error>>),
    End(Result<Box<FileEnd>, Error>),
}

type Job = (Batch, Sender<Result<Encoded, Error>>);

/// Returns the number of threads that read.
fn reader_count(threads: usize) -> usize {
    (1 + threads / 16).min(MAX_READERS)
}

/// Returns the largest number of batches of a file that wait for the consumer.
fn tickets(threads: usize) -> usize {
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
            scope.spawn(|| tokenize(pipeline.tokenizer, waiting));
        }
        drop(waiting);
        let (files, queues) = bounded::<Receiver<Ticket>>(1);
        for _ in 0..reader_count(threads) {
            let jobs = jobs.clone();
            let files = files.clone();
            scope.spawn(move || {
                // The lock keeps the queues in the order of the files.
                while let Some((work, tickets)) = {
                    let mut next = next.lock().expect("no reader panics here");
                    next.next().and_then(|work| {
                        let (tickets, queue) = bounded(tickets(threads));
                        files.send(queue).ok().map(|()| (work, tickets))
                    })
                } {
                    read(pipeline, work, &jobs, &tickets, stopped);
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
                Ticket::Batch(batch) => {
                    let encoded = batch.recv().map_err(|_| lost())??;
                    consume(Item::Tokens(encoded))?;
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

fn tokenize(tokenizer: &DocumentTokenizer, jobs: Receiver<Job>) {
    for (batch, result) in jobs {
        let encoded = catch_unwind(AssertUnwindSafe(|| encode(tokenizer, batch)));
        let encoded = encoded.unwrap_or_else(|_| {
            let cause = "internal error: the tokenizer failed at a document";
            Err(Error::Tokenizer(cause.into()))
        });
        // Without a receiver the run has failed.
        let _ = result.send(encoded);
    }
}

fn encode(tokenizer: &DocumentTokenizer, batch: Batch) -> Result<Encoded, Error> {
    let mut tokens = Vec::with_capacity(batch.text.len() / 3);
    let mut parts = Vec::with_capacity(batch.parts.len());
    let mut start = 0;
    for part in &batch.parts {
        tokenizer.encode(&batch.text[start..part.end], &mut tokens)?;
        parts.push(EncodedPart {
            document: part.document,
            end: tokens.len(),
            bytes: (part.end - start) as u64,
            ends: part.ends,
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

fn read(
    pipeline: &Pipeline,
    work: &FileWork,
    jobs: &Sender<Job>,
    tickets: &Sender<Ticket>,
    stopped: &AtomicBool,
) {
    let mut reader = Reader {
        pipeline,
        work,
        jobs,
        tickets,
        documents: Documents::default(),
        batch: None,
        carried: String::new(),
        is_done: false,
    };
    let read = catch_unwind(AssertUnwindSafe(|| reader.read(stopped)));
    let end = read.unwrap_or_else(|_| {
        let file = &pipeline.files[work.file];
        let cause = format!("internal error: reading {file} failed");
        Err(Error::Data(cause))
    });
    // Without a receiver the run has failed.
    let _ = tickets.send(Ticket::End(end.map(Box::new)));
}

/// Cuts a file into batches.
struct Reader<'a> {
    pipeline: &'a Pipeline<'a>,
    work: &'a FileWork,
    jobs: &'a Sender<Job>,
    tickets: &'a Sender<Ticket>,
    documents: Documents,
    batch: Option<Batch>,
    /// Text of a long document that must be tokenized with the text after it.
    carried: String,
    /// True once the file need not be read further.
    is_done: bool,
}

impl Reader<'_> {
    fn read(&mut self, stopped: &AtomicBool) -> Result<FileEnd, Error> {
        let mut counts = InputCounts::default();
        let file = &self.pipeline.files[self.work.file];
        let read = file.read(self.pipeline.input, &mut counts, &mut |piece| {
            if stopped.load(Ordering::Relaxed) {
                return Err(stop());
            }
            self.take(&piece)
        });
        if !self.is_done {
            read?;
        }
        self.send_batch()?;
        Ok(FileEnd {
            file: self.work.file,
            counts,
            documents: self.documents.ended(),
        })
    }

    fn take(&mut self, piece: &Piece) -> Result<(), Error> {
        let document = self.documents.next(piece);
        if let Some(shard) = self.shard(document) {
            self.add(shard, document, piece)?;
        }
        let next = self.documents.ended();
        let last = self
            .work
            .ranges
            .last()
            .map_or(0, |range| range.documents.end);
        let is_past = !self.work.counts && next >= last;
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
        batch.text.push_str(&carried);
        batch.text.push_str(piece.text);
        if !piece.ends_document {
            let text = &batch.text[start..];
            let cut = self.pipeline.tokenizer.last_cut(text);
            let Some(cut) = cut.or_else(|| carry_whole(text)) else {
                let file = &self.pipeline.files[self.work.file];
                return Err(Error::Tokenizer(format!(
                    "{file}: document {} has {MAX_CARRIED} bytes that cannot be tokenized in \
                     parts: split the document",
                    document
                )));
            };
            self.carried = batch.text[start + cut.start..].to_string();
            batch.text.truncate(start + cut.end);
        }
        batch.parts.push(TextPart {
            document,
            end: batch.text.len(),
            ends: piece.ends_document,
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
        let sent = self.tickets.send(Ticket::Batch(ticket)).is_ok();
        if sent && self.jobs.send((batch, result)).is_ok() {
            Ok(())
        } else {
            Err(stop())
        }
    }
}
