//! `moerun plan`: what would happen, as text and pictures, without starting a rank.

use crate::cli::{MeshArgs, ScheduleArgs, VocabularyName};
use crate::config_file::{load, refuse_problems};
use anyhow::{Context, Result, anyhow, bail};
use parallel::pipeline::check::check;
use parallel::pipeline::communication::with_communication;
use parallel::pipeline::refine::refined;
use parallel::pipeline::schedules::ScheduleKind;
use parallel::pipeline::simulate::{Costs, VocabularyCosts, simulate};
use parallel::pipeline::vocabulary::with_vocabulary;
use parallel::pipeline::{Order, OrderFile, Vocabulary, draw};
use std::process::ExitCode;
use trainer::RankMemory;

/// `moerun plan schedule`.
pub(crate) fn schedule(args: &ScheduleArgs) -> Result<ExitCode> {
    let (order, known) = order(args)?;
    let (forward, backward_input, backward_weight, output) = match args.times[..] {
        // A large vocabulary's output layer takes about as long as a stage.
        [f, b, w] => (f, b, w, if args.vocabulary.is_some() { f } else { 0.0 }),
        [f, b, w, output] => (f, b, w, output),
        _ => bail!("--times {:?}: give F,B,W or F,B,W,O", args.times),
    };
    if args
        .times
        .iter()
        .any(|&time| !time.is_finite() || time < 0.0)
        || forward + backward_input <= 0.0
    {
        bail!(
            "--times {:?}: times are not negative, and F or B takes some",
            args.times
        );
    }
    // Times are of a rank's layers: stages of a rank share them.
    let ranks = order.ranks.len();
    let chunks = order.chunks as f64;
    let mut costs = Costs::uniform(
        order.stages(),
        forward / chunks,
        backward_input / chunks,
        backward_weight / chunks,
    );
    let share = output / ranks as f64;
    let order = match args.vocabulary {
        Some(algorithm) => {
            let algorithm = match algorithm {
                VocabularyName::Naive => Vocabulary::Naive,
                VocabularyName::Interlaced => Vocabulary::Interlaced,
                VocabularyName::Vocab1 => Vocabulary::Vocab1,
                VocabularyName::Vocab2 => Vocabulary::Vocab2,
            };
            costs.vocabulary = vec![VocabularyCosts::from_logits(algorithm, share); ranks];
            with_vocabulary(&order, algorithm, &costs)
        }
        None => {
            // The output layer is part of the last stage.
            for times in [
                &mut costs.forward,
                &mut costs.backward_input,
                &mut costs.backward_weight,
            ] {
                if let Some(time) = times.last_mut() {
                    *time += output;
                }
            }
            order
        }
    };
    let order = if known {
        refined(&order, &costs)
    } else {
        order
    };
    if args.yaml {
        print!(
            "{}",
            serde_saphyr::to_string(&OrderFile::from(&order))
                .context("cannot write the schedule")?
        );
        return Ok(ExitCode::SUCCESS);
    }
    let schedule = with_communication(order);
    check(&schedule).map_err(|error| anyhow!("{}: {error}", args.schedule))?;
    let timeline = simulate(&schedule, &costs);
    print!("{}", draw::text(&timeline));
    let busiest = (0..ranks)
        .map(|rank| timeline.busy(rank))
        .fold(0.0, f64::max);
    println!();
    println!(
        "{} on {ranks} ranks, {} microbatches: step {:.2}, of which the busiest rank computes {busiest:.2} ({:.0} %); \
         bubble {:.2}",
        args.schedule,
        schedule.order.microbatches,
        timeline.total,
        100.0 * busiest / timeline.total,
        timeline.bubble()
    );
    println!("rank   computes   microbatches held (until W, until B)");
    for rank in 0..ranks {
        let held = timeline.peak_microbatches[rank];
        let until_b = timeline.peak_microbatches_until_b[rank];
        println!(
            "{rank:>4}   {:>8.2}   {held:>6.2} {until_b:>6.2}",
            timeline.busy(rank)
        );
    }
    if let Some(path) = &args.svg {
        let title = format!(
            "{}, {ranks} ranks, {} microbatches",
            args.schedule, schedule.order.microbatches
        );
        std::fs::write(path, draw::svg(&timeline, &title))
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("drawn in {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// A known schedule, or the one in a file; and whether it is a known one.
fn order(args: &ScheduleArgs) -> Result<(Order, bool)> {
    let kind: Result<ScheduleKind, _> = serde_json::from_value(args.schedule.clone().into());
    if let Ok(kind) = kind {
        let order = kind
            .order(args.ranks, args.microbatches, args.chunks)
            .map_err(|error| anyhow!(error))?;
        return Ok((order, true));
    }
    let text = std::fs::read_to_string(&args.schedule).with_context(|| {
        format!(
            "{} is neither a schedule (gpipe, 1f1b, interleaved, zb-h1, zb-v, v-half, v-min, dualpipe-v) nor a file that \
             can be read",
            args.schedule
        )
    })?;
    let file: OrderFile =
        serde_saphyr::from_str(&text).map_err(|error| anyhow!("{}: {error}", args.schedule))?;
    let order = file
        .parse()
        .map_err(|error| anyhow!("{}: {error}", args.schedule))?;
    Ok((order, false))
}

/// `moerun plan mesh`.
pub(crate) fn mesh(args: &MeshArgs) -> Result<ExitCode> {
    let config = load(&args.config)?;
    refuse_problems(&args.config, &config, args.ranks)?;
    let mesh = config.mesh(0, args.ranks).map_err(|error| anyhow!(error))?;
    let memory = config.memory(args.ranks).map_err(|error| anyhow!(error))?;
    println!("{mesh}");
    println!();
    println!(
        "rank  data ctx tensor pipe expert slice  {:<16} parameters   MiB: weights gradients optimizer activations (held) \
         moment    total",
        "layers"
    );
    for rank in &memory {
        let RankMemory { coordinates: at, .. } = rank;
        let layers: Vec<String> = rank
            .stages
            .iter()
            .map(|stage| {
                let first = if stage.first { "in+" } else { "" };
                let last = if stage.last { "+out" } else { "" };
                format!("{first}{}..{}{last}", stage.layers.start, stage.layers.end)
            })
            .collect();
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        println!(
            "{:>4}  {:>4} {:>3} {:>6} {:>4} {:>6} {:>5}  {:<16} {:>10}   {:>12.1} {:>9.1} {:>9.1} {:>11.1} {:>6} {:>6.1} {:>8.1}",
            rank.rank,
            at.data,
            at.context,
            at.tensor,
            at.pipeline,
            at.expert,
            at.expert_tensor,
            layers.join(" "),
            rank.parameters,
            mib(rank.weights),
            mib(rank.gradients),
            mib(rank.optimizer),
            mib(rank.activations),
            format!("({:.1})", rank.microbatches_in_flight),
            mib(rank.transient),
            mib(rank.total()),
        );
    }
    println!();
    if let Some(host) = memory
        .iter()
        .map(|rank| rank.host)
        .max()
        .filter(|&host| host > 0)
    {
        println!(
            "With optimizer.offload each rank's moments and fp32 weights are in the host's memory: at most {:.1} MiB of a rank.",
            host as f64 / f64::from(1 << 20)
        );
    }
    if config.takes_snapshots() {
        let (redundancy, _) = config
            .protection(config.nodes(args.ranks).len())
            .map_err(|error| anyhow!(error))?;
        println!(
            "Besides, each node's keeper holds three snapshots of its ranks' share of the state (fp32 weights and moments, what \
             replicas share counted once), and parity of two: {redundancy}."
        );
    }
    println!(
        "Tensors alone, with experts evenly loaded. On a CPU the process takes some 150 MiB besides, and malloc leaves gaps."
    );
    Ok(ExitCode::SUCCESS)
}
