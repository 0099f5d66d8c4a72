//! The command line.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Trains Mixture-of-Experts language models over many ranks.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Train what a configuration describes; goes on where an earlier run in the same folder stopped
    Train(TrainArgs),
    /// Write text with a trained model
    Generate(GenerateArgs),
    /// Make token files
    #[command(subcommand)]
    Data(DataCommand),
    /// Look at configurations
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Measure; prints JSON lines
    Bench(BenchArgs),
}

#[derive(Subcommand)]
pub(crate) enum DataCommand {
    /// Tokenise text, JSONL and Parquet into files that moerun and Megatron-LM read
    Prepare(PrepareArgs),
}

#[derive(Subcommand)]
pub(crate) enum ConfigCommand {
    /// Check a configuration without starting anything, and print it with all defaults
    Check(CheckArgs),
    /// Print the JSON Schema of configurations
    Schema,
}

/// A configuration and changes to it.
#[derive(Args)]
pub(crate) struct ConfigArgs {
    /// YAML file that describes the experiment
    pub(crate) config: PathBuf,
    /// Change one value, such as train.steps=100; may be given many times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

#[derive(Args)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Ranks to start on this machine
    #[arg(short = 'n', long, default_value_t = 1, value_name = "N", alias = "nproc_per_node")]
    pub(crate) nproc_per_node: usize,
    /// Port that ranks meet at; 0 takes any free one
    #[arg(long, default_value_t = 0, value_name = "PORT", alias = "master_port")]
    pub(crate) master_port: u16,
}

#[derive(Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Ranks it is to run on
    #[arg(short = 'n', long, default_value_t = 1, value_name = "N")]
    pub(crate) nproc_per_node: usize,
}

#[derive(Args)]
pub(crate) struct GenerateArgs {
    /// A run's folder (its newest checkpoint is taken) or one checkpoint
    #[arg(long, value_name = "DIR")]
    pub(crate) checkpoint: PathBuf,
    /// How the text begins
    #[arg(long, default_value = "")]
    pub(crate) prompt: String,
    /// Tokens to add at most
    #[arg(long, default_value_t = 128)]
    pub(crate) max_tokens: usize,
    /// 0 takes the likeliest token each time
    #[arg(long, default_value_t = 0.8)]
    pub(crate) temperature: f64,
    /// Choose among this many likeliest tokens; 0: among all
    #[arg(long, default_value_t = 50)]
    pub(crate) top_k: usize,
    /// Decides the choices
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: i64,
    /// Another tokenizer.json than the run's
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct PrepareArgs {
    /// Files and folders of text, .jsonl or .parquet
    #[arg(required = true)]
    pub(crate) inputs: Vec<PathBuf>,
    /// Folder for train.bin/.idx, valid.bin/.idx, tokenizer.json and dataset.json
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Take this Hugging Face tokenizer.json instead of training a byte-level BPE
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Vocabulary of a tokenizer that is trained
    #[arg(long, default_value_t = 8192, value_name = "N")]
    pub(crate) vocab_size: usize,
    /// Share of documents kept for validation
    #[arg(long, default_value_t = 0.02, value_name = "SHARE")]
    pub(crate) validation_fraction: f64,
    /// Extensions of files that are taken from folders
    #[arg(long, value_delimiter = ',', default_value = "txt,md,jsonl,parquet")]
    pub(crate) extensions: Vec<String>,
    /// Field of JSONL objects, column of Parquet tables
    #[arg(long, default_value = "text", value_name = "NAME")]
    pub(crate) text_key: String,
    /// Use no more than this many megabytes of text
    #[arg(long, value_name = "MB")]
    pub(crate) max_mb: Option<f64>,
}

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// What to measure
    pub(crate) name: BenchName,
    /// One case of it; all by default
    #[arg(long)]
    pub(crate) case: Option<BenchCase>,
    /// Measured steps; their median is reported
    #[arg(long, default_value_t = 8)]
    pub(crate) runs: usize,
    /// Threads
    #[arg(long, default_value_t = 2)]
    pub(crate) threads: usize,
    /// A command to measure in the same run, alternating; it prints a JSON line with `tokens_per_s`. {case}, {runs} and
    /// {threads} are filled in. May be given many times: the fastest is the baseline
    #[arg(long, value_name = "COMMAND")]
    pub(crate) baseline: Vec<String>,
    /// How often ours and the baselines take turns
    #[arg(long, default_value_t = 5, requires = "baseline")]
    pub(crate) rounds: usize,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum BenchName {
    /// One training step of a small Mixtral on random tokens
    Step,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum BenchCase {
    Fp32,
    Bf16,
}

impl BenchCase {
    pub(crate) fn name(self) -> &'static str {
        match self {
            BenchCase::Fp32 => "fp32",
            BenchCase::Bf16 => "bf16",
        }
    }
}
