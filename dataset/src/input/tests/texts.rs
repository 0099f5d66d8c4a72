//! Text files: how they are split, and what is not text.

use super::{assert_refused, assert_strict, read_one};
use crate::input::{InputOptions, MAX_PIECE, Split, find};

fn split(split: Split) -> InputOptions {
    InputOptions {
        split,
        ..InputOptions::default()
    }
}

#[track_caller]
fn texts(contents: &str, by: Split) -> Vec<String> {
    read_one("a.txt", contents.as_bytes(), &split(by))
        .unwrap()
        .texts
}

#[test]
fn stories_are_split_by_a_separator() {
    let separator = || Split::Separator("<|endoftext|>".into());
    let stories: Vec<_> = (0..100)
        .map(|n| format!("Once there were {n} ducks."))
        .collect();
    let file = stories.join("\n<|endoftext|>\n") + "\n";
    assert_eq!(texts(&file, separator()), stories);
    let windows = file.replace('\n', "\r\n");
    assert_eq!(texts(&windows, separator()), stories);
    assert_eq!(texts("a<|endoftext|>b", separator()), ["a", "b"]);
    assert_eq!(
        texts("a\n\n<|endoftext|>\n\nb\n\n", separator()),
        ["a\n", "\nb\n"]
    );
    let read = read_one(
        "a.txt",
        b"a<|endoftext|><|endoftext|>b",
        &split(separator()),
    )
    .unwrap();
    assert_eq!(
        (read.texts.len(), read.counts.empty, read.counts.rows),
        (2, 1, 3)
    );
    assert_eq!(texts("a\n<|endoftext|>\n", separator()), ["a"]);
    assert_eq!(
        texts("aaabaaab", Split::Separator("aab".into())),
        ["a", "a"]
    );
    let empty = split(Split::Separator(String::new()));
    assert!(find(&["-".into()], &empty).is_err());
}

#[test]
fn lines_and_blocks_of_lines_are_documents() {
    let file = "one\r\n two \n\n\t\nthree\n\n\n  four\nfive";
    assert_eq!(
        texts(file, Split::Line),
        ["one", " two ", "three", "  four", "five"]
    );
    let read = read_one("a.txt", file.as_bytes(), &split(Split::Line)).unwrap();
    assert_eq!((read.counts.empty, read.counts.crlf), (4, 0));
    assert_eq!(
        texts(file, Split::BlankLine),
        ["one\r\n two ", "three", "  four\nfive"]
    );
    assert_eq!(texts(file, Split::File), [file]);
    assert_eq!(texts("a\rb\r", Split::Line), ["a\rb\r"]);
    assert_eq!(texts("\n \n", Split::BlankLine), [""; 0]);
    // White space that is too long to hold back is contents.
    let long = " ".repeat(100_000);
    assert_eq!(
        texts(&format!("a\n{long}\nb"), Split::BlankLine),
        [format!("a\n{long}\nb")]
    );
}

#[test]
fn a_long_document_comes_in_pieces() {
    let line = "x".repeat(99) + "\n";
    let text = line.repeat(3 * MAX_PIECE / 100);
    let files = super::Files::new(&[("a.txt", text.as_bytes())]);
    let found = find(&[files.path("a.txt")], &InputOptions::default()).unwrap();
    let mut pieces = Vec::new();
    let mut counts = found.counts;
    found.files[0]
        .read(&InputOptions::default(), &mut counts, &mut |piece| {
            pieces.push((piece.text.to_string(), piece.ends_document));
            Ok(())
        })
        .unwrap();
    assert_eq!(pieces.len(), 4);
    assert!(
        pieces
            .iter()
            .all(|(text, _)| text.len() <= MAX_PIECE && text.ends_with('\n'))
    );
    let ends: Vec<_> = pieces.iter().map(|&(_, ends)| ends).collect();
    assert_eq!(ends, [false, false, false, true]);
    let joined: String = pieces.into_iter().map(|(text, _)| text).collect();
    assert_eq!(joined, text);
}

#[test]
fn white_space_alone_is_empty_whatever_its_size() {
    let space = " ".repeat(5 << 20);
    let row = |text: &str| format!("{{\"text\":\"{text}\"}}\n");
    for (name, blank, written) in [
        ("a.txt", space.clone(), format!("{space}x")),
        ("a.jsonl", row(&space), row(&format!("{space}x"))),
    ] {
        let options = InputOptions {
            strict: true,
            ..InputOptions::default()
        };
        let read = read_one(name, blank.as_bytes(), &options).unwrap();
        assert_eq!((read.texts.len(), read.counts.empty), (0, 1), "{name}");
        let read = read_one(name, written.as_bytes(), &InputOptions::default()).unwrap();
        assert_eq!(read.texts, [format!("{}x", &space[..MAX_PIECE])], "{name}");
        assert_eq!((read.counts.empty, read.counts.leading_space), (0, 1));
        let parts = [":1: more than 2 MiB of white space before the text"];
        assert_refused(read_one(name, written.as_bytes(), &options), &parts);
    }
    // As much as fits in a piece stays.
    let whole = format!("{}x", &space[..MAX_PIECE]);
    let read = read_one("a.txt", whole.as_bytes(), &InputOptions::default()).unwrap();
    assert_eq!((read.texts, read.counts.leading_space), (vec![whole], 0));
    let lines = format!("{}x", "\n".repeat(5 << 20));
    let place = format!("a.txt:{}: more than 2 MiB", (5 << 20) + 1);
    assert_strict(
        "a.txt",
        lines.as_bytes(),
        &InputOptions::default(),
        &[&place],
    );
}

#[test]
fn other_encodings_are_decoded_by_their_mark() {
    let text = "grüße \u{1F600}\nzwei";
    let utf16 = |bytes: fn(u16) -> [u8; 2]| {
        let units = "\u{FEFF}".encode_utf16().chain(text.encode_utf16());
        units.flat_map(bytes).collect::<Vec<_>>()
    };
    let utf32 = |bytes: fn(u32) -> [u8; 4]| {
        let units = "\u{FEFF}".chars().chain(text.chars());
        units.flat_map(|c| bytes(c.into())).collect::<Vec<_>>()
    };
    let encoded = [
        utf16(u16::to_le_bytes),
        utf16(u16::to_be_bytes),
        utf32(u32::to_le_bytes),
        utf32(u32::to_be_bytes),
    ];
    let options = InputOptions::default();
    for file in encoded {
        let read = read_one("a.txt", &file, &options).unwrap();
        assert_eq!((read.texts, read.counts.transcoded), (vec![text.into()], 1));
        assert_strict(
            "a.txt",
            &file,
            &options,
            &["a.txt: text in UTF-16 or UTF-32"],
        );
        // Without its mark, it is not taken for text.
        let start = if file.len() > 50 { 4 } else { 2 };
        assert_refused(
            read_one("a.txt", &file[start..], &options),
            &["a.txt: it is binary"],
        );
    }
    let half: Vec<u8> = [0xFEFFu16, 0x41, 0xD83D, 0x42, 0xD83D]
        .into_iter()
        .flat_map(u16::to_le_bytes)
        .chain([7])
        .collect();
    let read = read_one("a.txt", &half, &options).unwrap();
    assert_eq!(read.texts, ["A\u{FFFD}B\u{FFFD}"]);
    assert_eq!(read.counts.invalid_utf8, 1);
    let rows: Vec<u8> = "\u{FEFF}{\"text\":\"é\"}\r\n{\"text\":\"b\"}"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    assert_eq!(
        read_one("a.jsonl", &rows, &options).unwrap().texts,
        ["é", "b"]
    );
}

#[test]
fn odd_bytes_are_counted_and_named() {
    let options = InputOptions::default();
    let text = b"\xEF\xBB\xBFa\r\nb \xFF c\0d eleven chars";
    let read = read_one("a.md", text, &options).unwrap();
    assert_eq!(read.texts, ["a\r\nb \u{FFFD} c\0d eleven chars"]);
    let counts = &read.counts;
    assert_eq!(
        [
            counts.byte_order_marks,
            counts.crlf,
            counts.invalid_utf8,
            counts.nul
        ],
        [1; 4]
    );
    assert_strict("a.md", text, &options, &["a.md: a byte order mark"]);
    assert_strict(
        "a.md",
        b"a\nb\r\n",
        &options,
        &["a.md:2: a line end of CR LF"],
    );
    assert_strict(
        "a.md",
        b"a\n\nb\xE9 eleven chars",
        &options,
        &["a.md:3: bytes that"],
    );
    assert_strict("a.md", b"a\nb eleven\0 chars", &options, &["a.md:2: a NUL"]);
    let lines = split(Split::Line);
    assert_strict(
        "a.txt",
        b"a\nb\nc eleven\0chars\n",
        &lines,
        &["a.txt:3: a NUL"],
    );
    let empty = read_one("a.txt", b" \n\t\n", &options).unwrap();
    assert_eq!((empty.counts.empty, empty.counts.documents), (1, 0));
    assert_eq!(read_one("a.txt", b"", &options).unwrap().counts.empty, 1);
}

#[test]
fn what_is_not_text_is_refused() {
    let options = InputOptions::default();
    let refused = |name: &str, contents: &[u8], part: &str| {
        assert_refused(read_one(name, contents, &options), &[name, part]);
    };
    refused(
        "a.bin",
        b"some text",
        "its kind is unknown: the suffix is \"bin\"",
    );
    refused("noname", b"some text", "its kind is unknown");
    refused("a.csv", b"id,text\n1,one\n", "its kind is unknown");
    refused("a.txt", b"PK\x03\x04\x14\0\0\0", "a zip archive");
    refused("a.txt", b"%PDF-1.7\n%\xE2", "a PDF file");
    refused("a.txt", b"\x93NUMPY\x01\0v\0{'descr'", "a NumPy array");
    refused("a.npy", b"\x93NUMPY\x01\0v\0{'descr'", "a NumPy array");
    refused("a.txt", &[0, 1, 2, 3].repeat(50), "it is binary");
    refused("a.txt", &b"\xEF\xF0\xE8\xE2\xE5\xF2 ".repeat(20), "iconv");
    refused("a.parquet", b"{\"text\":\"a\"}", "it is not a Parquet file");
    refused("a.jsonl", b"ARROW1\0\0\xFF\xFF\xFF\xFF", "pyarrow.feather");
    refused(
        "a.arrow",
        b"\xFF\xFF\xFF\xFF\x10\x01\0\0\x10",
        "datasets.Dataset.from_file",
    );
    // Text may begin as such files do.
    for text in [
        "GGUF is a format",
        "ORCs",
        "LZIP",
        "BZh9 is a header",
        "GIF87",
    ] {
        assert_eq!(
            read_one("a.txt", text.as_bytes(), &options).unwrap().texts,
            [text]
        );
    }
    let listed = InputOptions {
        extensions: Some(vec![".LOG".into()]),
        ..options
    };
    assert_eq!(
        read_one("a.log", b"some text", &listed).unwrap().texts,
        ["some text"]
    );
}
