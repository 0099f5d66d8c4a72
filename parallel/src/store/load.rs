//! Simulated ranks that ask as much of a store as real ones do.

use super::{StoreAccess, StoreTraffic, TrafficCounter, client::connect_counted};
use std::{sync::Arc, time::Duration};
use torch_ext::Error;

/// A cluster whose ranks make requests to a store, as far as the store can tell.
#[derive(Debug, Clone, Copy)]
pub struct SimulatedClients {
    /// Ranks of the cluster.
    pub ranks: usize,
    /// Requests of each rank, at least two.
    pub traffic_per_rank: StoreTraffic,
    /// Threads that act for the ranks.
    pub threads: usize,
}

impl SimulatedClients {
    /// Makes the requests of all ranks: each rank connects, then sets and gets values of equal size
    /// in alternation. Keys and values of a rank have the bytes of its traffic together. Returns
    /// the traffic of all ranks.
    ///
    /// # Errors
    /// If the store cannot be reached or fails.
    ///
    /// # Panics
    /// If a thread panics.
    pub fn run(self, access: &StoreAccess, timeout: Duration) -> Result<StoreTraffic, Error> {
        let counter = Arc::new(TrafficCounter::default());
        let act = |thread: usize| {
            for rank in (thread..self.ranks).step_by(self.threads) {
                self.act_for(rank, access, timeout, &counter)?;
            }
            Ok::<(), Error>(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads)
                .map(|thread| scope.spawn(move || act(thread)))
                .collect();
            for thread in threads {
                thread.join().expect("a thread panicked")?;
            }
            Ok::<(), Error>(())
        })?;
        Ok(counter.total())
    }

    fn act_for(
        self,
        rank: usize,
        access: &StoreAccess,
        timeout: Duration,
        counter: &Arc<TrafficCounter>,
    ) -> Result<(), Error> {
        let store = connect_counted(access, timeout, counter.clone())?;
        let pairs = (self.traffic_per_rank.requests / 2).max(1);
        let per_request = (self.traffic_per_rank.bytes / (2 * pairs)) as usize;
        for pair in 0..pairs {
            let key = format!("simulated/{rank}/{pair}");
            // The get sends the key as well, and receives the value.
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
            traffic_per_rank: StoreTraffic {
                requests: 6,
                bytes: 600,
            },
            threads: 2,
        };
        let traffic = clients
            .run(server.access(), Duration::from_secs(20))
            .unwrap();
        let expected = StoreTraffic {
            requests: 5 * 6,
            bytes: 5 * 600,
        };
        assert_eq!(traffic, expected);
    }
}
