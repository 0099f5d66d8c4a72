//! A checkpoint with the weights of a folder, from which a run starts at step 0.

use super::{ByteProgress, export::refuse_files, mapping::MappedTensor, model_folder::ModelFolder};
use crate::{
    Error,
    config::Config,
    train::{
        run_state::{CountedFrom, RunState},
        saved_config::{generator_name, saved_name},
    },
};
use checkpoint::{Shard, Staging, TensorSlice};
use dataset::order::OrderVersion;
use parallel::{Accelerator, Cpu};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Bytes of a file of the checkpoint at most, unless one tensor has more.
const SHARD_BYTES: u64 = 1 << 30;

/// Longest sequence of the run that the checkpoint describes; the run that resumes names its own.
const MAX_SEQUENCE: usize = 4096;

/// The outcome of an import.
#[derive(Debug, Clone)]
pub struct ImportReport {
    /// Folder of the checkpoint.
    pub path: PathBuf,
    pub tensors: usize,
    pub bytes: u64,
}

/// Writes the weights of a folder, in fp32, as the checkpoint of step 0 of the run's folder
/// `output`. Calls `progress` with the bytes that are done and all.
///
/// # Errors
/// If moerun cannot compute the model, `output` has files, or a file cannot be read or written.
pub fn import(
    folder: &Path,
    output: &Path,
    progress: &ByteProgress,
) -> Result<ImportReport, Error> {
    let source = ModelFolder::open(folder)?;
    source.check_repeated()?;
    refuse_files(output, "name the folder of a new run")?;
    let state = state_of(&source, folder, output)?;
    let state = serde_json::to_value(state).expect("a state is plain data");
    std::fs::create_dir_all(output).map_err(Error::io("cannot create", output))?;
    let checkpoints = output.join("checkpoints");
    let staging = Staging::new(&checkpoints, 0);
    let written = write_checkpoint(&source, &staging, state, progress);
    let path = written.inspect_err(|_| {
        staging.discard();
        // Fails if it has anything else.
        let _ = std::fs::remove_dir(&checkpoints);
    })?;
    let tensors = &source.reader.mapping.tensors;
    Ok(ImportReport {
        path,
        tensors: tensors.len(),
        bytes: tensors.iter().map(bytes_of).sum(),
    })
}

/// Writes all tensors and the state, and returns the path of the checkpoint.
fn write_checkpoint(
    source: &ModelFolder,
    staging: &Staging,
    state: Value,
    progress: &ByteProgress,
) -> Result<PathBuf, Error> {
    let tensors = &source.reader.mapping.tensors;
    let total = tensors.iter().map(bytes_of).sum();
    staging.begin()?;
    let mut shards: Vec<Shard> = Vec::new();
    let mut done = 0;
    for group in groups(tensors) {
        let mut values = Vec::new();
        for tensor in group {
            values.push(source.values_of(tensor)?);
            done += bytes_of(tensor);
        }
        if shards.is_empty() {
            values.push(generator()?);
        }
        shards.push(staging.write_shard(shards.len(), values)?);
        progress(done, total);
    }
    Ok(staging.commit(shards, tensors.len() + 1, state)?)
}

/// Returns the length of a tensor in fp32.
fn bytes_of(tensor: &MappedTensor) -> u64 {
    4 * tensor.shape.iter().product::<u64>()
}

/// Divides tensors into the files of the checkpoint, in their order.
fn groups(tensors: &[MappedTensor]) -> Vec<Vec<&MappedTensor>> {
    let mut groups: Vec<Vec<&MappedTensor>> = Vec::new();
    let mut filled = u64::MAX;
    for tensor in tensors {
        let bytes = bytes_of(tensor);
        if filled.saturating_add(bytes) > SHARD_BYTES {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        groups.last_mut().expect("a group was begun").push(tensor);
    }
    groups
}

/// Returns the state of the random generator of the one rank that the checkpoint is of.
fn generator() -> Result<(TensorSlice, Tensor), Error> {
    let state = Cpu.generator_state()?;
    let slice = TensorSlice::whole(generator_name(0), &state.size());
    Ok((slice, state))
}

/// Returns the state of a run that has done nothing.
fn state_of(source: &ModelFolder, folder: &Path, output: &Path) -> Result<RunState, Error> {
    let longest = source.longest_sequence()?.unwrap_or(MAX_SEQUENCE);
    let text = |path: &Path| {
        let text = path.to_str().map(str::to_string);
        text.ok_or_else(|| {
            let path = path.display();
            Error::Folder(format!("{path}: a path has to be valid UTF-8"))
        })
    };
    // An export takes the tokenizer and what moerun does not train from there.
    let from = std::path::absolute(folder).map_err(Error::io("cannot open", folder))?;
    let mut model = serde_json::to_value(source.model()).expect("a model is plain data");
    model["from"] = text(&from)?.into();
    let config = json!({
        "run": {"dir": text(output)?},
        "model": model,
        "data": {"train": [{"path": "data"}], "sequence_length": longest.min(MAX_SEQUENCE)},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
    });
    let config: Config = serde_json::from_value(config)
        .map_err(|error| Error::Config(format!("the model of the folder: {error}")))?;
    let config = serde_json::to_value(config).expect("a configuration is plain data");
    Ok(RunState {
        step: 0,
        samples: 0,
        tokens: 0,
        ranks: 1,
        min_tokens: None,
        placement: None,
        counted_from: Some(CountedFrom::default()),
        state_starts: Default::default(),
        order: Some(OrderVersion::default()),
        data: None,
        document_tokens: None,
        config,
    })
}

impl ModelFolder {
    /// Returns all values of a tensor in fp32, under the name that a checkpoint has.
    fn values_of(&self, tensor: &MappedTensor) -> Result<(TensorSlice, Tensor), Error> {
        let shape: Vec<i64> = tensor.shape.iter().map(|&size| size as i64).collect();
        let values = Tensor::empty(shape.as_slice(), (Kind::Float, Device::Cpu));
        self.reader
            .read_into(&TensorSlice::whole(&tensor.name, &shape), &values)?;
        let name = saved_name(&tensor.name, tensor.is_selection_bias);
        Ok((TensorSlice::whole(name, &shape), values))
    }
}
