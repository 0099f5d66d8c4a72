//! Parquet files that pyarrow wrote, by `scripts/golden/parquet.py`.

use super::{assert_refused, golden, read, read_one, with_key};
use crate::input::InputOptions;
use parquet::{
    data_type::{ByteArray, ByteArrayType},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};
use std::sync::Arc;

const TEXTS: [&str; 4] = ["one", "zwei: größer", "three\nlines\n", "one"];

#[test]
fn types_codecs_and_row_groups_give_the_same_texts() {
    let names = [
        "large-string",
        "binary",
        "dictionary",
        "row-groups",
        "delta",
        "none",
        "snappy",
        "gzip",
        "zstd",
        "lz4",
        "brotli",
    ];
    for name in names {
        let path = golden(&format!("{name}.parquet"));
        let read = read(&[path], &InputOptions::default()).unwrap();
        assert_eq!(read.texts, TEXTS, "{name}");
        let counts = read.counts;
        assert_eq!(
            [counts.rows, counts.nulls, counts.empty],
            [6, 1, 1],
            "{name}"
        );
    }
    let required = read(&[golden("required.parquet")], &InputOptions::default()).unwrap();
    assert_eq!(required.texts, ["a", "b"]);
}

#[test]
fn nested_columns_have_paths() {
    let path = [golden("nested.parquet")];
    let nested = read(&path, &with_key("doc.text")).unwrap();
    assert_eq!(nested.texts, TEXTS[..3]);
    // A null text, and one in an object that is null.
    assert_eq!([nested.counts.nulls, nested.counts.empty], [2, 1]);
    let parts = ["no column \"doc\"", "doc.text, doc.n, id"];
    assert_refused(read(&path, &with_key("doc")), &parts);
    assert_refused(read(&path, &with_key("doc.n")), &["holds INT64, not text"]);
    let lists = [golden("lists.parquet")];
    let column = "texts.list.element";
    assert_refused(read(&lists, &with_key(column)), &["holds lists, not text"]);
    assert_refused(
        read(&lists, &InputOptions::default()),
        &["texts.list.element, id"],
    );
}

#[test]
fn nulls_are_errors_in_strict_mode() {
    let strict = InputOptions {
        strict: true,
        ..InputOptions::default()
    };
    let path = [golden("snappy.parquet")];
    assert_refused(
        read(&path, &strict),
        &["snappy.parquet: row 2: the text is null"],
    );
}

#[test]
fn damaged_files_are_refused() {
    let bytes = std::fs::read(golden("snappy.parquet")).unwrap();
    let options = InputOptions::default();
    for cut in [4, 20, bytes.len() / 2, bytes.len() - 1] {
        assert_refused(
            read_one("a.parquet", &bytes[..cut], &options),
            &["a.parquet"],
        );
    }
    // Any name will do, but not any place: Parquet needs a file.
    assert_eq!(read_one("noname", &bytes, &options).unwrap().texts, TEXTS);
}

fn write(columns: &[(&str, &[&[u8]])], properties: WriterProperties) -> Vec<u8> {
    let fields = columns
        .iter()
        .map(|(name, _)| format!("required binary {name};"));
    let schema = format!("message m {{ {} }}", fields.collect::<String>());
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let mut file = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut file, schema, Arc::new(properties)).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for (_, values) in columns {
        let values: Vec<_> = values
            .iter()
            .map(|&value| ByteArray::from(value.to_vec()))
            .collect();
        let mut column = group.next_column().unwrap().unwrap();
        let typed = column.typed::<ByteArrayType>();
        typed.write_batch(&values, None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    file
}

#[test]
fn the_rules_for_text_are_those_of_json() {
    let cyrillic = [0xEF; 100];
    let texts: [&[u8]; 6] = [
        b"a\xE9",
        b"\xEF\xBB\xBFa\r\n\0",
        b"\xED\xA0\xBD",
        &cyrillic,
        b" ",
        "ü".as_bytes(),
    ];
    let titles: [&[u8]; 6] = [b"1", b"2", b"3", b"4", b"", b"6"];
    let file = write(
        &[("text", &texts), ("title", &titles)],
        WriterProperties::default(),
    );
    let read = read_one("a.parquet", &file, &InputOptions::default()).unwrap();
    let replaced = "\u{FFFD}\u{FFFD}\u{FFFD}";
    assert_eq!(read.texts, ["a\u{FFFD}", "a\r\n\0", replaced, "ü"]);
    let counts = &read.counts;
    assert_eq!(
        [counts.invalid_utf8, counts.byte_order_marks, counts.crlf],
        [2, 1, 1]
    );
    assert_eq!([counts.nul, counts.not_text, counts.empty], [1, 1, 1]);
    let joined = read_one("a.parquet", &file, &with_key("title,text")).unwrap();
    assert_eq!(joined.texts[0], "1\n\na\u{FFFD}");
    // Columns that are not asked for are not read.
    assert_eq!(
        read_one("a.parquet", &file, &with_key("title"))
            .unwrap()
            .texts
            .len(),
        5
    );
}

#[test]
fn pages_that_do_not_fit_in_memory_are_refused() {
    let mut file = write(&[("text", &[b"a"])], {
        let properties = WriterProperties::builder().set_dictionary_enabled(false);
        properties.build()
    });
    // The first page's header: its type, and its sizes of 5 bytes as zigzag numbers.
    assert_eq!(file[4..10], [0x15, 0, 0x15, 10, 0x15, 10]);
    let refused = |header: &[u8], file: &mut Vec<u8>, part: &str| {
        file[4..4 + header.len()].copy_from_slice(header);
        let refused = read_one("a.parquet", file, &InputOptions::default());
        assert_refused(refused, &["a.parquet: row 1", part]);
    };
    let huge = [
        0x15, 0, 0x15, 0xFE, 0xFF, 0xFF, 0xFF, 0x0F, 0x15, 0xFE, 0xFF, 0xFF, 0xFF, 0x0F,
    ];
    refused(
        &huge,
        &mut file,
        "a page of 2047 MiB does not fit in the 1024 MiB",
    );
    // 64 MiB, said to be packed into 5 bytes.
    let packed = [0x15, 0, 0x15, 0x80, 0x80, 0x80, 0x40, 0x15, 10];
    refused(
        &packed,
        &mut file,
        "a page of 64 MiB does not fit in the 32 MiB",
    );
}

#[test]
fn flipped_bits_are_no_panic() {
    for name in ["snappy", "row-groups", "nested", "dictionary"] {
        let path = golden(&format!("{name}.parquet"));
        let bytes = std::fs::read(path).unwrap();
        let key = if name == "nested" { "doc.text" } else { "text" };
        for at in 0..bytes.len() {
            for mask in [1, 0x80, 0xFF] {
                let mut bytes = bytes.clone();
                bytes[at] ^= mask;
                match read_one("a.parquet", &bytes, &with_key(key)) {
                    Ok(read) => assert!(read.counts.rows <= 6, "{name} {at}"),
                    Err(error) => assert!(error.to_string().contains("a.parquet"), "{error}"),
                }
            }
        }
    }
}
