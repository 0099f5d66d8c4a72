//! What a step measured, and the file that keeps it.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

/// One step, over all ranks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps done, this one included.
    pub step: u64,
    /// Cross-entropy a token, in nats.
    pub loss: f64,
    /// Load-balancing loss, not weighted (1 a layer is balanced).
    pub load_balance_loss: f64,
    /// Router z-loss, not weighted.
    pub z_loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens learned from so far.
    pub tokens: u64,
    /// Speed of this step.
    pub tokens_per_s: f64,
    /// Time of this step.
    pub step_ms: f64,
    /// For each MoE layer: the busiest expert's tokens over the mean.
    pub expert_imbalance: Vec<f64>,
    /// For each MoE layer: the busiest rank's rows over the mean of the ranks that work on the layer.
    pub rank_imbalance: Vec<f64>,
    /// Of those over layers: median, nine tenths, largest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert_imbalance_percentiles: Option<[f64; 3]>,
    /// Likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank_imbalance_percentiles: Option<[f64; 3]>,
    /// For each MoE layer: rows that each rank's experts worked on.
    pub tokens_per_rank: Vec<Vec<u64>>,
    /// For each MoE layer: rows that were worked on away from their expert's home.
    pub lent_tokens: Vec<u64>,
    /// For each MoE layer: bytes of experts' weights that were lent in forward. (Their gradients go back in fp32.)
    pub lent_bytes: Vec<u64>,
    /// For each MoE layer: bytes of rows that crossed nodes on the way to experts. (As many come back, and twice as
    /// many cross in backward.)
    pub internode_bytes: Vec<u64>,
    /// For each MoE layer: milliseconds that a rank planned in a step, in the mean.
    pub plan_ms: Vec<f64>,
    /// Experts that moved to another rank after this step, where `model.moe.placement` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved_experts: Option<u64>,
    /// What the last snapshot cost, in steps after which one was taken or skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotMetrics>,
    /// Choices of each expert, `[MoE layers][E]`: in `routing.jsonl`.
    #[serde(skip)]
    pub tokens_per_expert: Vec<Vec<u64>>,
    /// Bytes that tensors held at most so far, on each rank's device.
    pub rank_peak_memory: Vec<u64>,
    /// Bytes of host memory that each rank's process had resident at most so far.
    pub rank_peak_resident: Vec<u64>,
    /// The share of the step's passes' time in which each rank waited for others.
    pub rank_wait_ratio: Vec<f64>,
    /// Mean milliseconds of each rank's passes, where there is a pipeline: kind, and `.chunk` after the first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rank_pass_ms: Vec<BTreeMap<String, f64>>,
}

/// What a snapshot cost on rank 0.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct SnapshotMetrics {
    /// Milliseconds in which training stood still for the last complete copy.
    pub stall_ms: f64,
    /// Milliseconds that it took, beside training.
    pub copy_ms: f64,
    /// Bytes that this rank saves.
    pub bytes: u64,
    /// Snapshots that were left out so far, because a rank had no free slot.
    pub skipped: u64,
}

impl StepMetrics {
    /// The share of all rows that were worked on away from their expert's home.
    pub fn lent_fraction(&self) -> f64 {
        let rows: u64 = self.tokens_per_rank.iter().flatten().sum();
        self.lent_tokens.iter().sum::<u64>() as f64 / rows.max(1) as f64
    }
}

/// A line of `routing.jsonl`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RoutingLine {
    /// Steps done, this one included.
    pub step: u64,
    /// Choices of each expert in this step, `[MoE layers][E]`.
    #[serde(alias = "choices")]
    pub tokens_per_expert: Vec<Vec<u64>>,
}

/// Figures of layers: median, nine tenths, and the largest. (With many layers they say more than the list.)
pub(crate) fn percentiles(of_layers: &[f64]) -> Option<[f64; 3]> {
    let mut sorted = of_layers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
    (!sorted.is_empty()).then(|| [at(0.5), at(0.9), at(1.0)])
}

/// Is told what happens, on rank 0.
pub trait Progress {
    /// A step is done.
    fn step(&mut self, record: &StepMetrics, steps: u64);
    /// A validation is done: loss in nats a token.
    fn validation(&mut self, step: u64, loss: f64);
    /// Something a person should know.
    fn note(&mut self, message: &str);
    /// Something a person should look at.
    fn warn(&mut self, message: &str);
}

/// `metrics.jsonl`, and `routing.jsonl`: one JSON object a line.
pub struct JsonLinesWriter {
    path: PathBuf,
    file: File,
}

#[derive(Deserialize)]
struct Line {
    step: u64,
}

impl JsonLinesWriter {
    /// Opens the file and drops lines of steps after `step`, which a resumed run does again, and a line that a crash
    /// cut off.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn resume(path: &Path, step: u64) -> Result<JsonLinesWriter, Error> {
        if path.exists() {
            let reader = BufReader::new(File::open(path).map_err(Error::io("cannot open", path))?);
            let mut kept = String::new();
            for line in reader.lines() {
                let line = line.map_err(Error::io("cannot read", path))?;
                if serde_json::from_str::<Line>(&line).is_ok_and(|line| line.step <= step) {
                    kept.push_str(&line);
                    kept.push('\n');
                }
            }
            let fresh = path.with_extension("jsonl.new");
            std::fs::write(&fresh, kept).map_err(Error::io("cannot write", &fresh))?;
            std::fs::rename(&fresh, path).map_err(Error::io("cannot write", path))?;
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(Error::io("cannot write", path))?;
        Ok(JsonLinesWriter {
            path: path.to_path_buf(),
            file,
        })
    }

    /// Appends one line.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn write(&mut self, line: &impl Serialize) -> Result<(), Error> {
        let mut text = serde_json::to_string(line).expect("plain data");
        text.push('\n');
        self.file
            .write_all(text.as_bytes())
            .map_err(Error::io("cannot write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_file_holds_each_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = JsonLinesWriter::resume(&path, 0).unwrap();
        for step in 1..=4 {
            metrics.write(&serde_json::json!({"step": step})).unwrap();
        }
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"step\": 5, \"lo")
            .unwrap();
        let mut metrics = JsonLinesWriter::resume(&path, 2).unwrap();
        metrics.write(&serde_json::json!({"step": 3})).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n"
        );
    }
}
