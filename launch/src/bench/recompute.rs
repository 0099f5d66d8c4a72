//! `moerun bench recompute`: costs and savings of recomputation and offload for an experiment.
//!
//! Also finds the fastest option that fits into a memory limit.

use super::{
    figures::{largest_of_ranks, median, round},
    runner::{train, with_temp_dir, write_tokens},
};
use crate::{
    cli::RecomputeArgs,
    config_file::{load, refuse_problems},
    hint::hinted,
};
use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};
use std::{path::Path, process::ExitCode};
use trainer::config::Config;

const PARTS: [&str; 4] = ["norm", "attention", "dispatch", "experts"];

/// Parts to recompute in every layer, and a number of layers to recompute entirely.
#[derive(Debug, Clone, PartialEq)]
struct RecomputeOption {
    /// Recomputed parts, as indices into `PARTS`.
    parts: Vec<usize>,
    layers: usize,
    /// True if the optimizer's state is in host memory.
    offload: bool,
}

/// Time of a step, and peak tensor memory of the most loaded rank.
#[derive(Debug, Clone, Copy)]
struct Cost {
    step_ms: f64,
    mib: f64,
}

/// Measured costs of a model.
struct RecomputeTimes {
    none: Cost,
    /// Costs with one part recomputed in all layers, for each of `PARTS`.
    parts: Vec<Cost>,
    /// Cost with all layers recomputed.
    all: Cost,
    /// Cost with the optimizer's state in host memory, if the device has memory of its own.
    offload: Option<Cost>,
    layers: usize,
}

impl RecomputeOption {
    /// Returns every option for a model of `layers` layers.
    fn all(layers: usize, can_offload: bool) -> impl Iterator<Item = RecomputeOption> {
        let subsets = (0..1usize << PARTS.len()).map(|bits| {
            (0..PARTS.len())
                .filter(|part| bits >> part & 1 == 1)
                .collect::<Vec<usize>>()
        });
        let some =
            subsets.flat_map(move |parts| (0..layers).map(move |layers| (parts.clone(), layers)));
        let recomputed = some.chain([(Vec::new(), layers)]);
        recomputed.flat_map(move |(parts, layers)| {
            let options = [false, true].map(|offload| RecomputeOption {
                parts: parts.clone(),
                layers,
                offload,
            });
            options
                .into_iter()
                .filter(move |option| can_offload || !option.offload)
        })
    }

    /// Returns the values of `parallel.recompute` and `optimizer.offload`.
    ///
    /// Layers are recomputed in this order.
    fn setting(&self, order: &[usize]) -> Value {
        let parts: Vec<&str> = self.parts.iter().map(|&part| PARTS[part]).collect();
        let layers = match self.layers {
            0 => json!("none"),
            all if all == order.len() => json!("all"),
            some => {
                let mut chosen = order[..some].to_vec();
                chosen.sort_unstable();
                json!(chosen)
            }
        };
        json!({"recompute": {"layers": layers, "parts": parts}, "offload": self.offload})
    }
}

impl RecomputeTimes {
    /// Predicts the cost of an option: savings and costs add up, in equal shares over layers.
    fn expected(&self, option: &RecomputeOption) -> Cost {
        let whole = option.layers as f64 / self.layers as f64;
        let offload = self
            .offload
            .filter(|_| option.offload)
            .map(|cost| (1.0, cost));
        let parts = option
            .parts
            .iter()
            .map(|&part| (1.0 - whole, self.parts[part]));
        let shares = parts.chain([(whole, self.all)]).chain(offload);
        // A part that seems to make a step faster is noise.
        shares.fold(self.none, |sum, (share, cost)| Cost {
            step_ms: sum.step_ms + share * (cost.step_ms - self.none.step_ms).max(0.0),
            mib: sum.mib - share * (self.none.mib - cost.mib),
        })
    }

    /// Returns the fastest option that is predicted to fit into `mib`, except those in `without`.
    ///
    /// Of equally fast options it is the one that recomputes least.
    fn fastest(&self, mib: f64, without: &[RecomputeOption]) -> Option<(RecomputeOption, Cost)> {
        let options = RecomputeOption::all(self.layers, self.offload.is_some())
            .map(|option| (self.expected(&option), option));
        let fitting = options.filter(|(cost, option)| cost.mib <= mib && !without.contains(option));
        let amount = |option: &RecomputeOption| (option.layers, option.parts.len(), option.offload);
        let fastest = fitting.min_by(|(a, one), (b, other)| {
            a.step_ms
                .total_cmp(&b.step_ms)
                .then_with(|| amount(one).cmp(&amount(other)))
        });
        fastest.map(|(cost, option)| (option, cost))
    }
}

/// Returns all layers in the order in which they are recomputed, from the number of each stage.
///
/// Stages wait for each other, so they get about equal numbers of the first layers.
fn round_robin_layers(stages: &[usize]) -> Vec<usize> {
    let mut layers: Vec<(usize, usize)> = Vec::new();
    for &stage in stages {
        let start = layers.len();
        layers.extend((0..stage).map(|within| (within, start + within)));
    }
    layers.sort_unstable();
    layers.into_iter().map(|(_, layer)| layer).collect()
}

pub(crate) fn run(args: &RecomputeArgs) -> Result<ExitCode> {
    with_temp_dir(|folder| measure(args, folder))
}

fn measure(args: &RecomputeArgs, folder: &Path) -> Result<ExitCode> {
    let experiment = experiment(args, folder)?;
    let config: Config = serde_json::from_value(experiment.clone())
        .context("the configuration as it is measured is invalid")?;
    refuse_problems(&args.config, &config, args.nproc_per_node)?;
    write_tokens(folder, config.model.vocab_size)?;
    let mesh = config
        .mesh(0, args.nproc_per_node)
        .map_err(|error| anyhow!(error))?;
    let plan = config
        .pipeline_plan(config.microbatches(&mesh, config.largest_batch()))
        .map_err(|error| anyhow!(error))?;
    let order = round_robin_layers(&plan.layers);

    let can_offload = parallel::device_kind(&config.run.device) != "cpu";
    let option = |parts: &[usize], layers, offload| RecomputeOption {
        parts: parts.to_vec(),
        layers,
        offload,
    };
    let mut options = vec![("none", option(&[], 0, false))];
    options.extend(
        PARTS
            .iter()
            .enumerate()
            .map(|(part, name)| (*name, option(&[part], 0, false))),
    );
    options.push(("all layers", option(&[], order.len(), false)));
    if can_offload {
        options.push(("offload", option(&[], 0, true)));
    }
    let settings: Vec<Value> = options
        .iter()
        .map(|(_, option)| option.setting(&order))
        .collect();
    let costs = measure_alternating(args, folder, &experiment, &settings)?;
    let measured = RecomputeTimes {
        none: costs[0],
        parts: costs[1..=PARTS.len()].to_vec(),
        all: costs[PARTS.len() + 1],
        offload: costs.get(PARTS.len() + 2).copied(),
        layers: order.len(),
    };
    for (((name, _), setting), cost) in options.iter().zip(&settings).zip(&costs) {
        println!("{}", line(args, name, setting, *cost, measured.none));
    }
    let Some(fit) = args.fit_mib else {
        return Ok(ExitCode::SUCCESS);
    };

    // Peaks do not quite add up: the chosen option must be measured to fit.
    let mut without = Vec::new();
    while let Some((option, expected)) = measured.fastest(fit, &without) {
        let setting = option.setting(&order);
        eprintln!("trying {setting}");
        // Measured together with the baseline: the machine's speed changes from minute to minute.
        let costs = measure_alternating(
            args,
            folder,
            &experiment,
            &[settings[0].clone(), setting.clone()],
        )?;
        let none = costs[0];
        let cost = costs[1];
        if cost.mib <= fit {
            let mut line = line(args, "fit", &setting, cost, none);
            line["fit_mib"] = json!(fit);
            line["expected_step_ms"] = json!(round(expected.step_ms, 1));
            line["expected_mib"] = json!(round(expected.mib, 1));
            println!("{line}");
            return Ok(ExitCode::SUCCESS);
        }
        without.push(option);
    }
    let most = if can_offload {
        " and the optimizer's state in host memory"
    } else {
        ""
    };
    let everything = option(&[], order.len(), can_offload);
    let least_mib = measured.expected(&everything).mib;
    Err(hinted(
        anyhow!(
            "--fit-mib {fit}: with all layers recomputed{most}, the tensors of the most loaded \
             rank still take {least_mib:.1} MiB"
        ),
        "split more (parallel.expert, tensor, pipeline, zero), or make train.micro_batch or \
         data.sequence_length smaller",
    ))
}

fn line(args: &RecomputeArgs, case: &str, setting: &Value, cost: Cost, none: Cost) -> Value {
    let saved = none.mib - cost.mib;
    let lost_ms = cost.step_ms - none.step_ms;
    json!({
        "bench": "recompute",
        "case": case,
        "recompute": setting["recompute"],
        "offload": setting["offload"],
        "ranks": args.nproc_per_node,
        "step_ms": round(cost.step_ms, 1),
        "vs_none": round(cost.step_ms / none.step_ms, 3),
        "measured_mib": round(cost.mib, 1),
        "saved_mib": round(saved.max(0.0), 1),
        "ms_per_saved_mib": (saved >= 0.1).then(|| round(lost_ms / saved, 3)),
        "rounds": args.rounds,
        "steps": args.steps,
    })
}

/// Returns the cost of steps with each of `settings`, measured in alternating rounds.
fn measure_alternating(
    args: &RecomputeArgs,
    folder: &Path,
    experiment: &Value,
    settings: &[Value],
) -> Result<Vec<Cost>> {
    let mut experiment = experiment.clone();
    let mut measured = vec![Measured::default(); settings.len()];
    for round in 1..=args.rounds {
        eprintln!("round {round} of {}", args.rounds);
        for (setting, measured) in settings.iter().zip(&mut measured) {
            experiment["parallel"]["recompute"] = setting["recompute"].clone();
            experiment["optimizer"]["offload"] = setting["offload"].clone();
            let steps = train(folder, &experiment, args.nproc_per_node, args.threads)?;
            measured.add(&steps);
        }
    }
    Ok(measured.into_iter().map(Measured::cost).collect())
}

#[derive(Clone, Default)]
struct Measured {
    step_ms: Vec<f64>,
    peak_bytes: f64,
}

impl Measured {
    fn add(&mut self, steps: &[Value]) {
        // The first steps also allocate the memory that later ones reuse.
        let times = steps[2..]
            .iter()
            .filter_map(|step| step["step_ms"].as_f64());
        self.step_ms.extend(times);
        let peaks = steps
            .iter()
            .map(|step| largest_of_ranks(step, "peak_memory"));
        self.peak_bytes = peaks.fold(self.peak_bytes, f64::max);
    }

    fn cost(self) -> Cost {
        Cost {
            step_ms: median(self.step_ms),
            mib: self.peak_bytes / f64::from(1 << 20),
        }
    }
}

/// Returns the experiment on random tokens, without validation, checkpoints and snapshots.
fn experiment(args: &RecomputeArgs, folder: &Path) -> Result<Value> {
    let mut value = serde_json::to_value(load(&args.config)?)?;
    value["run"]["dir"] = json!(folder.join("run"));
    value["run"]["trace_step"] = Value::Null;
    value["data"]["train"] = json!([{"path": folder.join("tokens")}]);
    value["data"]["validation"] = json!([]);
    value["data"]["tokenizer"] = Value::Null;
    value["train"]["steps"] = json!(args.steps);
    value["schedule"] = json!({"constant": {"lr": 1e-4}});
    value["checkpoint"]["every"] = json!(0);
    value["snapshot"]["every"] = json!(0);
    value["restart"]["max_restarts"] = json!(0);
    value["validation"] = Value::Null;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cost() -> impl Strategy<Value = Cost> {
        (1.0..100.0f64, 1.0..100.0f64).prop_map(|(step_ms, mib)| Cost { step_ms, mib })
    }

    proptest! {
        #[test]
        fn the_chosen_option_fits_and_no_fitting_one_is_faster(
            none in cost(),
            parts in prop::collection::vec(cost(), PARTS.len()),
            all in cost(),
            offload in prop::option::of(cost()),
            layers in 1..9usize,
            mib in 0.0..120.0f64,
        ) {
            let measured = RecomputeTimes { none, parts, all, offload, layers };
            let fitting: Vec<f64> = RecomputeOption::all(layers, offload.is_some())
                .map(|option| measured.expected(&option))
                .filter(|cost| cost.mib <= mib)
                .map(|cost| cost.step_ms)
                .collect();
            match measured.fastest(mib, &[]) {
                Some((option, cost)) => {
                    prop_assert!(cost.mib <= mib);
                    prop_assert!(fitting.iter().all(|&ms| ms >= cost.step_ms));
                    // Without it, the next one is returned.
                    let next = measured.fastest(mib, std::slice::from_ref(&option));
                    prop_assert_eq!(next.is_some(), fitting.len() > 1);
                    if let Some((other, slower)) = next {
                        prop_assert!(other != option && slower.step_ms >= cost.step_ms);
                    }
                }
                None => prop_assert!(fitting.is_empty()),
            }
        }

        #[test]
        fn measured_options_are_predicted_as_measured(
            none in cost(),
            parts in prop::collection::vec(cost(), PARTS.len()),
            all in cost(),
            offload in cost(),
            layers in 1..9usize,
        ) {
            let measured = RecomputeTimes { none, parts, all, offload: Some(offload), layers };
            let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
            let expected = |parts, layers, offload| {
                measured.expected(&RecomputeOption { parts, layers, offload })
            };
            prop_assert!(near(expected(vec![], 0, false).mib, none.mib));
            prop_assert!(near(expected(vec![], layers, false).mib, all.mib));
            let offloaded = expected(vec![], layers, true);
            prop_assert!(near(offloaded.mib, all.mib + offload.mib - none.mib));
            for (part, cost) in measured.parts.iter().enumerate() {
                let one = expected(vec![part], 0, false);
                prop_assert!(near(one.mib, cost.mib));
                prop_assert!(near(one.step_ms, cost.step_ms.max(none.step_ms)));
            }
        }

        #[test]
        fn stages_alternate_and_every_layer_comes_once(
            stages in prop::collection::vec(1..6usize, 1..5),
            some in 0..20usize,
        ) {
            let order = round_robin_layers(&stages);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            prop_assert!(sorted.into_iter().eq(0..stages.iter().sum::<usize>()));
            // Stages with enough layers have equal numbers of the first layers, give or take one.
            let first = &order[..some.min(order.len())];
            let mut end = 0;
            let counts = stages.iter().map(|&layers| {
                let stage = end..end + layers;
                end = stage.end;
                first.iter().filter(|layer| stage.contains(layer)).count()
            });
            let counts: Vec<usize> = counts.collect();
            let most = counts.iter().copied().max().unwrap_or(0);
            let mut all = counts.iter().zip(&stages);
            prop_assert!(all.all(|(&count, &layers)| count + 1 >= most.min(layers)));
        }
    }
}
