//! Documents of text files: splits bytes, which come in blocks of any size.

use super::{
    document::{Documents, Place},
    options::Split,
};
use crate::Error;
use memchr::{memchr, memchr_iter, memmem::Finder};
use std::io::{BufRead, ErrorKind};

/// White space at the start of a line that is held back until the line turns out not to be blank.
const MAX_BLANK: usize = 64 << 10;

/// Passes on the documents of a file.
pub(super) fn read(
    reader: &mut dyn BufRead,
    split: &Split,
    documents: &mut Documents,
) -> Result<(), Error> {
    let mut splitter = new_splitter(split);
    loop {
        let block = match reader.fill_buf() {
            Ok([]) => return splitter.finish(documents),
            Ok(block) => block,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(documents.io_error(error)),
        };
        splitter.feed(block, documents)?;
        let len = block.len();
        reader.consume(len);
    }
}

/// A state machine that finds documents.
trait Splitter {
    fn feed(&mut self, block: &[u8], documents: &mut Documents) -> Result<(), Error>;
    fn finish(&mut self, documents: &mut Documents) -> Result<(), Error>;
}

fn new_splitter(split: &Split) -> Box<dyn Splitter> {
    match split {
        Split::File => Box::new(Whole { begun: false }),
        Split::Line => Box::new(Lines::new()),
        Split::BlankLine => Box::new(Paragraphs::new()),
        Split::Separator(separator) => Box::new(Separated::new(separator)),
    }
}

struct Whole {
    begun: bool,
}

impl Splitter for Whole {
    fn feed(&mut self, block: &[u8], documents: &mut Documents) -> Result<(), Error> {
        if !self.begun {
            self.begun = true;
            documents.begin(Place::Text(1));
        }
        documents.bytes(block)
    }

    fn finish(&mut self, documents: &mut Documents) -> Result<(), Error> {
        if !self.begun {
            documents.begin(Place::Text(1));
        }
        documents.end()
    }
}

struct Lines {
    line: u64,
    begun: bool,
    /// True if a CR is held back that may belong to a line end.
    cr: bool,
}

impl Lines {
    fn new() -> Self {
        Self {
            line: 1,
            begun: false,
            cr: false,
        }
    }

    fn content(&mut self, bytes: &[u8], documents: &mut Documents) -> Result<(), Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        if std::mem::take(&mut self.cr) {
            documents.bytes(b"\r")?;
        }
        let bytes = match bytes {
            [start @ .., b'\r'] => {
                self.cr = true;
                start
            }
            bytes => bytes,
        };
        documents.bytes(bytes)
    }
}

impl Splitter for Lines {
    fn feed(&mut self, block: &[u8], documents: &mut Documents) -> Result<(), Error> {
        let mut rest = block;
        while !rest.is_empty() {
            if !self.begun {
                self.begun = true;
                documents.begin(Place::Text(self.line));
            }
            let end = memchr(b'\n', rest);
            let content = &rest[..end.unwrap_or(rest.len())];
            self.content(content, documents)?;
            rest = &rest[content.len()..];
            if end.is_some() {
                rest = &rest[1..];
                self.cr = false;
                self.begun = false;
                self.line += 1;
                documents.end()?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, documents: &mut Documents) -> Result<(), Error> {
        if !self.begun {
            return Ok(());
        }
        if self.cr {
            documents.bytes(b"\r")?;
        }
        documents.end()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Within {
    /// Before the first line of a document.
    Gap,
    /// In a line of a document that has contents.
    Line,
    /// At the start of the next line, which may be blank.
    LineStart,
}

struct Paragraphs {
    within: Within,
    /// Bytes that belong to the document if the line is not blank: the line end before it, if
    /// there is one, and the white space at its start. In a line, a CR.
    held: Vec<u8>,
    line: u64,
}

impl Paragraphs {
    fn new() -> Self {
        Self {
            within: Within::Gap,
            held: Vec::new(),
            line: 1,
        }
    }

    /// Takes what comes in a line after its first character that is no white space.
    fn in_line<'b>(
        &mut self,
        block: &'b [u8],
        documents: &mut Documents,
    ) -> Result<&'b [u8], Error> {
        let end = memchr(b'\n', block);
        let content = &block[..end.unwrap_or(block.len())];
        if !content.is_empty() {
            documents.bytes(&self.held)?;
            self.held.clear();
            let len = content.len() - usize::from(content.ends_with(b"\r"));
            documents.bytes(&content[..len])?;
            self.held.extend(&content[len..]);
        }
        Ok(match end {
            Some(end) => {
                self.held.push(b'\n');
                self.within = Within::LineStart;
                self.line += 1;
                &block[end + 1..]
            }
            None => &[],
        })
    }

    /// Takes white space at the start of a line.
    fn at_start<'b>(
        &mut self,
        block: &'b [u8],
        documents: &mut Documents,
    ) -> Result<&'b [u8], Error> {
        let is_space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\r');
        // The limit must not depend on the size of blocks.
        let room = MAX_BLANK + 1 - self.held.len();
        let spaces = block.iter().take(room).take_while(|byte| is_space(byte));
        let len = spaces.count();
        self.held.extend(&block[..len]);
        let is_too_long = self.held.len() > MAX_BLANK;
        let rest = &block[len..];
        if rest.first() == Some(&b'\n') && !is_too_long {
            self.held.clear();
            self.line += 1;
            if self.within == Within::LineStart {
                self.within = Within::Gap;
                documents.end()?;
            }
            return Ok(&rest[1..]);
        }
        if !rest.is_empty() || is_too_long {
            if self.within == Within::Gap {
                documents.begin(Place::Text(self.line));
            }
            self.within = Within::Line;
            let held = std::mem::take(&mut self.held);
            documents.bytes(&held)?;
        }
        Ok(rest)
    }
}

impl Splitter for Paragraphs {
    fn feed(&mut self, block: &[u8], documents: &mut Documents) -> Result<(), Error> {
        let mut rest = block;
        while !rest.is_empty() {
            rest = match self.within {
                Within::Line => self.in_line(rest, documents)?,
                Within::Gap | Within::LineStart => self.at_start(rest, documents)?,
            };
        }
        Ok(())
    }

    fn finish(&mut self, documents: &mut Documents) -> Result<(), Error> {
        match self.within {
            Within::Gap => Ok(()),
            Within::Line => {
                documents.bytes(&self.held)?;
                documents.end()
            }
            Within::LineStart => documents.end(),
        }
    }
}

struct Separated {
    finder: Finder<'static>,
    /// Bytes in which the separator, or a line end next to it, may begin.
    held: Vec<u8>,
    begun: bool,
    /// True right after a separator, where a line end belongs to it.
    after_separator: bool,
    line: u64,
}

impl Separated {
    fn new(separator: &str) -> Self {
        Self {
            finder: Finder::new(separator).into_owned(),
            held: Vec::new(),
            begun: false,
            after_separator: false,
            line: 1,
        }
    }

    fn content(&mut self, bytes: &[u8], documents: &mut Documents) -> Result<(), Error> {
        if !bytes.is_empty() {
            self.begin(documents);
            self.line += memchr_iter(b'\n', bytes).count() as u64;
            documents.bytes(bytes)?;
        }
        Ok(())
    }

    fn begin(&mut self, documents: &mut Documents) {
        if !self.begun {
            self.begun = true;
            documents.begin(Place::Text(self.line));
        }
    }

    /// Takes what was held as far as it is decided; all of it at the end of the file.
    fn advance(&mut self, is_last: bool, documents: &mut Documents) -> Result<(), Error> {
        let held = std::mem::take(&mut self.held);
        let separator = self.finder.needle().len();
        let mut rest = &held[..];
        loop {
            if self.after_separator {
                if rest.len() < 2 && !is_last {
                    break;
                }
                let len = rest.len();
                rest = rest.strip_prefix(b"\r").unwrap_or(rest);
                match rest.strip_prefix(b"\n") {
                    Some(after) => {
                        rest = after;
                        self.line += 1;
                    }
                    None => rest = &held[held.len() - len..],
                }
                self.after_separator = false;
            }
            let Some(at) = self.finder.find(rest) else {
                break;
            };
            let content = strip_line_end(&rest[..at]);
            self.content(content, documents)?;
            self.line += memchr_iter(b'\n', &rest[content.len()..at + separator]).count() as u64;
            self.begin(documents);
            documents.end()?;
            self.begun = false;
            self.after_separator = true;
            rest = &rest[at + separator..];
        }
        if is_last {
            return self.content(strip_line_end(rest), documents);
        }
        // A line end, and all but one byte of a separator.
        let open = rest.len().min(separator + 1);
        let decided = if self.after_separator {
            0
        } else {
            rest.len() - open
        };
        self.content(&rest[..decided], documents)?;
        self.held.extend(&rest[decided..]);
        Ok(())
    }
}

fn strip_line_end(text: &[u8]) -> &[u8] {
    match text {
        [start @ .., b'\r', b'\n'] | [start @ .., b'\n'] => start,
        text => text,
    }
}

impl Splitter for Separated {
    fn feed(&mut self, block: &[u8], documents: &mut Documents) -> Result<(), Error> {
        self.held.extend(block);
        self.advance(false, documents)
    }

    fn finish(&mut self, documents: &mut Documents) -> Result<(), Error> {
        self.advance(true, documents)?;
        if self.begun { documents.end() } else { Ok(()) }
    }
}
