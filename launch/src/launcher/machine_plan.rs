//! The machines of a run, as the command line and the hostfile describe them.

use super::{
    hostfile::Hostfile,
    reachable::{self, Choice, OwnAddresses},
};
use crate::{
    argument_ranges,
    cli::TrainArgs,
    hint::{WithHint, hinted},
};
use anyhow::{Context, Result, anyhow, bail};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use trainer::config::Config;

/// Most ranks of a run.
const MAX_RANKS: usize = argument_ranges::MAX_RANKS as usize;

pub(super) struct MachinePlan {
    pub(super) machines: usize,
    pub(super) ranks_per_machine: usize,
    /// `HOST:PORT` of the launcher; empty in a run on one machine.
    pub(super) rendezvous: String,
    pub(super) hostfile: Option<Hostfile>,
}

impl MachinePlan {
    pub(super) fn new(args: &TrainArgs) -> Result<MachinePlan> {
        let hostfile = args.hostfile.as_deref().map(Hostfile::read).transpose()?;
        let machines = match &hostfile {
            Some(hosts) => hosts.names.len(),
            None => args.nnodes,
        };
        let slots = hostfile.as_ref().and_then(|hosts| hosts.slots);
        if args.node_rank >= machines {
            let rank = args.node_rank;
            bail!("--node-rank {rank} is not below --nnodes {machines}");
        }
        let rendezvous = match (&args.rdzv, &hostfile) {
            (Some(rendezvous), _) => rendezvous.clone(),
            (None, Some(hosts)) => format!("{}:0", hosts.own_host()),
            (None, None) if machines == 1 => String::new(),
            (None, None) => {
                return Err(hinted(
                    anyhow!("--nnodes {machines} needs --rdzv HOST:PORT"),
                    "name the machine with --node-rank 0 and a free port there, the same on \
                     every machine",
                ));
            }
        };
        Ok(MachinePlan {
            machines,
            ranks_per_machine: slots.unwrap_or(args.nproc_per_node),
            rendezvous,
            hostfile,
        })
    }

    /// Returns the number of ranks. The last machines may be spares.
    pub(super) fn world_size(&self, spare_nodes: usize) -> Result<usize> {
        let machines = self.machines;
        let spares = self.spare_machines(spare_nodes);
        if spares >= machines {
            bail!("--spare-nodes {spares} leaves none of {machines} machines to train on");
        }
        let ranks = self.ranks_per_machine.saturating_mul(machines - spares);
        if ranks > MAX_RANKS {
            bail!(
                "{machines} machines of {} ranks: at most {MAX_RANKS} ranks are possible",
                self.ranks_per_machine
            );
        }
        Ok(ranks)
    }

    /// On one machine, spare nodes are keepers on it.
    fn spare_machines(&self, spare_nodes: usize) -> usize {
        if self.machines > 1 { spare_nodes } else { 0 }
    }

    /// Sets `parallel.ranks_per_node` if it is missing, and checks that nodes fit on machines.
    pub(super) fn set_ranks_per_node(&self, config: &mut Config, spare_nodes: usize) -> Result<()> {
        if self.machines == 1 {
            return Ok(());
        }
        let ranks = self.ranks_per_machine;
        let per_node = *config.parallel.ranks_per_node.get_or_insert(ranks);
        let has_spares = self.spare_machines(spare_nodes) > 0;
        if !ranks.is_multiple_of(per_node) || (has_spares && per_node != ranks) {
            bail!("parallel.ranks_per_node {per_node} does not fit machines of {ranks} ranks");
        }
        Ok(())
    }

    /// Returns the address at which the launcher listens. Warns if the rendezvous names an address
    /// that other machines cannot reach.
    ///
    /// # Errors
    /// If it has no address, or no other machine can reach it and the right address is not clear.
    pub(super) fn rendezvous_address(&self, own: &OwnAddresses) -> Result<SocketAddr> {
        let text = &self.rendezvous;
        let found = text
            .to_socket_addrs()
            .with_context(|| format!("--rdzv {text}"))
            .hint("it must have the form HOST:PORT")?;
        let found: Vec<SocketAddr> = found.collect();
        let host = text.rsplit_once(':').map_or("", |(host, _)| host);
        let listed = |addresses: &[IpAddr]| {
            let addresses = addresses.iter().map(IpAddr::to_string);
            addresses.collect::<Vec<_>>().join(", ")
        };
        match reachable::choose(host, &found, own) {
            None => bail!("--rdzv {text}: the host has no address"),
            Some(Choice::Listen(address)) => Ok(address),
            Some(Choice::Instead(local, address)) => {
                let local = local.ip();
                let ip = address.ip();
                eprintln!(
                    "warning: --rdzv {text}: {host} is {local} on this machine, which no other \
                     machine reaches: listening at {ip}\nhint: use --rdzv {address}, or give \
                     {host} that address in /etc/hosts"
                );
                Ok(address)
            }
            Some(Choice::Unreachable(local)) => {
                let local = local.ip();
                let hint = match own.all.as_slice() {
                    [] => "this machine has no other address: connect it to a network".to_string(),
                    all => format!("use one of the other addresses here: {}", listed(all)),
                };
                Err(hinted(
                    anyhow!(
                        "--rdzv {text}: {host} is {local} on this machine, which no other machine \
                         reaches"
                    ),
                    hint,
                ))
            }
        }
    }
}
