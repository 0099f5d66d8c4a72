//! Fingerprints of the data of a run, which its checkpoints keep.

use crate::{
    Error,
    config::{Config, KeyChange, SourceConfig},
};
use dataset::Fingerprint;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Fingerprints of all sources, in the order of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DataFingerprints {
    pub(crate) train: Vec<Fingerprint>,
    #[serde(default)]
    pub(crate) validation: Vec<Fingerprint>,
}

impl DataFingerprints {
    /// Reads parts of all files of the run.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(crate) fn read(config: &Config) -> Result<DataFingerprints, Error> {
        let read = |sources: &[SourceConfig]| -> Result<Vec<Fingerprint>, Error> {
            let prints = sources
                .iter()
                .map(|source| Fingerprint::of(&source.tokens()));
            Ok(prints.collect::<Result<_, _>>()?)
        };
        Ok(DataFingerprints {
            train: read(&config.data.train)?,
            validation: match config.validation {
                Some(_) => read(&config.data.validation)?,
                None => Vec::new(),
            },
        })
    }

    /// Returns a warning for each source of `config` whose contents are not those that `saved`
    /// has. Sources that were added or removed are changes of the configuration.
    pub(crate) fn changes_since(&self, saved: &DataFingerprints, config: &Config) -> Vec<String> {
        let data = &config.data;
        let mut warnings = Vec::new();
        for (list, sources, now, saved) in [
            ("train", &data.train, &self.train, &saved.train),
            (
                "validation",
                &data.validation,
                &self.validation,
                &saved.validation,
            ),
        ] {
            if now.len() != saved.len() {
                continue;
            }
            let pairs = now.iter().zip(saved).enumerate();
            for (index, (now, saved)) in pairs.filter(|(_, (now, saved))| !now.matches(saved)) {
                let path = sources[index].path.display();
                let tokens = if now.tokens == saved.tokens {
                    format!("{} tokens, others than before", now.tokens)
                } else {
                    format!("{} tokens instead of {}", now.tokens, saved.tokens)
                };
                warnings.push(format!(
                    "the contents of data.{list}[{index}] ({path}) are not those of the saved \
                     state: {tokens}"
                ));
            }
        }
        warnings
    }

    /// Returns true for a change of `data.train` or `data.validation` that only names other places
    /// of the same contents.
    pub(crate) fn only_moved(&self, saved: &DataFingerprints, change: &KeyChange) -> bool {
        let (now, saved) = match change.key.as_str() {
            "data.train" => (&self.train, &saved.train),
            "data.validation" => (&self.validation, &saved.validation),
            _ => return false,
        };
        let is_same = now.len() == saved.len()
            && !now.is_empty()
            && now.iter().zip(saved).all(|(now, saved)| now.matches(saved));
        is_same && without_paths(&change.now) == without_paths(&change.saved)
    }
}

fn without_paths(sources: &Value) -> Value {
    let mut sources = sources.clone();
    for source in sources.as_array_mut().into_iter().flatten() {
        if let Some(source) = source.as_object_mut() {
            source.remove("path");
        }
    }
    sources
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::schedule::tests::config;
    use serde_json::json;

    fn print(sample: &str) -> Fingerprint {
        Fingerprint {
            tokens: 5,
            sample: sample.into(),
            recorded: None,
        }
    }

    fn prints(train: &[&str]) -> DataFingerprints {
        DataFingerprints {
            train: train.iter().map(|sample| print(sample)).collect(),
            validation: Vec::new(),
        }
    }

    #[test]
    fn changed_contents_are_named() {
        let mut config = config("steps: 1, global_batch: 4 | constant: {lr: 1.0}");
        config.data.train = vec![SourceConfig::new("a"), SourceConfig::new("b")];
        let now = prints(&["1", "2"]);
        assert!(now.changes_since(&now, &config).is_empty());
        let warnings = now.changes_since(&prints(&["1", "3"]), &config);
        assert_eq!(
            warnings,
            [
                "the contents of data.train[1] (b) are not those of the saved state: 5 tokens, \
              others than before"
            ]
        );
        assert!(now.changes_since(&prints(&["1"]), &config).is_empty());
    }

    #[test]
    fn a_moved_source_is_no_change() {
        let change = |saved: Value| KeyChange {
            key: "data.train".into(),
            saved,
            now: json!([{"path": "new/a", "weight": 1.0}]),
            effect: crate::config::ResumeEffect::Reported,
        };
        let moved = change(json!([{"path": "a", "weight": 1.0}]));
        let now = prints(&["1"]);
        assert!(now.only_moved(&now, &moved));
        assert!(!now.only_moved(&prints(&["2"]), &moved));
        let weight = change(json!([{"path": "a", "weight": 2.0}]));
        assert!(!now.only_moved(&now, &weight));
        assert!(!prints(&[]).only_moved(&prints(&[]), &moved));
    }
}
