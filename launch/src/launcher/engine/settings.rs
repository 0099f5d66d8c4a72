//! Values that do not change during a run.

use std::{net::SocketAddr, path::PathBuf, time::Duration};
use trainer::config::Config;

/// The time between two messages about what is waited for.
pub(crate) const REMINDER_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) config: Config,
    /// The configuration as ranks receive it, so that an edited file has no effect on the run.
    pub(crate) stored_config: String,
    /// The folder of the run, `run.dir`.
    pub(crate) dir: PathBuf,
    /// Address of the ranks' store, which the launcher serves.
    pub(crate) store: SocketAddr,
    pub(crate) ranks_per_machine: usize,
    pub(crate) spare_nodes: usize,
    /// Number of ranks that the run is started with.
    pub(crate) world_size: usize,
    /// Size of a snapshot's chunks in bytes.
    pub(crate) chunk_bytes: usize,
}

impl Settings {
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.config.run.timeout_s)
    }

    /// The time within which another process must give a sign of life.
    pub(crate) fn heartbeat_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.config.restart.heartbeat_timeout_s)
    }

    /// The time within which a keeper must accept a connection.
    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_secs(5).min(self.heartbeat_timeout())
    }

    /// Bytes that a keeper may use, if they are configured.
    pub(crate) fn keeper_memory(&self) -> Option<u64> {
        let memory_gib = self.config.snapshot.memory_gib;
        memory_gib.map(|gib| (gib * 1073741824.0) as u64)
    }
}
