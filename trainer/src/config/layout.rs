//! How the ranks share the work, and the plans that follow from it.

use super::{Auto, AxisSize, Config, ModelConfig};
use crate::model::split_layers;
use parallel::context::ContextKind;
use parallel::pipeline::check::check;
use parallel::pipeline::communication::with_communication;
use parallel::pipeline::refine::refined;
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
    /// Ranks that split every matrix, and the tokens between blocks (sequence parallelism).
    pub tensor: usize,
    /// Ranks that split every sequence.
    pub context: usize,
    /// How they attend.
    pub context_attention: ContextKind,
    /// Ranks that share out the experts of a layer. With `expert_tensor` folded over data, context and tensor ranks: their
    /// product divides the others'.
    pub expert: usize,
    /// Ranks that split every expert's matrices.
    pub expert_tensor: usize,
    /// Parts in which tokens travel to experts and back, one while the experts work on another.
    pub expert_chunks: usize,
    /// Ranks of a node, for dispatch by way of nodes and for snapshots (each node has a keeper); by default what the launcher
    /// says.
    pub ranks_per_node: Option<usize>,
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
    /// What replicas share out (ZeRO): 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too.
    pub zero: u8,
    /// Replicas that do so together; others hold the same (hybrid sharding). By default all: data x context.
    pub zero_group_size: Option<usize>,
    /// What backward computes again instead of keeping it.
    pub recompute: RecomputeConfig,
    /// Parts in which rows travel among `tensor` ranks, one while another is computed on.
    pub tensor_chunks: usize,
    /// Size in MiB up to which gradients share one reduction.
    pub bucket_mib: f64,
}

/// What backward computes again instead of keeping it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RecomputeConfig {
    /// Layers of which only the input is kept: `none`, `all`, or their numbers.
    pub layers: RecomputedLayers,
    /// Parts that are computed again in the other layers. (The activation function always is.)
    pub parts: Vec<RecomputedPart>,
}

/// Layers of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "none, all, or a list of layers")]
pub enum RecomputedLayers {
    /// By a word.
    Word(NoneOrAll),
    /// By their numbers.
    Layers(Vec<usize>),
}

impl Default for RecomputedLayers {
    fn default() -> RecomputedLayers {
        RecomputedLayers::Word(NoneOrAll::None)
    }
}

/// `none` or `all`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NoneOrAll {
    /// None of them.
    None,
    /// All of them.
    All,
}

/// A part of a layer that backward can compute again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RecomputedPart {
    /// Outputs of the norms before attention and feed-forward.
    Norm,
    /// Attention over keys and values (not the projections).
    Attention,
    /// Rows as they come to their experts; they are sent again.
    Dispatch,
    /// Gate-up products of experts and dense feed-forward networks.
    Experts,
}

impl RecomputeConfig {
    /// Whether of layer `layer` only the input is kept.
    pub fn recomputes_layer(&self, layer: usize) -> bool {
        match &self.layers {
            RecomputedLayers::Word(word) => *word == NoneOrAll::All,
            RecomputedLayers::Layers(layers) => layers.contains(&layer),
        }
    }

    /// Whether `part` is kept.
    pub fn keeps(&self, part: RecomputedPart) -> bool {
        !self.parts.contains(&part)
    }
}

impl Default for ParallelConfig {
    fn default() -> ParallelConfig {
        ParallelConfig {
            data: AxisSize::Auto(Auto::Auto),
            tensor: 1,
            context: 1,
            context_attention: ContextKind::Ring,
            expert: 1,
            expert_tensor: 1,
            expert_chunks: 1,
            ranks_per_node: None,
            pipeline: 1,
            schedule: ScheduleChoice::Known(ScheduleKind::OneFOneB),
            chunks: None,
            stage_layers: None,
            vocabulary: VocabularyLayout::Baseline,
            zero: 0,
            zero_group_size: None,
            recompute: RecomputeConfig::default(),
            tensor_chunks: 1,
            bucket_mib: 25.0,
        }
    }
}

/// A known schedule by its name, or a file with one. Known ones that split the backward, or share the vocabulary out, are refined by
/// the times of their passes; a file's stays as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(
    untagged,
    expecting = "gpipe, 1f1b, interleaved, zb-h1, zb-v, v-half, v-min, dualpipe-v, or {file: PATH}"
)]
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
    /// Shared out over all stages, three barriers a microbatch.
    Naive,
    /// Shared out over all stages, which stop for it together.
    Interlaced,
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
            VocabularyLayout::Naive => Some(Vocabulary::Naive),
            VocabularyLayout::Interlaced => Some(Vocabulary::Interlaced),
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
                passes.extend(
                    (0..base.chunks).map(|chunk| Pass::new(PassKind::Forward, chunk, microbatch)),
                );
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
        with_communication(Order {
            microbatches,
            vocabulary,
            ranks,
            ..base.clone()
        })
    }
}

impl Config {
    /// Microbatches of a rank in a step.
    pub fn microbatches(&self, mesh: &Mesh) -> usize {
        self.train.global_batch / (self.train.micro_batch * mesh.shape().data)
    }

    /// The mesh of `ranks` ranks as `rank` sees it.
    ///
    /// # Errors
    /// When the axes do not fit the ranks: which keys, and the arithmetic.
    pub fn mesh(&self, rank: usize, ranks: usize) -> Result<Mesh, String> {
        let ParallelConfig {
            data,
            tensor,
            context,
            expert,
            expert_tensor,
            pipeline,
            ..
        } = self.parallel;
        let others = tensor * context * pipeline;
        let data = match data {
            AxisSize::Size(size) => size,
            AxisSize::Auto(_) if others > 0 && !ranks.is_multiple_of(others) => {
                let few = ranks / others * others;
                let nearest = match few {
                    0 => format!("{others} ranks"),
                    _ => format!("{few} or {} ranks", few + others),
                };
                return Err(format!(
                    "parallel: {ranks} ranks are not a multiple of tensor {tensor} x context {context} x pipeline \
                     {pipeline} = {others}; use {nearest}, or change one of these keys"
                ));
            }
            AxisSize::Auto(_) => ranks / others.max(1),
        };
        let shape = MeshShape {
            data,
            tensor,
            pipeline,
            context,
            expert,
            expert_tensor,
        };
        Mesh::new(shape, rank, ranks).map_err(|error| {
            let nearest = nearest(shape, ranks);
            format!(
                "parallel: {error}; nearest that fits: {nearest}, or start another number of ranks (--nproc-per-node)"
            )
        })
    }

    /// What the pipeline does with `microbatches` microbatches a step.
    ///
    /// # Errors
    /// When the schedule does not exist for these sizes, or a file's cannot run.
    pub fn pipeline_plan(&self, microbatches: usize) -> Result<PipelinePlan, String> {
        let ParallelConfig {
            pipeline,
            schedule,
            chunks,
            stage_layers,
            vocabulary,
            ..
        } = &self.parallel;
        let key = |error: String| format!("parallel.schedule: {error}");
        let order = match schedule {
            ScheduleChoice::Known(kind) => {
                kind.order(*pipeline, microbatches, *chunks).map_err(key)?
            }
            ScheduleChoice::File { file } => read_order(file, *pipeline, microbatches)?,
        };
        let stages = order.stages();
        let (embed, head) = self.model.vocabulary_cost_in_layers();
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
        let costs = self.costs(&order, &layers);
        let order = match vocabulary.algorithm() {
            Some(algorithm) => with_vocabulary(&order, algorithm, &costs),
            None => order,
        };
        // Who wrote an order wants that one.
        let order = match schedule {
            ScheduleChoice::Known(_) => refined(&order, &costs),
            ScheduleChoice::File { .. } => order,
        };
        let schedule = with_communication(order);
        check(&schedule).map_err(|error| key(error.to_string()))?;
        Ok(PipelinePlan { schedule, layers })
    }

    /// Times of passes in units of one layer's forward, from their matrix products.
    pub fn costs(&self, order: &Order, layers: &[usize]) -> Costs {
        let (_, head) = self.model.vocabulary_cost_in_layers();
        let ranks = order.ranks.len();
        let vocabulary = match self.parallel.vocabulary.algorithm() {
            Some(algorithm) => VocabularyCosts::from_logits(algorithm, head / ranks as f64),
            None => VocabularyCosts::default(),
        };
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
    fn vocabulary_cost_in_layers(&self) -> (f64, f64) {
        (0.0, self.head_cost_in_layers())
    }

    /// The work of the output layer's forward, in units of a mean layer's matrix products.
    pub fn head_cost_in_layers(&self) -> f64 {
        let hidden = self.hidden as f64;
        let head_dim = self.head_dim() as f64;
        let attention = hidden * head_dim * 2.0 * (self.heads + self.kv_heads()) as f64;
        let layer = |index: usize| {
            let feed_forward = match self.moe_config(index) {
                Some(moe) => {
                    3.0 * (moe.ffn * (moe.top_k + moe.shared_experts)) as f64 + moe.experts as f64
                }
                None => 3.0 * self.ffn.unwrap_or(0) as f64,
            };
            attention + hidden * feed_forward
        };
        let mean = (0..self.layers).map(layer).sum::<f64>() / self.layers.max(1) as f64;
        hidden * self.vocab_size as f64 / mean.max(1.0)
    }
}

/// The layout most like `shape` that fits `ranks` ranks, in words.
fn nearest(shape: MeshShape, ranks: usize) -> String {
    let divisors =
        |number: usize| (1..=number).filter(move |divisor| number.is_multiple_of(*divisor));
    let far = |a: usize, b: usize| (a.max(1) as f64 / b.max(1) as f64).ln().abs();
    let mut best: Option<(f64, MeshShape)> = None;
    for pipeline in divisors(ranks) {
        for tensor in divisors(ranks / pipeline) {
            for context in divisors(ranks / pipeline / tensor) {
                let data = ranks / pipeline / tensor / context;
                for expert in divisors(data * tensor * context) {
                    for expert_tensor in divisors(data * tensor * context / expert) {
                        let other = MeshShape {
                            data,
                            tensor,
                            pipeline,
                            context,
                            expert,
                            expert_tensor,
                        };
                        // Data is the axis that people mind least.
                        let distance = 0.5 * far(data, shape.data)
                            + far(tensor, shape.tensor)
                            + far(context, shape.context)
                            + far(pipeline, shape.pipeline)
                            + far(expert, shape.expert)
                            + far(expert_tensor, shape.expert_tensor);
                        if best.is_none_or(|(least, _)| distance < least) {
                            best = Some((distance, other));
                        }
                    }
                }
            }
        }
    }
    let (
        _,
        MeshShape {
            data,
            tensor,
            pipeline,
            context,
            expert,
            expert_tensor,
        },
    ) = best.unwrap_or((0.0, shape));
    format!(
        "{{data: {data}, tensor: {tensor}, context: {context}, pipeline: {pipeline}, expert: {expert}, expert_tensor: \
         {expert_tensor}}}"
    )
}

fn read_order(file: &std::path::Path, ranks: usize, microbatches: usize) -> Result<Order, String> {
    let failed = |reason: String| format!("parallel.schedule.file {}: {reason}", file.display());
    let text = std::fs::read_to_string(file)
        .map_err(|error| failed(format!("cannot be opened: {error}")))?;
    let order: OrderFile =
        serde_saphyr::from_str(&text).map_err(|error| failed(error.to_string()))?;
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
