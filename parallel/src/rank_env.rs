//! The environment of a rank, which its launcher provides.

use crate::{MpiLaunch, StoreAccess};

/// The place of a rank in its run, and how it finds the other ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankEnv {
    /// This rank's number among all ranks.
    pub rank: usize,
    pub world_size: usize,
    /// This rank's number on its machine.
    pub local_rank: usize,
    /// The number of ranks on this machine.
    pub local_world_size: usize,
    pub rendezvous: Rendezvous,
    pub mpi_launch: MpiLaunch,
    /// The number of the launcher's current attempt.
    pub attempt: usize,
    /// The network interface to use (`GLOO_SOCKET_IFNAME`).
    pub interface: Option<String>,
    /// The address at which other machines reach this one, if the launcher knows it.
    pub address: Option<String>,
    /// Encryption of Gloo's connections (`run.tls`).
    pub gloo_tls: Option<torch_ext::GlooTls>,
}

/// The place where ranks find each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rendezvous {
    /// At the authenticated store of moerun's launcher.
    Launcher(StoreAccess),
    /// At a c10d TCP store, without authentication.
    Store {
        host: String,
        port: u16,
        /// True if the launcher (torchrun) serves the store; otherwise rank 0 does.
        launcher_serves: bool,
    },
    /// Through MPI, which tells them the address of a store that rank 0 serves.
    Mpi,
}

impl RankEnv {
    /// Returns the environment of a rank whose run is on this machine only, and whose launcher
    /// serves the store.
    pub fn single_node(rank: usize, size: usize, store: StoreAccess) -> RankEnv {
        RankEnv {
            rank,
            world_size: size,
            local_rank: rank,
            local_world_size: size,
            rendezvous: Rendezvous::Launcher(store),
            mpi_launch: MpiLaunch::No,
            attempt: 0,
            interface: None,
            address: None,
            gloo_tls: None,
        }
    }

    /// Returns the environment in which the same ranks join a further world, while the first
    /// exists.
    ///
    /// Worlds of different `number`, from 1 to 15, are independent of each other.
    pub fn for_another_world(&self, number: usize) -> RankEnv {
        let mut env = self.clone();
        env.attempt = self.attempt * 16 + number;
        if let Rendezvous::Store {
            launcher_serves, ..
        } = &mut env.rendezvous
        {
            *launcher_serves = true;
        }
        env
    }
}
