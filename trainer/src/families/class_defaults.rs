//! Readings of `config.json` by the configuration classes of transformers: absent keys, null, and
//! keys that others override. `scripts/golden/config_defaults.py` writes them.

use super::{
    Family,
    canonical::canonical,
    expression::{config_of, differences, express},
};
use crate::{
    config::{ModelConfig, RopeScaling},
    hub::config_json::ConfigJson,
    model::rope_scaling::{DynamicScaling, NtkAlphaScaling},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, path::Path};

#[derive(Deserialize)]
struct Readings {
    base: Map<String, Value>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    /// True if moerun cannot compute it, null if it may refuse.
    refused: Option<bool>,
    without: Vec<String>,
    with: Map<String, Value>,
    /// Keys of the complete configuration that differ from `base`.
    means: Map<String, Value>,
}

fn readings() -> BTreeMap<String, Readings> {
    let text = include_str!("../../tests/golden/config_defaults.json");
    serde_json::from_str(text).unwrap()
}

fn family(name: &str) -> Family {
    let mut all = Family::ALL.iter();
    *all.find(|family| family.name() == name).unwrap()
}

fn read(name: &str, keys: &Map<String, Value>) -> Result<ModelConfig, String> {
    let text = serde_json::to_vec(keys).unwrap();
    let config = ConfigJson::parse(Path::new("m"), &text).unwrap();
    let read = family(name).rules().read(&config);
    read.map_err(|error| error.to_string())
}

fn base(name: &str) -> ModelConfig {
    read(name, &readings()[name].base).unwrap()
}

#[test]
fn configurations_mean_what_they_mean_to_transformers() {
    let mut wrong = Vec::new();
    for (name, Readings { base, cases }) in readings() {
        for case in cases {
            let mut given = base.clone();
            given.retain(|key, _| !case.without.contains(key));
            given.extend(case.with.clone());
            let ours = read(&name, &given);
            let label = format!("{name}: {}", case.name);
            if ours.is_err() {
                // Keys without a sensible default are required.
                let is_allowed = case.refused != Some(false);
                wrong.extend((!is_allowed).then(|| format!("{label}: {ours:?}")));
                continue;
            }
            let mut complete = base.clone();
            complete.extend(case.means);
            let theirs = read(&name, &complete).map(|model| canonical(&model));
            let ours = ours.map(|model| canonical(&model));
            if case.refused == Some(true) || ours != theirs {
                let lost = theirs.and_then(|theirs| Ok(differences(&theirs, &ours?)));
                wrong.push(format!("{label}: other than {lost:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn most_keys_may_be_absent() {
    let mut refused = BTreeMap::new();
    for (name, Readings { base, .. }) in readings() {
        for key in base.keys() {
            let mut given = base.clone();
            given.shift_remove(key);
            if let Err(message) = read(&name, &given) {
                assert!(message.contains("missing"), "{name}: {message}");
                *refused.entry(key.clone()).or_insert(0) += 1;
            }
        }
    }
    for key in ["vocab_size", "hidden_size", "rms_norm_eps"] {
        assert_eq!(refused[key], readings().len(), "{key}");
    }
    for key in [
        "num_key_value_heads",
        "rope_parameters",
        "n_group",
        "layer_types",
    ] {
        assert_eq!(refused.get(key), None, "{key}");
    }
}

#[test]
fn the_longest_sequence_of_dynamic_scaling_is_the_original_one() {
    let mut model = base("llama");
    model.rope.scaling = Some(RopeScaling::Dynamic(DynamicScaling {
        factor: 4.0,
        original_length: 48,
    }));
    let config = config_of(Family::Llama, &model);
    assert_eq!(config.keys()["max_position_embeddings"], 48);
    assert_eq!(
        config.keys()["rope_parameters"],
        json!({"factor": 4.0, "rope_type": "dynamic", "rope_theta": model.rope_theta})
    );
    let mut keys = config.keys().clone();
    keys["rope_scaling"]["original_max_position_embeddings"] = json!(8);
    let read = read("llama", &keys).unwrap();
    assert_eq!(read.rope.scaling, model.rope.scaling);
}

#[test]
fn rotary_embeddings_that_a_family_lacks_are_not_written() {
    let (found, _) = express(&base("qwen3")).unwrap();
    assert_eq!(found, Family::Qwen3);
    let mut partial = base("qwen3");
    partial.rope.fraction = 0.5;
    assert!(express(&partial).is_err());
    let mut alpha = base("qwen3");
    alpha.rope.scaling = Some(RopeScaling::NtkAlpha(NtkAlphaScaling { alpha: 10.0 }));
    assert!(express(&alpha).is_err());
    let mut whole = base("glm4_moe");
    whole.rope.fraction = 1.0;
    let (found, config) = express(&whole).unwrap();
    assert_eq!(found, Family::Glm4Moe);
    assert_eq!(
        config.keys()["rope_parameters"]["partial_rotary_factor"],
        1.0
    );
}

#[test]
fn both_kinds_of_layers_of_olmo3_get_theta() {
    let model = base("olmo3");
    let (found, config) = express(&model).unwrap();
    assert_eq!(found, Family::Olmo3);
    for kind in ["full_attention", "sliding_attention"] {
        let theta = &config.keys()["rope_parameters"][kind]["rope_theta"];
        assert_eq!(*theta, json!(model.rope_theta));
    }
}

#[test]
fn families_with_shared_experts_are_not_written_without() {
    let mut model = base("glm4_moe");
    model.moe.as_mut().unwrap().shared_experts = 0;
    let message = express(&model).unwrap_err().to_string();
    assert!(message.contains("no model family"), "{message}");
}

#[test]
fn only_one_factor_on_cosines_and_sines_is_read() {
    let mut keys = readings()["llama"].base.clone();
    let list = [1.0; 6];
    for (scaling, expected) in [
        (
            json!({"rope_type": "longrope", "short_factor": list, "long_factor": list,
                "original_max_position_embeddings": 64, "attention_factor": 1.2}),
            json!({"longrope": {"short": list, "long": list, "original_length": 64,
                "factor": null, "attention_factor": 1.2}}),
        ),
        (
            json!({"rope_type": "yarn", "factor": 4.0, "mscale": 0.7,
                "original_max_position_embeddings": 64, "attention_factor": 1.2}),
            json!({"yarn": {"factor": 4.0, "original_length": 64, "beta_fast": 32.0,
                "beta_slow": 1.0, "truncate": true, "attention_factor": 1.2, "mscale": null,
                "mscale_all_dim": null}}),
        ),
    ] {
        keys["rope_parameters"] = scaling;
        let model = read("llama", &keys).unwrap();
        assert_eq!(serde_json::to_value(&model.rope.scaling).unwrap(), expected);
        assert_eq!(model.problems(), Vec::<String>::new());
    }
}
