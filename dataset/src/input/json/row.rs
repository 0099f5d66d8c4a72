//! A parser for a row of JSON that finds the text and checks the syntax of the rest.
//!
//! It accepts more than JSON does: NaN and Infinity, as Python writes them, halves of surrogate
//! pairs, and strings that are not UTF-8.

use crate::{
    Error,
    char_boundary::floor_char_boundary,
    input::{
        document::{Documents, Fault, Odd},
        fields::{Row, Value},
        options::TextKey,
    },
};
use memchr::{memchr, memchr2};
use std::borrow::Cow;

/// Most fields that a message names.
const MAX_NAMES: usize = 20;

/// Most bytes of a field's name in a message.
const MAX_NAME: usize = 40;

/// Parses a row. Of a key that occurs again, the last value counts.
pub(super) fn parse<'r>(row: &'r [u8], key: &TextKey) -> Result<Row<'r>, Fault> {
    let wanted: Vec<_> = key.paths().iter().map(|path| Some(path.as_str())).collect();
    let mut parser = Parser {
        bytes: row,
        at: 0,
        non_finite: false,
    };
    let mut values = vec![Value::Missing; wanted.len()];
    parser.skip_space();
    let first = parser.peek();
    if first == Some(b'{') {
        parser.object(&wanted, &mut values)?;
    } else {
        parser.skip_value()?;
    }
    parser.skip_space();
    if parser.at < row.len() {
        return Err(parser.fault("there is more after the value"));
    }
    if first != Some(b'{') {
        return Err(Fault::NotObject);
    }
    if values.iter().all(|&value| value == Value::Missing) {
        return Err(Fault::NoKey {
            key: key.to_string(),
            fields: fields(row),
        });
    }
    Ok(Row {
        values,
        non_finite: parser.non_finite,
    })
}

/// Names the fields of an object that was parsed, and those of the objects in it.
fn fields(row: &[u8]) -> String {
    let mut parser = Parser {
        bytes: row,
        at: 0,
        non_finite: false,
    };
    let mut names = Vec::new();
    parser.skip_space();
    // The row has been parsed, so nothing can fail.
    let more = parser.names("", &mut names).unwrap_or_default();
    match (names.is_empty(), more) {
        (true, _) => "the row has no field".into(),
        (false, 0) => format!("the row has {}", names.join(", ")),
        (false, more) => format!("the row has {} and {more} more", names.join(", ")),
    }
}

/// Appends a string with its escapes to the current document.
pub(super) fn push_string(documents: &mut Documents, raw: &[u8]) -> Result<(), Error> {
    let mut rest = raw;
    while let Some(at) = memchr(b'\\', rest) {
        documents.bytes(&rest[..at])?;
        let escape = Escape::read(&rest[at..]);
        match escape.code {
            Ok(c) => documents.text(c.encode_utf8(&mut [0; 4]))?,
            Err(LoneSurrogate) => documents.replace(Odd::LoneSurrogate)?,
        }
        rest = &rest[at + escape.len..];
    }
    documents.bytes(rest)
}

struct LoneSurrogate;

/// An escape in a string that was checked.
struct Escape {
    code: Result<char, LoneSurrogate>,
    len: usize,
}

impl Escape {
    fn read(bytes: &[u8]) -> Self {
        let code = match bytes[1] {
            b'b' => '\u{8}',
            b'f' => '\u{C}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => return Self::read_unicode(bytes),
            other => char::from(other),
        };
        Self {
            code: Ok(code),
            len: 2,
        }
    }

    fn read_unicode(bytes: &[u8]) -> Self {
        let unit = |bytes: &[u8]| {
            let digits = bytes.strip_prefix(b"\\u")?.get(..4)?;
            u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
        };
        let units = [unit(bytes), bytes.get(6..).and_then(unit)];
        let mut decoded = char::decode_utf16(units.into_iter().flatten());
        match decoded.next() {
            Some(Ok(c)) => Self {
                code: Ok(c),
                len: 6 * c.len_utf16(),
            },
            _ => Self {
                code: Err(LoneSurrogate),
                len: 6,
            },
        }
    }
}

struct Parser<'r> {
    bytes: &'r [u8],
    at: usize,
    non_finite: bool,
}

impl<'r> Parser<'r> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn fault(&self, cause: &str) -> Fault {
        Fault::NotJson(format!("{cause} at byte {}", self.at + 1))
    }

    fn skip_space(&mut self) {
        while let Some(b' ' | b'\t' | b'\r' | b'\n') = self.peek() {
            self.at += 1;
        }
    }

    /// Takes this byte, with white space around it, if it comes next.
    fn take(&mut self, byte: u8) -> bool {
        self.skip_space();
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        self.skip_space();
        found
    }

    fn expect(&mut self, byte: u8, cause: &str) -> Result<(), Fault> {
        if self.take(byte) {
            Ok(())
        } else {
            Err(self.fault(cause))
        }
    }

    /// Takes an object. `wanted` holds the rest of each path, if the object is on its way.
    fn object(&mut self, wanted: &[Option<&str>], values: &mut [Value<'r>]) -> Result<(), Fault> {
        self.take(b'{');
        if self.take(b'}') {
            return Ok(());
        }
        loop {
            let name = unescape(self.string()?);
            self.expect(b':', "a colon is missing")?;
            self.member(&name, wanted, values)?;
            if self.take(b'}') {
                return Ok(());
            }
            self.expect(b',', "a comma or brace is missing")?;
        }
    }

    /// Takes an object and adds the names of its fields, each after `prefix`, while there is room.
    /// Instead of the field of an object that is in it, the object's own fields are added. Returns
    /// the number of fields without room.
    fn names(&mut self, prefix: &str, names: &mut Vec<String>) -> Result<u64, Fault> {
        let mut more = 0;
        self.take(b'{');
        if self.take(b'}') {
            return Ok(0);
        }
        loop {
            let name = unescape(self.string()?);
            let shown = format!("{prefix}{}", &name[..floor_char_boundary(&name, MAX_NAME)]);
            self.expect(b':', "a colon is missing")?;
            if prefix.is_empty() && self.peek() == Some(b'{') {
                more += self.names(&format!("{shown}."), names)?;
            } else {
                self.skip_value()?;
                if names.len() < MAX_NAMES {
                    names.push(shown);
                } else {
                    more += 1;
                }
            }
            if self.take(b'}') {
                return Ok(more);
            }
            self.expect(b',', "a comma or brace is missing")?;
        }
    }

    /// Takes the value of a member of an object.
    fn member(
        &mut self,
        name: &str,
        wanted: &[Option<&str>],
        values: &mut [Value<'r>],
    ) -> Result<(), Fault> {
        if !wanted.iter().flatten().any(|path| path.starts_with(name)) {
            return self.skip_value().map(drop);
        }
        let rests = wanted
            .iter()
            .map(|path| path.and_then(|path| path.strip_prefix(name)));
        let rests: Vec<_> = rests.collect();
        let inner: Vec<_> = rests
            .iter()
            .map(|rest| rest.and_then(|rest| rest.strip_prefix('.')))
            .collect();
        let is_on_the_way = inner.iter().any(Option::is_some);
        let value = if is_on_the_way && self.peek() == Some(b'{') {
            self.object(&inner, values)?;
            Value::Other("an object")
        } else {
            self.skip_value()?
        };
        for (index, found) in values.iter_mut().enumerate() {
            // The fields of an object that is null are null.
            let is_null = value == Value::Null && inner[index].is_some();
            if rests[index] == Some("") || is_null {
                *found = value;
            }
        }
        Ok(())
    }

    /// Takes a string. Returns the bytes between the quotes.
    fn string(&mut self) -> Result<&'r [u8], Fault> {
        if self.peek() != Some(b'"') {
            return Err(self.fault("a string is missing"));
        }
        self.at += 1;
        let start = self.at;
        loop {
            let rest = &self.bytes[self.at..];
            let Some(len) = memchr2(b'"', b'\\', rest) else {
                self.at = self.bytes.len();
                return Err(self.fault("a string does not end"));
            };
            if let Some(control) = find_control(&rest[..len]) {
                self.at += control;
                return Err(self.fault("a control character is not escaped"));
            }
            self.at += len;
            if rest[len] == b'"' {
                self.at += 1;
                return Ok(&self.bytes[start..self.at - 1]);
            }
            self.at += match &rest[len + 1..] {
                [b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', ..] => 2,
                [b'u', digits @ ..]
                    if digits.len() >= 4 && digits[..4].iter().all(u8::is_ascii_hexdigit) =>
                {
                    6
                }
                _ => return Err(self.fault("an escape is invalid")),
            };
        }
    }

    /// Takes any value, without recursion: rows may be nested as deeply as they like.
    fn skip_value(&mut self) -> Result<Value<'r>, Fault> {
        let outermost = match self.peek() {
            Some(b'{') => Value::Other("an object"),
            Some(b'[') => Value::Other("an array"),
            _ => return self.scalar(),
        };
        let mut open = Vec::new();
        loop {
            match self.peek() {
                Some(b'{') => {
                    self.take(b'{');
                    if !self.take(b'}') {
                        open.push(b'}');
                        self.name()?;
                        continue;
                    }
                }
                Some(b'[') => {
                    self.take(b'[');
                    if !self.take(b']') {
                        open.push(b']');
                        continue;
                    }
                }
                _ => {
                    self.scalar()?;
                }
            }
            loop {
                let Some(&end) = open.last() else {
                    return Ok(outermost);
                };
                if !self.take(end) {
                    break;
                }
                open.pop();
            }
            self.expect(b',', "a comma or bracket is missing")?;
            if open.last() == Some(&b'}') {
                self.name()?;
            }
        }
    }

    /// Takes the name of a member and the colon.
    fn name(&mut self) -> Result<(), Fault> {
        self.string()?;
        self.expect(b':', "a colon is missing")
    }

    /// Takes a value that is neither an object nor an array.
    fn scalar(&mut self) -> Result<Value<'r>, Fault> {
        if self.peek() == Some(b'"') {
            return Ok(Value::Text(self.string()?));
        }
        let rest = &self.bytes[self.at..];
        let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-.".contains(byte);
        let len = rest.iter().take_while(|byte| is_part(byte)).count();
        let value = match &rest[..len] {
            b"null" => Value::Null,
            b"true" | b"false" => Value::Other("true or false"),
            b"NaN" | b"Infinity" | b"-Infinity" => {
                self.non_finite = true;
                Value::Other("a number")
            }
            number if is_number(number) => Value::Other("a number"),
            _ => return Err(self.fault("a value is missing or invalid")),
        };
        self.at += len;
        Ok(value)
    }
}

/// Returns the place of a control character, which strings must escape.
fn find_control(text: &[u8]) -> Option<usize> {
    // Without an early exit, the compiler compares many bytes at once.
    let any = text.iter().fold(false, |any, &byte| any | (byte < 0x20));
    any.then(|| text.iter().position(|&byte| byte < 0x20))?
}

/// Returns the name of a member.
fn unescape(raw: &[u8]) -> Cow<'_, str> {
    let Some(first) = memchr(b'\\', raw) else {
        return String::from_utf8_lossy(raw);
    };
    let mut text = String::from_utf8_lossy(&raw[..first]).into_owned();
    let mut rest = &raw[first..];
    while !rest.is_empty() {
        let escape = Escape::read(rest);
        text.push(escape.code.unwrap_or('\u{FFFD}'));
        rest = &rest[escape.len..];
        let plain = memchr(b'\\', rest).unwrap_or(rest.len());
        text += &String::from_utf8_lossy(&rest[..plain]);
        rest = &rest[plain..];
    }
    text.into()
}

/// True if this is a number of JSON.
fn is_number(text: &[u8]) -> bool {
    let text = text.strip_prefix(b"-").unwrap_or(text);
    let digits = |text: &[u8]| text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let whole = digits(text);
    if whole == 0 || (whole > 1 && text[0] == b'0') {
        return false;
    }
    let mut rest = &text[whole..];
    if let Some(fraction) = rest.strip_prefix(b".") {
        let len = digits(fraction);
        if len == 0 {
            return false;
        }
        rest = &fraction[len..];
    }
    let [b'e' | b'E', exponent @ ..] = rest else {
        return rest.is_empty();
    };
    let exponent = match exponent {
        [b'+' | b'-', digits @ ..] => digits,
        digits => digits,
    };
    !exponent.is_empty() && digits(exponent) == exponent.len()
}
