//! A trained model from a checkpoint.

use crate::{
    Error,
    config::Config,
    model::{BuildContext, Model, ModelPart},
    process_groups::ProcessGroups,
    train::checkpointing::{read_run_state, restore_model, saved_config},
};
use checkpoint::Checkpoint;
use parallel::Cpu;
use std::path::{Path, PathBuf};

/// A model with the configuration that it was trained with.
pub(crate) struct LoadedModel {
    /// Folder of the checkpoint.
    pub(crate) path: PathBuf,
    pub(crate) step: u64,
    pub(crate) config: Config,
    pub(crate) model: Model,
}

impl LoadedModel {
    /// Loads one checkpoint, or the newest usable one of a run's folder or its `checkpoints`
    /// folder.
    pub(crate) fn open(path: &Path) -> Result<LoadedModel, Error> {
        let mut checkpoint = find_checkpoint(path)?;
        let state = read_run_state(&checkpoint)?;
        let path = checkpoint.path().to_path_buf();
        let config = saved_config(&checkpoint, &state)?;
        let groups = ProcessGroups::single_rank();
        let sequence_length = config.data.sequence_length;
        let ctx = BuildContext::single_rank(sequence_length, config.train.dtype, &Cpu, &groups);
        let model = Model::new(&config.model, ModelPart::whole(config.model.layers), &ctx);
        restore_model(&mut checkpoint, &model)?;
        Ok(LoadedModel {
            path,
            step: state.step,
            config,
            model,
        })
    }
}

fn find_checkpoint(path: &Path) -> Result<Checkpoint, Error> {
    if path.join("manifest.json").exists() {
        return open_verified(path);
    }
    let inner = path.join("checkpoints");
    let root = if inner.is_dir() { &inner } else { path };
    let mut reasons = Vec::new();
    for candidate in checkpoint::list(root)? {
        match open_verified(&candidate) {
            Ok(checkpoint) => return Ok(checkpoint),
            Err(error) => reasons.push(error.to_string()),
        }
    }
    let folder = path.display();
    Err(Error::Resume(if reasons.is_empty() {
        format!("no checkpoint in {folder}: name a run's folder or a step-NNNNNNNN folder")
    } else {
        let reasons = reasons.join("; ");
        format!("no checkpoint in {folder} can be used: {reasons}")
    }))
}

fn open_verified(path: &Path) -> Result<Checkpoint, Error> {
    let checkpoint = Checkpoint::open(path)?;
    for file in 0..checkpoint.manifest().files.len() {
        checkpoint.verify_file(file)?;
    }
    Ok(checkpoint)
}
