//! Names and keys of exported folders, compared with those that vLLM and SGLang read.
//! `tests/golden/families/readers.json` lists them with their sources.

use super::{
    golden::{families, names},
    mapping::Mapping,
    model_folder::ModelFolder,
};
use crate::families::expression::config_of;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Readers {
    families: BTreeMap<String, Names>,
}

#[derive(Deserialize)]
struct Names {
    /// Names that every model of the family has. Empty if no reader has a class for it.
    #[serde(default)]
    requires: Vec<String>,
    /// Further names that readers know.
    #[serde(default)]
    accepts: Vec<String>,
    #[serde(flatten)]
    readers: BTreeMap<String, Value>,
}

impl Readers {
    /// Returns the names of a golden folder's family.
    fn of(&self, folder: &str) -> Option<&Names> {
        let family = folder.split('-').next().unwrap_or(folder);
        let names = self.families.get(family)?;
        Some(names).filter(|names| !names.requires.is_empty())
    }
}

fn readers() -> Readers {
    let text = std::fs::read(families().join("readers.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// Returns a name with `{layer}` and `{expert}` for numbers, as the list has it.
fn pattern(name: &str) -> String {
    let mut parts: Vec<&str> = name.split('.').collect();
    for index in 1..parts.len() {
        let is_number = parts[index].parse::<usize>().is_ok();
        match parts[index - 1] {
            "layers" if is_number => parts[index] = "{layer}",
            "experts" if is_number => parts[index] = "{expert}",
            _ => {}
        }
    }
    parts.join(".")
}

#[test]
fn readers_know_every_exported_name() {
    let readers = readers();
    let mut checked = 0;
    for name in names() {
        let folder = ModelFolder::open(&families().join(&name).join("model")).unwrap();
        let Some(known) = readers.of(&name) else {
            continue;
        };
        checked += 1;
        let mapping = Mapping::new(folder.family, folder.model(), &|_| true).unwrap();
        let exported: Vec<String> = mapping.theirs.keys().map(|name| pattern(name)).collect();
        for exported in &exported {
            let is_known = known.requires.contains(exported) || known.accepts.contains(exported);
            assert!(is_known, "{name}: no reader knows {exported}");
        }
        for required in &known.requires {
            assert!(
                exported.contains(required),
                "{name}: readers need {required}"
            );
        }
    }
    assert!(checked >= 20, "{checked} folders");
}

#[test]
fn new_exports_have_the_keys_that_readers_need() {
    let readers = readers();
    for name in names() {
        let folder = ModelFolder::open(&families().join(&name).join("model")).unwrap();
        let Some(known) = readers.of(&name) else {
            continue;
        };
        let config = config_of(folder.family, folder.model());
        for (reader, facts) in &known.readers {
            let needed = facts.get("config").and_then(Value::as_array);
            for key in needed.into_iter().flatten() {
                let key = key.as_str().unwrap();
                assert!(config.has(key), "{name}: {reader} needs {key}");
            }
            let is_unaware = facts.get("head_dim").is_some();
            let said = folder.family.rules().readers_without_head_dim();
            let is_said = said.iter().any(|said| said.to_lowercase() == *reader);
            assert_eq!(is_unaware, is_said, "{name}: {reader} and head_dim");
        }
    }
}

#[test]
fn readers_that_would_compute_another_function_are_named() {
    let notes = |name: &str| {
        let folder = ModelFolder::open(&families().join(name).join("model")).unwrap();
        folder.family.reader_notes(folder.model())
    };
    assert!(notes("qwen3_moe").is_empty());
    let of_mixtral = notes("mixtral");
    assert!(
        of_mixtral[0].starts_with("SGLang ignores head_dim"),
        "{of_mixtral:?}"
    );
    let folder = ModelFolder::open(&families().join("olmoe").join("model")).unwrap();
    let mut model = folder.model().clone();
    model.moe.as_mut().unwrap().router.normalize = Some(true);
    let of_olmoe = folder.family.reader_notes(&model);
    let about_norm = of_olmoe.iter().find(|note| note.contains("norm_topk_prob"));
    assert!(about_norm.is_some(), "{of_olmoe:?}");
}

#[test]
fn a_model_without_a_folder_gets_the_names_of_transformers() {
    for name in names() {
        let folder = ModelFolder::open(&families().join(&name).join("model")).unwrap();
        if folder.config.has("quantization_config") {
            continue;
        }
        let mapping = Mapping::new(folder.family, folder.model(), &|_| true).unwrap();
        let ours = mapping
            .theirs
            .iter()
            .map(|(name, theirs)| (name, theirs.shape()));
        let tensors = folder.reader.table.tensors.iter();
        let trained = tensors.filter(|(name, _)| !folder.carried().contains(name));
        let theirs = trained.map(|(name, tensor)| (name, tensor.shape.clone()));
        assert!(ours.eq(theirs), "{name}");
    }
}
