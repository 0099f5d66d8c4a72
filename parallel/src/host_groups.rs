//! Groups for tensors in host memory: which transport joins them, and when.

#[cfg(feature = "mpi")]
use crate::comm::Mpi;
use crate::{
    CommError, Communicator,
    comm::{
        Gloo, HostTransport, JoinLevel, LazyComm, MAX_MESH_SIZE, Membership, Shm, Transports,
        TreeComm,
    },
    machines::Machines,
};
use std::{sync::Arc, time::Duration};
use torch_ext::{GlooDevice, Store};

/// The sizes at which groups change how they are joined.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupLimits {
    /// The largest group of several machines without a tree.
    pub(crate) without_tree: usize,
    /// True if groups are joined when they are first used, even without a device's communicator.
    pub(crate) always_lazy: bool,
}

impl Default for GroupLimits {
    fn default() -> GroupLimits {
        GroupLimits {
            without_tree: MAX_MESH_SIZE,
            always_lazy: false,
        }
    }
}

/// Joins the groups of one rank; clones are cheap.
#[derive(Clone)]
pub(crate) struct HostGroups(Arc<HostGroupsState>);

pub(crate) struct HostGroupsState {
    pub(crate) rank: usize,
    pub(crate) store: Arc<Store>,
    pub(crate) transports: Transports,
    pub(crate) timeout: Duration,
    pub(crate) device: GlooDevice,
    pub(crate) machines: Machines,
    pub(crate) limits: GroupLimits,
    /// True if a thread that waits at the store does not keep others from it.
    pub(crate) has_concurrent_store: bool,
}

/// Joins a group in one of the ways below.
type Join = fn(&HostGroups, &Membership) -> Result<Arc<dyn Communicator>, CommError>;

impl HostGroups {
    pub(crate) fn new(state: HostGroupsState) -> HostGroups {
        HostGroups(Arc::new(state))
    }

    pub(crate) fn device(&self) -> &GlooDevice {
        &self.0.device
    }

    /// Joins a group. A large one between machines is joined by its first operation.
    ///
    /// # Collective
    /// All members.
    ///
    /// # Errors
    /// If a member does not join in time.
    pub(crate) fn join(&self, membership: &Membership) -> Result<Arc<dyn Communicator>, CommError> {
        if self.0.limits.always_lazy && membership.size() > 1 {
            return Ok(Arc::new(self.lazy(membership, HostGroups::join_now)));
        }
        self.join_now(membership)
    }

    /// Returns a group that its first operation joins, if that is possible. A rank with a device
    /// has many groups whose host side it never uses.
    ///
    /// # Collective
    /// As for [`HostGroups::join`].
    ///
    /// # Errors
    /// As for [`HostGroups::join`].
    pub(crate) fn join_on_use(
        &self,
        membership: &Membership,
    ) -> Result<Arc<dyn Communicator>, CommError> {
        // MPI creates communicators on the thread that calls it.
        let is_gloo = self.0.transports.host == HostTransport::Gloo;
        if is_gloo && self.0.has_concurrent_store && membership.size() > 1 {
            return Ok(Arc::new(self.lazy(membership, HostGroups::join_now)));
        }
        self.join_now(membership)
    }

    fn lazy(&self, membership: &Membership, join: Join) -> LazyComm {
        let groups = self.clone();
        let joined = membership.clone();
        let join = move || join(&groups, &joined);
        LazyComm::new(membership.clone(), "gloo", self.0.timeout, join)
    }

    fn join_now(&self, membership: &Membership) -> Result<Arc<dyn Communicator>, CommError> {
        if let Some(shared_memory) = self.join_shared_memory(membership)? {
            return Ok(shared_memory);
        }
        let is_gloo = self.0.transports.host == HostTransport::Gloo;
        if is_gloo && membership.size() > self.0.limits.without_tree {
            return Ok(Arc::new(self.tree(membership)));
        }
        self.join_flat(membership)
    }

    /// Joins by shared memory; `None` if the members are on several machines or it is impossible.
    fn join_shared_memory(
        &self,
        membership: &Membership,
    ) -> Result<Option<Arc<dyn Communicator>>, CommError> {
        let HostGroupsState {
            transports,
            machines,
            ..
        } = &*self.0;
        // A group of one has a communicator only to test the device's backend.
        let may_share = transports.shared_memory && membership.size() > 1;
        if !may_share || !machines.are_one(&membership.members) {
            return Ok(None);
        }
        let shm = Shm::join(&self.store_of(membership)?, membership, self.0.timeout)?;
        Ok(shm.map(|shm| Arc::new(shm) as Arc<dyn Communicator>))
    }

    /// Joins by connections between members.
    fn join_flat(&self, membership: &Membership) -> Result<Arc<dyn Communicator>, CommError> {
        match self.0.transports.host {
            HostTransport::Gloo => {
                let store = self.store_of(membership)?;
                let HostGroupsState {
                    timeout, device, ..
                } = &*self.0;
                let gloo = Gloo::join(&store, membership.clone(), *timeout, device)?;
                Ok(Arc::new(gloo))
            }
            #[cfg(feature = "mpi")]
            HostTransport::Mpi => Ok(Arc::new(Mpi::join(membership.clone(), self.0.timeout)?)),
            #[cfg(not(feature = "mpi"))]
            HostTransport::Mpi => unreachable!("a build without MPI never chooses it"),
        }
    }

    fn tree(&self, membership: &Membership) -> TreeComm {
        let groups = self.clone();
        let name = membership.name().to_string();
        let join_level: JoinLevel = Box::new(move |level, members| {
            let name = format!("{name}, level {level}");
            let membership = Membership::new(&name, members, groups.0.rank)?;
            groups
                .join_shared_memory(&membership)?
                .map_or_else(|| groups.join_flat(&membership), Ok)
        });
        let machines = self.0.machines.of(&membership.members);
        let whole = self.lazy(membership, HostGroups::join_flat);
        TreeComm::new(
            membership.clone(),
            &machines,
            self.0.timeout,
            whole,
            join_level,
        )
    }

    fn store_of(&self, membership: &Membership) -> Result<Store, CommError> {
        self.0
            .store
            .prefixed(&membership.store_key())
            .map_err(|error| membership.error("joining", error))
    }
}
