//! The program `moerun-data`, as users call it.

mod folder;

use folder::{Folder, contents, flip, stderr, stdout};
use serde_json::Value;
use std::{
    io::Write,
    process::Stdio,
    time::{Duration, Instant},
};

/// Documents of the usual corpus.
const DOCUMENTS: usize = 600;

fn info(folder: &Folder, output: &str) -> Value {
    let text = std::fs::read(folder.path(output).join("dataset.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn the_result_does_not_depend_on_threads() {
    let folder = Folder::with_corpus(3, DOCUMENTS);
    for threads in ["1", "2", "4"] {
        let options = ["--vocab-size", "400", "--threads", threads];
        folder.prepare(&["a.jsonl", "b.jsonl", "c.jsonl"], threads, &options);
    }
    let one = contents(&folder.path("1"));
    assert!(one.contains_key("valid.bin") && one.contains_key("dataset.json"));
    assert_eq!(contents(&folder.path("2")), one);
    assert_eq!(contents(&folder.path("4")), one);
}

#[test]
fn merged_parts_and_shards_are_the_whole() {
    let folder = Folder::with_corpus(3, DOCUMENTS);
    let inputs = ["a.jsonl", "b.jsonl", "c.jsonl"];
    for options in [
        &[][..],
        &["--shards", "5"],
        &["--shard-per-input"],
        &["--max-mb", "0.1"],
    ] {
        let common = ["--vocab-size", "400", "--validation-fraction", "0.3"];
        let common = [&common[..], options].concat();
        let whole = format!("whole{}", options.join(""));
        folder.prepare(&inputs, &whole, &common);
        let mut merge = vec!["data".to_string(), "merge".into(), "merged".into()];
        for part in ["0/3", "1/3", "2/3"] {
            let output = format!("part{}{part}", options.join("")).replace('/', "of");
            folder.prepare(&inputs, &output, &[&common[..], &["--part", part]].concat());
            merge.push(output);
        }
        let arguments: Vec<&str> = merge.iter().map(String::as_str).collect();
        folder.succeed(&arguments);
        // The shards of the whole, joined.
        folder.succeed(&["data", "merge", "joined", &whole]);
        let merged = contents(&folder.path("merged"));
        let joined = contents(&folder.path("joined"));
        assert_eq!(merged, joined, "{options:?}");
        if options.first() != Some(&"--shards") && options.first() != Some(&"--shard-per-input") {
            assert_eq!(merged, contents(&folder.path(&whole)), "{options:?}");
        }
        for output in ["merged", "joined"] {
            std::fs::remove_dir_all(folder.path(output)).unwrap();
        }
    }
    let parts = ["part1of3", "part0of3", "part2of3"];
    let wrong = folder.fail(&[&["data", "merge", "merged"][..], &parts].concat());
    assert!(
        wrong.contains("merge all parts in order: 0/3, 1/3, 2/3"),
        "{wrong}"
    );
    let wrong = folder.fail(&["data", "merge", "merged", "part0of3"]);
    assert!(wrong.contains("merge all parts in order"), "{wrong}");
    let twice = folder.fail(&["data", "merge", "merged", "part0of3", "./part0of3"]);
    assert!(twice.contains("./part0of3 is named twice"), "{twice}");
    // A part of the same corpus with another option.
    let tokenizer = folder.path("part0of3/tokenizer.json");
    let other = ["--tokenizer", tokenizer.to_str().unwrap(), "--part", "1/3"];
    folder.prepare(&inputs, "other", &other);
    let wrong = folder.fail(&["data", "merge", "merged", "part0of3", "other", "part2of3"]);
    assert!(
        wrong.contains("part0of3 and other are parts of different corpora"),
        "{wrong}"
    );
    assert!(!folder.path("merged").exists());
}

#[test]
fn pairs_are_merged_by_their_records() {
    let folder = Folder::with_corpus(2, 50);
    let options = ["--vocab-size", "400", "--validation-fraction", "0"];
    folder.prepare(&["a.jsonl"], "a", &options);
    folder.prepare(&["b.jsonl"], "b", &options);
    let differ = folder.fail(&["data", "merge", "all", "a/train", "b/train"]);
    assert!(
        differ.contains("a/train and b/train have different tokenizers"),
        "{differ}"
    );
    let tokenizer = folder.path("a/tokenizer.json");
    let same = [
        "--tokenizer",
        tokenizer.to_str().unwrap(),
        "--validation-fraction",
        "0",
    ];
    folder.prepare(&["b.jsonl"], "b", &[&same[..], &["--force"]].concat());
    let said = stdout(&folder.succeed(&["data", "merge", "all", "a/train", "b/train"]));
    assert!(
        said.starts_with("all: 100 documents, 0.0 MB of text -> ")
            && said.contains(" tokens; vocabulary 400; "),
        "{said}"
    );
    let verified = stdout(&folder.succeed(&["data", "verify", "all"]));
    assert!(verified.contains("all: 100 documents"), "{verified}");
    for file in ["all.bin", "all.idx"] {
        let named = stdout(&folder.succeed(&["data", "verify", file]));
        assert_eq!(named, verified);
    }
    let shown = |path| stdout(&folder.succeed(&["data", "show", path, "--document", "3"]));
    assert_eq!(shown("a/train.bin"), shown("a/train"));
    let first = std::fs::read(folder.path("all.bin")).unwrap();
    let refused = folder.fail(&["data", "merge", "all", "b/train", "a/train"]);
    assert!(refused.contains("all.bin exists"), "{refused}");
    let twice = folder.fail(&["data", "merge", "more", "a/train", "a/../a/train.bin"]);
    assert!(twice.contains("is named twice"), "{twice}");
    let own = folder.fail(&["data", "merge", "--force", "a/train", "b/train"]);
    assert!(own.contains("a/train belongs to a data set"), "{own}");
    // Damage in the middle leaves what was there.
    flip(&folder.path("a/train.bin"), 4, 1);
    let damaged = folder.fail(&["data", "merge", "--force", "all", "b/train", "a/train"]);
    assert!(
        damaged.contains("a/train.bin is damaged: its checksum"),
        "{damaged}"
    );
    assert_eq!(std::fs::read(folder.path("all.bin")).unwrap(), first);
    assert!(!folder.path(".all.unfinished").exists());
    flip(&folder.path("a/train.bin"), 4, 1);
    folder.succeed(&["data", "merge", "--force", "all", "b/train", "a/train"]);
    assert_ne!(std::fs::read(folder.path("all.bin")).unwrap(), first);
    // Pairs without a record are merged with a note.
    let merged = folder.succeed(&["data", "merge", "again", "all", "a/train.bin"]);
    let note = stderr(&merged);
    assert!(note.contains("all: no dataset.json lists it"), "{note}");
    let said = stdout(&merged);
    assert!(
        said.starts_with("again: 150 documents, text of unknown size -> ")
            && said.contains(" tokens; vocabulary unknown; unigram entropy "),
        "{said}"
    );
}

#[test]
fn documents_that_cannot_be_tokenized_are_counted() {
    let folder = Folder::new();
    let tokenizer = serde_json::json!({
        "added_tokens": [{
            "id": 4, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }],
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true,
        },
        "model": {
            "type": "BPE", "merges": [],
            "vocab": {"a": 0, "b": 1, "\u{120}": 2, "\u{10a}": 3},
        },
    });
    std::fs::write(folder.path("t.json"), tokenizer.to_string()).unwrap();
    // The second one fails only after its first parts have been written.
    let long = "a b\n".repeat(1 << 20) + "c";
    for (name, text) in [
        ("1.txt", "a b"),
        ("2.txt", &*long),
        ("3.txt", "c"),
        ("4.txt", "b"),
    ] {
        std::fs::write(folder.path(name), text).unwrap();
    }
    let inputs = ["1.txt", "2.txt", "3.txt", "4.txt"];
    let options = ["--tokenizer", "t.json", "--validation-fraction", "0"];
    let made = folder.prepare(&inputs, "out", &options);
    let line = "documents left out because the tokenizer cannot encode them: 2";
    assert!(stdout(&made).contains(line), "{}", stdout(&made));
    let info = info(&folder, "out");
    assert_eq!(info["documents_not_tokenized"], 2);
    assert_eq!(
        (&info["documents"], &info["train_tokens"]),
        (&2.into(), &6.into())
    );
    let example = info["counts"]["examples"][0].as_str().unwrap();
    assert!(
        example.contains("2.txt: document 0, counted from 0"),
        "{example}"
    );
    assert!(info["unigram_entropy"].as_f64().unwrap() < 1.4, "{info}");
    folder.succeed(&["data", "verify", "out"]);
    folder.prepare(&["1.txt", "4.txt"], "rest", &options);
    let train = |output: &str| std::fs::read(folder.path(output).join("train.bin")).unwrap();
    assert_eq!(train("out"), train("rest"));
    let strict = [
        "data", "prepare", "1.txt", "3.txt", "-o", "strict", "--strict",
    ];
    let refused = folder.fail(&[&strict[..], &options].concat());
    assert!(
        refused.contains("3.txt: document 0, counted from 0: "),
        "{refused}"
    );
    let most = ["data", "prepare", "1.txt", "2.txt", "3.txt", "-o", "most"];
    let refused = folder.fail(&[&most[..], &options].concat());
    assert!(
        refused.contains("cannot encode 2 of 3 documents"),
        "{refused}"
    );
}

#[test]
fn a_killed_command_continues_with_the_same_bytes() {
    let folder = Folder::with_corpus(2, 12_000);
    let inputs = ["a.jsonl", "b.jsonl"];
    let options = ["--vocab-size", "400", "--shards", "8", "--threads", "1"];
    folder.prepare(&inputs, "whole", &options);
    let mut killed = folder
        .command_prepare(&inputs, "out", &options)
        .spawn()
        .unwrap();
    let log = folder.path("out/.unfinished/log.jsonl");
    let deadline = Instant::now() + Duration::from_secs(120);
    let shards = || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.matches("\"shard\":{").count()
    };
    while shards() < 2 {
        assert!(Instant::now() < deadline && killed.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let finished = shards();
    assert!(finished < 8, "it was not killed in the middle");
    let first = folder.path("out/.unfinished/train-00000.bin");
    let inode = |path: &std::path::Path| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(path).unwrap().ino()
    };
    let kept = inode(&first);
    // Damage in a finished shard is noticed.
    flip(&folder.path("out/.unfinished/train-00001.bin"), 7, 1);
    let resumed = folder.prepare(&inputs, "out", &options);
    let expected = format!("resuming: {} of 8 shards are finished", finished - 1);
    assert!(stderr(&resumed).contains(&expected), "{}", stderr(&resumed));
    assert!(stderr(&resumed).contains("train-00001 is damaged and is made again"));
    assert_eq!(inode(&folder.path("out/train-00000.bin")), kept);
    assert_eq!(
        contents(&folder.path("out")),
        contents(&folder.path("whole"))
    );
}

#[test]
fn an_existing_data_set_stays_whole() {
    let folder = Folder::with_corpus(2, 12_000);
    folder.prepare(
        &["a.jsonl"],
        "out",
        &["--vocab-size", "400", "--max-mb", "0.05"],
    );
    let first = contents(&folder.path("out"));
    let other = ["data", "prepare", "b.jsonl", "-o", "out"];
    let refused = folder.fail(&other);
    assert!(refused.contains("out already has data"), "{refused}");
    assert_eq!(contents(&folder.path("out")), first);
    // An error in the middle.
    let mut broken = std::fs::read(folder.path("b.jsonl")).unwrap();
    broken.extend_from_slice(b"{\"text\": \"fine\"}\n{\"text\": \n");
    std::fs::write(folder.path("broken.jsonl"), broken).unwrap();
    let options = ["--force", "--strict", "--vocab-size", "400"];
    folder.fail(
        &[
            &["data", "prepare", "broken.jsonl", "-o", "out"][..],
            &options,
        ]
        .concat(),
    );
    assert_eq!(contents(&folder.path("out")), first);
    // SIGKILL while it writes.
    let options = ["--force", "--vocab-size", "400", "--threads", "1"];
    let mut killed = folder
        .command_prepare(&["b.jsonl"], "out", &options)
        .spawn()
        .unwrap();
    let written = folder.path("out/.unfinished/train.bin");
    let deadline = Instant::now() + Duration::from_secs(120);
    while std::fs::metadata(&written).map_or(0, |file| file.len()) == 0 {
        assert!(Instant::now() < deadline && killed.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let mut left = contents(&folder.path("out"));
    left.retain(|name, _| !name.starts_with(".unfinished"));
    assert_eq!(left, first);
    folder.succeed(&["data", "verify", "out"]);
    folder.prepare(&["b.jsonl"], "out", &options);
    folder.prepare(&["b.jsonl"], "whole", &options);
    assert_eq!(
        contents(&folder.path("out")),
        contents(&folder.path("whole"))
    );
}

#[test]
fn every_fraction_is_kept_exactly() {
    let folder = Folder::new();
    let lines = |count: usize| -> String {
        (0..count)
            .map(|n| format!("{{\"text\": \"document {n} of them\"}}\n"))
            .collect()
    };
    std::fs::write(folder.path("hundred.jsonl"), lines(100)).unwrap();
    std::fs::write(folder.path("few.jsonl"), lines(49)).unwrap();
    for (fraction, expected) in [("0.7", 70), ("0.3", 30), ("0.29", 29), ("0.02", 2)] {
        let options = ["--vocab-size", "300", "--validation-fraction", fraction];
        folder.prepare(&["hundred.jsonl"], fraction, &options);
        let documents = &info(&folder, fraction)["files"]["valid"]["documents"];
        assert_eq!(documents, expected, "{fraction}");
    }
    let few = folder.prepare(&["few.jsonl"], "few", &["--vocab-size", "300"]);
    let expected = "warning: no document is kept for validation: --validation-fraction 0.02 of 49";
    assert!(stderr(&few).contains(expected), "{}", stderr(&few));
    let options = ["--vocab-size", "300", "--validation-fraction", "0"];
    let none = folder.prepare(&["few.jsonl"], "none", &options);
    assert!(!stderr(&none).contains("warning"), "{}", stderr(&none));
    assert!(!folder.path("none/valid.bin").exists() && folder.path("none/train.bin").exists());
}

#[test]
fn damage_is_found_and_named() {
    let folder = Folder::with_corpus(1, 200);
    let options = ["--vocab-size", "400", "--validation-fraction", "0"];
    folder.prepare(&["a.jsonl"], "out", &options);
    let fine = stdout(&folder.succeed(&["data", "verify", "out"]));
    assert!(fine.contains("out/train: 200 documents"), "{fine}");
    let idx = folder.path("out/train.idx");
    let bin = folder.path("out/train.bin");
    let header = 34;
    let pointers = header + 200 * 4;
    let boundaries = pointers + 200 * 8;
    for (path, at, mask, expected) in [
        (&bin, 4, 1, "train.bin is damaged: its checksum"),
        (
            &bin,
            5,
            0x40,
            "train.bin is damaged: token 2, in document 0, is",
        ),
        (
            &idx,
            header + 3 * 4 + 3,
            0x80,
            "train.idx is damaged: sequence 3 has the negative",
        ),
        (
            &idx,
            header + 3 * 4,
            1,
            "train.bin is damaged: document 3 does not end with the token 0",
        ),
        (
            &idx,
            pointers + 5 * 8,
            2,
            "train.idx is damaged: sequence 5 begins at byte",
        ),
        (
            &idx,
            boundaries + 7 * 8,
            1,
            "train.idx is damaged: document boundary 7 is",
        ),
        (
            &idx,
            0,
            1,
            "train.idx is damaged: it does not begin with MMIDIDX",
        ),
    ] {
        flip(path, at, mask);
        let found = folder.fail(&["data", "verify", "out"]);
        assert!(found.contains(expected), "{expected}: {found}");
        flip(path, at, mask);
    }
    folder.succeed(&["data", "verify", "out"]);
    let record = std::fs::read_to_string(folder.path("out/dataset.json")).unwrap();
    let change = |from: &str, to: &str| {
        let changed = record.replacen(from, to, 1);
        assert_ne!(changed, record);
        std::fs::write(folder.path("out/dataset.json"), changed).unwrap();
    };
    change("\"documents\": 200", "\"documents\": 201");
    let found = folder.fail(&["data", "verify", "out"]);
    assert!(
        found.contains("documents is 201, and the sum of its files is 200"),
        "{found}"
    );
    std::fs::write(folder.path("out/dataset.json"), &record).unwrap();
    let tokenizer = folder.path("out/tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    std::fs::write(&tokenizer, serde_json::to_string_pretty(&json).unwrap()).unwrap();
    folder.succeed(&["data", "verify", "out"]);
    std::fs::write(&tokenizer, text.replace("<|endoftext|>", "<|unknown|>")).unwrap();
    let found = folder.fail(&["data", "verify", "out"]);
    assert!(
        found.contains("is not the tokenizer that dataset.json records"),
        "{found}"
    );
    // Without the record only what the pair itself tells, whatever the tokenizer calls its tokens.
    std::fs::remove_file(folder.path("out/dataset.json")).unwrap();
    let fine = stdout(&folder.succeed(&["data", "verify", "out/train"]));
    assert!(fine.contains("not checked: checksums"), "{fine}");
    flip(&idx, boundaries + 7 * 8, 1);
    folder.fail(&["data", "verify", "out/train"]);
}

#[test]
fn windows_and_documents_are_shown() {
    let folder = Folder::new();
    let lines = "{\"text\": \"first one\"}\n{\"text\": \"second\"}\n{\"text\": \"third\"}\n";
    std::fs::write(folder.path("a.jsonl"), lines).unwrap();
    let options = ["--vocab-size", "300", "--validation-fraction", "0"];
    folder.prepare(&["a.jsonl"], "out", &options);
    let shown = stdout(&folder.succeed(&["data", "show", "out", "--document", "1"]));
    let first = shown.lines().nth(1);
    assert_eq!(first, Some("second<|endoftext|>"), "{shown}");
    let whole = stdout(&folder.succeed(&["data", "show", "out/train"]));
    for document in 0..3 {
        assert!(
            whole.contains(&format!("--- document {document} begins at token ")),
            "{whole}"
        );
        assert!(
            whole.contains(&format!("--- document {document} ends at token ")),
            "{whole}"
        );
    }
    let window =
        stdout(&folder.succeed(&["data", "show", "out", "--window", "1", "--length", "2"]));
    assert!(
        window.starts_with("--- document 0 continues at token 2 ---"),
        "{window}"
    );
    let none = folder.fail(&["data", "show", "out", "--document", "3"]);
    assert!(none.contains("no document 3: it has 3"), "{none}");
    let none = folder.fail(&["data", "show", "out", "--window", "1000"]);
    assert!(none.contains("no window 1000"), "{none}");
}

#[test]
fn the_record_accounts_for_everything() {
    let folder = Folder::new();
    let lines = "{\"text\": \"a\"}\n{\"text\": \"  \"}\n{\"text\": \"two words here\"}\n";
    std::fs::write(folder.path("a.jsonl"), lines).unwrap();
    let options = ["--vocab-size", "300", "--validation-fraction", "0"];
    let made = folder.prepare(&["a.jsonl"], "out", &options);
    let summary = stdout(&made);
    assert!(
        summary.contains("documents of a single token: 1"),
        "{summary}"
    );
    assert!(
        summary.contains("documents left out because they are empty: 1"),
        "{summary}"
    );
    let info = info(&folder, "out");
    assert_eq!(info["documents"], 2);
    assert_eq!(info["one_token_documents"], 1);
    assert_eq!(info["counts"]["empty"], 1);
    assert_eq!(info["dtype"], "uint16");
    assert_eq!(info["eos"]["text"], "<|endoftext|>");
    assert_eq!(info["options"]["validation_fraction"], 0.0);
    assert_eq!(info["inputs"][0]["documents"], 2);
    assert_eq!(info["inputs"][0]["bytes"], 15);
    let hash = |name: &str| {
        let bytes = std::fs::read(folder.path("out").join(name)).unwrap();
        blake3::hash(&bytes).to_hex().to_string()
    };
    assert_eq!(info["files"]["train"]["bin"], hash("train.bin"));
    assert_eq!(info["files"]["train"]["idx"], hash("train.idx"));
}

#[test]
fn libtorch_is_not_loaded() {
    let folder = Folder::with_corpus(1, 12_000);
    let linked = std::process::Command::new("ldd")
        .arg(folder::PROGRAM)
        .output()
        .unwrap();
    assert!(stdout(&linked).contains("libc.so"), "{}", stdout(&linked));
    assert!(!stdout(&linked).contains("torch"), "{}", stdout(&linked));
    let mut running = folder
        .command_prepare(&["a.jsonl"], "out", &[])
        .spawn()
        .unwrap();
    let maps = format!("/proc/{}/maps", running.id());
    while !folder.path("out/.unfinished").exists() {
        assert!(running.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    let maps = std::fs::read_to_string(maps).unwrap();
    running.kill().unwrap();
    running.wait().unwrap();
    assert!(
        maps.contains("moerun-data") && !maps.contains("torch"),
        "{maps}"
    );
}

#[test]
fn options_that_cannot_be_met_are_refused_at_once() {
    let folder = Folder::with_corpus(1, 10);
    for (options, expected) in [
        (&["--part", "2/2"][..], "is no part"),
        (&["--vocab-size", "100"], "--vocab-size 100 is less than"),
        (&["--validation-fraction", "1"], "from 0 to below 1"),
        (&["--eos", "x"], "--tokenizer"),
        (&["--tokenizer", "missing.json"], "missing.json"),
        (
            &["--tokenizer", "t.json", "--vocab-size", "300"],
            "cannot be used with",
        ),
        (&["--vocab-size", "5000000"], "5000000 is not in"),
        (
            &["--shards", "2", "--part", "0/3"],
            "--part 0/3: there are only 2 shards",
        ),
        (
            &["--shard-per-input", "--part", "0/2"],
            "there are only 1 input files",
        ),
    ] {
        let refused =
            folder.fail(&[&["data", "prepare", "a.jsonl", "-o", "out"], options].concat());
        assert!(refused.contains(expected), "{refused}");
        assert!(!folder.path("out").exists(), "{options:?}");
    }
    std::fs::write(folder.path("empty.jsonl"), "{\"text\": \" \"}\n").unwrap();
    let refused = folder.fail(&["data", "prepare", "empty.jsonl", "-o", "out"]);
    assert!(refused.contains("empty.jsonl: no text"), "{refused}");
    assert!(!folder.path("out").exists());
}

#[test]
fn options_without_effect_are_named() {
    let folder = Folder::new();
    std::fs::write(folder.path("a.jsonl"), "{\"text\": \"a row\"}\n").unwrap();
    std::fs::write(folder.path("a.txt"), "some text\n").unwrap();
    std::fs::write(folder.path("a.odd"), "other text\n").unwrap();
    std::fs::create_dir(folder.path("in")).unwrap();
    std::fs::write(folder.path("in/b.txt"), "more text\n").unwrap();
    let no_rows = "--text-key body has no effect: no input is JSON or Parquet";
    let no_text = |option: &str| format!("{option} has no effect: no input is a text file");
    let no_folder = "--hidden has no effect: no input is a folder or a pattern";
    let no_file =
        |list: &str| format!("--extensions {list} has no effect: no folder has files that end so");
    for (inputs, options, expected) in [
        (
            &["a.txt"][..],
            &["--text-key", "body"][..],
            Some(no_rows.to_string()),
        ),
        (&["in"], &["--text-key", "body"], Some(no_rows.into())),
        (&["a.txt", "a.jsonl"], &["--text-key", "text,body"], None),
        (
            &["a.jsonl"],
            &["--split", "line"],
            Some(no_text("--split line")),
        ),
        (
            &["a.jsonl"],
            &["--split", "blank-line"],
            Some(no_text("--split blank-line")),
        ),
        (
            &["a.jsonl"],
            &["--separator", "%%"],
            Some(no_text("--separator \"%%\"")),
        ),
        (&["a.jsonl", "in"], &["--split", "line"], None),
        (&["a.txt"], &["--hidden"], Some(no_folder.into())),
        (&["in"], &["--hidden"], None),
        (&["*.txt"], &["--hidden"], None),
        (&["a.txt"], &["--extensions", "txt"], Some(no_file("txt"))),
        (&["in"], &["--extensions", ".TXT,rs"], Some(no_file("rs"))),
        (&["in"], &["--extensions", "txt"], None),
        (&["a.odd"], &["--extensions", "odd"], None),
        (
            &["a.jsonl"],
            &["--split", "file", "--text-key", "text", "--strict"],
            None,
        ),
    ] {
        let common = [
            "--vocab-size",
            "300",
            "--validation-fraction",
            "0",
            "--force",
        ];
        let said = stderr(&folder.prepare(inputs, "out", &[&common[..], options].concat()));
        let warnings = said
            .lines()
            .filter_map(|line| line.strip_prefix("warning: "));
        let warnings: Vec<&str> = warnings.collect();
        let expected: Vec<String> = expected.into_iter().collect();
        assert_eq!(warnings, expected, "{inputs:?} {options:?}");
    }
    // Pairs of options of which one would have no effect.
    let tokenizer = ["--tokenizer", "out/tokenizer.json"];
    for (options, expected) in [
        (
            &["--separator", "x", "--split", "line"][..],
            "cannot be used with",
        ),
        (
            &["--shards", "2", "--shard-per-input"],
            "cannot be used with",
        ),
        (
            &[&tokenizer[..], &["--vocab-size", "300"]].concat(),
            "cannot be used with",
        ),
        (&["--bos", "x"], "--tokenizer"),
    ] {
        let prepare = ["data", "prepare", "a.txt", "-o", "other"];
        let refused = folder.fail(&[&prepare[..], options].concat());
        assert!(refused.contains(expected), "{options:?}: {refused}");
    }
    for options in [&["--window", "1"][..], &["--length", "2"]] {
        let show = ["data", "show", "out", "--document", "0"];
        let refused = folder.fail(&[&show[..], options].concat());
        assert!(
            refused.contains("cannot be used with"),
            "{options:?}: {refused}"
        );
    }
}

#[test]
fn text_files_have_one_document_or_several() {
    let folder = Folder::new();
    let stories: Vec<String> = (0..100)
        .map(|n| format!("Once upon a time there were {n} ducks.\n"))
        .collect();
    std::fs::write(folder.path("a.txt"), stories.join("<|endoftext|>\n")).unwrap();
    std::fs::write(folder.path("lines.txt"), stories.concat()).unwrap();
    std::fs::write(folder.path("blank.txt"), stories.join("\n")).unwrap();
    for (file, split) in [
        ("a.txt", &["--separator", "<|endoftext|>"]),
        ("lines.txt", &["--split", "line"]),
        ("blank.txt", &["--split", "blank-line"]),
    ] {
        let options = [&["--vocab-size", "300"][..], split].concat();
        let output = format!("out-{file}");
        folder.prepare(&[file], &output, &options);
        let files = &info(&folder, &output)["files"];
        assert_eq!(files["train"]["documents"], 98, "{file}");
        assert_eq!(files["valid"]["documents"], 2, "{file}");
        let shown = stdout(&folder.succeed(&["data", "show", &output, "--document", "7"]));
        assert!(
            shown.contains("there were 7 ducks.<|endoftext|>"),
            "{shown}"
        );
    }
    let whole = folder.prepare(&["a.txt"], "whole", &["--vocab-size", "300"]);
    assert_eq!(info(&folder, "whole")["documents"], 1);
    let warning = "warning: no document is kept for validation";
    assert!(stderr(&whole).contains(warning), "{}", stderr(&whole));
}

#[test]
fn a_long_document_has_the_tokens_of_the_whole() {
    let folder = Folder::with_corpus(1, 20_000);
    let text = std::fs::read_to_string(folder.path("a.jsonl")).unwrap();
    // More than two pieces.
    assert!(text.len() > 5 << 20, "{}", text.len());
    std::fs::write(folder.path("a.txt"), &text).unwrap();
    let options = ["--vocab-size", "400", "--validation-fraction", "0"];
    folder.prepare(&["a.txt"], "out", &options);
    let prefix = folder.path("out/train");
    let found = dataset::tokens::TokenFile::open(&prefix).unwrap();
    let found = found.read(0, found.len() as usize).unwrap();
    let tokenizer = folder.path("out/tokenizer.json");
    let tokenizer = dataset::tokenizer::load_tokenizer(&tokenizer).unwrap();
    // Lines of JSON begin with a brace, so that no token spans them.
    let mut expected: Vec<i64> = Vec::new();
    for line in text.split_inclusive('\n') {
        let encoding = tokenizer.encode_fast(line, false).unwrap();
        expected.extend(encoding.get_ids().iter().map(|&id| i64::from(id)));
    }
    expected.push(0);
    assert_eq!(info(&folder, "out")["documents"], 1);
    assert!(
        found == expected,
        "{} and {} tokens",
        found.len(),
        expected.len()
    );
}

#[test]
fn standard_input_is_read_once() {
    let folder = Folder::with_corpus(1, 50);
    folder.prepare(&["a.jsonl"], "file", &["--validation-fraction", "0"]);
    let tokenizer = folder.path("file/tokenizer.json");
    let tokenizer = tokenizer.to_str().unwrap();
    let options = ["--tokenizer", tokenizer, "--validation-fraction", "0"];
    let input = || std::fs::File::open(folder.path("a.jsonl")).unwrap();
    let read = folder
        .command_prepare(&["-"], "out", &options)
        .stdin(input())
        .output()
        .unwrap();
    assert!(read.status.success(), "{}", stderr(&read));
    let train = |output: &str| std::fs::read(folder.path(output).join("train.bin")).unwrap();
    assert_eq!(train("out"), train("file"));
    for options in [
        &["--validation-fraction", "0"][..],
        &[&options[..], &["--shards", "2"]].concat(),
    ] {
        let mut command = folder.command_prepare(&["-"], "other", options);
        let refused = command.stdin(input()).output().unwrap();
        assert!(!refused.status.success());
        let expected = "standard input cannot be used here: the documents are read twice";
        assert!(stderr(&refused).contains(expected), "{}", stderr(&refused));
        assert!(!folder.path("other").exists());
    }
}

#[test]
fn a_stream_is_never_resumed() {
    let folder = Folder::with_corpus(2, 12_000);
    let first = [
        "--vocab-size",
        "400",
        "--validation-fraction",
        "0",
        "--max-mb",
        "0.1",
    ];
    folder.prepare(&["a.jsonl"], "first", &first);
    let tokenizer = folder.path("first/tokenizer.json");
    let tokenizer = tokenizer.to_str().unwrap();
    let options = [
        "--tokenizer",
        tokenizer,
        "--validation-fraction",
        "0",
        "--shard-per-input",
    ];
    let prepare = |output: &str| folder.command_prepare(&["a.jsonl", "-"], output, &options);
    let mut killed = prepare("out").stdin(Stdio::piped()).spawn().unwrap();
    let mut input = killed.stdin.take().unwrap();
    let lines = std::fs::read(folder.path("a.jsonl")).unwrap();
    input.write_all(&lines).unwrap();
    let log = folder.path("out/.unfinished/log.jsonl");
    let deadline = Instant::now() + Duration::from_secs(120);
    while !std::fs::read_to_string(&log).is_ok_and(|log| log.contains("\"shard\":{")) {
        assert!(Instant::now() < deadline && killed.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let other = || std::fs::File::open(folder.path("b.jsonl")).unwrap();
    let again = prepare("out").stdin(other()).output().unwrap();
    assert!(again.status.success(), "{}", stderr(&again));
    assert!(
        stderr(&again).contains("is made anew"),
        "{}",
        stderr(&again)
    );
    let fresh = prepare("fresh").stdin(other()).output().unwrap();
    assert!(fresh.status.success(), "{}", stderr(&fresh));
    let fresh = contents(&folder.path("fresh"));
    assert_eq!(contents(&folder.path("out")), fresh);
}

#[test]
fn another_version_of_moerun_is_refused() {
    let run = |version: &str| {
        let mut command = std::process::Command::new(folder::PROGRAM);
        let command = command.env("MOERUN_FRONT_VERSION", version);
        command.args(["help", "data"]).output().unwrap()
    };
    let help = run(env!("CARGO_PKG_VERSION"));
    assert!(stdout(&help).contains("prepare"), "{}", stderr(&help));
    let refused = run("0.0.0");
    assert!(!refused.status.success());
    assert!(
        stderr(&refused).contains("moerun is version 0.0.0"),
        "{}",
        stderr(&refused)
    );
}

#[test]
fn the_bench_compares_tokens_and_rates() {
    let folder = Folder::with_corpus(1, 300);
    folder.prepare(&["a.jsonl"], "out", &["--vocab-size", "400"]);
    let copy = "cp {input} {output}";
    let options = ["--mb", "0.2", "--rounds", "1", "--baseline", copy];
    let inputs = [
        "bench",
        "data",
        "--text",
        "a.jsonl",
        "--tokenizer",
        "out/tokenizer.json",
    ];
    let line = stdout(&folder.succeed(&[&inputs[..], &options].concat()));
    let line: Value = serde_json::from_str(&line).unwrap();
    for rate in [
        "mb_per_s",
        "library_mb_per_s",
        "baseline_mb_per_s",
        "speedup_over_library",
    ] {
        assert!(line[rate].as_f64().unwrap() > 0.0, "{rate}: {line}");
    }
    assert!(line["mb"].as_f64().unwrap() >= 0.2, "{line}");
    let failing = [
        &inputs[..],
        &["--mb", "0.01", "--baseline", "echo why >&2; false"],
    ]
    .concat();
    let failed = folder.fail(&failing);
    assert!(failed.contains("failed:\nwhy"), "{failed}");
}
