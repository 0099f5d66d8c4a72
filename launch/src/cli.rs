//! The command line: every command, argument and option.

use crate::argument_ranges::{
    MAX_LOCAL_RANKS, MAX_RANKS, fraction, megabytes, pass_time, positive_time, temperature, time,
    weibull_shape, whole,
};
use clap::{Args, Parser, Subcommand, ValueEnum, value_parser};
use std::path::PathBuf;

/// Train Mixture-of-Experts language models on many ranks
#[derive(Parser)]
#[command(version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Train a model; resumes if the run's folder has state
    Train(TrainArgs),
    /// Generate text with a trained model
    Generate(GenerateArgs),
    /// Compute log-likelihoods of texts
    Evaluate(EvaluateArgs),
    /// Exchange models with Hugging Face transformers and inference servers
    #[command(subcommand)]
    Model(ModelCommand),
    /// Prepare training data
    #[command(subcommand)]
    Data(DataCommand),
    /// Check configurations and print their schema
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Plan a run before it starts: schedules, memory, fault tolerance
    #[command(subcommand)]
    Plan(PlanCommand),
    /// Inspect a finished or running run
    #[command(subcommand)]
    Inspect(InspectCommand),
    /// Show and verify snapshots in memory
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Inject faults into a live run and measure its recovery
    Chaos(ChaosArgs),
    /// Diagnose this machine, or all machines of a launcher, and suggest fixes
    Doctor(DoctorArgs),
    /// Test this machine's device and communication backend for training
    Conformance(ConformanceArgs),
    /// Manage keepers, the snapshot daemons
    #[command(subcommand)]
    Keeper(KeeperCommand),
    /// Run benchmarks; prints JSON lines
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Write the generated reference pages and the JSON schema
    #[command(hide = true)]
    Reference(ReferenceArgs),
}

#[derive(Args)]
pub(crate) struct ReferenceArgs {
    /// Folder of the pages
    #[arg(long, default_value = "docs/reference", value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// File for the JSON schema of configurations
    #[arg(long, default_value = "configs/schema.json", value_name = "FILE")]
    pub(crate) schema: PathBuf,
    /// Check that the files are current instead of writing them
    #[arg(long)]
    pub(crate) check: bool,
}

#[derive(Subcommand)]
pub(crate) enum KeeperCommand {
    /// Run a keeper; `moerun train` starts it
    #[command(hide = true)]
    Serve,
    /// Stop the keepers that a killed launcher left; their snapshots are lost
    Stop(RunArgs),
}

#[derive(Subcommand)]
pub(crate) enum SnapshotCommand {
    /// List keepers, ranks and snapshots
    Status(SnapshotStatusArgs),
    /// Check every checksum of the snapshots in memory
    Verify(RunArgs),
}

#[derive(Args)]
pub(crate) struct SnapshotStatusArgs {
    /// Folder of the run (`run.dir`)
    #[arg(value_name = "RUN")]
    pub(crate) run: PathBuf,
    /// Print everything the keepers report, as JSON lines
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct ChaosArgs {
    /// Folder of the run (`run.dir`)
    #[arg(value_name = "RUN")]
    pub(crate) run: PathBuf,
    /// Seed of the kinds, targets and times of faults
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub(crate) seed: u64,
    /// Number of faults
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = whole(1..=1_000_000))]
    pub(crate) faults: usize,
    /// Kinds of faults to choose from at random, comma separated
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "kill",
        value_name = "KIND"
    )]
    pub(crate) kinds: Vec<crate::fault::FaultKind>,
    /// Mean number of steps between faults
    #[arg(
        long,
        default_value_t = 5,
        value_name = "STEPS",
        value_parser = value_parser!(u64).range(0..=1_000_000_000)
    )]
    pub(crate) gap: u64,
    /// Time of a step: a fault comes at a random time within it
    #[arg(
        long,
        default_value_t = 20,
        value_name = "MS",
        value_parser = value_parser!(u64).range(0..=1_000_000_000)
    )]
    pub(crate) step_ms: u64,
    /// Fail if the run makes no progress for this long
    #[arg(
        long,
        default_value_t = 60,
        value_name = "SECONDS",
        value_parser = value_parser!(u64).range(1..=1_000_000_000)
    )]
    pub(crate) timeout_s: u64,
}

#[derive(Args)]
pub(crate) struct DoctorArgs {
    /// YAML file of the experiment to check
    pub(crate) config: Option<PathBuf>,
    /// Override a configuration value, such as run.device=cpu; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    pub(crate) set: Vec<String>,
    /// Ranks to start on this machine; ignored for ranks of another launcher
    #[arg(
        short = 'n',
        long,
        default_value_t = 2,
        value_name = "N",
        value_parser = whole(1..=MAX_LOCAL_RANKS)
    )]
    pub(crate) nproc_per_node: usize,
    /// Port of the rendezvous; 0 takes any free port
    #[arg(long, default_value_t = 0, value_name = "PORT", alias = "master_port")]
    pub(crate) master_port: u16,
}

#[derive(Args)]
pub(crate) struct ConformanceArgs {
    /// Ranks to start on this machine; ignored for ranks of another launcher
    #[arg(
        short = 'n',
        long,
        default_value_t = 2,
        value_name = "N",
        value_parser = whole(1..=MAX_LOCAL_RANKS)
    )]
    pub(crate) nproc_per_node: usize,
    /// Communication backend: auto, gloo, mpi, nccl or hccl
    #[arg(long, default_value = "auto", value_name = "BACKEND")]
    pub(crate) backend: parallel::Backend,
    /// Device to test: cpu, cuda, npu or auto
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub(crate) device: String,
}

#[derive(Args)]
pub(crate) struct RunArgs {
    /// Folder of the run (`run.dir`)
    #[arg(value_name = "RUN")]
    pub(crate) run: PathBuf,
}

#[derive(Subcommand)]
pub(crate) enum InspectCommand {
    /// Draw the use of experts over time and measure routing consistency
    Routing(InspectRoutingArgs),
}

#[derive(Args)]
pub(crate) struct InspectRoutingArgs {
    /// Folder of the run (`run.dir`)
    #[arg(value_name = "RUN")]
    pub(crate) run: PathBuf,
    /// Number of pictures, each of an equal part of the run
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = whole(1..=1_000_000))]
    pub(crate) slices: usize,
    /// Length of the segments over which consistency is measured
    #[arg(
        long,
        default_value_t = 16,
        value_name = "TOKENS",
        value_parser = whole(1..=1_000_000_000)
    )]
    pub(crate) segment: usize,
    /// Experts in the simulated cache [default: twice top_k]
    #[arg(long, value_name = "EXPERTS", value_parser = whole(1..=65_536))]
    pub(crate) cache: Option<usize>,
    /// Tokens of validation text to route
    #[arg(
        long,
        default_value_t = 8192,
        value_name = "TOKENS",
        value_parser = whole(1..=1_000_000_000)
    )]
    pub(crate) tokens: usize,
    /// Also write the picture to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

#[derive(Subcommand)]
pub(crate) enum PlanCommand {
    /// Draw a pipeline schedule and print its time and memory
    Schedule(ScheduleArgs),
    /// Print the rank layout and the estimated memory per rank
    Mesh(MeshArgs),
    /// Print the probability that snapshots in memory survive
    Survival(SurvivalArgs),
}

#[derive(Args)]
pub(crate) struct SurvivalArgs {
    /// Nodes of the run
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = whole(1..=MAX_RANKS))]
    pub(crate) nodes: usize,
    /// Mean time between failures of one node, in hours
    #[arg(long, default_value_t = 1622.0, value_name = "HOURS", value_parser = positive_time)]
    pub(crate) mtbf_h: f64,
    /// Shape of the Weibull distribution of node lifetimes; 1 is exponential
    #[arg(long, default_value_t = 1.0, value_name = "K", value_parser = weibull_shape)]
    pub(crate) shape: f64,
    /// Time until the data of a lost node is redundant again
    #[arg(long, default_value_t = 600.0, value_name = "SECONDS", value_parser = positive_time)]
    pub(crate) window_s: f64,
    /// Duration of the run
    #[arg(long, default_value_t = 30.0, value_name = "DAYS", value_parser = positive_time)]
    pub(crate) days: f64,
    /// Largest number of data nodes per group, comma separated; combined with each --parity
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "4,7",
        value_name = "N",
        value_parser = whole(1..=254)
    )]
    pub(crate) data: Vec<usize>,
    /// Nodes of a group that may be lost, comma separated
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,2",
        value_name = "N",
        value_parser = whole(1..=254)
    )]
    pub(crate) parity: Vec<usize>,
    /// Time between snapshots
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS", value_parser = time)]
    pub(crate) interval_s: f64,
    /// Time from a failure to the next step
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS", value_parser = time)]
    pub(crate) restart_s: f64,
    /// Also simulate this many windows
    #[arg(
        long,
        default_value_t = 0,
        value_name = "TRIALS",
        value_parser = value_parser!(u64).range(0..=1_000_000)
    )]
    pub(crate) simulate: u64,
    /// Seed of the simulation
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub(crate) seed: u64,
}

#[derive(Args)]
pub(crate) struct ScheduleArgs {
    /// gpipe, 1f1b, interleaved, zb-h1, zb-v, v-half, v-min, dualpipe-v, or a YAML file
    pub(crate) schedule: String,
    /// Ranks of the pipeline; ignored for a file
    #[arg(
        short = 'n',
        long,
        default_value_t = 4,
        value_name = "P",
        value_parser = whole(1..=MAX_RANKS)
    )]
    pub(crate) ranks: usize,
    /// Microbatches of a step; ignored for a file
    #[arg(
        short,
        long,
        default_value_t = 8,
        value_name = "M",
        value_parser = whole(1..=1_073_741_824)
    )]
    pub(crate) microbatches: usize,
    /// Model chunks per rank, for interleaved
    #[arg(long, value_name = "C", value_parser = whole(1..=1024))]
    pub(crate) chunks: Option<usize>,
    /// Share the vocabulary among all ranks with this algorithm
    #[arg(long, value_name = "ALGORITHM")]
    pub(crate) vocabulary: Option<VocabularyName>,
    /// Times of F, B and W of a rank's layers, and of the output layer's forward
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,1,1",
        value_name = "F,B,W[,O]", value_parser = pass_time)]
    pub(crate) times: Vec<f64>,
    /// Also write the picture to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// Print only the schedule, in the format of `parallel.schedule.file`
    #[arg(long)]
    pub(crate) yaml: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum VocabularyName {
    /// Three barriers per microbatch
    Naive,
    /// All ranks compute it at the same time
    Interlaced,
    /// Two barriers per microbatch
    #[value(name = "vocab-1")]
    Vocab1,
    /// One barrier per microbatch
    #[value(name = "vocab-2")]
    Vocab2,
}

#[derive(Args)]
pub(crate) struct MeshArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Ranks of the run
    #[arg(
        short = 'n',
        long,
        default_value_t = 1,
        value_name = "N",
        value_parser = whole(1..=MAX_RANKS)
    )]
    pub(crate) ranks: usize,
}

#[derive(Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure a training step of a small Mixtral on random tokens
    Step(StepArgs),
    /// Compare placements of a large vocabulary in a two-stage pipeline
    Pipeline(PipelineArgs),
    /// Compare measured memory of many layouts with the estimates of `plan mesh`
    Memory(MemoryArgs),
    /// Measure costs and savings of recomputation for an experiment
    Recompute(RecomputeArgs),
    /// Compare least-loaded with standard dispatch under uneven load
    MoeLayer(MoeLayerArgs),
    /// Measure snapshots: stalls, copy speed and erasure coding
    Snapshot(SnapshotBenchArgs),
    /// Measure every collective with the training backend, compared with Gloo and MPI
    Collectives(CollectivesArgs),
    /// Compare two ranks with one thread each with one process of two threads
    Layouts(LayoutsArgs),
    /// Measure what grows with the ranks: start-up, metadata of a restart, plans
    Scale(ScaleArgs),
    /// Measure reading and writing the folder of a Hugging Face model
    Import(ImportArgs),
}

#[derive(Args)]
pub(crate) struct ImportArgs {
    /// Size of the folder that is made, in GiB of bf16
    #[arg(long, default_value_t = 8.0, value_name = "GIB", value_parser = megabytes)]
    pub(crate) gib: f64,
    /// Dtype of the weights in memory: bf16 as in the folder, or fp32 as in training
    #[arg(long, value_enum, default_value_t = WeightDtype::Bf16)]
    pub(crate) dtype: WeightDtype,
    /// Command that loads the folder that is appended to it, and prints `seconds` as JSON, such as
    /// "python3 scripts/peers/from_pretrained.py"
    #[arg(long, value_name = "COMMAND")]
    pub(crate) baseline: Option<String>,
    /// Read the part of this rank of `--folder`
    #[arg(long, hide = true, requires = "folder")]
    pub(crate) rank: Option<usize>,
    /// The folder that a rank reads
    #[arg(long, hide = true)]
    pub(crate) folder: Option<PathBuf>,
    /// Only write zeros to the memory of the weights
    #[arg(long, hide = true, requires = "folder")]
    pub(crate) fill: bool,
}

#[derive(Args)]
pub(crate) struct ScaleArgs {
    /// Numbers of ranks that join for real, as threads, ascending and comma separated
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "8,16,32,64,128",
        value_name = "N",
        value_parser = whole(2..=128)
    )]
    pub(crate) measured: Vec<usize>,
    /// Numbers of ranks of simulated runs, ascending and comma separated
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "128,4096,16384",
        value_name = "N",
        value_parser = whole(2..=MAX_RANKS)
    )]
    pub(crate) ranks: Vec<usize>,
    /// Threads that act for simulated ranks
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = whole(1..=4096))]
    pub(crate) threads: usize,
}

#[derive(Args)]
pub(crate) struct LayoutsArgs {
    /// data, expert or pipeline [default: all]
    #[arg(long, value_name = "CASE")]
    pub(crate) case: Option<String>,
    /// Alternating rounds; medians over all steps are reported
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = whole(1..=10000))]
    pub(crate) rounds: usize,
    /// Steps per round; the first two do not count, the last is traced
    #[arg(
        long,
        default_value_t = 10,
        value_name = "N",
        value_parser = value_parser!(u64).range(4..=100000)
    )]
    pub(crate) steps: u64,
    /// Command to measure in the same run; its last line is JSON with `tokens_per_s`
    #[arg(long, value_name = "COMMAND")]
    pub(crate) baseline: Option<String>,
}

#[derive(Args)]
pub(crate) struct CollectivesArgs {
    /// all_reduce, broadcast, all_gather, reduce_scatter, all_to_all or send_recv; repeatable
    /// [default: all]
    #[arg(long, value_name = "NAME")]
    pub(crate) operation: Vec<String>,
    /// Sizes of the tensor over all ranks, comma separated
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "64,1024,16384",
        value_name = "KIB", value_parser = whole(1..=16_777_216))]
    pub(crate) kib: Vec<usize>,
    /// Ranks with one thread each; ignored under mpirun
    #[arg(
        short = 'n',
        long,
        default_value_t = 2,
        value_name = "N",
        value_parser = whole(2..=MAX_LOCAL_RANKS)
    )]
    pub(crate) ranks: usize,
    /// Alternating rounds; medians are reported
    #[arg(long, default_value_t = 15, value_name = "N", value_parser = whole(1..=10000))]
    pub(crate) rounds: usize,
}

#[derive(Args)]
pub(crate) struct SnapshotBenchArgs {
    /// copy, load, encode-4+1, encode-4+2, encode-8+2, decode-4+2, stall, every-10 or every-1;
    /// repeatable [default: all]
    #[arg(long, value_name = "CASE")]
    pub(crate) case: Vec<String>,
    /// Size of the state of a rank
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = whole(1..=1_048_576))]
    pub(crate) mib: usize,
    /// Alternating rounds; medians are reported
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = whole(1..=10000))]
    pub(crate) rounds: usize,
    /// Threads of the rank, for cases that train
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = whole(1..=4096))]
    pub(crate) threads: usize,
    /// For stall: command to measure in the same run; its last line is JSON with `stall_ms`, and
    /// {mib} is replaced
    #[arg(long, value_name = "COMMAND")]
    pub(crate) baseline: Option<String>,
}

#[derive(Args)]
pub(crate) struct MoeLayerArgs {
    /// balanced, PERCENT:EXPERTS (of the tokens, to that many experts of rank 0), or one of the
    /// workloads w0 to w7; repeatable [default: all]
    #[arg(long, value_name = "CASE")]
    pub(crate) case: Vec<String>,
    /// Ranks with one thread each
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = whole(1..=MAX_LOCAL_RANKS))]
    pub(crate) ranks: usize,
    /// Tokens per rank
    #[arg(long, default_value_t = 4096, value_name = "N", value_parser = whole(1..=16_777_216))]
    pub(crate) tokens: usize,
    /// Hidden width
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = whole(1..=1_048_576))]
    pub(crate) hidden: usize,
    /// Inner width of an expert
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = whole(1..=1_048_576))]
    pub(crate) ffn: usize,
    /// Experts [default: 8, or the number of ranks, per hot expert]
    #[arg(long, value_name = "N", value_parser = whole(1..=65_536))]
    pub(crate) experts: Option<usize>,
    /// Alternating rounds; medians are reported
    #[arg(long, default_value_t = 7, value_name = "N", value_parser = whole(1..=10000))]
    pub(crate) rounds: usize,
    /// Smallest number of tokens for which an expert is lent [default: measured]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) min_tokens: Option<u32>,
    /// Measure a training step of a small model with a biased router (balanced and w0 to w7)
    #[arg(long)]
    pub(crate) step: bool,
}

#[derive(Args)]
pub(crate) struct MemoryArgs {
    /// One layout, by the name in its line [default: all]
    #[arg(long, value_name = "CASE")]
    pub(crate) case: Option<String>,
}

#[derive(Args)]
pub(crate) struct RecomputeArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Ranks to start on this machine
    #[arg(
        short = 'n',
        long,
        default_value_t = 1,
        value_name = "N",
        value_parser = whole(1..=MAX_LOCAL_RANKS)
    )]
    pub(crate) nproc_per_node: usize,
    /// Also find and measure the fastest variant in which the most loaded rank's tensors fit
    #[arg(long, value_name = "MIB", value_parser = megabytes)]
    pub(crate) fit_mib: Option<f64>,
    /// Threads per rank [default: OMP_NUM_THREADS, else its share of the cores]
    #[arg(long, value_name = "N", value_parser = whole(1..=4096))]
    pub(crate) threads: Option<usize>,
    /// Alternating rounds; medians over all steps are reported
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = whole(1..=10000))]
    pub(crate) rounds: usize,
    /// Steps per round; the first two do not count
    #[arg(
        long,
        default_value_t = 8,
        value_name = "N",
        value_parser = value_parser!(u64).range(4..=100000)
    )]
    pub(crate) steps: u64,
}

#[derive(Args)]
pub(crate) struct PipelineArgs {
    /// Alternating rounds
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = whole(1..=10000))]
    pub(crate) rounds: usize,
    /// Steps per round; the first does not count
    #[arg(
        long,
        default_value_t = 4,
        value_name = "N",
        value_parser = value_parser!(u64).range(2..=100000)
    )]
    pub(crate) steps: u64,
    /// Size of the vocabulary
    #[arg(long, default_value_t = 32768, value_name = "N", value_parser = whole(1..=16_777_216))]
    pub(crate) vocab: usize,
}

#[derive(Subcommand)]
pub(crate) enum DataCommand {
    /// Tokenize text, JSONL and Parquet into files that moerun and Megatron-LM read
    Prepare(PrepareArgs),
}

#[derive(Subcommand)]
pub(crate) enum ConfigCommand {
    /// Check a configuration and print it with all defaults
    Check(CheckArgs),
    /// Show what differs between a run and a configuration that would resume it
    Diff(DiffArgs),
    /// Print the JSON schema of configurations
    Schema,
}

#[derive(Clone, Args)]
pub(crate) struct ConfigArgs {
    /// YAML file of the experiment
    pub(crate) config: PathBuf,
    /// Override a configuration value, such as train.steps=100; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

#[derive(Clone, Args)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Ranks to start on this machine
    #[arg(
        short = 'n',
        long,
        default_value_t = 1,
        value_name = "N",
        alias = "nproc_per_node", value_parser = whole(1..=MAX_LOCAL_RANKS))]
    pub(crate) nproc_per_node: usize,
    /// Port of the rendezvous; 0 takes any free port
    #[arg(long, default_value_t = 0, value_name = "PORT", alias = "master_port")]
    pub(crate) master_port: u16,
    /// Machines of the run; start the same command on each with its --node-rank
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = whole(1..=MAX_RANKS))]
    pub(crate) nnodes: usize,
    /// Index of this machine, from 0
    #[arg(
        long,
        default_value_t = 0,
        value_name = "R",
        alias = "node_rank",
        requires = "rdzv", value_parser = whole(0..=MAX_RANKS))]
    pub(crate) node_rank: usize,
    /// Rendezvous: address of machine 0 and a free port there
    #[arg(
        long,
        value_name = "HOST:PORT",
        alias = "rdzv-endpoint",
        alias = "rdzv_endpoint"
    )]
    pub(crate) rdzv: Option<String>,
    /// Start all machines from here over ssh: lines `host` or `host slots=N`, this machine first
    #[arg(long, value_name = "FILE", conflicts_with_all = ["nnodes", "node_rank"])]
    pub(crate) hostfile: Option<PathBuf>,
    /// Program that runs a command on another machine, called as PROGRAM -- HOST COMMAND
    #[arg(
        long,
        default_value = "ssh",
        value_name = "PROGRAM",
        requires = "hostfile"
    )]
    pub(crate) ssh: PathBuf,
    /// Read the token of the run from a line of standard input: set by a launcher for its agents
    #[arg(long, hide = true)]
    pub(crate) token_stdin: bool,
    /// On a resume, accept changes of these keys although the saved weights then compute something
    /// else, comma separated. Tensors that do not fit are listed and start from initial values
    #[arg(long, value_delimiter = ',', value_name = "KEY")]
    pub(crate) accept_changes: Vec<String>,
    /// Spare nodes that replace lost ones: on this machine, or the last of several machines
    #[arg(long, default_value_t = 0, value_name = "NODES", value_parser = whole(0..=MAX_RANKS))]
    pub(crate) spare_nodes: usize,
}

#[derive(Args)]
pub(crate) struct DiffArgs {
    /// Folder of the run (`run.dir`)
    #[arg(value_name = "RUN")]
    pub(crate) run: PathBuf,
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
}

#[derive(Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Ranks of the run
    #[arg(
        short = 'n',
        long,
        default_value_t = 1,
        value_name = "N",
        value_parser = whole(1..=MAX_RANKS)
    )]
    pub(crate) nproc_per_node: usize,
}

/// A model to use: one of both
#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct TrainedModel {
    /// Folder of a run (uses its newest checkpoint) or of one checkpoint
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Folder of a Hugging Face model
    #[arg(long, value_name = "FOLDER")]
    model: Option<PathBuf>,
}

impl TrainedModel {
    /// Returns the path that was given.
    pub(crate) fn path(self) -> PathBuf {
        let given = self.checkpoint.or(self.model);
        given.expect("one of both is required")
    }
}

#[derive(Args)]
pub(crate) struct EvaluateArgs {
    #[command(flatten)]
    pub(crate) model: TrainedModel,
    /// JSON lines with the keys `context` and `continuation`
    #[arg(long, value_name = "FILE")]
    pub(crate) requests: PathBuf,
    /// Tokenizer to use instead of the model's
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
}

#[derive(Subcommand)]
pub(crate) enum ModelCommand {
    /// Describe the folder of a Hugging Face model, and check its tensors
    Inspect(ModelInspectArgs),
    /// Write a trained model as a folder that transformers and vLLM load
    Export(ModelExportArgs),
    /// Write the weights of a Hugging Face model as the checkpoint of a new run
    Import(ModelImportArgs),
    /// Make an MoE model of a dense one
    Upcycle(ModelUpcycleArgs),
}

#[derive(Args)]
pub(crate) struct ModelInspectArgs {
    /// Folder with config.json and safetensors files
    #[arg(value_name = "FOLDER")]
    pub(crate) folder: PathBuf,
}

#[derive(Args)]
pub(crate) struct ModelExportArgs {
    /// Folder of a run (uses its newest checkpoint) or of one checkpoint
    #[arg(long, value_name = "DIR")]
    pub(crate) checkpoint: PathBuf,
    /// Folder to write; it must not exist, or be empty
    #[arg(short, long, value_name = "FOLDER")]
    pub(crate) output: PathBuf,
    /// Dtype of the weights: fp32 or bf16; by default that of the folder the model came from, or
    /// that of training
    #[arg(long, value_name = "DTYPE")]
    pub(crate) dtype: Option<WeightDtype>,
    /// Folder the model came from, if it is not where model.from says
    #[arg(long, value_name = "FOLDER")]
    pub(crate) source: Option<PathBuf>,
    /// Largest size of a file in GB; by default the files are those of the folder the model came
    /// from, or have up to 5 GB
    #[arg(long, value_name = "GB", value_parser = megabytes)]
    pub(crate) max_shard_gb: Option<f64>,
}

#[derive(Args)]
pub(crate) struct ModelImportArgs {
    /// Folder with config.json and safetensors files
    #[arg(value_name = "FOLDER")]
    pub(crate) folder: PathBuf,
    /// Folder of the new run (its `run.dir`); it must not exist, or be empty
    #[arg(short, long, value_name = "RUN")]
    pub(crate) output: PathBuf,
}

#[derive(Args)]
pub(crate) struct ModelUpcycleArgs {
    /// Folder of a dense model
    #[arg(value_name = "DENSE")]
    pub(crate) dense: PathBuf,
    /// Folder to write; it must not exist, or be empty
    #[arg(short, long, value_name = "FOLDER")]
    pub(crate) output: PathBuf,
    /// Number of experts per layer
    #[arg(long, value_name = "E", value_parser = whole(1..=65_536))]
    pub(crate) experts: usize,
    /// Number of experts that a token uses
    #[arg(long, value_name = "K", value_parser = whole(1..=65_536))]
    pub(crate) top_k: usize,
    /// Parts into which virtual groups divide the dense network
    #[arg(long, default_value_t = 1, value_name = "G", value_parser = whole(1..=65_536))]
    pub(crate) granularity: usize,
    /// Way from the dense network to experts
    #[arg(long, default_value = "virtual-groups", value_name = "METHOD")]
    pub(crate) method: UpcycleKind,
    /// Share of an expert's inner width that `drop` draws anew
    #[arg(long, default_value_t = 0.5, value_name = "SHARE")]
    pub(crate) drop_share: f64,
    /// Seed of routers and of what `drop` draws
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub(crate) seed: u64,
    /// Dtype of the weights: fp32 or bf16; by default that of the folder
    #[arg(long, value_name = "DTYPE")]
    pub(crate) dtype: Option<WeightDtype>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum UpcycleKind {
    /// Each expert is the network
    Naive,
    /// Each expert is a part of the network, and whole copies are chosen
    VirtualGroups,
    /// Each expert is the network with a share drawn anew
    Drop,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum WeightDtype {
    Fp32,
    Bf16,
}

#[derive(Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: TrainedModel,
    /// Start of the text
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub(crate) prompt: String,
    /// Most tokens to generate
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = whole(0..=1_000_000_000))]
    pub(crate) max_tokens: usize,
    /// Sampling temperature; 0 always takes the most likely token
    #[arg(long, default_value_t = 0.8, value_name = "T", value_parser = temperature)]
    pub(crate) temperature: f64,
    /// Sample from this many most likely tokens; 0 samples from all
    #[arg(long, default_value_t = 50, value_name = "K", value_parser = whole(0..=2_147_483_648))]
    pub(crate) top_k: usize,
    /// Sampling seed
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub(crate) seed: i64,
    /// Tokenizer to use instead of the run's
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct PrepareArgs {
    /// Files and folders of text, .jsonl or .parquet
    #[arg(required = true, value_name = "PATH")]
    pub(crate) inputs: Vec<PathBuf>,
    /// Folder for train.bin/.idx, valid.bin/.idx, tokenizer.json and dataset.json
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Hugging Face tokenizer.json to use instead of training a byte-level BPE
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Vocabulary size of the trained tokenizer
    #[arg(long, default_value_t = 8192, value_name = "N", value_parser = whole(1..=2_147_483_648))]
    pub(crate) vocab_size: usize,
    /// Fraction of documents kept for validation
    #[arg(long, default_value_t = 0.02, value_name = "FRACTION", value_parser = fraction)]
    pub(crate) validation_fraction: f64,
    /// Extensions of the files to read from folders, comma separated
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "txt,md,jsonl,parquet",
        value_name = "EXT"
    )]
    pub(crate) extensions: Vec<String>,
    /// Field of JSONL objects or column of Parquet tables that holds the text
    #[arg(long, default_value = "text", value_name = "NAME")]
    pub(crate) text_key: String,
    /// Most text to use
    #[arg(long, value_name = "MB", value_parser = megabytes)]
    pub(crate) max_mb: Option<f64>,
}

#[derive(Args)]
pub(crate) struct StepArgs {
    /// One dtype [default: all]
    #[arg(long, value_name = "DTYPE")]
    pub(crate) case: Option<StepCase>,
    /// Model and batch: reference, long (one sequence of 2048 tokens, 16 experts top-4), wide
    /// (hidden 768, 2 layers); for GPUs olmoe (4 layers of OLMoE-1B-7B) and coarse (1 layer of
    /// Mixtral-8x7B)
    #[arg(long, default_value = "reference", value_name = "SHAPE")]
    pub(crate) shape: StepShape,
    /// Select experts round-robin instead of by score, so that the load is even
    #[arg(long)]
    pub(crate) force_balance: bool,
    /// Write the initial weights and the tokens to this file, and start from them
    #[arg(long, value_name = "FILE", conflicts_with = "baseline")]
    pub(crate) start: Option<PathBuf>,
    /// Also print the parts of a step with FLOPs, bytes and rates, and write three steps to this
    /// file as a Chrome trace
    #[arg(long, value_name = "FILE", conflicts_with = "baseline")]
    pub(crate) profile: Option<PathBuf>,
    /// Measured steps; their median is reported
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = whole(1..=100000))]
    pub(crate) steps: usize,
    /// Threads of the process
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = whole(1..=4096))]
    pub(crate) threads: usize,
    /// Device: cpu, cuda, npu or auto
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub(crate) device: String,
    /// Command to measure in the same run; it prints a JSON line with `tokens_per_s`
    ///
    /// {case}, {shape}, {steps}, {threads}, {device}, {force_balance} (that option, or nothing)
    /// and {start} (a file with the initial weights and the tokens) are replaced. Repeatable: the
    /// fastest is the baseline.
    #[arg(long, value_name = "COMMAND")]
    pub(crate) baseline: Vec<String>,
    /// Alternating rounds
    #[arg(
        long,
        default_value_t = 5,
        requires = "baseline",
        value_name = "N",
        value_parser = whole(1..=10000)
    )]
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
