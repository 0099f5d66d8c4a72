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
use anyhow::{Context, Result, anyhow};
use hostfile::SshSessions;
use machine_plan::MachinePlan;
use machines::{Join, Machines};
use processes::RankProcesses;
use signals::Signals;
use std::{process::ExitCode, time::Duration};
use supervisor::{RunSettings, Supervisor};
use torch_ext::Store;

const STORE_TIMEOUT: Duration = Duration::from_secs(10);

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
    for leftover in checkpoint::folder::clean(&dir.join("checkpoints"))? {
        eprintln!("removed an unfinished checkpoint: {leftover}");
    }
    let store = serve_store(args.master_port)?;
    let signals = Signals::install()?;
    let local_ranks = RankProcesses::new(args, &dir);
    let mut machines = Machines::local(local_ranks, &dir, signals.clone());
    let timeout = Duration::from_secs(config.run.timeout_s);
    let _sessions = join_machines(args, &plan, &mut machines, timeout)?;
    let settings = RunSettings {
        config: &config,
        dir: &dir,
        store_port: store.port()?,
        ranks_per_machine: plan.ranks_per_machine,
        spare_nodes: args.spare_nodes,
    };
    Supervisor::new(settings, world_size, machines).run(&signals)
}

fn serve_store(port: u16) -> Result<Store> {
    Store::tcp("127.0.0.1", port, true, STORE_TIMEOUT)
        .map_err(|error| anyhow!("cannot serve on port {port}: {error}"))
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
        address: plan.rendezvous_address()?,
        others: plan.machines - 1,
        ranks_per_machine: plan.ranks_per_machine,
        timeout,
    })?;
    let Some(hosts) = &plan.hostfile else {
        return Ok(None);
    };
    let rendezvous = plan.rendezvous.rsplit_once(':');
    let host = rendezvous.map_or("", |(host, _)| host);
    let head = format!("{host}:{}", address.port());
    let sessions = hosts.start_agents(args, &head, plan.ranks_per_machine)?;
    Ok(Some(sessions))
}
