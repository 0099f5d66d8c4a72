//! What the launcher tells a rank: a line on its standard input. A process that waits for it has already loaded
//! everything, so a restart does not wait for that.

use parallel::{RankEnv, Rendezvous};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use trainer::KeeperAccess;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Assignment {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    /// Number among the ranks of its machine, and how many those are.
    pub(crate) local_rank: usize,
    pub(crate) local_world_size: usize,
    /// Where the launcher serves the store.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Where other machines reach the rank; None where there are none.
    pub(crate) address: Option<IpAddr>,
    /// The attempt of the run, from 1 on where there are keepers.
    pub(crate) generation: u64,
    pub(crate) keeper: Option<KeeperAccess>,
    /// Batches to leave out before a step.
    pub(crate) skipped_batches: BTreeMap<u64, u64>,
}

impl Assignment {
    pub(crate) fn env(&self) -> RankEnv {
        RankEnv {
            local_rank: self.local_rank,
            local_world_size: self.local_world_size,
            rendezvous: Rendezvous::Store {
                host: self.host.clone(),
                port: self.port,
                launcher_serves: true,
            },
            address: self.address.map(|address| address.to_string()),
            attempt: self.generation as usize,
            ..RankEnv::single_node(self.rank, self.world_size, self.port)
        }
    }
}
