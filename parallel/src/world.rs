//! The world: all ranks of a run, and the only place that creates communicators.

use crate::{
    Accelerator, Backend, CommError, Communicator, Cpu, Local, RankEnv, Rendezvous, StoreServer,
    StoreTraffic,
    comm::{
        DeviceComm, DeviceTransport, EchoComm, FlightRecorder, Hccl, HostTransport, HybridComm,
        MemberRanges, Membership, Nccl, StreamBudget, Timeouts, Transports,
    },
    host_groups::{GroupLimits, HostGroups, HostGroupsState},
    machines::{Machines, machine_identity},
    networks::Network,
    rendezvous::{RendezvousStore, init_mpi},
};
use parking_lot::Mutex;
use std::{path::Path, sync::Arc, time::Duration};
use tch::{Kind, Tensor};
use torch_ext::{GlooDevice, Store};

/// All ranks of a run, as one rank sees them.
pub struct World {
    rank: usize,
    size: usize,
    ranks_per_node: usize,
    timeout: Duration,
    others: Others,
}

/// The ranks of a world besides this one.
enum Others {
    /// A world of one rank.
    None,
    Joined(Box<Joined>),
    /// A world in which this rank rehearses. `is_stream_ordered` is that of the real groups.
    Echo {
        is_stream_ordered: bool,
    },
}

struct Joined {
    store: Arc<Store>,
    transports: Transports,
    /// A tensor on the device of this rank.
    like: Tensor,
    /// The streams of the device that its communicators take.
    stream_budget: Mutex<StreamBudget>,
    host_groups: HostGroups,
    recorder: FlightRecorder,
    /// Has the server of the store, if this rank serves it. Dropped last.
    rendezvous: RendezvousStore,
}

/// Properties of a rank that joins a world, which tests change.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Joining {
    /// Identifies the rank's machine.
    pub(crate) machine: u64,
    pub(crate) limits: GroupLimits,
}

impl Default for Joining {
    fn default() -> Joining {
        Joining {
            machine: machine_identity(),
            limits: GroupLimits::default(),
        }
    }
}

impl World {
    /// Returns a world of one rank, which needs no rendezvous.
    pub fn single() -> World {
        World {
            rank: 0,
            size: 1,
            ranks_per_node: 1,
            timeout: Duration::ZERO,
            others: Others::None,
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
        World::join_as(env, timeout, backend, device, Joining::default())
    }

    /// Joins as [`World::join`] does.
    pub(crate) fn join_as(
        env: &RankEnv,
        timeout: Duration,
        backend: Backend,
        device: &dyn Accelerator,
        joining: Joining,
    ) -> Result<World, CommError> {
        let failed = |operation: &'static str, reason: String| CommError {
            rank: env.rank,
            group: "world".into(),
            members: MemberRanges::first(env.world_size),
            operation,
            reason,
        };
        let like = device.zeros(&[1], Kind::Float);
        let transports = backend
            .resolve(env.mpi_launch, like.device(), cfg!(feature = "mpi"))
            .map_err(|e| failed("choosing a backend", e))?;
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
        let store = rendezvous
            .connect(env, timeout)
            .map_err(|e| failed(e.operation, e.reason))?;
        let recorder_store = rendezvous
            .connect_again(env, timeout)
            .map_err(|e| failed(e.operation, e.reason))?;
        let store_rank = rendezvous.store_rank;
        // Each rank shows a sign of life before any rank has joined.
        let operation_timeouts = Timeouts::of_operations(timeout);
        let device = like.device();
        let recorder = FlightRecorder::start(
            env.rank,
            store_rank,
            operation_timeouts,
            recorder_store,
            device,
        );
        let machines = Machines::exchange(env, &store, joining.machine)
            .map_err(|e| failed("exchanging addresses", e.to_string()))?;
        let store = Arc::new(store);
        Ok(World {
            rank: env.rank,
            size: env.world_size,
            ranks_per_node: env.local_world_size.clamp(1, env.world_size),
            timeout,
            others: Others::Joined(Box::new(Joined {
                host_groups: HostGroups::new(HostGroupsState {
                    rank: env.rank,
                    store: store.clone(),
                    transports,
                    timeout,
                    device: GlooDevice {
                        address: rendezvous.gloo_address(env),
                        tls: env.gloo_tls.clone(),
                        peers: machines.networks.iter().map(Network::as_peer).collect(),
                    },
                    machines,
                    limits: joining.limits,
                    has_concurrent_store: rendezvous.is_authenticated(),
                }),
                store,
                transports,
                like,
                stream_budget: Mutex::default(),
                recorder,
                rendezvous,
            })),
        })
    }

    /// Returns a world of the same size whose other ranks have the values of this one and send
    /// zeros, or None if there are no others. Its groups need no other rank.
    pub fn rehearsal(&self) -> Option<World> {
        let joined = self.joined()?;
        Some(World {
            others: Others::Echo {
                is_stream_ordered: joined.transports.device.is_some(),
            },
            ..*self
        })
    }

    fn joined(&self) -> Option<&Joined> {
        match &self.others {
            Others::Joined(joined) => Some(joined),
            Others::None | Others::Echo { .. } => None,
        }
    }

    /// Sets the file to which this rank's last calls are written when one of them fails.
    pub fn dump_calls_to(&self, path: &Path) {
        if let Some(joined) = self.joined() {
            joined.recorder.dump_calls_to(path);
        }
    }

    /// Sets the handler for a rank that still waits in its device's driver long after an operation
    /// failed there.
    pub fn on_stuck(&self, handler: impl Fn(&CommError) + Send + 'static) {
        if let Some(joined) = self.joined() {
            joined.recorder.on_stuck(handler);
        }
    }

    /// Runs [`Communicator::check`] for all groups.
    ///
    /// # Errors
    /// The first failure.
    pub fn check(&self) -> Result<(), CommError> {
        match self.joined() {
            Some(joined) => joined.recorder.check(),
            None => Ok(()),
        }
    }

    /// Returns the names of the transports, for messages.
    pub fn backend(&self) -> &'static str {
        match self.joined() {
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

    /// Returns what this rank has asked of the store to join the world and its groups. Zero for
    /// c10d's store, and in a world of one.
    pub fn store_traffic(&self) -> StoreTraffic {
        self.joined()
            .map(|joined| joined.rendezvous.traffic())
            .unwrap_or_default()
    }

    /// Creates the communicator of the group `name` with the global ranks `members`, which include
    /// this rank.
    ///
    /// # Collective
    /// All members, with the same name and members. A name is used once per run.
    ///
    /// # Errors
    /// If a member does not join within the timeout. Large groups between machines, and the host's
    /// side of groups on a device, are joined by their first operation, which fails then. If all
    /// groups of this rank need more streams than its device has: a group on a device takes one,
    /// and with [`World::p2p_group`] two more for each neighbor. Groups of one rank take none.
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
        let is_single = members.len() == 1;
        // A world of one rank has joined only to test the backend that was requested by name.
        let is_alone = is_single && self.size > 1;
        let joined = match &self.others {
            Others::Joined(joined) if !is_alone => joined,
            &Others::Echo { is_stream_ordered } if !is_single => {
                let membership = Membership::new(name, members, self.rank)?;
                return Ok(Arc::new(EchoComm::new(membership, is_stream_ordered)));
            }
            _ => return Ok(Arc::new(Local::new(self.rank, name))),
        };
        let membership = Membership::new(name, members, self.rank)?;
        let host_groups = &joined.host_groups;
        let group = match self.device_comm(joined, &membership, p2p)? {
            Some(device) => {
                let host = host_groups.join_on_use(&membership)?;
                Arc::new(HybridComm { host, device })
            }
            None => host_groups.join(&membership)?,
        };
        Ok(joined.recorder.wrap(group, membership))
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
        let key = format!("device/{}", membership.store_key());
        let store = joined
            .store
            .prefixed(&key)
            .map_err(|error| membership.error("joining", error))?;
        let membership = membership.clone();
        let like = joined.like.shallow_clone();
        let stream_budget = &joined.stream_budget;
        let comm: Arc<dyn Communicator> = match transport {
            DeviceTransport::Nccl => {
                let nccl = Nccl::load().map_err(failed)?;
                let comm = DeviceComm::join(
                    nccl,
                    membership,
                    &store,
                    self.timeout,
                    like,
                    p2p,
                    stream_budget,
                )?;
                Arc::new(comm)
            }
            DeviceTransport::Hccl => {
                let hccl = Hccl::load().map_err(failed)?;
                let comm = DeviceComm::join(
                    hccl,
                    membership,
                    &store,
                    self.timeout,
                    like,
                    p2p,
                    stream_budget,
                )?;
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
        let Some(joined) = self.joined() else {
            return Ok(None);
        };
        let store = joined.store.prefixed(&format!("plain/{name}"))?;
        let device = joined.host_groups.device();
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
    run_on_threads_as(size, timeout, |_| Joining::default(), body)
}

/// Runs `body` as [`run_on_threads`] does, on ranks that join as `joining` tells.
pub(crate) fn run_on_threads_as<T, F>(
    size: usize,
    timeout: Duration,
    joining: impl Fn(usize) -> Joining,
    body: F,
) -> Vec<T>
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
        let joining = joining(rank);
        std::thread::spawn(move || {
            // Each thread has a setting of its own.
            tch::set_num_threads(1);
            let env = RankEnv::single_node(rank, size, access);
            let world = World::join_as(&env, timeout, Backend::Auto, &Cpu, joining);
            body(&world.expect("ranks join over loopback"))
        })
    };
    let ranks: Vec<_> = (0..size).map(start).collect();
    let join = |rank: std::thread::JoinHandle<T>| rank.join().expect("a rank panicked");
    ranks.into_iter().map(join).collect()
}
