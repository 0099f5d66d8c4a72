//! The addresses of the machines of a run, from which its ranks may connect.

use crate::{RankEnv, Rendezvous};
use nix::ifaddrs::getifaddrs;
use std::{collections::BTreeSet, net::IpAddr};
use torch_ext::{Error, Store};

/// Returns the addresses of all machines; none if the run is on one, or not started by moerun's
/// launcher, which knows how many ranks each machine has.
///
/// # Collective
/// All ranks.
///
/// # Errors
/// If a rank does not reach the store in time.
pub(crate) fn exchange_addresses(env: &RankEnv, store: &Store) -> Result<Vec<IpAddr>, Error> {
    let is_own_launch = matches!(env.rendezvous, Rendezvous::Launcher(_));
    if !is_own_launch || env.address.is_none() {
        return Ok(Vec::new());
    }
    if env.local_rank == 0 {
        store.append("machines/addresses", own_addresses().as_bytes())?;
    }
    // The last rank to come tells the others.
    if store.add("machines/ranks", 1)? == env.world_size as i64 {
        store.set("machines/complete", b"1")?;
    }
    store.get("machines/complete")?;
    let addresses = store.get("machines/addresses")?;
    Ok(parse(&String::from_utf8_lossy(&addresses)))
}

/// Returns the addresses of this machine's interfaces, each with a space behind it.
fn own_addresses() -> String {
    let mut addresses = String::new();
    for interface in getifaddrs().into_iter().flatten() {
        let Some(address) = interface.address else {
            continue;
        };
        let v4 = address
            .as_sockaddr_in()
            .map(|address| IpAddr::V4(address.ip()));
        let v6 = address
            .as_sockaddr_in6()
            .map(|address| IpAddr::V6(address.ip()));
        if let Some(ip) = v4.or(v6) {
            addresses += &format!("{ip} ");
        }
    }
    addresses
}

fn parse(text: &str) -> Vec<IpAddr> {
    let addresses = text.split_whitespace().filter_map(|word| word.parse().ok());
    let unique: BTreeSet<IpAddr> = addresses.collect();
    unique.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_share_their_addresses() {
        let text = own_addresses() + "10.0.0.1 fd00::1 " + &own_addresses();
        let all = parse(&text);
        let unique: BTreeSet<_> = all.iter().collect();
        assert_eq!(unique.len(), all.len());
        for expected in ["127.0.0.1", "10.0.0.1", "fd00::1"] {
            assert!(all.contains(&expected.parse().unwrap()), "{all:?}");
        }
    }
}
