//! Restoring a run from a snapshot in the keepers' memory.
//!
//! # Collective
//! All ranks call [`resume`] at the same point.

use super::{
    checkpointing::{Restored, StateTensors, copy_state, key, restore},
    resume_rules::ResumeRules,
    saved_config::{comparable, kind, parse_config, read_run_state},
    snapshots::Snapshots,
};
use crate::Error;
use checkpoint::{Checkpoint, OwnParts, PartSource, keeper::SnapshotId};
use parallel::{
    Communicator,
    agreement::{agree, sum_over_ranks},
};
use std::sync::Arc;

/// Restores the run from the snapshot that the launcher chose, if there is one.
///
/// With the layout that saved it, a rank reads its own part and those of its companions. With
/// another one it reads the headers of all parts.
///
/// # Errors
/// If any rank cannot read its part of the snapshot, or `rules` refuse it.
pub(crate) fn resume(
    snapshots: &Snapshots,
    run: &StateTensors,
    world: &Arc<dyn Communicator>,
    rules: &ResumeRules,
) -> Result<Option<Restored>, Error> {
    // The launcher has told all ranks the same.
    let Some((id, num_parts)) = snapshots.to_restore() else {
        return Ok(None);
    };
    if num_parts == world.size()
        && let Some(restored) = resume_own_parts(snapshots, id, run, world, rules)?
    {
        return Ok(Some(restored));
    }
    let opened = open_all_parts(snapshots, id, num_parts);
    restore(opened, run, world, rules).map(Some)
}

fn name_of(id: SnapshotId) -> String {
    format!("the snapshot of step {}", id.step)
}

fn open_all_parts(
    snapshots: &Snapshots,
    id: SnapshotId,
    num_parts: usize,
) -> Result<Checkpoint, Error> {
    let mut parts = snapshots.connect_for_parts(id)?;
    let headers: Result<Vec<_>, _> = (0..num_parts).map(|rank| parts.header(rank)).collect();
    let open = Box::new(move |rank| parts.open(rank));
    Ok(Checkpoint::from_parts(
        &name_of(id),
        id.step,
        headers?,
        open,
    )?)
}

/// Restores the run if each rank holds what it held when it saved. Otherwise returns `None`, and
/// nothing was copied.
fn resume_own_parts(
    snapshots: &Snapshots,
    id: SnapshotId,
    run: &StateTensors,
    world: &Arc<dyn Communicator>,
    rules: &ResumeRules,
) -> Result<Option<Restored>, Error> {
    let opened = snapshots.connect_for_parts(id).and_then(|source| {
        let parts = OwnParts::read(&name_of(id), id.step, run.mesh.rank(), Box::new(source))?;
        let state = read_run_state(&parts.checkpoint)?;
        let saved = parse_config(&parts.checkpoint, &state)?;
        let saved = comparable(saved, &state, rules.config);
        let changes = rules.check_keys(parts.checkpoint.path(), &saved)?;
        Ok((parts, state, saved, changes))
    });
    let (mut parts, state, saved, changes) = agree(world, opened)?;
    // The names of experts' rows must be those of the saved placement before slices are compared.
    rules.prepare(&state);
    let saved_tensors = &parts.checkpoint.manifest().tensors;
    run.model
        .add_biases(|name| saved_tensors.contains_key(&key(kind::BIAS, name)));
    let tensors = run.tensors()?;
    // The other way reports what is wrong with a position.
    let is_same = state.position_problem(&saved).is_none()
        && parts.have_exactly(tensors.iter().map(|(slice, _)| slice));
    if sum_over_ranks(world, &[f64::from(u8::from(!is_same))])? != [0.0] {
        return Ok(None);
    }
    agree(world, copy_state(&mut parts.checkpoint, run, &[]))?;
    Ok(Some(Restored {
        state,
        saved,
        changes,
    }))
}
