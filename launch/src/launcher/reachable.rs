//! The address at which other machines reach this one.

use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags};
use std::net::{IpAddr, SocketAddr, UdpSocket};

/// Destination without a host: only the route to it matters.
const ANYWHERE: &str = "192.0.2.1:9";

/// The addresses of this machine's network interfaces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct OwnAddresses {
    /// Source address of packets that take the default route.
    pub(super) default_route: Option<IpAddr>,
    /// All that other machines may reach.
    pub(super) all: Vec<IpAddr>,
}

/// Returns the addresses of this machine; none if the system does not tell them.
pub(super) fn own_addresses() -> OwnAddresses {
    let mut all = Vec::new();
    for interface in getifaddrs().into_iter().flatten() {
        let is_up = interface.flags.contains(InterfaceFlags::IFF_UP);
        let address = interface.address.filter(|_| is_up);
        let Some(address) = address else { continue };
        let v4 = address.as_sockaddr_in().map(|address| address.ip().into());
        let v6 = address.as_sockaddr_in6().map(|address| address.ip().into());
        all.extend(v4.or(v6).filter(may_be_reached));
    }
    OwnAddresses {
        default_route: default_route().filter(may_be_reached),
        all,
    }
}

fn default_route() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    // Connecting a datagram socket sends nothing.
    socket.connect(ANYWHERE).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn may_be_reached(ip: &IpAddr) -> bool {
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !is_link_local && !ip.is_loopback() && !ip.is_unspecified()
}

/// The address to listen at for other machines.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    Listen(SocketAddr),
    /// The name means only this machine itself here. The second address is one that others reach.
    Instead(SocketAddr, SocketAddr),
    /// The name means only this machine itself here, and no address or several could replace it.
    Unreachable(SocketAddr),
}

/// Chooses from the addresses that `host` has on this machine.
///
/// Debian and Ubuntu give a machine's own name the address 127.0.1.1, at which no other machine
/// reaches it. A host that is written as a loopback address is meant as one.
pub(super) fn choose(host: &str, found: &[SocketAddr], own: &OwnAddresses) -> Option<Choice> {
    let first = *found.first()?;
    let literal = host.trim_matches(['[', ']']).parse::<IpAddr>();
    let names_loopback = host == "localhost" || literal.is_ok_and(|ip| ip.is_loopback());
    if names_loopback {
        return Some(Choice::Listen(first));
    }
    let others = found.iter().filter(|address| may_be_reached(&address.ip()));
    let others: Vec<SocketAddr> = others.copied().collect();
    let is_own = |address: &&SocketAddr| own.all.contains(&address.ip());
    if let Some(address) = others.iter().find(is_own).or(others.first()) {
        return Some(Choice::Listen(*address));
    }
    let is_alone = !found.iter().any(|address| is_local_only(&address.ip()));
    if is_alone {
        return Some(Choice::Listen(first));
    }
    let of_family = |ip: &&IpAddr| ip.is_ipv4() == first.is_ipv4();
    let candidates: Vec<IpAddr> = own.all.iter().filter(of_family).copied().collect();
    let routed = own.default_route.as_ref().filter(of_family).copied();
    let only = Some(&candidates).filter(|all| all.len() == 1);
    let Some(replacement) = routed.or(only.map(|all| all[0])) else {
        return Some(Choice::Unreachable(first));
    };
    let instead = SocketAddr::new(replacement, first.port());
    Some(Choice::Instead(first, instead))
}

fn is_local_only(ip: &IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn own(default_route: Option<&str>, all: &[&str]) -> OwnAddresses {
        let ip = |text: &str| text.parse().unwrap();
        OwnAddresses {
            default_route: default_route.map(ip),
            all: all.iter().map(|text| ip(text)).collect(),
        }
    }

    #[test]
    fn a_name_that_means_this_machine_alone_is_replaced() {
        let debian = [at("127.0.1.1:5")];
        let one = own(None, &["10.0.0.7", "fd00::7"]);
        let instead = |ip: &str| Some(Choice::Instead(debian[0], at(&format!("{ip}:5"))));
        assert_eq!(choose("head", &debian, &one), instead("10.0.0.7"));
        let routed = own(Some("10.0.0.8"), &["172.17.0.1", "10.0.0.8"]);
        assert_eq!(choose("head", &debian, &routed), instead("10.0.0.8"));
        for unclear in [own(None, &["172.17.0.1", "10.0.0.8"]), own(None, &[])] {
            let unreachable = Some(Choice::Unreachable(debian[0]));
            assert_eq!(choose("head", &debian, &unclear), unreachable);
        }
        let any = [at("0.0.0.0:5")];
        let replaced = Choice::Instead(any[0], at("10.0.0.7:5"));
        assert_eq!(choose("0.0.0.0", &any, &one), Some(replaced));
        let v6 = [at("[::1]:5")];
        let replaced = Choice::Instead(v6[0], at("[fd00::7]:5"));
        assert_eq!(choose("head", &v6, &one), Some(replaced));
    }

    #[test]
    fn other_addresses_are_used_as_they_are() {
        let own = own(Some("10.0.0.7"), &["10.0.0.7", "10.1.0.7"]);
        let listens = |host: &str, found: &[&str], expected: &str| {
            let found: Vec<SocketAddr> = found.iter().map(|text| at(text)).collect();
            let chosen = choose(host, &found, &own);
            assert_eq!(chosen, Some(Choice::Listen(at(expected))), "{host}");
        };
        listens("127.0.0.1", &["127.0.0.1:5"], "127.0.0.1:5");
        listens("localhost", &["[::1]:5", "127.0.0.1:5"], "[::1]:5");
        listens("[::1]", &["[::1]:5"], "[::1]:5");
        listens("head", &["127.0.1.1:5", "10.1.0.7:5"], "10.1.0.7:5");
        listens("head", &["10.9.9.9:5", "10.1.0.7:5"], "10.1.0.7:5");
        // Listening there fails with a message of its own.
        listens("other", &["10.9.9.9:5"], "10.9.9.9:5");
        assert_eq!(choose("nothing", &[], &own), None);
    }

    #[test]
    fn the_addresses_of_this_machine_are_no_loopback_addresses() {
        let own = own_addresses();
        let mut all = own.all.iter().chain(&own.default_route);
        assert!(all.all(may_be_reached), "{own:?}");
    }
}
