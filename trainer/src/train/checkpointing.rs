//! Saving and resuming a run: the trainer's state as named tensors, agreed upon by all ranks.
//!
//! # Collective
//! Every function here is called by all ranks.

use crate::Error;
use crate::config::rename_old_keys;
use crate::model::Model;
use crate::optim::Optimizer;
use checkpoint::keeper::SnapshotId;
use checkpoint::{Checkpoint, ImageHeader, PartOpener, Shard, Staging, TensorSlice, assign_owners};
use parallel::agreement::{
    AgreementError, agree, all_gather_bytes, broadcast_bytes, decode_peer_message,
};
use parallel::{Accelerator, Communicator};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// What is saved besides tensors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RunState {
    /// Optimizer steps done.
    pub(crate) step: u64,
    /// Samples drawn: the position in the data.
    pub(crate) samples: u64,
    /// Tokens learned from.
    pub(crate) tokens: u64,
    /// How many ranks saved.
    pub(crate) ranks: usize,
    /// Choices for which an expert is lent, where experts are.
    #[serde(default)]
    pub(crate) min_tokens: Option<i64>,
    /// Where experts have moved, and from what loads, where they do.
    #[serde(default)]
    pub(crate) placement: Option<PlacementState>,
    /// The whole configuration.
    pub(crate) config: serde_json::Value,
}

/// Where experts are.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PlacementState {
    /// For each MoE layer of the model the position of each expert.
    #[serde(alias = "positions")]
    pub(crate) physical_slots: Vec<Vec<i64>>,
    /// Choices of each expert in a step, smoothed.
    pub(crate) loads: Vec<Vec<f64>>,
}

/// The parts of a run that have values.
pub(crate) struct StateTensors<'a> {
    pub(crate) model: &'a Model,
    pub(crate) optimizer: &'a Optimizer,
    pub(crate) device: &'a dyn Accelerator,
    pub(crate) rank: usize,
}

/// What a saved tensor is; its name is `KIND/GLOBAL NAME`.
const MASTER: &str = "model";
const FIRST_MOMENT: &str = "exp_avg";
const SECOND_MOMENT: &str = "exp_avg_sq";
const BIAS: &str = "bias";
const GENERATOR: &str = "generator";

fn key(kind: &str, name: impl std::fmt::Display) -> String {
    format!("{kind}/{name}")
}

/// The same box of the saved tensor of this kind.
fn with_kind_prefix(kind: &str, place: &TensorSlice) -> TensorSlice {
    TensorSlice {
        name: key(kind, &place.name),
        ..place.clone()
    }
}

impl StateTensors<'_> {
    /// Everything this rank holds, by global name.
    pub(crate) fn tensors(&self) -> Result<Vec<(TensorSlice, Tensor)>, Error> {
        let mut tensors = Vec::new();
        for (index, parameter) in self.model.parameters.iter().enumerate() {
            let (exp_avg, exp_avg_sq) = self.optimizer.moments(index);
            for (kind, tensor) in [
                (MASTER, &parameter.master),
                (FIRST_MOMENT, exp_avg),
                (SECOND_MOMENT, exp_avg_sq),
            ] {
                let parts = parameter.slices(tensor).into_iter();
                tensors.extend(parts.map(|(place, part)| (with_kind_prefix(kind, &place), part)));
            }
        }
        let whole =
            |name: String, tensor: Tensor| (TensorSlice::whole(name, &tensor.size()), tensor);
        tensors.extend(
            self.model
                .biases()
                .map(|(_, name, tensor)| whole(key(BIAS, name), tensor)),
        );
        tensors.push(whole(
            key(GENERATOR, self.rank),
            self.device.generator_state()?,
        ));
        Ok(tensors)
    }
}

/// What a rank saves of what it holds.
pub(crate) struct SavePlan {
    /// Number in the list of all that it holds, which box of what, and the dtype.
    pub(crate) own: Vec<(usize, TensorSlice, Kind)>,
    /// Names that all ranks save together.
    pub(crate) tensors: usize,
}

/// Shares out what several ranks hold: the same plan on every rank.
pub(crate) fn plan_save(
    tensors: &[(TensorSlice, Tensor)],
    world: &Arc<dyn Communicator>,
) -> Result<SavePlan, Error> {
    let held: Vec<(&TensorSlice, u64)> = tensors
        .iter()
        .map(|(place, tensor)| {
            (
                place,
                (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64,
            )
        })
        .collect();
    // Who holds what, then who writes what.
    let mut holders: BTreeMap<TensorSlice, (u64, Vec<usize>)> = BTreeMap::new();
    for (rank, bytes) in all_gather_bytes(world, &serde_json::to_vec(&held).expect("plain data"))?
        .iter()
        .enumerate()
    {
        let held: Vec<(TensorSlice, u64)> = decode_peer_message(bytes)?;
        for (place, bytes) in held {
            holders
                .entry(place)
                .or_insert((bytes, Vec::new()))
                .1
                .push(rank);
        }
    }
    let places: Vec<TensorSlice> = holders.keys().cloned().collect();
    let names: BTreeSet<&str> = places.iter().map(|place| place.name.as_str()).collect();
    let owners = assign_owners(&holders.into_values().collect::<Vec<_>>(), world.size());
    let owner: BTreeMap<&TensorSlice, usize> = places.iter().zip(owners).collect();
    let own = tensors
        .iter()
        .enumerate()
        .filter(|(_, (place, _))| owner[place] == world.rank());
    let own = own
        .map(|(index, (place, tensor))| (index, place.clone(), tensor.kind()))
        .collect();
    Ok(SavePlan {
        own,
        tensors: names.len(),
    })
}

/// Saves step `state.step` under `root`.
///
/// # Errors
/// When any rank fails to write; the earlier checkpoints are untouched then, and nothing half-written is left.
pub(crate) fn save(
    root: &Path,
    state: &RunState,
    run: &StateTensors,
    world: &Arc<dyn Communicator>,
) -> Result<PathBuf, Error> {
    let tensors = run.tensors()?;
    let save_plan = plan_save(&tensors, world)?;
    let mine = save_plan
        .own
        .iter()
        .map(|(index, place, _)| (place.clone(), tensors[*index].1.shallow_clone()))
        .collect();

    let staging = Staging::new(root, state.step);
    let begun = if world.rank() == 0 {
        staging.begin()
    } else {
        Ok(())
    };
    agree(world, begun.map_err(Error::from))?;
    let written = staging.write_shard(world.rank(), mine);
    let reports = all_gather_bytes(
        world,
        &serde_json::to_vec(&written.map_err(|e| e.to_string())).expect("plain data"),
    )?;
    let shards = reports.iter().enumerate().map(|(rank, report)| {
        let report: Result<Shard, String> = decode_peer_message(report)?;
        report.map_err(|message| AgreementError::Peer { rank, message }.into())
    });
    let shards: Result<Vec<Shard>, Error> = shards.collect();
    let committed = match (shards, world.rank()) {
        (Ok(shards), 0) => {
            let state = serde_json::to_value(state).expect("plain data");
            staging
                .commit(shards, save_plan.tensors, state)
                .map(|_| ())
                .map_err(Error::from)
        }
        (Ok(_), _) => Ok(()),
        (Err(error), _) => Err(error),
    };
    let agreed = agree(world, committed);
    if agreed.is_err() && world.rank() == 0 {
        staging.discard();
    }
    agreed?;
    Ok(root.join(format!("step-{:08}", state.step)))
}

/// Finds the newest checkpoint under `root` that every rank can read, checks it, and restores the run from it, after
/// `prepare` has seen what it says. None when there is no checkpoint at all. Refused ones are named to `warn`.
///
/// # Errors
/// When there are checkpoints and none can be used.
pub(crate) fn resume(
    root: &Path,
    run: &StateTensors,
    world: &Arc<dyn Communicator>,
    prepare: &dyn Fn(&RunState),
    warn: &mut dyn FnMut(&str),
) -> Result<Option<RunState>, Error> {
    let listed = if world.rank() == 0 {
        checkpoint::list(root)
    } else {
        Ok(Vec::new())
    };
    let failure = listed.as_ref().err().map(ToString::to_string);
    let listed = serde_json::to_vec(&listed.unwrap_or_default()).expect("paths are UTF-8");
    agree(
        world,
        failure.map_or(Ok(()), |reason| Err(Error::Resume(reason))),
    )?;
    let candidates: Vec<PathBuf> = decode_peer_message(&broadcast_bytes(world, &listed)?)?;
    let mut refusals = Vec::new();
    for path in &candidates {
        match agree(world, check(path, world)) {
            Ok(()) => {
                let restored = Checkpoint::open(path).map_err(Error::from);
                return agree(
                    world,
                    restored.and_then(|mut open| restore(&mut open, run, prepare)),
                )
                .map(Some);
            }
            Err(error) => {
                warn(&format!(
                    "checkpoint {} is refused: {error}",
                    path.display()
                ));
                refusals.push(error.to_string());
            }
        }
    }
    if refusals.is_empty() {
        return Ok(None);
    }
    Err(Error::Resume(format!(
        "none of the {} checkpoints in {} can be used ({}); move the folder away to start from the beginning",
        refusals.len(),
        root.display(),
        refusals.join("; ")
    )))
}

/// Restores the run from the snapshot whose parts have these headers.
///
/// # Errors
/// When any rank cannot get at its part of it.
pub(crate) fn resume_snapshot(
    restored: Result<Option<(SnapshotId, Vec<ImageHeader>, PartOpener)>, Error>,
    run: &StateTensors,
    world: &Arc<dyn Communicator>,
    prepare: &dyn Fn(&RunState),
) -> Result<Option<RunState>, Error> {
    let state = restored.and_then(|parts| {
        let Some((id, heads, open)) = parts else {
            return Ok(None);
        };
        let name = format!("the snapshot of step {}", id.step);
        restore(
            &mut Checkpoint::from_parts(&name, id.step, heads, open)?,
            run,
            prepare,
        )
        .map(Some)
    });
    agree(world, state)
}

/// Verifies this rank's share of a checkpoint's files.
fn check(path: &Path, world: &Arc<dyn Communicator>) -> Result<(), Error> {
    let checkpoint = Checkpoint::open(path)?;
    for file in (world.rank()..checkpoint.manifest().files.len()).step_by(world.size()) {
        checkpoint.verify_file(file)?;
    }
    Ok(())
}

/// Copies a verified checkpoint into the run.
fn restore(
    checkpoint: &mut Checkpoint,
    run: &StateTensors,
    prepare: &dyn Fn(&RunState),
) -> Result<RunState, Error> {
    prepare(&read_run_state(checkpoint)?);
    let state = restore_weights(checkpoint, run.model)?;
    for (index, parameter) in run.model.parameters.iter().enumerate() {
        let (exp_avg, exp_avg_sq) = run.optimizer.moments(index);
        for (kind, tensor) in [(FIRST_MOMENT, exp_avg), (SECOND_MOMENT, exp_avg_sq)] {
            for (place, part) in parameter.slices(tensor) {
                copy(checkpoint, &with_kind_prefix(kind, &place), &part)?;
            }
        }
    }
    // Random states belong to a number of ranks; another number starts its own.
    let name = key(GENERATOR, run.rank);
    if let Some(entry) = checkpoint.manifest().tensors.get(&name) {
        let place = TensorSlice::whole(name, &entry.shape);
        run.device
            .set_generator_state(&checkpoint.tensor(&place)?)?;
    }
    Ok(state)
}

/// Copies only what the model computes with.
pub(crate) fn restore_weights(
    checkpoint: &mut Checkpoint,
    model: &Model,
) -> Result<RunState, Error> {
    for parameter in model.parameters.iter() {
        for (place, part) in parameter.slices(&parameter.master) {
            copy(checkpoint, &with_kind_prefix(MASTER, &place), &part)?;
        }
        parameter.sync_from_master();
    }
    model.mark_stale();
    for (_, name, tensor) in model.biases() {
        copy(
            checkpoint,
            &TensorSlice::whole(key(BIAS, name), &tensor.size()),
            &tensor,
        )?;
    }
    read_run_state(checkpoint)
}

/// What a checkpoint says about its run.
pub(crate) fn read_run_state(checkpoint: &Checkpoint) -> Result<RunState, Error> {
    let mut state = checkpoint.manifest().state.clone();
    if let Some(config) = state.get_mut("config") {
        rename_old_keys(config);
    }
    serde_json::from_value(state).map_err(|e| {
        Error::Resume(format!(
            "{}: the manifest's state cannot be read: {e}",
            checkpoint.path().display()
        ))
    })
}

fn copy(checkpoint: &mut Checkpoint, place: &TensorSlice, into: &Tensor) -> Result<(), Error> {
    Ok(checkpoint.tensor_into(place, into)?)
}
