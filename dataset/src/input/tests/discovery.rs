//! Folders, patterns, lists and links.

use super::{Files, assert_refused, read};
use crate::input::{InputOptions, find};
use std::os::unix::fs::symlink;

fn extensions(names: &[&str]) -> InputOptions {
    InputOptions {
        extensions: Some(names.iter().map(|&name| name.into()).collect()),
        ..InputOptions::default()
    }
}

#[test]
fn hidden_files_are_left_out_and_counted() {
    let files = Files::new(&[
        ("a.txt", b"good"),
        (".ipynb_checkpoints/a-checkpoint.txt", b"an older draft"),
        ("._a.txt", b"\0\x05\x16\x07\0\x02\0\0Mac OS X        "),
        (".git/description.txt", b"ref"),
    ]);
    let mut options = InputOptions::default();
    let found = files.read(&[""], &options).unwrap();
    assert_eq!((found.texts, found.counts.hidden), (vec!["good".into()], 3));
    assert!(
        found.notes[0].contains(".ipynb_checkpoints"),
        "{:?}",
        found.notes
    );
    options.hidden = true;
    let found = files.read(&[""], &options).unwrap();
    assert_eq!(found.texts, ["ref", "an older draft", "good"]);
    assert!(found.notes[0].contains("AppleDouble"), "{:?}", found.notes);
    // The user may name one.
    options.hidden = false;
    assert_eq!(
        files
            .read(&[".git/description.txt"], &options)
            .unwrap()
            .texts,
        ["ref"]
    );
}

#[test]
fn files_are_read_once() {
    let files = Files::new(&[("a.txt", b"good"), ("b/c.txt", b"other")]);
    symlink(files.path("a.txt"), files.path("link.txt")).unwrap();
    std::fs::hard_link(files.path("a.txt"), files.path("hard.txt")).unwrap();
    symlink(files.path(""), files.path("b/cycle")).unwrap();
    let options = InputOptions::default();
    let found = files
        .read(&["a.txt", "", "./a.txt", "b/../a.txt"], &options)
        .unwrap();
    assert_eq!(found.texts, ["good", "other"]);
    // Twice by path, twice by link, once in the folder, and the cycle.
    assert_eq!(found.counts.repeated, 6);
    assert!(found.notes[0].contains("hard.txt"), "{:?}", found.notes);
    symlink(files.path("missing"), files.path("broken.txt")).unwrap();
    assert_refused(files.read(&[""], &options), &["cannot open", "broken.txt"]);
}

#[test]
fn links_of_a_download_cache_are_followed() {
    let files = Files::new(&[("blobs/0123abcd", b"{\"text\":\"one\"}\n")]);
    std::fs::create_dir_all(files.path("snapshots/1/data")).unwrap();
    symlink(
        "../../../blobs/0123abcd",
        files.path("snapshots/1/data/train.jsonl"),
    )
    .unwrap();
    let found = files.read(&[""], &InputOptions::default()).unwrap();
    assert_eq!((found.texts, found.counts.unknown), (vec!["one".into()], 1));
}

#[test]
fn patterns_and_lists_are_expanded_in_order() {
    let files = Files::new(&[
        ("d/b.txt", b"b"),
        ("d/a.txt", b"a"),
        ("d/e/c.txt", b"c"),
        ("d/.h.txt", b"h"),
        ("x[1].txt", b"literal"),
    ]);
    let options = InputOptions::default();
    let texts = |names: &[&str]| files.read(names, &options).unwrap().texts;
    assert_eq!(texts(&["d/*.txt"]), ["a", "b"]);
    assert_eq!(texts(&["d/**/*.txt"]), ["a", "b", "c"]);
    assert_eq!(texts(&["d/[b]*", "d/?.txt"]), ["b", "a"]);
    assert_eq!(texts(&["x[1].txt"]), ["literal"]);
    assert_eq!(texts(&["d"]), ["a", "b", "c"]);
    assert_refused(
        files.read(&["d/*.parquet"], &options),
        &["no file matches the pattern"],
    );
    assert_refused(files.read(&["d/***"], &options), &["the pattern"]);
    assert_refused(
        files.read(&["missing.txt"], &options),
        &["cannot open", "missing.txt"],
    );
    let list = format!("{}\r\n\n{}\n", files.path("d/b.txt"), files.path("d/*.txt"));
    std::fs::write(files.path("list"), list).unwrap();
    let listed = format!("@{}", files.path("list"));
    assert_eq!(
        read(std::slice::from_ref(&listed), &options).unwrap().texts,
        ["b", "a"]
    );
    std::fs::write(files.path("list"), "\nmissing.txt\n").unwrap();
    assert_refused(
        read(&[listed], &options),
        &["list:2: cannot open missing.txt"],
    );
    let found = find(&["-".into(), "-".into()], &options).unwrap();
    assert_eq!((found.files.len(), found.counts.repeated), (1, 1));
    assert_eq!(found.files[0].to_string(), "standard input");
    assert_eq!(found.files[0].bytes(), None);
    let found = find(&[files.path("x[1].txt")], &options).unwrap();
    assert_eq!(found.files[0].bytes(), Some(7));
}

#[test]
fn unknown_files_of_folders_are_listed() {
    let files = Files::new(&[
        ("a.txt", b"text"),
        ("b.bin", b"\0"),
        ("c.txt", &[0; 100]),
        ("d.py", b"code"),
        ("e.txt.zip", b"PK\x03\x04"),
    ]);
    let options = InputOptions::default();
    let found = files.read(&[""], &options).unwrap();
    assert_eq!((found.texts.len(), found.counts.unknown), (2, 3));
    for part in ["b.bin", "c.txt (it is binary", "e.txt.zip"] {
        assert!(found.notes[0].contains(part), "{:?}", found.notes);
    }
    let strict = InputOptions {
        strict: true,
        ..options
    };
    assert_refused(files.read(&[""], &strict), &["c.txt: it is binary"]);
    let found = files.read(&[""], &extensions(&["py"])).unwrap();
    assert_eq!(
        (found.texts, found.counts.unknown),
        (vec!["code".into()], 4)
    );
    assert_refused(
        files.read(&[""], &extensions(&["md"])),
        &["no files to read", "a.txt"],
    );
}

#[test]
fn data_set_folders_are_read_without_their_cards() {
    let files = Files::new(&[
        ("README.md", b"---\nlicense: mit\n---\n"),
        ("dataset_infos.json", b"{\"default\": {}}"),
        ("en/train-00000-of-00002.jsonl", b"{\"text\":\"a\"}"),
        ("en/train-00001-of-00002.jsonl", b"{\"text\":\"b\"}"),
        ("en/test-00000-of-00001.jsonl", b"{\"text\":\"t\"}"),
    ]);
    let found = files.read(&[""], &InputOptions::default()).unwrap();
    assert_eq!(found.texts, ["a", "b"]);
    assert_eq!((found.counts.unknown, found.counts.other_splits), (2, 1));
    assert!(
        found.notes[0].contains("the splits test, train, and only train is read"),
        "{:?}",
        found.notes
    );
    assert!(found.notes[1].contains("README.md (it describes the data set)"));
    assert!(found.notes[2].contains("test-00000-of-00001.jsonl"));
    let all = files.read(&["", "en/test-*"], &InputOptions::default());
    assert_eq!(all.unwrap().texts, ["a", "b", "t"]);
    let found = files
        .read(&["en/train-*"], &InputOptions::default())
        .unwrap();
    assert_eq!((found.texts.len(), found.notes.len()), (2, 0));
    let named = files
        .read(&["README.md"], &InputOptions::default())
        .unwrap();
    assert_eq!(named.texts.len(), 1);
}

#[test]
fn only_tables_have_splits_and_only_texts_are_cards() {
    let files = Files::new(&[
        ("src/train.py", b"code of training"),
        ("src/test_model.py", b"code of tests"),
        ("state.txt", b"a state"),
        ("citation.jsonl", b"{\"text\":\"cited\"}"),
        ("license.md", b"a license"),
    ]);
    let found = files.read(&[""], &InputOptions::default()).unwrap();
    let expected = ["cited", "code of tests", "code of training", "a state"];
    assert_eq!(found.texts, expected);
    assert_eq!((found.counts.unknown, found.counts.other_splits), (1, 0));
    let files = Files::new(&[
        ("test/a.jsonl", b"{\"text\":\"t\"}"),
        ("dev/a.jsonl", b"{\"text\":\"v\"}"),
    ]);
    let found = files.read(&[""], &InputOptions::default()).unwrap();
    assert_eq!(found.texts, ["v", "t"]);
    assert!(found.notes[0].contains("all are read"), "{:?}", found.notes);
}

#[test]
fn json_files_without_rows_are_left_out_of_folders() {
    let files = Files::new(&[
        ("a.py", b"code"),
        ("package.json", b"{\n  \"name\": \"x\"\n}\n"),
        ("tsconfig.json", b"{\"compilerOptions\": {}}"),
        ("list.json", b"[{\"id\": 1}, {\"id\": 2}]"),
        ("rows.json", b"{\"text\": \"one\"}\n{\"text\": \"two\"}\n"),
        ("array.json", b"[{\"text\": \"three\"}]"),
    ]);
    let options = InputOptions::default();
    let found = files.read(&[""], &options).unwrap();
    assert_eq!(found.texts, ["code", "three", "one", "two"]);
    assert_eq!(found.counts.unknown, 3);
    for name in ["package.json", "tsconfig.json", "list.json"] {
        let part = format!("{name} (it has no row with the key text)");
        assert!(found.notes[0].contains(&part), "{:?}", found.notes);
    }
    // A file that the user names is an error.
    let refused = files.read(&["package.json"], &options);
    assert_refused(refused, &["rows cannot be used"]);
}

#[test]
fn the_folder_of_the_result_is_left_out() {
    let files = Files::new(&[("a.txt", b"text"), ("out/old.txt", b"made before")]);
    let options = InputOptions {
        output: Some(files.path("out").into()),
        ..InputOptions::default()
    };
    let found = files.read(&[""], &options).unwrap();
    assert_eq!(found.texts, ["text"]);
    assert!(found.notes[0].contains("the folder of the result"));
    let named = files.read(&["out"], &options).unwrap();
    assert_eq!(named.texts, ["made before"]);
}

#[test]
fn arrow_folders_are_refused_with_the_conversion() {
    let stream = b"\xFF\xFF\xFF\xFF\x10\x01\0\0\x10";
    let files = Files::new(&[
        ("one/data-00000-of-00001.arrow", stream),
        ("one/state.json", b"{}"),
        ("many/dataset_dict.json", b"{\"splits\": [\"train\"]}"),
        ("many/train/data-00000-of-00001.arrow", stream),
        ("many/train/state.json", b"{}"),
        ("cache/x.arrow", stream),
    ]);
    let refused = |name: &str, part: &str| {
        let parts = ["convert it to Parquet with python3 -c", part];
        assert_refused(files.read(&[name], &InputOptions::default()), &parts);
    };
    let folder = format!("load_from_disk({:?}).to_parquet", files.path("one"));
    refused("one", &folder);
    refused("many", "for name, split in datasets.load_from_disk(");
    refused("cache", "Dataset.from_file(");
    refused("cache/x.arrow", "Dataset.from_file(");
}

#[test]
fn streams_are_read_as_what_they_are() {
    let folder = Files::new(&[]);
    for (contents, texts) in [
        (&b"{\"text\":\"one\"}\n"[..], vec!["one"]),
        (b"plain\n", vec!["plain\n"]),
    ] {
        let path = folder.path("pipe");
        let made = std::process::Command::new("mkfifo")
            .arg(&path)
            .status()
            .unwrap();
        assert!(made.success());
        let writer = {
            let path = path.clone();
            let contents = contents.to_vec();
            std::thread::spawn(move || std::fs::write(path, contents).unwrap())
        };
        let found = read(std::slice::from_ref(&path), &InputOptions::default()).unwrap();
        writer.join().unwrap();
        assert_eq!(found.texts, texts);
        std::fs::remove_file(path).unwrap();
    }
}
