//! Documents do not depend on the sizes of blocks and pieces, and equal a simple reference.

use crate::{
    Error,
    char_boundary::floor_char_boundary,
    input::{
        InputCounts, Piece, Split,
        document::{Documents, Place},
        json, text,
    },
};
use proptest::prelude::*;
use std::io::{BufRead, BufReader};

/// Reads bytes in blocks and passes documents on in pieces of these sizes.
fn read(
    bytes: &[u8],
    block: usize,
    max_piece: usize,
    parse: impl FnOnce(&mut dyn BufRead, &mut Documents) -> Result<(), Error>,
) -> (Vec<String>, InputCounts) {
    let mut counts = InputCounts::default();
    let mut texts = vec![String::new()];
    let mut take = |piece: Piece| {
        assert!(piece.text.len() <= max_piece);
        *texts.last_mut().unwrap() += piece.text;
        if piece.ends_document {
            texts.push(String::new());
        }
        Ok(())
    };
    let mut documents = Documents::new("x".into(), false, &mut counts, &mut take);
    documents.max_piece = max_piece;
    parse(&mut BufReader::with_capacity(block, bytes), &mut documents).unwrap();
    assert_eq!(texts.pop().as_deref(), Some(""));
    (texts, counts)
}

fn read_text(bytes: &[u8], split: &Split, block: usize, max_piece: usize) -> Vec<String> {
    read(bytes, block, max_piece, |reader, documents| {
        text::read(reader, split, documents)
    })
    .0
}

/// Bytes of which many mean something to a splitter.
fn odd_bytes() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        3 => Just(b"\n".to_vec()),
        2 => Just(b"\r".to_vec()),
        2 => Just(b" ".to_vec()),
        2 => Just(b"ab".to_vec()),
        1 => Just(b"--".to_vec()),
        1 => Just("é€😀".as_bytes().to_vec()),
        1 => Just("\u{FEFF}".as_bytes().to_vec()),
        1 => any::<u8>().prop_map(|byte| vec![byte]),
    ];
    prop::collection::vec(part, 0..40).prop_map(|parts| parts.concat())
}

fn is_blank(line: &str) -> bool {
    line.bytes()
        .all(|byte| matches!(byte, b' ' | b'\t' | b'\r'))
}

/// Documents as the splitters should find them, in text without invalid bytes.
fn reference(text: &str, split: &Split) -> Vec<String> {
    let strip = |text: &str| match text.strip_suffix('\n') {
        Some(text) => text.strip_suffix('\r').unwrap_or(text).to_string(),
        None => text.to_string(),
    };
    let found: Vec<String> = match split {
        Split::File => vec![text.into()],
        Split::Line => text.split_inclusive('\n').map(strip).collect(),
        Split::BlankLine => {
            let mut found = vec![String::new()];
            for line in text.split_inclusive('\n') {
                // The last line is not blank without a line end, but it has no contents either.
                if is_blank(line.strip_suffix('\n').unwrap_or(line)) {
                    found.push(String::new());
                } else {
                    *found.last_mut().unwrap() += line;
                }
            }
            found.iter().map(|text| strip(text)).collect()
        }
        Split::Separator(separator) => {
            let parts: Vec<_> = text.split(separator.as_str()).collect();
            let mut found = Vec::new();
            for (index, part) in parts.into_iter().enumerate() {
                let start = ["\r\n", "\n"]
                    .into_iter()
                    .find(|start| part.starts_with(start));
                let skipped = match start {
                    Some(start) if index > 0 => start.len(),
                    _ => 0,
                };
                found.push(strip(&part[skipped..]));
            }
            found
        }
    };
    let unmarked = found
        .iter()
        .map(|text| text.strip_prefix('\u{FEFF}').unwrap_or(text));
    let kept = unmarked.filter(|text| !text.trim().is_empty());
    kept.map(str::to_string).collect()
}

fn splits() -> [Split; 4] {
    [
        Split::File,
        Split::Line,
        Split::BlankLine,
        Split::Separator("--".into()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn splits_equal_the_reference(bytes in odd_bytes(), block in 1usize..20) {
        let text = String::from_utf8_lossy(&bytes);
        for split in splits() {
            let found = read_text(text.as_bytes(), &split, block, 1 << 20);
            prop_assert_eq!(&found, &reference(&text, &split), "{:?} {:?}", text, split);
            // Invalid bytes are replaced as the standard library does.
            let found = read_text(&bytes, &split, block, 1 << 20);
            prop_assert_eq!(found, reference(&text, &split), "{:?} {:?}", bytes, split);
        }
    }

    #[test]
    fn pieces_make_the_text(text in "x[a-z\n é😀]{0,60}x", max_piece in 8usize..30) {
        let found = read_text(text.as_bytes(), &Split::File, 7, max_piece);
        prop_assert_eq!(found, [text]);
    }

    #[test]
    fn white_space_at_the_start_is_limited_and_alone_is_empty(
        space in "[ \n\t\u{3000}]{0,60}",
        text in "([a-z][a-z \n]{0,40})?",
        block in 1usize..50,
        max_piece in 8usize..20,
    ) {
        let bytes = format!("{space}{text}");
        let (found, counts) = read(bytes.as_bytes(), block, max_piece, |reader, documents| {
            text::read(reader, &Split::File, documents)
        });
        let kept = &space[..floor_char_boundary(&space, max_piece)];
        let is_lost = !text.is_empty() && kept != space;
        let expected = (!text.is_empty()).then(|| format!("{kept}{text}"));
        prop_assert_eq!(found, Vec::from_iter(expected));
        prop_assert_eq!(counts.leading_space, u64::from(is_lost));
        prop_assert_eq!(counts.empty, u64::from(text.is_empty()));
    }

    #[test]
    fn pieces_do_not_depend_on_blocks(
        bytes in odd_bytes(),
        block in 1usize..50,
        max_piece in 8usize..20,
    ) {
        for split in splits() {
            let pieces = |block| {
                let mut pieces = Vec::new();
                let mut counts = InputCounts::default();
                let mut take = |piece: Piece| {
                    pieces.push((piece.text.to_string(), piece.ends_document));
                    Ok(())
                };
                let mut documents = Documents::new("x".into(), false, &mut counts, &mut take);
                documents.max_piece = max_piece;
                let mut reader = BufReader::with_capacity(block, &bytes[..]);
                text::read(&mut reader, &split, &mut documents).unwrap();
                (pieces, counts)
            };
            prop_assert_eq!(pieces(block), pieces(1 << 16));
        }
    }

    #[test]
    fn json_equals_what_was_written(
        texts in prop::collection::vec(".{0,12}x", 1..8),
        block in 17usize..60,
        max_piece in 8usize..30,
    ) {
        let rows = texts.iter().map(|text| {
            serde_json::json!({"id": [1, {"a": "]}"}], "doc": {"text": text}}).to_string()
        });
        let rows: Vec<_> = rows.collect();
        let key = "doc.text".parse().unwrap();
        for file in [rows.join("\n"), format!("[{}]", rows.join(" , "))] {
            let parse = |reader: &mut dyn BufRead, documents: &mut Documents| {
                json::read(reader, &key, documents)
            };
            let found = read(file.as_bytes(), block, max_piece, parse).0;
            let unmarked = texts.iter().map(|text| text.strip_prefix('\u{FEFF}').unwrap_or(text));
            prop_assert_eq!(found, unmarked.collect::<Vec<_>>());
        }
    }

    #[test]
    fn any_bytes_are_rows_or_faults(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let key = "a".parse().unwrap();
        let mut counts = InputCounts::default();
        let mut take = |_: Piece| Ok(());
        let mut documents = Documents::new("x".into(), false, &mut counts, &mut take);
        let _ = json::read(&mut &bytes[..], &key, &mut documents);
        let valid = serde_json::from_slice::<serde_json::Value>(&bytes).is_ok();
        prop_assert!(!valid || bytes.contains(&b'\n') || counts.not_json == 0);
    }
}

#[test]
fn long_rows_are_left_out() {
    let long = format!("{{\"text\":\"{}\"}}", "x".repeat(100));
    let short = "{\"text\":\"y\"}";
    let files = [
        format!("{short}\n{long}\n{short}"),
        format!("[{short},{long},{short}]"),
    ];
    for file in files {
        for block in [1, 7, 1000] {
            let parse = |reader: &mut dyn BufRead, documents: &mut Documents| {
                json::read_limited(reader, &"text".parse().unwrap(), documents, 50)
            };
            let (texts, counts) = read(file.as_bytes(), block, 100, parse);
            assert_eq!((texts, counts.too_long), (vec!["y".into(), "y".into()], 1));
        }
    }
}

#[test]
fn places_in_long_documents_are_lines_of_the_file() {
    let mut counts = InputCounts::default();
    let mut take = |_: Piece| Ok(());
    let mut documents = Documents::new("x".into(), true, &mut counts, &mut take);
    documents.max_piece = 8;
    documents.begin(Place::Text(10));
    documents.bytes(b"1\n2\n3\n4\n5\n6\n").unwrap();
    let error = documents.bytes(b"7\n\0").unwrap_err().to_string();
    assert!(error.starts_with("x:17: a NUL"), "{error}");
}
