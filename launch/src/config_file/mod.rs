//! Configuration files: parsing, changes from the command line, checks and the schema.

mod data_files;
mod draft;
mod forms;
mod key_path;
mod locate;
mod old_names;
mod paths;
#[cfg(test)]
mod schema_walk;
mod suggest;
mod tls_files;
mod value;

pub(crate) use data_files::{DataCheck, check_data, verify_data};
pub(crate) use suggest::nearest;

use crate::{
    cli::{CheckArgs, ConfigArgs},
    hint::one_line,
};
use anyhow::{Context, Result, anyhow, bail};
use draft::{Draft, FinishedDraft};
use std::process::ExitCode;
use tls_files::tls_file_problems;
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
    problems.extend(check_data(&config).problems);
    problems.extend(tls_file_problems(&config));
    bail!("{path}: cannot run:\n  - {}", list(&problems));
}

/// Refuses a configuration that cannot run on `ranks` ranks. Its data need not exist.
///
/// # Errors
/// If it cannot: every reason.
pub(crate) fn refuse_problems(args: &ConfigArgs, config: &Config, ranks: usize) -> Result<()> {
    refuse(args, ranks, config.problems(ranks))
}

/// Refuses a configuration that cannot run on `ranks` ranks, or whose data cannot be read here or
/// does not fit it. Returns warnings about the data, which a run repeats when it starts.
///
/// # Errors
/// If it cannot: every reason.
pub(crate) fn refuse_problems_and_data(
    args: &ConfigArgs,
    config: &Config,
    ranks: usize,
) -> Result<Vec<String>> {
    let data = check_data(config);
    let mut problems = config.problems(ranks);
    problems.extend(data.problems);
    problems.extend(tls_file_problems(config));
    refuse(args, ranks, problems)?;
    Ok(data.warnings)
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
    let data_warnings = refuse_problems_and_data(&args.config, &config, ranks)?;
    let mesh = config.mesh(0, ranks).map_err(|error| anyhow!(error))?;
    let resolved = config.resolved();
    let yaml = serde_saphyr::to_string(&resolved).context("cannot write the configuration")?;
    let path = args.config.config.display();
    for warning in config.warnings().into_iter().chain(data_warnings) {
        eprintln!("warning: {warning}");
    }
    println!("# {path}: ok on {mesh}. With all defaults:");
    print!("{yaml}");
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
        assert_eq!(config.data.train[0].weight, Some(2.5));
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
        let error = refused(SMALL, &["train.steps=many"]);
        assert!(
            error.contains("train.steps is \"many\"; it must be a whole number"),
            "{error}"
        );
        assert!(error.contains("(--set)"), "{error}");
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

    #[test]
    fn keys_of_sections_that_the_file_lacks_can_be_set() {
        let changes = [
            "validation.every=5",
            "validation.sequences=4",
            "data.validation=[{path: x}]",
            "model.mup.width=4",
            "model.moe.experts=4",
            "model.moe.top_k=2",
            "model.moe.ffn=8",
            "model.moe.placement.every=7",
            "parallel.recompute.layers=all",
            "snapshot.redundancy.parity={data: 4, parity: 1}",
        ];
        let config = with(SMALL, &changes).unwrap();
        assert_eq!(config.validation.unwrap().sequences, 4);
        assert_eq!(config.model.mup.unwrap().width, 4.0);
        assert_eq!(config.model.moe.unwrap().placement.unwrap().every, 7);
    }

    #[test]
    fn text_keys_take_any_scalar() {
        for (value, expected) in [
            ("12345", "12345"),
            ("no", "no"),
            ("007", "007"),
            ("1e3", "1e3"),
        ] {
            let config = with(SMALL, &[&format!("run.dir={value}")]).unwrap();
            assert_eq!(config.run.dir.to_str(), Some(expected));
            let text = SMALL.replace("runs/x", value);
            assert_eq!(with(&text, &[]).unwrap().run.dir.to_str(), Some(expected));
        }
    }

    #[test]
    fn a_required_key_may_be_given_by_set_alone() {
        let text = SMALL.replace("steps: 10, ", "");
        assert_eq!(with(&text, &["train.steps=1e3"]).unwrap().train.steps, 1000);
        let error = refused(&text, &[]);
        assert!(error.contains("train: missing field `steps`"), "{error}");
        assert!(error.contains("line 5"), "{error}");
        let text = SMALL.replace("run: {dir: runs/x}", "");
        assert_eq!(
            with(&text, &["run.dir=x"]).unwrap().run.dir.to_str(),
            Some("x")
        );
        assert!(refused(&text, &[]).contains("missing field `run`"));
        let error = refused(SMALL, &["model.mup.embedding=2"]);
        assert!(
            error.contains("--set model.mup: missing field `width`"),
            "{error}"
        );
    }

    #[test]
    fn null_resets_a_key() {
        let text = SMALL.replace("heads: 2", "heads: 2, kv_heads: 1, norm_eps: null");
        let config = with(&text, &[]).unwrap();
        assert_eq!(
            (config.model.kv_heads, config.model.norm_eps),
            (Some(1), 1e-5)
        );
        let config = with(&text, &["model.kv_heads=null", "run.seed=null"]).unwrap();
        assert_eq!((config.model.kv_heads, config.run.seed), (None, 1));
        assert!(refused(SMALL, &["train.steps=null"]).contains("missing field `steps`"));
        assert!(refused(&SMALL.replace("layers: 1", "layers: ~"), &[]).contains("`layers`"));
        assert!(refused(SMALL, &["train.stebs=null"]).contains("did you mean steps?"));
    }

    #[test]
    fn another_alternative_replaces_the_present_one() {
        let text = SMALL.to_string() + "schedule: {cosine: {lr: 1}}\nparallel: {schedule: zb-v}\n";
        let changes = [
            "schedule.constant.lr=0.5",
            "parallel.schedule.file=mine.yaml",
        ];
        let config = with(&text, &changes).unwrap();
        let value = serde_json::to_value(config).unwrap();
        assert_eq!(value["schedule"]["constant"]["lr"], 0.5);
        assert_eq!(value["schedule"].as_object().unwrap().len(), 1);
        assert_eq!(value["parallel"]["schedule"]["file"], "mine.yaml");
    }

    #[test]
    fn a_change_of_a_refused_value_mends_it() {
        let text = SMALL.replace("steps: 10", "steps: -1, grad_clip: .nan");
        let error = refused(&text, &[]);
        for words in [
            "train.steps is -1",
            "train.grad_clip is NaN",
            "(line 5)",
            "a.idx",
        ] {
            assert!(error.contains(words), "{words}: {error}");
        }
        assert_eq!(
            with(&text, &["train.steps=3", "train.grad_clip=1"])
                .unwrap()
                .train
                .steps,
            3
        );
        let error = refused(&text, &["train.steps=0", "train.grad_clip=null"]);
        assert!(
            error.contains("train.steps is 0; it must be at least 1 (--set)"),
            "{error}"
        );
        assert!(!error.contains("grad_clip"), "{error}");
    }

    #[test]
    fn paths_are_expanded_in_the_file_and_in_changes() {
        let home = std::env::var("HOME").unwrap();
        let text = SMALL
            .replace("runs/x", "~/runs")
            .replace("path: a", "path: $HOME/a");
        let config = with(&text, &["data.tokenizer=${HOME}/t.json"]).unwrap();
        assert_eq!(
            config.run.dir.to_str(),
            Some(format!("{home}/runs").as_str())
        );
        assert_eq!(
            config.data.train[0].path.to_str(),
            Some(format!("{home}/a").as_str())
        );
        assert_eq!(
            config.data.tokenizer.unwrap().to_str(),
            Some(format!("{home}/t.json").as_str())
        );
        let error = refused(
            &text,
            &["run.dir=$MOERUN_NOWHERE/x", "data.train.0.path=~root/x"],
        );
        for words in [
            "run.dir is \"$MOERUN_NOWHERE/x\": the environment variable MOERUN_NOWHERE is not set",
            "data.train[0].path is \"~root/x\": only the home folder",
        ] {
            assert!(error.contains(words), "{words}: {error}");
        }
    }

    #[test]
    fn text_of_a_file_is_shown_without_control_characters() {
        let text = SMALL.replace("steps: 10", "\"st\\e[2Jeps\\nhint: no\": 10");
        let error = refused(&text, &[]);
        assert!(
            !error.contains('\u{1b}') && !error.contains("\nhint: no"),
            "{error}"
        );
        assert!(error.contains("st\\u001b[2Jeps\\nhint"), "{error}");
    }
}
