//! A line of `restarts.jsonl`.

use schemars::JsonSchema;
use serde::Serialize;

/// A restart after a failure.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(crate) struct RestartRecord {
    /// The generation that begins with this restart. The first start of a run is generation 1.
    pub(crate) generation: u64,
    /// The failure, in one line.
    pub(crate) failure: String,
    /// Number of steps that were completed before the failure.
    pub(crate) steps_done: u64,
    /// Step of the snapshot that the run resumes from, or null if it resumes from a checkpoint.
    pub(crate) snapshot_step: Option<u64>,
    /// The snapshot or checkpoint that the run resumes from, and why not from a newer one.
    pub(crate) resumed_from: String,
    /// Step whose batch is skipped because its loss was not finite, or null.
    pub(crate) skipped_step: Option<u64>,
}
