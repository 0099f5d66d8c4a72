//! Fingerprints of the data of a run, which its checkpoints keep.

use super::records::{RecordedSource, Records};
use crate::{
    Error,
    config::{Config, KeyChange},
};
use dataset::{Fingerprint, tokens::TokenPath};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Fingerprints of all sources, in the order of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DataFingerprints {
    pub(crate) train: Vec<SourceFingerprint>,
    #[serde(default)]
    pub(crate) validation: Vec<SourceFingerprint>,
}

/// Fingerprints of a source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SourceFingerprint {
    #[serde(flatten)]
    pub(crate) contents: Fingerprint,
    /// That of the mask, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mask: Option<Fingerprint>,
}

impl SourceFingerprint {
    fn read(recorded: &RecordedSource) -> Result<SourceFingerprint, Error> {
        let source = recorded.source;
        let mask_info = recorded.mask_info.as_deref();
        let mask = source.mask.as_deref().map(TokenPath::megatron);
        let mask = mask.map(|mask| Fingerprint::of(&mask, mask_info));
        Ok(SourceFingerprint {
            contents: Fingerprint::of(&source.tokens(), recorded.info.as_deref())?,
            mask: mask.transpose()?,
        })
    }

    /// True unless tokens or masks differ. A source with a mask and one without are not compared:
    /// that is a change of the configuration.
    fn matches(&self, other: &SourceFingerprint) -> bool {
        self.contents.matches(&other.contents) && self.has_mask_of(other)
    }

    fn has_mask_of(&self, other: &SourceFingerprint) -> bool {
        let masks = self.mask.as_ref().zip(other.mask.as_ref());
        masks.is_none_or(|(one, other)| one.matches(other))
    }
}

impl DataFingerprints {
    /// Reads parts of all files of the run.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(crate) fn read(config: &Config, records: &Records) -> Result<DataFingerprints, Error> {
        let all = records.sources().iter().map(SourceFingerprint::read);
        let mut train: Vec<SourceFingerprint> = all.collect::<Result<_, _>>()?;
        let validation = train.split_off(config.data.train.len());
        Ok(DataFingerprints { train, validation })
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
                if !now.has_mask_of(saved) {
                    warnings.push(format!(
                        "the mask of data.{list}[{index}] ({path}) is not that of the saved state"
                    ));
                }
                if now.contents.matches(&saved.contents) {
                    continue;
                }
                let count = now.contents.tokens;
                let tokens = if count == saved.contents.tokens {
                    format!("{count} tokens, others than before")
                } else {
                    format!("{count} tokens instead of {}", saved.contents.tokens)
                };
                warnings.push(format!(
                    "the contents of data.{list}[{index}] ({path}) are not those of the saved \
                     state: {tokens}"
                ));
            }
        }
        warnings
    }

    /// True if the saved state may have been validated on the same data.
    pub(crate) fn validates_as(&self, saved: &DataFingerprints) -> bool {
        let pairs = self.validation.iter().zip(&saved.validation);
        pairs.into_iter().all(|(now, saved)| now.matches(saved))
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
        let pairs = now.iter().zip(saved);
        let compared = pairs.map(|(now, saved)| now.mask.is_some() && saved.mask.is_some());
        let compared: Vec<bool> = compared.collect();
        let [now, saved] =
            [&change.now, &change.saved].map(|sources| without_paths(sources, &compared));
        is_same && now == saved
    }
}

/// Removes paths, also those of masks whose contents are known.
fn without_paths(sources: &Value, has_known_mask: &[bool]) -> Value {
    let mut sources = sources.clone();
    let listed = sources.as_array_mut().into_iter().flatten();
    for (source, has_known_mask) in listed.zip(has_known_mask) {
        if let Some(source) = source.as_object_mut() {
            source.remove("path");
            if *has_known_mask {
                source.remove("mask");
            }
        }
    }
    sources
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::SourceConfig, optim::schedule::tests::config};
    use serde_json::json;

    fn print(sample: &str) -> Fingerprint {
        Fingerprint {
            tokens: 5,
            sample: sample.into(),
            recorded: None,
        }
    }

    fn source(sample: &str, mask: Option<&str>) -> SourceFingerprint {
        SourceFingerprint {
            contents: print(sample),
            mask: mask.map(print),
        }
    }

    fn prints(train: &[&str]) -> DataFingerprints {
        DataFingerprints {
            train: train.iter().map(|sample| source(sample, None)).collect(),
            validation: Vec::new(),
        }
    }

    fn masked(mask: Option<&str>) -> DataFingerprints {
        DataFingerprints {
            train: vec![source("1", mask)],
            validation: vec![source("1", mask)],
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

    #[test]
    fn masks_are_compared() {
        let mut config = config("steps: 1, global_batch: 4 | constant: {lr: 1.0}");
        config.data.train = vec![SourceConfig::new("a")];
        config.data.validation.clone_from(&config.data.train);
        let now = masked(Some("2"));
        assert!(now.changes_since(&now, &config).is_empty() && now.validates_as(&now));
        let other = masked(Some("3"));
        assert_eq!(
            now.changes_since(&other, &config)[0],
            "the mask of data.train[0] (a) is not that of the saved state"
        );
        assert!(!now.validates_as(&other) && now.validates_as(&masked(None)));
        let change = KeyChange {
            key: "data.train".into(),
            saved: json!([{"path": "a", "mask": "m"}]),
            now: json!([{"path": "new/a", "mask": "new/m"}]),
            effect: crate::config::ResumeEffect::Reported,
        };
        assert!(now.only_moved(&now, &change));
        assert!(!now.only_moved(&other, &change));
        // The state of a version that kept no fingerprint of masks.
        assert!(!now.only_moved(&masked(None), &change));
        let text = serde_json::to_string(&now).unwrap();
        assert_eq!(
            serde_json::from_str::<DataFingerprints>(&text).unwrap(),
            now
        );
        let without = text.replace(r#","mask":{"tokens":5,"sample":"2"}"#, "");
        let read: DataFingerprints = serde_json::from_str(&without).unwrap();
        assert_eq!(read, masked(None), "{without}");
    }
}
