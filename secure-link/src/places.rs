//! The places of unauthenticated connections, and which connection leaves when all are taken. Pure.

use super::socket::PeerAddress;
use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

#[derive(Debug, Clone, Copy)]
struct Place {
    key: u64,
    address: PeerAddress,
    deadline: Instant,
}

/// Connections in the order of their arrival.
#[derive(Debug)]
pub(super) struct Places {
    capacity: usize,
    handshake_timeout: Duration,
    taken: VecDeque<Place>,
}

impl Places {
    pub(super) fn new(capacity: usize, handshake_timeout: Duration) -> Places {
        Places {
            capacity: capacity.max(1),
            handshake_timeout,
            taken: VecDeque::new(),
        }
    }

    /// Gives a place to a new connection. If all are taken, returns the key of the connection that
    /// has to leave: the oldest of the address with the most connections.
    pub(super) fn enter(&mut self, key: u64, address: PeerAddress, now: Instant) -> Option<u64> {
        let evicted = if self.taken.len() < self.capacity {
            None
        } else {
            let crowd = self.most_frequent_address(address);
            let oldest = self.taken.iter().position(|place| place.address == crowd);
            // The newcomer itself may be the only one of its address.
            self.taken.remove(oldest.unwrap_or(0))
        };
        self.taken.push_back(Place {
            key,
            address,
            deadline: now + self.handshake_timeout,
        });
        evicted.map(|place| place.key)
    }

    fn most_frequent_address(&self, newcomer: PeerAddress) -> PeerAddress {
        let mut counts: HashMap<PeerAddress, usize> = HashMap::from([(newcomer, 1)]);
        let mut most = newcomer;
        for place in &self.taken {
            let count = counts.entry(place.address).or_default();
            *count += 1;
            if *count > counts[&most] {
                most = place.address;
            }
        }
        most
    }

    /// Frees the place of a connection.
    pub(super) fn leave(&mut self, key: u64) {
        self.taken.retain(|place| place.key != key);
    }

    /// Frees the places of connections whose handshake took too long, and returns their keys.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<u64> {
        // All have the same timeout, so the oldest expire first.
        let expired = self.taken.partition_point(|place| place.deadline <= now);
        self.taken.drain(..expired).map(|place| place.key).collect()
    }

    /// Returns the time at which the next connection expires.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.taken.front().map(|place| place.deadline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn user(number: u32) -> PeerAddress {
        PeerAddress::User(number)
    }

    #[test]
    fn the_oldest_of_the_crowd_leaves() {
        let now = Instant::now();
        let mut places = Places::new(3, Duration::from_secs(1));
        assert_eq!(places.enter(0, user(5), now), None);
        assert_eq!(places.enter(1, user(9), now), None);
        assert_eq!(places.enter(2, user(9), now), None);
        assert_eq!(places.enter(3, user(9), now), Some(1));
        assert_eq!(places.enter(4, user(9), now), Some(2));
        // All have one: the oldest leaves.
        places.leave(3);
        assert_eq!(places.enter(5, user(7), now), None);
        assert_eq!(places.enter(6, user(8), now), Some(0));
    }

    proptest! {
        #[test]
        fn every_wait_ends_and_the_places_suffice(
            capacity in 1usize..10,
            arrivals in prop::collection::vec((0u32..4, 0u64..700), 1..200),
        ) {
            let mut now = Instant::now();
            let mut places = Places::new(capacity, Duration::from_millis(1000));
            let mut inside: HashMap<u64, Instant> = HashMap::new();
            for (key, (address, pause)) in arrivals.into_iter().enumerate() {
                now += Duration::from_millis(pause);
                for expired in places.expire(now) {
                    prop_assert!(inside.remove(&expired).is_some());
                }
                let key = key as u64;
                inside.insert(key, now);
                if let Some(evicted) = places.enter(key, user(address), now) {
                    prop_assert!(evicted != key && inside.remove(&evicted).is_some());
                }
                prop_assert!(inside.len() <= capacity && places.taken.len() == inside.len());
                for entered in inside.values() {
                    prop_assert!(now - *entered < Duration::from_millis(1000));
                }
            }
        }

        #[test]
        fn a_crowd_evicts_only_itself(capacity in 2usize..20, crowd in 1usize..100) {
            let now = Instant::now();
            let mut places = Places::new(capacity, Duration::from_secs(1));
            places.enter(0, user(1), now);
            for key in 1..=crowd as u64 {
                prop_assert_ne!(places.enter(key, user(2), now), Some(0));
            }
        }
    }
}
