//! Configuration files: parsing, changes from the command line, checks and the schema.

mod data_files;
mod draft;
mod forms;
mod key_path;
mod locate;
mod old_names;
mod paths;
mod suggest;
mod value;

pub(crate) use suggest::nearest;

use crate::{
    cli::{CheckArgs, ConfigArgs},
    hint::{one_line, printable},
};
use anyhow::{Context, Result, anyhow, bail};
use data_files::data_file_problems;
use draft::{Draft, FinishedDraft};
use std::process::ExitCode;
use trainer::config::Config;

/// Reads a configuration and applies `--set`.
///
/// # Errors
/// If the file or a change is wrong: where it is, and the nearest name that exists. All values that
/// are outside of their range are in one message, with the data files that cannot be read.
pub(crate) fn load(args: &ConfigArgs) -> Result<Config> {
    let path = args.config.display();
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot open the configuration {path}"))?;
    old_names::refuse_old_names(args, &text)?;
    let mut draft = Draft::of_file(path.to_string(), &text)?;
    for change in &args.set {
        draft.set(change)?;
    }
    let FinishedDraft {
        config,
        mut problems,
    } = draft.finish()?;
    if problems.is_empty() {
        return Ok(config);
    }
    problems.extend(data_file_problems(&config));
    bail!("{path}: cannot run:\n  - {}", list(&problems));
}

/// Refuses a configuration that cannot run on `ranks` ranks. Its data need not exist.
///
/// # Errors
/// If it cannot: every reason.
pub(crate) fn refuse_problems(args: &ConfigArgs, config: &Config, ranks: usize) -> Result<()> {
    refuse(args, ranks, config.problems(ranks))
}

/// Refuses a configuration that cannot run on `ranks` ranks, or whose data cannot be read here.
///
/// # Errors
/// If it cannot: every reason.
pub(crate) fn refuse_problems_and_data(
    args: &ConfigArgs,
    config: &Config,
    ranks: usize,
) -> Result<()> {
    let mut problems = config.problems(ranks);
    problems.extend(data_file_problems(config));
    refuse(args, ranks, problems)
}

fn refuse(args: &ConfigArgs, ranks: usize, problems: Vec<String>) -> Result<()> {
    if problems.is_empty() {
        return Ok(());
    }
    let plural = if ranks == 1 { "" } else { "s" };
    bail!(
        "{}: cannot run on {ranks} rank{plural}:\n  - {}",
        args.config.display(),
        list(&problems)
    );
}

/// Returns problems as lines of a list. Their text may come from a file.
fn list(problems: &[String]) -> String {
    let lines: Vec<String> = problems.iter().map(|problem| one_line(problem)).collect();
    lines.join("\n  - ")
}

/// Runs `moerun config check`: prints the configuration with all defaults if it can run.
pub(crate) fn check(args: &CheckArgs) -> Result<ExitCode> {
    let ranks = args.nproc_per_node;
    let config = load(&args.config)?;
    refuse_problems_and_data(&args.config, &config, ranks)?;
    let mesh = config.mesh(0, ranks).map_err(|error| anyhow!(error))?;
    let yaml = serde_saphyr::to_string(&config).context("cannot write the configuration")?;
    let path = args.config.config.display();
    println!("# {path}: ok on {mesh}. With all defaults:");
    print!("{}", printable(&yaml));
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn print_schema() -> Result<ExitCode> {
    print!("{}", schema());
    Ok(ExitCode::SUCCESS)
}

/// Returns the JSON schema of configurations, as text.
pub(crate) fn schema() -> String {
    let schema = schemars::schema_for!(Config);
    let text = serde_json::to_string_pretty(&schema).expect("a schema is plain data");
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hint::message;

    const SMALL: &str = "
run: {dir: runs/x}
model: {vocab_size: 300, hidden: 16, layers: 1, heads: 2, ffn: 32}
data: {train: [{path: a}], sequence_length: 8}
train: {steps: 10, global_batch: 4, micro_batch: 2}
";

    fn with(text: &str, set: &[&str]) -> Result<Config> {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("x.yaml");
        std::fs::write(&config, text).unwrap();
        load(&ConfigArgs {
            config,
            set: set.iter().map(|change| change.to_string()).collect(),
        })
    }

    fn refused(text: &str, set: &[&str]) -> String {
        message(&with(text, set).err().unwrap())
    }

    #[test]
    fn a_typo_has_a_position_and_a_suggestion() {
        let error = refused(&SMALL.replace("micro_batch", "mikro_batch"), &[]);
        for word in [
            "x.yaml",
            "line 5",
            "mikro_batch",
            "did you mean micro_batch?",
        ] {
            assert!(error.contains(word), "{word}: {error}");
        }
    }

    #[test]
    fn values_can_be_set() {
        let changes = [
            "train.steps=7",
            "data.train.0.weight=2.5",
            "schedule={constant: {lr: 1e-3}}",
        ];
        let config = with(SMALL, &changes).unwrap();
        assert_eq!(config.train.steps, 7);
        assert_eq!(config.data.train[0].weight, 2.5);
        let changes = [
            "model.moe={experts: 4, top_k: 2, ffn: 8}",
            "parallel.data=auto",
        ];
        let config = with(SMALL, &changes).unwrap();
        assert_eq!(config.model.moe.unwrap().experts, 4);
    }

    #[test]
    fn wrong_changes_are_explained() {
        assert!(refused(SMALL, &["train.stebs=7"]).contains("did you mean steps?"));
        assert!(refused(SMALL, &["train.steps=many"]).contains("--set train.steps: invalid type"));
        assert!(refused(SMALL, &["train.steps"]).contains("KEY=VALUE"));
        assert!(refused(SMALL, &["data.train.3.path=b"]).contains("a list of 1"));
        assert!(refused(SMALL, &["validation.evry=5"]).contains("did you mean every?"));
    }

    #[test]
    fn old_names_are_refused_in_one_message() {
        let text = SMALL.replace("dir: runs/x", "dir: runs/x, bind: none, communicator: null");
        let changes = [
            "parallel.recompute.parts.0=router",
            "parallel={zero_ranks: 2}", // tidy: allow(words)
            "run.bind=cores",
        ];
        let expected = [
            "x.yaml and --set: 4 keys have new names",
            "  run.bind -> run.cpu_affinity",
            "  run.communicator -> run.backend",
            "  parallel.recompute.parts: router -> dispatch",
            "  parallel.zero_ranks -> parallel.zero_group_size", // tidy: allow(words)
            "hint: rename them; nothing else changed",
        ];
        let error = refused(&text, &changes);
        assert!(error.ends_with(&expected.join("\n")), "{error}");
        let error = refused(SMALL, &["run.bind=none"]);
        assert!(
            error.starts_with("--set: 1 key has a new name\n  run.bind -> "),
            "{error}"
        );
    }
}
