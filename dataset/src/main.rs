//! `moerun-data`: the commands of moerun that prepare and inspect data, without libtorch.

use clap::{Parser, Subcommand};
use dataset::cli::{BenchDataArgs, DataCommand};
use std::process::ExitCode;

/// Train Mixture-of-Experts language models on many ranks
#[derive(Parser)]
#[command(name = "moerun", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prepare training data
    #[command(subcommand)]
    Data(DataCommand),
    /// Run benchmarks; prints JSON lines
    #[command(subcommand)]
    Bench(BenchCommand),
}

#[derive(Subcommand)]
enum BenchCommand {
    /// Measure data preparation, compared with Hugging Face's tokenizers and other programs
    Data(BenchDataArgs),
}

/// Version of the program that started this one.
const FRONT_VERSION: &str = "MOERUN_FRONT_VERSION";

fn main() -> ExitCode {
    let own = env!("CARGO_PKG_VERSION");
    let front = std::env::var(FRONT_VERSION);
    if let Some(front) = front.ok().filter(|front| front != own) {
        let program = std::env::current_exe().unwrap_or_default();
        eprintln!(
            "error: moerun is version {front}, and {} is version {own}: build both again",
            program.display()
        );
        return ExitCode::FAILURE;
    }
    let result = match Cli::parse().command {
        Command::Data(command) => dataset::cli::run(command),
        Command::Bench(BenchCommand::Data(args)) => dataset::cli::bench(&args),
    };
    dataset::cli::exit_code(result)
}
