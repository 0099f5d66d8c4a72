//! The job whose growth is measured: 256 experts in each of 58 layers, on 8 ranks a machine.

use anyhow::{Context, Result};
use serde_json::json;
use trainer::config::Config;

/// Ranks on a machine.
pub(super) const RANKS_PER_MACHINE: usize = 8;

/// Pipeline stages, if there are enough ranks.
const PIPELINE: usize = 16;

/// Ranks that split the experts of a layer, if a stage has as many.
const EXPERT: usize = 64;

/// Microbatches of a step in each pipeline.
const MICROBATCHES: usize = 32;

/// Returns the configuration for `ranks` ranks. A run of less than 1,024 has fewer stages of at
/// least a machine, or fewer expert ranks.
///
/// # Errors
/// If the configuration is invalid.
pub(super) fn config(ranks: usize) -> Result<Config> {
    let pipeline = (ranks / RANKS_PER_MACHINE).clamp(1, PIPELINE);
    let stage = ranks / pipeline;
    let config = json!({
        "run": {"dir": "runs/reference"},
        "parallel": {
            "pipeline": pipeline,
            "expert": stage.min(EXPERT),
            "zero": 1,
            "ranks_per_node": RANKS_PER_MACHINE.min(ranks),
        },
        "model": {
            "vocab_size": 129_280, "hidden": 7168, "layers": 61, "dense_layers": 3, "heads": 56,
            "kv_heads": 8, "ffn": 18_432,
            "moe": {"experts": 256, "top_k": 8, "ffn": 2048, "shared_experts": 1},
        },
        "data": {"train": [{"path": "tokens"}], "sequence_length": 4096},
        "train": {
            "steps": 1000, "global_batch": stage * MICROBATCHES, "micro_batch": 1, "dtype": "bf16",
        },
    });
    serde_json::from_value(config).context("the reference job is invalid")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_job_runs_on_powers_of_two() {
        for power in 1..=14 {
            let ranks = 1 << power;
            let problems = config(ranks).unwrap().problems(ranks);
            assert_eq!(problems, Vec::<String>::new(), "{ranks} ranks");
        }
        let parameters = config(16_384).unwrap().model.num_parameters().total;
        assert!(
            (600e9..800e9).contains(&(parameters as f64)),
            "{parameters}"
        );
    }
}
