//! Classes of characters that pre-tokenization distinguishes, one byte per code point.

use regex_syntax::hir::{Class, HirKind};
use std::sync::LazyLock;

// Bits of a class: Unicode's general categories by their initials, and `\s`.
pub(super) const UPPER: u8 = 1; // Lu, Lt
pub(super) const LOWER: u8 = 1 << 1; // Ll
pub(super) const UNCASED: u8 = 1 << 2; // Lm, Lo
pub(super) const MARK: u8 = 1 << 3; // M
pub(super) const NUMBER: u8 = 1 << 4; // N
pub(super) const SPACE: u8 = 1 << 5;
pub(super) const SYMBOL: u8 = 1 << 6; // P, S
pub(super) const LETTER: u8 = UPPER | LOWER | UNCASED;

/// `[一-龥぀-ゟ゠-ヿ]`, as in DeepSeek's tokenizers.
pub(super) const KANA_OR_HAN: u8 = 1 << 7;

const CODE_POINTS: usize = 0x11_0000;

/// The class bits of each code point. The tables are those of the `regex` crates, because the
/// library's regular expressions use them as well.
static CLASSES: LazyLock<Box<[u8]>> = LazyLock::new(|| {
    let mut classes = vec![0; CODE_POINTS].into_boxed_slice();
    let sets = [
        (r"[\p{Lu}\p{Lt}]", UPPER),
        (r"\p{Ll}", LOWER),
        (r"[\p{Lm}\p{Lo}]", UNCASED),
        (r"\p{M}", MARK),
        (r"\p{N}", NUMBER),
        (r"\s", SPACE),
        (r"[\p{P}\p{S}]", SYMBOL),
        (r"[一-龥぀-ゟ゠-ヿ]", KANA_OR_HAN),
    ];
    for (set, bit) in sets {
        let parsed = regex_syntax::parse(set).expect("a constant expression");
        let HirKind::Class(Class::Unicode(class)) = parsed.kind() else {
            unreachable!("{set} is a class of characters")
        };
        for range in class.ranges() {
            for entry in &mut classes[range.start() as usize..=range.end() as usize] {
                *entry |= bit;
            }
        }
    }
    classes
});

/// Valid UTF-8 with the classes of its characters.
#[derive(Clone, Copy)]
pub(super) struct Text<'a> {
    pub(super) bytes: &'a [u8],
    classes: &'static [u8],
}

/// A character's class bits and its length in bytes.
#[derive(Clone, Copy)]
pub(super) struct Char {
    pub(super) class: u8,
    pub(super) len: usize,
}

impl Char {
    pub(super) fn is(self, mask: u8) -> bool {
        self.class & mask != 0
    }
}

impl<'a> Text<'a> {
    pub(super) fn new(text: &'a str) -> Text<'a> {
        Text {
            bytes: text.as_bytes(),
            classes: &CLASSES,
        }
    }

    /// Returns the part between two char boundaries, for which the rest does not exist.
    pub(super) fn slice(self, start: usize, end: usize) -> Text<'a> {
        Text {
            bytes: &self.bytes[start..end],
            ..self
        }
    }

    pub(super) fn len(self) -> usize {
        self.bytes.len()
    }

    pub(super) fn byte(self, position: usize) -> Option<u8> {
        self.bytes.get(position).copied()
    }

    /// Returns the character at a char boundary, or `None` at the end.
    #[inline(always)]
    pub(super) fn char(self, position: usize) -> Option<Char> {
        let first = *self.bytes.get(position)?;
        if first < 0x80 {
            let class = self.classes[first as usize];
            return Some(Char { class, len: 1 });
        }
        Some(self.wide_char(position, first))
    }

    fn wide_char(self, position: usize, first: u8) -> Char {
        let low = |offset: usize| u32::from(self.bytes[position + offset] & 0x3f);
        let first = u32::from(first);
        let code_and_len = match first {
            0..0xe0 => ((first & 0x1f) << 6 | low(1), 2),
            0xe0..0xf0 => ((first & 0x0f) << 12 | low(1) << 6 | low(2), 3),
            _ => (
                (first & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3),
                4,
            ),
        };
        Char {
            class: self.classes[code_and_len.0 as usize],
            len: code_and_len.1,
        }
    }

    /// Returns the end of the longest run of characters with a class in `mask`.
    #[inline(always)]
    pub(super) fn run(self, mut position: usize, mask: u8) -> usize {
        while let Some(char) = self.char(position)
            && char.is(mask)
        {
            position += char.len;
        }
        position
    }

    /// Returns the end of the longest run of characters without a class in `mask`.
    #[inline(always)]
    pub(super) fn run_without(self, mut position: usize, mask: u8) -> usize {
        while let Some(char) = self.char(position)
            && !char.is(mask)
        {
            position += char.len;
        }
        position
    }

    /// Returns the end of at most `max` characters with a class in `mask`.
    #[inline(always)]
    pub(super) fn run_of(self, mut position: usize, mask: u8, max: usize) -> usize {
        for _ in 0..max {
            match self.char(position) {
                Some(char) if char.is(mask) => position += char.len,
                _ => break,
            }
        }
        position
    }
}
