//! The machines of a run: which are there, and where each keeper of an earlier launch is now.

use super::event::Host;
use crate::registry::KeeperEntry;
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

#[derive(Debug, Clone)]
struct Machine {
    /// None while its agent is not connected.
    host: Option<Host>,
    last_heard: Duration,
}

/// Machine 0 is the launcher's own, which is always there.
#[derive(Debug)]
pub(crate) struct Machines {
    machines: Vec<Machine>,
    /// Machines that joined again after they were lost, and have no part in the run yet.
    pub(crate) returned: BTreeSet<usize>,
}

impl Machines {
    pub(crate) fn new(count: usize, own: Host) -> Machines {
        let absent = Machine {
            host: None,
            last_heard: Duration::ZERO,
        };
        let mut machines = vec![absent; count];
        machines[0].host = Some(own);
        Machines {
            machines,
            returned: BTreeSet::new(),
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.machines.len()
    }

    pub(crate) fn join(&mut self, machine: usize, host: Host, now: Duration) {
        self.machines[machine] = Machine {
            host: Some(host),
            last_heard: now,
        };
    }

    pub(crate) fn lose(&mut self, machine: usize) {
        self.machines[machine].host = None;
        self.returned.remove(&machine);
    }

    pub(crate) fn hear(&mut self, machine: usize, now: Duration) {
        self.machines[machine].last_heard = now;
    }

    pub(crate) fn is_present(&self, machine: usize) -> bool {
        self.machines[machine].host.is_some()
    }

    /// Machines other than the launcher's that are there.
    pub(crate) fn present_others(&self) -> Vec<usize> {
        let others = 1..self.count();
        others.filter(|&machine| self.is_present(machine)).collect()
    }

    pub(crate) fn missing(&self, wanted: impl Iterator<Item = usize>) -> BTreeSet<usize> {
        wanted
            .filter(|&machine| !self.is_present(machine))
            .collect()
    }

    /// Returns the time since a machine's last sign of life.
    pub(crate) fn silence(&self, machine: usize, now: Duration) -> Duration {
        match machine {
            0 => Duration::ZERO,
            machine => now.saturating_sub(self.machines[machine].last_heard),
        }
    }

    /// Returns a machine's address for the others; None in a run on one machine.
    pub(crate) fn address(&self, machine: usize) -> Option<IpAddr> {
        self.machines[machine].host.as_ref()?.address
    }

    pub(crate) fn identity(&self, machine: usize) -> String {
        let host = self.machines[machine].host.as_ref();
        host.map_or(String::new(), |host| host.identity.clone())
    }

    /// Returns the machine of a keeper that an earlier launch started. Machines may have other
    /// numbers now.
    pub(crate) fn place_of(&self, entry: &KeeperEntry) -> Option<usize> {
        let address = entry.address.ip();
        let is_at_address = |host: &Host| {
            // A launcher on one machine has no address of its own.
            host.address.unwrap_or(Ipv4Addr::LOCALHOST.into()) == address
        };
        let is_same = |host: &Host| !host.identity.is_empty() && host.identity == entry.identity;
        let find = |matches: &dyn Fn(&Host) -> bool| {
            let indices = 0..self.count();
            let found = indices.filter(|&machine| {
                let host = self.machines[machine].host.as_ref();
                host.is_some_and(matches)
            });
            found.collect::<Vec<usize>>()
        };
        // Several machines share an address if all are this one.
        let numbered = |found: &[usize]| {
            let by_number = found.iter().find(|&&machine| machine == entry.machine);
            by_number.or(found.first()).copied()
        };
        let both = find(&|host| is_at_address(host) && is_same(host));
        let by_address = find(&is_at_address);
        let by_identity = find(&is_same);
        let unique = (by_identity.len() == 1).then(|| by_identity[0]);
        numbered(&both).or(numbered(&by_address)).or(unique)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    fn entry(machine: usize, ip: [u8; 4], identity: &str) -> KeeperEntry {
        KeeperEntry {
            pid: 2,
            machine,
            address: SocketAddr::from((ip, 1)),
            socket: String::new(),
            identity: identity.into(),
        }
    }

    fn machines(hosts: &[([u8; 4], &str)]) -> Machines {
        let mut machines = Machines::new(hosts.len(), Host::default());
        for (machine, (ip, identity)) in hosts.iter().enumerate() {
            let host = Host {
                address: Some(IpAddr::from(*ip)),
                identity: (*identity).into(),
            };
            machines.join(machine, host, Duration::ZERO);
        }
        machines
    }

    #[test]
    fn a_keeper_is_found_where_its_machine_is_now() {
        let exchanged = machines(&[
            ([10, 0, 0, 1], "a"),
            ([10, 0, 0, 3], "c"),
            ([10, 0, 0, 2], "b"),
        ]);
        assert_eq!(exchanged.place_of(&entry(1, [10, 0, 0, 2], "b")), Some(2));
        assert_eq!(exchanged.place_of(&entry(1, [10, 0, 0, 2], "")), Some(2));
        assert_eq!(
            exchanged.place_of(&entry(1, [10, 0, 9, 9], "b")),
            Some(2),
            "a new address"
        );
        assert_eq!(exchanged.place_of(&entry(1, [10, 0, 0, 9], "x")), None);
        let shared = machines(&[([127, 0, 0, 1], "a"), ([127, 0, 0, 1], "a")]);
        assert_eq!(shared.place_of(&entry(1, [127, 0, 0, 1], "a")), Some(1));
        let alone = Machines::new(1, Host::default());
        assert_eq!(alone.place_of(&entry(0, [127, 0, 0, 1], "")), Some(0));
    }
}
