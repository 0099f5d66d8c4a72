//! The world: all ranks of a run, and the only place that creates communicators.

#[cfg(feature = "mpi")]
use crate::comm::Mpi;
use crate::{
    Accelerator, Backend, CommError, Communicator, Cpu, Local, RankEnv, Rendezvous, StoreServer,
    comm::{
        DeviceComm, DeviceTransport, FlightRecorder, Gloo, Hccl, HostTransport, HybridComm,
        Membership, Nccl, Shm, Transports,
    },
    peers::exchange_addresses,
    rendezvous::{RendezvousStore, init_mpi},
};
use std::{path::Path, sync::Arc, time::Duration};
use tch::{Kind, Tensor};
use torch_ext::{GlooDevice, Store};

/// All ranks of a run, as one rank sees them.
pub struct World {
    rank: usize,
    size: usize,
    ranks_per_node: usize,
    timeout: Duration,
    /// `None` for a world of one rank.
    joined: Option<Joined>,
}

struct Joined {
    store: Store,
    transports: Transports,
    /// A tensor on the device of this rank.
    like: Tensor,
    /// True if groups of one rank use the backend too: a backend that was requested by name is
    /// tested even then.
    force_backend: bool,
    device: GlooDevice,
    recorder: FlightRecorder,
    /// The server of the store, if this rank serves it. Dropped last.
    _rendezvous: RendezvousStore,
}

impl World {
    /// Returns a world of one rank, which needs no rendezvous.
    pub fn single() -> World {
        World {
            rank: 0,
            size: 1,
            ranks_per_node: 1,
            timeout: Duration::ZERO,
            joined: None,
        }
    }

    /// Joins the other ranks, for tensors on `device` and in host memory.
    ///
    /// `timeout` applies to every operation of every group of this world.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If `backend` is unavailable, the store cannot be served or reached, or ranks have different
    /// versions.
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
        if env.gloo_tls.is_some() {
            check_encrypted(transports).map_err(|e| failed("choosing a backend", e))?;
        }
        let force_backend = matches!(backend, Backend::Nccl | Backend::Hccl);
        let is_alone = env.world_size == 1 && !force_backend;
        if !is_alone {
            // Fails before other ranks wait for this one.
            load_library(transports).map_err(|e| failed("choosing a backend", e))?;
        }
        if transports.host == HostTransport::Mpi || env.rendezvous == Rendezvous::Mpi {
            init_mpi(env).map_err(|e| failed("initializing MPI", e))?;
        }
        if is_alone {
            return Ok(World::single());
        }

        let rendezvous = RendezvousStore::find(env);
        let rendezvous = rendezvous.map_err(|e| failed("rendezvous through MPI", e))?;
        let store = rendezvous.connect(env, timeout);
        let store = store.map_err(|e| failed(e.operation, e.reason))?;
        let peers = exchange_addresses(env, &store);
        let peers = peers.map_err(|e| failed("exchanging addresses", e.to_string()))?;
        let recorder_store = rendezvous.connect_again(env, timeout);
        let recorder_store = recorder_store.map_err(|e| failed(e.operation, e.reason))?;
        let store_rank = rendezvous.store_rank;
        let recorder = FlightRecorder::start(env.rank, store_rank, timeout, recorder_store);
        Ok(World {
            rank: env.rank,
            size: env.world_size,
            ranks_per_node: env.local_world_size.clamp(1, env.world_size),
            timeout,
            joined: Some(Joined {
                store,
                transports,
                like,
                force_backend,
                device: GlooDevice {
                    address: rendezvous.gloo_address(env),
                    tls: env.gloo_tls.clone(),
                    peers,
                },
                recorder,
                _rendezvous: rendezvous,
            }),
        })
    }

    /// Sets the file to which this rank's last calls are written when one of them fails.
    pub fn dump_calls_to(&self, path: &Path) {
        if let Some(joined) = &self.joined {
            joined.recorder.dump_calls_to(path);
        }
    }

    /// Sets the handler for a rank that still waits in its device's driver long after an operation
    /// failed there.
    pub fn on_stuck(&self, handler: impl Fn(&CommError) + Send + 'static) {
        if let Some(joined) = &self.joined {
            joined.recorder.on_stuck(handler);
        }
    }

    /// Runs [`Communicator::check`] for all groups.
    ///
    /// # Errors
    /// The first failure.
    pub fn check(&self) -> Result<(), CommError> {
        match &self.joined {
            Some(joined) => joined.recorder.check(),
            None => Ok(()),
        }
    }

    /// Returns the names of the transports, for messages.
    pub fn backend(&self) -> &'static str {
        match &self.joined {
            Some(joined) => joined.transports.name(),
            None => "local",
        }
    }

    /// Returns this rank's number.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Returns the number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Returns the number of ranks per machine, as the launcher reports it.
    pub fn ranks_per_node(&self) -> usize {
        self.ranks_per_node
    }

    /// Creates the communicator of the group `name` with the global ranks `members`, which include
    /// this rank.
    ///
    /// # Collective
    /// All members, with the same name and members. A name is used once per run.
    ///
    /// # Errors
    /// If a member does not join within the timeout.
    pub fn group(&self, name: &str, members: &[usize]) -> Result<Arc<dyn Communicator>, CommError> {
        self.create_group(name, members, false)
    }

    /// Creates a [`World::group`] that can also send device tensors point to point, between
    /// neighbours in the ring of `members`.
    ///
    /// # Collective
    /// As for [`World::group`].
    ///
    /// # Errors
    /// As for [`World::group`].
    pub fn p2p_group(
        &self,
        name: &str,
        members: &[usize],
    ) -> Result<Arc<dyn Communicator>, CommError> {
        self.create_group(name, members, true)
    }

    fn create_group(
        &self,
        name: &str,
        members: &[usize],
        p2p: bool,
    ) -> Result<Arc<dyn Communicator>, CommError> {
        let needs_backend = |joined: &&Joined| members.len() > 1 || joined.force_backend;
        let Some(joined) = self.joined.as_ref().filter(needs_backend) else {
            return Ok(Arc::new(Local::new(self.rank, name)));
        };
        let membership = Membership::new(name, members, self.rank)?;
        let host = self.host_comm(joined, &membership)?;
        let device = self.device_comm(joined, &membership, p2p)?;
        let group = match device {
            Some(device) => Arc::new(HybridComm { host, device }),
            None => host,
        };
        Ok(joined.recorder.wrap(group, name, members))
    }

    /// Joins the communicator for tensors in host memory.
    fn host_comm(
        &self,
        joined: &Joined,
        membership: &Membership,
    ) -> Result<Arc<dyn Communicator>, CommError> {
        let store = joined.group_store("", membership)?;
        // A group of one has a communicator only to test the device's backend.
        if joined.transports.shared_memory && membership.members.len() > 1 {
            let shared_memory = Shm::join(&store, membership, self.timeout)?;
            if let Some(shared_memory) = shared_memory {
                return Ok(Arc::new(shared_memory));
            }
        }
        match joined.transports.host {
            HostTransport::Gloo => {
                let device = &joined.device;
                let gloo = Gloo::join(&store, membership.clone(), self.timeout, device)?;
                Ok(Arc::new(gloo))
            }
            #[cfg(feature = "mpi")]
            HostTransport::Mpi => Ok(Arc::new(Mpi::join(membership.clone(), self.timeout)?)),
            #[cfg(not(feature = "mpi"))]
            HostTransport::Mpi => unreachable!("a build without MPI never chooses it"),
        }
    }

    /// Joins the communicator for device tensors, if the device has a library for them.
    fn device_comm(
        &self,
        joined: &Joined,
        membership: &Membership,
        p2p: bool,
    ) -> Result<Option<Arc<dyn Communicator>>, CommError> {
        let Some(transport) = joined.transports.device else {
            return Ok(None);
        };
        let failed = |reason: String| membership.error("joining", reason);
        let store = joined.group_store("device/", membership)?;
        let membership = membership.clone();
        let like = joined.like.shallow_clone();
        let comm: Arc<dyn Communicator> = match transport {
            DeviceTransport::Nccl => {
                let nccl = Nccl::load().map_err(failed)?;
                let comm = DeviceComm::join(nccl, membership, &store, self.timeout, like, p2p)?;
                Arc::new(comm)
            }
            DeviceTransport::Hccl => {
                let hccl = Hccl::load().map_err(failed)?;
                let comm = DeviceComm::join(hccl, membership, &store, self.timeout, like, p2p)?;
                Arc::new(comm)
            }
        };
        Ok(Some(comm))
    }

    /// Joins all ranks with libtorch's own use of Gloo, for comparison; `None` in a world of one.
    ///
    /// # Collective
    /// All ranks, with a name that is used once.
    ///
    /// # Errors
    /// If a rank does not join within the timeout.
    pub fn libtorch_gloo(&self, name: &str) -> Result<Option<torch_ext::Gloo>, torch_ext::Error> {
        let Some(joined) = &self.joined else {
            return Ok(None);
        };
        let store = joined.store.prefixed(&format!("plain/{name}"))?;
        let device = &joined.device;
        let gloo = torch_ext::Gloo::new(&store, self.rank, self.size, self.timeout, device)?;
        Ok(Some(gloo))
    }

    /// Creates the communicator `name` of all ranks.
    ///
    /// # Collective
    /// As for [`World::group`].
    ///
    /// # Errors
    /// As for [`World::group`].
    pub fn all(&self, name: &str) -> Result<Arc<dyn Communicator>, CommError> {
        let members: Vec<usize> = (0..self.size).collect();
        self.group(name, &members)
    }
}

impl Joined {
    /// Returns the part of the store that belongs to a group, below `folder`.
    fn group_store(&self, folder: &str, membership: &Membership) -> Result<Store, CommError> {
        let name = membership.name();
        let members = &membership.members;
        let store = self.store.prefixed(&format!("{folder}{name}/{members:?}"));
        store.map_err(|error| membership.error("joining", error))
    }
}

/// Refuses transports that `run.tls` would leave unencrypted.
fn check_encrypted(transports: Transports) -> Result<(), String> {
    let is_gloo = transports.host == HostTransport::Gloo && transports.device.is_none();
    if !is_gloo {
        let name = transports.name();
        return Err(format!(
            "run.tls encrypts Gloo only, and this run uses {name}: set run.backend to gloo, or \
             remove run.tls"
        ));
    }
    torch_ext::check_tls().map_err(|error| error.to_string())
}

fn load_library(transports: Transports) -> Result<(), String> {
    match transports.device {
        Some(DeviceTransport::Nccl) => Nccl::load().map(drop),
        Some(DeviceTransport::Hccl) => Hccl::load().map(drop),
        None => Ok(()),
    }
}

/// Runs `body` on `size` ranks that are threads of this process, and returns their results in rank
/// order. For tests: a rank of a real run is a process.
///
/// Each rank computes on one thread.
///
/// # Panics
/// If the ranks cannot join, or one of them panics.
pub fn run_on_threads<T, F>(size: usize, timeout: Duration, body: F) -> Vec<T>
where
    T: Send + 'static,
    F: Fn(&World) -> T + Send + Sync + 'static,
{
    let server = StoreServer::local().expect("a store on loopback");
    let access = server.access().clone();
    let body = Arc::new(body);
    let start = |rank: usize| {
        let body = body.clone();
        let access = access.clone();
        std::thread::spawn(move || {
            // Each thread has a setting of its own.
            tch::set_num_threads(1);
            let env = RankEnv::single_node(rank, size, access);
            let world = World::join(&env, timeout, Backend::Auto, &Cpu);
            body(&world.expect("ranks join over loopback"))
        })
    };
    let ranks: Vec<_> = (0..size).map(start).collect();
    let join = |rank: std::thread::JoinHandle<T>| rank.join().expect("a rank panicked");
    ranks.into_iter().map(join).collect()
}
