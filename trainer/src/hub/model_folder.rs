//! The folder of a Hugging Face model whose tensors are all accounted for.

use super::{
    config_json::ConfigJson,
    encoding::LogicalTable,
    folder::TensorTable,
    mapping::{Account, Mapping},
    reader::FolderReader,
};
use crate::{Error, config::ModelConfig, families::Family, model::Model};
use checkpoint::TensorSlice;
use rayon::prelude::*;
use std::path::Path;
use tch::Tensor;

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
        let config = ConfigJson::read(path)?;
        let family = Family::of(&config)?;
        let model = family.rules().read(&config)?;
        let table = LogicalTable::new(TensorTable::read(path)?, &config)?;
        let has = |name: &str| table.tensors.contains_key(name);
        let mapping = Mapping::new(family, &model, &has)?;
        let account = mapping.account(family, &model, &table)?;
        let reader = FolderReader { mapping, table };
        for name in &account.repeated {
            reader.check_repeated(name)?;
        }
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

    /// Copies the weights to this rank's parts of a model.
    ///
    /// # Errors
    /// If the model is another one, or a file cannot be read.
    pub fn load(&self, model: &Model) -> Result<(), Error> {
        let parameters = model.parameters.iter();
        let slices = parameters.flat_map(|parameter| parameter.slices(&parameter.master));
        let biases = model.biases().map(|(_, name, bias)| {
            let slice = TensorSlice::whole(name, &bias.size());
            (slice, bias)
        });
        let mut targets: Vec<(TensorSlice, Tensor)> = slices.chain(biases).collect();
        // In the order of the files, which each thread reads forward.
        targets.sort_by_cached_key(|(slice, _)| self.reader.position(&slice.name));
        let read = |(slice, into): (TensorSlice, Tensor)| self.reader.read_into(&slice, &into);
        targets.into_par_iter().try_for_each(read)?;
        for parameter in model.parameters.iter() {
            parameter.sync_from_master();
        }
        Ok(())
    }
}
