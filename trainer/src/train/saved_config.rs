//! The state and the configuration in a checkpoint, checked against its tensors.

use super::{
    accounting::saved_shapes,
    model_shapes::{count_problem, shape_problems},
    run_state::RunState,
};
use crate::{
    Error,
    config::{Config, rename_old_keys},
};
use checkpoint::Checkpoint;
use std::path::{Path, PathBuf};

/// Kinds of saved tensors, besides those of the optimizer's state. The name of a saved tensor is
/// `KIND/GLOBAL NAME`.
pub(super) mod kind {
    pub(in crate::train) const MASTER: &str = "model";
    pub(in crate::train) const BIAS: &str = "bias";
    pub(in crate::train) const GENERATOR: &str = "generator";
}

/// Returns the name under which a checkpoint has a parameter, or a bias that selects experts.
pub(crate) fn saved_name(name: &str, is_selection_bias: bool) -> String {
    let kind = if is_selection_bias {
        kind::BIAS
    } else {
        kind::MASTER
    };
    format!("{kind}/{name}")
}

/// Returns the name under which a checkpoint has the random state of a rank.
pub(crate) fn generator_name(rank: usize) -> String {
    format!("{}/{rank}", kind::GENERATOR)
}

pub(super) fn has_kind(name: &str, kinds: &[&str]) -> bool {
    let kind = name.split_once('/').map(|(kind, _)| kind);
    kind.is_some_and(|kind| kinds.contains(&kind))
}

/// Returns the newest checkpoint under `root` whose manifest can be read, and its configuration for
/// a comparison with `now`.
///
/// # Errors
/// If the folder cannot be read.
pub fn newest_config(root: &Path, now: &Config) -> Result<Option<(PathBuf, Config)>, Error> {
    for path in checkpoint::list(root)? {
        // The resume itself reports a damaged checkpoint.
        if let Ok(config) = config_in(&path, now) {
            return Ok(Some((path, config)));
        }
    }
    Ok(None)
}

/// Returns the configuration in the checkpoint `path`, of which it reads the manifest only, for a
/// comparison with `now`.
///
/// # Errors
/// If it cannot be read, or could not run.
pub(crate) fn config_in(path: &Path, now: &Config) -> Result<Config, Error> {
    let checkpoint = Checkpoint::open(path)?;
    let state = read_run_state(&checkpoint)?;
    let saved = saved_config(&checkpoint, &state)?;
    Ok(comparable(saved, &state, now))
}

/// Returns the configuration in a checkpoint.
///
/// # Errors
/// If it cannot be read, contradicts the tensors or the position, or could not run.
pub(crate) fn saved_config(checkpoint: &Checkpoint, state: &RunState) -> Result<Config, Error> {
    let config = parse_config(checkpoint, state)?;
    let problems = saved_problems(checkpoint, state, &config);
    if problems.is_empty() {
        Ok(config)
    } else {
        Err(unusable(checkpoint, &problems.join("; ")))
    }
}

/// Parses the configuration in a checkpoint, which nothing is computed from before it was compared
/// with the tensors.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn parse_config(checkpoint: &Checkpoint, state: &RunState) -> Result<Config, Error> {
    serde_json::from_value(state.config.clone())
        .map_err(|error| unusable(checkpoint, &error.to_string()))
}

/// Returns the configuration of a state for a comparison with `now`: without the weights that
/// earlier versions set by default, if `now` has none either.
pub(crate) fn comparable(mut saved: Config, state: &RunState, now: &Config) -> Config {
    if state.order.is_some() {
        return saved;
    }
    let lists = [
        (&mut saved.data.train, &now.data.train),
        (&mut saved.data.validation, &now.data.validation),
    ];
    for (saved, now) in lists {
        let has_defaults = saved.iter().all(|source| source.weight == Some(1.0));
        if has_defaults && now.iter().all(|source| source.weight.is_none()) {
            for source in saved {
                source.weight = None;
            }
        }
    }
    saved
}

fn unusable(checkpoint: &Checkpoint, reason: &str) -> Error {
    let manifest = checkpoint.path().join("manifest.json");
    let manifest = manifest.display();
    Error::Resume(format!(
        "{manifest}: its configuration cannot be used: {reason}"
    ))
}

/// Returns why a saved configuration cannot be that of the tensors, or could not run. Later checks
/// do arithmetic with what earlier ones have checked.
fn saved_problems(checkpoint: &Checkpoint, state: &RunState, config: &Config) -> Vec<String> {
    let manifest = checkpoint.manifest();
    let generators = manifest.tensors.keys();
    let generators = generators.filter(|name| has_kind(name, &[kind::GENERATOR]));
    let ranks = generators.count();
    if ranks != state.ranks {
        return vec![format!(
            "it is of {} ranks, but the tensors of {ranks}",
            state.ranks
        )];
    }
    let shapes = saved_shapes(manifest, |name| has_kind(name, &[kind::MASTER]));
    let mut problems = shape_problems(&config.model, &shapes);
    if problems.is_empty() {
        problems = config.problems(ranks);
    }
    if problems.is_empty() {
        problems.extend(count_problem(&config.model, &shapes));
        problems.extend(state.position_problem(config));
    }
    problems
}

/// Reads the state of the run from a checkpoint's manifest.
pub(crate) fn read_run_state(checkpoint: &Checkpoint) -> Result<RunState, Error> {
    let mut state = checkpoint.manifest().state.clone();
    if let Some(config) = state.get_mut("config") {
        rename_old_keys(config);
    }
    let path = checkpoint.path().display();
    let state: RunState = serde_json::from_value(state).map_err(|error| {
        Error::Resume(format!(
            "{path}: the manifest's state cannot be read: {error}"
        ))
    })?;
    let step = checkpoint.manifest().step;
    if state.step == step {
        return Ok(state);
    }
    Err(Error::Resume(format!(
        "{path}: its state is of step {}, but it is of step {step}",
        state.step
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::schedule::tests::config;
    use rand_chacha::{
        ChaCha8Rng,
        rand_core::{Rng, SeedableRng},
    };
    use serde_json::{Value, json};
    use std::time::Instant;

    const MUTATIONS: usize = 2000;

    fn fixture() -> PathBuf {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests");
        tests.join("previous_version/run/checkpoints/step-00000002")
    }

    fn now() -> Config {
        config("steps: 1, global_batch: 4 | constant: {lr: 1.0}")
    }

    #[test]
    fn default_weights_of_earlier_versions_are_no_change() {
        let checkpoint = Checkpoint::open(&fixture()).unwrap();
        let mut state = read_run_state(&checkpoint).unwrap();
        let mut saved = saved_config(&checkpoint, &state).unwrap();
        for source in saved
            .data
            .train
            .iter_mut()
            .chain(&mut saved.data.validation)
        {
            source.weight = Some(1.0);
        }
        let with = |weight: Option<f64>| {
            let mut now = saved.clone();
            now.data.train[0].weight = weight;
            for source in &mut now.data.validation {
                source.weight = None;
            }
            now
        };
        let changes = |state: &RunState, now: Config| {
            let changes = now.changes_from(&comparable(saved.clone(), state, &now));
            changes
                .into_iter()
                .map(|change| change.key)
                .collect::<Vec<_>>()
        };
        // Without weights, with the weight that was the default, and with another one.
        assert_eq!(changes(&state, with(None)), [""; 0]);
        assert_eq!(changes(&state, with(Some(1.0))), [""; 0]);
        assert_eq!(changes(&state, with(Some(2.0))), ["data.train"]);
        state.order = Some(Default::default());
        let both = ["data.train", "data.validation"];
        let expected = &both[..1 + usize::from(!saved.data.validation.is_empty())];
        assert_eq!(changes(&state, with(None)), expected);
    }

    #[test]
    fn weights_of_several_sources_are_compared_together() {
        let checkpoint = Checkpoint::open(&fixture()).unwrap();
        let mut state = read_run_state(&checkpoint).unwrap();
        let base = saved_config(&checkpoint, &state).unwrap();
        let with = |weights: [Option<f64>; 2]| {
            let mut config = base.clone();
            let first = config.data.train[0].clone();
            let sources = weights.into_iter().enumerate().map(|(number, weight)| {
                let mut source = first.clone();
                source.path = format!("data/{number}").into();
                source.weight = weight;
                source
            });
            config.data.train = sources.collect();
            config
        };
        let is_change = |state: &RunState, saved: [Option<f64>; 2], now: [Option<f64>; 2]| {
            let now = with(now);
            let changes = now.changes_from(&comparable(with(saved), state, &now));
            changes.iter().any(|change| change.key == "data.train")
        };
        let none = [None; 2];
        let defaults = [Some(1.0); 2];
        let mixed = [Some(2.0), Some(1.0)];
        assert!(!is_change(&state, defaults, none));
        // A weight of 1 that the user gives now is the default of then.
        assert!(!is_change(&state, defaults, defaults));
        assert!(is_change(&state, defaults, mixed));
        // One of these weights was given, so that none was a default.
        assert!(is_change(&state, mixed, none));
        assert!(is_change(&state, [Some(1.0), Some(2.0)], none));
        assert!(is_change(&state, mixed, defaults));
        assert!(!is_change(&state, mixed, mixed));
        // Without weights, this version draws by the sizes of the sources.
        state.order = Some(Default::default());
        assert!(is_change(&state, defaults, none));
        assert!(!is_change(&state, none, none));
    }

    /// Collects the paths of all values inside of `value`.
    fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
        found.push(at.to_string());
        match value {
            Value::Object(map) => {
                for (key, inner) in map {
                    pointers(inner, &format!("{at}/{key}"), found);
                }
            }
            Value::Array(list) => {
                for (index, inner) in list.iter().enumerate() {
                    pointers(inner, &format!("{at}/{index}"), found);
                }
            }
            _ => {}
        }
    }

    /// Values that contradict the tensors or the position, in a manifest without a checksum.
    #[test]
    fn contradictions_are_refused_by_name() {
        let good = std::fs::read(fixture().join("manifest.json")).unwrap();
        let good: Value = serde_json::from_slice(&good).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let manifest = folder.path().join("manifest.json");
        for (pointer, to, reason) in [
            ("samples", json!(9), "do not agree"),
            ("samples", json!(4), "do not agree"),
            (
                "step",
                json!(1),
                "its state is of step 1, but it is of step 2",
            ),
            ("ranks", json!(3), "it is of 3 ranks, but the tensors of 4"),
            ("ranks", json!(1u64 << 60), "but the tensors of 4"),
            ("config/model/layers", json!(3), "model.layers is 3"),
            ("config/model/layers", json!(u64::MAX), "model.layers is"),
            ("config/model/hidden", json!(32), "model.hidden is 32"),
            (
                "config/model/vocab_size",
                json!(273),
                "model.vocab_size is 273",
            ),
            (
                "config/model/heads",
                json!(4),
                "model.kv_heads x head_dim is 4",
            ),
            ("config/model/heads", json!(0), "model.heads"),
            ("config/model/ffn", json!(17), "model.ffn is 17"),
            (
                "config/model/tie_embeddings",
                json!(true),
                "model.tie_embeddings is true",
            ),
            (
                "config/model/qk_norm",
                json!("head"),
                "but the tensors have",
            ),
            (
                "config/model/dense_layers",
                json!(2),
                "but the tensors have",
            ),
            (
                "config/model/moe/experts",
                json!(1u64 << 60),
                "model.moe.experts is",
            ),
            ("config/model/moe/ffn", json!(15), "model.moe.ffn is 15"),
            (
                "config/model/moe/shared_experts",
                json!(2),
                "model.moe.shared_experts x ffn is 32",
            ),
            ("config/model/moe/top_k", json!(5), "model.moe.top_k"),
            ("config/model/norm_eps", json!(-1), "model.norm_eps"),
            (
                "config/data/sequence_length",
                json!(0),
                "data.sequence_length",
            ),
            ("config/train/global_batch", json!(3), "train.global_batch"),
            ("config/parallel/tensor", json!(3), "parallel"),
        ] {
            let mut changed = good.clone();
            *changed.pointer_mut(&format!("/state/{pointer}")).unwrap() = to;
            std::fs::write(&manifest, changed.to_string()).unwrap();
            let refused = config_in(folder.path(), &now()).err();
            let refused = refused.map_or("accepted".into(), |error| error.to_string());
            assert!(refused.contains(reason), "{pointer}: {refused}");
        }
    }

    /// Changes single values of a state and a configuration without a checksum.
    #[test]
    fn no_change_of_a_saved_state_panics_or_hangs() {
        let good = std::fs::read(fixture().join("manifest.json")).unwrap();
        let good: Value = serde_json::from_slice(&good).unwrap();
        let mut all = Vec::new();
        pointers(&good["state"], "/state", &mut all);
        let mut random = ChaCha8Rng::seed_from_u64(31);
        let mut pick = |count: usize| random.next_u32() as usize % count;
        let folder = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        let mut refused = 0;
        let now = now();
        for _ in 0..MUTATIONS {
            let mut changed = good.clone();
            let target = changed.pointer_mut(&all[pick(all.len())]).unwrap();
            *target = match pick(12) {
                0 => Value::Null,
                1 => json!(-1),
                2 => json!(0),
                3 => json!(u64::MAX),
                4 => json!(1e308),
                5 => json!(i64::MAX),
                6 => json!(1u64 << 32),
                7 => json!([]),
                8 => json!({}),
                9 => json!("x"),
                10 => json!([target.clone(), target.clone()]),
                _ => target
                    .as_i64()
                    .map_or(json!(true), |number| json!(number + 1)),
            };
            std::fs::write(folder.path().join("manifest.json"), changed.to_string()).unwrap();
            refused += usize::from(config_in(folder.path(), &now).is_err());
        }
        let seconds = begun.elapsed().as_secs_f64();
        println!("{MUTATIONS} changed states: {refused} refused, in {seconds:.1} s");
        assert!(refused > MUTATIONS / 2 && seconds < 60.0);
    }
}
