//! The rendezvous: ranks connect to a store and check that they run the same version.

use crate::{
    RankEnv, Rendezvous, StoreAccess, StoreServer, StoreTraffic,
    store::{TrafficCounter, connect_counted},
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs},
    sync::Arc,
    time::Duration,
};
use torch_ext::{GlooAddress, Store};

/// The minimum time that ranks started together wait for each other, whatever the timeout of
/// operations is.
const RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(60);

/// Ranks of different versions refuse to work together.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The store that connects the ranks of a run.
pub(crate) struct RendezvousStore {
    location: StoreLocation,
    /// The rank that serves the store, unless the launcher does.
    pub(crate) store_rank: Option<usize>,
    /// Counts the requests of the first connection, which joins the groups.
    traffic: Arc<TrafficCounter>,
    /// The server, if this process serves an authenticated store.
    _server: Option<StoreServer>,
}

enum StoreLocation {
    Authenticated(StoreAccess),
    C10d(C10dStore),
}

/// c10d's store at an address that another launcher, or a user, chose.
struct C10dStore {
    host: String,
    port: u16,
    launcher_serves: bool,
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
        let location = match &env.rendezvous {
            Rendezvous::Launcher(access) => StoreLocation::Authenticated(access.clone()),
            Rendezvous::Store {
                host,
                port,
                launcher_serves,
            } => StoreLocation::C10d(C10dStore {
                host: host.clone(),
                port: *port,
                launcher_serves: *launcher_serves,
            }),
            Rendezvous::Mpi => return find_through_mpi(env),
        };
        let launcher_serves = match &location {
            StoreLocation::Authenticated(_) => true,
            StoreLocation::C10d(c10d) => c10d.launcher_serves,
        };
        Ok(RendezvousStore {
            location,
            store_rank: (!launcher_serves).then_some(0),
            traffic: Arc::default(),
            _server: None,
        })
    }

    /// Connects to the store, or serves it, and checks that all ranks run the same version.
    ///
    /// # Errors
    /// If the store cannot be served or reached, or ranks have different versions.
    pub(crate) fn connect(
        &self,
        env: &RankEnv,
        timeout: Duration,
    ) -> Result<Store, RendezvousError> {
        let serves = self.store_rank == Some(env.rank);
        let operation = if serves {
            "serving the store"
        } else {
            "reaching the store"
        };
        let store = match &self.location {
            StoreLocation::C10d(c10d) if serves => c10d.serve(env, store_timeout(timeout)),
            _ => self.open(timeout, self.traffic.clone()),
        };
        let store = store
            .and_then(|store| store.prefixed(&prefix(env)))
            .map_err(|error| self.unreachable(operation, error))?;
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
        self.open(timeout, Arc::default())
            .and_then(|store| store.prefixed(&prefix(env)))
            .map_err(|error| self.unreachable("reaching the store", error))
    }

    /// Returns the address at which this rank's Gloo listens: in a run on one machine that of the
    /// loopback device.
    pub(crate) fn gloo_address(&self, env: &RankEnv) -> GlooAddress {
        let loopback = || GlooAddress::Host(Ipv4Addr::LOCALHOST.to_string());
        let is_loopback = match &self.location {
            // Without an address of this machine all ranks are on it.
            StoreLocation::Authenticated(access) if env.address.is_none() && access.is_local() => {
                return loopback();
            }
            StoreLocation::Authenticated(access) => access.is_local(),
            StoreLocation::C10d(c10d) => c10d.is_loopback(),
        };
        match (&env.interface, &env.address) {
            (Some(interface), _) => GlooAddress::Interface(interface.clone()),
            (None, Some(address)) => GlooAddress::Host(address.clone()),
            _ if is_loopback => loopback(),
            _ => GlooAddress::Default,
        }
    }

    /// True if this is moerun's own store.
    pub(crate) fn is_authenticated(&self) -> bool {
        matches!(self.location, StoreLocation::Authenticated(_))
    }

    /// Returns what was asked of the store by its first connection.
    pub(crate) fn traffic(&self) -> StoreTraffic {
        self.traffic.total()
    }

    fn open(
        &self,
        timeout: Duration,
        traffic: Arc<TrafficCounter>,
    ) -> Result<Store, torch_ext::Error> {
        match &self.location {
            StoreLocation::Authenticated(access) => {
                connect_counted(access, store_timeout(timeout), traffic)
            }
            StoreLocation::C10d(C10dStore { host, port, .. }) => {
                Store::connect_tcp(host, *port, store_timeout(timeout))
            }
        }
    }

    fn unreachable(&self, operation: &'static str, error: torch_ext::Error) -> RendezvousError {
        let place = match &self.location {
            StoreLocation::Authenticated(access) => access.address.to_string(),
            StoreLocation::C10d(C10dStore { host, port, .. }) => format!("{host}:{port}"),
        };
        let reason = format!("{place}: {error}");
        RendezvousError { operation, reason }
    }
}

fn store_timeout(timeout: Duration) -> Duration {
    timeout.max(RENDEZVOUS_TIMEOUT)
}

impl C10dStore {
    /// Serves the store at the address of its host name, and nowhere else if that is this
    /// machine's.
    fn serve(&self, env: &RankEnv, timeout: Duration) -> Result<Store, torch_ext::Error> {
        let is_one_machine = env.local_world_size == env.world_size;
        let listener = bind(&self.host, self.port, is_one_machine || self.is_loopback())
            .map_err(|error| torch_ext::Error::new(error.to_string()))?;
        Store::serve_tcp(listener, timeout)
    }

    /// True if the host's text names the loopback device.
    fn is_loopback(&self) -> bool {
        let literal = self.host.trim_matches(['[', ']']).parse::<IpAddr>();
        self.host == "localhost" || literal.is_ok_and(|ip| ip.is_loopback())
    }
}

/// Binds a socket to the first address of `host` that this machine has. If it has none, or only one
/// of the loopback device, which other machines cannot reach, then to all addresses. With
/// `may_be_loopback` an address of the loopback device will do.
fn bind(host: &str, port: u16, may_be_loopback: bool) -> io::Result<TcpListener> {
    let host = host.trim_matches(['[', ']']);
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs()?.collect();
    for address in &addresses {
        if address.ip().is_loopback() && !may_be_loopback {
            continue;
        }
        match TcpListener::bind(address) {
            // A host behind a translated or a virtual address.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
            result => return result,
        }
    }
    let all = match addresses.first() {
        Some(SocketAddr::V6(_)) => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    };
    TcpListener::bind((all, port))
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

/// Serves a store at a free port of rank 0, and broadcasts its address and secret.
#[cfg(feature = "mpi")]
fn find_through_mpi(env: &RankEnv) -> Result<RendezvousStore, String> {
    let mut server = None;
    let mut access = Vec::new();
    if env.rank == 0 {
        let served = serve_for_mpi(env).map_err(|error| error.to_string())?;
        access = serde_json::to_vec(&served.reached_at).expect("plain data");
        server = Some(served.server);
    }
    let access = crate::comm::broadcast_bytes(access)?;
    let access = serde_json::from_slice(&access);
    let access =
        access.map_err(|error| format!("rank 0 sent an invalid store address: {error}"))?;
    Ok(RendezvousStore {
        location: StoreLocation::Authenticated(access),
        store_rank: Some(0),
        traffic: Arc::default(),
        _server: server,
    })
}

#[cfg(feature = "mpi")]
struct ServedForMpi {
    server: StoreServer,
    reached_at: StoreAccess,
}

/// Serves on the loopback device if all ranks are on this machine; otherwise at all addresses,
/// because the one that other machines reach is not known for certain.
#[cfg(feature = "mpi")]
fn serve_for_mpi(env: &RankEnv) -> io::Result<ServedForMpi> {
    if env.local_world_size == env.world_size {
        let server = StoreServer::local()?;
        let reached_at = server.access().clone();
        return Ok(ServedForMpi { server, reached_at });
    }
    let secret = secure_link::Secret::random().map_err(io::Error::other)?;
    let server = StoreServer::listen((Ipv4Addr::UNSPECIFIED, 0).into(), secret)?;
    let mut reached_at = server.access().clone();
    let port = reached_at.address.port();
    let found = (hostname()?, port)
        .to_socket_addrs()?
        .collect::<Vec<SocketAddr>>();
    let is_reachable = |address: &&SocketAddr| !address.ip().is_loopback() && address.is_ipv4();
    let none = || io::Error::other("this machine's host name has no address besides loopback");
    reached_at.address = *found.iter().find(is_reachable).ok_or_else(none)?;
    Ok(ServedForMpi { server, reached_at })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn listens_at(host: &str, may_be_loopback: bool) -> IpAddr {
        bind(host, 0, may_be_loopback)
            .unwrap()
            .local_addr()
            .unwrap()
            .ip()
    }

    #[test]
    fn a_ranks_store_listens_where_the_others_look_for_it() {
        assert_eq!(listens_at("127.0.0.1", true).to_string(), "127.0.0.1");
        assert!(listens_at("localhost", true).is_loopback());
        assert_eq!(listens_at("[::1]", true).to_string(), "::1");
        // The name of this machine is its loopback address here, but not on other machines.
        assert!(listens_at("localhost", false).is_unspecified());
        // A documentation address: no machine has it.
        assert!(listens_at("192.0.2.1", false).is_unspecified());
    }
}
