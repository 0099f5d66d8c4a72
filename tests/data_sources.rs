//! Sources of data: their formats, order, validation and identity.

use crate::{
    agreement::{TIMEOUT, trainer_on},
    fixture::{Experiment, finish, finish_child, free_port, ranks, text},
};
use dataset::tokens::TokenWriter;
use parallel::run_on_threads;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
};
use trainer::{
    Progress, StepMetrics, ValidationMetrics,
    config::{Config, SourceConfig},
    data::Dataset,
};

const VOCAB: usize = 100;
const LENGTH: usize = 16;

fn write(prefix: &Path, tokens: &[u32]) {
    std::fs::create_dir_all(prefix.parent().unwrap()).unwrap();
    let mut writer = TokenWriter::create(prefix, 1 << 17).unwrap();
    writer.push(tokens).unwrap();
    writer.finish().unwrap();
}

/// A repeated cycle, which is easily learned.
fn easy(count: u32) -> Vec<u32> {
    (0..count).map(|position| position % 10).collect()
}

/// Pseudo-random tokens, which cannot be learned.
fn hard(count: u32, seed: u64) -> Vec<u32> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as u32 % VOCAB as u32
    };
    (0..count).map(|_| next()).collect()
}

/// Returns a run on sources of `folder`.
fn run(folder: &Path, data: Value, validation: Value) -> Config {
    let config = json!({
        "run": {"dir": folder.join("run"), "device": "cpu"},
        "model": {"vocab_size": VOCAB, "hidden": 32, "layers": 1, "heads": 2, "ffn": 32},
        "data": data,
        "train": {"steps": 60, "global_batch": 8, "micro_batch": 4},
        "schedule": {"constant": {"lr": 1e-2}},
        "checkpoint": {"every": 0},
        "validation": validation,
    });
    serde_json::from_value(config).unwrap()
}

/// Trains to the end and returns the validation: losses by source, and the mean.
fn validate(config: Config) -> (BTreeMap<String, f64>, f64) {
    tch::set_num_threads(1);
    let results = run_on_threads(1, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, config.clone());
        for _ in 0..config.train.steps {
            trainer.train_step(false).unwrap();
        }
        let metrics = trainer.validate().unwrap().unwrap();
        (metrics.validation, metrics.validation_loss)
    });
    results.into_iter().next().unwrap()
}

#[test]
fn every_source_of_validation_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    write(&path("easy"), &easy(4000));
    write(&path("hard"), &hard(4000, 1));
    let losses = |validation: Value| {
        let data = json!({
            "train": [{"path": path("easy")}],
            "validation": validation,
            "sequence_length": LENGTH,
        });
        validate(run(
            folder.path(),
            data,
            json!({"every": 100, "sequences": 20}),
        ))
    };
    let easy = json!({"path": path("easy"), "weight": 1});
    let hard = json!({"path": path("hard"), "weight": 1});
    let (both, mean) = losses(json!([easy, hard]));
    assert!(both["easy"] < 0.1 && both["hard"] > 5.0, "{both:?}");
    assert!((mean - (both["easy"] + both["hard"]) / 2.0).abs() < 1e-9);
    let (swapped, swapped_mean) = losses(json!([hard, easy]));
    assert_eq!(swapped, both);
    assert!((swapped_mean - mean).abs() < 1e-9);
    let (_, hard_mean) = losses(json!([
        {"path": path("easy"), "weight": 1},
        {"path": path("hard"), "weight": 3},
    ]));
    assert!(hard_mean > 1.4 * mean, "{hard_mean} {mean}");
}

#[test]
fn an_epoch_reads_every_token_once() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("train");
    let windows = 1000;
    let count = windows * LENGTH as u32 + 1;
    write(&prefix, &(0..count).collect::<Vec<_>>());
    let data = Dataset::open(&[SourceConfig::new(&prefix)], LENGTH, 1 << 17, 1).unwrap();
    for epoch in 0..3 {
        let first = epoch * u64::from(windows);
        let (inputs, _) = data.batch(first..first + u64::from(windows)).unwrap();
        let read: Vec<i64> = Vec::try_from(inputs.flatten(0, -1)).unwrap();
        assert_eq!(read.len(), count as usize - 1);
        let different: BTreeSet<i64> = read.into_iter().collect();
        assert_eq!(different.len(), count as usize - 1);
    }
}

#[test]
fn a_small_weight_has_its_exact_share() {
    let folder = tempfile::tempdir().unwrap();
    let weights = [("a", 0.99964, 1), ("b", 0.00036, 2)];
    let sources: Vec<SourceConfig> = weights
        .iter()
        .map(|&(name, weight, token)| {
            let prefix = folder.path().join(name);
            write(&prefix, &[token; 801]);
            SourceConfig {
                weight: Some(weight),
                ..SourceConfig::new(prefix)
            }
        })
        .collect();
    let data = Dataset::open(&sources, 8, VOCAB, 1).unwrap();
    let (inputs, _) = data.batch(0..16384).unwrap();
    let of_b = inputs.select(1, 0).eq(2).sum(tch::Kind::Int64);
    assert_eq!(of_b.int64_value(&[]), 6);
}

/// A format does not change what is read, nor the losses.
#[test]
fn formats_give_the_same_losses() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let tokens = hard(2000, 7);
    write(&path("pair"), &tokens);
    let bytes: Vec<u8> = tokens
        .iter()
        .flat_map(|&token| (token as u16).to_le_bytes())
        .collect();
    std::fs::write(path("part-0.npy"), &bytes).unwrap();
    std::fs::write(path("00000.ds"), &bytes).unwrap();
    std::fs::write(path("00000.ds.metadata"), "gpt2|2\n2000\n2 K").unwrap();
    std::fs::write(path("00000.ds.index"), 2000u64.to_le_bytes()).unwrap();
    let losses = |source: Value| {
        let data = json!({
            "train": [source.clone()],
            "validation": [source],
            "sequence_length": LENGTH,
        });
        let mut config = run(folder.path(), data, json!({"every": 100, "sequences": 20}));
        config.train.steps = 5;
        validate(config).1
    };
    let pair = losses(json!({"path": path("pair")}));
    assert_eq!(
        losses(json!({"path": path("part-0.npy"), "dtype": "u16"})),
        pair
    );
    assert_eq!(losses(json!({"path": path("00000.ds")})), pair);
}

/// Runs a command of the experiment, which fails with a message that has all `parts`.
fn refused(mut command: Command, parts: &[&str]) {
    let output = finish(&mut command);
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    for part in parts {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn data_that_does_not_fit_is_refused_before_the_run() {
    let experiment = Experiment::new();
    let names = [&["config", "check"][..], &["train"], &["doctor"]];
    let refused_by = |names: &[&[&str]], changes: &[&str], parts: &[&str]| {
        for command in names {
            let mut command = experiment.moerun(command);
            command.args(["small.yaml", "-n", "2"]);
            for change in changes {
                command.args(["--set", change]);
            }
            refused(command, parts);
        }
    };
    let commands = |changes: &[&str], parts: &[&str]| refused_by(&names, changes, parts);
    commands(
        &["model.vocab_size=500"],
        &["model.vocab_size 500 is less than the"],
    );
    commands(&["data.train.0.path=data/none"], &["data/none.idx"]);
    commands(&["data.validation.0.path=data/none"], &["data/none.idx"]);
    commands(
        &["data.sequence_length=1000000"],
        &["fewer than one sample"],
    );
    refused_by(
        &names[..2],
        &["data.train=[{path: data/train, weight: 1}, {path: data/valid}]"],
        &["data.train[1] (data/valid) has none"],
    );

    // A record of another tokenizer, with a copy of the data.
    std::fs::create_dir(experiment.path("other")).unwrap();
    for file in ["train.bin", "train.idx"] {
        let from = experiment.path("data").join(file);
        std::fs::copy(from, experiment.path("other").join(file)).unwrap();
    }
    let record = |hash: &str| {
        json!({"documents": 1, "bytes": 1, "train_tokens": 1, "validation_tokens": 0,
            "vocab_size": 512, "unigram_entropy": 1.0, "tokenizer_hash": hash})
    };
    let write = |folder: &str, hash: &str| {
        let path = experiment.path(folder).join("dataset.json");
        std::fs::write(path, record(hash).to_string()).unwrap();
    };
    write("other", "one");
    write("data", "two");
    let both = "data.train=[{path: data/train}, {path: other/train}]";
    commands(&[both], &["data.train[1] was made with another tokenizer"]);
    commands(
        &["data.tokenizer=data/tokenizer.json"],
        &["data.tokenizer: data/tokenizer.json is another tokenizer than that of data.train[0]"],
    );
    let masked = "data.train=[{path: data/train, mask: data/valid}]";
    commands(&[masked], &["the mask data/valid.bin has"]);
    let named = "data.validation=[{path: data/valid, name: a}, {path: data/train, name: a}]";
    refused_by(
        &names[..2],
        &[named],
        &["data.validation[1].name is \"a\", which data.validation[0] has already"],
    );
}

/// Replaces keys of the record of the experiment's data.
fn change_record(experiment: &Experiment, changes: Value) {
    let path = experiment.path("data/dataset.json");
    let mut info: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let changes = changes.as_object().unwrap().clone();
    info.as_object_mut().unwrap().extend(changes);
    std::fs::write(path, info.to_string()).unwrap();
}

#[test]
fn ranks_of_another_launcher_compare_the_records() {
    let experiment = Experiment::new();
    change_record(&experiment, json!({"vocab_size": 600}));
    let port = free_port();
    let started = ranks(&experiment, 2, &[], |_, rank| {
        format!(
            "RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
        )
    });
    for child in started {
        let output = finish_child(child);
        let said = text(&output);
        assert!(!output.status.success(), "{said}");
        let expected = "model.vocab_size 512 is less than the 600 of the data of data.train[0]";
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn a_given_token_that_is_not_the_recorded_one_is_a_warning() {
    let experiment = Experiment::new();
    change_record(
        &experiment,
        json!({"eos": {"id": 0, "text": "<|endoftext|>"}}),
    );
    let warning = "data.eod_token is 5, but the documents of data.train[0] end with token 0";
    for (command, is_warned) in [
        (&["config", "check"][..], true),
        (&["train"], true),
        (&["doctor"], true),
        (&["config", "check"], false),
    ] {
        let mut command = experiment.moerun(command);
        command.args(["small.yaml", "-n", "2", "--set", "train.steps=1"]);
        let token = if is_warned { 5 } else { 0 };
        command.args(["--set", &format!("data.eod_token={token}")]);
        let output = finish(&mut command);
        let said = text(&output);
        assert_eq!(said.contains(warning), is_warned, "{said}");
        assert!(output.status.success(), "{said}");
    }
}

/// Returns the id of the token of a line feed.
fn line_feed(experiment: &Experiment) -> u64 {
    let tokenizer = std::fs::read(experiment.path("data/tokenizer.json")).unwrap();
    let tokenizer: Value = serde_json::from_slice(&tokenizer).unwrap();
    // The byte-level name of a line feed.
    tokenizer["model"]["vocab"]["\u{10a}"].as_u64().unwrap()
}

/// Returns the lines of JSON that a command prints.
fn printed(mut command: Command) -> Vec<Value> {
    let output = finish(&mut command);
    assert!(output.status.success(), "{}", text(&output));
    let lines = String::from_utf8(output.stdout).unwrap();
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    lines.collect()
}

/// `moerun evaluate --data` has the loss of the run's own validation, by the token that the
/// checkpoint keeps: the record is gone.
#[test]
fn evaluation_is_the_validation_of_a_run_with_document_rules() {
    let experiment = Experiment::new();
    // Lines are the documents: several in each sequence.
    let id = line_feed(&experiment);
    change_record(&experiment, json!({"eos": {"id": id, "text": "line feed"}}));
    let rules = |name: &str| -> Vec<String> {
        let keys = ["mask_documents", "reset_positions", "eod_mask_loss"];
        let set = |key: &str| name.contains(key).then(|| format!("data.{key}=true"));
        keys.into_iter().filter_map(set).collect()
    };
    let runs = [
        "mask_documents",
        "reset_positions",
        "eod_mask_loss mask_documents",
    ];
    let mut expected = Vec::new();
    for (index, name) in runs.into_iter().enumerate() {
        let mut changes = vec!["train.steps=10".to_string(), format!("run.dir=run{index}")];
        changes.extend(rules(name));
        let changes: Vec<&str> = changes.iter().map(String::as_str).collect();
        let output = finish(&mut experiment.train(2, &changes));
        let said = text(&output);
        assert!(output.status.success(), "{said}");
        let line = format!("data.eod_token is {id} (\"line feed\"), as dataset.json records it");
        assert!(said.contains(&line), "{said}");
        let path = experiment.path(&format!("run{index}/metrics.jsonl"));
        let lines = std::fs::read_to_string(path).unwrap();
        let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
        expected.push(last);
    }
    std::fs::remove_file(experiment.path("data/dataset.json")).unwrap();
    for (index, expected) in expected.iter().enumerate() {
        let run = format!("run{index}");
        let mut evaluate = experiment.moerun(&["evaluate", "--checkpoint", &run]);
        evaluate.args(["--data", "data/valid", "--sequences", "8"]);
        let line = &printed(evaluate)[0];
        let [ours, theirs] = [&line["loss"], &expected["validation_loss"]];
        let [ours, theirs] = [ours, theirs].map(|loss| loss.as_f64().unwrap());
        assert!(
            (ours - theirs).abs() < 1e-4 * theirs,
            "{run}: {ours} {theirs}"
        );
        assert_eq!(line["counted_tokens"], expected["counted_tokens"], "{run}");
    }
    let counted = |index: usize| expected[index]["counted_tokens"].as_u64().unwrap();
    assert!(
        counted(2) < counted(1),
        "some tokens follow the end of a document"
    );
    assert_eq!(expected[2]["bits_per_byte"], Value::Null);
}

/// The token that begins documents comes before a scored text.
#[test]
fn a_recorded_beginning_comes_before_texts() {
    let experiment = Experiment::new();
    let id = line_feed(&experiment);
    let train = |dir: &str| {
        let dir = format!("run.dir={dir}");
        let output =
            finish(&mut experiment.train(1, &["parallel.expert=1", "train.steps=5", &dir]));
        assert!(output.status.success(), "{}", text(&output));
    };
    train("without");
    change_record(&experiment, json!({"bos": {"id": id, "text": "\u{10a}"}}));
    train("with");
    let score = |run: &str, context: &str| {
        let request = json!({"context": context, "continuation": " self"});
        std::fs::write(experiment.path("requests"), request.to_string()).unwrap();
        let mut evaluate = experiment.moerun(&["evaluate", "--checkpoint", run]);
        evaluate.args(["--requests", "requests"]);
        printed(evaluate)[0]["log_likelihood"].as_f64().unwrap()
    };
    let begun = score("with", "return");
    assert!((begun - score("without", "\nreturn")).abs() < 1e-9);
    assert!((begun - score("without", "return")).abs() > 1e-9);

    // The checkpoint keeps the tokens, and an export has them.
    std::fs::remove_file(experiment.path("data/dataset.json")).unwrap();
    let arguments = ["model", "export", "--checkpoint", "with", "-o", "exported"];
    let exported = finish(&mut experiment.moerun(&arguments));
    assert!(exported.status.success(), "{}", text(&exported));
    let generation = std::fs::read(experiment.path("exported/generation_config.json")).unwrap();
    let generation: Value = serde_json::from_slice(&generation).unwrap();
    assert_eq!(generation["bos_token_id"], id);
    assert!((score("with", "return") - begun).abs() < 1e-9);
}

/// A run that resumes repeats the validation of its state on the same contents, wherever they are,
/// and leaves the line of others as it is.
#[test]
fn a_validation_is_repeated_on_the_same_contents() {
    let repeated_after = |change: &dyn Fn(&Path, &mut Config)| {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        write(&path("train"), &easy(2000));
        write(&path("valid"), &hard(2000, 3));
        let data = json!({
            "train": [{"path": path("train")}],
            "validation": [{"path": path("valid")}],
            "sequence_length": LENGTH,
        });
        let mut config = run(folder.path(), data, json!({"every": 2, "sequences": 4}));
        config.train.steps = 2;
        std::fs::create_dir_all(&config.run.dir).unwrap();
        train_on(&config);
        let metrics = config.run.dir.join("metrics.jsonl");
        let lines = std::fs::read_to_string(&metrics).unwrap();
        let (rest, last) = lines.trim_end().rsplit_once('\n').unwrap();
        let mut last: Value = serde_json::from_str(last).unwrap();
        let loss = last["validation_loss"].take();
        last["validation_loss"] = json!(9.5);
        std::fs::write(&metrics, format!("{rest}\n{last}\n")).unwrap();
        change(folder.path(), &mut config);
        config.train.steps = 3;
        train_on(&config);
        let lines = std::fs::read_to_string(&metrics).unwrap();
        let lines = lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut of_state =
            lines.filter(|line| line["step"] == 2 && !line["validation_loss"].is_null());
        let line = of_state.next().unwrap();
        assert_eq!(of_state.next(), None);
        let is_repeated = line["validation_loss"] == loss;
        assert!(is_repeated || line["validation_loss"] == 9.5, "{line}");
        is_repeated
    };
    assert!(repeated_after(&|_, _| {}));
    assert!(repeated_after(&|folder, config| {
        for extension in ["bin", "idx"] {
            let file = |name: &str| folder.join(name).with_extension(extension);
            std::fs::rename(file("valid"), file("moved")).unwrap();
        }
        config.data.validation[0].path = folder.join("moved");
    }));
    assert!(repeated_after(&|folder, _| write(
        &folder.join("train"),
        &easy(1000)
    )));
    assert!(!repeated_after(&|folder, _| write(
        &folder.join("valid"),
        &hard(2000, 4)
    )));
    assert!(!repeated_after(&|folder, config| {
        write(&folder.join("valid"), &hard(2000, 4));
        config.data.validation[0].name = Some("other".into());
    }));
}

/// Trains on one rank, from the newest checkpoint on.
fn train_on(config: &Config) {
    let config = config.clone();
    tch::set_num_threads(1);
    run_on_threads(1, TIMEOUT, move |world| {
        let mut trainer = trainer_on(world, config.clone());
        trainer.resume(&mut |_| {}).unwrap();
        trainer.run(&|| false, &mut Silent).unwrap();
    });
}

/// A progress report that shows nothing.
struct Silent;

impl Progress for Silent {
    fn step(&mut self, _metrics: &StepMetrics, _steps: u64) {}
    fn validation(&mut self, _metrics: &ValidationMetrics) {}
    fn note(&mut self, _message: &str) {}
    fn warn(&mut self, _message: &str) {}
}

/// A start that repeats step 0 replaces the line of its validation.
#[test]
fn the_initial_validation_has_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    write(&tokens, &easy(2000));
    let source = json!([{"path": tokens}]);
    let data = json!({"train": source, "validation": source, "sequence_length": LENGTH});
    let mut config = run(folder.path(), data, json!({"every": 2, "sequences": 4}));
    config.train.steps = 3;
    let run = config.run.dir.clone();
    std::fs::create_dir_all(&run).unwrap();
    let start = |saves_only: bool| {
        let config = config.clone();
        tch::set_num_threads(1);
        run_on_threads(1, TIMEOUT, move |world| {
            let mut trainer = trainer_on(world, config.clone());
            trainer.resume(&mut |warning| panic!("{warning}")).unwrap();
            assert_eq!(trainer.step(), 0);
            if saves_only {
                trainer.save().unwrap();
            } else {
                trainer.run(&|| false, &mut Silent).unwrap();
            }
        });
    };
    let steps = || -> Vec<u64> {
        let lines = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let lines = lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|line| line["step"].as_u64().unwrap()).collect()
    };
    let forget = || std::fs::remove_dir_all(run.join("checkpoints")).unwrap();
    start(false);
    assert_eq!(steps(), [0, 1, 2, 2, 3, 3]);
    // Killed before anything was saved.
    forget();
    start(false);
    assert_eq!(steps(), [0, 1, 2, 2, 3, 3]);
    // Killed after the state of step 0 was saved.
    forget();
    start(true);
    start(false);
    assert_eq!(steps(), [0, 1, 2, 2, 3, 3]);
}

#[test]
fn changed_contents_are_reported_and_a_moved_folder_is_not() {
    let experiment = Experiment::new();
    let train = |changes: &[&str]| {
        let output = finish(&mut experiment.train(2, changes));
        let said = text(&output);
        assert!(output.status.success(), "{said}");
        said
    };
    train(&["train.steps=5"]);
    std::fs::rename(experiment.path("data"), experiment.path("moved")).unwrap();
    let moved = [
        "data.train.0.path=moved/train",
        "data.validation.0.path=moved/valid",
    ];
    let said = train(&[&moved[..], &["train.steps=10"]].concat());
    assert!(!said.contains("data.train"), "{said}");
    assert!(!said.contains("data.validation"), "{said}");

    // Other contents of the same size in the same place.
    let rotate = |name: &str| {
        let path = experiment.path("moved").join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.rotate_left(4);
        std::fs::write(&path, bytes).unwrap();
    };
    rotate("train.bin");
    let said = train(&[&moved[..], &["train.steps=15"]].concat());
    assert!(
        said.contains("the contents of data.train[0] (moved/train) are not those of the saved"),
        "{said}"
    );
    assert!(!said.contains("the contents of data.validation"), "{said}");
    rotate("valid.bin");
    let said = train(&[&moved[..], &["train.steps=16"]].concat());
    assert!(
        said.contains("the contents of data.validation[0] (moved/valid) are not those of the"),
        "{said}"
    );
    assert!(!said.contains("the contents of data.train"), "{said}");

    // A mask is part of the contents as well.
    let tokens = dataset::tokens::TokenFile::open(&experiment.path("moved/train")).unwrap();
    let mask: Vec<u32> = (0..tokens.len())
        .map(|token| u32::from(token % 3 > 0))
        .collect();
    write(&experiment.path("moved/mask"), &mask);
    let masked = [
        "run.dir=masked",
        "data.train=[{path: moved/train, mask: moved/mask}]",
        "data.validation=[{path: moved/valid}]",
    ];
    train(&[&masked[..], &["train.steps=2"]].concat());
    rotate("mask.bin");
    let said = train(&[&masked[..], &["train.steps=4"]].concat());
    let expected = "the mask of data.train[0] (moved/train) is not that of the saved state";
    assert!(said.contains(expected), "{said}");
    assert!(!said.contains("the contents of data."), "{said}");
}

#[test]
fn sources_are_described_and_validated_from_the_start() {
    let experiment = Experiment::new();
    let changes = [
        "validation.at_start=true",
        "data.validation=[{path: data/valid}, {path: data/train, name: seen}]",
    ];
    let output = finish(&mut experiment.train(2, &changes));
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for part in [
        "data train: ",
        "100.0000% of the samples",
        "epochs in this run",
        "step 0  validation of valid: loss",
        "step 0  validation of seen: loss",
        "step 0  validation loss",
        "bits per byte",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let lines = std::fs::read_to_string(experiment.path("run/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines[0]["step"], 0);
    let last = lines.last().unwrap();
    assert_eq!(last["step"], 20);
    // Bits of the mean byte of the whole file, by hand.
    let record = std::fs::read(experiment.path("data/dataset.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    for (source, file) in [("valid", "valid"), ("seen", "train")] {
        let file = &record["files"][file];
        let [bytes, tokens] = ["bytes", "tokens"].map(|key| file[key].as_f64().unwrap());
        let bits = last["validation"][source].as_f64().unwrap() * std::f64::consts::LOG2_E;
        let expected = bits * tokens / bytes;
        let figure = last["bits_per_byte"][source].as_f64().unwrap();
        assert!(
            (figure - expected).abs() < 1e-9,
            "{source}: {figure} {expected}"
        );
    }
    for source in ["valid", "seen"] {
        let first = lines[0]["validation"][source].as_f64().unwrap();
        let loss = last["validation"][source].as_f64().unwrap();
        assert!(loss < first, "{source}: {first} {loss}");
        assert!(last["bits_per_byte"][source].as_f64().unwrap() > 0.0);
    }
    assert!(lines[1]["epochs"].as_f64().unwrap() > 0.0);

    // The command computes what the run did: the same windows from the start of each file.
    let mut evaluate = experiment.moerun(&["evaluate", "--checkpoint", "run"]);
    evaluate.args(["--data", "data/valid", "data/train", "--sequences", "4"]);
    let output = finish(&mut evaluate);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    let lines = String::from_utf8(output.stdout).unwrap();
    let evaluated: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for (line, source) in evaluated.iter().zip(["valid", "seen"]) {
        for (ours, theirs) in [
            (&line["loss"], &last["validation"][source]),
            (&line["bits_per_byte"], &last["bits_per_byte"][source]),
        ] {
            let ours = ours.as_f64().unwrap();
            let theirs = theirs.as_f64().unwrap();
            assert!((ours - theirs).abs() < 1e-4 * theirs, "{ours} {theirs}");
        }
        let loss = line["loss"].as_f64().unwrap();
        let perplexity = line["perplexity"].as_f64().unwrap();
        assert!((perplexity / loss.exp() - 1.0).abs() < 1e-9);
        assert_eq!(line["sequences"], 4);
    }
    assert_eq!(evaluated.len(), 2);
}

#[test]
fn doctor_compares_checksums() {
    let experiment = Experiment::new();
    let tokens = dataset::tokens::TokenFile::open(&experiment.path("data/train")).unwrap();
    write(
        &experiment.path("data/mask"),
        &vec![1; tokens.len() as usize],
    );
    let masked = "data.train=[{path: data/train, mask: data/mask}]";
    // Prints all `parts`. Only a failed check is a failure of the command.
    let doctor = |fails: bool, parts: &[&str]| {
        let mut command = experiment.moerun(&["doctor", "small.yaml", "--verify-data"]);
        command.args(["-n", "1", "--set", "parallel.expert=1"]);
        let output = finish(command.args(["--set", masked]));
        let said = text(&output);
        assert_eq!(output.status.code(), Some(i32::from(fails)), "{said}");
        for part in parts {
            assert!(said.contains(part), "{part}: {said}");
        }
    };
    let record = experiment.path("data/dataset.json");
    let info: Value = serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
    let write_record = |names: &[&str]| {
        let mut info = info.clone();
        let mut files = serde_json::Map::new();
        for name in names {
            let hash = |extension: &str| {
                let path = experiment.path("data").join(format!("{name}.{extension}"));
                dataset::checksum(&path).unwrap()
            };
            let file = json!({"documents": 1, "tokens": 1, "bytes": 1,
                "bin": hash("bin"), "idx": hash("idx")});
            files.insert(name.to_string(), file);
        }
        info["files"] = files.into();
        std::fs::write(&record, info.to_string()).unwrap();
    };
    write_record(&["train", "valid", "mask"]);
    doctor(
        false,
        &["3 token files are the recorded ones", "no problems found"],
    );
    for (file, at, key) in [
        ("train.bin", 10, "data.train[0]"),
        ("mask.bin", 12, "data.train[0].mask"),
        ("valid.bin", 10, "data.validation[0]"),
    ] {
        let path = experiment.path("data").join(file);
        let whole = std::fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let failed = format!("fail checksums: {key}: ");
        let cause = format!("{file} is not the file that dataset.json records");
        doctor(
            true,
            &[&failed, &cause, "fix: restore the files", "1 problem found"],
        );
        std::fs::write(&path, whole).unwrap();
    }
    write_record(&["train", "valid"]);
    doctor(
        false,
        &[
            "warn checksums: 2 token files are the recorded ones; no dataset.json records those \
             of data.train[0].mask",
            "no problems found",
        ],
    );
}

/// Before the first step greedy sampling of a model with large values depends on every token, so
/// that a missing one is noticed.
#[test]
fn recorded_tokens_begin_and_end_generated_texts() {
    let folder = tempfile::tempdir().unwrap();
    let words: serde_json::Map<String, Value> =
        (0..VOCAB).map(|id| (format!("w{id}"), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    });
    let save = |name: &str, tokens: Value| {
        let own = folder.path().join(name);
        write(&own.join("train"), &easy(4000));
        std::fs::write(own.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let mut record = json!({
            "documents": 1, "bytes": 1, "train_tokens": 4000, "validation_tokens": 0,
            "vocab_size": VOCAB, "unigram_entropy": 1.0,
        });
        record
            .as_object_mut()
            .unwrap()
            .extend(tokens.as_object().unwrap().clone());
        std::fs::write(own.join("dataset.json"), record.to_string()).unwrap();
        let data = json!({"train": [{"path": own.join("train")}], "sequence_length": LENGTH});
        let mut config = run(&own, data, Value::Null);
        config.model.init_std = 0.5;
        tch::set_num_threads(1);
        run_on_threads(1, TIMEOUT, move |world| {
            trainer_on(world, config.clone()).save().unwrap();
        });
        // The checkpoint keeps the tokens.
        std::fs::remove_file(own.join("dataset.json")).unwrap();
    };
    let generate = |name: &str, prompt: &str| -> Vec<String> {
        let options = trainer::GenerateOptions {
            checkpoint: folder.path().join(name).join("run"),
            prompt: prompt.into(),
            max_tokens: 8,
            temperature: 0.0,
            top_k: 0,
            seed: 0,
            tokenizer: None,
        };
        let mut text = String::new();
        let mut warn = |warning: &str| panic!("{warning}");
        trainer::generate(&options, &|_, _| (), &mut warn, &mut |part| text += part).unwrap();
        let added = text.strip_prefix(prompt).unwrap();
        added.split_whitespace().map(String::from).collect()
    };
    let token = |id: usize| json!({"id": id, "text": format!("w{id}")});
    save("plain", json!({}));
    save("begun", json!({"bos": token(7)}));
    let plain = generate("plain", "w3 w4");
    let after_beginning = generate("plain", "w7 w3 w4");
    assert_eq!(plain.len(), 8);
    assert_ne!(plain, after_beginning, "the first token matters");
    assert_eq!(generate("begun", "w3 w4"), after_beginning);
    assert_eq!(generate("begun", ""), generate("plain", "w7"));
    // A text ends before the first token that ends documents, wherever it comes.
    let is_new = |&at: &usize| !plain[..at].contains(&plain[at]);
    let end = (1..plain.len()).rev().find(is_new).expect("several tokens");
    let id = plain[end].strip_prefix('w').unwrap().parse().unwrap();
    save("ended", json!({"eos": token(id)}));
    assert_eq!(generate("ended", "w3 w4"), plain[..end]);
}
