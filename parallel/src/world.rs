//! All ranks of a run, and the one place where communicators are made.

#[cfg(feature = "mpi")]
use crate::comm::Mpi;
use crate::comm::{
    DeviceComm, DeviceTransport, FlightRecorder, Hccl, HostTransport, HybridComm, Membership, Nccl,
    Shm, Transports,
};
use crate::{Accelerator, Backend, CommError, Communicator, Cpu, Gloo, Local};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tch::{Kind, Tensor};
use torch_ext::{GlooAddress, Store};

/// What a launcher tells a rank about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankEnv {
    /// Number among all ranks.
    pub rank: usize,
    /// How many ranks there are.
    pub world_size: usize,
    /// Number on this machine.
    pub local_rank: usize,
    /// How many ranks this machine has.
    pub local_world_size: usize,
    /// Where the ranks meet.
    pub rendezvous: Rendezvous,
    /// Whether MPI started the ranks.
    pub mpi_launch: MpiLaunch,
    /// Which attempt of the launcher this is.
    pub attempt: usize,
    /// The network interface to use (`GLOO_SOCKET_IFNAME`).
    pub interface: Option<String>,
    /// This machine's address, where the launcher knows which one the others reach.
    pub address: Option<String>,
}

/// Whether an MPI library will know the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MpiLaunch {
    /// No.
    No,
    /// A scheduler started them in a way that fits some MPI libraries: for those who ask for it.
    Possible,
    /// Yes.
    Yes,
}

/// Where ranks meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rendezvous {
    /// At a c10d TCP store.
    Store {
        /// The machine that serves it.
        host: String,
        /// Its port.
        port: u16,
        /// Whether the launcher serves it; otherwise rank 0 does.
        launcher_serves: bool,
    },
    /// In MPI, by which they learn of a store that rank 0 serves.
    Mpi,
}

impl RankEnv {
    /// Rank `rank` of `size` that all are on this machine, whose launcher serves the store at `port`.
    pub fn single_node(rank: usize, size: usize, port: u16) -> RankEnv {
        RankEnv {
            rank,
            world_size: size,
            local_rank: rank,
            local_world_size: size,
            rendezvous: Rendezvous::Store {
                host: "127.0.0.1".into(),
                port,
                launcher_serves: true,
            },
            mpi_launch: MpiLaunch::No,
            attempt: 0,
            interface: None,
            address: None,
        }
    }
}

impl RankEnv {
    /// The same ranks, rendezvous once more while the first rendezvous goes on; those that meet under different numbers, from 1 to
    /// 15, have nothing to do with each other.
    pub fn again(&self, number: usize) -> RankEnv {
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

/// Ranks that start at the same time come within this one of each other, however soon an operation times out.
const RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(60);

/// Ranks of other versions do not work together.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The ranks of a run, joined.
pub struct World {
    rank: usize,
    size: usize,
    /// Ranks of a machine.
    per_node: usize,
    timeout: Duration,
    /// None where this rank is alone.
    joined: Option<Joined>,
}

struct Joined {
    store: Store,
    transports: Transports,
    /// A tensor of the ranks' device.
    like: Tensor,
    /// Groups of this rank alone are carried like all others: asked for by name, a library is tried even then.
    force_backend: bool,
    address: GlooAddress,
    recorder: FlightRecorder,
}

impl World {
    /// A run of one rank, which needs no rendezvous.
    pub fn single() -> World {
        World {
            rank: 0,
            size: 1,
            per_node: 1,
            timeout: Duration::ZERO,
            joined: None,
        }
    }

    /// Meets the other ranks, whose tensors are on `device` or the host. Every operation of every group made from this world then
    /// has `timeout`.
    ///
    /// # Errors
    /// When `backend` cannot be had, the store cannot be served or reached, or ranks have other versions.
    pub fn join(
        env: &RankEnv,
        timeout: Duration,
        backend: Backend,
        device: &dyn Accelerator,
    ) -> Result<World, CommError> {
        let failed = |operation: &'static str, reason: String| CommError {
            rank: env.rank,
            group: "world".into(),
            members: (0..env.world_size).collect(),
            operation,
            reason,
        };
        let like = device.zeros(&[1], Kind::Float);
        let transports = backend.resolve(env.mpi_launch, like.device(), cfg!(feature = "mpi"));
        let transports = transports.map_err(|e| failed("choosing a backend", e))?;
        let force_backend = matches!(backend, Backend::Nccl | Backend::Hccl);
        if env.world_size > 1 || force_backend {
            // Before anybody waits for this rank.
            match transports.device {
                Some(DeviceTransport::Nccl) => Nccl::load().map(|_| ()),
                Some(DeviceTransport::Hccl) => Hccl::load().map(|_| ()),
                None => Ok(()),
            }
            .map_err(|e| failed("choosing a backend", e))?;
        }
        if transports.host == HostTransport::Mpi || env.rendezvous == Rendezvous::Mpi {
            init_mpi(env).map_err(|e| failed("beginning MPI", e))?;
        }
        if env.world_size == 1 && !force_backend {
            return Ok(World::single());
        }
        let (server, host, port, launcher_serves) = match &env.rendezvous {
            Rendezvous::Store {
                host,
                port,
                launcher_serves,
            } => (None, host.clone(), *port, *launcher_serves),
            Rendezvous::Mpi => {
                let (server, host, port) =
                    mpi_rendezvous(env).map_err(|e| failed("rendezvous in MPI", e))?;
                (server, host, port, false)
            }
        };
        let serves = env.rank == 0 && !launcher_serves;
        let prefix = format!("moerun/{}", env.attempt);
        let rendezvous = timeout.max(RENDEZVOUS_TIMEOUT);
        let store = match server {
            Some(server) => Ok(server),
            None => Store::tcp(&host, port, serves, rendezvous),
        };
        let operation = if serves {
            "serving the store"
        } else {
            "reaching the store"
        };
        let unreachable = |error| failed(operation, format!("{host}:{port}: {error}"));
        let store = store
            .and_then(|store| store.prefixed(&prefix))
            .map_err(unreachable)?;
        check_versions(&store, env.rank).map_err(|e| failed("comparing versions", e))?;
        let loopback = matches!(host.as_str(), "localhost" | "::1") || host.starts_with("127.");
        let address = match (&env.interface, &env.address) {
            (Some(interface), _) => GlooAddress::Interface(interface.clone()),
            (None, Some(address)) => GlooAddress::Host(address.clone()),
            _ if loopback => GlooAddress::Host("127.0.0.1".into()),
            _ => GlooAddress::Default,
        };
        let own = Store::tcp(&host, port, false, rendezvous)
            .and_then(|store| store.prefixed(&prefix))
            .map_err(unreachable)?;
        let recorder =
            FlightRecorder::begin(env.rank, (!launcher_serves).then_some(0), timeout, own);
        let rank = env.rank;
        let size = env.world_size;
        let per_node = env.local_world_size.clamp(1, env.world_size);
        let joined = Some(Joined {
            store,
            transports,
            like,
            force_backend,
            address,
            recorder,
        });
        Ok(World {
            rank,
            size,
            per_node,
            timeout,
            joined,
        })
    }

    /// A file for the last calls of this rank, written when one of them fails.
    pub fn dump_calls_to(&self, path: &Path) {
        if let Some(joined) = &self.joined {
            joined.recorder.dump_to(path);
        }
    }

    /// What is done about this rank if, after a failure on its device, it waits there and does not come back.
    pub fn on_stuck(&self, act: impl Fn(&CommError) + Send + 'static) {
        if let Some(joined) = &self.joined {
            joined.recorder.on_stuck(act);
        }
    }

    /// As [`Communicator::check`], for all groups.
    ///
    /// # Errors
    /// The first failure.
    pub fn check(&self) -> Result<(), CommError> {
        self.joined
            .as_ref()
            .map_or(Ok(()), |joined| joined.recorder.check())
    }

    /// What carries the groups' operations.
    pub fn backend(&self) -> &'static str {
        self.joined
            .as_ref()
            .map_or("local", |joined| joined.transports.name())
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
        self.make(name, members, false)
    }

    /// As [`World::group`], for ranks that also send to and receive from their neighbours in the ring of `members`: with tensors of
    /// a device only such groups can.
    ///
    /// # Errors
    /// As [`World::group`].
    pub fn chain(&self, name: &str, members: &[usize]) -> Result<Arc<dyn Communicator>, CommError> {
        self.make(name, members, true)
    }

    fn make(
        &self,
        name: &str,
        members: &[usize],
        chain: bool,
    ) -> Result<Arc<dyn Communicator>, CommError> {
        let needed = |joined: &&Joined| members.len() > 1 || joined.force_backend;
        let Some(joined) = self.joined.as_ref().filter(needed) else {
            return Ok(Arc::new(Local::new(self.rank, name)));
        };
        let failed = |reason: String| CommError {
            rank: self.rank,
            group: name.to_string(),
            members: members.to_vec(),
            operation: "joining",
            reason,
        };
        let store = |side: &str| {
            let prefix = format!("{side}{name}/{members:?}");
            joined
                .store
                .prefixed(&prefix)
                .map_err(|error| failed(error.to_string()))
        };
        let membership = Membership::new(name, members, self.rank)?;
        // Ranks that are alone in a group have a communicator only for their device.
        let shared_memory = joined.transports.shared_memory && members.len() > 1;
        let shared = if shared_memory {
            Shm::join(&store("")?, &membership, self.timeout)?
        } else {
            None
        };
        let host: Arc<dyn Communicator> = match (shared, joined.transports.host) {
            (Some(shared), _) => Arc::new(shared),
            (None, HostTransport::Gloo) => Arc::new(Gloo::join(
                &store("")?,
                name,
                members,
                self.rank,
                self.timeout,
                &joined.address,
            )?),
            #[cfg(feature = "mpi")]
            (None, HostTransport::Mpi) => Arc::new(Mpi::join(name, members, self.timeout)?),
            #[cfg(not(feature = "mpi"))]
            (None, HostTransport::Mpi) => unreachable!("it is not chosen where it is not built in"),
        };
        let timeout = self.timeout;
        let like = joined.like.shallow_clone();
        let device: Option<Arc<dyn Communicator>> = match joined.transports.device {
            Some(DeviceTransport::Nccl) => {
                let library = Nccl::load().map_err(failed)?;
                Some(Arc::new(DeviceComm::join(
                    library,
                    membership,
                    &store("device/")?,
                    timeout,
                    like,
                    chain,
                )?))
            }
            Some(DeviceTransport::Hccl) => {
                let library = Hccl::load().map_err(failed)?;
                Some(Arc::new(DeviceComm::join(
                    library,
                    membership,
                    &store("device/")?,
                    timeout,
                    like,
                    chain,
                )?))
            }
            None => None,
        };
        let group = match device {
            Some(device) => Arc::new(HybridComm { host, device }),
            None => host,
        };
        Ok(joined.recorder.wrap(group, name, members))
    }

    /// All ranks joined by Gloo as libtorch has it, to compare with; None for a rank that is alone.
    ///
    /// # Collective
    /// All ranks, with a name that is used once.
    ///
    /// # Errors
    /// When one does not come within the timeout.
    pub fn libtorch_gloo(&self, name: &str) -> Result<Option<torch_ext::Gloo>, torch_ext::Error> {
        let Some(joined) = &self.joined else {
            return Ok(None);
        };
        let store = joined.store.prefixed(&format!("plain/{name}"))?;
        torch_ext::Gloo::new(&store, self.rank, self.size, self.timeout, &joined.address).map(Some)
    }

    /// The communicator of all ranks.
    ///
    /// # Errors
    /// As [`World::group`].
    pub fn all(&self, name: &str) -> Result<Arc<dyn Communicator>, CommError> {
        self.group(name, &(0..self.size).collect::<Vec<_>>())
    }
}

/// Rank 0 says which version it is, and the others compare.
fn check_versions(store: &Store, rank: usize) -> Result<(), String> {
    if rank == 0 {
        return store
            .set("version", VERSION.as_bytes())
            .map_err(|e| e.to_string());
    }
    let theirs = store
        .get("version")
        .map_err(|e| format!("rank 0 does not say which version it is: {e}"))?;
    if theirs == VERSION.as_bytes() {
        Ok(())
    } else {
        Err(format!(
            "rank 0 runs moerun {} and rank {rank} runs {VERSION}: install the same version on every machine",
            String::from_utf8_lossy(&theirs)
        ))
    }
}

#[cfg(feature = "mpi")]
fn init_mpi(env: &RankEnv) -> Result<(), String> {
    let universe = crate::comm::universe()?;
    if (universe.rank, universe.size) == (env.rank, env.world_size) {
        return Ok(());
    }
    Err(format!(
        "the launcher says rank {} of {}, and the MPI library of this moerun says rank {} of {}: mpirun is of another MPI than \
         the one moerun was built with; use that one's mpirun, or build again with MPICC set to the compiler of this one",
        env.rank, env.world_size, universe.rank, universe.size
    ))
}

#[cfg(not(feature = "mpi"))]
fn init_mpi(_env: &RankEnv) -> Result<(), String> {
    Err("this moerun was built without MPI".into())
}

/// Rank 0 serves a store at any free port, and all learn of it: the store where it is served here, its host and port.
#[cfg(feature = "mpi")]
fn mpi_rendezvous(env: &RankEnv) -> Result<(Option<Store>, String, u16), String> {
    let mut server = None;
    let mut place = Vec::new();
    if env.rank == 0 {
        let alone = env.local_world_size == env.world_size;
        let host = if alone {
            "127.0.0.1".to_string()
        } else {
            std::fs::read_to_string("/proc/sys/kernel/hostname")
                .map_err(|e| e.to_string())?
                .trim()
                .to_string()
        };
        // Port 0: the server cannot connect to itself by it before it knows which one it is.
        let store =
            Store::tcp("127.0.0.1", 0, true, RENDEZVOUS_TIMEOUT).map_err(|e| e.to_string())?;
        place = format!("{host}:{}", store.port().map_err(|e| e.to_string())?).into_bytes();
        server = Some(store);
    }
    let place =
        String::from_utf8(crate::comm::broadcast_bytes(place)?).map_err(|e| e.to_string())?;
    let (host, port) = place
        .rsplit_once(':')
        .ok_or("rank 0 did not say where it serves")?;
    Ok((
        server,
        host.to_string(),
        port.parse().map_err(|_| format!("{place} is no address"))?,
    ))
}

#[cfg(not(feature = "mpi"))]
fn mpi_rendezvous(_env: &RankEnv) -> Result<(Option<Store>, String, u16), String> {
    Err("this moerun was built without MPI".into())
}

/// Runs `body` on `size` ranks that are threads of this process and compute with no further ones, joined over loopback,
/// and returns their results in rank order. For tests: a rank of a real run is a process.
///
/// # Panics
/// When the ranks cannot be joined, or one of them panics.
pub fn run_on_threads<T, F>(size: usize, timeout: Duration, body: F) -> Vec<T>
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
                let env = RankEnv::single_node(rank, size, master_port);
                body(
                    &World::join(&env, timeout, Backend::Auto, &Cpu)
                        .expect("ranks on loopback meet"),
                )
            })
        })
        .collect();
    ranks
        .into_iter()
        .map(|rank| rank.join().expect("a rank panicked"))
        .collect()
}
