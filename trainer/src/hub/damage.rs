//! Damaged and contradictory folders: each is refused with the file and the key.

use super::{
    config_json::CONFIG_FILE,
    folder::{INDEX_FILE, SINGLE_FILE, TensorTable},
    golden::{families, names},
    model_folder::ModelFolder,
    upcycle::{UpcycleMethod, UpcycleOptions, upcycle},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// A copy of a golden folder.
struct Copy {
    folder: tempfile::TempDir,
}

/// A tensor of a file: dtype, shape and bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

impl Copy {
    fn of(name: &str) -> Copy {
        let folder = tempfile::tempdir().unwrap();
        let files = std::fs::read_dir(families().join(name).join("model")).unwrap();
        for file in files.map(|file| file.unwrap().path()) {
            std::fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
        }
        Copy { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Changes the JSON object of a file.
    fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let path = self.path(file);
        let mut value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut value);
        std::fs::write(path, value.to_string()).unwrap();
    }

    /// Changes the tensors of a file.
    fn edit_tensors(&self, file: &str, edit: impl FnOnce(&mut BTreeMap<String, Stored>)) {
        let path = self.path(file);
        let bytes = std::fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let stored =
            |view: &TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        let tensors = tensors
            .iter()
            .map(|(name, view)| (name.to_string(), stored(&view)));
        let mut tensors: BTreeMap<String, Stored> = tensors.collect();
        edit(&mut tensors);
        let views = tensors.iter().map(|(name, stored)| {
            let (dtype, shape, data) = stored;
            let view = TensorView::new(*dtype, shape.clone(), data).unwrap();
            (name.as_str(), view)
        });
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    /// Returns the message with which the folder is refused.
    fn refused(&self) -> String {
        let opened = ModelFolder::open(self.folder.path());
        let opened = opened.and_then(|folder| folder.check_repeated());
        opened.expect_err("the folder is refused").to_string()
    }

    /// Asserts that the message has all these words.
    fn assert_refused(&self, words: &[&str]) {
        let message = self.refused();
        for word in words {
            assert!(message.contains(word), "{word}: {message}");
        }
    }
}

const EXPERT: &str = "model.layers.1.block_sparse_moe.experts.2.w3.weight";
const FIRST_SHARD: &str = "model-00001-of-00004.safetensors";
const SECOND_SHARD: &str = "model-00002-of-00004.safetensors";

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let copy = Copy::of("mixtral");
    copy.edit_tensors(SINGLE_FILE, |tensors| {
        tensors.remove(EXPERT);
    });
    copy.assert_refused(&[EXPERT, "it is missing; config.json makes it [12, 16]"]);

    let copy = Copy::of("mixtral");
    copy.edit_tensors(SINGLE_FILE, |tensors| {
        let expert = tensors[EXPERT].clone();
        tensors.insert("model.layers.1.extra.weight".into(), expert);
    });
    let unknown = "mixtral models have no such tensor";
    copy.assert_refused(&[SINGLE_FILE, "model.layers.1.extra.weight", unknown]);

    let copy = Copy::of("mixtral");
    copy.edit_tensors(SINGLE_FILE, |tensors| {
        tensors.get_mut(EXPERT).unwrap().1.reverse();
    });
    copy.assert_refused(&[SINGLE_FILE, EXPERT, "[16, 12]", "makes it [12, 16]"]);

    let copy = Copy::of("mixtral");
    copy.edit_tensors(SINGLE_FILE, |tensors| {
        tensors.get_mut(EXPERT).unwrap().0 = Dtype::I32;
    });
    copy.assert_refused(&[SINGLE_FILE, EXPERT, "its dtype I32 is not supported"]);

    // A scale of a tensor that was converted and is no longer quantized.
    let copy = Copy::of("mixtral");
    let scale = format!("{EXPERT}_scale_inv");
    copy.edit_tensors(SINGLE_FILE, |tensors| {
        tensors.insert(scale.clone(), (Dtype::F32, vec![1, 1], vec![0; 4]));
    });
    copy.assert_refused(&[SINGLE_FILE, &scale, unknown]);

    let copy = Copy::of("granitemoe");
    copy.edit_tensors(SINGLE_FILE, |tensors| {
        let mut head = tensors["model.embed_tokens.weight"].clone();
        head.2[0] ^= 1;
        tensors.insert("lm_head.weight".into(), head);
    });
    copy.assert_refused(&["lm_head.weight", "embeddings are tied, and it differs"]);
}

#[test]
fn files_that_contradict_each_other_are_refused() {
    let copy = Copy::of("mixtral");
    let path = copy.path(SINGLE_FILE);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    copy.assert_refused(&[SINGLE_FILE, "announces"]);

    let copy = Copy::of("qwen3_moe");
    std::fs::remove_file(copy.path(SECOND_SHARD)).unwrap();
    copy.assert_refused(&["cannot open", SECOND_SHARD]);

    let copy = Copy::of("qwen3_moe");
    copy.edit_json(INDEX_FILE, |index| {
        index["weight_map"]["lm_head.weight"] = json!(SECOND_SHARD);
    });
    copy.assert_refused(&[FIRST_SHARD, "lm_head.weight", SECOND_SHARD]);

    let copy = Copy::of("qwen3_moe");
    copy.edit_json(INDEX_FILE, |index| {
        index["weight_map"]
            .as_object_mut()
            .unwrap()
            .remove("lm_head.weight");
    });
    copy.assert_refused(&[FIRST_SHARD, "lm_head.weight", "does not list it"]);

    let copy = Copy::of("qwen3_moe");
    copy.edit_json(INDEX_FILE, |index| {
        index["weight_map"]["lm_head.weight"] = json!("../model.safetensors");
    });
    copy.assert_refused(&[INDEX_FILE, "lm_head.weight", "no file name"]);

    // A tensor in two files, of which the index names one.
    let copy = Copy::of("qwen3_moe");
    copy.edit_tensors(SECOND_SHARD, |tensors| {
        let norm = tensors.values().next().unwrap().clone();
        tensors.insert("lm_head.weight".into(), norm);
    });
    copy.assert_refused(&[SECOND_SHARD, "lm_head.weight", FIRST_SHARD]);

    let copy = Copy::of("qwen3_moe");
    std::fs::copy(copy.path(FIRST_SHARD), copy.path(SINGLE_FILE)).unwrap();
    copy.assert_refused(&["has both", SINGLE_FILE, INDEX_FILE]);

    let copy = Copy::of("mixtral");
    std::fs::remove_file(copy.path(SINGLE_FILE)).unwrap();
    copy.assert_refused(&["has neither", SINGLE_FILE, "other formats than safetensors"]);
}

#[test]
fn quantized_tensors_without_their_scales_are_refused() {
    let copy = Copy::of("deepseek_v3-fp8");
    let name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight";
    let scale = format!("{name}_scale_inv");
    copy.edit_tensors(SINGLE_FILE, |tensors| {
        tensors.remove(&scale);
    });
    copy.assert_refused(&[name, &scale, "is missing"]);

    let copy = Copy::of("deepseek_v3-fp8");
    copy.edit_json(CONFIG_FILE, |config| {
        config["quantization_config"]["weight_block_size"] = json!([8, 8]);
    });
    copy.assert_refused(&["_scale_inv", "blocks of 8 x 8"]);

    let copy = Copy::of("deepseek_v3-fp8");
    copy.edit_json(CONFIG_FILE, |config| {
        config
            .as_object_mut()
            .unwrap()
            .remove("quantization_config");
    });
    copy.assert_refused(&[CONFIG_FILE, "quantization_config", "it is missing"]);

    let copy = Copy::of("gpt_oss-mxfp4");
    copy.edit_tensors(SINGLE_FILE, |tensors| {
        tensors.remove("model.layers.0.mlp.experts.down_proj_scales");
    });
    copy.assert_refused(&["down_proj_blocks", "down_proj_scales is missing"]);
}

#[test]
fn configurations_that_moerun_cannot_compute_are_refused_by_key() {
    for (name, key, value, words) in [
        (
            "mixtral",
            "hidden_act",
            json!("gelu"),
            vec!["hidden_act", "\"silu\""],
        ),
        ("olmoe", "clip_qkv", json!(8.0), vec!["clip_qkv", "8.0"]),
        (
            "mixtral",
            "rope_parameters",
            json!({"rope_type": "spiral", "rope_theta": 1e4}),
            vec!["rope_parameters.rope_type", "spiral"],
        ),
        (
            "mixtral",
            "num_local_experts",
            json!("many"),
            vec!["num_local_experts"],
        ),
        (
            "mixtral",
            "num_local_experts",
            Value::Null,
            vec!["the key is missing"],
        ),
        ("qwen3_moe", "layer_types", Value::Null, vec![]),
        (
            "deepseek_v3",
            "rope_interleave",
            json!(false),
            vec!["rope_interleave"],
        ),
        (
            "deepseek_v2",
            "norm_topk_prob",
            json!(true),
            vec!["norm_topk_prob"],
        ),
        (
            "hunyuan_v1_moe",
            "moe_topk",
            json!([2, 1]),
            vec!["moe_topk", "the same number in all layers"],
        ),
    ] {
        let copy = Copy::of(name);
        copy.edit_json(CONFIG_FILE, |config| config[key] = value);
        if words.is_empty() {
            ModelFolder::open(copy.folder.path()).unwrap();
        } else {
            copy.assert_refused(&words);
        }
    }
}

/// Returns numbers that look random.
fn numbers(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |below| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below.max(1)
    }
}

/// Damages a file of a folder. Values of tensors have no checksum, so only headers are changed.
fn damage(folder: &Path, next: &mut impl FnMut(usize) -> usize) -> String {
    let is_weights = |path: &PathBuf| path.extension().is_some_and(|end| end == "safetensors");
    let entries = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(is_weights).collect();
    files.extend(Some(folder.join(INDEX_FILE)).filter(|path| path.exists()));
    files.sort();
    let path = &files[next(files.len())];
    let mut bytes = std::fs::read(path).unwrap();
    let header = if is_weights(path) {
        8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
    } else {
        bytes.len()
    };
    let what = match next(4) {
        0 => {
            bytes.truncate(next(bytes.len()));
            "truncated"
        }
        1 => {
            let at = next(header);
            bytes.remove(at);
            "a byte is missing"
        }
        _ => {
            let at = next(header);
            bytes[at] ^= 1 << next(8);
            "a bit is wrong"
        }
    };
    std::fs::write(path, bytes).unwrap();
    format!("{}: {what}", path.display())
}

#[test]
fn damaged_folders_are_never_accepted_as_others() {
    let names = names();
    for seed in 0..200 {
        let mut next = numbers(seed);
        let name = &names[next(names.len())];
        let copy = Copy::of(name);
        let intact = TensorTable::read(copy.folder.path()).unwrap();
        let what = damage(copy.folder.path(), &mut next);
        if let Ok(accepted) = ModelFolder::open(copy.folder.path()) {
            // Some bytes of a header mean nothing.
            let table = &accepted.reader.table.table;
            assert_eq!(table.tensors, intact.tensors, "seed {seed}, {name}, {what}");
        }
    }
}

#[test]
fn impossible_models_are_refused_by_key() {
    let list = [1.0; 3];
    for (name, key, value, words) in [
        (
            "mixtral",
            "num_hidden_layers",
            json!(1_000_000_000_000_u64),
            vec!["is more than"],
        ),
        ("mixtral", "num_hidden_layers", json!(16_000), vec!["bytes"]),
        (
            "mixtral",
            "num_hidden_layers",
            json!(-1),
            vec!["num_hidden_layers"],
        ),
        (
            "mixtral",
            "num_hidden_layers",
            json!(0),
            vec!["num_hidden_layers: model.layers is 0"],
        ),
        (
            "hunyuan_v1_moe",
            "num_shared_expert",
            json!([u64::MAX, 1]),
            vec!["num_shared_expert"],
        ),
        (
            "hunyuan_v1_moe",
            "intermediate_size",
            json!(u64::MAX),
            vec!["intermediate_size"],
        ),
        (
            "mixtral",
            "num_experts_per_tok",
            json!(9),
            vec!["num_experts_per_tok: model.moe.top_k 9"],
        ),
        (
            "mixtral",
            "num_key_value_heads",
            json!(3),
            vec!["num_attention_heads: model.heads 4 is not a multiple of model.kv_heads 3"],
        ),
        (
            "mixtral",
            "rope_scaling",
            json!({"rope_type": "longrope", "short_factor": list, "long_factor": list,
                "original_max_position_embeddings": 8}),
            vec!["rope_scaling: model.rope.scaling.longrope.short has 3 numbers"],
        ),
    ] {
        let copy = Copy::of(name);
        copy.edit_json(CONFIG_FILE, |config| config[key] = value);
        copy.assert_refused(&words);
    }
}

/// Values that are wrong for most keys.
fn odd_value(next: &mut impl FnMut(usize) -> usize) -> Value {
    match next(10) {
        0 => Value::Null,
        1 => json!("text"),
        2 => json!([]),
        3 => json!({}),
        4 => json!(-1),
        5 => json!(0),
        6 => json!(u64::MAX),
        7 => json!(1e300),
        8 => json!(1_u64 << next(63)),
        _ => json!(next(64)),
    }
}

#[test]
fn wrong_configurations_never_stop_the_program() {
    let names = names();
    for seed in 0..600 {
        let mut next = numbers(seed);
        let copy = Copy::of(&names[next(names.len())]);
        copy.edit_json(CONFIG_FILE, |config| {
            let config = config.as_object_mut().unwrap();
            for _ in 0..=next(2) {
                let key = config.keys().nth(next(config.len())).unwrap().clone();
                match config.get_mut(&key) {
                    Some(Value::Object(section)) if !section.is_empty() && next(3) > 0 => {
                        let inner = section.keys().nth(next(section.len())).unwrap().clone();
                        section.insert(inner, odd_value(&mut next));
                    }
                    _ if next(4) == 0 => {
                        config.remove(&key);
                    }
                    _ => {
                        config.insert(key, odd_value(&mut next));
                    }
                }
            }
        });
        if let Err(error) = ModelFolder::open(copy.folder.path()) {
            assert!(!error.to_string().is_empty(), "seed {seed}");
        }
    }
}

#[test]
fn an_upcycled_model_has_no_quantization_left() {
    let copy = Copy::of("qwen3");
    copy.edit_json(CONFIG_FILE, |config| {
        config["quantization_config"] = json!({"quant_method": "fp8"});
    });
    let output = copy.path("upcycled");
    let options = UpcycleOptions {
        dense: copy.folder.path().to_path_buf(),
        output: output.clone(),
        experts: 4,
        top_k: 2,
        granularity: 1,
        method: UpcycleMethod::Naive,
        seed: 1,
        dtype: None,
    };
    upcycle(&options, &|_, _| ()).unwrap();
    assert!(
        !ModelFolder::open(&output)
            .unwrap()
            .config
            .has("quantization_config")
    );
}

#[test]
fn what_is_no_file_is_refused_at_once() {
    for name in [CONFIG_FILE, SINGLE_FILE] {
        let copy = Copy::of("mixtral");
        std::fs::remove_file(copy.path(name)).unwrap();
        let mode = nix::sys::stat::Mode::S_IRUSR;
        nix::unistd::mkfifo(&copy.path(name), mode).unwrap();
        copy.assert_refused(&[name, "is no file"]);
    }
}
