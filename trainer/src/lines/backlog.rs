//! Lines that wait for a file: a bounded queue without a thread or a clock.

use std::collections::VecDeque;

/// Bounds of the lines that wait for one file.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub lines: usize,
    /// Bytes of all lines. One longer line is accepted if no other waits.
    pub bytes: usize,
}

/// Number of lines that may wait per MiB of memory.
const LINES_PER_MIB: usize = 4096;

impl Limits {
    /// Returns the bounds for `mib` MiB of memory.
    pub fn of_mib(mib: u64) -> Limits {
        let mib = usize::try_from(mib).unwrap_or(usize::MAX);
        Limits {
            lines: mib.saturating_mul(LINES_PER_MIB),
            bytes: mib.saturating_mul(1 << 20),
        }
    }
}

/// Lines that a file lacks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MissingLines {
    pub lines: u64,
    /// Number of steps whose own line is among them.
    pub steps: u64,
    /// First and last step of the lines, if they belong to steps.
    pub span: Option<(u64, u64)>,
}

impl MissingLines {
    fn add(&mut self, line: &Line) {
        self.lines += 1;
        self.steps += u64::from(line.is_of_step);
        if let Some(step) = line.step {
            let (first, last) = self.span.unwrap_or((step, step));
            self.span = Some((first.min(step), last.max(step)));
        }
    }

    pub fn and(self, other: MissingLines) -> MissingLines {
        let span = match (self.span, other.span) {
            (Some((first, last)), Some((from, to))) => Some((first.min(from), last.max(to))),
            (span, None) | (None, span) => span,
        };
        MissingLines {
            lines: self.lines + other.lines,
            steps: self.steps + other.steps,
            span,
        }
    }
}

/// A line with its line end.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) text: String,
    pub(super) step: Option<u64>,
    /// True for the one line that every step has.
    pub(super) is_of_step: bool,
}

/// Makes the line, without its end, that stands for missing ones in the file.
pub(super) type Record = fn(&MissingLines) -> String;

/// The queue. Lines are in order; those that find it full are dropped, and a record takes their
/// place.
#[derive(Debug)]
pub(super) struct Backlog {
    limits: Limits,
    record: Record,
    waiting: VecDeque<Line>,
    bytes: usize,
    /// Bytes of the first waiting line that are in the file.
    started: usize,
    /// Lines dropped since the queue was full, without a record yet.
    dropping: Option<MissingLines>,
    /// Number of lines accepted so far.
    accepted: u64,
    /// Number of lines written so far.
    written: u64,
}

impl Backlog {
    pub(super) fn new(limits: Limits, record: Record) -> Backlog {
        Backlog {
            limits,
            record,
            waiting: VecDeque::new(),
            bytes: 0,
            started: 0,
            dropping: None,
            accepted: 0,
            written: 0,
        }
    }

    /// Adds a line, or drops it if the queue is full.
    pub(super) fn push(&mut self, line: Line) {
        let has_room = self.waiting.len() < self.limits.lines
            && self.bytes + line.text.len() <= self.limits.bytes;
        let is_dropped = self.dropping.is_some() || !(has_room || self.waiting.is_empty());
        if is_dropped {
            self.dropping.get_or_insert_default().add(&line);
        } else {
            self.accept(line);
        }
    }

    fn accept(&mut self, line: Line) {
        self.bytes += line.text.len();
        self.accepted += 1;
        self.waiting.push_back(line);
    }

    /// Adds the record of lines that the file lacks for another reason than a full queue.
    pub(super) fn report_missing(&mut self, missing: &MissingLines) {
        let mut text = (self.record)(missing);
        text.push('\n');
        self.accept(Line {
            text,
            step: missing.span.map(|(_, last)| last),
            is_of_step: false,
        });
    }

    /// Like [`Backlog::report_missing`], before all lines that wait. Not after a part of a line.
    pub(super) fn report_missing_first(&mut self, missing: &MissingLines) {
        self.report_missing(missing);
        self.waiting.rotate_right(1);
    }

    /// Returns the next bytes for the file: whole lines, at least one, up to about `limit`.
    pub(super) fn batch(&self, limit: usize) -> Vec<u8> {
        let mut batch = Vec::new();
        for line in &self.waiting {
            if !batch.is_empty() && batch.len() + line.text.len() > limit {
                break;
            }
            batch.extend_from_slice(line.text.as_bytes());
        }
        batch.drain(..self.started.min(batch.len()));
        batch
    }

    /// Removes the next `bytes` bytes, which are in the file. Returns the lines of a record that
    /// this made room for.
    pub(super) fn complete(&mut self, bytes: usize) -> Option<MissingLines> {
        self.started += bytes;
        while let Some(line) = self.waiting.front() {
            let len = line.text.len();
            if self.started < len {
                break;
            }
            self.started -= len;
            self.bytes -= len;
            self.written += 1;
            self.waiting.pop_front();
        }
        // Not at the first free byte: a record for every few lines would help no reader.
        let has_room =
            self.waiting.len() <= self.limits.lines / 2 && self.bytes <= self.limits.bytes / 2;
        let missing = self.dropping.take_if(|_| has_room)?;
        self.report_missing(&missing);
        Some(missing)
    }

    /// Writes a line from its start again that was written in part, to another file.
    pub(super) fn restart_line(&mut self) {
        self.started = 0;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Returns the lines that are not in the file.
    pub(super) fn unwritten(&self) -> MissingLines {
        let mut missing = self.dropping.unwrap_or_default();
        for line in &self.waiting {
            missing.add(line);
        }
        missing
    }

    /// True if lines are being dropped.
    pub(super) fn is_dropping(&self) -> bool {
        self.dropping.is_some()
    }

    /// Returns the number of lines ever accepted.
    pub(super) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Returns the number of lines ever written.
    pub(super) fn written(&self) -> u64 {
        self.written
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits {
        lines: 8,
        bytes: 100,
    };

    fn record(missing: &MissingLines) -> String {
        format!("missing {} {:?}", missing.lines, missing.span)
    }

    fn line(step: u64) -> Line {
        Line {
            text: format!("step {step}\n"),
            step: Some(step),
            is_of_step: true,
        }
    }

    /// Returns the step of each line, and of each missing one, in the order of the file.
    fn steps(file: &str) -> Vec<u64> {
        let mut steps = Vec::new();
        for line in file.lines() {
            match line.strip_prefix("step ") {
                Some(step) => steps.push(step.parse().unwrap()),
                None => {
                    let span = line
                        .split(['(', ',', ')', ' '])
                        .filter(|word| !word.is_empty());
                    let words: Vec<_> = span.collect();
                    let numbers: Vec<u64> =
                        words.iter().filter_map(|word| word.parse().ok()).collect();
                    let [count, first, last] = numbers[..] else {
                        panic!("{line}");
                    };
                    assert_eq!(count, last - first + 1, "{line}");
                    steps.extend(first..=last);
                }
            }
        }
        steps
    }

    #[test]
    fn a_longer_line_than_the_bound_is_accepted_alone() {
        let mut backlog = Backlog::new(LIMITS, record);
        let long = Line {
            text: "x".repeat(1000) + "\n",
            step: Some(1),
            is_of_step: true,
        };
        backlog.push(long);
        backlog.push(line(2));
        assert_eq!(backlog.batch(10).len(), 1001);
        assert_eq!(backlog.unwritten().lines, 2);
        let missing = backlog.complete(1001).unwrap();
        assert_eq!(missing.span, Some((2, 2)));
        assert_eq!(backlog.batch(1000), b"missing 1 Some((2, 2))\n");
    }

    proptest! {
        /// Each step is in the file once, as a line or in one record, in order, however few bytes
        /// each write takes; and the queue stays within its bounds.
        #[test]
        fn every_step_is_in_the_file_once(writes in prop::collection::vec(0..60usize, 1..60)) {
            let mut backlog = Backlog::new(LIMITS, record);
            let mut file = Vec::new();
            let mut step = 0;
            for taken in writes {
                for _ in 0..3 {
                    step += 1;
                    backlog.push(line(step));
                }
                prop_assert!(backlog.waiting.len() <= LIMITS.lines + 1);
                prop_assert!(backlog.bytes <= LIMITS.bytes + 40);
                let batch = backlog.batch(50);
                let taken = taken.min(batch.len());
                file.extend_from_slice(&batch[..taken]);
                backlog.complete(taken);
            }
            while !backlog.is_empty() {
                let batch = backlog.batch(50);
                file.extend_from_slice(&batch);
                backlog.complete(batch.len());
            }
            let file = String::from_utf8(file).unwrap();
            let all: Vec<u64> = (1..=step).collect();
            prop_assert_eq!(steps(&file), all);
            prop_assert_eq!(backlog.written(), backlog.accepted());
        }
    }
}
