//! `moerun train` as a launcher: one process for each rank and a keeper for each node, on one
//! machine or several.
//!
//! `supervisor` makes the decisions, by `policy` and `lost_nodes`; an `attempt` is one generation
//! of ranks; `machines` carries out commands here and, through each `agent`, elsewhere.

mod agent;
mod agent_protocol;
mod attempt;
mod checkpoint_writer;
mod failure;
mod hostfile;
mod keepers;
mod lost_nodes;
mod machine_plan;
mod machines;
mod policy;
mod processes;
mod reachable;
mod recovery;
mod rescue;
pub(crate) mod restart_record;
mod signals;
mod spawn;
mod supervisor;
mod tracker;

use crate::{
    cli::TrainArgs, config_diff, config_file, environment, hint::WithHint, machine_memory, registry,
};
use anyhow::{Context, Result};
use hostfile::{AgentStart, SshSessions};
use machine_plan::MachinePlan;
use machines::{Join, Machines};
use parallel::{Secret, StoreServer};
use processes::RankProcesses;
use signals::Signals;
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::ExitCode,
    time::Duration,
};
use supervisor::{RunSettings, Supervisor};

/// Runs the launcher, or on other machines than the first the agent.
pub(crate) fn run(args: &TrainArgs) -> Result<ExitCode> {
    let plan = MachinePlan::new(args)?;
    environment::requested_threads()?;
    if args.node_rank > 0 {
        return agent::run(args, args.node_rank, &plan.rendezvous);
    }
    let world_size = plan.world_size(args.spare_nodes)?;
    let mut config = config_file::load(&args.config)?;
    plan.set_ranks_per_node(&mut config, args.spare_nodes)?;
    config_file::refuse_problems_and_data(&args.config, &config, world_size)?;
    machine_memory::refuse_too_large(&config, plan.ranks_per_machine, world_size)?;
    config_diff::refuse_changes(&config, &args.accept_changes)?;
    let dir = config.run.dir.clone();
    let logs = dir.join("logs");
    std::fs::create_dir_all(&logs)
        .with_context(|| format!("cannot create the run's folder {}", logs.display()))?;
    let _lock = registry::lock(&dir)?;
    let signals = Signals::install()?;
    let local_ranks = RankProcesses::new(args, &dir);
    let mut machines = Machines::local(local_ranks, &dir, signals.clone());
    let timeout = Duration::from_secs(config.run.timeout_s);
    let _sessions = join_machines(args, &plan, &mut machines, timeout)?;
    let store = serve_store(machines.address(0), args.master_port)?;
    let settings = RunSettings {
        config: &config,
        dir: &dir,
        store: store.access().clone(),
        ranks_per_machine: plan.ranks_per_machine,
        spare_nodes: args.spare_nodes,
    };
    Supervisor::new(settings, world_size, machines).run(&signals)
}

/// Serves the ranks' store at the address that other machines use, or on the loopback device if
/// there are none.
fn serve_store(address: Option<IpAddr>, port: u16) -> Result<StoreServer> {
    let ip = address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let secret = Secret::random()?;
    StoreServer::listen(SocketAddr::new(ip, port), secret)
        .with_context(|| format!("cannot serve on port {port}"))
        .hint("choose another port with --master-port, or omit it")
}

/// Listens for the agents of other machines, and starts them if there is a hostfile.
fn join_machines(
    args: &TrainArgs,
    plan: &MachinePlan,
    machines: &mut Machines,
    timeout: Duration,
) -> Result<Option<SshSessions>> {
    if plan.machines == 1 {
        return Ok(None);
    }
    let address = machines.listen(&Join {
        address: plan.rendezvous_address(&reachable::own_addresses())?,
        others: plan.machines - 1,
        ranks_per_machine: plan.ranks_per_machine,
        timeout,
    })?;
    let Some(hosts) = &plan.hostfile else {
        return Ok(None);
    };
    let sessions = hosts.start_agents(&AgentStart {
        args,
        head: address,
        ranks_per_machine: plan.ranks_per_machine,
        input: "",
    })?;
    Ok(Some(sessions))
}
