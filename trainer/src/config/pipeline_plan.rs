//! The passes of each pipeline rank in a step, and the layers of each stage.

use super::{
    Config,
    layout::{ParallelConfig, ScheduleChoice, VocabularyLayout},
};
use crate::model::split_layers;
use parallel::pipeline::{
    Order, OrderFile, Pass, PassKind, Schedule, Vocabulary,
    check::check,
    communication::with_communication,
    refine::refined,
    simulate::{Costs, VocabularyCosts},
    vocabulary::with_vocabulary,
};
use std::path::Path;

/// The schedule of a pipeline, and the layers of its stages.
#[derive(Debug, Clone)]
pub struct PipelinePlan {
    /// The schedule of a training step.
    pub schedule: Schedule,
    /// Number of layers of each stage.
    pub layers: Vec<usize>,
}

impl PipelinePlan {
    /// Returns a schedule with the forward passes alone, for validation and for counting routed
    /// tokens.
    ///
    /// It needs no check: every rank finishes a microbatch before it begins the next one.
    pub fn forward_only(&self, microbatches: usize) -> Schedule {
        let base = &self.schedule.order;
        let passes_of_rank = |_rank: usize| {
            let mut passes = Vec::new();
            for microbatch in 0..microbatches {
                if base.vocabulary.is_some() {
                    passes.push(Pass::new(PassKind::Embed, 0, microbatch));
                }
                for chunk in 0..base.chunks {
                    passes.push(Pass::new(PassKind::Forward, chunk, microbatch));
                }
                if base.vocabulary.is_some() {
                    passes.push(Pass::new(PassKind::Logits, 0, microbatch));
                    passes.push(Pass::new(PassKind::LogitsBackward, 0, microbatch));
                }
            }
            passes
        };
        let ranks = (0..base.ranks.len()).map(passes_of_rank).collect();
        // The second barrier is for backward.
        let vocabulary = base.vocabulary.map(|_| Vocabulary::Vocab2);
        with_communication(Order {
            microbatches,
            vocabulary,
            ranks,
            ..base.clone()
        })
    }
}

impl Config {
    /// Returns the pipeline's plan for steps of `microbatches` microbatches.
    ///
    /// # Errors
    /// If the schedule does not exist for these sizes, or a schedule from a file cannot run.
    pub fn pipeline_plan(&self, microbatches: usize) -> Result<PipelinePlan, String> {
        let named = |error: String| format!("parallel.schedule: {error}");
        let ParallelConfig {
            pipeline,
            schedule,
            chunks,
            vocabulary,
            ..
        } = &self.parallel;
        let mut order = match schedule {
            ScheduleChoice::Known(kind) => kind
                .order(*pipeline, microbatches, *chunks)
                .map_err(named)?,
            ScheduleChoice::File { file } => read_order(file, *pipeline, microbatches)?,
        };
        let layers = self.stage_layers(order.stages())?;
        let costs = self.costs(&order, &layers);
        if let Some(algorithm) = vocabulary.algorithm() {
            order = with_vocabulary(&order, algorithm, &costs);
        }
        // A user's own schedule is not refined.
        if let ScheduleChoice::Known(_) = schedule {
            order = refined(&order, &costs);
        }
        let schedule = with_communication(order);
        check(&schedule).map_err(|error| named(error.to_string()))?;
        Ok(PipelinePlan { schedule, layers })
    }

    /// Returns the number of layers of each of `stages` stages.
    fn stage_layers(&self, stages: usize) -> Result<Vec<usize>, String> {
        let ParallelConfig {
            stage_layers,
            vocabulary,
            ..
        } = &self.parallel;
        let model_layers = self.model.layers;
        let Some(layers) = stage_layers else {
            // The embedding on the first stage is a lookup, which costs next to nothing.
            let head = match vocabulary {
                VocabularyLayout::Redis => {
                    self.model.head_cost_in_layers(self.data.sequence_length)
                }
                _ => 0.0,
            };
            return Ok(split_layers(model_layers, stages, 0.0, head));
        };
        let total: usize = layers.iter().sum();
        if layers.len() != stages || total != model_layers {
            return Err(format!(
                "parallel.stage_layers {layers:?} are {total} layers in {} stages; the model \
                 has {model_layers} layers and the schedule {stages} stages",
                layers.len()
            ));
        }
        Ok(layers.clone())
    }

    /// Returns the durations of passes, in units of one layer's forward, from their FLOPs.
    pub fn costs(&self, order: &Order, layers: &[usize]) -> Costs {
        let ranks = order.ranks.len();
        let length = self.data.sequence_length;
        let head = self.model.head_cost_in_layers(length);
        let vocabulary = match self.parallel.vocabulary.algorithm() {
            Some(algorithm) => VocabularyCosts::from_logits(algorithm, head / ranks as f64),
            None => VocabularyCosts::default(),
        };
        let mut costs = self.model.layer_costs(length).into_iter();
        let of_stage: Vec<f64> = layers
            .iter()
            .map(|&layers| costs.by_ref().take(layers).sum())
            .collect();
        Costs {
            forward: of_stage.clone(),
            backward_input: of_stage.clone(),
            backward_weight: of_stage,
            vocabulary: vec![vocabulary; ranks],
            send: 0.0,
            collective: 0.0,
        }
    }
}

/// Reads a user's own schedule and checks that it is for this pipeline.
fn read_order(file: &Path, ranks: usize, microbatches: usize) -> Result<Order, String> {
    let failed = |reason: String| {
        let file = file.display();
        format!("parallel.schedule.file {file}: {reason}")
    };
    let text = std::fs::read_to_string(file)
        .map_err(|error| failed(format!("cannot be opened: {error}")))?;
    let order: OrderFile =
        serde_saphyr::from_str(&text).map_err(|error| failed(error.to_string()))?;
    let order = order.parse().map_err(failed)?;
    if order.ranks.len() != ranks || order.microbatches != microbatches {
        return Err(failed(format!(
            "it is for {} ranks and {} microbatches; parallel.pipeline is {ranks} and a step \
             has {microbatches}",
            order.ranks.len(),
            order.microbatches
        )));
    }
    Ok(order)
}
