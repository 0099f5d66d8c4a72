//! The token that ends a document: given, or recorded by the data.

use crate::{Error, config::Config};
use dataset::info::{DatasetInfo, SpecialToken};

/// Returns the token that ends documents by the records of all sources, if the run needs one and
/// `data.eod_token` does not give it.
///
/// # Errors
/// If a source has no record, or sources record different tokens.
pub fn recorded_eod_token(config: &Config) -> Result<Option<SpecialToken>, Error> {
    let Some(needed_by) = config.data.key_that_needs_eod_token() else {
        return Ok(None);
    };
    if config.data.eod_token.is_some() {
        return Ok(None);
    }
    let mut found: Option<(String, SpecialToken)> = None;
    for (key, source) in config.sources() {
        let info = DatasetInfo::of_tokens(&source.path)?;
        let Some(recorded) = info.and_then(|info| info.eos) else {
            return Err(Error::Config(format!(
                "data.{needed_by} needs data.eod_token, the token that ends a document, because \
                 no dataset.json records that of {key} ({}): give it, or leave {needed_by} out",
                source.path.display()
            )));
        };
        match &found {
            Some((first, token)) if token.id != recorded.id => {
                return Err(Error::Config(format!(
                    "{key} ends documents with token {}, and {first} with {}: the sources were \
                     made with different tokenizers",
                    recorded.id, token.id
                )));
            }
            Some(_) => {}
            None => found = Some((key, recorded)),
        }
    }
    Ok(found.map(|(_, token)| token))
}

/// Returns the token that ends documents, given or recorded.
///
/// # Errors
/// If a key needs a token that is neither given nor recorded, or the model does not have it.
pub(crate) fn eod_token(config: &Config) -> Result<Option<u32>, Error> {
    let recorded = recorded_eod_token(config)?.map(|token| token.id);
    let vocab_size = config.model.vocab_size;
    if let Some(token) = recorded
        && token as usize >= vocab_size
    {
        return Err(Error::Config(format!(
            "the data ends documents with token {token}, which is outside of model.vocab_size \
             {vocab_size}"
        )));
    }
    Ok(config.data.eod_token.or(recorded))
}

/// Tokens at the ends of the documents that a run was trained on.
#[derive(Debug, Default)]
pub(crate) struct DocumentTokens {
    pub(crate) begin: Option<u32>,
    pub(crate) end: Option<u32>,
}

impl DocumentTokens {
    /// Returns the tokens that the record of the first source names, with `data.eod_token` where it
    /// names no end. Data that is no longer there names none.
    pub(crate) fn of_run(config: &Config) -> DocumentTokens {
        let source = config.data.train.first();
        let record = source.and_then(|source| DatasetInfo::of_tokens(&source.path).ok().flatten());
        let DatasetInfo { bos, eos, .. } = record.unwrap_or_default();
        DocumentTokens {
            begin: bos.map(|token| token.id),
            end: eos.map(|token| token.id).or(config.data.eod_token),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::schedule::tests::config;
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

    fn record(folder: &Path, id: u32) {
        std::fs::create_dir_all(folder).unwrap();
        let eos = SpecialToken {
            id,
            text: "</s>".into(),
        };
        let info = DatasetInfo {
            eos: Some(eos),
            ..DatasetInfo::default()
        };
        let text = serde_json::to_string(&info).unwrap();
        std::fs::write(folder.join("dataset.json"), text).unwrap();
    }

    #[test]
    fn the_recorded_token_is_used_where_one_is_needed() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let needed = |extra: &str| recorded_eod_token(&config_of(folder, extra));
        let id = |extra: &str| needed(extra).unwrap().map(|token| token.id);
        let token = |extra: &str| eod_token(&config_of(folder, extra)).unwrap();
        assert_eq!(id(""), None);
        let refused = needed(", eod_mask_loss: true").unwrap_err().to_string();
        assert!(
            refused.contains("data.eod_mask_loss needs data.eod_token"),
            "{refused}"
        );
        record(&folder.join("a"), 7);
        assert!(needed(", eod_mask_loss: true").is_err());
        record(&folder.join("b"), 7);
        assert_eq!(id(", eod_mask_loss: true"), Some(7));
        assert_eq!(token(", eod_mask_loss: true"), Some(7));
        assert_eq!(token(", mask_documents: true"), Some(7));
        assert_eq!(token(", reset_positions: true"), Some(7));
        assert_eq!(id(", eod_mask_loss: true, eod_token: 3"), None);
        assert_eq!(token(", eod_mask_loss: true, eod_token: 3"), Some(3));
        assert_eq!(token(", eod_token: 3"), Some(3));
        assert_eq!(token(", mask_documents: false"), None);
        assert_eq!(id(""), None);
        record(&folder.join("b"), 8);
        let refused = needed(", eod_mask_loss: true").unwrap_err().to_string();
        assert!(refused.contains("different tokenizers"), "{refused}");
    }

    #[test]
    fn texts_end_as_the_documents_of_the_data() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let of_run = |extra: &str| {
            let DocumentTokens { begin, end } = DocumentTokens::of_run(&config_of(folder, extra));
            [begin, end]
        };
        assert_eq!(of_run(""), [None, None]);
        assert_eq!(of_run(", eod_token: 3"), [None, Some(3)]);
        record(&folder.join("a"), 7);
        assert_eq!(of_run(", eod_token: 3"), [None, Some(7)]);
    }
}
