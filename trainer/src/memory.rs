//! Estimate of each rank's memory before a run: bytes of tensors, as plain arithmetic.
//!
//! Parameters are exact. Activations are what the layers' autograd nodes save, for as many
//! microbatches as the schedule has in flight. Expert load is assumed to be even.

use crate::{
    backward_memory::{BucketMemory, UnitMemory, peak},
    config::{Config, Dtype, MAX_ESTIMATED_LAYERS},
    model::{
        ModelPart, PipelineSplit, StagePart,
        activations::{Activations, BlockShape, FP32_BYTES, SequenceShape},
        core_plan::SharedMask,
        decoder::{layer_activations, model_specs, part_units},
        loss::{OutputShape, loss_bytes},
        part::HeadWeight,
        position::ShardPosition,
        replicas::Replicas,
        role::Role,
        spec::ParamSpec,
        vocabulary::softmax_bytes,
    },
    optim::{HeldMatrices, exchange_bytes, groups::Groups},
    replica_ranks::zero_rank_and_size,
};
use parallel::{
    BucketPlan, MAX_REDUCTIONS, Mesh,
    context::ContextKind,
    matrix_shape, own_rows,
    pipeline::{Vocabulary, simulate::simulate},
    plan_buckets,
};
use std::{
    collections::{HashMap, hash_map::Entry},
    ops::Range,
};

/// Bytes of a token's position in its document.
const POSITION_BYTES: u64 = 8;

/// Ranks of one pipeline stage that hold equally much.
#[derive(Debug, Clone, PartialEq)]
pub struct EqualRanks {
    /// Numbers of the ranks, ascending.
    pub ranks: Vec<usize>,
    /// Memory of each of them.
    pub memory: RankMemory,
}

/// Memory of one rank, in bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct RankMemory {
    /// Layers of each model chunk.
    pub stages: Vec<StagePart>,
    /// Number of parameters that the rank updates.
    pub parameters: u64,
    /// Weights in the model's dtype, and those of experts in 8 bits.
    pub weights: u64,
    /// Gradients during a step.
    pub gradients: u64,
    /// Optimizer state, and fp32 masters of a bf16 model. Zero with `optimizer.offload`.
    pub optimizer: u64,
    /// Optimizer state and fp32 masters that `optimizer.offload` keeps in host memory. Not part of
    /// [`RankMemory::total`].
    pub host: u64,
    /// Microbatches whose activations exist at once.
    pub microbatches_in_flight: f64,
    /// Tensors that forward saves for backward.
    pub activations: u64,
    /// The largest set of short-lived tensors: a layer's backward, the loss, gathered weights, or
    /// the optimizer's whole matrices.
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
    role: Role,
    /// Elements of each whole matrix.
    matrix: u64,
    /// Elements of all whole matrices of all ranks.
    all_matrices: u128,
    /// Number of the unit that is gathered together.
    unit: usize,
}

impl ParameterShape {
    fn elements(&self) -> u64 {
        self.rows * self.cols
    }
}

/// Parameters of the ranks with one pipeline and one tensor coordinate.
struct HeldPart {
    part: ModelPart,
    shapes: Vec<ParameterShape>,
}

/// Figures by which ranks of one mesh differ in their memory.
#[derive(PartialEq, Eq, Hash)]
struct Place {
    pipeline: usize,
    vocabulary_rows: u64,
    /// Rows that ZeRO leaves to the rank, of each distinct kind of parameter.
    own_rows: Vec<i64>,
}

/// Bytes of tensors that layers share.
#[derive(Debug, Clone, Copy, Default)]
struct SharedBytes {
    /// Masks of the documents of one microbatch, and positions in them.
    per_microbatch: u64,
    /// Masks and tables of positions that live as long as the model.
    lasting: u64,
}

/// Sizes that all layers of a rank share.
struct RankSizes<'a> {
    config: &'a Config,
    mesh: Mesh,
    /// Algorithm of vocabulary parallelism, if the ranks of a pipeline share the vocabulary.
    vocabulary: Option<Vocabulary>,
    /// Tokens of a microbatch inside a block, where tensor-parallel ranks split the matrices.
    tokens: u64,
    /// Tokens of a microbatch between blocks, where tensor-parallel ranks split the tokens.
    own_tokens: u64,
    /// Bytes of an element in the model's dtype.
    element: u64,
}

impl Config {
    /// Returns the sequences of a microbatch.
    pub(crate) fn sequence_shape(&self) -> SequenceShape {
        let parallel = &self.parallel;
        SequenceShape {
            count: self.train.micro_batch,
            length: self.data.sequence_length,
            has_documents: self.data.keeps_documents_apart(),
            in_ring: parallel.context > 1 && parallel.context_attention == ContextKind::Ring,
        }
    }
}

impl RankSizes<'_> {
    /// Returns all parameters of `part`, in the model's order.
    fn parameters(&self, part: &ModelPart) -> Vec<ParameterShape> {
        let position = self.position(part);
        let units = part_units(&self.config.model, part);
        let shape = |unit: usize, spec: &ParamSpec| {
            let (rows, cols) = matrix_shape(&spec.local_shape(&position));
            ParameterShape {
                rows: rows as u64,
                cols: cols as u64,
                replicas: spec.replicas(&position),
                role: spec.role,
                matrix: spec.matrix_shape().iter().product::<i64>() as u64,
                all_matrices: spec.elements(),
                unit,
            }
        };
        let numbered = units.iter().enumerate();
        numbered
            .flat_map(|(unit, specs)| specs.iter().map(move |spec| shape(unit, spec)))
            .collect()
    }

    fn position(&self, part: &ModelPart) -> ShardPosition {
        ShardPosition::on_mesh(&self.mesh).with_part(self.config.model.tie_embeddings, part)
    }

    /// Returns the rows of embedding and output layer on this rank.
    fn vocabulary_rows(&self, part: &ModelPart) -> u64 {
        let share = self.position(part).vocabulary;
        share.part(self.config.model.vocab_size).len() as u64
    }

    fn block_shape(&self) -> BlockShape<'_> {
        BlockShape {
            mesh: self.mesh.shape(),
            tokens: self.tokens,
            own_tokens: self.own_tokens,
            element: self.element,
            recompute: &self.config.parallel.recompute,
            on_host: self.config.run.device == "cpu",
            sequences: self.config.sequence_shape(),
        }
    }

    /// Returns the bytes of the masks and positions that the layers of `part` share.
    fn shared(&self, part: &ModelPart) -> SharedBytes {
        let BlockShape {
            sequences, on_host, ..
        } = self.block_shape();
        let layers = part.stages.iter().flat_map(|stage| stage.layers.clone());
        let mut bytes = self.positions();
        for mask in self.config.model.shared_masks(layers, &sequences, on_host) {
            let of_mask = mask.elements(&sequences) as u64 * self.element;
            match mask {
                SharedMask::Documents(_) => bytes.per_microbatch += of_mask,
                SharedMask::Window(_) => bytes.lasting += of_mask,
            }
        }
        bytes
    }

    /// Returns the bytes of positions that begin at 0 in each document. Tables of a rank's own
    /// positions are not counted: they are small, and sequences that are one text have them, too.
    fn positions(&self) -> SharedBytes {
        if !self.config.data.reset_positions {
            return SharedBytes::default();
        }
        let model = &self.config.model;
        let length = self.config.data.sequence_length as u64;
        let of_others = length - length / self.mesh.shape().context as u64;
        let width = model.attention(0).rotary_part().width;
        SharedBytes {
            per_microbatch: self.tokens * POSITION_BYTES,
            lasting: model.rope.table_bytes(width, of_others, self.element),
        }
    }

    /// Returns the bytes of a tensor between blocks.
    fn stream(&self) -> u64 {
        self.own_tokens * self.config.model.hidden as u64 * self.element
    }

    /// Returns the activations of the units of `part`, in the order of [`part_units`]. An output
    /// layer with the weights of the embedding is one more unit.
    fn units(&self, part: &ModelPart) -> Vec<UnitMemory> {
        let ends = part.ends(self.config.model.tie_embeddings);
        let mut units = Vec::new();
        if ends.embedding {
            units.push(UnitMemory::default());
        }
        for (number, stage) in part.stages.iter().enumerate() {
            for layer in stage.layers.clone() {
                let Activations { saved, transient } =
                    layer_activations(&self.config.model, layer, &self.block_shape());
                units.push(UnitMemory {
                    stage: Some(number),
                    saved,
                    transient,
                    ..UnitMemory::default()
                });
            }
        }
        if ends.norm {
            units.push(UnitMemory {
                saved: self.stream(),
                // Gradients of output and input.
                transient: 2 * self.stream(),
                ..UnitMemory::default()
            });
        }
        if ends.head != HeadWeight::None {
            units.push(UnitMemory {
                transient: self.loss(part),
                ..UnitMemory::default()
            });
        }
        units
    }

    fn output_shape(&self, part: &ModelPart) -> OutputShape {
        OutputShape {
            tokens: self.tokens,
            hidden: self.config.model.hidden as u64,
            rows: self.vocabulary_rows(part),
            element: self.element,
            on_host: self.config.run.device == "cpu",
        }
    }

    /// Returns the bytes of temporary tensors of a loss that the last stage computes.
    fn loss(&self, part: &ModelPart) -> u64 {
        let is_split = self.mesh.shape().tensor > 1;
        match part.vocabulary {
            Some(_) => 0,
            None => loss_bytes(&self.output_shape(part), is_split),
        }
    }

    /// Returns the bytes of a message of another stage that arrives while this one computes.
    fn message(&self) -> u64 {
        match self.mesh.shape().pipeline {
            1 => 0,
            _ => self.stream(),
        }
    }

    /// Returns the bytes of one microbatch between the passes of vocabulary parallelism.
    fn softmax(&self, part: &ModelPart) -> u64 {
        let bytes = |algorithm| softmax_bytes(&self.output_shape(part), algorithm);
        self.vocabulary.map_or(0, bytes)
    }

    /// Returns the bytes that forward saves of one microbatch. Each stage keeps its output until
    /// backward.
    fn saved(&self, part: &ModelPart, units: &[UnitMemory]) -> u64 {
        let of_units: u64 = units.iter().map(|unit| unit.saved).sum();
        self.shared(part).per_microbatch + of_units + part.stages.len() as u64 * self.stream()
    }
}

/// Parameters of a rank, and how ZeRO shards them.
struct Shards<'a> {
    config: &'a Config,
    mesh: Mesh,
    shapes: &'a [ParameterShape],
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
        self.own_rows(shape) as u64 * shape.cols
    }

    fn own_rows(&self, shape: &ParameterShape) -> i64 {
        let (rank, ranks) = self.zero_rank_and_size(shape.replicas);
        let own = own_rows(shape.rows as i64, rank, ranks);
        own.end - own.start
    }

    /// Returns all elements that this rank updates.
    fn updated(&self) -> u64 {
        self.shapes.iter().map(|s| self.own_elements(s)).sum()
    }

    /// Returns the bytes of the optimizer's state.
    fn state_bytes(&self) -> u64 {
        let groups = self.config.optimizer_groups();
        let of_shape =
            |shape: &ParameterShape| self.own_elements(shape) * groups.state_bytes(shape.role);
        self.shapes.iter().map(of_shape).sum()
    }

    /// Returns the bytes of the whole matrices that an optimizer transforms at once.
    fn matrix_bytes(&self) -> u64 {
        let groups = self.config.optimizer_groups();
        let stage_ranks = self.mesh.size() / self.mesh.shape().pipeline;
        let held = |shape: &ParameterShape| HeldMatrices {
            matrix: shape.matrix,
            per_rank: shape.all_matrices as f64 / stage_ranks as f64,
            held: self.own_elements(shape),
        };
        // Groups follow each other.
        let of_group = |&role: &Role| {
            let kind = groups.matrix_kind(role)?;
            let members = self.shapes.iter();
            let members = members.filter(|shape| groups.are_together(role, shape.role));
            Some(exchange_bytes(members.map(held), kind))
        };
        Role::ALL.iter().filter_map(of_group).max().unwrap_or(0)
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

    /// Adds the weights that ZeRO-3 gathers to the units that need them.
    fn add_gathers(&self, units: &mut [UnitMemory]) {
        if self.config.parallel.zero != 3 {
            return;
        }
        for shape in self.sharded() {
            let unit = &mut units[shape.unit];
            unit.gathered += shape.elements() * self.element;
            unit.arriving += self.exchanged_elements(shape) * self.element;
        }
    }

    /// Returns the elements of `shape` in a collective that moves the rows of all ranks, and those
    /// of this rank. Rows are padded to those of the first rank.
    fn exchanged_elements(&self, shape: &ParameterShape) -> u64 {
        let (_, ranks) = self.zero_rank_and_size(shape.replicas);
        let padded = own_rows(shape.rows as i64, 0, ranks).end as u64;
        (ranks as u64 + 1) * padded * shape.cols
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

    /// Returns the buckets of sharded gradients. `last_use` is the last unit that uses the weights
    /// of another one.
    fn buckets(&self, last_use: impl Fn(usize) -> usize) -> Vec<BucketMemory> {
        let parallel = &self.config.parallel;
        let sharded: Vec<&ParameterShape> = self.sharded().collect();
        let lengths: Vec<(usize, usize)> = sharded
            .iter()
            .map(|shape| (shape.elements() as usize, shape.replicas as usize))
            .collect();
        let keeps_full = parallel.zero < 2;
        let bucket = |plan: BucketPlan| {
            let members = || plan.members.iter().map(|&member| sharded[member]);
            let units = members().map(|shape| shape.unit);
            let last_uses = members().map(|shape| last_use(shape.unit));
            let exchanged: u64 = members().map(|shape| self.exchanged_elements(shape)).sum();
            BucketMemory {
                first: units.min().unwrap_or(0),
                last: last_uses.max().unwrap_or(0),
                open: if keeps_full { 0 } else { plan.len as u64 } * FP32_BYTES,
                reduction: exchanged * FP32_BYTES,
            }
        };
        let capacity = (parallel.bucket_mib * 262144.0) as usize;
        let plans = plan_buckets(&lengths, capacity);
        plans.into_iter().map(bucket).collect()
    }
}

impl Config {
    fn optimizer_groups(&self) -> Groups {
        Groups::new(&self.optimizer, self.train.dtype.kind())
    }

    /// Returns the bytes of a checkpoint: fp32 weights and optimizer state.
    pub fn checkpoint_bytes(&self) -> u128 {
        let groups = self.optimizer_groups();
        let bytes = |spec: ParamSpec| {
            spec.elements() * u128::from(FP32_BYTES + groups.state_bytes(spec.role))
        };
        model_specs(&self.model).map(bytes).sum()
    }

    /// Estimates the memory of each of `ranks` ranks.
    ///
    /// # Errors
    /// If the configuration cannot run on `ranks` ranks.
    pub fn memory(&self, ranks: usize) -> Result<Vec<EqualRanks>, String> {
        self.memory_of(0..ranks, ranks)
    }

    /// Estimates the memory of some of `ranks` ranks, in the order of the first of equal ranks.
    ///
    /// # Errors
    /// If the configuration cannot run on `ranks` ranks, or there is too much to estimate.
    pub fn memory_of(&self, wanted: Range<usize>, ranks: usize) -> Result<Vec<EqualRanks>, String> {
        let mesh = self.mesh(0, ranks)?;
        let shape = mesh.shape();
        let layers = self.model.layers.div_ceil(shape.pipeline);
        let plan = self.pipeline_plan(self.microbatches(&mesh, self.largest_batch()))?;
        let order = &plan.schedule.order;
        let timeline = simulate(&plan.schedule, &self.costs(order, &plan.layers));
        let split = PipelineSplit {
            ranks: shape.pipeline,
            placement: order.placement,
            layers: &plan.layers,
            shares_vocabulary: order.vocabulary.is_some(),
            tensor_ranks: shape.tensor,
        };
        let mut held_parts: HashMap<[usize; 2], HeldPart> = HashMap::new();
        let mut places: HashMap<Place, usize> = HashMap::new();
        let mut equal: Vec<EqualRanks> = Vec::new();
        for rank in wanted {
            let sizes = self.rank_sizes(self.mesh(rank, ranks)?, order.vocabulary);
            let at = sizes.mesh.coordinates();
            let held = held_parts
                .entry([at.pipeline, at.tensor])
                .or_insert_with(|| sizes.held_part(split.part(at.pipeline, at.tensor)));
            match places.entry(sizes.place(held)) {
                Entry::Occupied(known) => equal[*known.get()].ranks.push(rank),
                Entry::Vacant(new) => {
                    new.insert(equal.len());
                    equal.push(EqualRanks {
                        ranks: vec![rank],
                        memory: sizes.memory(held, timeline.peak_microbatches[at.pipeline]),
                    });
                }
            }
            if equal.len().saturating_mul(layers) > MAX_ESTIMATED_LAYERS {
                return Err(format!(
                    "the memory of {ranks} ranks with {layers} of model.layers each takes too \
                     long to estimate: more than {} of them differ",
                    equal.len() - 1
                ));
            }
        }
        Ok(equal)
    }

    /// Returns the sizes that the layers of a rank share.
    fn rank_sizes(&self, mesh: Mesh, vocabulary: Option<Vocabulary>) -> RankSizes<'_> {
        let shape = mesh.shape();
        let tokens = (self.train.micro_batch * self.data.sequence_length / shape.context) as u64;
        RankSizes {
            config: self,
            mesh,
            vocabulary,
            tokens,
            own_tokens: tokens / shape.tensor as u64,
            element: if self.train.dtype == Dtype::Bf16 {
                2
            } else {
                FP32_BYTES
            },
        }
    }
}

impl RankSizes<'_> {
    fn held_part(&self, part: ModelPart) -> HeldPart {
        HeldPart {
            shapes: self.parameters(&part),
            part,
        }
    }

    fn shards<'a>(&'a self, held: &'a HeldPart) -> Shards<'a> {
        Shards {
            config: self.config,
            mesh: self.mesh,
            shapes: &held.shapes,
            element: self.element,
        }
    }

    fn place(&self, held: &HeldPart) -> Place {
        let shards = self.shards(held);
        let mut kinds: Vec<&ParameterShape> = Vec::new();
        for shape in shards.sharded() {
            let is_alike =
                |kind: &&ParameterShape| kind.replicas == shape.replicas && kind.rows == shape.rows;
            if !kinds.iter().any(is_alike) {
                kinds.push(shape);
            }
        }
        Place {
            pipeline: self.mesh.coordinates().pipeline,
            vocabulary_rows: self.vocabulary_rows(&held.part),
            own_rows: kinds
                .into_iter()
                .map(|kind| shards.own_rows(kind))
                .collect(),
        }
    }

    /// Estimates the memory of this rank, which holds `held` and the activations of `in_flight`
    /// microbatches.
    fn memory(&self, held: &HeldPart, in_flight: f64) -> RankMemory {
        let shards = self.shards(held);
        let parameters = shards.updated();
        // In fp32 the weights are the masters, unless those are in host memory.
        let is_offloaded = self.config.optimizer.offload && self.config.run.device != "cpu";
        let state = shards.state_bytes();
        let state_and_masters = state + FP32_BYTES * parameters;
        let has_masters = self.element != FP32_BYTES;
        let optimizer = if is_offloaded {
            0
        } else if has_masters {
            state_and_masters
        } else {
            state
        };
        let mut units = self.units(&held.part);
        let saved = (self.saved(&held.part, &units) as f64 * in_flight) as u64;
        shards.add_gathers(&mut units);
        let ends = held.part.ends(self.config.model.tie_embeddings);
        let last_use = |unit: usize| match ends.head {
            HeadWeight::Embedding if unit == 0 => units.len() - 1,
            _ => unit,
        };
        let buckets = shards.buckets(last_use);
        let in_backward = peak(&units, &buckets, MAX_REDUCTIONS);
        let transient = in_backward + self.softmax(&held.part) + self.message();
        // The optimizer runs when the activations of the step are gone.
        let in_optimizer = shards.matrix_bytes().saturating_sub(saved);
        RankMemory {
            stages: held.part.stages.clone(),
            parameters,
            weights: shards.weight_bytes() + shards.rounded_bytes(),
            gradients: shards.gradient_bytes(),
            optimizer,
            host: if is_offloaded { state_and_masters } else { 0 },
            microbatches_in_flight: in_flight,
            activations: saved,
            transient: self.shared(&held.part).lasting + transient.max(in_optimizer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn config(parallel: Value, changes: Value) -> Config {
        let mut config = json!({
            "run": {"dir": "runs/x"},
            "parallel": parallel,
            "model": {"vocab_size": 331, "hidden": 48, "layers": 6, "heads": 4, "kv_heads": 2,
                      "moe": {"experts": 4, "top_k": 2, "ffn": 40}},
            "data": {"train": [{"path": "a"}], "sequence_length": 32},
            "train": {"steps": 1, "global_batch": 48, "micro_batch": 1},
        });
        for (key, value) in changes.as_object().unwrap() {
            config["model"][key] = value.clone();
        }
        serde_json::from_value(config).unwrap()
    }

    #[test]
    fn state_follows_the_optimizers() {
        let mut config = config(json!({}), json!({}));
        let mut memory = |optimizer: Value| {
            config.optimizer = serde_json::from_value(optimizer).unwrap();
            let memory = config.memory(1).unwrap().remove(0).memory;
            (memory, config.checkpoint_bytes())
        };
        let (adamw, saved) = memory(json!({}));
        let all = adamw.parameters;
        assert_eq!(adamw.optimizer, 8 * all);
        assert_eq!(saved, 12 * u128::from(all));
        let (rounded, saved) = memory(json!({"state_dtype": "bf16"}));
        assert_eq!(rounded.optimizer, 4 * all);
        assert_eq!(saved, 8 * u128::from(all));
        let (plain, saved) = memory(json!({"groups": [{"sgd": {"momentum": 0}}]}));
        assert_eq!(plain.optimizer, 0);
        assert_eq!(saved, 4 * u128::from(all));
        let (muon, saved) = memory(json!({"groups": [{"muon": {}}]}));
        let specs = model_specs(&config.model);
        let matrices = specs.filter(|spec| matches!(spec.role, Role::Matrix | Role::Expert));
        let matrices = matrices.map(|spec| spec.elements() as u64).sum::<u64>();
        assert_eq!(muon.optimizer, 8 * all - 4 * matrices);
        assert_eq!(saved, 12 * u128::from(all) - 4 * u128::from(matrices));
        assert!(matrices > all / 2 && muon.transient >= adamw.transient);
    }

    #[test]
    fn exchanged_matrices_take_bounded_memory() {
        let layers = json!({"hidden": 2048, "heads": 16, "layers": 8,
                            "moe": {"experts": 32, "top_k": 2, "ffn": 1024}});
        let transient = |ranks: usize, muon: Value| {
            let mut config = config(json!({}), layers.clone());
            config.train.global_batch = serde_json::from_value(json!(ranks)).unwrap();
            config.optimizer = serde_json::from_value(json!({"groups": [{"muon": muon}]})).unwrap();
            let equal = config.memory(ranks).unwrap();
            equal
                .iter()
                .map(|equal| equal.memory.transient)
                .max()
                .unwrap()
        };
        let fp32 = || json!({"dtype": "fp32"});
        // Matrices of two rounds, both sides of a gather and of a scatter, and the copies of one
        // matrix.
        let most = 4 * ((6 << 24) + 6 * (2048 * 2048));
        for ranks in [16, 64, 256] {
            let bytes = transient(ranks, fp32());
            assert!(bytes <= most, "{ranks} ranks: {bytes}");
        }
        let rounded = transient(64, json!({"dtype": "bf16"}));
        assert!(rounded < transient(64, fp32()) * 3 / 4);
    }

    /// Computes each rank on its own.
    fn one_by_one(config: &Config, ranks: usize) -> Vec<RankMemory> {
        let mesh = config.mesh(0, ranks).unwrap();
        let microbatches = config.microbatches(&mesh, config.largest_batch());
        let plan = config.pipeline_plan(microbatches).unwrap();
        let order = &plan.schedule.order;
        let timeline = simulate(&plan.schedule, &config.costs(order, &plan.layers));
        let split = PipelineSplit {
            ranks: mesh.shape().pipeline,
            placement: order.placement,
            layers: &plan.layers,
            shares_vocabulary: order.vocabulary.is_some(),
            tensor_ranks: mesh.shape().tensor,
        };
        let of_rank = |rank: usize| {
            let mesh = config.mesh(rank, ranks).unwrap();
            let sizes = config.rank_sizes(mesh, order.vocabulary);
            let at = sizes.mesh.coordinates();
            let held = sizes.held_part(split.part(at.pipeline, at.tensor));
            sizes.memory(&held, timeline.peak_microbatches[at.pipeline])
        };
        (0..ranks).map(of_rank).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn equal_ranks_are_those_that_are_equal_one_by_one(
            data in prop::sample::select(vec![1usize, 2, 3, 4, 6, 8]),
            tensor in prop::sample::select(vec![1usize, 2, 4]),
            pipeline in 1usize..4,
            context in 1usize..3,
            expert in prop::sample::select(vec![1usize, 2, 4]),
            zero in 0usize..4,
            vocabulary in any::<bool>(),
            tie in any::<bool>(),
        ) {
            let stage = data * tensor * context;
            prop_assume!(stage.is_multiple_of(expert));
            let mut parallel = json!({
                "tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert,
                "zero": zero,
            });
            if vocabulary && pipeline > 1 {
                parallel["vocabulary"] = json!("vocab-1");
            }
            let config = config(parallel, json!({"tie_embeddings": tie}));
            let ranks = stage * pipeline;
            let expected = one_by_one(&config, ranks);
            let equal = config.memory(ranks).unwrap();
            let mut firsts = Vec::new();
            let mut seen = vec![false; ranks];
            for EqualRanks { ranks, memory } in &equal {
                prop_assert!(ranks.is_sorted());
                firsts.push(ranks[0]);
                for &rank in ranks {
                    prop_assert!(!std::mem::replace(&mut seen[rank], true));
                    prop_assert_eq!(memory, &expected[rank]);
                }
            }
            prop_assert!(firsts.is_sorted());
            prop_assert!(seen.iter().all(|&seen| seen));
            let part = ranks / 3..ranks;
            let of_part = config.memory_of(part.clone(), ranks).unwrap();
            let counted: usize = of_part.iter().map(|equal| equal.ranks.len()).sum();
            prop_assert_eq!(counted, part.len());
        }
    }

    /// Layouts of `moerun bench memory` with its variant `muon`, and the MiB of tensors that it
    /// measured on the most loaded rank.
    fn measured_with_muon() -> Vec<(usize, Value, f64)> {
        vec![(4, json!({}), 498.2), (4, json!({"zero": 3}), 256.1)]
    }

    /// Layouts of `moerun bench memory`, and the MiB of tensors that it measured on the most loaded
    /// rank.
    fn measured_layouts() -> Vec<(usize, Value, f64)> {
        vec![
            (1, json!({}), 837.4),
            (4, json!({}), 837.3),
            (4, json!({"zero": 1}), 664.8),
            (4, json!({"zero": 2}), 571.8),
            (4, json!({"zero": 3}), 532.4),
            (4, json!({"zero": 3, "zero_group_size": 2}), 677.6),
            (4, json!({"expert": 4}), 513.4),
            (4, json!({"expert": 2, "zero": 1}), 556.9),
            (
                4,
                json!({"tensor": 2, "expert": 2, "expert_tensor": 2}),
                338.1,
            ),
            (4, json!({"tensor": 4, "expert": 4}), 218.5),
            (4, json!({"context": 4, "expert": 4}), 305.9),
            (2, json!({"pipeline": 2}), 567.3),
            (4, json!({"pipeline": 4, "vocabulary": "vocab-2"}), 463.5),
            (
                4,
                json!({"pipeline": 2, "tensor": 2, "expert": 2, "schedule": "v-half"}),
                318.4,
            ),
            (1, json!({"recompute": {"parts": ["norm"]}}), 813.4),
            (1, json!({"recompute": {"parts": ["attention"]}}), 836.9),
            (
                1,
                json!({"recompute": {"parts": ["dispatch", "experts"]}}),
                747.5,
            ),
            (1, json!({"recompute": {"layers": "all"}}), 680.9),
        ]
    }

    #[test]
    fn the_plan_is_within_5_percent_of_measured_memory() {
        let config = |parallel: &Value| {
            json!({
                "run": {"dir": "runs/x", "device": "cpu"},
                "parallel": parallel,
                "model": {"vocab_size": 8192, "hidden": 384, "layers": 4, "heads": 12,
                          "kv_heads": 4, "moe": {"experts": 8, "top_k": 2, "ffn": 768}},
                "data": {"train": [{"path": "a"}], "sequence_length": 512},
                "train": {"steps": 3, "global_batch": 16, "micro_batch": 4},
            })
        };
        let with_muon = |parallel: &Value| {
            let mut config = config(parallel);
            config["optimizer"] = json!({"groups": [{"muon": {}}]});
            config["data"]["sequence_length"] = json!(32);
            config["train"]["micro_batch"] = json!(1);
            config
        };
        let mut ratios = Vec::new();
        let mut compare = |ranks: usize, config: Value, measured: f64| {
            let name = format!("{ranks}: {}", config["parallel"]);
            let config: Config = serde_json::from_value(config).unwrap();
            let planned = config.memory(ranks).unwrap();
            let totals = planned.iter().map(|equal| equal.memory.total());
            let planned = totals.max().unwrap() as f64 / f64::from(1 << 20);
            ratios.push((name, planned / measured));
        };
        for (ranks, parallel, measured) in measured_layouts() {
            compare(ranks, config(&parallel), measured);
        }
        for (ranks, parallel, measured) in measured_with_muon() {
            compare(ranks, with_muon(&parallel), measured);
        }
        let is_close = |(_, ratio): &(String, f64)| (0.95..=1.05).contains(ratio);
        assert!(
            ratios.iter().all(is_close),
            "planned / measured: {ratios:#?}"
        );
    }

    #[test]
    fn the_layers_of_a_microbatch_share_one_mask_of_documents() {
        let activations = |documents: bool, context: usize, kind: &str, layers: usize| {
            let parallel = json!({"context": context, "context_attention": kind});
            let mut config = config(parallel, json!({"layers": layers}));
            config.data.eod_token = Some(0);
            config.data.mask_documents = Some(documents);
            config.memory(context).unwrap()[0].memory.activations
        };
        let mask = |context, kind, layers| {
            activations(true, context, kind, layers) - activations(false, context, kind, layers)
        };
        let fp32_mask = 32 * 32 * 4;
        for layers in [1, 6] {
            assert_eq!(mask(1, "ring", layers), fp32_mask);
            assert_eq!(mask(2, "ulysses", layers), fp32_mask);
            assert_eq!(mask(2, "ring", layers), 0);
        }
    }

    #[test]
    fn positions_in_documents_need_a_number_per_token_and_a_table_of_all_positions() {
        let added = |context: usize, dtype: Dtype| {
            let mut config = config(json!({"context": context}), json!({}));
            config.train.dtype = dtype;
            config.data.eod_token = Some(0);
            config.data.mask_documents = Some(false);
            let mut bytes = |reset_positions: bool| {
                config.data.reset_positions = reset_positions;
                let memory = &config.memory(context).unwrap()[0].memory;
                [memory.activations, memory.transient]
            };
            let [with, without] = [bytes(true), bytes(false)];
            [with[0] - without[0], with[1] - without[1]]
        };
        assert_eq!(added(1, Dtype::Fp32), [32 * 8, 0]);
        // Heads of 12 elements make 6 pairs at each of the other rank's 16 positions.
        assert_eq!(added(2, Dtype::Fp32), [16 * 8, 3 * 16 * 6 * 4]);
        assert_eq!(added(2, Dtype::Bf16), [16 * 8, 3 * 16 * 6 * (4 + 2)]);
    }

    #[test]
    fn each_reach_of_attention_has_a_mask() {
        let bytes = |device: &str, documents: bool, window: Value| {
            let attention = json!({"grouped": {"window": window}});
            let mut config = config(json!({}), json!({"attention": attention}));
            config.data.eod_token = documents.then_some(0);
            config.run.device = device.into();
            let memory = &config.memory(1).unwrap()[0].memory;
            memory.activations + memory.transient
        };
        let fp32_mask = 32 * 32 * 4;
        let half = || json!({"size": 5, "layers": {"every": 2}});
        let masks = |device: &str, documents, window| {
            bytes(device, documents, window) - bytes(device, documents, Value::Null)
        };
        // Documents have one mask in any case.
        assert_eq!(masks("cpu", true, half()), fp32_mask);
        assert_eq!(masks("cpu", true, json!({"size": 5})), 0);
        assert_eq!(masks("cuda", true, half()), fp32_mask);
        assert_eq!(masks("cuda", false, half()), fp32_mask);
        assert_eq!(masks("cpu", false, half()), 0);
        // A window as long as the sequence is none.
        assert_eq!(masks("cuda", false, json!({"size": 32})), 0);
    }

    #[test]
    fn a_rank_has_the_masks_of_its_own_layers() {
        let lasting = |attention: Value| {
            let parallel = json!({"pipeline": 2});
            let mut config = config(parallel, json!({"attention": {"grouped": attention}}));
            config.run.device = "cuda".into();
            let ranks = config.memory(2).unwrap();
            let transient = |rank: usize| ranks[rank].memory.transient;
            [0, 1].map(transient)
        };
        let fp32_mask = 32 * 32 * 4;
        let none = lasting(json!({}));
        let in_first_half = json!({"window": {"size": 5, "layers": [0, 1]}});
        assert_eq!(lasting(in_first_half), [none[0] + fp32_mask, none[1]]);
        let both = json!({"window": {"size": 5, "layers": [0, 4]}});
        assert_eq!(lasting(both), none.map(|bytes| bytes + fp32_mask));
    }

    #[test]
    fn places_do_not_grow_with_the_ranks() {
        let parallel = json!({"pipeline": 2, "expert": 4, "zero": 1});
        let places = |ranks: usize| {
            let mut config = config(parallel.clone(), json!({}));
            config.train.global_batch = serde_json::from_value(json!(ranks)).unwrap();
            config.memory(ranks).unwrap().len()
        };
        let few = places(1024);
        assert!(few <= 16, "{few}");
        assert_eq!(places(16_384), places(8192));
    }
}
