//! A step with few layers before the first communicator exists.
//!
//! libtorch loads a kernel when it is first launched, and CUDA may load it only once everything on
//! the GPU has ended (CUDA programming guide, "Lazy Loading", potential hazards). If that includes
//! a collective whose other ranks wait for this one, no rank continues. So a rank on a device runs
//! the operations of a step while nothing can wait for another rank. Expert placement, checkpoints
//! and snapshots are left out: they copy.

use super::{
    Trainer,
    metrics::step_figures::{FigureSizes, StepFigures},
    run_data::Resources,
};
use crate::{
    Error,
    config::{BatchSize, Config},
    model::ModelPart,
};
use parallel::{Accelerator, Cpu, Mesh, World};
use std::{collections::HashSet, hash::Hash, ops::Range, time::Instant};

/// Enough microbatches to add to gradients of an earlier one.
const MICROBATCHES: usize = 2;

/// Loads all kernels of a step and leaves no other trace. Does nothing on processors, and without
/// other ranks.
///
/// A step that fails only logs a warning: the run's first step reports the reason.
///
/// # Errors
/// If the step cannot be set up, or the state of a random generator cannot be restored.
pub(super) fn rehearse(
    config: &Config,
    world: &World,
    resources: Resources,
) -> Result<Resources, Error> {
    let rehearsal = world.rehearsal();
    let Some(rehearsal) = rehearsal.filter(|_| !resources.device.computes_on_host()) else {
        return Ok(resources);
    };
    let started = Instant::now();
    let host_state = Cpu.generator_state()?;
    let device_state = resources.device.generator_state()?;
    resources.device.load_kernels();
    let mesh = config.mesh(world.rank(), world.size());
    let short = shortened(config, &mesh.map_err(Error::Config)?);
    let select = |part| few_layers(config, part);
    let all = rehearsal.all("world")?;
    let mut trainer = Trainer::assemble(short, &rehearsal, all, resources, select)?;
    let outcome = trainer.run_each_operation();
    let resources = trainer.into_resources();
    let device = resources.device.as_ref();
    device.set_generator_state(&device_state)?;
    Cpu.set_generator_state(&host_state)?;
    device.reset_peak()?;
    match outcome {
        Ok(()) => tracing::info!("rehearsed a step in {:.1?}", started.elapsed()),
        Err(error) => tracing::warn!(
            "the rehearsal of a step failed, so the first step loads kernels while other \
             ranks wait: {error}"
        ),
    }
    Ok(resources)
}

impl Trainer {
    fn run_each_operation(&mut self) -> Result<(), Error> {
        let grad_norm = self.forward_backward()?;
        // Large enough to clip every head, which loads the kernels of that.
        let heads = self.config.model.layers * self.config.model.heads;
        self.update_parameters(grad_norm, &vec![f32::MAX; heads])?;
        // Which matrices a rank owns depends on all layers of its stage.
        let device = self.rank.device.as_ref();
        self.optimizer
            .transform_each_shape(&self.model.parameters, device);
        let moe = self.config.model.moe.as_ref();
        self.update_biases(&StepFigures::zeros(FigureSizes {
            moe_layers: self.config.model.num_moe_layers(),
            experts: moe.map_or(0, |moe| moe.experts),
        }));
        self.rehearse_validation()?;
        Ok(self.rank.device.synchronize()?)
    }

    fn into_resources(self) -> Resources {
        Resources {
            device: self.rank.device,
            data: self.data,
        }
    }
}

/// Returns the configuration of a step with as few microbatches as its pipeline allows, of the
/// same shape.
fn shortened(config: &Config, mesh: &Mesh) -> Config {
    let mut short = config.clone();
    let steps = config.train.global_batch.stages();
    let microbatches = steps
        .iter()
        .map(|step| config.microbatches(mesh, step.sequences));
    let fewest = microbatches.min().unwrap_or(1);
    let fits = |&number: &usize| config.pipeline_plan(number).is_ok();
    let number = (MICROBATCHES.min(fewest)..fewest).find(fits);
    let number = number.unwrap_or(fewest);
    let sequences = number * config.train.micro_batch * mesh.shape().data;
    short.train.global_batch = BatchSize::Constant(sequences);
    short.run.trace_step = None;
    // Values that are drawn do as well as those of a folder.
    short.model.from = None;
    short
}

/// Leaves consecutive layers of each stage that include a layer of each kind.
fn few_layers(config: &Config, mut part: ModelPart) -> ModelPart {
    let recompute = &config.parallel.recompute;
    let kind = |layer| {
        let kind = config.model.layer_kind(layer);
        (kind, recompute.recomputes_layer(layer))
    };
    for stage in &mut part.stages {
        let kinds: Vec<_> = stage.layers.clone().map(kind).collect();
        let few = shortest_with_all(&kinds);
        stage.layers = stage.layers.start + few.start..stage.layers.start + few.end;
    }
    part
}

/// Returns the first of the shortest ranges that contain every value of `kinds`.
fn shortest_with_all<T: Hash + Eq>(kinds: &[T]) -> Range<usize> {
    let different = |kinds: &[T]| kinds.iter().collect::<HashSet<_>>().len();
    let all = different(kinds);
    for length in all..kinds.len() {
        let mut windows = kinds.windows(length.max(1));
        if let Some(start) = windows.position(|window| different(window) == all) {
            return start..start + length;
        }
    }
    0..kinds.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::StagePart, optim::schedule::tests::config};
    use proptest::prelude::*;

    #[test]
    fn a_rehearsal_has_two_microbatches_or_what_the_pipeline_needs() {
        let mut config = config("steps: 100, global_batch: 64 | constant: {lr: 1.0}");
        config.model.layers = 8;
        let micro_batch = config.train.micro_batch;
        let sequences = |config: &Config, ranks: usize| {
            let mesh = config.mesh(0, ranks).unwrap();
            shortened(config, &mesh).train.global_batch
        };
        assert_eq!(sequences(&config, 1), BatchSize::Constant(2 * micro_batch));
        assert_eq!(sequences(&config, 2), BatchSize::Constant(4 * micro_batch));
        config.train.global_batch = BatchSize::Constant(micro_batch);
        assert_eq!(sequences(&config, 1), BatchSize::Constant(micro_batch));
    }

    #[test]
    fn a_stage_keeps_one_layer_of_each_kind() {
        let mut config = config("steps: 100, global_batch: 64 | constant: {lr: 1.0}");
        config.model.layers = 8;
        config.model.moe = Some(crate::config::MoeConfig::new(4, 2, 16));
        config.model.dense_layers = 3;
        let stage = |layers| StagePart {
            layers,
            first: false,
            last: false,
        };
        let part = ModelPart {
            stages: vec![stage(0..3), stage(1..6), stage(6..8), stage(8..8)],
            vocabulary: None,
        };
        let few = few_layers(&config, part).stages;
        let layers: Vec<_> = few.into_iter().map(|stage| stage.layers).collect();
        assert_eq!(layers, [0..1, 2..4, 6..7, 8..8]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn the_range_has_all_kinds_and_no_shorter_one_has(
            kinds in proptest::collection::vec(0u8..4, 0..12),
        ) {
            let range = shortest_with_all(&kinds);
            let of = |range: Range<usize>| kinds[range].iter().collect::<HashSet<_>>();
            let all = of(0..kinds.len());
            prop_assert_eq!(of(range.clone()), all.clone());
            for start in 0..kinds.len() {
                for end in start..kinds.len().min(start + range.len().saturating_sub(1)) {
                    prop_assert_ne!(of(start..end), all.clone());
                }
            }
        }
    }
}
