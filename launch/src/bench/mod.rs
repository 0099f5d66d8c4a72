//! `moerun bench`: one JSON object a line on standard output, and nothing else there.

pub(crate) mod collectives;
mod floor;
pub(crate) mod layouts;
pub(crate) mod memory;
pub(crate) mod moe_layer;
mod moe_step;
pub(crate) mod pipeline;
pub(crate) mod recompute;
pub(crate) mod snapshot;
pub(crate) mod step;
mod workload;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use trainer::data::TokenWriter;

/// Gives `body` a folder of its own, and takes it away afterwards.
fn with_temp_dir(body: impl FnOnce(&Path) -> Result<ExitCode>) -> Result<ExitCode> {
    let folder = std::env::temp_dir().join(format!("moerun-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let outcome = body(&folder);
    let _ = std::fs::remove_dir_all(&folder);
    outcome
}

/// Token files `tokens` without order: the work is the same whatever they say.
fn write_tokens(folder: &Path, vocab: usize) -> Result<()> {
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

/// Trains what `config` describes, whose run is the folder `run`, on `ranks` ranks of `threads` threads, or as many as ranks take by
/// themselves: its steps' metrics.
fn train(
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
    let this = std::env::current_exe().context("cannot find this program's own file")?;
    let output = Command::new(this)
        .arg("train")
        .arg(&path)
        .args(["-n", &ranks.to_string()])
        .envs(threads.map(|threads| ("OMP_NUM_THREADS", threads.to_string())))
        .output()
        .context("cannot start moerun train")?;
    if !output.status.success() {
        bail!(
            "moerun train ended with {}:\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    let metrics = run.join("metrics.jsonl");
    let text = std::fs::read_to_string(&metrics)
        .with_context(|| format!("cannot read {}", metrics.display()))?;
    let lines = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let steps: Vec<Value> = lines.filter(|line| line["step_ms"].is_number()).collect();
    if steps.len() < 2 {
        bail!("{} has fewer than two steps", metrics.display());
    }
    Ok(steps)
}

/// The JSON object, with a number `key`, in the last line that `command` prints.
fn last_json_line(mut command: Command, name: &str, key: &str) -> Result<Value> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("cannot start `{name}`"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!(
            "`{name}` ended with {}:\n{}",
            output.status,
            errors.trim_end()
        );
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let line: Option<Value> = text
        .lines()
        .last()
        .and_then(|line| serde_json::from_str(line).ok());
    line.filter(|line| line[key].is_number())
        .with_context(|| format!("`{name}` has to end with a JSON line that has a number `{key}`"))
}

/// The largest number of a list.
fn largest(values: &Value) -> f64 {
    let numbers = values
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_f64);
    numbers.fold(0.0, f64::max)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn round(value: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (value * unit).round() / unit
}
