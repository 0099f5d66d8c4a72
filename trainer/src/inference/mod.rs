//! A trained model out of a checkpoint, whole on this process's CPU.

pub(crate) mod generate;
pub(crate) mod routing;

use crate::Error;
use crate::config::Config;
use crate::model::{BuildContext, Model, ModelPart};
use crate::process_groups::ProcessGroups;
use crate::train::checkpointing::{read_run_state, restore_weights};
use checkpoint::Checkpoint;
use parallel::Cpu;
use std::path::{Path, PathBuf};

/// What was read.
pub(crate) struct LoadedModel {
    /// The checkpoint.
    pub(crate) path: PathBuf,
    pub(crate) step: u64,
    pub(crate) config: Config,
    pub(crate) model: Model,
}

impl LoadedModel {
    /// From a run's folder (its newest usable checkpoint), its folder of checkpoints, or one checkpoint.
    pub(crate) fn open(path: &Path) -> Result<LoadedModel, Error> {
        let mut checkpoint = open(path)?;
        let state = read_run_state(&checkpoint)?;
        let path = checkpoint.path().to_path_buf();
        let config: Config = serde_json::from_value(state.config).map_err(|e| {
            Error::Resume(format!(
                "{}: its configuration cannot be read: {e}",
                path.display()
            ))
        })?;
        let alone = ProcessGroups::single_rank();
        let ctx = BuildContext::single_rank(
            config.data.sequence_length,
            config.train.dtype,
            &Cpu,
            &alone,
        );
        let model = Model::new(&config.model, ModelPart::whole(config.model.layers), &ctx);
        restore_weights(&mut checkpoint, &model)?;
        Ok(LoadedModel {
            path,
            step: state.step,
            config,
            model,
        })
    }
}

/// The newest usable checkpoint of a run, or the one that is named.
fn open(path: &Path) -> Result<Checkpoint, Error> {
    if path.join("manifest.json").exists() {
        return checked(path);
    }
    let inner = path.join("checkpoints");
    let root = if inner.is_dir() { &inner } else { path };
    let mut reasons = Vec::new();
    for candidate in checkpoint::list(root)? {
        match checked(&candidate) {
            Ok(checkpoint) => return Ok(checkpoint),
            Err(error) => reasons.push(error.to_string()),
        }
    }
    Err(Error::Resume(if reasons.is_empty() {
        format!(
            "there is no checkpoint in {}: name a run's folder or a step-NNNNNNNN folder",
            path.display()
        )
    } else {
        format!(
            "no checkpoint in {} can be used: {}",
            path.display(),
            reasons.join("; ")
        )
    }))
}

fn checked(path: &Path) -> Result<Checkpoint, Error> {
    let checkpoint = Checkpoint::open(path)?;
    for file in 0..checkpoint.manifest().files.len() {
        checkpoint.verify_file(file)?;
    }
    Ok(checkpoint)
}
