//! `moerun`: starts, supervises and inspects runs.
//!
//! Invariant: a person sees one clear message and a non-zero exit status for every failure; no rank outlives the
//! launcher.

mod bench;
mod chaos;
mod cli;
mod config_file;
mod conformance;
mod doctor;
mod environment;
mod generate;
mod inspect;
mod keeper;
mod launcher;
mod local_ranks;
mod plan;
mod prepare;
mod progress;
mod rank;
mod registry;
mod snapshot;
mod survival;

use clap::Parser;
use cli::{
    BenchCommand, Cli, Command, ConfigCommand, DataCommand, InspectCommand, KeeperCommand,
    PlanCommand, SnapshotCommand,
};
use environment::DetectedRank;
use signal_hook::consts::SIGPIPE;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

fn main() -> ExitCode {
    torch_ext::skip_teardown_at_exit();
    let cli = Cli::parse();
    let only_reports = |command: &Command| {
        !matches!(
            command,
            Command::Train(_)
                | Command::Bench(_)
                | Command::Keeper(_)
                | Command::Chaos(_)
                | Command::Conformance(_)
                | Command::Doctor(_)
        )
    };
    if only_reports(&cli.command) {
        exit_on_broken_pipe();
    }
    let result = match cli.command {
        Command::Train(args) => train(args),
        Command::Generate(args) => generate::run(args),
        Command::Data(DataCommand::Prepare(args)) => prepare::run(args),
        Command::Config(ConfigCommand::Check(args)) => config_file::check(&args),
        Command::Config(ConfigCommand::Schema) => config_file::print_schema(),
        Command::Plan(PlanCommand::Schedule(args)) => plan::schedule(&args),
        Command::Plan(PlanCommand::Mesh(args)) => plan::mesh(&args),
        Command::Inspect(InspectCommand::Routing(args)) => inspect::routing::run(&args),
        Command::Plan(PlanCommand::Survival(args)) => survival::run(&args),
        Command::Snapshot(SnapshotCommand::Status(args)) => snapshot::status(&args),
        Command::Snapshot(SnapshotCommand::Verify(args)) => snapshot::verify(&args),
        Command::Chaos(args) => chaos::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Conformance(args) => conformance::run(&args),
        Command::Keeper(KeeperCommand::Serve) => keeper::serve(),
        Command::Keeper(KeeperCommand::Stop(args)) => keeper::stop(&args),
        Command::Bench(BenchCommand::Step(args)) => bench::step::run(args),
        Command::Bench(BenchCommand::Pipeline(args)) => bench::pipeline::run(&args),
        Command::Bench(BenchCommand::Memory(args)) => bench::memory::run(&args),
        Command::Bench(BenchCommand::Recompute(args)) => bench::recompute::run(&args),
        Command::Bench(BenchCommand::MoeLayer(args)) => bench::moe_layer::run(&args),
        Command::Bench(BenchCommand::Layouts(args)) => bench::layouts::run(&args),
        Command::Bench(BenchCommand::Collectives(args)) => bench::collectives::run(&args),
        Command::Bench(BenchCommand::Snapshot(args)) => bench::snapshot::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `moerun inspect ... | head` ends quietly when head has read enough, as other programs do. (Not where ranks are at work: a
/// peer that is gone closes connections too.)
fn exit_on_broken_pipe() {
    // Where it cannot be registered, printing fails as it would have.
    let _ =
        signal_hook::flag::register_conditional_default(SIGPIPE, Arc::new(AtomicBool::new(true)));
}

/// Where a launcher started this process it is one rank; otherwise it starts the ranks.
fn train(args: cli::TrainArgs) -> anyhow::Result<ExitCode> {
    if environment::launched_by_moerun() {
        return rank::run_assigned(&args);
    }
    // Who says how many machines there are starts ranks by moerun itself, whatever started this process.
    let launched_by_others = if args.nnodes > 1 || args.hostfile.is_some() {
        None
    } else {
        environment::detect_rank()?
    };
    match launched_by_others {
        Some(DetectedRank { env, by }) if args.nproc_per_node > 1 => anyhow::bail!(
            "-n {} was given, and {by} started this process as rank {} of {}: leave -n out, or start moerun without {by}",
            args.nproc_per_node,
            env.rank,
            env.world_size
        ),
        Some(DetectedRank { env, by }) => rank::run(&args, &env, by, None),
        None => launcher::run(&args),
    }
}
