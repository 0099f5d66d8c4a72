//! What types cannot say: numbers that must divide others, and values that must be there.

use super::{
    Config, Dtype, LeastLoadedConfig, MoeConfig, ParityConfig, RecomputedLayers, RedundancyConfig,
    ScheduleConfig,
};
use parallel::context::ContextKind;
use parallel::{GroupKind, Mesh, MeshShape, NodeSplit};

impl Config {
    /// Every reason why this cannot run on `ranks` ranks, one sentence each.
    pub fn problems(&self, ranks: usize) -> Vec<String> {
        let mut problems = Problems::default();
        self.check_model(&mut problems);
        self.check_data(&mut problems);
        self.check_training(&mut problems);
        self.check_snapshots(ranks, &mut problems);
        match self.mesh(0, ranks) {
            Ok(mesh) => {
                let data = mesh.shape().data;
                let train = &self.train;
                let at_once = train.micro_batch * data;
                if at_once > 0 && !train.global_batch.is_multiple_of(at_once) {
                    problems.add(format!(
                        "train.global_batch {} is not a multiple of train.micro_batch {} x data {data} = {at_once}; nearest: \
                         {}{}",
                        train.global_batch,
                        train.micro_batch,
                        if train.global_batch > at_once {
                            format!("{} or ", train.global_batch / at_once * at_once)
                        } else {
                            String::new()
                        },
                        (train.global_batch / at_once + 1) * at_once
                    ));
                } else if at_once > 0 && train.global_batch > 0 && self.model.layers > 0 {
                    self.check_pipeline(train.global_batch / at_once, &mut problems);
                }
                self.check_sharding(&mesh.shape(), &mut problems);
                if let Some(moe) = &self.model.moe {
                    problems.divides(
                        ("model.moe.ffn", moe.ffn),
                        ("parallel.expert_tensor", mesh.shape().expert_tensor),
                        "every rank holds as much of an expert",
                    );
                    problems.divides(
                        ("model.moe.experts", moe.experts),
                        ("parallel.expert", mesh.shape().expert),
                        "every rank holds the same number of experts",
                    );
                    if let Some(per_node) = self.parallel.ranks_per_node {
                        self.check_nodes(moe, per_node, ranks, &mut problems);
                    }
                } else if mesh.shape().expert * mesh.shape().expert_tensor > 1 {
                    let MeshShape {
                        expert,
                        expert_tensor,
                        ..
                    } = mesh.shape();
                    problems.add(format!(
                        "parallel.expert is {expert} and expert_tensor {expert_tensor}, but the model has no moe section"
                    ));
                }
            }
            Err(error) => problems.add(error),
        }
        problems.0
    }

    /// What nodes of `per_node` ranks divide.
    fn check_nodes(&self, moe: &MoeConfig, per_node: usize, ranks: usize, problems: &mut Problems) {
        problems.positive("parallel.ranks_per_node", per_node);
        if per_node == 0 || !moe.dispatch.hierarchical() {
            return;
        }
        let meshes = (0..ranks).filter_map(|rank| self.mesh(rank, ranks).ok());
        let error = meshes
            .map(|mesh| hierarchical_groups(&mesh, per_node))
            .find_map(Result::err);
        problems.0.extend(error);
    }

    /// What tensor, context and sharded data parallelism divide.
    fn check_sharding(&self, shape: &MeshShape, problems: &mut Problems) {
        let model = &self.model;
        let data = &self.data;
        let parallel = &self.parallel;
        let tensor = ("parallel.tensor", shape.tensor);
        let context = ("parallel.context", shape.context);
        problems.divides(
            ("model.heads", model.heads),
            tensor,
            "every rank has as many heads",
        );
        if model.has_dense_layers() {
            problems.divides(
                ("model.ffn", model.ffn.unwrap_or(0)),
                tensor,
                "every rank has as much of a layer",
            );
        }
        if let Some(moe) = model.moe.as_ref().filter(|moe| moe.shared_experts > 0) {
            let width = moe.shared_experts * moe.ffn;
            problems.divides(
                ("model.moe.shared_experts x ffn", width),
                tensor,
                "every rank has as much of a layer",
            );
        }
        let parts = match parallel.context_attention {
            _ if shape.context == 1 => 1,
            ContextKind::Ring => 2 * shape.context,
            ContextKind::Ulysses => shape.context,
        };
        if !data.sequence_length.is_multiple_of(parts) {
            let less = data.sequence_length / parts * parts;
            let parts_of = parts / shape.context;
            problems.add(format!(
                "data.sequence_length {} is not a multiple of {parts} (parallel.context {} x {parts_of}); nearest: {} or {}",
                data.sequence_length,
                shape.context,
                less.max(parts),
                less + parts
            ));
        } else {
            let tokens = self.train.micro_batch * data.sequence_length / shape.context;
            problems.divides(
                ("train.micro_batch x data.sequence_length / context", tokens),
                tensor,
                "of the tokens too",
            );
        }
        if parallel.context_attention == ContextKind::Ulysses && shape.tensor > 0 {
            let heads = model.heads / shape.tensor;
            problems.divides(
                ("model.heads / parallel.tensor", heads),
                context,
                "ulysses shares heads out; ring does not",
            );
        }
        if model.vocab_size < shape.tensor {
            problems.add(format!(
                "parallel.tensor {} is more than model.vocab_size {}",
                shape.tensor, model.vocab_size
            ));
        }
        problems.positive("parallel.tensor_chunks", parallel.tensor_chunks);
        problems.positive("parallel.expert_chunks", parallel.expert_chunks);
        if parallel.zero > 3 {
            problems.add(format!(
                "parallel.zero is {}; it is 0, 1, 2 or 3",
                parallel.zero
            ));
        }
        if let Some(ranks) = parallel.zero_group_size {
            problems.positive("parallel.zero_group_size", ranks);
            let replicas = (
                "the replicas of dense layers, data x context =",
                shape.data * shape.context,
            );
            problems.divides(
                replicas,
                ("parallel.zero_group_size", ranks),
                "groups have the same size",
            );
            if parallel.zero == 0 {
                problems.add("parallel.zero_group_size says who shares out, but parallel.zero is 0: give 1, 2 or 3".into());
            }
        }
        if let RecomputedLayers::Layers(layers) = &parallel.recompute.layers
            && let Some(layer) = layers.iter().find(|&&layer| layer >= model.layers)
        {
            problems.add(format!(
                "parallel.recompute.layers names layer {layer}; the model has 0 to {}",
                model.layers.saturating_sub(1)
            ));
        }
        if let Some(end) = data
            .eod_token
            .filter(|&end| end as usize >= model.vocab_size)
        {
            problems.add(format!(
                "data.eod_token {end} is outside of model.vocab_size {}",
                model.vocab_size
            ));
        }
    }

    fn check_pipeline(&self, microbatches: usize, problems: &mut Problems) {
        if let Err(error) = self.pipeline_plan(microbatches) {
            problems.add(error);
        }
        let pipeline = self.parallel.pipeline;
        let tensor = self.parallel.tensor;
        if self.parallel.vocabulary.algorithm().is_some()
            && self.model.vocab_size < pipeline * tensor
        {
            problems.add(format!(
                "parallel.vocabulary shares {} tokens out over pipeline {pipeline} x tensor {tensor} ranks: each needs one",
                self.model.vocab_size
            ));
        }
        if pipeline > 1
            && self
                .model
                .moe
                .as_ref()
                .is_some_and(|moe| moe.load_balance_pool_layers)
        {
            problems.add(
                "model.moe.load_balance_pool_layers averages over layers that parallel.pipeline puts on different ranks: \
                 turn one of them off"
                    .into(),
            );
        }
    }

    fn check_model(&self, problems: &mut Problems) {
        let model = &self.model;
        problems.positive("model.vocab_size", model.vocab_size);
        problems.positive("model.hidden", model.hidden);
        problems.positive("model.layers", model.layers);
        problems.positive("model.moe_every", model.moe_every);
        problems.positive("model.heads", model.heads);
        problems.positive("model.kv_heads", model.kv_heads());
        if model.head_dim.is_none() {
            problems.divides(
                ("model.hidden", model.hidden),
                ("model.heads", model.heads),
                "or give model.head_dim",
            );
        }
        problems.divides(
            ("model.heads", model.heads),
            ("model.kv_heads", model.kv_heads()),
            "each key head serves as many query heads as the others",
        );
        if model.heads > 0 && !model.head_dim().is_multiple_of(2) {
            problems.add(format!(
                "the head width {} is odd; rotary embedding turns pairs",
                model.head_dim()
            ));
        }
        if model.has_dense_layers() && model.ffn.is_none_or(|ffn| ffn == 0) {
            problems.add(
                "the model has dense layers, so model.ffn (their inner width) is needed".into(),
            );
        }
        if model.dense_layers > model.layers {
            problems.add(format!(
                "model.dense_layers {} is more than model.layers {}",
                model.dense_layers, model.layers
            ));
        }
        if let Some(moe) = &model.moe {
            check_moe(moe, problems);
        }
        if let Some(mup) = &model.mup
            && mup.width <= 0.0
        {
            problems.add(format!(
                "model.mup.width is {}; it must be above 0",
                mup.width
            ));
        }
    }

    fn check_data(&self, problems: &mut Problems) {
        let data = &self.data;
        problems.positive("data.sequence_length", data.sequence_length);
        if data.train.is_empty() {
            problems.add(
                "data.train lists no source: prepare one with 'moerun data prepare' and name it"
                    .into(),
            );
        }
        for (key, sources) in [("train", &data.train), ("validation", &data.validation)] {
            for (index, source) in sources.iter().enumerate() {
                if source.weight.is_nan() || source.weight <= 0.0 {
                    problems.add(format!(
                        "data.{key}[{index}].weight is {}; it must be above 0",
                        source.weight
                    ));
                }
            }
        }
        if let Some(validation) = &self.validation {
            problems.positive("validation.sequences", validation.sequences);
            problems.positive("validation.every", validation.every as usize);
            if data.validation.is_empty() {
                problems.add(
                    "there is a validation section, but data.validation lists no source".into(),
                );
            }
        }
    }

    fn check_snapshots(&self, ranks: usize, problems: &mut Problems) {
        let snapshot = &self.snapshot;
        let restart = &self.restart;
        problems.positive("snapshot.nodes_per_domain", snapshot.nodes_per_domain);
        problems.positive("restart.window_s", restart.window_s as usize);
        for (key, value) in [
            ("snapshot.memory_gib", snapshot.memory_gib),
            (
                "restart.heartbeat_timeout_s",
                Some(restart.heartbeat_timeout_s),
            ),
            ("restart.step_timeout_s", restart.step_timeout_s),
        ] {
            if value.is_some_and(|value| value.is_nan() || value <= 0.0) {
                problems.add(format!(
                    "{key} is {}; it must be above 0",
                    value.unwrap_or_default()
                ));
            }
        }
        match snapshot.redundancy {
            RedundancyConfig::Copies(copies) => {
                problems.positive("snapshot.redundancy.copies", copies)
            }
            RedundancyConfig::Parity(ParityConfig { data, parity }) => {
                problems.positive("snapshot.redundancy.parity.data", data);
                problems.positive("snapshot.redundancy.parity.parity", parity);
            }
            RedundancyConfig::Auto | RedundancyConfig::None => {}
        }
        if let Err(reason) = self.protection(self.nodes(ranks).len()) {
            problems.add(format!(
                "snapshot.redundancy: {reason} (nodes are groups of parallel.ranks_per_node ranks, here {ranks} of {})",
                self.parallel.ranks_per_node.unwrap_or(ranks)
            ));
        }
    }

    fn check_training(&self, problems: &mut Problems) {
        problems.positive("train.steps", self.train.steps as usize);
        problems.positive("train.global_batch", self.train.global_batch);
        problems.positive("train.micro_batch", self.train.micro_batch);
        problems.positive("checkpoint.keep", self.checkpoint.keep);
        if self.parallel.bucket_mib.is_nan() || self.parallel.bucket_mib <= 0.0 {
            problems.add(format!(
                "parallel.bucket_mib is {}; it must be above 0",
                self.parallel.bucket_mib
            ));
        }
        problems.positive("run.timeout_s", self.run.timeout_s as usize);
        problems.positive("run.log_every", self.run.log_every as usize);
        if !["auto", "cpu", "cuda", "npu"].contains(&self.run.device.as_str()) {
            problems.add(format!(
                "run.device is {:?}; use auto, cpu, cuda or npu",
                self.run.device
            ));
        }
        if self.train.grad_clip.is_nan() || self.train.grad_clip < 0.0 {
            problems.add(format!(
                "train.grad_clip is {}; use 0 for no limit",
                self.train.grad_clip
            ));
        }
        let steps = self.train.steps;
        let (lr, warmup, decay) = match &self.schedule {
            ScheduleConfig::Power(power) => {
                if power.b.is_nan() || power.b >= 0.0 {
                    problems.add(format!(
                        "schedule.power.b is {}; the exponent must be below 0",
                        power.b
                    ));
                }
                (
                    power.a.min(power.max_lr),
                    power.warmup_steps,
                    power.decay_steps,
                )
            }
            ScheduleConfig::Wsd(wsd) => (wsd.lr, wsd.warmup_steps, wsd.decay_steps),
            ScheduleConfig::Cosine(ramp) | ScheduleConfig::Linear(ramp) => {
                (ramp.lr, ramp.warmup_steps, 0)
            }
            ScheduleConfig::Constant(constant) => (constant.lr, constant.warmup_steps, 0),
        };
        if lr.is_nan() || lr <= 0.0 {
            problems.add(format!(
                "the schedule's learning rate is {lr}; it must be above 0"
            ));
        }
        if warmup + decay > steps {
            problems.add(format!(
                "the schedule's warmup_steps {warmup} + decay_steps {decay} = {} is more than train.steps {steps}",
                warmup + decay
            ));
        }
        if self.train.fp8_experts {
            let widths = self.model.moe.as_ref().map(|moe| {
                [
                    self.model.hidden,
                    moe.ffn / self.parallel.expert_tensor.max(1),
                ]
            });
            match widths {
                None => problems.add("train.fp8_experts needs experts: give model.moe, or leave it out".into()),
                Some(widths) if widths.iter().any(|width| width % 16 != 0) => problems.add(format!(
                    "train.fp8_experts multiplies matrices whose widths are multiples of 16; model.hidden and each rank's part of \
                     model.moe.ffn are {widths:?}"
                )),
                Some(_) if self.train.dtype != Dtype::Bf16 => {
                    problems.add("train.fp8_experts needs train.dtype: bf16, which its results are in".into());
                }
                Some(_) => {}
            }
        }
        if self.train.dtype == Dtype::Bf16 && self.optimizer.eps < 1e-12 {
            problems.add(format!(
                "optimizer.eps is {}; with bf16 gradients use at least 1e-12",
                self.optimizer.eps
            ));
        }
    }
}

/// The expert ranks of this rank's node, and those with its number among them on the other nodes.
///
/// # Errors
/// When nodes of `per_node` ranks do not divide the ranks that share experts out.
pub(crate) fn hierarchical_groups(
    mesh: &Mesh,
    per_node: usize,
) -> Result<NodeSplit, String> {
    mesh.split_by_node(GroupKind::Expert, per_node).ok_or_else(|| {
        format!(
            "model.moe.dispatch goes by way of nodes, but nodes of {per_node} ranks do not have as many each of the ranks {:?} \
             that share experts out (with parallel.expert_tensor {} whole experts): choose ranks per node, \
             parallel.expert and expert_tensor so that they divide, or another dispatch",
            mesh.group(GroupKind::Expert),
            mesh.shape().expert_tensor
        )
    })
}

fn check_moe(moe: &MoeConfig, problems: &mut Problems) {
    problems.positive("model.moe.experts", moe.experts);
    problems.positive("model.moe.top_k", moe.top_k);
    problems.positive("model.moe.ffn", moe.ffn);
    let router = &moe.router;
    problems.positive("model.moe.router.groups", router.groups);
    problems.positive("model.moe.router.top_groups", router.top_groups);
    problems.divides(
        ("model.moe.experts", moe.experts),
        ("model.moe.router.groups", router.groups),
        "groups have the same size",
    );
    let least_loaded = &moe.least_loaded;
    for (key, value) in [
        ("capacity", least_loaded.capacity),
        ("threshold", least_loaded.threshold),
    ] {
        if value.is_nan() || value < 1.0 {
            problems.add(format!(
                "model.moe.least_loaded.{key} is {value}; 1 is even, and it must not be below"
            ));
        }
    }
    if least_loaded != &LeastLoadedConfig::default() && !moe.dispatch.least_loaded() {
        problems.add(
            "model.moe.least_loaded has no effect with this model.moe.dispatch: use least_loaded or \
             hierarchical_least_loaded"
                .into(),
        );
    }
    if let Some(placement) = &moe.placement {
        problems.positive("model.moe.placement.every", placement.every as usize);
        for (key, value) in [
            ("smoothing", placement.smoothing),
            ("min_gain", placement.min_gain),
        ] {
            if !(0.0..1.0).contains(&value) {
                problems.add(format!(
                    "model.moe.placement.{key} is {value}; it must be from 0 to below 1"
                ));
            }
        }
    }
    if router.even_groups {
        problems.divides(
            ("model.moe.top_k", moe.top_k),
            ("model.moe.router.groups", router.groups),
            "with even_groups a token chooses as many in each group",
        );
        if router.top_groups > 1 && router.top_groups != router.groups {
            problems.add(format!(
                "model.moe.router.even_groups chooses from every group, but top_groups is {}: leave one of them out",
                router.top_groups
            ));
        }
        if router.groups > 0 && moe.top_k > moe.experts {
            problems.add(format!(
                "model.moe.top_k {} is more than model.moe.experts {}",
                moe.top_k, moe.experts
            ));
        }
        return;
    }
    if router.top_groups > router.groups {
        problems.add(format!(
            "model.moe.router.top_groups {} is more than model.moe.router.groups {}",
            router.top_groups, router.groups
        ));
    } else if router.groups > 0 && moe.top_k > moe.experts / router.groups * router.top_groups {
        problems.add(format!(
            "model.moe.top_k {} is more than the {} experts a token may choose from (experts {} / groups {} x top_groups {})",
            moe.top_k,
            moe.experts / router.groups * router.top_groups,
            moe.experts,
            router.groups,
            router.top_groups
        ));
    }
}

#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn add(&mut self, problem: String) {
        self.0.push(problem);
    }

    fn positive(&mut self, key: &str, value: usize) {
        if value == 0 {
            self.add(format!("{key} is 0; it must be at least 1"));
        }
    }

    fn divides(&mut self, whole: (&str, usize), part: (&str, usize), why: &str) {
        if part.1 == 0 || whole.1.is_multiple_of(part.1) {
            return;
        }
        let divides = |size: &usize| whole.1.is_multiple_of(*size);
        let less = (1..part.1).rev().find(divides);
        let more = (part.1..=whole.1).find(divides);
        let nearest: Vec<String> = less
            .into_iter()
            .chain(more)
            .map(|size| size.to_string())
            .collect();
        self.add(format!(
            "{} {} is not a multiple of {} {} (remainder {}; nearest that divides: {}): {why}",
            whole.0,
            whole.1,
            part.0,
            part.1,
            whole.1 % part.1,
            nearest.join(" or ")
        ));
    }
}
