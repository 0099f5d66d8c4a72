//! `moerun`: starts, supervises and inspects runs.
//!
//! Every failure ends in one clear message and a non-zero exit status. No rank outlives its
//! launcher.

#[macro_use]
mod terminal;

mod argument_ranges;
mod bench;
mod chaos;
mod cli;
mod config_diff;
mod config_file;
mod conformance;
mod device_variables;
mod doctor;
mod environment;
mod evaluate;
mod fault;
mod fork_server;
mod generate;
mod held_signals;
mod hint;
mod inspect;
mod keeper;
mod launcher;
mod local_ranks;
mod machine_memory;
mod model;
#[cfg(test)]
mod mutated;
mod open_files;
mod plan;
mod progress;
mod protocol;
mod rank;
mod rank_log;
mod rank_ranges;
mod reference;
mod registry;
mod restarts;
mod run_file;
mod run_lock;
mod screen;
mod signals;
mod snapshot;
mod survival;

use anyhow::anyhow;
use clap::Parser;
use cli::{
    BenchCommand, Cli, Command, ConfigCommand, InspectCommand, KeeperCommand, ModelCommand,
    PlanCommand, SnapshotCommand,
};
use environment::DetectedRank;
use fork_server::Served;
use hint::hinted;
use signal_hook::consts::SIGPIPE;
use signals::Signals;
use std::{
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
};

fn main() -> ExitCode {
    torch_ext::skip_teardown_at_exit();
    open_files::raise();
    let cli = Cli::parse();
    if !matches!(cli.command, Command::Train(_)) {
        // Before anything that a signal has to end. Training sets handlers first.
        let _ = signals::let_through();
    }
    if only_prints(&cli.command) {
        exit_on_broken_pipe();
    }
    let result = match cli.command {
        Command::Train(args) => train(args),
        Command::Generate(args) => generate::run(args),
        Command::Evaluate(args) => evaluate::run(args),
        Command::Model(ModelCommand::Inspect(args)) => model::inspect::run(&args),
        Command::Model(ModelCommand::Export(args)) => model::export::run(args),
        Command::Model(ModelCommand::Import(args)) => model::import::run(&args),
        Command::Model(ModelCommand::Upcycle(args)) => model::upcycle::run(args),
        Command::Data(command) => data(dataset::cli::run(command)),
        Command::Config(ConfigCommand::Check(args)) => config_file::check(&args),
        Command::Config(ConfigCommand::Diff(args)) => config_diff::run(&args),
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
        Command::Reference(args) => reference::run(&args),
        Command::Bench(BenchCommand::Step(args)) => bench::step::run(args),
        Command::Bench(BenchCommand::Pipeline(args)) => bench::pipeline::run(&args),
        Command::Bench(BenchCommand::Memory(args)) => bench::memory::run(&args),
        Command::Bench(BenchCommand::Recompute(args)) => bench::recompute::run(&args),
        Command::Bench(BenchCommand::MoeLayer(args)) => bench::moe_layer::run(&args),
        Command::Bench(BenchCommand::Layouts(args)) => bench::layouts::run(&args),
        Command::Bench(BenchCommand::Collectives(args)) => bench::collectives::run(&args),
        Command::Bench(BenchCommand::Snapshot(args)) => bench::snapshot::run(&args),
        Command::Bench(BenchCommand::Scale(args)) => bench::scale::run(&args),
        Command::Bench(BenchCommand::Import(args)) => bench::import::run(&args),
        Command::Bench(BenchCommand::Data(args)) => data(dataset::cli::bench(&args)),
    };
    let code = result.unwrap_or_else(|error| {
        eprintln!("error: {}", hint::message(&error));
        ExitCode::FAILURE
    });
    terminal::flush();
    code
}

/// Returns the result of a command about data. `moerun` runs those in `moerun-data`, if that is
/// installed, so that libtorch is not loaded.
fn data(result: Result<(), dataset::Error>) -> anyhow::Result<ExitCode> {
    result?;
    Ok(ExitCode::SUCCESS)
}

/// True if the command starts no process and is not a rank.
fn only_prints(command: &Command) -> bool {
    !matches!(
        command,
        Command::Train(_)
            | Command::Bench(_)
            | Command::Keeper(_)
            | Command::Chaos(_)
            | Command::Conformance(_)
            | Command::Doctor(_)
    )
}

/// Makes `moerun inspect ... | head` exit quietly when its reader does.
///
/// Not for ranks: a peer that exits also closes connections.
fn exit_on_broken_pipe() {
    let always = Arc::new(AtomicBool::new(true));
    // Without the handler, printing fails with an error.
    let _ = signal_hook::flag::register_conditional_default(SIGPIPE, always);
}

/// Trains as one rank if a launcher started this process, else as the launcher.
fn train(args: cli::TrainArgs) -> anyhow::Result<ExitCode> {
    // Before any thread starts.
    device_variables::set_defaults(&args.config);
    // In a rank that was forked here, `serve` returns and the program continues as that rank.
    if environment::forks_ranks() && fork_server::serve()? == Served::Ended {
        return Ok(ExitCode::SUCCESS);
    }
    terminal::start_writer();
    if environment::launched_by_moerun() {
        let signals = Signals::install_in_launched_rank()?;
        return rank::run_assigned(&args, &signals);
    }
    let signals = Signals::install()?;
    // A number of machines asks for moerun's own launcher, whatever started this process.
    let asks_for_launcher = args.nnodes > 1 || args.hostfile.is_some();
    let detected = if asks_for_launcher {
        None
    } else {
        environment::detect_rank()?
    };
    let Some(DetectedRank { env, launcher }) = detected else {
        return launcher::run(&args, &signals);
    };
    let ranks = args.nproc_per_node;
    if ranks > 1 {
        let rank = env.rank;
        let world_size = env.world_size;
        return Err(hinted(
            anyhow!(
                "-n {ranks}, but {launcher} started this process as rank {rank} of {world_size}"
            ),
            format!("omit -n, or start moerun without {launcher}"),
        ));
    }
    let start = rank::RankStart {
        env: &env,
        launcher,
        input: None,
        signals: &signals,
    };
    rank::run(&args, &start)
}
