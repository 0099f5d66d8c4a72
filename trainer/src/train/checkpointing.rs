//! Checkpoints of a run: its state as named tensors, saved and restored by all ranks together.
//!
//! # Collective
//! All ranks call [`plan_save`], [`save`], [`resume`] and [`resume_snapshot`] at the same point.

use super::{
    accounting::{Mismatch, Shapes, account, account_alone, held_shapes, saved_shapes},
    model_shapes::{count_problem, shape_problems},
    resume_rules::{AllowedChanges, ResumeRules, mismatch_error},
    run_state::RunState,
};
use crate::{
    Error,
    config::{Config, rename_old_keys},
    model::Model,
    optim::Optimizer,
};
use checkpoint::{
    Checkpoint, ImageHeader, PartOpener, Shard, Staging, TensorSlice, assign_owners,
    folder::{self, Inspection, Refused},
    keeper::SnapshotId,
};
use parallel::{
    Accelerator, Communicator,
    agreement::{AgreementError, agree, all_gather_bytes, broadcast_bytes, decode_peer_message},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};
use tch::{Kind, Tensor};

/// Kinds of saved tensors. The name of a saved tensor is `KIND/GLOBAL NAME`.
mod kind {
    pub(super) const MASTER: &str = "model";
    pub(super) const FIRST_MOMENT: &str = "exp_avg";
    pub(super) const SECOND_MOMENT: &str = "exp_avg_sq";
    pub(super) const BIAS: &str = "bias";
    pub(super) const GENERATOR: &str = "generator";
}

fn key(kind: &str, name: impl std::fmt::Display) -> String {
    format!("{kind}/{name}")
}

fn has_kind(name: &str, kinds: &[&str]) -> bool {
    let kind = name.split_once('/').map(|(kind, _)| kind);
    kind.is_some_and(|kind| kinds.contains(&kind))
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
    for (index, (slice, tensor)) in tensors.iter().enumerate() {
        if owner[slice] == world.rank() {
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

fn none_usable(root: &Path, refusals: &[Refused], set_aside: &[PathBuf]) -> Error {
    let refused = refusals.iter().map(|refused| refused.reason.clone());
    let aside = set_aside
        .iter()
        .map(|path| format!("{} is damaged", path.display()));
    let reasons: Vec<String> = refused.chain(aside).collect();
    Error::Resume(format!(
        "none of the {} checkpoints in {} can be used ({}); move the folder away to start from the \
         beginning",
        reasons.len(),
        root.display(),
        reasons.join("; ")
    ))
}

/// Renames damaged checkpoints. A failure only warns: they are refused again by the next start.
fn set_damaged_aside(root: &Path, refusals: &[Refused], warn: &mut dyn FnMut(&str)) {
    match folder::set_damaged_aside(root, refusals) {
        Ok(renamed) => {
            for (from, to) in renamed {
                warn(&format!("renamed {} to {}", from.display(), to.display()));
            }
        }
        Err(error) => warn(&format!("damaged checkpoints keep their names: {error}")),
    }
}

/// The checkpoints that rank 0 finds.
#[derive(Default, Serialize, Deserialize)]
struct FolderPaths {
    /// Steps and paths, newest first.
    candidates: Vec<(u64, PathBuf)>,
    set_aside: Vec<PathBuf>,
}

fn list_on_rank_0(root: &Path, world: &Arc<dyn Communicator>) -> Result<FolderPaths, Error> {
    let listed = if world.rank() == 0 {
        folder::listing(root).map(|listing| FolderPaths {
            candidates: listing.candidates,
            set_aside: listing.set_aside,
        })
    } else {
        Ok(FolderPaths::default())
    };
    let listed = listed.map_err(|error| Error::Resume(error.to_string()));
    let listed = agree(world, listed)?;
    let message = serde_json::to_vec(&listed).expect("paths are UTF-8");
    Ok(decode_peer_message(&broadcast_bytes(world, &message)?)?)
}

/// The fault that a rank found in its share of a checkpoint's files.
#[derive(Serialize, Deserialize)]
struct Fault {
    reason: String,
    /// The number of the file; `None` if the checkpoint cannot be opened.
    file: Option<usize>,
    is_damage: bool,
    is_denied: bool,
}

impl Fault {
    fn new(error: &checkpoint::Error, file: Option<usize>) -> Fault {
        Fault {
            reason: error.to_string(),
            file,
            is_damage: error.is_damage(),
            is_denied: error.is_denied(),
        }
    }
}

/// Verifies a checkpoint; each rank reads its share of the files. All ranks get the same answer,
/// except that only rank 0 knows whether to set the checkpoint aside.
///
/// # Errors
/// If a rank may not read the checkpoint: an older one would silently lose work.
fn inspect_together(
    step: u64,
    path: &Path,
    world: &Arc<dyn Communicator>,
) -> Result<Result<Checkpoint, Refused>, Error> {
    let inspection = Inspection::open(path);
    let fault = match &inspection {
        Ok(inspection) => verify_share(inspection, world),
        Err(error) => Some(Fault::new(error, None)),
    };
    let own = serde_json::to_vec(&fault).expect("plain data");
    let mut found = None;
    for message in all_gather_bytes(world, &own)? {
        let of_rank: Option<Fault> = decode_peer_message(&message)?;
        found = found.or(of_rank);
    }
    match (inspection, found) {
        (Ok(inspection), None) => {
            inspection.remember();
            Ok(Ok(inspection.into_checkpoint()))
        }
        (_, Some(fault)) if fault.is_denied => Err(Error::Resume(fault.reason)),
        (inspection, Some(fault)) => Ok(Err(Refused {
            path: path.to_path_buf(),
            step,
            is_damaged: world.rank() == 0 && fault.is_damage && confirms(&inspection, &fault),
            reason: fault.reason,
        })),
        (Err(error), None) => Err(error.into()),
    }
}

/// Verifies this rank's share of a checkpoint's files.
fn verify_share(inspection: &Inspection, world: &Arc<dyn Communicator>) -> Option<Fault> {
    if inspection.is_known() {
        return None;
    }
    let checkpoint = inspection.checkpoint();
    let mut own = (world.rank()..checkpoint.manifest().files.len()).step_by(world.size());
    own.find_map(|file| {
        let verified = checkpoint.verify_file(file);
        verified.err().map(|error| Fault::new(&error, Some(file)))
    })
}

/// True if this rank finds the same fault: the memory or the mount of another one may be at fault.
fn confirms(inspection: &Result<Inspection, checkpoint::Error>, fault: &Fault) -> bool {
    match (inspection, fault.file) {
        (Err(error), _) => error.is_damage(),
        (Ok(inspection), Some(file)) => {
            let verified = inspection.checkpoint().verify_file(file);
            verified.is_err_and(|error| error.is_damage())
        }
        (Ok(_), None) => false,
    }
}

/// Id, headers and opener of a snapshot's parts.
pub(crate) type SnapshotParts = (SnapshotId, Vec<ImageHeader>, PartOpener);

/// Restores the run from the snapshot with these parts, if there is one.
///
/// # Errors
/// If any rank cannot read its part of the snapshot, or `rules` refuse it.
pub(crate) fn resume_snapshot(
    parts: Result<Option<SnapshotParts>, Error>,
    run: &StateTensors,
    world: &Arc<dyn Communicator>,
    rules: &ResumeRules,
) -> Result<Option<Restored>, Error> {
    let Some((id, headers, open)) = agree(world, parts)? else {
        return Ok(None);
    };
    let name = format!("the snapshot of step {}", id.step);
    let opened = Checkpoint::from_parts(&name, id.step, headers, open).map_err(Error::from);
    restore(opened, run, world, rules).map(Some)
}

/// Compares a verified checkpoint with the run, and copies it into the run if `rules` allow that.
fn restore(
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
fn copy_state(
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

/// Returns the newest checkpoint under `root` whose manifest can be read, and its configuration.
///
/// # Errors
/// If the folder cannot be read.
pub fn newest_config(root: &Path) -> Result<Option<(PathBuf, Config)>, Error> {
    for path in checkpoint::list(root)? {
        // The resume itself reports a damaged checkpoint.
        if let Ok(config) = config_in(&path) {
            return Ok(Some((path, config)));
        }
    }
    Ok(None)
}

/// Returns the configuration in the checkpoint `path`, of which it reads the manifest only.
///
/// # Errors
/// If it cannot be read, or could not run.
pub(crate) fn config_in(path: &Path) -> Result<Config, Error> {
    let checkpoint = Checkpoint::open(path)?;
    saved_config(&checkpoint, &read_run_state(&checkpoint)?)
}

/// Returns the configuration in a checkpoint.
///
/// # Errors
/// If it cannot be read, contradicts the tensors or the position, or could not run.
pub(crate) fn saved_config(checkpoint: &Checkpoint, state: &RunState) -> Result<Config, Error> {
    let manifest = checkpoint.path().join("manifest.json");
    let failed = |reason: String| {
        let manifest = manifest.display();
        Error::Resume(format!(
            "{manifest}: its configuration cannot be used: {reason}"
        ))
    };
    let config: Config =
        serde_json::from_value(state.config.clone()).map_err(|error| failed(error.to_string()))?;
    let problems = saved_problems(checkpoint, state, &config);
    if problems.is_empty() {
        Ok(config)
    } else {
        Err(failed(problems.join("; ")))
    }
}

/// Returns why a saved configuration cannot be that of the tensors, or could not run. Later checks
/// do arithmetic with what earlier ones have checked.
fn saved_problems(checkpoint: &Checkpoint, state: &RunState, config: &Config) -> Vec<String> {
    let manifest = checkpoint.manifest();
    let generators = manifest.tensors.keys();
    let generators = generators.filter(|name| has_kind(name, &[kind::GENERATOR]));
    let ranks = generators.count();
    if ranks != state.ranks {
        return vec![format!(
            "it is of {} ranks, but the tensors of {ranks}",
            state.ranks
        )];
    }
    let shapes = saved_shapes(manifest, |name| has_kind(name, &[kind::MASTER]));
    let mut problems = shape_problems(&config.model, &shapes);
    if problems.is_empty() {
        problems = config.problems(ranks);
    }
    if problems.is_empty() {
        problems.extend(count_problem(&config.model, &shapes));
        problems.extend(state.position_problem(config));
    }
    problems
}

/// Reads the state of the run from a checkpoint's manifest.
pub(crate) fn read_run_state(checkpoint: &Checkpoint) -> Result<RunState, Error> {
    let mut state = checkpoint.manifest().state.clone();
    if let Some(config) = state.get_mut("config") {
        rename_old_keys(config);
    }
    let path = checkpoint.path().display();
    let state: RunState = serde_json::from_value(state).map_err(|error| {
        Error::Resume(format!(
            "{path}: the manifest's state cannot be read: {error}"
        ))
    })?;
    let step = checkpoint.manifest().step;
    if state.step == step {
        return Ok(state);
    }
    Err(Error::Resume(format!(
        "{path}: its state is of step {}, but it is of step {step}",
        state.step
    )))
}
