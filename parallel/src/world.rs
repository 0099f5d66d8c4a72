//! All ranks of a run, and the one place where communicators are made.

use crate::{CommError, Communicator, Gloo, Local};
use std::sync::Arc;
use std::time::Duration;
use torch_ext::{GlooAddress, Store};

/// What torchrun's environment tells a rank about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankEnv {
    /// Number among all ranks (`RANK`).
    pub rank: usize,
    /// How many ranks there are (`WORLD_SIZE`).
    pub world_size: usize,
    /// Number on this machine (`LOCAL_RANK`).
    pub local_rank: usize,
    /// How many ranks this machine has (`LOCAL_WORLD_SIZE`).
    pub local_world_size: usize,
    /// Where the store is served (`MASTER_ADDR`).
    pub master_addr: String,
    /// Its port (`MASTER_PORT`).
    pub master_port: u16,
    /// Whether the launcher serves the store (`TORCHELASTIC_USE_AGENT_STORE`); otherwise rank 0 does.
    pub launcher_serves: bool,
    /// Which attempt of the launcher this is (`TORCHELASTIC_RESTART_COUNT`).
    pub attempt: usize,
    /// The network interface to use (`GLOO_SOCKET_IFNAME`).
    pub interface: Option<String>,
}

impl RankEnv {
    /// Rank `rank` of `size` that all are on this machine, whose launcher serves the store at `port`.
    pub fn on_this_machine(rank: usize, size: usize, port: u16) -> RankEnv {
        RankEnv {
            rank,
            world_size: size,
            local_rank: rank,
            local_world_size: size,
            master_addr: "127.0.0.1".into(),
            master_port: port,
            launcher_serves: true,
            attempt: 0,
            interface: None,
        }
    }
}

/// The ranks of a run, joined.
pub struct World {
    rank: usize,
    size: usize,
    /// Ranks of a machine.
    per_node: usize,
    timeout: Duration,
    /// None where this rank is alone.
    store: Option<Store>,
    address: GlooAddress,
}

impl World {
    /// A run of one rank, which needs no rendezvous.
    pub fn single() -> World {
        World { rank: 0, size: 1, per_node: 1, timeout: Duration::ZERO, store: None, address: GlooAddress::Default }
    }

    /// Meets the other ranks at the store. Every operation of every group made from this world then has `timeout`.
    ///
    /// # Errors
    /// When the store cannot be served or reached.
    pub fn join(env: &RankEnv, timeout: Duration) -> Result<World, CommError> {
        if env.world_size == 1 {
            return Ok(World::single());
        }
        let serves = env.rank == 0 && !env.launcher_serves;
        let store = Store::tcp(&env.master_addr, env.master_port, serves, timeout)
            .and_then(|store| store.prefixed(&format!("moerun/{}", env.attempt)))
            .map_err(|error| CommError {
                rank: env.rank,
                group: "world".into(),
                members: (0..env.world_size).collect(),
                operation: if serves { "serving the store" } else { "reaching the store" },
                reason: format!("{}:{}: {error}", env.master_addr, env.master_port),
            })?;
        let loopback = matches!(env.master_addr.as_str(), "localhost" | "::1") || env.master_addr.starts_with("127.");
        let address = match &env.interface {
            Some(interface) => GlooAddress::Interface(interface.clone()),
            None if loopback => GlooAddress::Host("127.0.0.1".into()),
            None => GlooAddress::Default,
        };
        let (rank, size, per_node) = (env.rank, env.world_size, env.local_world_size.clamp(1, env.world_size));
        Ok(World { rank, size, per_node, timeout, store: Some(store), address })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// How many ranks each machine has, as the launcher says.
    pub fn ranks_per_node(&self) -> usize {
        self.per_node
    }

    /// Makes the communicator of the group `name` of global ranks `members`, which must include this rank.
    ///
    /// # Collective
    /// Every member calls it, with the same name (used once a run) and members.
    ///
    /// # Errors
    /// When a member does not come within the timeout.
    pub fn group(&self, name: &str, members: &[usize]) -> Result<Arc<dyn Communicator>, CommError> {
        match &self.store {
            Some(store) if members.len() > 1 => {
                let failed = |reason: torch_ext::Error| CommError {
                    rank: self.rank,
                    group: name.to_string(),
                    members: members.to_vec(),
                    operation: "joining",
                    reason: reason.to_string(),
                };
                let store = store.prefixed(&format!("{name}/{members:?}")).map_err(failed)?;
                Ok(Arc::new(Gloo::join(&store, name, members, self.rank, self.timeout, &self.address)?))
            }
            _ => Ok(Arc::new(Local::new(self.rank, name))),
        }
    }

    /// The communicator of all ranks.
    ///
    /// # Errors
    /// As [`World::group`].
    pub fn all(&self, name: &str) -> Result<Arc<dyn Communicator>, CommError> {
        self.group(name, &(0..self.size).collect::<Vec<_>>())
    }
}

/// Runs `body` on `size` ranks that are threads of this process and compute with no further ones, joined over loopback,
/// and returns their results in rank order. For tests: a rank of a real run is a process.
///
/// # Panics
/// When the ranks cannot be joined, or one of them panics.
pub fn on_threads<T, F>(size: usize, timeout: Duration, body: F) -> Vec<T>
where
    T: Send + 'static,
    F: Fn(&World) -> T + Send + Sync + 'static,
{
    let server = Store::tcp("127.0.0.1", 0, true, timeout).expect("a store on loopback");
    let master_port = server.port().expect("a TCP store has a port");
    let body = Arc::new(body);
    let ranks: Vec<_> = (0..size)
        .map(|rank| {
            let body = body.clone();
            std::thread::spawn(move || {
                // The number is a thread's own.
                tch::set_num_threads(1);
                let env = RankEnv::on_this_machine(rank, size, master_port);
                body(&World::join(&env, timeout).expect("ranks on loopback meet"))
            })
        })
        .collect();
    ranks.into_iter().map(|rank| rank.join().expect("a rank panicked")).collect()
}
