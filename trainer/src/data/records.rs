//! The records of a run's sources (`dataset.json`): whether they fit the model, the run's
//! tokenizers and each other.

use crate::config::{Config, SourceConfig};
use dataset::{
    info::{DatasetInfo, InfoCache, SpecialToken},
    tokenizer::tokenizer_has_hash,
};
use std::{path::PathBuf, rc::Rc};

/// The records of all sources that a run reads.
pub struct Records<'a> {
    config: &'a Config,
    sources: Vec<RecordedSource<'a>>,
    /// Records that could not be read, one message each.
    unreadable: Vec<String>,
}

/// A source of data and its record, if it has one.
pub(crate) struct RecordedSource<'a> {
    /// The key of the source, such as `data.train[0]`.
    pub(crate) key: String,
    pub(crate) source: &'a SourceConfig,
    pub(crate) info: Option<Rc<DatasetInfo>>,
    /// The record of the mask of the source.
    pub(crate) mask_info: Option<Rc<DatasetInfo>>,
}

impl RecordedSource<'_> {
    fn end(&self) -> Option<&SpecialToken> {
        self.info.as_ref()?.eos.as_ref()
    }

    fn tokenizer_hash(&self) -> Option<&str> {
        self.info.as_ref()?.tokenizer_hash.as_deref()
    }
}

/// The result of a comparison of records with a configuration.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RecordCheck {
    /// Reasons why the run cannot use the data.
    pub problems: Vec<String>,
    /// Differences that are probably not meant.
    pub warnings: Vec<String>,
}

impl<'a> Records<'a> {
    /// Reads the record of each folder of data once.
    pub fn read(config: &'a Config) -> Records<'a> {
        let mut cache = InfoCache::default();
        let mut unreadable = Vec::new();
        let mut sources = Vec::new();
        for (key, source) in config.sources() {
            let mask = source.mask.as_deref();
            let [info, mask_info] = [Some(source.path.as_path()), mask].map(|path| {
                let read = cache.of_tokens(path?);
                let failed = |error| unreadable.push(format!("{key}.path: {error}"));
                read.map_err(failed).ok().flatten()
            });
            sources.push(RecordedSource {
                key,
                source,
                info,
                mask_info,
            });
        }
        // A mask is mostly in the folder of its source.
        unreadable.dedup();
        Records {
            config,
            sources,
            unreadable,
        }
    }

    /// Returns all sources, in the order of [`Config::sources`].
    pub(crate) fn sources(&self) -> &[RecordedSource<'a>] {
        &self.sources
    }

    /// Compares the records with the model, the tokenizers of the run, and each other. Reads no
    /// data.
    pub fn check(&self) -> RecordCheck {
        let mut check = RecordCheck {
            problems: self.unreadable.clone(),
            warnings: self.end_warning().into_iter().collect(),
        };
        let vocabularies = self.sources.iter();
        let vocabularies = vocabularies.filter_map(|source| self.vocabulary_problem(source));
        check.problems.extend(vocabularies);
        check.problems.extend(self.unequal_tokenizers());
        if check.problems.is_empty() {
            check.problems.extend(self.recorded_end().err());
        }
        self.compare_tokenizers(&mut check);
        let unread = self
            .sources
            .iter()
            .filter(|source| source.source.mask.is_none());
        let unread = unread.filter_map(|source| source.source.tokens().warning());
        check.warnings.extend(unread);
        check
    }

    /// Returns the token that ends the documents of the data, if it is recorded.
    ///
    /// # Errors
    /// If a key needs the token, none is given, and the records of all sources do not agree on one
    /// that the model has.
    pub(crate) fn recorded_end(&self) -> Result<Option<&SpecialToken>, String> {
        let mut recorded = self.sources.iter();
        let recorded = recorded.find_map(|source| Some((source, source.end()?)));
        let data = &self.config.data;
        let needed_by = data.key_that_needs_eod_token();
        let Some(needed_by) = needed_by.filter(|_| data.eod_token.is_none()) else {
            return Ok(recorded.map(|(_, end)| end));
        };
        let unrecorded = self.sources.iter().find(|source| source.end().is_none());
        if let Some(RecordedSource { key, source, .. }) = unrecorded {
            return Err(format!(
                "data.{needed_by} needs data.eod_token, the token that ends a document, because \
                 no dataset.json records that of {key} ({}): give it, or leave {needed_by} out",
                source.path.display()
            ));
        }
        let Some((first, end)) = recorded else {
            return Ok(None);
        };
        let mut others = self.sources.iter();
        let others = others.find(|source| source.end().is_some_and(|other| other.id != end.id));
        if let Some((other, other_end)) = others.and_then(|source| Some((source, source.end()?))) {
            return Err(format!(
                "{} ends documents with token {}, and {} with {}: the sources were made with \
                 different tokenizers",
                other.key, other_end.id, first.key, end.id
            ));
        }
        let vocab_size = self.config.model.vocab_size;
        if end.id as usize >= vocab_size {
            return Err(format!(
                "the data ends documents with token {}, which is outside of model.vocab_size \
                 {vocab_size}",
                end.id
            ));
        }
        Ok(Some(end))
    }

    /// Returns the token that begins the documents of the data, if it is recorded.
    pub(crate) fn recorded_begin(&self) -> Option<&SpecialToken> {
        let mut infos = self
            .sources
            .iter()
            .filter_map(|source| source.info.as_ref());
        infos.next()?.bos.as_ref()
    }

    fn vocabulary_problem(&self, source: &RecordedSource) -> Option<String> {
        let vocab_size = self.config.model.vocab_size;
        let recorded = source.info.as_ref()?.vocab_size;
        (recorded > vocab_size).then(|| {
            format!(
                "model.vocab_size {vocab_size} is less than the {recorded} of the data of {}, \
                 which its dataset.json records",
                source.key
            )
        })
    }

    fn unequal_tokenizers(&self) -> Vec<String> {
        let sources = self.sources.iter();
        let mut hashed = sources.filter_map(|source| Some((source, source.tokenizer_hash()?)));
        let Some((first, first_hash)) = hashed.next() else {
            return Vec::new();
        };
        let others = hashed.filter(|(_, hash)| *hash != first_hash);
        let problem = |source: &RecordedSource| {
            format!(
                "{} was made with another tokenizer than {}, as their dataset.json record: \
                 prepare all sources with the same tokenizer",
                source.key, first.key
            )
        };
        others.map(|(source, _)| problem(source)).collect()
    }

    /// Compares the tokenizer of the data with those of `data.tokenizer` and `model.from`.
    fn compare_tokenizers(&self, check: &mut RecordCheck) {
        let mut hashed = self.sources.iter();
        let hashed = hashed.find_map(|source| Some((source, source.tokenizer_hash()?)));
        let Some((source, hash)) = hashed else {
            return;
        };
        for file in self.tokenizer_files() {
            let path = file.path.display();
            let key = file.key;
            match tokenizer_has_hash(&file.path, hash) {
                Ok(true) => {}
                Ok(false) => check.problems.push(format!(
                    "{key}: {path} is another tokenizer than that of {}, as its dataset.json \
                     records: {}",
                    source.key, file.fix
                )),
                Err(error) => check.warnings.push(format!(
                    "{key}: the tokenizer cannot be compared with that of the data: {error}"
                )),
            }
        }
    }

    /// Returns the tokenizers that the configuration names, as far as they exist.
    fn tokenizer_files(&self) -> Vec<NamedTokenizer> {
        let given = self.config.data.tokenizer.clone();
        let given = given.map(|path| NamedTokenizer {
            key: "data.tokenizer",
            path,
            fix: "name the tokenizer of the data, or leave data.tokenizer out",
        });
        let from = self.config.model.from.as_ref();
        let from = from.map(|folder| NamedTokenizer {
            key: "model.from",
            path: folder.join("tokenizer.json"),
            fix: "prepare the data with the tokenizer of the model",
        });
        let named = given.into_iter().chain(from);
        named.filter(|file| file.path.is_file()).collect()
    }

    /// Warns of a given token that ends no documents of a source.
    fn end_warning(&self) -> Option<String> {
        let given = self.config.data.eod_token?;
        let differs = |source: &&RecordedSource| source.end().is_some_and(|end| end.id != given);
        let source = self.sources.iter().find(differs)?;
        let recorded = source.end()?;
        Some(format!(
            "data.eod_token is {given}, but the documents of {} end with token {} ({:?}), as its \
             dataset.json records: documents are kept apart, and losses masked, after {given} only",
            source.key, recorded.id, recorded.text
        ))
    }
}

/// A tokenizer that the configuration names.
struct NamedTokenizer {
    key: &'static str,
    path: PathBuf,
    /// The user's remedy if it is not that of the data.
    fix: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::schedule::tests::config;
    use serde_json::json;
    use std::path::Path;

    fn config_of(folder: &Path, extra: &str) -> Config {
        let mut config = config("steps: 1, global_batch: 4 | constant: {lr: 1.0}");
        let source = |name: &str| folder.join(name).display().to_string();
        let text = format!(
            "{{train: [{{path: {}}}, {{path: {}}}], sequence_length: 8{extra}}}",
            source("a/train"),
            source("b/train")
        );
        config.data = serde_saphyr::from_str(&text).unwrap();
        config
    }

    fn write(folder: &Path, info: &DatasetInfo) {
        std::fs::create_dir_all(folder).unwrap();
        let text = serde_json::to_string(info).unwrap();
        std::fs::write(folder.join("dataset.json"), text).unwrap();
    }

    fn ending_with(id: u32) -> DatasetInfo {
        DatasetInfo {
            eos: Some(SpecialToken {
                id,
                text: "</s>".into(),
            }),
            ..DatasetInfo::default()
        }
    }

    fn problems(config: &Config) -> String {
        Records::read(config).check().problems.join("; ")
    }

    #[test]
    fn the_recorded_token_is_used_where_none_is_given() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let check = |extra: &str| Records::read(&config_of(folder, extra)).check();
        let recorded = |extra: &str| {
            let config = config_of(folder, extra);
            let records = Records::read(&config);
            records.recorded_end().unwrap().map(|end| end.id)
        };
        assert_eq!(recorded(""), None);
        let masked = ", eod_mask_loss: true";
        let refused = check(masked).problems.join("; ");
        assert!(
            refused.contains("data.eod_mask_loss needs data.eod_token"),
            "{refused}"
        );
        write(&folder.join("a"), &ending_with(7));
        assert!(
            check(masked).problems[0].contains("no dataset.json records that of data.train[1]")
        );
        write(&folder.join("b"), &ending_with(7));
        for extra in [
            "",
            masked,
            ", mask_documents: true",
            ", reset_positions: true",
        ] {
            assert_eq!(check(extra), RecordCheck::default(), "{extra}");
            assert_eq!(recorded(extra), Some(7), "{extra}");
        }
        write(&folder.join("b"), &ending_with(6));
        let refused = check(masked).problems.join("; ");
        assert!(refused.contains("different tokenizers"), "{refused}");
        assert_eq!(check(""), RecordCheck::default());
        for name in ["a", "b"] {
            write(&folder.join(name), &ending_with(8));
        }
        let refused = check(masked).problems.join("; ");
        assert!(
            refused.contains("outside of model.vocab_size 8"),
            "{refused}"
        );
    }

    #[test]
    fn a_given_token_that_ends_no_documents_is_a_warning() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        write(&folder.join("a"), &ending_with(7));
        let check = |extra: &str| Records::read(&config_of(folder, extra)).check();
        assert_eq!(check(", eod_token: 7"), RecordCheck::default());
        let differs = check(", eod_token: 3");
        assert!(differs.problems.is_empty());
        assert_eq!(differs.warnings.len(), 1);
        let warning = &differs.warnings[0];
        assert!(
            warning.contains("data.eod_token is 3, but the documents of data.train[0] end with")
                && warning.contains("token 7 (\"</s>\")"),
            "{warning}"
        );
    }

    #[test]
    fn vocabularies_and_tokenizers_are_compared() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let made_by = |hash: &str, vocab_size: usize| DatasetInfo {
            tokenizer_hash: Some(hash.into()),
            vocab_size,
            ..DatasetInfo::default()
        };
        write(&folder.join("a"), &made_by("one", 8));
        write(&folder.join("b"), &made_by("one", 9));
        let config = config_of(folder, "");
        assert_eq!(
            problems(&config),
            "model.vocab_size 8 is less than the 9 of the data of data.train[1], which its \
             dataset.json records"
        );
        write(&folder.join("b"), &made_by("two", 8));
        assert!(problems(&config).starts_with("data.train[1] was made with another tokenizer"));
        std::fs::write(folder.join("b/dataset.json"), "{}").unwrap();
        assert!(problems(&config).contains("data.train[1].path: "));
    }

    #[test]
    fn the_tokenizers_of_the_run_are_compared_with_the_data() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let text = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
        });
        let text = text.to_string();
        let path = folder.join("tokenizer.json");
        std::fs::write(&path, &text).unwrap();
        let tokenizer = dataset::tokenizer::load_tokenizer(&path).unwrap();
        let canonical = tokenizer.to_string(false).unwrap();
        std::fs::write(folder.join("canonical.json"), &canonical).unwrap();
        let info = |hash: &str| DatasetInfo {
            tokenizer_hash: Some(hash.into()),
            vocab_size: 2,
            ..DatasetInfo::default()
        };
        let hash = dataset::checksum(&folder.join("canonical.json")).unwrap();
        let named = |name: &str| {
            config_of(
                folder,
                &format!(", tokenizer: {}", folder.join(name).display()),
            )
        };
        let mut from = config_of(folder, "");
        from.model.from = Some(folder.to_path_buf());
        write(&folder.join("a"), &info(&hash));
        for config in [
            named("tokenizer.json"),
            named("canonical.json"),
            from.clone(),
        ] {
            assert_eq!(Records::read(&config).check(), RecordCheck::default());
        }
        write(&folder.join("a"), &info("other"));
        assert!(problems(&from).contains("model.from: "));
        let refused = problems(&named("tokenizer.json"));
        assert!(
            refused.contains("tokenizer.json is another tokenizer than that of data.train[0]"),
            "{refused}"
        );
        // A file that is no tokenizer tells nothing, and one that does not exist is not used.
        std::fs::write(&path, "{}").unwrap();
        let check = Records::read(&from).check();
        assert!(
            check.problems.is_empty() && check.warnings.len() == 1,
            "{check:?}"
        );
        assert_eq!(
            Records::read(&named("none.json")).check(),
            RecordCheck::default()
        );
    }
}
