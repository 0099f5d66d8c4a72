//! Configurations as files: parsing with positions, changes from the command line, checks, the schema.

use crate::cli::{CheckArgs, ConfigArgs};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use std::process::ExitCode;
use trainer::config::Config;

/// Reads a configuration and applies `--set`.
pub(crate) fn load(args: &ConfigArgs) -> Result<Config> {
    let path = args.config.display();
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot open the configuration {path}"))?;
    let config: Config = serde_saphyr::from_str(&text).map_err(|error| {
        let message = error.to_string().replace("<input>", &path.to_string());
        anyhow!(
            "{path}: {}",
            with_hint(message.strip_prefix("error: ").unwrap_or(&message))
        )
    })?;
    if args.set.is_empty() {
        return Ok(config);
    }
    let mut value = serde_json::to_value(&config).expect("a configuration is plain data");
    for change in &args.set {
        apply(&mut value, change)?;
    }
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        anyhow!(
            "--set {path}: {}",
            with_hint(&error.into_inner().to_string())
        )
    })
}

/// Refuses a configuration that cannot run on `ranks` ranks, with every reason.
pub(crate) fn refuse_problems(args: &ConfigArgs, config: &Config, ranks: usize) -> Result<()> {
    if ranks == 0 {
        bail!("--nproc-per-node is 0; at least one rank is needed");
    }
    let problems = config.problems(ranks);
    if !problems.is_empty() {
        bail!(
            "{} cannot run on {ranks} rank(s):\n  - {}",
            args.config.display(),
            problems.join("\n  - ")
        );
    }
    Ok(())
}

/// `moerun config check`.
pub(crate) fn check(args: &CheckArgs) -> Result<ExitCode> {
    let config = load(&args.config)?;
    refuse_problems(&args.config, &config, args.nproc_per_node)?;
    let mesh = config
        .mesh(0, args.nproc_per_node)
        .map_err(|e| anyhow!(e))?;
    println!(
        "# {} is fine on {mesh}. With all defaults it is:",
        args.config.config.display()
    );
    print!(
        "{}",
        serde_saphyr::to_string(&config).context("cannot write the configuration")?
    );
    Ok(ExitCode::SUCCESS)
}

/// `moerun config schema`.
pub(crate) fn print_schema() -> Result<ExitCode> {
    let schema = schemars::schema_for!(Config);
    println!("{}", serde_json::to_string_pretty(&schema)?);
    Ok(ExitCode::SUCCESS)
}

/// Sets one dotted key, which must exist or be optional in the configuration's type.
fn apply(root: &mut Value, change: &str) -> Result<()> {
    let (path, text) = change
        .split_once('=')
        .ok_or_else(|| anyhow!("--set {change}: write KEY=VALUE, such as train.steps=100"))?;
    let new: Value = serde_saphyr::from_str(text)
        .map_err(|e| anyhow!("--set {change}: the value is not YAML: {e}"))?;
    let mut place = root;
    let mut walked = String::new();
    for key in path.split('.') {
        let here = if walked.is_empty() {
            "the configuration".to_string()
        } else {
            walked.clone()
        };
        place = match place {
            Value::Object(map) => {
                if !map.contains_key(key) {
                    let known: Vec<&str> = map.keys().map(String::as_str).collect();
                    let hint = nearest(key, known.iter().copied())
                        .map_or(String::new(), |near| format!("; did you mean {near}?"));
                    bail!(
                        "--set {path}: {here} has no key {key}, only {}{hint}",
                        known.join(", ")
                    );
                }
                map.get_mut(key).expect("just looked up")
            }
            Value::Array(list) => {
                let len = list.len();
                let index: Option<usize> = key.parse().ok();
                index.and_then(|index| list.get_mut(index)).ok_or_else(|| {
                    anyhow!("--set {path}: {here} is a list of {len}; write a position from 0 in place of {key}")
                })?
            }
            // An optional section that is not there yet: its keys are checked when all is parsed again.
            Value::Null => {
                *place = Value::Object(serde_json::Map::new());
                let map = place.as_object_mut().expect("just made");
                map.entry(key).or_insert(Value::Null)
            }
            _ => bail!("--set {path}: {here} is a value and has no key {key}"),
        };
        walked = if walked.is_empty() {
            key.to_string()
        } else {
            format!("{walked}.{key}")
        };
    }
    *place = new;
    Ok(())
}

/// Adds the nearest valid key to a message about an unknown one.
fn with_hint(message: &str) -> String {
    let first = message.lines().next().unwrap_or(message);
    let quoted = |text: &str| {
        text.split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_string)
            .collect::<Vec<_>>()
    };
    for word in ["unknown field", "unknown variant"] {
        let Some((_, rest)) = first.split_once(word) else {
            continue;
        };
        let names = quoted(rest);
        let Some(wrong) = names.first() else { continue };
        let mut known: Vec<String> = names[1..].to_vec();
        if known.is_empty() {
            let list = rest.split_once("expected").map_or("", |(_, list)| list);
            known = list
                .trim_start_matches(" one of")
                .split(',')
                .map(|name| name.trim().to_string())
                .collect();
        }
        if let Some(near) = nearest(wrong, known.iter().map(String::as_str)) {
            return format!("{message}\nhint: did you mean {near}?");
        }
    }
    message.to_string()
}

fn nearest<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|name| (strsim::jaro_winkler(wrong, name), name))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            set: set.iter().map(|s| s.to_string()).collect(),
        })
    }

    fn refused(text: &str, set: &[&str]) -> String {
        format!("{:#}", with(text, set).err().unwrap())
    }

    #[test]
    fn a_typo_has_a_place_and_a_suggestion() {
        let error = refused(&SMALL.replace("micro_batch", "mikro_batch"), &[]);
        assert!(
            error.contains("x.yaml") && error.contains("line 5") && error.contains("mikro_batch"),
            "{error}"
        );
        assert!(error.contains("did you mean micro_batch?"), "{error}");
    }

    #[test]
    fn values_can_be_set() {
        let config = with(
            SMALL,
            &[
                "train.steps=7",
                "data.train.0.weight=2.5",
                "schedule={constant: {lr: 1e-3}}",
            ],
        )
        .unwrap();
        assert_eq!((config.train.steps, config.data.train[0].weight), (7, 2.5));
        let config = with(
            SMALL,
            &[
                "model.moe={experts: 4, top_k: 2, ffn: 8}",
                "parallel.data=auto",
            ],
        )
        .unwrap();
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
}
