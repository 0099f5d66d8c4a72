//! Folders in the form of Hugging Face models: `config.json` and safetensors files.
//!
//! A [`folder::TensorTable`] lists the stored tensors, [`encoding::LogicalTable`] their values
//! without quantization. [`mapping::Mapping`] says which rows of the model's tensors are which rows
//! of the folder's, by the names of a family (`families/`). Import and export read the same
//! mapping in opposite directions.

/// Takes the bytes that are done, and all.
pub type ByteProgress<'a> = dyn Fn(u64, u64) + Sync + 'a;

pub(crate) mod config_json;
#[cfg(test)]
mod damage;
pub(crate) mod encoding;
pub(crate) mod export;
pub(crate) mod folder;
#[cfg(test)]
mod golden;
pub(crate) mod import;
pub(crate) mod mapping;
pub(crate) mod model_folder;
pub(crate) mod reader;
#[cfg(test)]
mod readers;
pub(crate) mod rule;
pub(crate) mod section;
mod shards;
pub(crate) mod upcycle;
pub(crate) mod values;
mod writer;
