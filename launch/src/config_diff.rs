//! Differences between a saved run and the configuration that would resume it.

use crate::{cli::DiffArgs, config_file, hint::hinted, restarts};
use anyhow::{Result, anyhow};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use std::{path::Path, process::ExitCode};
use trainer::{
    Trainer, check_resume,
    config::{Config, ResumeEffect},
    newest_config,
};

/// A line of `restarts.jsonl` for a start that changed the configuration.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChangeRecord<'a> {
    /// Number of steps of the state that the run resumes from.
    step: u64,
    /// Changed keys, except those that results do not depend on.
    changes: Vec<ChangedKey<'a>>,
    /// Outcomes of tensors and other state that only one side has.
    notes: &'a [String],
}

/// A changed configuration key.
#[derive(Debug, Serialize, JsonSchema)]
struct ChangedKey<'a> {
    /// The dotted key.
    key: &'a str,
    /// The value of the saved run; null if it was unset.
    saved: &'a Value,
    /// The new value; null if it is unset.
    now: &'a Value,
}

/// Refuses a start that would resume with changes after which the saved weights compute something
/// else. Reads only; called before anything is written.
///
/// # Errors
/// If a refused key differs and is not in `accepted`, or `accepted` names an unknown key.
pub(crate) fn refuse_changes(config: &Config, accepted: &[String]) -> Result<()> {
    let known = Config::resume_effects();
    for accepted in accepted {
        let section = format!("{accepted}.");
        let is_known = |key: &String| key == accepted || key.starts_with(&section);
        if !known.keys().any(is_known) {
            let error = anyhow!("--accept-changes: there is no key {accepted:?}");
            return Err(
                match config_file::nearest(accepted, known.keys().map(String::as_str)) {
                    Some(name) => hinted(error, format!("did you mean {name}?")),
                    None => error,
                },
            );
        }
    }
    let root = config.run.dir.join("checkpoints");
    Ok(check_resume(config, accepted, &root)?)
}

/// Runs `moerun config diff`: prints a line per changed key. Fails if the run could not resume.
pub(crate) fn run(args: &DiffArgs) -> Result<ExitCode> {
    let config = config_file::load(&args.config)?;
    let root = args.run.join("checkpoints");
    let Some((path, saved)) = newest_config(&root, &config)? else {
        let error = anyhow!("{} has no readable checkpoint", args.run.display());
        return Err(hinted(error, "name the folder of a run (run.dir)"));
    };
    let changes = config.changes_from(&saved);
    println!("{} -> {}", path.display(), args.config.config.display());
    if changes.is_empty() {
        println!("no key differs");
    }
    for change in &changes {
        println!("{:9} {change}", change.effect.name());
    }
    let is_refused = changes
        .iter()
        .any(|change| change.effect == ResumeEffect::Refused);
    Ok(if is_refused {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Appends the differences with which a run resumes to its `restarts.jsonl`, if there are any.
pub(crate) fn record(trainer: &Trainer, dir: &Path) -> Result<()> {
    let report = trainer.resume_report();
    if report.changes.is_empty() && report.notes.is_empty() {
        return Ok(());
    }
    let changes = report.changes.iter().map(|change| ChangedKey {
        key: &change.key,
        saved: &change.saved,
        now: &change.now,
    });
    let record = ChangeRecord {
        step: trainer.step(),
        changes: changes.collect(),
        notes: &report.notes,
    };
    let line = serde_json::to_string(&record).expect("plain data");
    restarts::append(dir, &line)
}
