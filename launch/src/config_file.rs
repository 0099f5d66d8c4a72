//! Configuration files: parsing, changes from the command line, checks and the schema.

use crate::{
    cli::{CheckArgs, ConfigArgs},
    hint::{WithHint, hinted},
};
use anyhow::{Context, Error, Result, anyhow, bail};
use serde_json::{Map, Value, json};
use std::process::ExitCode;
use trainer::config::{Config, Renamed, renamed_keys};

/// Similarity (Jaro-Winkler) from which a known name is suggested for an unknown one.
const MIN_SIMILARITY: f64 = 0.7;

/// Reads a configuration and applies `--set`.
///
/// # Errors
/// If the file or a change is wrong: where it is, and the nearest name that exists.
pub(crate) fn load(args: &ConfigArgs) -> Result<Config> {
    let path = args.config.display();
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot open the configuration {path}"))?;
    refuse_old_names(args, &text)?;
    let config: Config = serde_saphyr::from_str(&text).map_err(|error| {
        let message = error.to_string().replace("<input>", &path.to_string());
        let message = message.strip_prefix("error: ").unwrap_or(&message);
        let error = anyhow!("{path}: {message}");
        suggest(error, nearest_known_name(message))
    })?;
    if args.set.is_empty() {
        return Ok(config);
    }
    let mut value = serde_json::to_value(&config).expect("a configuration is plain data");
    for change in &args.set {
        apply(&mut value, change)?;
    }
    serde_path_to_error::deserialize(value).map_err(|error| {
        let key = error.path().to_string();
        let message = error.into_inner().to_string();
        let error = anyhow!("--set {key}: {message}");
        suggest(error, nearest_known_name(&message))
    })
}

/// Refuses keys and values of the previous version, with all their new names in one message.
fn refuse_old_names(args: &ConfigArgs, text: &str) -> Result<()> {
    // The typed parser reports text that is no YAML, with the position.
    let file: Value = serde_saphyr::from_str(text).unwrap_or_default();
    let mut found = renamed_keys(&file);
    let mut sources = Vec::new();
    if !found.is_empty() {
        sources.push(args.config.display().to_string());
    }
    let changes = args.set.iter().filter_map(|change| change_alone(change));
    let in_changes: Vec<Renamed> = changes.flat_map(|change| renamed_keys(&change)).collect();
    if !in_changes.is_empty() {
        sources.push("--set".to_string());
    }
    for renamed in in_changes {
        if !found.contains(&renamed) {
            found.push(renamed);
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    let count = match found.len() {
        1 => "1 key has a new name".to_string(),
        count => format!("{count} keys have new names"),
    };
    let list: String = found
        .iter()
        .map(|renamed| format!("\n  {renamed}"))
        .collect();
    let error = anyhow!("{}: {count}{list}", sources.join(" and "));
    Err(hinted(error, "rename them; nothing else changed"))
}

/// Returns a configuration with nothing but this change, or None if its value is no YAML.
fn change_alone(change: &str) -> Option<Value> {
    let (path, text) = change.split_once('=')?;
    let mut value: Value = serde_saphyr::from_str(text).ok()?;
    for key in path.rsplit('.') {
        value = match key.parse::<usize>() {
            Ok(_) => json!([value]),
            Err(_) => json!({ key: value }),
        };
    }
    Some(value)
}

/// Refuses a configuration that cannot run on `ranks` ranks.
///
/// # Errors
/// If it cannot: every reason.
pub(crate) fn refuse_problems(args: &ConfigArgs, config: &Config, ranks: usize) -> Result<()> {
    if ranks == 0 {
        bail!("-n is 0: at least one rank is needed");
    }
    let problems = config.problems(ranks);
    if problems.is_empty() {
        return Ok(());
    }
    let plural = if ranks == 1 { "" } else { "s" };
    bail!(
        "{}: cannot run on {ranks} rank{plural}:\n  - {}",
        args.config.display(),
        problems.join("\n  - ")
    );
}

/// Runs `moerun config check`: prints the configuration with all defaults if it can run.
pub(crate) fn check(args: &CheckArgs) -> Result<ExitCode> {
    let ranks = args.nproc_per_node;
    let config = load(&args.config)?;
    refuse_problems(&args.config, &config, ranks)?;
    let mesh = config.mesh(0, ranks).map_err(|error| anyhow!(error))?;
    let resolved = config.resolved();
    let yaml = serde_saphyr::to_string(&resolved).context("cannot write the configuration")?;
    let path = args.config.config.display();
    for warning in config.warnings() {
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

/// Sets one dotted key, which must exist or be optional in the configuration's type.
fn apply(root: &mut Value, change: &str) -> Result<()> {
    let Some((path, text)) = change.split_once('=') else {
        return Err(anyhow!("--set {change}: no value"))
            .hint("write KEY=VALUE, such as train.steps=100");
    };
    let new: Value = serde_saphyr::from_str(text)
        .map_err(|error| anyhow!("--set {change}: the value is not YAML: {error}"))?;
    let mut target = root;
    let mut walked = String::new();
    for key in path.split('.') {
        target = child(target, key, &walked).with_context(|| format!("--set {path}"))?;
        if !walked.is_empty() {
            walked.push('.');
        }
        walked.push_str(key);
    }
    *target = new;
    Ok(())
}

/// Returns the value of `key` in `parent`, which is at the dotted path `path`.
fn child<'a>(parent: &'a mut Value, key: &str, path: &str) -> Result<&'a mut Value> {
    let here = match path {
        "" => "the configuration",
        path => path,
    };
    // Keys of an optional section that is not set are checked when the whole is parsed again.
    if parent.is_null() {
        *parent = json!({ key: null });
    }
    match parent {
        Value::Object(section) => {
            if !section.contains_key(key) {
                return Err(unknown_key(section, key, here));
            }
            Ok(&mut section[key])
        }
        Value::Array(list) => {
            let len = list.len();
            let index: Option<usize> = key.parse().ok();
            let entry = index.and_then(|index| list.get_mut(index));
            entry
                .ok_or_else(|| anyhow!("{here} is a list of {len} and has no {key}"))
                .hint("write a position from 0")
        }
        _ => bail!("{here} is a value and has no key {key}"),
    }
}

fn unknown_key(section: &Map<String, Value>, key: &str, here: &str) -> Error {
    let known: Vec<&str> = section.keys().map(String::as_str).collect();
    let error = anyhow!("{here} has no key {key}, only {}", known.join(", "));
    suggest(error, nearest(key, known.into_iter()))
}

/// Adds a hint with a name that was probably meant, if there is one.
fn suggest(error: Error, name: Option<&str>) -> Error {
    match name {
        Some(name) => hinted(error, format!("did you mean {name}?")),
        None => error,
    }
}

/// Returns the known name that is most like the unknown one in a message of serde.
fn nearest_known_name(message: &str) -> Option<&str> {
    let first_line = message.lines().next().unwrap_or(message);
    ["unknown field", "unknown variant"]
        .iter()
        .filter_map(|kind| first_line.split_once(kind))
        .find_map(|(_, rest)| nearest_of_list(rest))
}

/// Returns the known name that is most like the unknown one.
///
/// `text` is "`wrong`, expected one of `a`, `b`", perhaps without quotes around the known names.
fn nearest_of_list(text: &str) -> Option<&str> {
    let mut quoted = text.split('`').skip(1).step_by(2);
    let wrong = quoted.next()?;
    let mut known: Vec<&str> = quoted.collect();
    if known.is_empty() {
        let list = text.split_once("expected").map_or("", |(_, list)| list);
        let list = list.trim_start_matches(" one of");
        known = list.split(',').map(str::trim).collect();
    }
    nearest(wrong, known.into_iter())
}

pub(crate) fn nearest<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|name| (strsim::jaro_winkler(wrong, name), name))
        .filter(|(similarity, _)| *similarity > MIN_SIMILARITY)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
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
