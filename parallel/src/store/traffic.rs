//! Counts of what a client asks of its store.

use std::{
    iter::Sum,
    ops::{Add, Sub},
    sync::atomic::{AtomicU64, Ordering},
};
use torch_ext::{StoreReply, StoreRequest};

/// Requests to a store, and the bytes of their keys and values in both directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreTraffic {
    pub requests: u64,
    pub bytes: u64,
}

impl Add for StoreTraffic {
    type Output = StoreTraffic;

    fn add(self, other: StoreTraffic) -> StoreTraffic {
        StoreTraffic {
            requests: self.requests + other.requests,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl Sum for StoreTraffic {
    fn sum<I>(traffic: I) -> StoreTraffic
    where
        I: Iterator<Item = StoreTraffic>,
    {
        traffic.fold(StoreTraffic::default(), StoreTraffic::add)
    }
}

impl Sub for StoreTraffic {
    type Output = StoreTraffic;

    fn sub(self, earlier: StoreTraffic) -> StoreTraffic {
        StoreTraffic {
            requests: self.requests - earlier.requests,
            bytes: self.bytes - earlier.bytes,
        }
    }
}

/// Counts the traffic of a client.
#[derive(Debug, Default)]
pub(crate) struct TrafficCounter {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl TrafficCounter {
    pub(super) fn count_request(&self, request: &StoreRequest) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.count_bytes(&request.keys);
        self.count_bytes(&request.values);
    }

    pub(super) fn count_reply(&self, reply: &StoreReply) {
        self.count_bytes(&reply.values);
    }

    fn count_bytes(&self, parts: &[Vec<u8>]) {
        let bytes: usize = parts.iter().map(Vec::len).sum();
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn total(&self) -> StoreTraffic {
        StoreTraffic {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}
