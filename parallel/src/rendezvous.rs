//! The rendezvous: ranks connect to a store and check that they run the same version.

use crate::{RankEnv, Rendezvous};
use std::time::Duration;
use torch_ext::{GlooAddress, Store};

/// The minimum time that ranks started together wait for each other, whatever the timeout of
/// operations is.
const RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(60);

/// Ranks of different versions refuse to work together.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The address of the store that connects the ranks of a run.
pub(crate) struct RendezvousStore {
    host: String,
    port: u16,
    pub(crate) launcher_serves: bool,
    /// The store itself if this process serves it already.
    server: Option<Store>,
}

/// An operation of the rendezvous that failed, and the cause.
pub(crate) struct RendezvousError {
    pub(crate) operation: &'static str,
    pub(crate) reason: String,
}

impl RendezvousStore {
    /// Finds the store that the environment names.
    ///
    /// # Collective
    /// All ranks, if they meet through MPI.
    ///
    /// # Errors
    /// MPI's message.
    pub(crate) fn find(env: &RankEnv) -> Result<RendezvousStore, String> {
        match &env.rendezvous {
            Rendezvous::Store {
                host,
                port,
                launcher_serves,
            } => Ok(RendezvousStore {
                host: host.clone(),
                port: *port,
                launcher_serves: *launcher_serves,
                server: None,
            }),
            Rendezvous::Mpi => find_through_mpi(env),
        }
    }

    /// Connects to the store, or serves it, and checks that all ranks run the same version.
    ///
    /// # Errors
    /// If the store cannot be served or reached, or ranks have different versions.
    pub(crate) fn connect(
        &mut self,
        env: &RankEnv,
        timeout: Duration,
    ) -> Result<Store, RendezvousError> {
        let serves = env.rank == 0 && !self.launcher_serves;
        let operation = if serves {
            "serving the store"
        } else {
            "reaching the store"
        };
        let store = match self.server.take() {
            Some(server) => Ok(server),
            None => self.open(serves, timeout),
        };
        let store = store.and_then(|store| store.prefixed(&prefix(env)));
        let store = store.map_err(|error| self.unreachable(operation, error))?;
        check_versions(&store, env.rank).map_err(|reason| RendezvousError {
            operation: "comparing versions",
            reason,
        })?;
        Ok(store)
    }

    /// Opens another connection to the store.
    ///
    /// # Errors
    /// If the store cannot be reached.
    pub(crate) fn connect_again(
        &self,
        env: &RankEnv,
        timeout: Duration,
    ) -> Result<Store, RendezvousError> {
        self.open(false, timeout)
            .and_then(|store| store.prefixed(&prefix(env)))
            .map_err(|error| self.unreachable("reaching the store", error))
    }

    /// Returns the address at which this rank's Gloo listens.
    pub(crate) fn gloo_address(&self, env: &RankEnv) -> GlooAddress {
        let host = self.host.as_str();
        let is_loopback = matches!(host, "localhost" | "::1") || host.starts_with("127.");
        match (&env.interface, &env.address) {
            (Some(interface), _) => GlooAddress::Interface(interface.clone()),
            (None, Some(address)) => GlooAddress::Host(address.clone()),
            _ if is_loopback => GlooAddress::Host("127.0.0.1".into()),
            _ => GlooAddress::Default,
        }
    }

    fn open(&self, serves: bool, timeout: Duration) -> Result<Store, torch_ext::Error> {
        let store_timeout = timeout.max(RENDEZVOUS_TIMEOUT);
        Store::tcp(&self.host, self.port, serves, store_timeout)
    }

    fn unreachable(&self, operation: &'static str, error: torch_ext::Error) -> RendezvousError {
        let reason = format!("{}:{}: {error}", self.host, self.port);
        RendezvousError { operation, reason }
    }
}

/// Returns the prefix of this attempt's keys: a launcher's store serves all attempts.
fn prefix(env: &RankEnv) -> String {
    format!("moerun/{}", env.attempt)
}

/// Publishes the version on rank 0, and compares it on all others.
fn check_versions(store: &Store, rank: usize) -> Result<(), String> {
    if rank == 0 {
        return store
            .set("version", VERSION.as_bytes())
            .map_err(|e| e.to_string());
    }
    let theirs = store
        .get("version")
        .map_err(|e| format!("rank 0 did not publish its version: {e}"))?;
    if theirs == VERSION.as_bytes() {
        return Ok(());
    }
    let theirs = String::from_utf8_lossy(&theirs);
    Err(format!(
        "rank 0 runs moerun {theirs} and rank {rank} runs {VERSION}: install the same version on \
         every machine"
    ))
}

/// Initializes MPI and checks that it agrees with the launcher.
#[cfg(feature = "mpi")]
pub(crate) fn init_mpi(env: &RankEnv) -> Result<(), String> {
    let universe = crate::comm::universe()?;
    if (universe.rank, universe.size) == (env.rank, env.world_size) {
        return Ok(());
    }
    Err(format!(
        "the launcher says rank {} of {}, but the MPI library of this moerun says rank {} of {}: \
         mpirun belongs to another MPI than moerun was built with; use the matching mpirun, or \
         rebuild with MPICC set to the compiler of this one",
        env.rank, env.world_size, universe.rank, universe.size
    ))
}

#[cfg(not(feature = "mpi"))]
pub(crate) fn init_mpi(_env: &RankEnv) -> Result<(), String> {
    Err(NO_MPI.into())
}

/// Serves a store at a free port of rank 0 and broadcasts its address.
#[cfg(feature = "mpi")]
fn find_through_mpi(env: &RankEnv) -> Result<RendezvousStore, String> {
    let mut server = None;
    let mut address = Vec::new();
    if env.rank == 0 {
        let host = if env.local_world_size == env.world_size {
            "127.0.0.1".to_string()
        } else {
            hostname().map_err(|e| e.to_string())?
        };
        // With port 0, a server cannot connect to itself under another name: it does not know its
        // port yet.
        let store =
            Store::tcp("127.0.0.1", 0, true, RENDEZVOUS_TIMEOUT).map_err(|e| e.to_string())?;
        let port = store.port().map_err(|e| e.to_string())?;
        address = format!("{host}:{port}").into_bytes();
        server = Some(store);
    }
    let address = crate::comm::broadcast_bytes(address)?;
    let address = String::from_utf8(address).map_err(|e| e.to_string())?;
    let invalid = || format!("rank 0 sent an invalid store address: {address:?}");
    let (host, port) = address.rsplit_once(':').ok_or_else(invalid)?;
    Ok(RendezvousStore {
        host: host.to_string(),
        port: port.parse().map_err(|_| invalid())?,
        launcher_serves: false,
        server,
    })
}

#[cfg(feature = "mpi")]
fn hostname() -> std::io::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    Ok(text.trim().to_string())
}

#[cfg(not(feature = "mpi"))]
fn find_through_mpi(_env: &RankEnv) -> Result<RendezvousStore, String> {
    Err(NO_MPI.into())
}

#[cfg(not(feature = "mpi"))]
const NO_MPI: &str = "this moerun was built without MPI";
