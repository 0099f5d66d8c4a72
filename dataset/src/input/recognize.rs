//! Formats of files, by suffix and by contents.

use super::document::is_mostly_invalid;
use memchr::memchr_iter;

/// A format that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Text,
    /// JSON Lines or one JSON array.
    Json,
    Parquet,
}

/// Extensions of text, of markup and of source code.
const TEXT: &str = "\
    txt text md markdown mdx rst adoc org tex bib asm awk bash bat c cc cfg clj cljs cmake \
    cmd coffee cpp cr cs css cu cuh cxx d dart diff el elm erl ex exs f f03 f90 f95 for fs \
    fsi fsx glsl go gradle groovy h hh hlsl hpp hrl hs htm html hxx ini java jl js jsx kt \
    kts lean less lisp lua m4 mk ml mli mm nim nix pas patch php pl pm proto ps1 py pyi pyx \
    r rb rkt rs sass scala scm scss sh sol sql srt sv svelte swift tcl tf thy toml ts tsx v \
    vb vhd vhdl vim vue wat xhtml xml yaml yml zig zsh";

/// Returns the format that an extension in lower case stands for.
pub(super) fn format_of_extension(extension: &str) -> Option<Format> {
    match extension {
        "jsonl" | "ndjson" | "json" => Some(Format::Json),
        "parquet" | "pq" => Some(Format::Parquet),
        _ => TEXT
            .split_ascii_whitespace()
            .any(|text| text == extension)
            .then_some(Format::Text),
    }
}

/// A kind of file that is not read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unsupported {
    /// The kind, with its article.
    pub(super) name: &'static str,
    /// The way to make a file that is read.
    pub(super) hint: &'static str,
}

const UNPACK: &str = "unpack it first";
const TABLE: &str = "convert it to Parquet first";
const NO_TEXT: &str = "it holds no text";
const EXTRACT: &str = "extract its text first";

/// The first bytes of files that are not read.
const SIGNATURES: &[(&[u8], &str, &str)] = &[
    (
        b"PK\x03\x04",
        "a zip archive (or an office document)",
        UNPACK,
    ),
    (b"7z\xBC\xAF\x27\x1C", "a 7z archive", UNPACK),
    (b"Rar!\x1A\x07", "a RAR archive", UNPACK),
    (b"\x04\x22\x4D\x18", "an lz4 file", UNPACK),
    (b"\x5D\x00\x00", "an lzma file", UNPACK),
    (b"\xFF\x06\x00\x00sNaPpY", "a Snappy file", UNPACK),
    (b"LZIP", "an lzip file", UNPACK),
    (b"PARE", "an encrypted Parquet file", "decrypt it first"),
    (b"ORC", "an ORC file", TABLE),
    (b"Obj\x01", "an Avro file", TABLE),
    (b"SQLite format 3\0", "an SQLite database", TABLE),
    (b"\x89HDF\r\n\x1A\n", "an HDF5 file", TABLE),
    (b"\x93NUMPY", "a NumPy array", NO_TEXT),
    (
        b"MMIDIDX\0",
        "the index of token files",
        "it is prepared already",
    ),
    (b"GGUF", "a GGUF model", NO_TEXT),
    (b"%PDF-", "a PDF file", EXTRACT),
    (b"{\\rtf", "an RTF document", EXTRACT),
    (b"\xD0\xCF\x11\xE0", "an office document", EXTRACT),
    (b"\x89PNG", "an image", NO_TEXT),
    (b"\xFF\xD8\xFF", "an image", NO_TEXT),
    (b"GIF8", "an image", NO_TEXT),
    (b"\x7FELF", "a program", NO_TEXT),
    (b"\0\x05\x16\x07", "an AppleDouble file of macOS", NO_TEXT),
];

/// Returns the kind of a file that is not read, by its first bytes.
pub(super) fn find_unsupported(start: &[u8]) -> Option<Unsupported> {
    if start.get(257..262) == Some(b"ustar") {
        return Some(Unsupported {
            name: "a tar archive",
            hint: UNPACK,
        });
    }
    // Text may begin with these words, so the bytes that follow have to be binary.
    let is_binary = || start.iter().take(512).any(|byte| !(8..0x80).contains(byte));
    let matches = |magic: &[u8]| start.starts_with(magic) && (magic.len() > 4 || is_binary());
    SIGNATURES
        .iter()
        .find(|(magic, _, _)| matches(magic))
        .map(|&(_, name, hint)| Unsupported { name, hint })
}

/// A form of Arrow data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrow {
    Stream,
    File,
}

/// Returns Arrow's form of a file that starts with these bytes.
pub(super) fn find_arrow(start: &[u8]) -> Option<Arrow> {
    match start {
        [b'A', b'R', b'R', b'O', b'W', b'1', 0, 0, ..] => Some(Arrow::File),
        // Continuation marker and the length of the schema.
        [0xFF, 0xFF, 0xFF, 0xFF, _, _, 0, 0, ..] => Some(Arrow::Stream),
        _ => None,
    }
}

/// True if a text starts as rows of JSON or as an array of them do.
pub(super) fn looks_like_json(start: &[u8]) -> bool {
    let after = |text: &'_ [u8], sign| {
        let text = text.trim_ascii_start();
        (text.first() == Some(&sign)).then(|| text.len() - 1)
    };
    let tail = |len: usize| &start[start.len() - len..];
    let object = match after(start, b'[') {
        Some(len) => tail(len),
        None => start,
    };
    after(object, b'{').is_some_and(|len| after(tail(len), b'"').is_some())
}

/// Returns the reason for which the start of a file is not text, or not JSON.
pub(super) fn find_binary(start: &[u8], format: Format) -> Option<&'static str> {
    let nul = memchr_iter(0, start).count();
    let is_control = |byte: u8| byte < 0x20 && !(8..=13).contains(&byte) && byte != 0x1B;
    let control = start.iter().filter(|&&byte| is_control(byte)).count();
    if nul * 10 > start.len() {
        return Some("it is binary, or text in UTF-16 without a byte order mark");
    }
    if control * 10 > start.len() {
        return Some("it is binary");
    }
    // Rows of JSON are judged one by one. The block may end inside of a character, which is too
    // little to matter.
    (format == Format::Text && is_mostly_invalid(start)).then_some(
        "it is not text in UTF-8 (convert it, for example with iconv -f CP1252 -t UTF-8)",
    )
}
