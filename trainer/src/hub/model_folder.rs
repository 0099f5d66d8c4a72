//! The folder of a Hugging Face model whose tensors are all accounted for.

use super::{
    ByteProgress,
    config_json::ConfigJson,
    encoding::LogicalTable,
    folder::TensorTable,
    mapping::{Account, Mapping},
    reader::FolderReader,
};
use crate::{Error, config::ModelConfig, families::Family, model::Model};
use checkpoint::TensorSlice;
use rayon::prelude::*;
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};
use tch::Tensor;

/// A token, or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(u32),
    Several(Vec<u32>),
}

/// A folder with `config.json` and safetensors files.
pub struct ModelFolder {
    pub(crate) config: ConfigJson,
    pub(crate) family: Family,
    model: ModelConfig,
    pub(crate) reader: FolderReader,
    pub(crate) account: Account,
}

impl ModelFolder {
    /// Opens a folder and accounts for all its tensors by name, shape and dtype.
    ///
    /// # Errors
    /// If moerun cannot compute the model, or the folder is damaged or incomplete: with the file
    /// and the key.
    pub fn open(path: &Path) -> Result<ModelFolder, Error> {
        ModelFolder::with_table(ConfigJson::read(path)?, TensorTable::read(path)?)
    }

    /// Opens a folder whose headers another rank has read.
    ///
    /// # Errors
    /// As [`ModelFolder::open`].
    pub(crate) fn with_table(config: ConfigJson, table: TensorTable) -> Result<ModelFolder, Error> {
        let (family, model) = Family::read(&config)?;
        // The smallest elements have 4 bits. This bounds the work below by the size of the files.
        let parameters = model.num_parameters().total;
        let stored: u64 = table.tensors.values().map(|tensor| tensor.bytes()).sum();
        if parameters > 2 * u128::from(stored) {
            return Err(Error::Folder(format!(
                "{}: the model has {parameters} parameters, and all tensors have {stored} bytes",
                config.path().display()
            )));
        }
        let table = LogicalTable::new(table, &config)?;
        let has = |name: &str| table.tensors.contains_key(name);
        let mapping = Mapping::new(family, &model, &has)?;
        let account = mapping.account(family, &model, &table)?;
        let reader = FolderReader { mapping, table };
        Ok(ModelFolder {
            config,
            family,
            model,
            reader,
            account,
        })
    }

    /// Returns the model of the folder, for training from its weights.
    pub fn model(&self) -> &ModelConfig {
        &self.model
    }

    /// Compares the tensors that repeat others with them.
    ///
    /// # Errors
    /// If they differ, or a file cannot be read.
    pub fn check_repeated(&self) -> Result<(), Error> {
        let mut repeated = self.account.repeated.iter();
        repeated.try_for_each(|name| self.reader.check_repeated(name))
    }

    /// Returns the key `max_position_embeddings`.
    ///
    /// # Errors
    /// If it is no number.
    pub(crate) fn longest_sequence(&self) -> Result<Option<usize>, Error> {
        self.config.get("max_position_embeddings")
    }

    /// Returns the token that begins a text, or else the first of those that end one.
    ///
    /// # Errors
    /// If a key is no token and no list of tokens.
    pub(crate) fn start_token(&self) -> Result<Option<u32>, Error> {
        let begin = tokens(&self.config, "bos_token_id")?;
        let end = tokens(&self.config, "eos_token_id")?;
        Ok(begin.into_iter().chain(end).next())
    }

    /// Returns the tokens that end a text: those of `config.json`, and of `generation_config.json`,
    /// which has more of them for chat models.
    ///
    /// # Errors
    /// If a file cannot be read, or a key is no token and no list of tokens.
    pub(crate) fn end_tokens(&self) -> Result<Vec<u32>, Error> {
        let mut end = tokens(&self.config, "eos_token_id")?;
        let folder = &self.reader.table.table.folder;
        if let Some(generation) = ConfigJson::read_generation(folder)? {
            end.extend(tokens(&generation, "eos_token_id")?);
        }
        Ok(end)
    }

    /// Returns the name of the family, which is its `model_type`.
    pub fn family(&self) -> &'static str {
        self.family.name()
    }

    /// Returns the number of stored tensors.
    pub fn num_tensors(&self) -> usize {
        self.reader.table.table.tensors.len()
    }

    /// Returns the bytes of all stored tensors, by their dtype.
    pub fn bytes_by_dtype(&self) -> BTreeMap<String, u64> {
        let mut bytes = BTreeMap::new();
        for tensor in self.reader.table.table.tensors.values() {
            *bytes.entry(format!("{:?}", tensor.dtype)).or_default() += tensor.bytes();
        }
        bytes
    }

    /// Returns the tensors that moerun does not train and an export copies.
    pub fn carried(&self) -> &[String] {
        &self.account.carried
    }

    /// Returns what a user should know about a run that starts from the folder as `model`, one line
    /// each.
    pub(crate) fn notes(&self, model: &ModelConfig) -> Vec<String> {
        let mut notes = vec![format!(
            "starting from the weights of {} ({})",
            self.reader.table.table.folder.display(),
            self.family.name()
        )];
        let carried = self.account.carried.len();
        if carried > 0 {
            notes.push(format!(
                "{carried} tensors are not trained, such as {}; an export copies them",
                self.account.carried[0]
            ));
        }
        if let Some(moe) = &model.moe
            && moe.load_balance == 0.0
            && moe.bias_update_rate == 0.0
        {
            notes.push(
                "routers are trained without a load-balancing loss and without updates of biases: \
                 set model.moe.load_balance or bias_update_rate to change that"
                    .to_string(),
            );
        }
        notes
    }

    /// Copies the weights to a whole model. Calls `progress` as [`ModelFolder::read`] does.
    ///
    /// # Errors
    /// If the model is another one, or a file cannot be read.
    pub fn load(&self, model: &Model, progress: &ByteProgress) -> Result<(), Error> {
        self.check_repeated()?;
        let parameters = model.parameters.iter();
        let slices = parameters.flat_map(|parameter| parameter.slices(&parameter.master));
        self.read(slices.chain(bias_slices(model)).collect(), progress)?;
        for parameter in model.parameters.iter() {
            parameter.sync_from_master();
        }
        model.mark_stale();
        Ok(())
    }

    /// Copies slices of tensors to their targets. Calls `progress` with the bytes of the files that
    /// are done and all.
    ///
    /// # Errors
    /// If the folder has no such tensor, or a file cannot be read.
    pub(crate) fn read(
        &self,
        mut targets: Vec<(TensorSlice, Tensor)>,
        progress: &ByteProgress,
    ) -> Result<(), Error> {
        // In the order of the files, which each thread reads forward.
        targets.sort_by_cached_key(|(slice, _)| self.reader.position(&slice.name));
        let stored = |(slice, _): &(TensorSlice, Tensor)| self.reader.stored_bytes(slice);
        let total = targets.iter().map(stored).sum();
        let done = AtomicU64::new(0);
        targets.into_par_iter().try_for_each(|(slice, into)| {
            self.reader.read_into(&slice, &into)?;
            let bytes = self.reader.stored_bytes(&slice);
            progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
            Ok(())
        })
    }
}

/// Returns the biases that select experts, with their slices.
pub(crate) fn bias_slices(model: &Model) -> impl Iterator<Item = (TensorSlice, Tensor)> {
    model.biases().map(|(_, name, bias)| {
        let slice = TensorSlice::whole(name, &bias.size());
        (slice, bias)
    })
}

/// Returns the tokens that a key of a configuration names.
fn tokens(config: &ConfigJson, key: &str) -> Result<Vec<u32>, Error> {
    Ok(match config.get(key)? {
        Some(TokenIds::One(token)) => vec![token],
        Some(TokenIds::Several(tokens)) => tokens,
        None => Vec::new(),
    })
}
