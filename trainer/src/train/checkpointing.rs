//! Checkpoints of a run: its state as named tensors, saved and restored by all ranks together.
//!
//! # Collective
//! All ranks call [`plan_save`], [`save`] and [`resume`] at the same point.

use super::{
    accounting::{Mismatch, Shapes, account, account_alone, held_shapes, saved_shapes},
    inspection::{FolderPaths, inspect_together, list_on_rank_0, none_usable, set_damaged_aside},
    resume_rules::{AllowedChanges, ResumeRules, mismatch_error},
    run_state::RunState,
    saved_config::{has_kind, kind, read_run_state, saved_config},
};
use crate::{Error, config::Config, model::Model, optim::Optimizer};
use checkpoint::{Checkpoint, Shard, Staging, TensorSlice, assign_owners};
use parallel::{
    Accelerator, Communicator,
    agreement::{AgreementError, agree, all_gather_bytes, decode_peer_message},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};
use tch::{Kind, Tensor};

pub(super) fn key(kind: &str, name: impl std::fmt::Display) -> String {
    format!("{kind}/{name}")
}

/// Removes checkpoints under `root` as [`checkpoint::retain`] does after the one of step `step` was
/// written, and logs those that stay because newer ones have fewer parameters.
///
/// # Errors
/// If the folder cannot be read, or a checkpoint cannot be removed.
pub fn retain_checkpoints(root: &Path, keep: usize, step: u64) -> Result<(), checkpoint::Error> {
    let is_parameter = |name: &str| has_kind(name, &[kind::MASTER]);
    for spared in checkpoint::retain(root, keep, step, is_parameter)? {
        tracing::warn!(
            "{} stays although checkpoint.keep is {keep}: newer checkpoints have fewer parameters",
            spared.display()
        );
    }
    Ok(())
}

/// Returns true for tensors that every run with the same model has, whatever its layout.
///
/// Random states belong to a number of ranks; a run on another number starts its own.
fn is_counted(name: &str) -> bool {
    !has_kind(name, &[kind::GENERATOR])
}

/// Returns the slice of the saved tensor of kind `kind` that belongs to a parameter's `slice`.
fn with_kind_prefix(kind: &str, slice: &TensorSlice) -> TensorSlice {
    TensorSlice {
        name: key(kind, &slice.name),
        ..slice.clone()
    }
}

/// The sources of a run's tensors.
pub(crate) struct StateTensors<'a> {
    pub(crate) model: &'a Model,
    pub(crate) optimizer: &'a Optimizer,
    pub(crate) device: &'a dyn Accelerator,
    pub(crate) rank: usize,
}

impl StateTensors<'_> {
    /// Returns all tensors that this rank holds, with their global slices.
    pub(crate) fn tensors(&self) -> Result<Vec<(TensorSlice, Tensor)>, Error> {
        let mut tensors = Vec::new();
        for (index, parameter) in self.model.parameters.iter().enumerate() {
            let (exp_avg, exp_avg_sq) = self.optimizer.moments(index);
            for (kind, tensor) in [
                (kind::MASTER, &parameter.master),
                (kind::FIRST_MOMENT, exp_avg),
                (kind::SECOND_MOMENT, exp_avg_sq),
            ] {
                for (slice, part) in parameter.slices(tensor) {
                    tensors.push((with_kind_prefix(kind, &slice), part));
                }
            }
        }
        for (_, name, bias) in self.model.biases() {
            let slice = TensorSlice::whole(key(kind::BIAS, name), &bias.size());
            tensors.push((slice, bias));
        }
        let generator = self.device.generator_state()?;
        let name = key(kind::GENERATOR, self.rank);
        tensors.push((TensorSlice::whole(name, &generator.size()), generator));
        Ok(tensors)
    }
}

/// A tensor that this rank saves.
pub(crate) struct PlannedTensor {
    /// Index among all tensors that the rank holds.
    pub(crate) index: usize,
    pub(crate) slice: TensorSlice,
    pub(crate) kind: Kind,
}

/// The tensors that this rank saves, out of those that it holds.
pub(crate) struct SavePlan {
    pub(crate) own: Vec<PlannedTensor>,
    /// Number of names that all ranks save together.
    pub(crate) num_tensors: usize,
    /// Ranks that save the others of the tensors that this rank holds.
    pub(crate) companions: Vec<usize>,
}

/// Assigns each slice that several ranks hold to one of them. All ranks make the same plan.
pub(crate) fn plan_save(
    tensors: &[(TensorSlice, Tensor)],
    world: &Arc<dyn Communicator>,
) -> Result<SavePlan, Error> {
    let bytes_of = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
    let held: Vec<(&TensorSlice, u64)> = tensors
        .iter()
        .map(|(slice, tensor)| (slice, bytes_of(tensor) as u64))
        .collect();
    let message = serde_json::to_vec(&held).expect("plain data");
    let mut holders: BTreeMap<TensorSlice, (u64, Vec<usize>)> = BTreeMap::new();
    for (rank, message) in all_gather_bytes(world, &message)?.iter().enumerate() {
        let held: Vec<(TensorSlice, u64)> = decode_peer_message(message)?;
        for (slice, bytes) in held {
            let (_, ranks) = holders.entry(slice).or_insert((bytes, Vec::new()));
            ranks.push(rank);
        }
    }
    let slices: Vec<TensorSlice> = holders.keys().cloned().collect();
    let names: BTreeSet<&str> = slices.iter().map(|slice| slice.name.as_str()).collect();
    let holders: Vec<_> = holders.into_values().collect();
    let owners = assign_owners(&holders, world.size());
    let owner: BTreeMap<&TensorSlice, usize> = slices.iter().zip(owners).collect();
    let mut own = Vec::new();
    let mut companions = BTreeSet::new();
    for (index, (slice, tensor)) in tensors.iter().enumerate() {
        if owner[slice] != world.rank() {
            companions.insert(owner[slice]);
        } else {
            own.push(PlannedTensor {
                index,
                slice: slice.clone(),
                kind: tensor.kind(),
            });
        }
    }
    Ok(SavePlan {
        own,
        num_tensors: names.len(),
        companions: companions.into_iter().collect(),
    })
}

/// Saves step `state.step` under `root`.
///
/// # Errors
/// If any rank fails to write. Earlier checkpoints are then untouched, and no partial one is left.
pub(crate) fn save(
    root: &Path,
    state: &RunState,
    run: &StateTensors,
    world: &Arc<dyn Communicator>,
) -> Result<PathBuf, Error> {
    let tensors = run.tensors()?;
    let save_plan = plan_save(&tensors, world)?;
    let with_values = |planned: &PlannedTensor| {
        let (_, tensor) = &tensors[planned.index];
        (planned.slice.clone(), tensor.shallow_clone())
    };
    let own = save_plan.own.iter().map(with_values).collect();

    let staging = Staging::new(root, state.step);
    let begun = if world.rank() == 0 {
        staging.begin()
    } else {
        Ok(())
    };
    agree(world, begun.map_err(Error::from))?;
    let written = staging.write_shard(world.rank(), own);
    let shards = gather_shards(world, written)?;
    let committed = match (shards, world.rank()) {
        (Ok(shards), 0) => {
            let state = serde_json::to_value(state).expect("plain data");
            let committed = staging.commit(shards, save_plan.num_tensors, state);
            committed.map(drop).map_err(Error::from)
        }
        (Ok(_), _) => Ok(()),
        (Err(error), _) => Err(error),
    };
    let committed = agree(world, committed);
    if committed.is_err() && world.rank() == 0 {
        staging.discard();
    }
    committed?;
    Ok(root.join(format!("step-{:08}", state.step)))
}

/// Returns the shards of all ranks, or the error of the lowest rank that could not write.
fn gather_shards(
    world: &Arc<dyn Communicator>,
    written: Result<Shard, checkpoint::Error>,
) -> Result<Result<Vec<Shard>, Error>, Error> {
    let report = written.map_err(|error| error.to_string());
    let report = serde_json::to_vec(&report).expect("plain data");
    let reports = all_gather_bytes(world, &report)?;
    let shards = reports.iter().enumerate().map(|(rank, report)| {
        let report: Result<Shard, String> = decode_peer_message(report)?;
        report.map_err(|message| AgreementError::Peer { rank, message }.into())
    });
    Ok(shards.collect())
}

/// A state that was copied into the run.
pub(crate) struct Restored {
    pub(crate) state: RunState,
    /// The configuration of the run that saved the state.
    pub(crate) saved: Config,
    pub(crate) changes: AllowedChanges,
}

/// Finds the newest verified checkpoint under `root`, and restores the run from it. Then sets newer
/// ones that are damaged aside.
///
/// Calls `warn` with a message for each unusable checkpoint. Returns `None` if there are no
/// checkpoints.
///
/// # Errors
/// If there are checkpoints and none can be used, or `rules` refuse the newest usable one.
pub(crate) fn resume(
    root: &Path,
    run: &StateTensors,
    world: &Arc<dyn Communicator>,
    rules: &ResumeRules,
    warn: &mut dyn FnMut(&str),
) -> Result<Option<Restored>, Error> {
    let FolderPaths {
        candidates,
        set_aside,
    } = list_on_rank_0(root, world)?;
    let mut refusals = Vec::new();
    for (step, path) in candidates {
        match inspect_together(step, &path, world)? {
            Ok(checkpoint) => {
                if let Some(note) = checkpoint.note() {
                    warn(&note);
                }
                let restored = restore(Ok(checkpoint), run, world, rules)?;
                if world.rank() == 0 {
                    set_damaged_aside(root, &refusals, warn);
                }
                return Ok(Some(restored));
            }
            Err(refused) => {
                let path = path.display();
                warn(&format!("checkpoint {path} is refused: {}", refused.reason));
                refusals.push(refused);
            }
        }
    }
    if refusals.is_empty() && set_aside.is_empty() {
        return Ok(None);
    }
    Err(none_usable(root, &refusals, &set_aside))
}

/// Compares a verified checkpoint with the run, and copies it into the run if `rules` allow that.
pub(super) fn restore(
    opened: Result<Checkpoint, Error>,
    run: &StateTensors,
    world: &Arc<dyn Communicator>,
    rules: &ResumeRules,
) -> Result<Restored, Error> {
    let compared = opened.and_then(|checkpoint| {
        let state = read_run_state(&checkpoint)?;
        let saved = saved_config(&checkpoint, &state)?;
        let changes = rules.check_keys(checkpoint.path(), &saved)?;
        Ok((checkpoint, state, saved, changes))
    });
    let (mut checkpoint, state, config, mut changes) = agree(world, compared)?;
    // The names of experts' rows must be those of the saved placement before values are read.
    rules.prepare(&state);
    let saved = saved_shapes(checkpoint.manifest(), is_counted);
    run.model
        .add_biases(|name| saved.contains_key(&key(kind::BIAS, name)));
    let tensors = run.tensors()?;
    let held = tensors.iter().map(|(slice, _)| slice);
    let held = held_shapes(held.filter(|slice| is_counted(&slice.name)));
    let mismatches = account(&saved, &held, world)?;
    rules.check_tensors(checkpoint.path(), &mismatches, &mut changes)?;
    agree(world, copy_state(&mut checkpoint, run, &mismatches))?;
    Ok(Restored {
        state,
        saved: config,
        changes,
    })
}

/// Copies the tensors of a checkpoint into the run, except those that do not fit.
pub(super) fn copy_state(
    checkpoint: &mut Checkpoint,
    run: &StateTensors,
    mismatches: &[Mismatch],
) -> Result<(), Error> {
    restore_weights(checkpoint, run.model, mismatches)?;
    for (index, parameter) in run.model.parameters.iter().enumerate() {
        let (exp_avg, exp_avg_sq) = run.optimizer.moments(index);
        let moments = [
            (kind::FIRST_MOMENT, exp_avg),
            (kind::SECOND_MOMENT, exp_avg_sq),
        ];
        for (kind, tensor) in moments {
            for (slice, part) in parameter.slices(tensor) {
                let slice = with_kind_prefix(kind, &slice);
                if !keeps_initial_value(mismatches, &slice.name) {
                    checkpoint.tensor_into(&slice, &part)?;
                }
            }
        }
    }
    let name = key(kind::GENERATOR, run.rank);
    if let Some(entry) = checkpoint.manifest().tensors.get(&name) {
        let slice = TensorSlice::whole(name, &entry.shape);
        let generator = checkpoint.tensor(&slice)?;
        run.device.set_generator_state(&generator)?;
    }
    Ok(())
}

/// Returns true if the run's tensor has no counterpart to copy from.
fn keeps_initial_value(mismatches: &[Mismatch], name: &str) -> bool {
    mismatches.iter().any(|mismatch| match mismatch {
        Mismatch::Missing { name: other, .. } | Mismatch::Reshaped { name: other, .. } => {
            other == name
        }
        Mismatch::Unplaced { .. } => false,
    })
}

/// Copies all weights and biases of a checkpoint into a whole model.
///
/// # Errors
/// If a tensor is on one side only or has another shape, or cannot be read.
pub(crate) fn restore_model(checkpoint: &mut Checkpoint, model: &Model) -> Result<(), Error> {
    let is_model = |name: &str| has_kind(name, &[kind::MASTER, kind::BIAS]);
    let saved = saved_shapes(checkpoint.manifest(), is_model);
    model.add_biases(|name| saved.contains_key(&key(kind::BIAS, name)));
    let mut held = Shapes::new();
    for parameter in model.parameters.iter() {
        for (slice, _) in parameter.slices(&parameter.master) {
            held.insert(key(kind::MASTER, &slice.name), slice.global_shape);
        }
    }
    for (_, name, bias) in model.biases() {
        held.insert(key(kind::BIAS, name), bias.size());
    }
    let mismatches = account_alone(&saved, &held);
    if !mismatches.is_empty() {
        return Err(mismatch_error(checkpoint.path(), &mismatches));
    }
    restore_weights(checkpoint, model, &[])
}

/// Copies weights and biases of a checkpoint into the model, except those that do not fit.
fn restore_weights(
    checkpoint: &mut Checkpoint,
    model: &Model,
    mismatches: &[Mismatch],
) -> Result<(), Error> {
    for parameter in model.parameters.iter() {
        for (slice, part) in parameter.slices(&parameter.master) {
            let slice = with_kind_prefix(kind::MASTER, &slice);
            if !keeps_initial_value(mismatches, &slice.name) {
                checkpoint.tensor_into(&slice, &part)?;
            }
        }
        parameter.sync_from_master();
    }
    model.mark_stale();
    for (_, name, bias) in model.biases() {
        let slice = TensorSlice::whole(key(kind::BIAS, name), &bias.size());
        if !keeps_initial_value(mismatches, &slice.name) {
            checkpoint.tensor_into(&slice, &bias)?;
        }
    }
    Ok(())
}
