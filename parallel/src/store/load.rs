//! Load on a store: what its clients asked of it, and the same requests again from few threads.

use super::{StoreAccess, client::connect};
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use torch_ext::{Error, StoreRequest};

/// Requests to a store, and the bytes of their keys and values in both directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreLoad {
    /// Requests of all clients together.
    pub requests: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
}

/// Counts what a server serves.
#[derive(Debug, Default)]
pub(super) struct LoadCounter {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl LoadCounter {
    pub(super) fn add_request(&self, request: &StoreRequest) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let parts = request.keys.iter().chain(&request.values);
        self.add_bytes(parts.map(Vec::len).sum());
    }

    pub(super) fn add_bytes(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn load(&self) -> StoreLoad {
        StoreLoad {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

/// A cluster whose ranks make requests to a store, as far as the store can tell.
#[derive(Debug, Clone, Copy)]
pub struct SimulatedClients {
    /// Ranks that the cluster has.
    pub ranks: usize,
    /// Connections of each rank. The requests are made on the first one.
    pub connections: usize,
    /// Requests of each rank, at least two.
    pub load: StoreLoad,
    /// Threads that act for the ranks.
    pub threads: usize,
}

impl SimulatedClients {
    /// Makes the requests of all ranks: each rank connects, then sets and gets values of equal size
    /// in alternation. Keys and values of a rank have the bytes of its load together.
    ///
    /// # Errors
    /// If the store cannot be reached or fails.
    ///
    /// # Panics
    /// If a thread panics.
    pub fn run(self, access: &StoreAccess, timeout: Duration) -> Result<(), Error> {
        let act = |thread: usize| {
            let own = (thread..self.ranks).step_by(self.threads);
            own.map(|rank| self.act_for(rank, access, timeout))
                .collect::<Result<Vec<()>, Error>>()
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads)
                .map(|thread| scope.spawn(move || act(thread)))
                .collect();
            let ends = threads.into_iter().map(|thread| thread.join());
            ends.map(|end| end.expect("a thread panicked").map(drop))
                .collect()
        })
    }

    fn act_for(self, rank: usize, access: &StoreAccess, timeout: Duration) -> Result<(), Error> {
        let connect = |_| connect(access, timeout);
        let stores = (0..self.connections.max(1)).map(connect);
        let stores = stores.collect::<Result<Vec<_>, Error>>()?;
        let store = &stores[0];
        let pairs = (self.load.requests / 2).max(1);
        let per_request = (self.load.bytes / (2 * pairs)) as usize;
        for pair in 0..pairs {
            let key = format!("simulated/{rank}/{pair}");
            store.set(&key, &vec![0; per_request.saturating_sub(key.len())])?;
            store.get(&key)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::StoreServer, *};

    #[test]
    fn simulated_clients_load_the_store_as_they_should() {
        let server = StoreServer::local().unwrap();
        let clients = SimulatedClients {
            ranks: 5,
            connections: 2,
            load: StoreLoad {
                requests: 6,
                bytes: 600,
            },
            threads: 2,
        };
        clients
            .run(server.access(), Duration::from_secs(20))
            .unwrap();
        let expected = StoreLoad {
            requests: 5 * 6,
            bytes: 5 * 600,
        };
        assert_eq!(server.load(), expected);
    }
}
