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
    /// See what would happen, before it does
    #[command(subcommand)]
    Plan(PlanCommand),
    /// Look at what a run did
    #[command(subcommand)]
    Inspect(InspectCommand),
    /// Snapshots in memory: what is there, and whether it is right
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Make faults on purpose in a run that is going on, and measure how it recovers
    Chaos(ChaosArgs),
    /// Look for what could keep a run from working on this machine, or between the ranks of a launcher, and say what to do
    Doctor(DoctorArgs),
    /// Try everything that training asks of this machine's device, and of what carries the ranks' messages
    Conformance(ConformanceArgs),
    /// The processes that keep snapshots in memory
    #[command(subcommand)]
    Keeper(KeeperCommand),
    /// Measure; prints JSON lines
    #[command(subcommand)]
    Bench(BenchCommand),
}

#[derive(Subcommand)]
pub(crate) enum KeeperCommand {
    /// Be a keeper; 'moerun train' starts it
    #[command(hide = true)]
    Serve,
    /// Stop the keepers that a killed launcher left, and forget what is in their memory
    Stop(RunArgs),
}

#[derive(Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Say what the keepers have
    Status(SnapshotStatusArgs),
    /// Check every checksum
    Verify(RunArgs),
}

#[derive(Args)]
pub(crate) struct SnapshotStatusArgs {
    /// The run's folder
    #[arg(value_name = "RUN")]
    pub(crate) run: PathBuf,
    /// Print all that the keepers say, as JSON lines
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct ChaosArgs {
    /// The run's folder
    #[arg(value_name = "RUN")]
    pub(crate) run: PathBuf,
    /// Decides kinds, targets and moments
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// How many faults
    #[arg(long, default_value_t = 10)]
    pub(crate) faults: usize,
    /// Which kinds, at random
    #[arg(long, value_delimiter = ',', default_value = "kill")]
    pub(crate) kinds: Vec<crate::fault::FaultKind>,
    /// Steps between faults, in the mean
    #[arg(long, default_value_t = 5)]
    pub(crate) gap: u64,
    /// The time of a step, in milliseconds: a fault comes at any moment of it
    #[arg(long, default_value_t = 20)]
    pub(crate) step_ms: u64,
    /// Give up when the run does not get on for so long
    #[arg(long, default_value_t = 60)]
    pub(crate) timeout_s: u64,
}

#[derive(Args)]
pub(crate) struct DoctorArgs {
    /// The experiment that is to run
    pub(crate) config: Option<PathBuf>,
    /// Change one value of it, such as run.device=cpu; may be given many times
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    pub(crate) set: Vec<String>,
    /// Ranks to start on this machine; ranks that another launcher started are counted by it
    #[arg(short = 'n', long, default_value_t = 2, value_name = "N")]
    pub(crate) nproc_per_node: usize,
    /// The port that ranks are to meet at
    #[arg(long, default_value_t = 0, value_name = "PORT", alias = "master_port")]
    pub(crate) master_port: u16,
}

#[derive(Args)]
pub(crate) struct ConformanceArgs {
    /// Ranks to start on this machine; ranks that another launcher started are counted by it
    #[arg(short = 'n', long, default_value_t = 2, value_name = "N")]
    pub(crate) nproc_per_node: usize,
    /// auto, gloo, mpi, nccl or hccl
    #[arg(long, default_value = "auto", value_name = "BACKEND")]
    pub(crate) backend: parallel::Backend,
    /// cpu, cuda, npu or auto
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
}

/// A run.
#[derive(Args)]
pub(crate) struct RunArgs {
    /// The run's folder
    #[arg(value_name = "RUN")]
    pub(crate) run: PathBuf,
}

#[derive(Subcommand)]
pub(crate) enum InspectCommand {
    /// Draw which experts were used over time, and say how consistent the router is from token to token
    Routing(InspectRoutingArgs),
}

#[derive(Args)]
pub(crate) struct InspectRoutingArgs {
    /// The run's folder
    #[arg(value_name = "RUN")]
    pub(crate) run: PathBuf,
    /// Pictures that the run is divided into
    #[arg(long, default_value_t = 4)]
    pub(crate) slices: usize,
    /// Tokens of a segment
    #[arg(long, default_value_t = 16)]
    pub(crate) segment: usize,
    /// Experts that a cache holds; by default twice those that a token chooses
    #[arg(long)]
    pub(crate) cache: Option<usize>,
    /// Tokens of text to look at
    #[arg(long, default_value_t = 8192)]
    pub(crate) tokens: usize,
    /// Also draw it here
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

#[derive(Subcommand)]
pub(crate) enum PlanCommand {
    /// Draw a pipeline's schedule, and say how long it takes and what it holds
    Schedule(ScheduleArgs),
    /// Say who sits where and what each rank's memory will hold
    Mesh(MeshArgs),
    /// Say how likely it is that snapshots in memory survive
    Survival(SurvivalArgs),
}

#[derive(Args)]
pub(crate) struct SurvivalArgs {
    /// Nodes of the run
    #[arg(long, default_value_t = 128)]
    pub(crate) nodes: usize,
    /// Mean time between failures of one node, in hours
    #[arg(long, default_value_t = 1622.0, value_name = "HOURS")]
    pub(crate) mtbf_h: f64,
    /// Shape of the Weibull distribution of a node's life; 1: failures come at any age alike
    #[arg(long, default_value_t = 1.0)]
    pub(crate) shape: f64,
    /// Seconds until what a lost node had is protected again
    #[arg(long, default_value_t = 600.0, value_name = "SECONDS")]
    pub(crate) window_s: f64,
    /// Length of the run
    #[arg(long, default_value_t = 30.0, value_name = "DAYS")]
    pub(crate) days: f64,
    /// Nodes of data in a group, at most; may be given many times, each with every --parity
    #[arg(long, value_delimiter = ',', default_value = "4,7")]
    pub(crate) data: Vec<usize>,
    /// Nodes of a group that may be lost
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    pub(crate) parity: Vec<usize>,
    /// Seconds between snapshots
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS")]
    pub(crate) interval_s: f64,
    /// Seconds from a failure to the next step
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    pub(crate) restart_s: f64,
    /// Simulate so many windows beside the formula
    #[arg(long, default_value_t = 0, value_name = "TRIALS")]
    pub(crate) simulate: u64,
    /// Decides the simulation
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Args)]
pub(crate) struct ScheduleArgs {
    /// gpipe, 1f1b, interleaved, zb-h1, zb-v, v-half, v-min, dualpipe-v, or a YAML file with a schedule of your own
    pub(crate) schedule: String,
    /// Ranks of the pipeline (a file says so itself)
    #[arg(short = 'n', long, default_value_t = 4, value_name = "P")]
    pub(crate) ranks: usize,
    /// Microbatches of a step (a file says so itself)
    #[arg(short, long, default_value_t = 8, value_name = "M")]
    pub(crate) microbatches: usize,
    /// Stages of a rank, for interleaved
    #[arg(long, value_name = "C")]
    pub(crate) chunks: Option<usize>,
    /// Share the vocabulary out over all ranks, by this algorithm
    #[arg(long, value_name = "ALGORITHM")]
    pub(crate) vocabulary: Option<VocabularyName>,
    /// Times of F, B and W of a rank's layers, and, if it counts, of the whole output layer's forward
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,1,1",
        value_name = "F,B,W[,O]"
    )]
    pub(crate) times: Vec<f64>,
    /// Also draw it here
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// Print the schedule as a file that parallel.schedule.file takes, and nothing else
    #[arg(long)]
    pub(crate) yaml: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum VocabularyName {
    /// Three barriers a microbatch
    Naive,
    /// All ranks stop for it together
    Interlaced,
    /// Two barriers a microbatch
    #[value(name = "vocab-1")]
    Vocab1,
    /// One barrier a microbatch
    #[value(name = "vocab-2")]
    Vocab2,
}

#[derive(Args)]
pub(crate) struct MeshArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Ranks it is to run on
    #[arg(short = 'n', long, default_value_t = 1, value_name = "N")]
    pub(crate) ranks: usize,
}

#[derive(Subcommand)]
pub(crate) enum BenchCommand {
    /// One training step of a small Mixtral on random tokens
    Step(StepArgs),
    /// A two-stage pipeline with a large vocabulary: where its embedding and output layer are
    Pipeline(PipelineArgs),
    /// What ranks hold in many layouts, beside what `plan mesh` says
    Memory(MemoryArgs),
    /// What it saves and costs an experiment, on this machine, to compute activations again; and the cheapest way that fits
    Recompute(RecomputeArgs),
    /// An MoE layer, or a whole step, whose ranks are loaded unevenly: least-loaded beside standard dispatch
    MoeLayer(MoeLayerArgs),
    /// Snapshots in memory: what they cost a run, and how fast they are copied and protected
    Snapshot(SnapshotBenchArgs),
    /// Every collective among ranks of this machine, by the path that training takes beside Gloo's and (under mpirun) MPI's
    Collectives(CollectivesArgs),
    /// The reference step on two ranks of one thread: data, expert or pipeline parallel, beside one process with two threads
    Layouts(LayoutsArgs),
}

#[derive(Args)]
pub(crate) struct LayoutsArgs {
    /// data, expert or pipeline. Without it all of them
    #[arg(long, value_name = "CASE")]
    pub(crate) case: Option<String>,
    /// How often the layouts take turns; medians over all steps are reported
    #[arg(long, default_value_t = 3)]
    pub(crate) rounds: usize,
    /// Steps of a turn, of which the first two are not counted and the last is traced
    #[arg(long, default_value_t = 10)]
    pub(crate) steps: u64,
    /// A command to measure in the same run, alternating; its last line is JSON with `tokens_per_s`
    #[arg(long, value_name = "COMMAND")]
    pub(crate) baseline: Option<String>,
}

#[derive(Args)]
pub(crate) struct CollectivesArgs {
    /// all_reduce, broadcast, all_gather, reduce_scatter, all_to_all or send_recv; may be given many times. Without it all of
    /// them
    #[arg(long, value_name = "NAME")]
    pub(crate) operation: Vec<String>,
    /// Size of the tensor that holds every rank's part
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "64,1024,16384",
        value_name = "KIB"
    )]
    pub(crate) kib: Vec<usize>,
    /// Ranks, of one thread each; ranks that mpirun started are counted by it
    #[arg(short = 'n', long, default_value_t = 2, value_name = "N")]
    pub(crate) ranks: usize,
    /// How often the sides take turns; medians are reported
    #[arg(long, default_value_t = 15)]
    pub(crate) rounds: usize,
}

#[derive(Args)]
pub(crate) struct SnapshotBenchArgs {
    /// copy, encode-4+1, encode-4+2, encode-8+2, decode-4+2, stall, every-10 or every-1; may be given many times. Without it
    /// all of them
    #[arg(long, value_name = "CASE")]
    pub(crate) case: Vec<String>,
    /// State of a rank
    #[arg(long, default_value_t = 256, value_name = "MIB")]
    pub(crate) mib: usize,
    /// How often the sides take turns; medians are reported
    #[arg(long, default_value_t = 5)]
    pub(crate) rounds: usize,
    /// Threads of the rank, for cases that train
    #[arg(long, default_value_t = 2)]
    pub(crate) threads: usize,
    /// For stall: a command to measure in the same run, alternating; its last line is JSON with `stall_ms`. {mib} is filled
    /// in
    #[arg(long, value_name = "COMMAND")]
    pub(crate) baseline: Option<String>,
}

#[derive(Args)]
pub(crate) struct MoeLayerArgs {
    /// balanced, SHARE:EXPERTS (of the tokens, to so many experts of rank 0), or one of the workloads w0 to w7; may be given
    /// many times. Without it all of them
    #[arg(long, value_name = "CASE")]
    pub(crate) case: Vec<String>,
    /// Ranks, of one thread each
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub(crate) ranks: usize,
    /// Tokens of each rank
    #[arg(long, default_value_t = 4096)]
    pub(crate) tokens: usize,
    /// Width of a token
    #[arg(long, default_value_t = 512)]
    pub(crate) hidden: usize,
    /// Inner width of an expert
    #[arg(long, default_value_t = 512)]
    pub(crate) ffn: usize,
    /// Experts; by default 8 (or the ranks) for each hot one
    #[arg(long)]
    pub(crate) experts: Option<usize>,
    /// How often both dispatches take turns; medians are reported
    #[arg(long, default_value_t = 7)]
    pub(crate) rounds: usize,
    /// Choices for which an expert is lent; by default measured
    #[arg(long, value_name = "TOKENS")]
    pub(crate) min_tokens: Option<u32>,
    /// A whole training step of a small model, its router biased as the workload says (balanced and w0 to w7)
    #[arg(long)]
    pub(crate) step: bool,
}

#[derive(Args)]
pub(crate) struct MemoryArgs {
    /// One layout, by the name in its line; all by default
    #[arg(long)]
    pub(crate) case: Option<String>,
}

#[derive(Args)]
pub(crate) struct RecomputeArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Ranks to start on this machine
    #[arg(short = 'n', long, default_value_t = 1, value_name = "N")]
    pub(crate) nproc_per_node: usize,
    /// Also choose what to compute again so that the most loaded rank's tensors take at most so much, and measure that
    #[arg(long, value_name = "MIB")]
    pub(crate) fit_mib: Option<f64>,
    /// Threads of a rank; by default OMP_NUM_THREADS, else its share of the processors
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    /// How often the ways take turns; medians over all steps are reported
    #[arg(long, default_value_t = 2)]
    pub(crate) rounds: usize,
    /// Steps of each turn; the first two do not count
    #[arg(long, default_value_t = 8)]
    pub(crate) steps: u64,
}

#[derive(Args)]
pub(crate) struct PipelineArgs {
    /// How often the layouts take turns
    #[arg(long, default_value_t = 3)]
    pub(crate) rounds: usize,
    /// Steps of each turn; the first does not count
    #[arg(long, default_value_t = 4)]
    pub(crate) steps: u64,
    /// Tokens of the vocabulary
    #[arg(long, default_value_t = 32768)]
    pub(crate) vocab: usize,
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
    #[arg(
        short = 'n',
        long,
        default_value_t = 1,
        value_name = "N",
        alias = "nproc_per_node"
    )]
    pub(crate) nproc_per_node: usize,
    /// Port that ranks meet at; 0 takes any free one
    #[arg(long, default_value_t = 0, value_name = "PORT", alias = "master_port")]
    pub(crate) master_port: u16,
    /// Machines of the run; start the same command on each, with another --node-rank
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) nnodes: usize,
    /// Which of them this is, from 0
    #[arg(
        long,
        default_value_t = 0,
        value_name = "R",
        alias = "node_rank",
        requires = "rdzv"
    )]
    pub(crate) node_rank: usize,
    /// Where they meet: machine 0 and a free port there
    #[arg(
        long,
        value_name = "HOST:PORT",
        alias = "rdzv-endpoint",
        alias = "rdzv_endpoint"
    )]
    pub(crate) rdzv: Option<String>,
    /// Start the other machines from here, over ssh: a line for each, 'host' or 'host slots=N', this one first
    #[arg(long, value_name = "FILE", conflicts_with_all = ["nnodes", "node_rank"])]
    pub(crate) hostfile: Option<PathBuf>,
    /// What starts a command on another machine, as in SSH HOST COMMAND
    #[arg(long, default_value = "ssh", value_name = "SSH", requires = "hostfile")]
    pub(crate) ssh: PathBuf,
    /// Nodes that stand by, to take the place of lost ones: keepers on this machine, or the last of several machines
    #[arg(long, default_value_t = 0, value_name = "NODES")]
    pub(crate) spare_nodes: usize,
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
pub(crate) struct StepArgs {
    /// One case of it; all by default
    #[arg(long)]
    pub(crate) case: Option<StepCase>,
    /// Its size: reference, long (one sequence of 2048 tokens, 16 experts top-4), wide (hidden 768, 2 layers); for GPUs olmoe
    /// (4 layers of OLMoE-1B-7B) and coarse (1 layer of Mixtral-8x7B)
    #[arg(long, default_value = "reference")]
    pub(crate) shape: StepShape,
    /// Let tokens choose experts round-robin, so that all have as much to do, instead of by their scores
    #[arg(long)]
    pub(crate) force_balance: bool,
    /// Write the first weights and the tokens to this file, and go on from them
    #[arg(long, value_name = "FILE", conflicts_with = "baseline")]
    pub(crate) start: Option<PathBuf>,
    /// Also say what a step is made of, with operations, bytes and rates of each part, and write three steps as a Chrome trace
    /// to this file
    #[arg(long, value_name = "FILE", conflicts_with = "baseline")]
    pub(crate) profile: Option<PathBuf>,
    /// Measured steps; their median is reported
    #[arg(long, default_value_t = 8)]
    pub(crate) steps: usize,
    /// Threads
    #[arg(long, default_value_t = 2)]
    pub(crate) threads: usize,
    /// cpu, cuda, npu or auto
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// A command to measure in the same run, alternating; it prints a JSON line with `tokens_per_s`. {case}, {shape}, {steps},
    /// {threads}, {device}, {force_balance} (that option, or nothing) and {start} (a file with our first weights and the tokens) are
    /// filled in. May be given many times: the fastest is the baseline
    #[arg(long, value_name = "COMMAND")]
    pub(crate) baseline: Vec<String>,
    /// How often ours and the baselines take turns
    #[arg(long, default_value_t = 5, requires = "baseline")]
    pub(crate) rounds: usize,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum StepShape {
    Reference,
    Long,
    Wide,
    Olmoe,
    Coarse,
}

impl StepShape {
    pub(crate) fn name(self) -> &'static str {
        match self {
            StepShape::Reference => "reference",
            StepShape::Long => "long",
            StepShape::Wide => "wide",
            StepShape::Olmoe => "olmoe",
            StepShape::Coarse => "coarse",
        }
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum StepCase {
    Fp32,
    Bf16,
}

impl StepCase {
    pub(crate) fn name(self) -> &'static str {
        match self {
            StepCase::Fp32 => "fp32",
            StepCase::Bf16 => "bf16",
        }
    }
}
