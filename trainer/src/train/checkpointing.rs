//! Checkpoints of a run: its state as named tensors, saved and restored by all ranks together.
//!
//! # Collective
//! All ranks call [`plan_save`], [`save`] and [`resume`] at the same point.

use super::{
    accounting::{Mismatch, Shapes, account, account_alone, held_shapes, saved_shapes},
    handed_on::to_rank_0,
    inspection::{FolderPaths, inspect_together, list_on_rank_0, none_usable, set_damaged_aside},
    resume_rules::{AllowedChanges, ResumeRules, mismatch_error},
    run_state::RunState,
    save_plan::{Coverage, savers},
    saved_config::{comparable, generator_name, has_kind, kind, read_run_state, saved_config},
};
use crate::{
    Error,
    config::{Config, ModelConfig},
    model::{Model, decoder::model_specs, replicas::Replicas, spec::ParamSpec},
    optim::Optimizer,
};
use checkpoint::{Checkpoint, Shard, Staging, TensorSlice};
use parallel::{
    Accelerator, Communicator, GroupKind, Mesh,
    agreement::{agree, decode_peer_message, sum_over_ranks},
};
use std::{
    collections::{BTreeSet, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
};
use tch::{Kind, Tensor};

pub(super) fn key(kind: &str, name: impl std::fmt::Display) -> String {
    format!("{kind}/{name}")
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
    pub(crate) mesh: &'a Mesh,
}

/// The ranks that hold a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum HolderSet {
    /// The replicas of a parameter's rows.
    Parameter(Replicas),
    /// All ranks of a pipeline stage, which hold the biases of its layers.
    Stage,
    /// This rank only, for its random state.
    Rank,
}

/// A tensor of this rank with its global slice.
pub(crate) type StateTensor = (TensorSlice, Tensor);

impl StateTensors<'_> {
    /// Returns all tensors that this rank holds, with their global slices.
    pub(crate) fn tensors(&self) -> Result<Vec<StateTensor>, Error> {
        let held = self.held()?.into_iter();
        Ok(held.map(|(_, tensor)| tensor).collect())
    }

    /// Returns all tensors that this rank holds, each with the set of ranks that hold it.
    fn held(&self) -> Result<Vec<(HolderSet, StateTensor)>, Error> {
        let mut held = Vec::new();
        for (index, parameter) in self.model.parameters.iter().enumerate() {
            let state = self.optimizer.state(index).iter();
            let state = state.map(|state| (state.name, &state.tensor));
            for (kind, tensor) in std::iter::once((kind::MASTER, &parameter.master)).chain(state) {
                for (slice, part) in parameter.slices(tensor) {
                    let set = HolderSet::Parameter(parameter.replicas);
                    held.push((set, (with_kind_prefix(kind, &slice), part)));
                }
            }
        }
        for (_, name, bias) in self.model.biases() {
            let slice = TensorSlice::whole(key(kind::BIAS, name), &bias.size());
            held.push((HolderSet::Stage, (slice, bias)));
        }
        let generator = self.device.generator_state()?;
        let name = generator_name(self.mesh.rank());
        let slice = TensorSlice::whole(name, &generator.size());
        held.push((HolderSet::Rank, (slice, generator)));
        Ok(held)
    }

    /// Returns the ranks that hold the tensors of this set.
    fn holders(&self, set: HolderSet) -> Vec<usize> {
        match set {
            HolderSet::Parameter(replicas) => {
                let replication = &self.model.parameters.replications()[replicas as usize];
                replication.replica_ranks.clone()
            }
            HolderSet::Stage => self.mesh.group(GroupKind::Stage),
            HolderSet::Rank => vec![self.mesh.rank()],
        }
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

/// Assigns each slice that several ranks hold to one of them. Returns this rank's tensors, and
/// those of them that it saves.
///
/// # Errors
/// If the ranks would not save each value of the model once, or cannot be reached.
pub(crate) fn plan_save(
    run: &StateTensors,
    world: &Arc<dyn Communicator>,
) -> Result<(Vec<StateTensor>, SavePlan), Error> {
    let held = run.held()?;
    let bytes_of = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
    let sized = held
        .iter()
        .map(|(set, (_, tensor))| (*set, bytes_of(tensor) as u64));
    let savers = savers(&sized.collect::<Vec<_>>(), |set| run.holders(set));
    let mut own = Vec::new();
    let mut companions = BTreeSet::new();
    for (index, ((_, (slice, tensor)), saver)) in held.iter().zip(savers).enumerate() {
        if saver == world.rank() {
            own.push(PlannedTensor {
                index,
                slice: slice.clone(),
                kind: tensor.kind(),
            });
        } else {
            companions.insert(saver);
        }
    }
    let plan = SavePlan {
        num_tensors: check_coverage(run, &held, &own, world)?,
        own,
        companions: companions.into_iter().collect(),
    };
    let tensors = held.into_iter().map(|(_, tensor)| tensor).collect();
    Ok((tensors, plan))
}

/// Checks that all ranks together save each value of the model once. Returns the number of tensors
/// that they save.
fn check_coverage(
    run: &StateTensors,
    held: &[(HolderSet, StateTensor)],
    own: &[PlannedTensor],
    world: &Arc<dyn Communicator>,
) -> Result<usize, Error> {
    // The configuration does not say the length of a random state, nor which biases a checkpoint
    // brought. Of a random state there is one holder; of a stage's biases the first rank knows.
    let of_model = own.iter().filter(|planned| is_counted(&planned.slice.name));
    let saved = Coverage::of(of_model.map(|planned| &planned.slice));
    let is_first = run.mesh.position(GroupKind::Stage) == 0;
    let biases = held
        .iter()
        .filter(|(set, _)| *set == HolderSet::Stage && is_first)
        .map(|(_, (slice, _))| slice);
    let num_biases = biases.clone().count() as f64;
    let biases = Coverage::of(biases);
    let numbers = [
        &saved.to_numbers()[..],
        &biases.to_numbers()[..],
        &[num_biases],
    ];
    let sums = sum_over_ranks(world, &numbers.concat())?;
    let (saved, rest) = sums.split_at(Coverage::NUMBERS);
    let (biases, rest) = rest.split_at(Coverage::NUMBERS);

    let parameters = parameter_tensors(run.model.config(), run.optimizer);
    let expected = Coverage::of(&parameters) + Coverage::from_sums(biases);
    Coverage::from_sums(saved)
        .check(expected)
        .map_err(Error::SavePlan)?;
    Ok(parameters.len() + rest[0] as usize + world.size())
}

/// Returns the saved tensors of all parameters of a model: masters and optimizer state.
fn parameter_tensors(config: &ModelConfig, optimizer: &Optimizer) -> Vec<TensorSlice> {
    let of_parameter = |spec: ParamSpec| {
        let kinds = std::iter::once(&kind::MASTER).chain(optimizer.state_names(spec.role));
        let of_kind = |kind: &&'static str| -> Vec<TensorSlice> {
            let whole = |expert| TensorSlice::whole(key(kind, spec.name(expert)), &spec.shape());
            (0..spec.matrices() as usize).map(whole).collect()
        };
        kinds.flat_map(of_kind).collect::<Vec<_>>()
    };
    model_specs(config).flat_map(of_parameter).collect()
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
    let (tensors, save_plan) = plan_save(run, world)?;
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
    let committed = agree(world, written.map_err(Error::from))
        .and_then(|shard| commit(&staging, &shard, save_plan.num_tensors, state, world));
    if committed.is_err() && world.rank() == 0 {
        staging.discard();
    }
    committed?;
    Ok(root.join(format!("step-{:08}", state.step)))
}

/// Commits the shards of all ranks on rank 0.
fn commit(
    staging: &Staging,
    shard: &Shard,
    num_tensors: usize,
    state: &RunState,
    world: &Arc<dyn Communicator>,
) -> Result<(), Error> {
    let message = serde_json::to_vec(shard).expect("plain data");
    let messages = to_rank_0(world, &message)?;
    let committed = if world.rank() == 0 {
        let shards = messages.iter().map(|shard| decode_peer_message(shard));
        let shards: Result<Vec<Shard>, _> = shards.collect();
        let state = serde_json::to_value(state).expect("plain data");
        shards.map_err(Error::from).and_then(|shards| {
            let committed = staging.commit(shards, num_tensors, state);
            committed.map(drop).map_err(Error::from)
        })
    } else {
        Ok(())
    };
    agree(world, committed)
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
        let saved = comparable(saved, &state, rules.config);
        let changes = rules.check_keys(checkpoint.path(), &saved)?;
        Ok((checkpoint, state, saved, changes))
    });
    let (mut checkpoint, mut state, config, mut changes) = agree(world, compared)?;
    // The names of experts' rows must be those of the saved placement before values are read.
    rules.prepare(&state);
    let saved = saved_shapes(checkpoint.manifest(), is_counted);
    run.model
        .add_biases(|name| saved.contains_key(&key(kind::BIAS, name)));
    let tensors = run.tensors()?;
    let held = tensors.iter().map(|(slice, _)| slice);
    let held = held_shapes(held.filter(|slice| is_counted(&slice.name)));
    let mismatches = account(&saved, &held, world)?;
    changes.has_done_nothing = state.step == 0;
    rules.check_tensors(checkpoint.path(), &mismatches, &mut changes)?;
    agree(world, copy_state(&mut checkpoint, run, &mismatches))?;
    let begun = without_state(run, &mismatches).into_iter();
    state
        .state_starts
        .extend(begun.map(|name| (name, state.step)));
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
        for state in run.optimizer.state(index) {
            for (slice, part) in parameter.slices(&state.tensor) {
                let slice = with_kind_prefix(state.name, &slice);
                if !keeps_initial_value(mismatches, &slice.name) {
                    checkpoint.tensor_into(&slice, &part)?;
                }
            }
        }
    }
    let name = generator_name(run.mesh.rank());
    if let Some(entry) = checkpoint.manifest().tensors.get(&name) {
        let slice = TensorSlice::whole(name, &entry.shape);
        let generator = checkpoint.tensor(&slice)?;
        run.device.set_generator_state(&generator)?;
    }
    Ok(())
}

/// Returns the [`ParamSpec::parameter_name`]s of all ranks' parameters whose optimizer state has no
/// counterpart to copy from.
fn without_state(run: &StateTensors, mismatches: &[Mismatch]) -> Vec<String> {
    let initial = mismatches
        .iter()
        .filter(|m| !matches!(m, Mismatch::Unplaced { .. }));
    let initial: HashSet<&str> = initial.map(Mismatch::name).collect();
    if initial.is_empty() {
        return Vec::new();
    }
    let lacks_state = |spec: &ParamSpec| {
        let mut kinds = run.optimizer.state_names(spec.role).iter();
        kinds.any(|kind| {
            let mut experts = 0..spec.matrices() as usize;
            experts.any(|expert| initial.contains(key(kind, spec.name(expert)).as_str()))
        })
    };
    let specs = model_specs(run.model.config()).filter(lacks_state);
    specs.map(|spec| spec.parameter_name()).collect()
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
