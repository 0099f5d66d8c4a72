//! Faults on purpose, which prove that a run survives them.

use serde::{Deserialize, Serialize};

/// A fault, as `moerun chaos` and tests inject it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// Sends a signal (`SIGKILL`, `SIGSTOP`, `SIGABRT`), given by number, to a rank's process.
    Signal { rank: usize, signal: i32 },
    /// Stops a rank and continues it after some milliseconds.
    Delay { rank: usize, ms: u64 },
    /// Flips one bit of a rank's newest complete part, in byte `at` modulo its length.
    Corrupt { rank: usize, at: u64 },
    /// Replaces the first values of a rank's newest complete part by NaN and updates the checksums:
    /// an intact snapshot of a useless state.
    Poison { rank: usize },
    /// Kills all ranks of the node and the keeper itself.
    KillNode,
}
