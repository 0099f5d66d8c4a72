//! The differences that a run may have from the checkpoint that it resumes from.
//!
//! Every key of the configuration has an effect ([`ResumeEffect`]), and every tensor has a
//! counterpart. The rules are checked before anything is copied or written.

use super::{
    accounting::Mismatch,
    run_state::RunState,
    saved_config::{has_kind, kind},
};
use crate::{
    Error,
    config::{Config, KeyChange, ResumeEffect},
};
use std::{collections::BTreeMap, path::Path};

/// Tensors that an error lists.
const LISTED: usize = 8;

/// The rules of one run.
pub(crate) struct ResumeRules<'a> {
    pub(crate) config: &'a Config,
    /// Keys whose refused changes the user accepts. A section stands for all its keys.
    pub(crate) accepted: &'a [String],
    pub(crate) prepare: &'a dyn Fn(&RunState),
}

/// The differences with which a run resumes.
#[derive(Debug, Clone, Default)]
pub(crate) struct AllowedChanges {
    /// Changes to report, those that were accepted included.
    pub(crate) reported: Vec<KeyChange>,
    /// Outcomes of state that only one side has, one line each.
    pub(crate) notes: Vec<String>,
    accepts_mismatches: bool,
    /// The checkpoint is of step 0, before which an optimizer has no state.
    pub(super) has_done_nothing: bool,
    /// The checkpoint has no biases, because loss-free balancing was off.
    lacks_biases: bool,
}

impl ResumeRules<'_> {
    pub(crate) fn prepare(&self, state: &RunState) {
        (self.prepare)(state);
    }

    /// Compares the configuration `saved` of the checkpoint `path` with the run's.
    ///
    /// # Errors
    /// If a key differs that changes what the saved weights compute: all of them.
    pub(crate) fn check_keys(&self, path: &Path, saved: &Config) -> Result<AllowedChanges, Error> {
        let mut changes = AllowedChanges {
            lacks_biases: !selects_with_bias(saved),
            ..AllowedChanges::default()
        };
        let mut refused = Vec::new();
        for change in self.config.changes_from(saved) {
            match change.effect {
                ResumeEffect::Free => {}
                ResumeEffect::Reported => changes.reported.push(change),
                ResumeEffect::Refused if is_accepted(&change.key, self.accepted) => {
                    changes.accepts_mismatches = true;
                    changes.reported.push(change);
                }
                ResumeEffect::Refused => refused.push(change),
            }
        }
        if !refused.is_empty() {
            return Err(refused_error(path, &refused));
        }
        changes.notes = state_notes(saved, self.config);
        Ok(changes)
    }

    /// Adds what is to be known about tensors without a counterpart to `changes`.
    ///
    /// # Errors
    /// If a tensor has none and no accepted change explains it.
    pub(crate) fn check_tensors(
        &self,
        path: &Path,
        mismatches: &[Mismatch],
        changes: &mut AllowedChanges,
    ) -> Result<(), Error> {
        let is_new_bias = |mismatch: &Mismatch| match mismatch {
            Mismatch::Missing { name, .. } => changes.lacks_biases && name.starts_with("bias/"),
            _ => false,
        };
        let is_initial_state = |mismatch: &Mismatch| match mismatch {
            Mismatch::Missing { name, .. } => {
                changes.has_done_nothing && !has_kind(name, &[kind::MASTER, kind::BIAS])
            }
            _ => false,
        };
        let unexplained: Vec<Mismatch> = mismatches
            .iter()
            .filter(|mismatch| !is_new_bias(mismatch) && !is_initial_state(mismatch))
            .cloned()
            .collect();
        if !changes.accepts_mismatches && !unexplained.is_empty() {
            return Err(mismatch_error(path, &unexplained));
        }
        let mut states: BTreeMap<(String, bool), usize> = BTreeMap::new();
        for mismatch in unexplained {
            let is_omitted = matches!(mismatch, Mismatch::Unplaced { .. });
            let name = mismatch.name();
            match name.split_once('/') {
                Some((state, _)) if !has_kind(name, &[kind::MASTER, kind::BIAS]) => {
                    let group = (state.to_string(), is_omitted);
                    *states.entry(group).or_default() += 1;
                }
                _ if is_omitted => changes.notes.push(format!("{mismatch}: it is omitted")),
                _ => {
                    let note = format!("{mismatch}: it starts from its initial value");
                    changes.notes.push(note);
                }
            }
        }
        // As many as weights, or more.
        let counted = states.into_iter().map(|((state, is_omitted), count)| {
            let [tensors, are, start] = if count == 1 {
                ["tensor", "is", "starts"]
            } else {
                ["tensors", "are", "start"]
            };
            if is_omitted {
                format!("{count} {tensors} of {state} {are} no longer used")
            } else {
                format!("{count} {tensors} of {state} {are} missing and {start} at zero")
            }
        });
        changes.notes.extend(counted);
        Ok(())
    }
}

fn is_accepted(key: &str, accepted: &[String]) -> bool {
    accepted.iter().any(|accepted| {
        let rest = key.strip_prefix(accepted.as_str());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })
}

fn selects_with_bias(config: &Config) -> bool {
    let moe = config.model.moe.as_ref();
    moe.is_some_and(|moe| moe.has_selection_bias())
}

fn updates_biases(config: &Config) -> bool {
    let moe = config.model.moe.as_ref();
    moe.is_some_and(|moe| moe.bias_update_rate > 0.0)
}

/// Returns what happens to the state of features that were switched on or off.
fn state_notes(saved: &Config, now: &Config) -> Vec<String> {
    let mut notes = Vec::new();
    if selects_with_bias(now) && !selects_with_bias(saved) {
        notes.push(if updates_biases(now) {
            "loss-free balancing is on: its biases start at 0"
        } else {
            "the frozen biases of the routers are 0: the checkpoint has none"
        });
    }
    if updates_biases(saved) && !updates_biases(now) {
        notes.push("loss-free balancing is off: its biases are kept and still select experts");
    }
    let places = |config: &Config| {
        let moe = config.model.moe.as_ref();
        moe.is_some_and(|moe| moe.placement.is_some())
    };
    match (places(saved), places(now)) {
        (false, true) => {
            notes.push("expert placement is on: experts start in order, with loads of 0");
        }
        (true, false) => {
            notes.push(
                "expert placement is off: experts return to their order, and the recorded loads \
                 are dropped",
            );
        }
        _ => {}
    }
    notes.into_iter().map(str::to_string).collect()
}

fn refused_error(path: &Path, refused: &[KeyChange]) -> Error {
    let list: String = refused
        .iter()
        .map(|change| format!("\n  {change}"))
        .collect();
    let keys: Vec<&str> = refused.iter().map(|change| change.key.as_str()).collect();
    Error::Resume(format!(
        "{}: the saved state does not fit these changes:{list}\n\
         hint: give the saved values, choose another run.dir to start over, or accept them with \
         --accept-changes {}",
        path.display(),
        keys.join(",")
    ))
}

/// Returns the error of a checkpoint whose tensors are not those of the run.
pub(crate) fn mismatch_error(path: &Path, mismatches: &[Mismatch]) -> Error {
    let mut list: String = mismatches
        .iter()
        .take(LISTED)
        .map(|mismatch| format!("\n  {mismatch}"))
        .collect();
    if mismatches.len() > LISTED {
        list += &format!("\n  and {} more", mismatches.len() - LISTED);
    }
    Error::Resume(format!(
        "{}: its tensors are not those of the model:{list}",
        path.display()
    ))
}
