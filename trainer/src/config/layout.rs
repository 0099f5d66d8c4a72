//! How the ranks share the work, and the plans that follow from it.

use super::{Auto, AxisSize, Config, ModelConfig};
use crate::model::split_layers;
use parallel::pipeline::check::check;
use parallel::pipeline::communication::with_communication;
use parallel::pipeline::schedules::ScheduleKind;
use parallel::pipeline::simulate::{Costs, VocabularyCosts};
use parallel::pipeline::vocabulary::with_vocabulary;
use parallel::pipeline::{Order, OrderFile, Pass, PassKind, Schedule, Vocabulary};
use parallel::{Mesh, MeshShape};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How the ranks share the work.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ParallelConfig {
    /// Replicas of the dense layers; `auto` takes all ranks that the other axes leave.
    pub data: AxisSize,
    /// Ranks that share out the experts of a layer. Folded over the data axis: it divides it.
    pub expert: usize,
    /// Ranks that share out the layers, in stages that microbatches pass one after the other.
    pub pipeline: usize,
    /// The order in which a pipeline's ranks work on microbatches.
    pub schedule: ScheduleChoice,
    /// Stages of a rank, for `interleaved`; other schedules have a fixed number.
    pub chunks: Option<usize>,
    /// Layers of each stage; by default as even as `vocabulary` asks for.
    pub stage_layers: Option<Vec<usize>>,
    /// Where a pipeline's embedding and output layer are.
    pub vocabulary: VocabularyLayout,
    /// Size in MiB up to which gradients share one all-reduce.
    pub bucket_mib: usize,
}

impl Default for ParallelConfig {
    fn default() -> ParallelConfig {
        ParallelConfig {
            data: AxisSize::Auto(Auto::Auto),
            expert: 1,
            pipeline: 1,
            schedule: ScheduleChoice::Known(ScheduleKind::OneFOneB),
            chunks: None,
            stage_layers: None,
            vocabulary: VocabularyLayout::Baseline,
            bucket_mib: 25,
        }
    }
}

/// A known schedule by its name, or a file with one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "gpipe, 1f1b, interleaved, zb-h1, zb-v, v-half, v-min, dualpipe-v, or {file: PATH}")]
pub enum ScheduleChoice {
    /// By name.
    Known(ScheduleKind),
    /// One that a person wrote; `moerun plan schedule --yaml` prints an example.
    File {
        /// YAML with `placement`, `chunks` and a line of passes for each rank.
        file: PathBuf,
    },
}

/// Where a pipeline's embedding and output layer are (names as in arXiv 2411.05288).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VocabularyLayout {
    /// On the first and the last stage; layers are shared out evenly all the same.
    #[default]
    Baseline,
    /// On the first and the last stage, which have fewer layers for it.
    Redis,
    /// Shared out over all stages, two barriers a microbatch.
    #[serde(rename = "vocab-1")]
    Vocab1,
    /// Shared out over all stages, one barrier a microbatch.
    #[serde(rename = "vocab-2")]
    Vocab2,
}

impl VocabularyLayout {
    /// The algorithm, where the vocabulary is shared out.
    pub fn algorithm(self) -> Option<Vocabulary> {
        match self {
            VocabularyLayout::Baseline | VocabularyLayout::Redis => None,
            VocabularyLayout::Vocab1 => Some(Vocabulary::Vocab1),
            VocabularyLayout::Vocab2 => Some(Vocabulary::Vocab2),
        }
    }
}

/// What a pipeline does in a step, and where its layers are.
#[derive(Debug, Clone)]
pub struct PipelinePlan {
    /// For learning.
    pub schedule: Schedule,
    /// Layers of each stage.
    pub layers: Vec<usize>,
}

impl PipelinePlan {
    /// Only the forward passes of `microbatches` microbatches, for counting and judging. Nobody need check it: every
    /// microbatch is whole before the next begins on the same rank.
    pub fn forward_only(&self, microbatches: usize) -> Schedule {
        let base = &self.schedule.order;
        let of_rank = |_rank: usize| {
            let mut passes = Vec::new();
            for microbatch in 0..microbatches {
                let shared = base.vocabulary.is_some();
                passes.extend(shared.then(|| Pass::new(PassKind::Embed, 0, microbatch)));
                passes.extend((0..base.chunks).map(|chunk| Pass::new(PassKind::Forward, chunk, microbatch)));
                if shared {
                    passes.push(Pass::new(PassKind::Logits, 0, microbatch));
                    passes.push(Pass::new(PassKind::LogitsBackward, 0, microbatch));
                }
            }
            passes
        };
        let ranks = (0..base.ranks.len()).map(of_rank).collect();
        // Without backwards there is nothing for a second barrier.
        let vocabulary = base.vocabulary.map(|_| Vocabulary::Vocab2);
        with_communication(Order { microbatches, vocabulary, ranks, ..base.clone() })
    }
}

impl Config {
    /// The mesh of `ranks` ranks as `rank` sees it.
    ///
    /// # Errors
    /// When the axes do not fit the ranks: which keys, and the arithmetic.
    pub fn mesh(&self, rank: usize, ranks: usize) -> Result<Mesh, String> {
        let ParallelConfig { data, expert, pipeline, .. } = self.parallel;
        let data = match data {
            AxisSize::Size(size) => size,
            AxisSize::Auto(_) if pipeline > 0 && !ranks.is_multiple_of(pipeline) => {
                return Err(format!(
                    "parallel: {ranks} ranks do not divide into pipelines of {pipeline}; use {} or {} ranks, or change \
                     parallel.pipeline",
                    ranks / pipeline * pipeline,
                    (ranks / pipeline + 1) * pipeline
                ));
            }
            AxisSize::Auto(_) => ranks / pipeline.max(1),
        };
        let shape = MeshShape { data, tensor: 1, pipeline, context: 1, expert };
        Mesh::new(shape, rank, ranks).map_err(|error| {
            format!(
                "parallel: {error}; change parallel.data, parallel.expert, parallel.pipeline or the number of ranks \
                 (--nproc-per-node)"
            )
        })
    }

    /// What the pipeline does with `microbatches` microbatches a step.
    ///
    /// # Errors
    /// When the schedule does not exist for these sizes, or a file's cannot run.
    pub fn pipeline_plan(&self, microbatches: usize) -> Result<PipelinePlan, String> {
        let ParallelConfig { pipeline, schedule, chunks, stage_layers, vocabulary, .. } = &self.parallel;
        let key = |error: String| format!("parallel.schedule: {error}");
        let order = match schedule {
            ScheduleChoice::Known(kind) => kind.order(*pipeline, microbatches, *chunks).map_err(key)?,
            ScheduleChoice::File { file } => read_order(file, *pipeline, microbatches)?,
        };
        let stages = order.stages();
        let (embed, head) = self.model.ends_in_layers();
        let layers = match (stage_layers, vocabulary) {
            (Some(layers), _) => layers.clone(),
            (None, VocabularyLayout::Redis) => split_layers(self.model.layers, stages, embed, head),
            (None, _) => split_layers(self.model.layers, stages, 0.0, 0.0),
        };
        if layers.len() != stages || layers.iter().sum::<usize>() != self.model.layers {
            return Err(format!(
                "parallel.stage_layers {layers:?} are {} layers in {} stages; the model has {} layers and the schedule \
                 {stages} stages",
                layers.iter().sum::<usize>(),
                layers.len(),
                self.model.layers
            ));
        }
        let order = match vocabulary.algorithm() {
            Some(algorithm) => with_vocabulary(&order, algorithm, &self.costs(&order, &layers)),
            None => order,
        };
        let schedule = with_communication(order);
        check(&schedule).map_err(|error| key(error.to_string()))?;
        Ok(PipelinePlan { schedule, layers })
    }

    /// Times of passes in units of one layer's forward, from their matrix products.
    pub fn costs(&self, order: &Order, layers: &[usize]) -> Costs {
        let (_, head) = self.model.ends_in_layers();
        let ranks = order.ranks.len();
        // S has two of the three matrix products, the input's gradient among them with `vocab-2`.
        let share = head / ranks as f64;
        let vocabulary =
            VocabularyCosts { logits: 2.0 * share, logits_backward: share, embed: 0.0, embed_backward: 0.0 };
        let of_stage: Vec<f64> = layers.iter().map(|&layers| layers as f64).collect();
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

impl ModelConfig {
    /// The work of the embedding's and of the output layer's forward, in units of a mean layer's matrix products. (A
    /// lookup is next to none.)
    fn ends_in_layers(&self) -> (f64, f64) {
        let (hidden, head_dim) = (self.hidden as f64, self.head_dim() as f64);
        let attention = hidden * head_dim * 2.0 * (self.heads + self.kv_heads()) as f64;
        let layer = |index: usize| {
            let feed_forward = match self.moe_of(index) {
                Some(moe) => 3.0 * (moe.ffn * (moe.top_k + moe.shared_experts)) as f64 + moe.experts as f64,
                None => 3.0 * self.ffn.unwrap_or(0) as f64,
            };
            attention + hidden * feed_forward
        };
        let mean = (0..self.layers).map(layer).sum::<f64>() / self.layers.max(1) as f64;
        (0.0, hidden * self.vocab_size as f64 / mean.max(1.0))
    }
}

fn read_order(file: &std::path::Path, ranks: usize, microbatches: usize) -> Result<Order, String> {
    let failed = |reason: String| format!("parallel.schedule.file {}: {reason}", file.display());
    let text = std::fs::read_to_string(file).map_err(|error| failed(format!("cannot be opened: {error}")))?;
    let order: OrderFile = serde_saphyr::from_str(&text).map_err(|error| failed(error.to_string()))?;
    let order = order.parse().map_err(failed)?;
    if order.ranks.len() != ranks || order.microbatches != microbatches {
        return Err(failed(format!(
            "it is for {} ranks and {} microbatches; parallel.pipeline is {ranks} and a step has {microbatches}",
            order.ranks.len(),
            order.microbatches
        )));
    }
    Ok(order)
}
