//! `moerun train` as a launcher: one process for each rank and a keeper for each node, on one
//! machine or several.
//!
//! The `engine` makes all decisions and does no I/O; the `runtime` carries them out, here and,
//! through each `agent`, elsewhere.

#![deny(clippy::too_many_lines)]

pub(crate) mod engine;
mod hostfile;
mod identity;
mod machine_plan;
mod reachable;
mod runtime;
mod token;

use crate::{
    cli::TrainArgs,
    config_diff, config_file, environment,
    hint::WithHint,
    machine_memory,
    open_files::{self, RunSize},
    protocol::store_secret,
    registry::KeeperRegistry,
    run_lock,
    signals::{Signals, StopMode},
};
use anyhow::{Context, Result, anyhow};
use checkpoint::{keeper::chunk_bytes, run_folder::RunFolder};
use engine::{Engine, Launch, event::Host, settings::Settings};
use hostfile::{AgentStart, SshSessions};
use identity::machine_identity;
use machine_plan::MachinePlan;
use parallel::{Secret, StoreServer};
use runtime::{Join, Listening, Runtime, RuntimeSettings, agent};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    process::ExitCode,
    time::Duration,
};
use trainer::config::Config;

/// Runs the launcher, or on other machines than the first the agent.
pub(crate) fn run(args: &TrainArgs, signals: &Signals) -> Result<ExitCode> {
    let plan = MachinePlan::new(args)?;
    environment::requested_threads()?;
    environment::wants_fork_server()?;
    if args.node_rank > 0 {
        return agent::run(args, args.node_rank, &plan.rendezvous, signals);
    }
    let world_size = plan.world_size(args.spare_nodes)?;
    let mut config = config_file::load(&args.config)?;
    plan.set_ranks_per_node(&mut config, args.spare_nodes)?;
    refuse_impossible(args, &config, plan.ranks_per_machine, world_size)?;
    let dir = config.run.dir.clone();
    let logs = dir.join("logs");
    RunFolder::create_inside(&logs)?;
    let _lock = run_lock::acquire(&dir)?;
    for leftover in checkpoint::folder::clean(&dir.join("checkpoints"))? {
        eprintln!("removed an unfinished checkpoint: {leftover}");
    }
    signals.set_mode(StopMode::Count);
    let registry = KeeperRegistry::load_or_set_aside(&dir)?;
    let secret = secret(args, &dir, registry.as_ref(), plan.machines > 1)?;
    let join = join(&plan, &config)?;
    let listening = Listening::start(join, &secret)?;
    let _sessions = start_agents(args, &plan, listening.address, &secret)?;
    let store = serve_store(listening.own_ip(), args.master_port, &secret)?;
    let own = Host {
        address: listening.own_ip(),
        identity: machine_identity(),
    };
    let runtime = Runtime::new(
        RuntimeSettings {
            args,
            dir: &dir,
            secret: &secret,
            keep: config.checkpoint.keep,
            reply_timeout: Duration::from_secs_f64(config.restart.heartbeat_timeout_s),
            signals,
            store: &store,
        },
        listening,
    )?;
    let settings = Settings {
        stored_config: serde_json::to_string(&config).context("cannot store the configuration")?,
        dir: dir.clone(),
        store: store.access().address,
        ranks_per_machine: plan.ranks_per_machine,
        spare_nodes: args.spare_nodes,
        world_size,
        chunk_bytes: chunk_bytes(),
        config,
    };
    let launch = Launch {
        machines: plan.machines,
        own,
        number: launch_number()?,
        secret: secret.clone(),
        registry,
    };
    Ok(runtime.drive(Engine::new(settings, launch)))
}

/// Refuses a run that cannot work on these machines, or cannot resume.
fn refuse_impossible(
    args: &TrainArgs,
    config: &Config,
    ranks_per_machine: usize,
    world_size: usize,
) -> Result<()> {
    config_file::refuse_problems_and_data(&args.config, config, world_size)?;
    machine_memory::refuse_too_large(config, ranks_per_machine, world_size)?;
    let size = RunSize::new(config, world_size, ranks_per_machine);
    open_files::refuse_too_many(size.largest())?;
    config_diff::refuse_changes(config, &args.accept_changes)
}

/// Returns the run's secret: that of the keepers of an earlier launch, if there are any.
fn secret(
    args: &TrainArgs,
    dir: &Path,
    registry: Option<&KeeperRegistry>,
    is_shared: bool,
) -> Result<Secret> {
    match registry {
        Some(registry) if !is_shared => Ok(registry.secret.clone()),
        _ => token::find_or_make(args, dir, is_shared),
    }
}

/// Returns a number that distinguishes this launch from others of the run.
fn launch_number() -> Result<u64> {
    let random = Secret::random().map_err(|error| anyhow!("{error}"))?;
    let name = random.name();
    u64::from_str_radix(&name, 16).context("the name of a secret is a number")
}

/// Serves the ranks' store at the address that other machines use, or on the loopback device if
/// there are none.
fn serve_store(address: Option<IpAddr>, port: u16, secret: &Secret) -> Result<StoreServer> {
    let ip = address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    StoreServer::listen(SocketAddr::new(ip, port), store_secret(secret))
        .with_context(|| format!("cannot serve on port {port}"))
        .hint("choose another port with --master-port, or omit it")
}

fn join(plan: &MachinePlan, config: &Config) -> Result<Option<Join>> {
    if plan.machines == 1 {
        return Ok(None);
    }
    Ok(Some(Join {
        address: plan.rendezvous_address(&reachable::own_addresses())?,
        others: plan.machines - 1,
        ranks_per_machine: plan.ranks_per_machine,
        heartbeat_timeout: Duration::from_secs_f64(config.restart.heartbeat_timeout_s),
    }))
}

/// Starts the agents of other machines if there is a hostfile.
fn start_agents(
    args: &TrainArgs,
    plan: &MachinePlan,
    address: Option<SocketAddr>,
    secret: &Secret,
) -> Result<Option<SshSessions>> {
    let Some((hosts, address)) = plan.hostfile.as_ref().zip(address) else {
        return Ok(None);
    };
    let sessions = hosts.start_agents(&AgentStart {
        args,
        head: address,
        ranks_per_machine: plan.ranks_per_machine,
        input: &secret.to_hex(),
    })?;
    Ok(Some(sessions))
}
