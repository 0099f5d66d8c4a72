//! Development commands of moerun, run as `cargo x COMMAND`.
//!
//! | command | what it does |
//! |---|---|
//! | `cargo x fast` | runs the tests that start no process: under a minute once built |
//! | `cargo x layouts` | compares parallel layouts with one rank |
//! | `cargo x system` | runs the other whole-system tests: runs, faults, launchers |
//! | `cargo x docs` | builds the book and the API documentation, warnings being errors |
//! | `cargo x tidy` | checks the source tree and changes nothing; `cargo x tidy width` one rule |
//! | `cargo x fix` | formats the code and regenerates the reference and the schema |
//!
//! `fast`, `layouts` and `system` together run what `scripts/test` runs. Arguments after `--` go to
//! `cargo test`: `cargo x system -- faults` runs the tests with `faults` in their name, and
//! `cargo x fast -- -- --nocapture` shows what tests print.
//!
//! A new check of `tidy` is one file in `src/tidy/` and one line in `src/tidy/mod.rs`. Banned words
//! are in `words.txt`; words that only look like misspellings are in `typos.txt`.
//!
//! The alias `cargo x` is written to `.cargo/config.toml` by `scripts/setup`.

mod book;
mod cargo;
mod failure;
mod lexer;
mod programs;
mod reference;
mod suites;
mod tidy;
mod tree;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use failure::Failure;
use std::{path::PathBuf, process::ExitCode};
use tree::Tree;

/// Test, check and document moerun
#[derive(Parser)]
#[command(name = "cargo x", bin_name = "cargo x", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the tests that start no process
    Fast(TestArgs),
    /// Run the tests that compare parallel layouts with one rank
    Layouts(TestArgs),
    /// Run the other whole-system tests
    System(TestArgs),
    /// Build the book and the API documentation, with warnings as errors
    Docs,
    /// Check the source tree without changing it
    #[command(after_help = tidy::list())]
    Tidy {
        /// Checks to run [default: all]
        #[arg(value_name = "CHECK")]
        checks: Vec<String>,
    },
    /// Format the code and regenerate the reference and the schema
    Fix,
}

#[derive(Args)]
struct TestArgs {
    /// Arguments for `cargo test`
    #[arg(last = true, value_name = "ARGUMENTS")]
    extra: Vec<String>,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if let Some(failure) = error.downcast_ref::<Failure>() {
                eprintln!("hint: {}", failure.hint);
            }
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    // Read at run time: checkouts that share a target folder also share this program.
    let folder = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    let root = folder.parent().context("xtask has no parent folder")?;
    let tree = Tree::read(root)?;
    match command {
        Command::Fast(args) => suites::fast(&tree, &args.extra),
        Command::Layouts(args) => suites::layouts(&tree, &args.extra),
        Command::System(args) => suites::system(&tree, &args.extra),
        Command::Docs => book::build(&tree),
        Command::Tidy { checks } => tidy::run(&tree, &checks),
        Command::Fix => fix(&tree),
    }
}

fn fix(tree: &Tree) -> Result<()> {
    cargo::run(&mut cargo::command(tree, &["fmt", "--all"]))?;
    cargo::run(&mut reference::reference(tree)?)
}
