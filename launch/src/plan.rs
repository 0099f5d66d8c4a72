//! `moerun plan schedule` and `moerun plan mesh`: a run's schedule and memory before it starts.

use crate::{
    cli::{MeshArgs, ScheduleArgs, VocabularyName},
    config_file::{load, refuse_problems},
    hint::WithHint,
    rank_ranges::RankRanges,
};
use anyhow::{Context, Result, anyhow, bail};
use parallel::{
    Coordinates, Mesh,
    pipeline::{
        Order, OrderFile, Schedule, Vocabulary,
        check::check,
        communication::with_communication,
        draw,
        refine::refined,
        schedules::ScheduleKind,
        simulate::{Costs, Timeline, VocabularyCosts, simulate},
        vocabulary::with_vocabulary,
    },
};
use std::{collections::BTreeSet, process::ExitCode};
use trainer::{EqualRanks, RankMemory, config::Config};

pub(crate) fn schedule(args: &ScheduleArgs) -> Result<ExitCode> {
    let times = Times::parse(args)?;
    let GivenOrder { order, is_named } = given_order(args)?;
    let mut costs = costs(&order, &times);
    let mut order = with_output_layer(args, order, &mut costs, times.output);
    if is_named {
        order = refined(&order, &costs);
    }
    if args.yaml {
        let yaml = serde_saphyr::to_string(&OrderFile::from(&order))
            .context("cannot write the schedule")?;
        print!("{yaml}");
        return Ok(ExitCode::SUCCESS);
    }
    let schedule = with_communication(order);
    check(&schedule).map_err(|error| anyhow!("{}: {error}", args.schedule))?;
    let timeline = simulate(&schedule, &costs);
    print_timeline(args, &schedule, &timeline);
    if let Some(path) = &args.svg {
        let ranks = schedule.order.ranks.len();
        let microbatches = schedule.order.microbatches;
        let title = format!(
            "{}, {ranks} ranks, {microbatches} microbatches",
            args.schedule
        );
        std::fs::write(path, draw::svg(&timeline, &title))
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("drawn in {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Times of the passes of a rank's layers, and of the output layer's forward.
struct Times {
    forward: f64,
    backward_input: f64,
    backward_weight: f64,
    output: f64,
}

impl Times {
    fn parse(args: &ScheduleArgs) -> Result<Times> {
        let times = match args.times[..] {
            [forward, backward_input, backward_weight] => Times {
                forward,
                backward_input,
                backward_weight,
                // A large vocabulary's output layer takes about as long as a stage.
                output: args.vocabulary.map_or(0.0, |_| forward),
            },
            [forward, backward_input, backward_weight, output] => Times {
                forward,
                backward_input,
                backward_weight,
                output,
            },
            _ => bail!("--times {:?}: give F,B,W or F,B,W,O", args.times),
        };
        let is_time = |&time: &f64| time.is_finite() && time >= 0.0;
        if !args.times.iter().all(is_time) || times.forward + times.backward_input <= 0.0 {
            bail!(
                "--times {:?}: times must not be negative, and F or B must be positive",
                args.times
            );
        }
        Ok(times)
    }
}

/// Returns the costs of stages: those of a rank share its time.
fn costs(order: &Order, times: &Times) -> Costs {
    let chunks = order.chunks as f64;
    Costs::uniform(
        order.stages(),
        times.forward / chunks,
        times.backward_input / chunks,
        times.backward_weight / chunks,
    )
}

/// Adds the passes of vocabulary parallelism, or else the output layer to the last stage.
fn with_output_layer(args: &ScheduleArgs, order: Order, costs: &mut Costs, output: f64) -> Order {
    let Some(name) = args.vocabulary else {
        let last_stage = [
            costs.forward.last_mut(),
            costs.backward_input.last_mut(),
            costs.backward_weight.last_mut(),
        ];
        for time in last_stage.into_iter().flatten() {
            *time += output;
        }
        return order;
    };
    let algorithm = match name {
        VocabularyName::Naive => Vocabulary::Naive,
        VocabularyName::Interlaced => Vocabulary::Interlaced,
        VocabularyName::Vocab1 => Vocabulary::Vocab1,
        VocabularyName::Vocab2 => Vocabulary::Vocab2,
    };
    let ranks = order.ranks.len();
    let share = output / ranks as f64;
    costs.vocabulary = vec![VocabularyCosts::from_logits(algorithm, share); ranks];
    with_vocabulary(&order, algorithm, costs)
}

fn print_timeline(args: &ScheduleArgs, schedule: &Schedule, timeline: &Timeline) {
    print!("{}", draw::text(timeline));
    let ranks = schedule.order.ranks.len();
    let busy = (0..ranks).map(|rank| timeline.busy(rank));
    let busiest = busy.fold(0.0, f64::max);
    println!();
    println!(
        "{} on {ranks} ranks, {} microbatches: step {:.2}, of which the busiest rank computes \
         {busiest:.2} ({:.0} %); bubble {:.2}",
        args.schedule,
        schedule.order.microbatches,
        timeline.total,
        100.0 * busiest / timeline.total,
        timeline.bubble()
    );
    println!("rank   computes   microbatches held (until W, until B)");
    for rank in 0..ranks {
        let busy = timeline.busy(rank);
        let until_w = timeline.peak_microbatches[rank];
        let until_b = timeline.peak_microbatches_until_b[rank];
        println!("{rank:>4}   {busy:>8.2}   {until_w:>6.2} {until_b:>6.2}");
    }
}

struct GivenOrder {
    order: Order,
    /// True if it is a named schedule, not one from a file. A user's own order is not refined.
    is_named: bool,
}

fn given_order(args: &ScheduleArgs) -> Result<GivenOrder> {
    let kind: Result<ScheduleKind, _> = serde_json::from_value(args.schedule.clone().into());
    if let Ok(kind) = kind {
        let order = kind.order(args.ranks, args.microbatches, args.chunks);
        return Ok(GivenOrder {
            order: order.map_err(|error| anyhow!(error))?,
            is_named: true,
        });
    }
    let text = std::fs::read_to_string(&args.schedule)
        .with_context(|| format!("{}: neither a schedule nor a readable file", args.schedule))
        .hint(
            "schedules are gpipe, 1f1b, interleaved, zb-h1, zb-v, v-half, v-min and dualpipe-v",
        )?;
    let file: OrderFile =
        serde_saphyr::from_str(&text).map_err(|error| anyhow!("{}: {error}", args.schedule))?;
    let order = file.parse();
    Ok(GivenOrder {
        order: order.map_err(|error| anyhow!("{}: {error}", args.schedule))?,
        is_named: false,
    })
}

pub(crate) fn mesh(args: &MeshArgs) -> Result<ExitCode> {
    let config = load(&args.config)?;
    refuse_problems(&args.config, &config, args.ranks)?;
    let mesh = config.mesh(0, args.ranks).map_err(|error| anyhow!(error))?;
    let memory = config.memory(args.ranks).map_err(|error| anyhow!(error))?;
    println!("{mesh}");
    println!();
    print_table(&mesh, &memory);
    println!();
    print_remarks(&config, args.ranks, &memory)?;
    Ok(ExitCode::SUCCESS)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Prints a line for all ranks of a pipeline stage that hold equally much.
fn print_table(mesh: &Mesh, memory: &[EqualRanks]) {
    let ranks: Vec<String> = memory
        .iter()
        .map(|equal| RankRanges::new(&equal.ranks).to_string())
        .collect();
    let axes: Vec<[String; 6]> = memory
        .iter()
        .map(|equal| axes(mesh, &equal.ranks))
        .collect();
    let layers: Vec<String> = memory.iter().map(|equal| layers(&equal.memory)).collect();
    let widest = |texts: &[String], name: &str| {
        let widths = texts.iter().map(String::len);
        widths.max().unwrap_or(0).max(name.len())
    };
    let rank_width = widest(&ranks, "rank");
    let layer_width = widest(&layers, "layers");
    let axis_names = ["data", "ctx", "tensor", "pipe", "expert", "etp"];
    let axis_widths: Vec<usize> = axis_names
        .iter()
        .enumerate()
        .map(|(axis, name)| {
            let texts: Vec<String> = axes.iter().map(|texts| texts[axis].clone()).collect();
            widest(&texts, name)
        })
        .collect();
    let padded = |texts: &[&str]| {
        let columns = texts.iter().zip(&axis_widths);
        let columns = columns.map(|(text, &width)| format!("{text:>width$}"));
        columns.collect::<Vec<_>>().join(" ")
    };
    println!(
        "{:>rank_width$}  ranks  {}  {:<layer_width$} parameters   MiB: weights gradients \
         optimizer activations (held)   temp    total",
        "rank",
        padded(&axis_names),
        "layers"
    );
    for (index, equal) in memory.iter().enumerate() {
        let axes = axes[index].each_ref().map(String::as_str);
        println!(
            "{:>rank_width$}  {:>5}  {}  {:<layer_width$} {}",
            ranks[index],
            equal.ranks.len(),
            padded(&axes),
            layers[index],
            figures(&equal.memory)
        );
    }
}

/// Returns the coordinates of `ranks` on each axis, as ranges.
fn axes(mesh: &Mesh, ranks: &[usize]) -> [String; 6] {
    let coordinates = |axis: fn(&Coordinates) -> usize| {
        let places = ranks.iter().map(|&rank| axis(&mesh.coordinates_of(rank)));
        let places: BTreeSet<usize> = places.collect();
        RankRanges::new(&places.into_iter().collect::<Vec<_>>()).to_string()
    };
    [
        coordinates(|at| at.data),
        coordinates(|at| at.context),
        coordinates(|at| at.tensor),
        coordinates(|at| at.pipeline),
        coordinates(|at| at.expert),
        coordinates(|at| at.expert_tensor),
    ]
}

fn layers(rank: &RankMemory) -> String {
    let stages = rank.stages.iter().map(|stage| {
        let first = if stage.first { "in+" } else { "" };
        let last = if stage.last { "+out" } else { "" };
        format!("{first}{}..{}{last}", stage.layers.start, stage.layers.end)
    });
    stages.collect::<Vec<_>>().join(" ")
}

fn figures(rank: &RankMemory) -> String {
    format!(
        "{:>10}   {:>12.1} {:>9.1} {:>9.1} {:>11.1} {:>6} {:>6.1} {:>8.1}",
        rank.parameters,
        mib(rank.weights),
        mib(rank.gradients),
        mib(rank.optimizer),
        mib(rank.activations),
        format!("({:.1})", rank.microbatches_in_flight),
        mib(rank.transient),
        mib(rank.total()),
    )
}

/// Prints the memory that the table leaves out.
fn print_remarks(config: &Config, ranks: usize, memory: &[EqualRanks]) -> Result<()> {
    let host = memory.iter().map(|equal| equal.memory.host).max();
    let host = host.unwrap_or(0);
    if host > 0 {
        println!(
            "With optimizer.offload, optimizer state and fp32 weights are in host memory: at most \
             {:.1} MiB per rank.",
            mib(host)
        );
    }
    if config.takes_snapshots() {
        let (redundancy, _) = config
            .protection(config.nodes(ranks).len())
            .map_err(|error| anyhow!(error))?;
        println!(
            "Each node's keeper also holds three snapshots of its ranks' part of the state (fp32 \
             weights and optimizer state, without what replicas repeat), and the parity of two: \
             {redundancy}."
        );
    }
    println!(
        "Ranks are numbered along tensor first, then context, data and pipeline; those of a stage \
         also along expert_tensor, then expert."
    );
    println!(
        "Tensors only, with evenly loaded experts. On a CPU a process takes about 150 MiB more, \
         and malloc leaves gaps."
    );
    Ok(())
}
