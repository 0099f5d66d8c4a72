//! The elements of a JSON array that comes in blocks.

use memchr::memchr2;

/// Most bytes of memory that are kept for the next row.
pub(super) const MAX_KEPT: usize = 8 << 20;

/// A result of [`Elements::feed`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found<'s> {
    /// All bytes were taken: the next element needs more, or the array has ended.
    Nothing,
    /// The bytes of an element.
    Element(&'s [u8]),
    /// The end of an element that was too long to keep.
    TooLong,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    BeforeArray,
    /// After `[`, where the array may end.
    AtStart,
    InElement,
    AfterArray,
}

/// A scanner for the extents of elements. Their syntax is checked by the parser of rows.
pub(super) struct Elements {
    state: State,
    /// Nesting of the element's arrays and objects.
    depth: u64,
    in_string: bool,
    escaped: bool,
    element: Vec<u8>,
    too_long: bool,
    /// True if `element` was returned and is not needed any more.
    returned: bool,
    max_len: usize,
}

impl Elements {
    pub(super) fn new(max_len: usize) -> Self {
        Self {
            state: State::BeforeArray,
            depth: 0,
            in_string: false,
            escaped: false,
            element: Vec::new(),
            too_long: false,
            returned: false,
            max_len,
        }
    }

    /// Takes bytes up to the end of the next element.
    pub(super) fn feed(&mut self, bytes: &mut &[u8]) -> Result<Found<'_>, &'static str> {
        if std::mem::take(&mut self.returned) {
            self.element.clear();
            self.element.shrink_to(MAX_KEPT);
        }
        while let Some(&byte) = bytes.first() {
            if self.state == State::InElement {
                let len = self.find_end(bytes);
                self.keep(&bytes[..len]);
                *bytes = &bytes[len..];
                let Some(&end) = bytes.first() else { break };
                *bytes = &bytes[1..];
                if end == b']' {
                    self.state = State::AfterArray;
                }
                self.returned = true;
                return Ok(if std::mem::take(&mut self.too_long) {
                    Found::TooLong
                } else {
                    Found::Element(&self.element)
                });
            }
            match (self.state, byte) {
                (_, b' ' | b'\t' | b'\r' | b'\n') => {}
                (State::BeforeArray, _) => self.state = State::AtStart,
                (State::AtStart, b']') => self.state = State::AfterArray,
                (State::AtStart, _) => {
                    self.state = State::InElement;
                    continue;
                }
                _ => return Err("there is more after the end of the array"),
            }
            *bytes = &bytes[1..];
        }
        Ok(Found::Nothing)
    }

    /// Checks at the end of the file that the array has ended.
    pub(super) fn finish(&self) -> Result<(), &'static str> {
        match self.state {
            State::AfterArray => Ok(()),
            _ => Err("the file ends inside of the array; it is truncated"),
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.too_long |= self.element.len() + bytes.len() > self.max_len;
        if self.too_long {
            self.element.clear();
        } else {
            self.element.extend_from_slice(bytes);
        }
    }

    /// Returns the number of bytes before the comma or bracket that ends the element.
    fn find_end(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            if std::mem::take(&mut self.escaped) {
                at += 1;
                continue;
            }
            if self.in_string {
                let Some(len) = memchr2(b'"', b'\\', &bytes[at..]) else {
                    return bytes.len();
                };
                at += len;
                self.in_string = bytes[at] != b'"';
                self.escaped = self.in_string;
                at += 1;
                continue;
            }
            match bytes[at] {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if self.depth > 0 => self.depth -= 1,
                b',' if self.depth == 0 => return at,
                b']' => return at,
                _ => {}
            }
            at += 1;
        }
        at
    }
}
