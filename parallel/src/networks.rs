//! Networks from which the ranks of other machines may connect: their addresses, in short.

use nix::ifaddrs::getifaddrs;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};
use torch_ext::PeerNetwork;

/// The most networks of a family that a rank gets. The kernel's filter of connections has a limit,
/// too.
const MAX_NETWORKS: usize = 128;

/// Addresses whose first bits are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Network {
    address: IpAddr,
    /// The number of equal bits.
    prefix: u8,
}

impl Network {
    fn of_one(address: IpAddr) -> Network {
        Network {
            address,
            prefix: bits(address),
        }
    }

    /// Returns the smallest network that contains both; `None` for different families.
    fn join(self, other: Network) -> Option<Network> {
        if self.address.is_ipv4() != other.address.is_ipv4() {
            return None;
        }
        let width = bits(self.address);
        let differing = number(self.address) ^ number(other.address);
        let equal = differing.leading_zeros() as u8 - (128 - width);
        let prefix = equal.min(self.prefix).min(other.prefix);
        let host_bits = u32::from(width - prefix);
        let first = number(self.address)
            .checked_shr(host_bits)
            .and_then(|high| high.checked_shl(host_bits))
            .unwrap_or(0);
        let address = match self.address {
            IpAddr::V4(_) => Ipv4Addr::from(first as u32).into(),
            IpAddr::V6(_) => Ipv6Addr::from(first).into(),
        };
        Some(Network { address, prefix })
    }

    fn host_bits(self) -> u8 {
        bits(self.address) - self.prefix
    }

    pub(crate) fn as_peer(&self) -> PeerNetwork {
        PeerNetwork {
            address: self.address,
            prefix: self.prefix,
        }
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(ip) => u32::from(ip).into(),
        IpAddr::V6(ip) => ip.into(),
    }
}

/// Returns the addresses of this machine's interfaces, each with a space behind it.
pub(crate) fn own_addresses() -> String {
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

/// Returns networks that contain all addresses of `text`, which has spaces between them.
///
/// The networks contain nothing else, unless that takes more than [`MAX_NETWORKS`] of a family.
/// Then those that are closest to each other become one.
pub(crate) fn summarize(text: &str) -> Vec<Network> {
    let addresses = text.split_whitespace().filter_map(|word| word.parse().ok());
    let unique: BTreeSet<IpAddr> = addresses.collect();
    let is_v4 = |address: &IpAddr| address.is_ipv4();
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = unique.into_iter().partition(is_v4);
    [summarize_family(v4), summarize_family(v6)].concat()
}

/// Returns networks of sorted addresses.
fn summarize_family(addresses: Vec<IpAddr>) -> Vec<Network> {
    let networks = addresses.into_iter().map(Network::of_one).collect();
    // Both halves of a network differ from it in one bit.
    let mut networks = merge(networks, |one, joined| one.prefix == joined.prefix + 1);
    let exact = networks.len();
    let mut host_bits = 0;
    while networks.len() > MAX_NETWORKS {
        host_bits += 1;
        networks = merge(networks, |_, joined| joined.host_bits() <= host_bits);
    }
    if networks.len() < exact {
        let count = networks.len();
        tracing::warn!(
            "the machines' addresses form {exact} networks: Gloo's ports admit {count} larger ones"
        );
    }
    networks
}

/// Joins neighbours in a sorted list that `may_join` permits, given both and their union.
fn merge(networks: Vec<Network>, may_join: impl Fn(Network, Network) -> bool) -> Vec<Network> {
    let mut merged: Vec<Network> = Vec::with_capacity(networks.len());
    for network in networks {
        let mut last = network;
        while let Some(&before) = merged.last()
            && let Some(joined) = before.join(last)
            && may_join(before, joined)
            && may_join(last, joined)
        {
            merged.pop();
            last = joined;
        }
        merged.push(last);
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn texts(networks: &[Network]) -> Vec<String> {
        let text = |network: &Network| format!("{}/{}", network.address, network.prefix);
        networks.iter().map(text).collect()
    }

    #[test]
    fn consecutive_addresses_are_few_networks() {
        let addresses = |count: u32| {
            let address = |index| Ipv4Addr::from(0x0a00_0000 + index).to_string() + " ";
            (0..count).map(address).collect::<String>()
        };
        assert_eq!(texts(&summarize(&addresses(2048))), ["10.0.0.0/21"]);
        assert_eq!(
            texts(&summarize(&addresses(5))),
            ["10.0.0.0/30", "10.0.0.4/32"]
        );
        assert_eq!(
            texts(&summarize("fd00::2 fd00::3 10.0.0.1 10.0.0.1")),
            ["10.0.0.1/32", "fd00::2/127"]
        );
        assert!(!summarize(&own_addresses()).is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn networks_are_few_and_contain_every_address(
            v4 in prop::collection::vec(any::<u32>(), 0..600),
            v6 in prop::collection::vec(any::<u128>(), 0..600),
        ) {
            let v4 = v4
                .into_iter()
                .map(|bits| IpAddr::V4(bits.into()));
            let v6 = v6
                .into_iter()
                .map(|bits| IpAddr::V6(bits.into()));
            let addresses: Vec<IpAddr> = v4.chain(v6).collect();
            let text: Vec<String> = addresses
                .iter()
                .map(IpAddr::to_string)
                .collect();
            let networks = summarize(&text.join(" "));
            prop_assert!(networks.len() <= (2 * MAX_NETWORKS).min(addresses.len()));
            for address in addresses {
                let contains =
                    |network: &Network| network.join(Network::of_one(address)) == Some(*network);
                prop_assert!(networks.iter().any(contains), "{}", address);
            }
        }
    }
}
