//! What the launcher tells a rank: a line on its standard input. A process that waits for it has already loaded
//! everything, so a restart does not wait for that.

use parallel::RankEnv;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use trainer::KeeperAccess;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Assignment {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    /// Where the launcher serves the store.
    pub(crate) port: u16,
    /// The attempt of the run, from 1 on where there are keepers.
    pub(crate) generation: u64,
    pub(crate) keeper: Option<KeeperAccess>,
    /// Batches to leave out before a step.
    pub(crate) skips: BTreeMap<u64, u64>,
}

impl Assignment {
    pub(crate) fn env(&self) -> RankEnv {
        let attempt = self.generation as usize;
        RankEnv { attempt, ..RankEnv::on_this_machine(self.rank, self.world_size, self.port) }
    }
}
