//! UTF-16 and UTF-32: recognizes byte order marks and decodes to UTF-8.

use std::io::{self, Read};

/// Bytes that are decoded at a time.
const BLOCK: usize = 32 << 10;

/// An encoding of a file that is not UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    Utf16Le,
    Utf16Be,
    Utf32Le,
    Utf32Be,
}

/// A byte order mark at the start of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    /// The encoding, if it is not UTF-8.
    pub(super) encoding: Option<Encoding>,
    /// Bytes of the mark.
    pub(super) len: usize,
}

/// Returns the byte order mark of a file that starts with these bytes.
pub(super) fn find_mark(start: &[u8]) -> Option<Mark> {
    use Encoding::{Utf16Be, Utf16Le, Utf32Be, Utf32Le};
    // The mark of UTF-32LE starts with that of UTF-16LE.
    let marks: [(&[u8], Option<Encoding>); 5] = [
        (&[0xEF, 0xBB, 0xBF], None),
        (&[0xFF, 0xFE, 0, 0], Some(Utf32Le)),
        (&[0, 0, 0xFE, 0xFF], Some(Utf32Be)),
        (&[0xFF, 0xFE], Some(Utf16Le)),
        (&[0xFE, 0xFF], Some(Utf16Be)),
    ];
    let found = marks.into_iter().find(|(mark, _)| start.starts_with(mark));
    found.map(|(mark, encoding)| Mark {
        encoding,
        len: mark.len(),
    })
}

/// A reader that decodes to UTF-8.
///
/// Halves of surrogate pairs and other invalid units become a byte 0xFF, which is not UTF-8, so
/// that the rules for text apply to them at their place.
pub(super) struct Decoder<R> {
    inner: R,
    encoding: Encoding,
    raw: Vec<u8>,
    decoded: Vec<u8>,
    position: usize,
    high: Option<u32>,
    ended: bool,
}

impl<R: Read> Decoder<R> {
    pub(super) fn new(inner: R, encoding: Encoding) -> Self {
        Self {
            inner,
            encoding,
            raw: Vec::new(),
            decoded: Vec::new(),
            position: 0,
            high: None,
            ended: false,
        }
    }

    fn fill(&mut self) -> io::Result<()> {
        self.decoded.clear();
        self.position = 0;
        let before = self.raw.len();
        (&mut self.inner)
            .take(BLOCK as u64)
            .read_to_end(&mut self.raw)?;
        self.ended = self.raw.len() == before;
        let raw = std::mem::take(&mut self.raw);
        let unit = match self.encoding {
            Encoding::Utf16Le | Encoding::Utf16Be => 2,
            Encoding::Utf32Le | Encoding::Utf32Be => 4,
        };
        let units = raw.chunks_exact(unit);
        self.raw.extend(units.remainder());
        for unit in units {
            let unit = match (self.encoding, unit) {
                (Encoding::Utf16Le, &[a, b]) => u32::from(u16::from_le_bytes([a, b])),
                (Encoding::Utf16Be, &[a, b]) => u32::from(u16::from_be_bytes([a, b])),
                (Encoding::Utf32Le, &[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
                (_, unit) => unit
                    .iter()
                    .fold(0, |all, &byte| (all << 8) | u32::from(byte)),
            };
            self.push(unit);
        }
        if self.ended && (self.high.take().is_some() | !self.raw.is_empty()) {
            self.raw.clear();
            self.decoded.push(0xFF);
        }
        Ok(())
    }

    fn push(&mut self, unit: u32) {
        let is_utf16 = matches!(self.encoding, Encoding::Utf16Le | Encoding::Utf16Be);
        let mut code = unit;
        if let Some(high) = self.high.take() {
            if (0xDC00..0xE000).contains(&unit) {
                code = 0x10000 + ((high - 0xD800) << 10) + (unit - 0xDC00);
            } else {
                self.decoded.push(0xFF);
            }
        }
        if is_utf16 && (0xD800..0xDC00).contains(&code) {
            self.high = Some(code);
            return;
        }
        match char::from_u32(code) {
            Some(c) => {
                let mut bytes = [0; 4];
                self.decoded.extend(c.encode_utf8(&mut bytes).as_bytes());
            }
            None => self.decoded.push(0xFF),
        }
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.position == self.decoded.len() && !self.ended {
            self.fill()?;
        }
        let len = into.len().min(self.decoded.len() - self.position);
        into[..len].copy_from_slice(&self.decoded[self.position..][..len]);
        self.position += len;
        Ok(len)
    }
}
