//! Tests of whole tokenizers against the `tokenizers` library.

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;

const CL100K: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// A trained tokenizer's JSON, with 600 tokens.
static TRAINED: LazyLock<Value> = LazyLock::new(|| {
    let trained = train([SAMPLE].into_iter(), 600).unwrap().0;
    serde_json::from_str(trained.json()).unwrap()
});

fn trained() -> Value {
    TRAINED.clone()
}

fn load(json: &Value, options: &TokenizerOptions) -> Result<DocumentTokenizer, String> {
    let loaded = DocumentTokenizer::of_json(&json.to_string(), options);
    loaded
        .map(|loaded| loaded.0)
        .map_err(|error| error.to_string())
}

fn with_special() -> TokenizerOptions {
    TokenizerOptions {
        special_tokens_in_text: true,
        ..TokenizerOptions::default()
    }
}

fn ids(tokenizer: &DocumentTokenizer, text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    tokenizer.encode(text, &mut ids).unwrap();
    ids
}

fn library_ids(tokenizer: &DocumentTokenizer, text: &str) -> Vec<u32> {
    let encoding = tokenizer.library().encode_fast(text, false).unwrap();
    encoding.get_ids().to_vec()
}

fn split(expression: &str, behavior: &str, invert: bool) -> Value {
    json!({
        "type": "Split", "pattern": {"Regex": expression}, "behavior": behavior, "invert": invert
    })
}

fn byte_level(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": true,
        "use_regex": use_regex,
    })
}

fn sequence(steps: &[Value]) -> Value {
    json!({"type": "Sequence", "pretokenizers": steps})
}

fn added(id: usize, content: &str, special: bool, normalized: bool) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": normalized, "special": special,
    })
}

/// Adds a token with the next id.
fn add_token(file: &mut Value, content: &str, special: bool, normalized: bool) {
    let known = file["model"]["vocab"].as_object().unwrap();
    let new = |token: &&Value| !known.contains_key(token["content"].as_str().unwrap());
    let list = file["added_tokens"].as_array().unwrap();
    let id = known.len() + list.iter().filter(new).count();
    let token = added(id, content, special, normalized);
    file["added_tokens"].as_array_mut().unwrap().push(token);
}

/// Files in the styles of published tokenizers, all with the same merges.
fn styles() -> Vec<(&'static str, Value)> {
    let mut styles = vec![("GPT-2", trained())];
    let mut with = |name, change: &dyn Fn(&mut Value)| {
        let mut file = trained();
        change(&mut file);
        styles.push((name, file));
    };
    let cl100k = sequence(&[split(CL100K, "Removed", true), byte_level(false)]);
    with("cl100k", &|file| file["pre_tokenizer"] = cl100k.clone());
    with("Llama 3", &|file| {
        file["pre_tokenizer"] = sequence(&[split(CL100K, "Isolated", false), byte_level(false)]);
        file["model"]["ignore_merges"] = true.into();
        // A token that no merges make.
        file["model"]["vocab"]["Ġtheirs"] = 700.into();
    });
    with("Qwen", &|file| {
        file["pre_tokenizer"] = sequence(&[split(CL100K, "Isolated", false), byte_level(false)]);
        file["normalizer"] = json!({"type": "NFC"});
        add_token(file, "<think>", false, false);
        add_token(file, "é x", false, true);
    });
    with("Claude", &|file| {
        file["normalizer"] = json!({"type": "NFKC"})
    });
    with("StarCoder", &|file| {
        let digits = json!({"type": "Digits", "individual_digits": true});
        file["pre_tokenizer"] = sequence(&[digits, byte_level(true)]);
        add_token(file, "    ", false, true);
        add_token(file, "  ", false, true);
    });
    with("o200k", &|file| {
        let pattern = patterns::Pattern::O200k {
            digits: 3,
            contractions: true,
        };
        let expression = pattern.expression().unwrap();
        let steps = [split(&expression, "Isolated", false), byte_level(false)];
        file["pre_tokenizer"] = sequence(&steps);
    });
    with("DeepSeek", &|file| {
        use patterns::Pattern::{DeepSeek, KanaOrHan, Numbers};
        let patterns = [Numbers { digits: 3 }, KanaOrHan, DeepSeek];
        let expressions = patterns.map(|pattern| pattern.expression().unwrap());
        let mut steps = expressions
            .map(|text| split(&text, "Isolated", false))
            .to_vec();
        steps.push(byte_level(false));
        file["pre_tokenizer"] = sequence(&steps);
        add_token(file, "<｜User｜>", false, false);
    });
    styles
}

static LOADED: LazyLock<Vec<DocumentTokenizer>> = LazyLock::new(|| {
    let files = styles().into_iter();
    let loaded = files.map(|(name, file)| {
        let tokenizer = load(&file, &Default::default()).unwrap();
        assert!(tokenizer.fast.is_some(), "{name}: {}", tokenizer.encoder());
        tokenizer
    });
    loaded.collect()
});

/// Text of all scripts, with runs of spaces, digits, contractions and added tokens.
fn text() -> impl Strategy<Value = String> {
    let words: Vec<&'static str> = SAMPLE.split(' ').collect();
    let part = prop_oneof![
        prop::sample::select(words).prop_map(String::from),
        "[ \t\r\n\u{a0}\u{3000}]{1,6}",
        "[0-9²٣]{1,7}",
        "'(s|S|ſ|re|LL|x)",
        "(<\\|endoftext\\|>|<think>|e\u{301} x|<｜User｜>|<｜)",
        "[a-zé\u{301}\u{327}가ᄀ\u{1161}ﬁ①Å]{1,6}",
        r"\PC{1,6}",
        any::<char>().prop_map(String::from),
        "x{40,80}",
    ];
    prop::collection::vec(part, 0..24).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn ids_are_those_of_the_library(text in text()) {
        for tokenizer in LOADED.iter() {
            prop_assert_eq!(ids(tokenizer, &text), library_ids(tokenizer, &text));
        }
    }

    #[test]
    fn cuts_change_no_id(text in text(), follows in text()) {
        for tokenizer in LOADED.iter() {
            let Some(cut) = tokenizer.fast.as_ref().unwrap().last_cut(&text) else {
                continue;
            };
            let whole = format!("{text}{follows}");
            let parts = [ids(tokenizer, &whole[..cut]), ids(tokenizer, &whole[cut..])].concat();
            prop_assert_eq!(parts, ids(tokenizer, &whole));
        }
    }
}

#[test]
fn documents_in_pieces_have_the_ids_of_the_whole() {
    let word = json!({
        "version": "1.0",
        "added_tokens": [added(3, "</s>", true, false)],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
            "split": true},
        "model": {"type": "WordLevel", "unk_token": "?",
            "vocab": {"?": 0, "▁one": 1, "▁two": 2, "</s>": 3}},
    });
    let slow = load(&word, &Default::default()).unwrap();
    assert!(
        slow.encoder().contains("not byte-level"),
        "{}",
        slow.encoder()
    );
    let document = "one two\n".repeat(200_000);
    for tokenizer in [&LOADED[1], &slow] {
        let mut found = Vec::new();
        let mut pending = String::new();
        for piece in document.as_bytes().chunks(300_001) {
            pending.push_str(std::str::from_utf8(piece).unwrap());
            if let Some(Cut { end, start }) = tokenizer.last_cut(&pending) {
                tokenizer.encode(&pending[..end], &mut found).unwrap();
                pending.drain(..start);
            }
        }
        assert!(!found.is_empty());
        tokenizer.encode(&pending, &mut found).unwrap();
        assert!(found == library_ids(tokenizer, &document));
    }
}

#[test]
fn text_is_not_cut_after_characters_that_normalization_changes() {
    let last_cut = |name: &str, text: &str| {
        let styles = styles();
        let style = styles.iter().position(|style| style.0 == name).unwrap();
        LOADED[style].fast.as_ref().unwrap().last_cut(text)
    };
    for text in ["ab① x", "abﬁ x"] {
        assert_eq!(last_cut("GPT-2", text), Some(5));
        assert_eq!(last_cut("Claude", text), None);
    }
    assert_eq!(last_cut("Claude", "①ab x"), Some(5));
}

#[test]
fn without_words_the_library_encodes() {
    // "a." is a token: a cut between a letter and a mark would change it.
    let mut file = trained();
    file["model"]["vocab"]["a."] = 600.into();
    let merges = file["model"]["merges"].as_array_mut().unwrap();
    merges.insert(0, json!(["a", "."]));
    let digits = json!({"type": "Digits", "individual_digits": true});
    let text = "a. 1 a.".repeat(3);
    for steps in [
        vec![byte_level(false)],
        vec![digits.clone(), byte_level(false)],
    ] {
        file["pre_tokenizer"] = sequence(&steps);
        let tokenizer = load(&file, &Default::default()).unwrap();
        let encoder = tokenizer.encoder();
        assert!(encoder.contains("words are not split"), "{encoder}");
        assert!(ids(&tokenizer, &text).contains(&600));
        assert_eq!(ids(&tokenizer, &text), library_ids(&tokenizer, &text));
    }
    file["pre_tokenizer"] = sequence(&[digits, byte_level(true)]);
    let fast = load(&file, &Default::default()).unwrap();
    assert!(fast.fast.is_some(), "{}", fast.encoder());
}

#[test]
fn special_tokens_are_text_inside_of_documents() {
    let mut file = trained();
    add_token(&mut file, "<think>", false, false);
    let think = load(&file, &Default::default()).unwrap().vocab_size() as u32 - 1;
    let text = "a <|endoftext|> b <think> c";
    let mut slow = file.clone();
    slow["normalizer"] = json!({"type": "NFD"});
    for file in [file, slow] {
        let plain = load(&file, &Default::default()).unwrap();
        let special = load(&file, &with_special()).unwrap();
        let eos = plain.eos().id;
        // Added tokens that are not special belong to the vocabulary.
        assert!(!ids(&plain, text).contains(&eos) && ids(&plain, text).contains(&think));
        assert!(ids(&special, text).contains(&eos) && ids(&special, text).contains(&think));
        assert_eq!(
            plain.library().decode(&ids(&plain, text), false).unwrap(),
            text
        );
        assert_eq!(ids(&plain, text), library_ids(&plain, text));
        assert_eq!(ids(&special, text), library_ids(&special, text));
    }
}

#[test]
fn saved_truncation_padding_and_post_processor_are_reset() {
    let mut file = trained();
    file["truncation"] = json!({
        "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0
    });
    file["padding"] = json!({
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<|endoftext|>",
    });
    file["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>":
            {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    });
    let loaded = DocumentTokenizer::of_json(&file.to_string(), &Default::default()).unwrap();
    let notes = loaded.1.join("\n");
    for part in ["truncation", "padding", "post-processor"] {
        assert!(notes.contains(&format!("the file's {part}")), "{notes}");
    }
    let text = "twelve words ".repeat(6);
    let plain = load(&trained(), &Default::default()).unwrap();
    assert_eq!(ids(&loaded.0, &text), ids(&plain, &text));
    assert_eq!(library_ids(&loaded.0, &text), ids(&plain, &text));
    let saved: Value = serde_json::from_str(loaded.0.json()).unwrap();
    assert_eq!(
        (&saved["truncation"], &saved["padding"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(saved["post_processor"], Value::Null);

    // Both files are the tokenizer of this hash.
    let folder = tempfile::tempdir().unwrap();
    let [original, written] = ["original.json", "saved.json"].map(|name| folder.path().join(name));
    std::fs::write(&original, file.to_string()).unwrap();
    std::fs::write(&written, loaded.0.json()).unwrap();
    let hash = loaded.0.hash();
    for path in [&original, &written] {
        assert!(tokenizer_has_hash(path, &hash).unwrap());
        assert!(!tokenizer_has_hash(path, "other").unwrap());
    }
    std::fs::write(&original, "{}").unwrap();
    assert!(tokenizer_has_hash(&original, &hash).is_err());
}

#[test]
fn damaged_files_are_errors() {
    let mut large = trained();
    large["model"]["vocab"]["o"] = (1u64 << 31).into();
    let mut moved = trained();
    add_token(&mut moved, "<x>", true, false);
    moved["added_tokens"][1]["id"] = 5000.into();
    let mut no_end = trained();
    no_end["added_tokens"] = json!([]);
    no_end["model"]["vocab"]
        .as_object_mut()
        .unwrap()
        .remove(END_OF_DOCUMENT);
    add_token(&mut no_end, "<|custom|>", true, false);
    let mut merge = trained();
    merge["model"]["merges"] = json!([["x", "missing"]]);
    let mut kind = trained();
    kind["pre_tokenizer"] = json!({"type": "Unheard"});
    let cases = [
        (large, "ids must be below"),
        (moved, "has the id 5000 in the file"),
        (
            no_end,
            "choose it with --eos; its special tokens are <|custom|>",
        ),
        (merge, "missing"),
        (kind, "PreTokenizer"),
        (json!({"model": 3}), "3"),
        (json!([]), "invalid"),
    ];
    for (file, part) in cases {
        let error = load(&file, &Default::default()).err().expect(part);
        assert!(error.contains(part), "{part}: {error}");
    }
    let text = trained().to_string();
    for cut in (0..text.len()).step_by(997) {
        let part = text.get(..cut).unwrap_or("{");
        assert!(DocumentTokenizer::of_json(part, &Default::default()).is_err());
    }
}

#[test]
fn ids_with_gaps() {
    let mut file = trained();
    file["model"]["vocab"]["o"] = 70_000.into();
    let tokenizer = load(&file, &Default::default()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 70_001);
    assert_eq!(ids(&tokenizer, "o"), [70_000]);
}

#[test]
fn folders_name_their_special_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let error = DocumentTokenizer::load(path, &Default::default())
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("has no tokenizer.json"),
        "{error}"
    );
    let mut file = trained();
    add_token(&mut file, "<|im_end|>", true, false);
    add_token(&mut file, "<begin>", true, false);
    std::fs::write(path.join("tokenizer.json"), file.to_string()).unwrap();
    let config = json!({"eos_token": {"content": "<|im_end|>"}, "bos_token": "<begin>"});
    std::fs::write(path.join("tokenizer_config.json"), config.to_string()).unwrap();
    std::fs::write(path.join("config.json"), r#"{"eos_token_id": [0, 600]}"#).unwrap();
    let loaded = DocumentTokenizer::load(path, &Default::default()).unwrap();
    let notes = loaded.1.join("\n");
    assert_eq!(
        (&*loaded.0.eos().text, loaded.0.eos().id),
        (END_OF_DOCUMENT, 0)
    );
    // Nothing adds it to texts.
    assert_eq!(loaded.0.bos(), None);
    assert!(
        notes.contains("has \"<begin>\" but does not add it"),
        "{notes}"
    );
    assert!(
        notes.contains("warning: tokenizer_config.json names \"<|im_end|>\""),
        "{notes}"
    );
    let options = TokenizerOptions {
        eos: Some("<|im_end|>".into()),
        ..TokenizerOptions::default()
    };
    let chosen = DocumentTokenizer::load(&path.join("tokenizer.json"), &options).unwrap();
    assert_eq!(chosen.0.eos().text, "<|im_end|>");
    assert!(chosen.1.iter().any(|note| note.starts_with("warning")));
    let bos = || {
        let loaded = DocumentTokenizer::load(path, &Default::default()).unwrap();
        loaded.0.bos().map(|token| token.text)
    };
    let mut with = config.clone();
    with["add_bos_token"] = true.into();
    std::fs::write(path.join("tokenizer_config.json"), with.to_string()).unwrap();
    assert_eq!(bos().as_deref(), Some("<begin>"));
    with["bos_token"] = END_OF_DOCUMENT.into();
    std::fs::write(path.join("tokenizer_config.json"), with.to_string()).unwrap();
    assert_eq!(bos(), None, "documents end with it");
    std::fs::write(path.join("tokenizer_config.json"), config.to_string()).unwrap();
    file["post_processor"] = json!({
        "type": "Sequence",
        "processors": [{
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<begin>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<begin>":
                {"id": "<begin>", "ids": [602], "tokens": ["<begin>"]}},
        }],
    });
    std::fs::write(path.join("tokenizer.json"), file.to_string()).unwrap();
    assert_eq!(bos().as_deref(), Some("<begin>"));
    // A data set records what its documents begin with.
    let record = json!({
        "documents": 1, "bytes": 1, "train_tokens": 1, "validation_tokens": 0, "vocab_size": 603,
        "unigram_entropy": 0.0, "eos": {"id": 0, "text": END_OF_DOCUMENT},
    });
    std::fs::write(path.join("dataset.json"), record.to_string()).unwrap();
    assert_eq!(bos(), None);
    std::fs::remove_file(path.join("dataset.json")).unwrap();
    std::fs::write(path.join("config.json"), "{").unwrap();
    let error = DocumentTokenizer::load(path, &Default::default())
        .err()
        .unwrap();
    assert!(error.to_string().contains("config.json"), "{error}");
}

#[test]
fn text_that_defeats_regular_expressions_is_not_lost() {
    let spaces = " ".repeat(1_000_000);
    let text = format!("before{spaces}after");
    for tokenizer in LOADED.iter() {
        let decoded = tokenizer
            .library()
            .decode(&ids(tokenizer, &text), false)
            .unwrap();
        assert!(decoded == text, "{}", tokenizer.encoder());
    }
    let mut file = trained();
    file["normalizer"] = json!({"type": "NFD"});
    let slow = load(&file, &Default::default()).unwrap();
    assert!(slow.fast.is_none(), "{}", slow.encoder());
    let mut found = Vec::new();
    match slow.encode(&text, &mut found) {
        Ok(()) => assert!(found == ids(&LOADED[0], &text)),
        Err(error) => assert!(error.to_string().contains("cannot be cut"), "{error}"),
    }
    // Exponential time, which the library takes for the end of all matches.
    let expression = split(r"(?:\s|\s\s)+(?=!)|\S+", "Removed", true);
    file["pre_tokenizer"] = sequence(&[expression, byte_level(false)]);
    let slow = load(&file, &Default::default()).unwrap();
    let text = format!("before{}after", " ".repeat(100));
    let error = slow.encode(&text, &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("regular expression fails"), "{error}");
}

#[test]
fn characters_without_tokens_are_refused() {
    let mut file = trained();
    let merges = file["model"]["merges"].as_array_mut().unwrap();
    merges.clear();
    file["model"]["vocab"] = json!({"<|endoftext|>": 0, "a": 1, "b": 2});
    let mut slow = file.clone();
    slow["normalizer"] = json!({"type": "NFD"});
    for file in [file, slow] {
        let tokenizer = load(&file, &Default::default()).unwrap();
        assert_eq!(ids(&tokenizer, "ab"), [1, 2]);
        let error = tokenizer
            .encode("abc", &mut Vec::new())
            .unwrap_err()
            .to_string();
        assert!(error.contains("lost"), "{error}");
    }
}

#[test]
fn differences_on_a_sample_choose_the_library() {
    let mut tokenizer = load(&trained(), &Default::default()).unwrap();
    assert_eq!(tokenizer.verify_on(&["one", "two"]), None);
    let mut other = trained();
    other["model"]["merges"].as_array_mut().unwrap().truncate(3);
    tokenizer.fast = load(&other, &Default::default()).unwrap().fast;
    let warning = tokenizer.verify_on(&["the quick brown fox"]).unwrap();
    assert!(
        warning.contains("differ") && tokenizer.fast.is_none(),
        "{warning}"
    );
}

#[test]
fn training_is_repeatable_and_round_trips() {
    let again = train([SAMPLE].into_iter(), 600).unwrap().0;
    let first = load(&trained(), &Default::default()).unwrap();
    assert_eq!((again.hash(), again.json()), (first.hash(), first.json()));
    assert_eq!(
        again.library().decode(&ids(&again, SAMPLE), false).unwrap(),
        SAMPLE
    );
    assert_eq!(again.eos().text, END_OF_DOCUMENT);
    let error = train([SAMPLE].into_iter(), 256).err().unwrap().to_string();
    assert!(error.contains("--vocab-size 256"), "{error}");
}
