//! The end of a file of JSON lines, read backwards: a resumed run cuts off what it repeats.

use serde::{Deserialize, Deserializer, de::IgnoredAny};
use std::io::{Read, Result, Seek, SeekFrom};

/// Bytes that are read at once.
const BLOCK: u64 = 64 * 1024;

/// A longer line is damaged: a line of metrics has some kilobytes per thousand ranks and layers.
const MAX_LINE: u64 = 64 << 20;

/// The point from which a resumed run writes lines again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResumePoint {
    /// Number of steps of the state that the run resumes from.
    pub step: u64,
    /// True if the run also repeats the validation of that step.
    pub repeats_validation: bool,
}

impl ResumePoint {
    /// True unless the run writes the line again.
    fn keeps(self, line: &NumberedLine) -> bool {
        let is_repeated = self.repeats_validation && line.is_validation;
        line.step < self.step || line.step == self.step && !is_repeated
    }
}

/// The end of a file up to which a resumed run keeps it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Tail {
    /// Number of bytes to keep, from the start of the file.
    pub(super) keep: u64,
    /// Step of the last line that is kept.
    pub(super) last_step: Option<u64>,
    /// First step whose line is in the file, if none is kept and one can be read.
    pub(super) first_step: Option<u64>,
    /// True if the last line lacks its end.
    pub(super) is_unterminated: bool,
}

#[derive(Deserialize)]
struct NumberedLine {
    step: u64,
    /// Set in a record of missing lines.
    first_step: Option<u64>,
    #[serde(default, rename = "validation_loss", deserialize_with = "is_present")]
    is_validation: bool,
}

impl NumberedLine {
    /// Returns the first step with a line in a file that begins with this one.
    fn first_of_file(&self) -> u64 {
        // A validation follows the line of its step.
        let own = self.step.saturating_add(u64::from(self.is_validation));
        self.first_step.unwrap_or(own)
    }
}

/// Returns true for a key with any value: a loss that is not finite is written as null.
fn is_present<'de, D: Deserializer<'de>>(value: D) -> std::result::Result<bool, D::Error> {
    IgnoredAny::deserialize(value).map(|_| true)
}

/// Finds the last line that a run from `point` does not write again, in a file of `len` bytes whose
/// steps ascend. A validation follows the line of its step. Damaged and cut-off lines after the
/// line are not kept.
///
/// Reads the lines after it and one block, however long the file is.
///
/// # Errors
/// If the file cannot be read.
pub(super) fn find_tail(
    file: &mut (impl Read + Seek),
    len: u64,
    point: ResumePoint,
) -> Result<Tail> {
    let mut file = BackwardReader {
        file,
        block: Vec::new(),
        block_start: len,
    };
    let mut end = len;
    let mut first_step = None;
    while end > 0 {
        let is_unterminated = end == len && !file.ends_with_newline(end)?;
        let text_end = if is_unterminated { end } else { end - 1 };
        let start = file.line_start(text_end)?;
        match file.numbered_line(start, text_end)? {
            Some(line) if point.keeps(&line) => {
                return Ok(Tail {
                    keep: end,
                    last_step: Some(line.step),
                    first_step: None,
                    is_unterminated,
                });
            }
            Some(line) => first_step = Some(line.first_of_file()),
            None => {}
        }
        end = start;
    }
    Ok(Tail {
        first_step,
        ..Tail::default()
    })
}

/// Reads blocks from the end of a file towards its start, and holds one of them.
struct BackwardReader<'a, F> {
    file: &'a mut F,
    block: Vec<u8>,
    block_start: u64,
}

impl<F: Read + Seek> BackwardReader<'_, F> {
    /// Reads the block that ends at `end`.
    fn load_before(&mut self, end: u64) -> Result<()> {
        let len = end.min(BLOCK);
        self.block_start = end - len;
        self.block.resize(len as usize, 0);
        self.file.seek(SeekFrom::Start(self.block_start))?;
        self.file.read_exact(&mut self.block)
    }

    /// Returns the bytes of the current block before `end`.
    fn loaded_before(&mut self, end: u64) -> Result<&[u8]> {
        let loaded_end = self.block_start + self.block.len() as u64;
        if end <= self.block_start || end > loaded_end {
            self.load_before(end)?;
        }
        Ok(&self.block[..(end - self.block_start) as usize])
    }

    fn ends_with_newline(&mut self, end: u64) -> Result<bool> {
        Ok(self.loaded_before(end)?.last() == Some(&b'\n'))
    }

    /// Returns the start of the line whose text ends at `end`.
    fn line_start(&mut self, end: u64) -> Result<u64> {
        let mut end = end;
        while end > 0 {
            let loaded = self.loaded_before(end)?;
            if let Some(place) = loaded.iter().rposition(|&byte| byte == b'\n') {
                return Ok(self.block_start + place as u64 + 1);
            }
            end = self.block_start;
        }
        Ok(0)
    }

    /// Reads a line. Returns `None` if it is damaged.
    fn numbered_line(&mut self, start: u64, end: u64) -> Result<Option<NumberedLine>> {
        if end - start > MAX_LINE {
            return Ok(None);
        }
        let loaded_end = self.block_start + self.block.len() as u64;
        let mut long = Vec::new();
        let text = if start >= self.block_start && end <= loaded_end {
            &self.block[(start - self.block_start) as usize..(end - self.block_start) as usize]
        } else {
            long.resize((end - start) as usize, 0);
            self.file.seek(SeekFrom::Start(start))?;
            self.file.read_exact(&mut long)?;
            &long
        };
        Ok(serde_json::from_slice(text).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Cursor, Write};

    struct Counted<F> {
        file: F,
        bytes: u64,
    }

    impl<F: Read> Read for Counted<F> {
        fn read(&mut self, into: &mut [u8]) -> Result<usize> {
            let read = self.file.read(into)?;
            self.bytes += read as u64;
            Ok(read)
        }
    }

    impl<F: Seek> Seek for Counted<F> {
        fn seek(&mut self, to: SeekFrom) -> Result<u64> {
            self.file.seek(to)
        }
    }

    const LINE: u64 = 64;
    const FIRST_STEP: u64 = 100_000_000;

    /// A file of lines of equal length, with a step each, that are made when they are read.
    struct GeneratedLines {
        lines: u64,
        place: u64,
    }

    impl GeneratedLines {
        fn len(&self) -> u64 {
            self.lines * LINE
        }

        fn line(number: u64) -> String {
            let step = FIRST_STEP + number;
            format!("{{\"step\":{step},\"loss\":\"{}\"}}\n", "x".repeat(35))
        }
    }

    impl Read for GeneratedLines {
        fn read(&mut self, into: &mut [u8]) -> Result<usize> {
            if self.place >= self.len() {
                return Ok(0);
            }
            let line = GeneratedLines::line(self.place / LINE);
            let rest = &line.as_bytes()[(self.place % LINE) as usize..];
            let read = rest.len().min(into.len());
            into[..read].copy_from_slice(&rest[..read]);
            self.place += read as u64;
            Ok(read)
        }
    }

    impl Seek for GeneratedLines {
        fn seek(&mut self, to: SeekFrom) -> Result<u64> {
            let SeekFrom::Start(place) = to else {
                panic!("only places from the start are used");
            };
            self.place = place;
            Ok(place)
        }
    }

    fn after(step: u64) -> ResumePoint {
        ResumePoint {
            step,
            repeats_validation: false,
        }
    }

    fn repeating(step: u64) -> ResumePoint {
        ResumePoint {
            step,
            repeats_validation: true,
        }
    }

    fn tail(text: &[u8], point: ResumePoint) -> Tail {
        find_tail(&mut Cursor::new(text), text.len() as u64, point).unwrap()
    }

    #[test]
    fn of_a_gigabyte_of_lines_those_to_cut_off_are_read() {
        let file = GeneratedLines {
            lines: (1 << 30) / LINE,
            place: 0,
        };
        assert_eq!(GeneratedLines::line(0).len() as u64, LINE);
        let len = file.len();
        let cut_off = 5000;
        let last = FIRST_STEP + file.lines - 1 - cut_off;
        let mut counted = Counted { file, bytes: 0 };
        let tail = find_tail(&mut counted, len, after(last)).unwrap();
        let expected = Tail {
            keep: len - cut_off * LINE,
            last_step: Some(last),
            ..Tail::default()
        };
        assert_eq!(tail, expected);
        // Lines across the start of a block are read again.
        let most = cut_off * LINE + BLOCK + (cut_off * LINE / BLOCK + 1) * LINE;
        assert!(counted.bytes <= most, "{} bytes", counted.bytes);
    }

    #[test]
    fn of_a_long_file_only_the_end_is_read() {
        let mut file = tempfile::tempfile().unwrap();
        // Sparse: 1 GB that takes no disk.
        file.set_len(1_000_000_000).unwrap();
        file.seek(SeekFrom::End(0)).unwrap();
        let before = (0..200).map(|step| format!("\n{{\"step\":{step},\"loss\":1.0}}"));
        let text: String = before.collect();
        file.write_all(text.as_bytes()).unwrap();
        file.write_all(b"\n").unwrap();
        let len = file.metadata().unwrap().len();
        let mut counted = Counted { file, bytes: 0 };
        let tail = find_tail(&mut counted, len, after(150)).unwrap();
        assert_eq!(tail.last_step, Some(150));
        assert!(counted.bytes <= 2 * BLOCK, "{} bytes", counted.bytes);
    }

    #[test]
    fn damaged_ends_are_cut_off() {
        let whole = b"{\"step\":1}\n{\"step\":2}\n";
        let kept = Tail {
            keep: 22,
            last_step: Some(2),
            first_step: None,
            is_unterminated: false,
        };
        let garbage: [&[u8]; 6] = [
            b"",
            b"{\"step\":3,\"lo",
            b"\n\n",
            b"{\"step\":2,\xff\xfe}\n",
            b"\0\0\0\0\0\0\0\0",
            b"{\"loss\":2}\n\"step\"\n",
        ];
        for garbage in garbage {
            let found = tail(&[whole, garbage].concat(), after(5));
            assert_eq!(found, kept, "{garbage:?}");
        }
        // A line that lacks only its end is whole.
        let unterminated = tail(b"{\"step\":1}\n{\"step\":2}", after(5));
        assert!(unterminated.is_unterminated && unterminated.keep == 21);
        assert_eq!(tail(b"no json\n", after(5)), Tail::default());
        let later = tail(
            b"?\n{\"step\":7,\"first_step\":6}\n{\"step\":8}\n",
            after(5),
        );
        assert_eq!((later.keep, later.first_step), (0, Some(6)));
        assert_eq!(tail(b"", after(5)), Tail::default());
    }

    #[test]
    fn a_validation_is_cut_off_if_it_is_repeated() {
        let step_1 = "{\"step\":1}\n{\"step\":1,\"validation_loss\":2.5}\n";
        let step_2 = "{\"step\":2,\"loss\":1.0}\n";
        let kept = (step_1.len() + step_2.len()) as u64;
        let ends = [
            "",
            "{\"step\":2,\"validation_loss\":2.0}\n",
            "{\"step\":2,\"validation_loss\":null}\n{\"step\":3}\n",
            "{\"step\":2,\"validation_loss\":2.0}",
            "{\"step\":2,\"valida",
        ];
        for end in ends {
            let text = [step_1, step_2, end].concat();
            let found = tail(text.as_bytes(), repeating(2));
            assert_eq!((found.keep, found.last_step), (kept, Some(2)), "{end}");
        }
        // Validations of earlier steps stay, and without a repetition the last one too.
        let text = [step_1, step_2, ends[1]].concat();
        assert_eq!(tail(text.as_bytes(), after(2)).keep, text.len() as u64);
        assert_eq!(
            tail(step_1.as_bytes(), repeating(2)).keep,
            step_1.len() as u64
        );
        // The record of missing lines stands for step 2.
        let record = "{\"step\":2,\"first_step\":2,\"dropped_steps\":1,\"dropped_lines\":2}\n";
        let text = [step_1, record, ends[1]].concat();
        let kept = (step_1.len() + record.len()) as u64;
        assert_eq!(tail(text.as_bytes(), repeating(2)).keep, kept);
    }

    proptest! {
        /// Lines longer than a block and in any number are cut where a reader of the whole file
        /// would cut them.
        #[test]
        fn the_tail_is_that_of_the_whole_file(
            lengths in prop::collection::vec(prop_oneof![0..60usize, 60_000..70_000usize], 0..30),
            step in 0..32u64,
        ) {
            let mut text = Vec::new();
            let mut expected = 0;
            let mut last = None;
            for (number, length) in lengths.iter().enumerate() {
                let number = number as u64 + 1;
                let line = serde_json::json!({"step": number, "fill": "x".repeat(*length)});
                writeln!(text, "{line}").unwrap();
                if number <= step {
                    expected = text.len() as u64;
                    last = Some(number);
                }
            }
            let found = tail(&text, after(step));
            prop_assert_eq!(found.keep, expected);
            prop_assert_eq!(found.last_step, last);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Bytes are changed and the end is cut off, as by a crash of the machine.
        #[test]
        fn of_a_mutated_file_whole_lines_are_kept(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..5),
            end in any::<prop::sample::Index>(),
            step in 0..8u64,
        ) {
            let lines = (1..=6).map(|step| format!("{{\"step\":{step},\"loss\":1.5}}\n"));
            let mut text: Vec<u8> = lines.collect::<String>().into_bytes();
            for (place, byte) in changes {
                let place = place.index(text.len());
                text[place] = byte;
            }
            text.truncate(end.index(text.len()));
            let found = tail(&text, after(step));
            prop_assert!(found.last_step.is_none_or(|last| last <= step));
            let kept = &text[..found.keep as usize];
            prop_assert!(kept.is_empty() || kept.ends_with(b"\n") || found.is_unterminated);
        }
    }
}
