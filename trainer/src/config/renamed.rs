//! Configuration keys and values that the previous version named differently.
//!
//! A configuration file of the previous version is refused with the new names; the configuration in
//! a checkpoint of the previous version is renamed when it is read.

use serde_json::{Map, Value};
use std::fmt::{Display, Formatter};

/// A key or value with a new name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renamed {
    /// Dotted path of the section that has the key, or of the list that has the value.
    parent: &'static str,
    kind: Kind,
    old: &'static str,
    new: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Key,
    ListedValue,
}

#[rustfmt::skip]
const RENAMED: [Renamed; 6] = [
    Renamed::key("run", "bind", "cpu_affinity"),
    Renamed::key("run", "communicator", "backend"),
    Renamed::key("data", "document_end", "eod_token"), // tidy: allow(words)
    Renamed::key("parallel", "zero_ranks", "zero_group_size"), // tidy: allow(words)
    Renamed::key("model.moe.least_loaded", "over", "threshold_over"),
    Renamed::listed_value("parallel.recompute.parts", "router", "dispatch"),
];

impl Renamed {
    const fn key(parent: &'static str, old: &'static str, new: &'static str) -> Renamed {
        Renamed {
            parent,
            kind: Kind::Key,
            old,
            new,
        }
    }

    const fn listed_value(parent: &'static str, old: &'static str, new: &'static str) -> Renamed {
        Renamed {
            parent,
            kind: Kind::ListedValue,
            old,
            new,
        }
    }

    fn pointer(&self) -> String {
        format!("/{}", self.parent.replace('.', "/"))
    }

    fn is_used(&self, config: &Value) -> bool {
        match (self.kind, config.pointer(&self.pointer())) {
            // A key counts even if it is null: `config check` prints all keys.
            (Kind::Key, Some(Value::Object(section))) => section.contains_key(self.old),
            (Kind::ListedValue, Some(Value::Array(values))) => {
                values.iter().any(|value| value == self.old)
            }
            _ => false,
        }
    }

    fn apply(&self, config: &mut Value) {
        match (self.kind, config.pointer_mut(&self.pointer())) {
            (Kind::Key, Some(Value::Object(section))) => self.rename_key(section),
            (Kind::ListedValue, Some(Value::Array(values))) => {
                for value in values.iter_mut().filter(|value| **value == self.old) {
                    *value = self.new.into();
                }
            }
            _ => {}
        }
    }

    /// Renames the key, or drops it if the section has the new key already.
    fn rename_key(&self, section: &mut Map<String, Value>) {
        if let Some(value) = section.remove(self.old) {
            section.entry(self.new).or_insert(value);
        }
    }
}

impl Display for Renamed {
    fn fmt(&self, out: &mut Formatter<'_>) -> std::fmt::Result {
        let Renamed {
            parent, old, new, ..
        } = self;
        match self.kind {
            Kind::Key => write!(out, "{parent}.{old} -> {parent}.{new}"),
            Kind::ListedValue => write!(out, "{parent}: {old} -> {new}"),
        }
    }
}

/// Returns the keys and values with a new name that a configuration still uses.
pub fn renamed_keys(config: &Value) -> Vec<Renamed> {
    RENAMED
        .into_iter()
        .filter(|renamed| renamed.is_used(config))
        .collect()
}

/// Gives the keys and values of a configuration their new names.
pub(crate) fn rename_old_keys(config: &mut Value) {
    for renamed in RENAMED {
        renamed.apply(config);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use serde_json::json;

    fn present() -> Value {
        json!({
            "run": {"dir": "run", "cpu_affinity": "none", "backend": "gloo"},
            "parallel": {
                "zero_group_size": 2,
                "recompute": {"parts": ["norm", "dispatch"]},
            },
            "model": {
                "vocab_size": 272,
                "hidden": 16,
                "layers": 2,
                "heads": 2,
                "moe": {
                    "experts": 4,
                    "top_k": 2,
                    "ffn": 16,
                    "least_loaded": {"threshold_over": "expert"},
                },
            },
            "data": {"train": [{"path": "a"}], "sequence_length": 16, "eod_token": 0},
            "train": {"steps": 4, "global_batch": 4, "micro_batch": 1},
        })
    }

    fn previous() -> Value {
        let mut config = present();
        for renamed in RENAMED {
            let backwards = Renamed {
                old: renamed.new,
                new: renamed.old,
                ..renamed
            };
            backwards.apply(&mut config);
        }
        config
    }

    #[test]
    fn all_old_names_are_found() {
        assert_eq!(renamed_keys(&previous()), RENAMED);
        assert_eq!(renamed_keys(&present()), []);
        let printed = json!({"run": {"bind": null, "backend": "auto"}});
        assert_eq!(renamed_keys(&printed), RENAMED[..1]);
        // The section `model.moe.router` keeps its name.
        let router = json!({"model": {"moe": {"router": {"groups": 2}}}});
        assert_eq!(renamed_keys(&router), []);
    }

    #[test]
    fn an_old_configuration_becomes_the_present_one() {
        assert!(serde_json::from_value::<Config>(previous()).is_err());
        let mut config = previous();
        rename_old_keys(&mut config);
        assert_eq!(config, present());
        rename_old_keys(&mut config);
        assert_eq!(config, present());
        serde_json::from_value::<Config>(config).unwrap();
    }

    #[test]
    fn a_new_key_wins_over_its_old_name() {
        let mut config = json!({"run": {"bind": "cores", "cpu_affinity": "none"}});
        rename_old_keys(&mut config);
        assert_eq!(config, json!({"run": {"cpu_affinity": "none"}}));
    }

    #[test]
    fn renamings_are_shown_as_one_writes_them() {
        assert_eq!(RENAMED[0].to_string(), "run.bind -> run.cpu_affinity");
        let value = "parallel.recompute.parts: router -> dispatch";
        assert_eq!(RENAMED[5].to_string(), value);
    }

    /// Follows references and optional sections.
    fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
        if let Some(reference) = schema["$ref"].as_str() {
            let pointer = reference.strip_prefix('#').unwrap();
            return resolve(root, root.pointer(pointer).unwrap());
        }
        let mut options = schema["anyOf"].as_array().into_iter().flatten();
        match options.find(|option| option["type"] != "null") {
            Some(option) => resolve(root, option),
            None => schema,
        }
    }

    #[test]
    fn the_schema_has_the_new_names_and_not_the_old_ones() {
        let root = serde_json::to_value(schemars::schema_for!(Config)).unwrap();
        for renamed in RENAMED {
            let mut schema = &root;
            for key in renamed.parent.split('.') {
                schema = resolve(&root, &schema["properties"][key]);
            }
            let has = |name: &str| match renamed.kind {
                Kind::Key => schema["properties"].get(name).is_some(),
                Kind::ListedValue => {
                    let values = resolve(&root, &schema["items"]);
                    let values = values["oneOf"].as_array().unwrap();
                    values.iter().any(|value| value["const"] == name)
                }
            };
            assert!(has(renamed.new), "{renamed}");
            assert!(!has(renamed.old), "{renamed}");
        }
    }
}
