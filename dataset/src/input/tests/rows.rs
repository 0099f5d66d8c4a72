//! JSON: what is text, what is left out, and what is refused.

use super::{Files, assert_refused, assert_strict, read_one, with_key};
use crate::input::{InputCounts, InputOptions};

#[track_caller]
fn assert_read(contents: &[u8], texts: &[&str], counts: &InputCounts) {
    assert_read_with(&InputOptions::default(), contents, texts, counts);
}

#[track_caller]
fn assert_read_with(options: &InputOptions, contents: &[u8], texts: &[&str], counts: &InputCounts) {
    let read = read_one("docs.jsonl", contents, options).unwrap();
    assert_eq!(read.texts, texts);
    let bytes = texts.iter().map(|text| text.len() as u64).sum();
    let expected = InputCounts {
        files: 1,
        documents: texts.len() as u64,
        bytes,
        examples: Vec::new(),
        ..counts.clone()
    };
    let found = InputCounts {
        examples: Vec::new(),
        ..read.counts
    };
    assert_eq!(found, expected);
}

/// Counts of a file with this many rows.
fn rows(rows: u64) -> InputCounts {
    InputCounts {
        rows,
        ..InputCounts::default()
    }
}

#[test]
fn nan_and_infinity_in_other_fields_are_accepted() {
    let counts = InputCounts {
        non_finite: 1,
        ..rows(2)
    };
    let nan = b"{\"text\":\"scored\",\"score\":NaN}\n{\"text\":\"two\"}\n";
    assert_read(nan, &["scored", "two"], &counts);
    let options = InputOptions::default();
    assert_strict("a.jsonl", nan, &options, &["a.jsonl:1: NaN or Infinity"]);
    let infinity = b"{\"a\":[{\"x\":-Infinity}],\"text\":\"one\"}\n{\"text\":\"two\"}\n";
    assert_read(infinity, &["one", "two"], &counts);
    // Those of other languages are no JSON in any dialect.
    let other = b"{\"text\":\"one\",\"x\":nan}\n{\"text\":\"two\"}\n";
    let counts = InputCounts {
        not_json: 1,
        ..rows(2)
    };
    assert_read(other, &["two"], &counts);
}

#[test]
fn halves_of_surrogate_pairs_are_replaced() {
    let counts = InputCounts {
        lone_surrogates: 1,
        ..rows(2)
    };
    let lone = br#"{"text":"one"}
{"text":"cut emoji \ud83d"}
"#;
    assert_read(lone, &["one", "cut emoji \u{FFFD}"], &counts);
    let options = InputOptions::default();
    assert_strict(
        "a.jsonl",
        lone,
        &options,
        &["a.jsonl:2: half of a surrogate pair"],
    );
    let odd = br#"{"text":"\ude00\ud83d\ud83d\ude00\ud83dA\ud83d\n"}
{"text":"two"}"#;
    let text = "\u{FFFD}\u{FFFD}\u{1F600}\u{FFFD}A\u{FFFD}\n";
    assert_read(odd, &[text, "two"], &counts);
}

#[test]
fn byte_order_marks_are_removed() {
    let counts = InputCounts {
        byte_order_marks: 1,
        ..rows(2)
    };
    let file = b"\xEF\xBB\xBF{\"text\":\"one\"}\n{\"text\":\"two\"}\n";
    assert_read(file, &["one", "two"], &counts);
    let row = b"{\"text\":\"\\ufeffone\"}\n{\"text\":\"t\\ufeffwo\"}\n";
    assert_read(row, &["one", "t\u{FEFF}wo"], &counts);
    let options = InputOptions::default();
    assert_strict("a.jsonl", row, &options, &["a.jsonl:1: a byte order mark"]);
}

#[test]
fn bytes_that_are_not_utf8_are_replaced() {
    let counts = InputCounts {
        invalid_utf8: 1,
        ..rows(2)
    };
    let latin = b"{\"text\":\"one\"}\n{\"text\":\"a\xE9\"}\n";
    assert_read(latin, &["one", "a\u{FFFD}"], &counts);
    let options = InputOptions::default();
    assert_strict(
        "a.jsonl",
        latin,
        &options,
        &["a.jsonl:2: bytes that are not UTF-8"],
    );
    // A character that an escape interrupts.
    let cut = b"{\"text\":\"\xE2\x82\\n\xAC\"}\n{\"text\":\"two\"}\n";
    assert_read(cut, &["\u{FFFD}\n\u{FFFD}", "two"], &counts);
    // A row in another encoding would lose its contents.
    let cyrillic = [
        b"{\"text\":\"one\"}\n{\"text\":\"",
        &[0xEF; 100][..],
        b"\"}\n",
    ]
    .concat();
    let counts = InputCounts {
        not_text: 1,
        ..rows(2)
    };
    assert_read(&cyrillic, &["one"], &counts);
    let cyrillic = &cyrillic[b"{\"text\":\"one\"}\n".len()..];
    let refused = read_one("a.jsonl", cyrillic, &options);
    assert_refused(refused, &["a.jsonl: ", "iconv"]);
}

#[test]
fn nul_and_crlf_are_kept_and_counted() {
    let counts = InputCounts {
        nul: 1,
        crlf: 1,
        ..rows(2)
    };
    let odd = b"{\"text\":\"a\\u0000b\\r\\nc\"}\r\n{\"text\":\"two\"}\r\n";
    assert_read(odd, &["a\0b\r\nc", "two"], &counts);
    let options = InputOptions::default();
    assert_strict("a.jsonl", odd, &options, &["a.jsonl:1: a NUL character"]);
    let crlf = br#"{"text":"a\r\nc"}"#;
    assert_strict(
        "a.jsonl",
        crlf,
        &options,
        &["a.jsonl:1: a line end of CR LF"],
    );
}

#[test]
fn nulls_and_empty_texts_are_counted() {
    let nulls = b"{\"text\":\"one\"}\n{\"text\":null}\n\n{\"text\":\" \\n\"}\n{\"text\":\"two\"}\n";
    let counts = InputCounts {
        nulls: 1,
        empty: 1,
        ..rows(4)
    };
    assert_read(nulls, &["one", "two"], &counts);
    let options = InputOptions::default();
    assert_strict("a.jsonl", nulls, &options, &["a.jsonl:2: the text is null"]);
    // A shard may consist of nulls.
    let counts = InputCounts {
        nulls: 1,
        ..rows(1)
    };
    assert_read(b"{\"text\":null}\n", &[], &counts);
    assert_read(b"", &[], &rows(0));
}

#[test]
fn bad_rows_are_left_out_and_named() {
    let bad = b"{\"text\":\"a\"}\n{\"text\":\"b\"\n{\"body\":1}\n{\"text\":[1]}\n[1]\n\
        {\"text\":\"c\"}\n{\"text\":\"d\"}\n{\"text\":\"e\"}\n";
    let read = read_one("a.jsonl", bad, &InputOptions::default()).unwrap();
    assert_eq!(read.texts, ["a", "c", "d", "e"]);
    let counts = &read.counts;
    assert_eq!(
        [counts.not_json, counts.no_key, counts.wrong_type],
        [1, 1, 2]
    );
    let parts = [
        "a.jsonl:2: not JSON: a comma or brace is missing at byte 12",
        "a.jsonl:3: no text under the key \"text\": the row has body (choose another",
        "a.jsonl:4: the text is an array",
        "a.jsonl:5: the row is not a JSON object",
    ];
    for (example, part) in counts.examples.iter().zip(parts) {
        assert!(example.contains(part), "{example}");
    }
    assert_eq!(counts.examples.len(), parts.len());
    let strict = |bad, part| assert_strict("a.jsonl", bad, &InputOptions::default(), &[part]);
    strict(bad, "a.jsonl:2: not JSON");
    strict(b"{\"body\":1}\n", "a.jsonl:1: no text under the key");
    strict(b"\n{\"text\":7}\n", "a.jsonl:2: the text is a number");
}

#[test]
fn files_of_bad_rows_are_refused() {
    let options = InputOptions::default();
    let bad = b"{\"body\":1}\n{\"body\":2}\n{\"text\":\"a\"}\n";
    let parts = [
        "a.jsonl: 2 of 3 rows cannot be used",
        "a.jsonl:1: no text under the key",
    ];
    assert_refused(read_one("a.jsonl", bad, &options), &parts);
    // Without waiting for the end of a large file.
    let many = b"{\"body\":1}\n".repeat(5000);
    assert_refused(read_one("a.jsonl", &many, &options), &["1000 of 1000 rows"]);
    let indented = b"{\n  \"text\": \"one\"\n}\n";
    assert_refused(
        read_one("a.json", indented, &options),
        &["a.json:1: not JSON"],
    );
}

#[test]
fn syntax_is_that_of_json() {
    let good: [(&str, &str); 6] = [
        (r#"{"text":"a\/\"\\\b\f\t\u00e9"}"#, "a/\"\\\u{8}\u{C}\té"),
        ("\t{ \"n\" : -0.5e+3 , \"text\" : \"b\" } ", "b"),
        (r#"{"te\u0078t":"c"}"#, "c"),
        (r#"{"text":"old","text":"d"}"#, "d"),
        (r#"{"a":[[],{},[{"text":"no"}],true,null],"text":"e"}"#, "e"),
        (r#"{"text":"\u003c\uD83D\uDE00"}"#, "<\u{1F600}"),
    ];
    for (row, text) in good {
        let read = read_one("a.jsonl", row.as_bytes(), &InputOptions::default());
        assert_eq!(read.unwrap().texts, [text], "{row}");
    }
    let bad = [
        "{\"text\":\"a\"}}",
        "{\"text\":\"a\"} {\"text\":\"b\"}",
        "{\"text\":\"a\",}",
        "{\"text\":\"a\" \"b\":1}",
        "{\"text\":\"a\tb\"}",
        "{\"text\":\"a",
        "{\"text\":\"\\x\"}",
        "{\"text\":\"\\u12g4\"}",
        "{\"text\":\"a\",\"n\":01}",
        "{\"text\":\"a\",\"n\":1.}",
        "{\"text\":\"a\",\"n\":[1,]}",
        "{\"text\":\"a\",\"n\":[1}",
        "{\"text\":\"a\",\"n\":+1}",
        "{'text':'a'}",
        "{text:\"a\"}",
        "text",
    ];
    for row in bad {
        let file = format!("{row}\n{{\"text\":\"good\"}}\n");
        let read = read_one("a.jsonl", file.as_bytes(), &InputOptions::default()).unwrap();
        assert_eq!(
            (read.texts, read.counts.not_json),
            (vec!["good".into()], 1),
            "{row}"
        );
    }
    // Nesting takes no stack.
    let deep = format!(
        "{{\"a\":{}1{},\"text\":\"x\"}}",
        "[".repeat(1 << 20),
        "]".repeat(1 << 20)
    );
    let read = read_one("a.jsonl", deep.as_bytes(), &InputOptions::default());
    assert_eq!(read.unwrap().texts, ["x"]);
}

#[test]
fn keys_are_paths_and_there_may_be_several() {
    let row = br#"{"content":{"text":"one","n":{"text":"deep"}},"title":"A","x.y":"dotted"}"#;
    let read = |key: &str| read_one("a.jsonl", row, &with_key(key));
    assert_eq!(read("content.text").unwrap().texts, ["one"]);
    assert_eq!(read("content.n.text").unwrap().texts, ["deep"]);
    assert_eq!(read("x.y").unwrap().texts, ["dotted"]);
    assert_eq!(read("title, content.text").unwrap().texts, ["A\n\none"]);
    assert_eq!(read("content.text,title").unwrap().texts, ["one\n\nA"]);
    let partial = read("title,missing").unwrap();
    assert_eq!(
        (partial.texts, partial.counts.missing_parts),
        (vec!["A".into()], 1)
    );
    assert_strict(
        "a.jsonl",
        row,
        &with_key("title,missing"),
        &["a.jsonl:1: one of several keys"],
    );
    assert_refused(
        read("missing,content.missing"),
        &[
            "no text under the key \"missing,content.missing\": the row has content.text, \
             content.n, title, x.y (",
        ],
    );
    assert_refused(read("content"), &["the text is an object"]);
    assert_refused(read("title.text"), &["no text under the key"]);
    assert_refused(
        read_one("a.jsonl", b"{}\n", &with_key("a")),
        &["the row has no field"],
    );
    let long = format!("\"{}\": 1", "é".repeat(1000));
    let many = (0..1000).map(|number| format!("\"f{number}\": {{\"x\": 1}}"));
    let members: Vec<String> = std::iter::once(long).chain(many).collect();
    let row = format!("{{{}}}", members.join(", "));
    let refused = read_one("a.jsonl", row.as_bytes(), &with_key("a")).unwrap_err();
    let refused = refused.to_string();
    let names = format!("the row has {}, f0.x, f1.x, ", "é".repeat(20));
    assert!(refused.contains(&names), "{refused}");
    assert!(refused.contains(", f18.x and 981 more ("), "{refused}");
    assert!(refused.len() < 1000, "{refused}");
    assert!("a,,b".parse::<crate::input::TextKey>().is_err());
    // The fields of an object that is null are null.
    let null = b"{\"doc\":null}\n{\"doc\":{\"text\":\"one\"}}\n";
    let counts = InputCounts {
        nulls: 1,
        ..rows(2)
    };
    assert_read_with(&with_key("doc.text"), null, &["one"], &counts);
}

#[test]
fn json_may_be_lines_or_one_array() {
    let array = b" [ {\"text\": \"a,]\\\"[\"},\n{\"text\":\"b\", \"l\": [[1],{}]} , {\"x\":1}\n,\
        {\"text\":\"c\"}]\n ";
    for name in ["a.json", "a.jsonl", "a.ndjson", "a.unknown", "noname"] {
        let read = read_one(name, array, &InputOptions::default()).unwrap();
        assert_eq!(read.texts, ["a,]\"[", "b", "c"]);
        assert!(read.counts.examples[0].contains("element 3: no text"));
    }
    let lines = b"{\"text\":\"a\"}\n{\"text\":\"b\"}";
    for name in ["a.json", "a.jsonl", "a.ndjson", "a.JSONL", "a.data"] {
        let read = read_one(name, lines, &InputOptions::default()).unwrap();
        assert_eq!(read.texts, ["a", "b"]);
    }
    let options = InputOptions::default();
    assert_eq!(read_one("a.json", b"[]", &options).unwrap().counts.rows, 0);
    let refused = |array: &[u8], part: &str| {
        assert_refused(
            read_one("a.json", array, &options),
            &["a.json: element", part],
        );
    };
    refused(b"[{\"text\":\"a\"},{\"te", "truncated");
    refused(b"[{\"text\":\"a\"}", "truncated");
    refused(b"[{\"text\":\"a\"}]{", "after the end of the array");
    // An array that is a row of a file with lines.
    let row = b"[1, 2]\n{\"text\":\"a\"}\n";
    assert_eq!(read_one("a.jsonl", row, &options).unwrap().texts, ["a"]);
}

#[test]
fn json_as_text_is_counted() {
    let files = Files::new(&[("a.txt", b"{\"text\": \"one\"}\n")]);
    let read = files.read(&["a.txt"], &InputOptions::default()).unwrap();
    assert_eq!((read.texts.len(), read.counts.json_as_text), (1, 1));
}
