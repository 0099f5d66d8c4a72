//! The tokens at the ends of a run's documents.

use super::records::Records;
use crate::{
    Error,
    config::{Config, DataConfig, DocumentRules},
};
use dataset::info::DatasetInfo;
use serde::{Deserialize, Serialize};

/// Tokens at the ends of the documents that a run is trained on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DocumentTokens {
    /// Recorded token that begins each document.
    #[serde(default)]
    pub(crate) begin: Option<u32>,
    /// Token that ends each document: given, or else recorded.
    #[serde(default)]
    pub(crate) end: Option<u32>,
}

impl DocumentTokens {
    /// Returns the tokens that a run is to be trained with.
    ///
    /// # Errors
    /// If a key needs a token that is neither given nor recorded.
    pub(crate) fn of_data(config: &Config, records: &Records) -> Result<DocumentTokens, Error> {
        let recorded = records.recorded_end().map_err(Error::Config)?;
        let begin = records.recorded_begin();
        Ok(DocumentTokens {
            begin: begin.map(|token| token.id),
            end: config.data.eod_token.or(recorded.map(|token| token.id)),
        })
    }

    /// Returns the tokens of a run that has trained: those that its state has, `saved`. States of
    /// earlier versions have none: then the end is the given one, and the rest is what the record
    /// of the first source names, if the data is still there.
    pub(crate) fn of_run(saved: Option<&DocumentTokens>, config: &Config) -> DocumentTokens {
        if let Some(saved) = saved {
            return saved.clone();
        }
        let source = config.data.train.first();
        let record = source.and_then(|source| DatasetInfo::of_tokens(&source.path).ok().flatten());
        let DatasetInfo { bos, eos, .. } = record.unwrap_or_default();
        DocumentTokens {
            begin: bos.map(|token| token.id),
            end: config.data.eod_token.or(eos.map(|token| token.id)),
        }
    }

    /// Takes the tokens of a saved state where none are known any more. Returns a warning if
    /// documents end with another token than that of the state.
    pub(crate) fn resume(&mut self, saved: &DocumentTokens) -> Option<String> {
        self.begin = self.begin.or(saved.begin);
        self.end = self.end.or(saved.end);
        let [now, before] = [self.end?, saved.end?];
        (now != before).then(|| {
            format!(
                "documents end with token {now}, and those of the saved state with token {before}"
            )
        })
    }

    /// Returns the treatment of the documents of a run that has trained.
    ///
    /// # Errors
    /// If a key of `data` needs the token that ends a document, and it is not known.
    pub(crate) fn rules(&self, data: &DataConfig) -> Result<Option<DocumentRules>, Error> {
        if let Some(needed_by) = data
            .key_that_needs_eod_token()
            .filter(|_| self.end.is_none())
        {
            return Err(Error::Config(format!(
                "the run has data.{needed_by}, but neither its checkpoint nor its configuration \
                 nor the dataset.json of its training data tells which token ends a document: \
                 restore that file"
            )));
        }
        Ok(data.document_rules(self.end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::SourceConfig, optim::schedule::tests::config};
    use dataset::info::SpecialToken;

    #[test]
    fn a_state_decides_and_then_the_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config("steps: 1, global_batch: 4 | constant: {lr: 1.0}");
        config.data.train = vec![SourceConfig::new(folder.path().join("train"))];
        let tokens = |begin, end| DocumentTokens { begin, end };
        let given = |config: &Config| Config {
            data: DataConfig {
                eod_token: Some(3),
                ..config.data.clone()
            },
            ..config.clone()
        };
        let of = |saved: Option<&DocumentTokens>, config: &Config| {
            let records = Records::read(config);
            let new = DocumentTokens::of_data(config, &records).unwrap();
            [DocumentTokens::of_run(saved, config), new]
        };
        assert_eq!(of(None, &config), [tokens(None, None), tokens(None, None)]);
        assert_eq!(of(None, &given(&config))[0], tokens(None, Some(3)));
        let token = |id| SpecialToken {
            id,
            text: "</s>".into(),
        };
        let info = DatasetInfo {
            eos: Some(token(7)),
            bos: Some(token(1)),
            ..DatasetInfo::default()
        };
        let text = serde_json::to_string(&info).unwrap();
        std::fs::write(folder.path().join("dataset.json"), text).unwrap();
        let recorded = tokens(Some(1), Some(7));
        assert_eq!(of(None, &config), [recorded.clone(), recorded.clone()]);
        let mixed = tokens(Some(1), Some(3));
        assert_eq!(of(None, &given(&config)), [mixed.clone(), mixed.clone()]);
        let saved = tokens(None, Some(5));
        assert_eq!(of(Some(&saved), &given(&config)), [saved.clone(), mixed]);
        let mut unknown = DocumentTokens::default();
        assert_eq!(unknown.resume(&recorded), None);
        assert_eq!(unknown, recorded);
        let change = unknown.resume(&saved).unwrap();
        assert!(
            change.contains("token 7") && change.contains("token 5"),
            "{change}"
        );
        assert_eq!(unknown, recorded);
    }

    #[test]
    fn a_key_that_needs_an_unknown_token_is_an_error() {
        let config = config("steps: 1, global_batch: 4 | constant: {lr: 1.0}");
        let mut data = config.data;
        let unknown = DocumentTokens::default();
        let known = DocumentTokens {
            begin: None,
            end: Some(7),
        };
        assert_eq!(unknown.rules(&data).unwrap(), None);
        assert_eq!(known.rules(&data).unwrap(), None);
        data.reset_positions = true;
        let refused = unknown.rules(&data).unwrap_err().to_string();
        assert!(refused.contains("data.reset_positions"), "{refused}");
        assert_eq!(known.rules(&data).unwrap().unwrap().end, 7);
    }
}
