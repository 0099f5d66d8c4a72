//! Runs that benches measure: their data, `moerun train`, and the commands of baselines.

use anyhow::{Context, Result, bail};
use dataset::tokens::TokenWriter;
use serde_json::Value;
use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

/// Calls `body` with a temporary folder, which is removed afterwards.
pub(super) fn with_temp_dir<T>(body: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let name = format!("moerun-bench-{}", std::process::id());
    let folder = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    let outcome = body(&folder);
    let _ = std::fs::remove_dir_all(&folder);
    outcome
}

/// Writes token files `tokens` of pseudo-random tokens: a step's work does not depend on them.
pub(super) fn write_tokens(folder: &Path, vocab: usize) -> Result<()> {
    let mut writer = TokenWriter::create(&folder.join("tokens"), vocab)?;
    let mut state = 1u64;
    let tokens: Vec<u32> = (0..100_000)
        .map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            ((state >> 33) % vocab as u64) as u32
        })
        .collect();
    writer.push(&tokens)?;
    writer.finish()?;
    Ok(())
}

/// Trains `config`, whose run is the folder `run`, and returns the metrics of its steps.
///
/// Ranks have `threads` threads each, by default the number that `moerun train` chooses.
pub(super) fn train(
    folder: &Path,
    config: &Value,
    ranks: usize,
    threads: Option<usize>,
) -> Result<Vec<Value>> {
    let run = folder.join("run");
    let _ = std::fs::remove_dir_all(&run);
    let path = folder.join("bench.yaml");
    std::fs::write(&path, serde_json::to_string(config)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    let this = std::env::current_exe().context("cannot find this program's file")?;
    let output = Command::new(this)
        .arg("train")
        .arg(&path)
        .args(["-n", &ranks.to_string()])
        .envs(threads.map(|threads| ("OMP_NUM_THREADS", threads.to_string())))
        .output()
        .context("cannot start moerun train")?;
    refuse_failure("moerun train", &output)?;
    let mut steps = lines(folder, "metrics.jsonl")?;
    steps.retain(|line| line["step_ms"].is_number());
    if steps.len() < 2 {
        bail!("the run has fewer than two steps");
    }
    Ok(steps)
}

/// Returns the lines of a file of the last run that [`train`] started, such as `ranks.jsonl`.
pub(super) fn lines(folder: &Path, file: &str) -> Result<Vec<Value>> {
    let path = folder.join("run").join(file);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let lines = text.lines();
    Ok(lines
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect())
}

/// Runs a baseline's shell command and returns the JSON object in the last line of its output.
///
/// # Errors
/// If the command fails, or its last line has no number `key`.
pub(super) fn baseline_line(text: &str, key: &str) -> Result<Value> {
    let mut command = Command::new("sh");
    command.args(["-c", text]);
    last_json_line(command, text, key)
}

/// Runs `command` and returns the JSON object in the last line of its output.
///
/// # Errors
/// If the command fails, or its last line has no number `key`.
pub(super) fn last_json_line(mut command: Command, name: &str, key: &str) -> Result<Value> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("cannot start `{name}`"))?;
    refuse_failure(&format!("`{name}`"), &output)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line: Option<Value> = text
        .lines()
        .last()
        .and_then(|line| serde_json::from_str(line).ok());
    line.filter(|line| line[key].is_number())
        .with_context(|| format!("`{name}`: the last line is not JSON with a number `{key}`"))
}

fn refuse_failure(name: &str, output: &Output) -> Result<()> {
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{name}: {}:\n{}", output.status, errors.trim_end());
    }
    Ok(())
}
