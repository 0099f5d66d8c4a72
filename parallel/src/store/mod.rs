//! The store at which the ranks of a launcher find each other.
//!
//! c10d's own TCP store serves any client, and looks up the names of its peers, for which a machine
//! without name servers waits seconds. This one authenticates both sides of a connection by the
//! run's secret ([`secure_link`]), limits what strangers can use, and knows addresses only. A
//! [`StoreServer`] holds all connections in one thread. Waits have deadlines; a table of keys
//! without input or output (`table`) carries out the operations.

mod client;
mod load;
mod message;
mod server;
mod table;
mod traffic;

#[cfg(test)]
pub(crate) use client::connect;
pub(crate) use client::connect_counted;
pub use load::SimulatedClients;
pub use server::StoreServer;
pub use traffic::StoreTraffic;
pub(crate) use traffic::TrafficCounter;

use secure_link::Secret;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Most bytes of a key.
const MAX_KEY_BYTES: usize = 4096;

/// The address of a [`StoreServer`], and the secret that its clients prove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreAccess {
    pub address: SocketAddr,
    pub secret: Secret,
}

impl StoreAccess {
    /// True if all ranks of the run are on this machine.
    pub fn is_local(&self) -> bool {
        self.address.ip().is_loopback()
    }
}
