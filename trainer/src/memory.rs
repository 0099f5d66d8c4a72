//! Estimate of each rank's memory before a run: bytes of tensors, as plain arithmetic.
//!
//! Parameters are exact. Activations are what the layers' autograd nodes save, for as many
//! microbatches as the schedule has in flight. Expert load is assumed to be even.

use crate::{
    config::{Config, Dtype, MAX_ESTIMATED_LAYERS, MoeConfig, QkNorm, RecomputedPart},
    model::{
        ModelPart, PipelineSplit, StagePart, VocabularyShard, logits_chunk_bytes,
        parameters::Replicas,
    },
    process_groups::zero_rank_and_size,
};
use parallel::{
    BucketPlan, Coordinates, Mesh, own_rows, pipeline::simulate::simulate, plan_buckets,
};
use std::ops::Range;

const FP32_BYTES: u64 = 4;

/// Memory of one rank, in bytes.
#[derive(Debug, Clone)]
pub struct RankMemory {
    /// Index of the rank.
    pub rank: usize,
    /// Coordinates of the rank in the mesh.
    pub coordinates: Coordinates,
    /// Layers of each model chunk.
    pub stages: Vec<StagePart>,
    /// Number of parameters that the rank updates.
    pub parameters: u64,
    /// Weights in the model's dtype, and those of experts in 8 bits.
    pub weights: u64,
    /// Gradients during a step.
    pub gradients: u64,
    /// Moments, and fp32 masters of a bf16 model. Zero with `optimizer.offload`.
    pub optimizer: u64,
    /// Moments and fp32 masters that `optimizer.offload` keeps in host memory. Not part of
    /// [`RankMemory::total`].
    pub host: u64,
    /// Microbatches whose activations exist at once.
    pub microbatches_in_flight: f64,
    /// Tensors that forward saves for backward.
    pub activations: u64,
    /// The largest set of short-lived tensors: a layer's backward, the loss, gathered weights.
    pub transient: u64,
}

impl RankMemory {
    /// Returns the sum of all kinds of memory on the rank's device.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations + self.transient
    }
}

/// One parameter of a rank.
struct ParameterShape {
    rows: u64,
    cols: u64,
    replicas: Replicas,
    /// Number of the unit that is gathered together.
    unit: usize,
}

impl ParameterShape {
    fn elements(&self) -> u64 {
        self.rows * self.cols
    }
}

/// Heads of one rank.
struct Heads {
    queries: u64,
    kv: u64,
}

/// Bytes of one layer.
struct LayerActivations {
    /// Saved from forward to backward.
    saved: u64,
    /// Temporary tensors of backward.
    transient: u64,
}

/// Sizes that all layers of a rank share.
struct RankSizes<'a> {
    config: &'a Config,
    mesh: Mesh,
    /// Tokens of a microbatch inside a block, where tensor-parallel ranks split the matrices.
    tokens: u64,
    /// Tokens of a microbatch between blocks, where tensor-parallel ranks split the tokens.
    own_tokens: u64,
    /// Bytes of an element in the model's dtype.
    element: u64,
}

impl RankSizes<'_> {
    fn splits_kv_heads(&self) -> bool {
        let tensor = self.mesh.shape().tensor;
        self.config.model.kv_heads().is_multiple_of(tensor)
    }

    fn heads(&self) -> Heads {
        let model = &self.config.model;
        let tensor = self.mesh.shape().tensor;
        let kv = model.kv_heads();
        let own_kv = if self.splits_kv_heads() {
            kv / tensor
        } else {
            kv
        };
        Heads {
            queries: (model.heads / tensor) as u64,
            kv: own_kv as u64,
        }
    }

    /// Returns the parameters of layer `index`, in the model's order.
    fn layer_parameters(&self, index: usize, unit: usize) -> Vec<ParameterShape> {
        let model = &self.config.model;
        let shape = self.mesh.shape();
        let hidden = model.hidden as u64;
        let width = model.head_dim() as u64;
        let heads = self.heads();
        let query_rows = heads.queries * width;
        let kv_rows = heads.kv * width;
        let kv_replicas = if self.splits_kv_heads() {
            Replicas::Dense
        } else {
            Replicas::Stage
        };
        let tensor = shape.tensor as u64;
        let mut shapes = Vec::new();
        let mut add = |rows: u64, cols: u64, replicas| {
            shapes.push(ParameterShape {
                rows,
                cols,
                replicas,
                unit,
            });
        };
        add(hidden, 1, Replicas::Stage);
        add(query_rows, hidden, Replicas::Dense);
        add(kv_rows, hidden, kv_replicas);
        add(kv_rows, hidden, kv_replicas);
        match model.qk_norm {
            QkNorm::None => {}
            QkNorm::Full => {
                add(query_rows, 1, Replicas::Dense);
                add(kv_rows, 1, kv_replicas);
            }
            QkNorm::Head => {
                add(width, 1, Replicas::Stage);
                add(width, 1, Replicas::Stage);
            }
        }
        add(hidden, query_rows, Replicas::Dense);
        add(hidden, 1, Replicas::Stage);
        let mut add_swiglu = |copies: u64, ffn: u64, replicas| {
            add(copies * 2 * ffn, hidden, replicas);
            add(copies * hidden, ffn, replicas);
        };
        match model.moe_config(index) {
            None => {
                let ffn = model.ffn.unwrap_or(0) as u64;
                add_swiglu(1, ffn / tensor, Replicas::Dense);
            }
            Some(moe) => {
                let experts = (moe.experts / shape.expert) as u64;
                let columns = (moe.ffn / shape.expert_tensor) as u64;
                add_swiglu(experts, columns, Replicas::Expert);
                if moe.shared_experts > 0 {
                    let ffn = (moe.shared_experts * moe.ffn) as u64;
                    add_swiglu(1, ffn / tensor, Replicas::Dense);
                }
                add(moe.experts as u64, hidden, Replicas::Stage);
            }
        }
        shapes
    }

    /// Returns all parameters of `part`, in the model's order.
    fn parameters(&self, part: &ModelPart) -> Vec<ParameterShape> {
        let tie_embeddings = self.config.model.tie_embeddings;
        let hidden = self.config.model.hidden as u64;
        let rows = self.vocabulary_rows(part);
        let shares_vocabulary = part.vocabulary.is_some();
        let is_split = part.has_first() != part.has_last();
        let embedding_replicas = if tie_embeddings && !shares_vocabulary && is_split {
            Replicas::TiedEmbedding
        } else {
            Replicas::Dense
        };
        let vocabulary = |unit| ParameterShape {
            rows,
            cols: hidden,
            replicas: embedding_replicas,
            unit,
        };
        let mut unit = 0;
        let mut shapes = Vec::new();
        let has_embedding = shares_vocabulary || part.has_first();
        if has_embedding {
            shapes.push(vocabulary(unit));
        }
        for layer in part.stages.iter().flat_map(|stage| stage.layers.clone()) {
            unit += 1;
            shapes.extend(self.layer_parameters(layer, unit));
        }
        if part.has_last() {
            unit += 1;
            shapes.push(ParameterShape {
                rows: hidden,
                cols: 1,
                replicas: Replicas::Stage,
                unit,
            });
        }
        let has_head = shares_vocabulary || part.has_last();
        if has_head && !(tie_embeddings && has_embedding) {
            unit += 1;
            shapes.push(vocabulary(unit));
        }
        shapes
    }

    /// Returns the rows of embedding and output layer on this rank.
    fn vocabulary_rows(&self, part: &ModelPart) -> u64 {
        let shard = part.vocabulary.unwrap_or(VocabularyShard {
            rank: self.mesh.coordinates().tensor,
            ranks: self.mesh.shape().tensor,
        });
        shard.rows(self.config.model.vocab_size).len() as u64
    }

    /// Returns the tokens at this rank's experts, which are as many as it gets back.
    fn routed_tokens(&self, moe: &MoeConfig) -> u64 {
        self.own_tokens * (moe.top_k * self.mesh.shape().expert_tensor) as u64
    }

    fn layer_activations(&self, index: usize) -> LayerActivations {
        let model = &self.config.model;
        let recompute = &self.config.parallel.recompute;
        let shape = self.mesh.shape();
        let hidden = model.hidden as u64;
        let stream = self.own_tokens * hidden * self.element;
        // The inputs of both norms, and their outputs.
        let mut saved = 2 * stream;
        if recompute.keeps(RecomputedPart::Norm) {
            saved += 2 * stream;
        }
        saved += self.attention_activations();
        let mut transient = self.attention_transient();
        let mut add_swiglu = |rows: u64, ffn: u64| {
            let gate_up = rows * 2 * ffn * self.element;
            let half = rows * ffn * self.element;
            if recompute.keeps(RecomputedPart::Experts) {
                saved += gate_up;
            }
            // Gradients of the gate-up output and of the activation, the activation itself, and
            // the gradient of the rows.
            let backward = gate_up + 3 * half + 3 * rows * hidden * self.element;
            transient = transient.max(backward);
        };
        let tensor = shape.tensor as u64;
        match model.moe_config(index) {
            None => add_swiglu(self.tokens, model.ffn.unwrap_or(0) as u64 / tensor),
            Some(moe) => {
                let rows = self.routed_tokens(moe);
                add_swiglu(rows, (moe.ffn / shape.expert_tensor) as u64);
                if moe.shared_experts > 0 {
                    let ffn = (moe.shared_experts * moe.ffn) as u64;
                    add_swiglu(self.tokens, ffn / tensor);
                }
                // Rows at the experts.
                if recompute.keeps(RecomputedPart::Dispatch) {
                    saved += rows * hidden * self.element;
                }
                // Rows that come back, router scores, indices.
                saved += rows * hidden * self.element;
                saved += 3 * self.own_tokens * moe.experts as u64 * FP32_BYTES;
                saved += 4 * rows * 8;
            }
        }
        if recompute.recomputes_layer(index) {
            // The experts of each token, and the routes of the rows.
            let routing = |moe| self.routed_tokens(moe) * (8 + 4 * 4);
            LayerActivations {
                saved: stream + model.moe_config(index).map_or(0, routing),
                transient: transient + saved,
            }
        } else {
            LayerActivations { saved, transient }
        }
    }

    /// Returns the bytes that attention saves for backward.
    fn attention_activations(&self) -> u64 {
        let config = self.config;
        let width = config.model.head_dim() as u64;
        let heads = self.heads();
        let queries = self.tokens * heads.queries * width * self.element;
        let keys = self.tokens * heads.kv * width * self.element;
        let log_sum_exps = self.tokens * heads.queries * FP32_BYTES;
        // libtorch's own attention saves keys and values once per query head.
        let is_ring = self.mesh.shape().context > 1;
        let on_host = config.run.device == "cpu";
        let is_causal = config.data.eod_token.is_none();
        let repeats_keys = !(is_ring || on_host && is_causal);
        let keeps_output = config.parallel.recompute.keeps(RecomputedPart::Attention);
        let mut saved = if keeps_output && repeats_keys {
            4 * queries + log_sum_exps
        } else if keeps_output {
            2 * queries + 2 * keys + log_sum_exps
        } else {
            2 * queries + 2 * keys
        };
        if config.model.qk_norm != QkNorm::None {
            saved += queries + keys;
        }
        saved
    }

    /// Returns the bytes of backward's temporary tensors: the gradients of what attention saves,
    /// and four fp32 rows per token for a norm.
    fn attention_transient(&self) -> u64 {
        let model = &self.config.model;
        let width = model.head_dim() as u64;
        let queries = self.tokens * self.heads().queries * width * self.element;
        let norm = self.own_tokens * model.hidden as u64 * FP32_BYTES;
        4 * queries + 4 * norm
    }

    /// Returns the bytes that all layers of `part` save for one microbatch, and the largest set of
    /// temporary tensors of a layer's backward or the loss.
    fn activations(&self, part: &ModelPart) -> LayerActivations {
        let hidden = self.config.model.hidden as u64;
        let rows = self.vocabulary_rows(part);
        let shares_vocabulary = part.vocabulary.is_some();
        let states = self.tokens * hidden * self.element;
        let limit = logits_chunk_bytes(self.config.run.device == "cpu") as u64;
        let logits = limit.min(self.tokens * rows * FP32_BYTES);
        let mut saved = 0;
        let mut largest = 0;
        for stage in &part.stages {
            for layer in stage.layers.clone() {
                let of_layer = self.layer_activations(layer);
                saved += of_layer.saved;
                largest = largest.max(of_layer.transient);
            }
            if stage.last {
                saved += 2 * self.own_tokens * hidden * self.element;
            }
            if stage.last && !shares_vocabulary {
                largest = largest.max(3 * logits + 2 * states);
            }
        }
        if shares_vocabulary {
            // The softmax of a microbatch lives from S to T; few fp32 logits exist at once.
            largest += 2 * logits + self.tokens * rows * self.element + 6 * states;
        }
        LayerActivations {
            saved,
            transient: largest,
        }
    }
}

/// Parameters of a rank, and how ZeRO shards them.
struct Shards<'a> {
    config: &'a Config,
    mesh: Mesh,
    shapes: Vec<ParameterShape>,
    /// Bytes of an element in the model's dtype.
    element: u64,
}

impl Shards<'_> {
    fn zero_rank_and_size(&self, replicas: Replicas) -> (usize, usize) {
        zero_rank_and_size(&self.mesh, &self.config.parallel, replicas)
    }

    fn is_sharded(&self, shape: &ParameterShape) -> bool {
        self.zero_rank_and_size(shape.replicas).1 > 1
    }

    /// Returns the elements of `shape` that this rank updates.
    fn own_elements(&self, shape: &ParameterShape) -> u64 {
        let (rank, ranks) = self.zero_rank_and_size(shape.replicas);
        let own = own_rows(shape.rows as i64, rank, ranks);
        (own.end - own.start) as u64 * shape.cols
    }

    /// Returns all elements that this rank updates.
    fn updated(&self) -> u64 {
        self.shapes.iter().map(|s| self.own_elements(s)).sum()
    }

    /// Returns the bytes of the experts' weights in 8 bits, for forward and for backward.
    fn rounded_bytes(&self) -> u64 {
        if !self.config.train.fp8_experts {
            return 0;
        }
        let of_experts = |shape: &&ParameterShape| shape.replicas == Replicas::Expert;
        let elements = self
            .shapes
            .iter()
            .filter(of_experts)
            .map(ParameterShape::elements);
        2 * elements.sum::<u64>()
    }

    fn unsharded(&self) -> u64 {
        self.shapes.iter().map(ParameterShape::elements).sum()
    }

    /// Returns the elements of a rank that keeps only its own rows of sharded parameters.
    fn fully_sharded(&self) -> u64 {
        let kept = |shape: &ParameterShape| {
            if self.is_sharded(shape) {
                self.own_elements(shape)
            } else {
                shape.elements()
            }
        };
        self.shapes.iter().map(kept).sum()
    }

    fn sharded(&self) -> impl Iterator<Item = &ParameterShape> {
        self.shapes.iter().filter(|shape| self.is_sharded(shape))
    }

    fn weight_bytes(&self) -> u64 {
        match self.config.parallel.zero {
            3 => self.fully_sharded() * self.element,
            _ => self.unsharded() * self.element,
        }
    }

    /// Returns the bytes of gathered weights: those of the largest unit, three times, for a layer
    /// and the next one, as they arrive and as they are used.
    fn gathered_weight_bytes(&self) -> u64 {
        if self.config.parallel.zero != 3 {
            return 0;
        }
        let units = self.shapes.iter().map(|shape| shape.unit);
        let of_unit = |unit: usize| {
            let members = self.sharded().filter(|shape| shape.unit == unit);
            members.map(ParameterShape::elements).sum::<u64>() * self.element
        };
        units.map(of_unit).max().unwrap_or(0) * 3
    }

    fn gradient_bytes(&self) -> u64 {
        let elements = match self.config.parallel.zero {
            0 => self.unsharded(),
            1 => {
                let own: u64 = self.sharded().map(|s| self.own_elements(s)).sum();
                self.unsharded() + own
            }
            _ => self.fully_sharded(),
        };
        elements * FP32_BYTES
    }

    /// Returns the bytes of gradient buckets under ZeRO 2 and 3: one that accumulates, two in
    /// transfer, and two received shards.
    fn bucket_bytes(&self) -> u64 {
        let parallel = &self.config.parallel;
        if parallel.zero < 2 {
            return 0;
        }
        let sharded: Vec<&ParameterShape> = self.sharded().collect();
        let lengths: Vec<(usize, usize)> = sharded
            .iter()
            .map(|shape| (shape.elements() as usize, shape.replicas as usize))
            .collect();
        let buckets = plan_buckets(&lengths, (parallel.bucket_mib * 262144.0) as usize);
        let elements = |bucket: &BucketPlan| {
            let replicas = sharded[bucket.members[0]].replicas;
            let (_, ranks) = self.zero_rank_and_size(replicas);
            3 * bucket.len as u64 + 2 * (bucket.len / ranks) as u64
        };
        buckets.iter().map(elements).max().unwrap_or(0) * FP32_BYTES
    }
}

impl Config {
    /// Estimates the memory of each of `ranks` ranks.
    ///
    /// # Errors
    /// If the configuration cannot run on `ranks` ranks.
    pub fn memory(&self, ranks: usize) -> Result<Vec<RankMemory>, String> {
        self.memory_of(0..ranks, ranks)
    }

    /// Estimates the memory of some of `ranks` ranks.
    ///
    /// # Errors
    /// If the configuration cannot run on `ranks` ranks, or there is too much to estimate.
    pub fn memory_of(&self, wanted: Range<usize>, ranks: usize) -> Result<Vec<RankMemory>, String> {
        let mesh = self.mesh(0, ranks)?;
        let layers = self.model.layers.div_ceil(self.parallel.pipeline);
        if wanted.len().saturating_mul(layers) > MAX_ESTIMATED_LAYERS {
            return Err(format!(
                "the memory of {} ranks with {layers} of model.layers each takes too long to \
                 estimate; ranks x layers may be {MAX_ESTIMATED_LAYERS}",
                wanted.len()
            ));
        }
        let plan = self.pipeline_plan(self.microbatches(&mesh, self.largest_batch()))?;
        let order = &plan.schedule.order;
        let timeline = simulate(&plan.schedule, &self.costs(order, &plan.layers));
        let mut memory = Vec::new();
        for rank in wanted {
            let mesh = self.mesh(rank, ranks)?;
            let coordinates = mesh.coordinates();
            let split = PipelineSplit {
                ranks: mesh.shape().pipeline,
                placement: order.placement,
                layers: &plan.layers,
                shares_vocabulary: order.vocabulary.is_some(),
                tensor_ranks: mesh.shape().tensor,
            };
            let part = split.part(coordinates.pipeline, coordinates.tensor);
            let in_flight = timeline.peak_microbatches[coordinates.pipeline];
            memory.push(self.rank_memory(mesh, part, in_flight));
        }
        Ok(memory)
    }

    fn rank_memory(&self, mesh: Mesh, part: ModelPart, in_flight: f64) -> RankMemory {
        let shape = mesh.shape();
        let sequence = self.data.sequence_length;
        let tokens = (self.train.micro_batch * sequence / shape.context) as u64;
        let element = if self.train.dtype == Dtype::Bf16 {
            2
        } else {
            FP32_BYTES
        };
        let sizes = RankSizes {
            config: self,
            mesh,
            tokens,
            own_tokens: tokens / shape.tensor as u64,
            element,
        };
        let shards = Shards {
            config: self,
            mesh,
            shapes: sizes.parameters(&part),
            element,
        };
        let parameters = shards.updated();
        // In fp32 the weights are the masters, unless those are in host memory.
        let is_offloaded = self.optimizer.offload && self.run.device != "cpu";
        let moments = 2 * FP32_BYTES * parameters;
        let moments_and_masters = 3 * FP32_BYTES * parameters;
        let has_masters = element != FP32_BYTES;
        let optimizer = if is_offloaded {
            0
        } else if has_masters {
            moments_and_masters
        } else {
            moments
        };
        let activations = sizes.activations(&part);
        RankMemory {
            rank: mesh.rank(),
            coordinates: mesh.coordinates(),
            stages: part.stages,
            parameters,
            weights: shards.weight_bytes() + shards.rounded_bytes(),
            gradients: shards.gradient_bytes(),
            optimizer,
            host: if is_offloaded { moments_and_masters } else { 0 },
            microbatches_in_flight: in_flight,
            activations: (activations.saved as f64 * in_flight) as u64,
            transient: shards.gathered_weight_bytes()
                + shards.bucket_bytes()
                + activations.transient,
        }
    }
}
