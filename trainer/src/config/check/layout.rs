//! Checks of the parallel layout against the model, the batch and the nodes.

use crate::{
    config::{BatchSize, BatchStage, Config, LayerSet},
    problems::{Problems, Quantity},
};
use parallel::{GroupKind, MemberRanges, Mesh, MeshShape, NodeSplit, context::ContextKind};

impl Config {
    pub(super) fn check_layout(&self, mesh: &Mesh, ranks: usize, problems: &mut Problems) {
        let shape = mesh.shape();
        self.check_batch(&shape, problems);
        self.check_tensor(&shape, problems);
        self.check_sequences(&shape, problems);
        self.check_vocabulary(&shape, problems);
        self.check_zero(&shape, problems);
        self.check_recompute(problems);
        match &self.model.moe {
            Some(moe) => {
                moe.layout_problems(self.model.hidden, &shape, problems);
                if moe.dispatch.hierarchical()
                    && let Some(per_node) = self.parallel.ranks_per_node
                {
                    self.check_nodes(per_node, ranks, problems);
                }
            }
            None if shape.expert * shape.expert_tensor > 1 => problems.add(format!(
                "parallel.expert is {} and expert_tensor {}, but the model has no moe section",
                shape.expert, shape.expert_tensor
            )),
            None => {}
        }
    }

    fn check_batch(&self, shape: &MeshShape, problems: &mut Problems) {
        if let BatchSize::Ramp(stages) = &self.train.global_batch {
            check_stages(stages, problems);
        }
        let micro = self.train.micro_batch;
        let data = shape.data;
        let at_once = micro.saturating_mul(data);
        if at_once == 0 {
            return;
        }
        for (index, stage) in self.train.global_batch.stages().iter().enumerate() {
            let global = stage.sequences;
            let microbatches = global / at_once;
            if global.is_multiple_of(at_once) {
                self.check_pipeline(microbatches, problems);
                continue;
            }
            let larger = (microbatches + 1).saturating_mul(at_once);
            let nearest = match microbatches {
                0 => larger.to_string(),
                _ => format!("{} or {larger}", microbatches * at_once),
            };
            let key = match &self.train.global_batch {
                BatchSize::Constant(_) => "train.global_batch".to_string(),
                BatchSize::Ramp(_) => format!("train.global_batch[{index}].sequences"),
            };
            problems.add(format!(
                "{key} {global} is not a multiple of train.micro_batch {micro} x data {data} = \
                 {at_once}; nearest: {nearest}"
            ));
        }
        self.check_stage_ranks(problems);
    }

    fn check_pipeline(&self, microbatches: usize, problems: &mut Problems) {
        if self.model.layers > 0
            && let Err(error) = self.pipeline_plan(microbatches)
        {
            problems.add(error);
        }
    }

    fn check_stage_ranks(&self, problems: &mut Problems) {
        let pipeline = self.parallel.pipeline;
        let tensor = self.parallel.tensor;
        let vocab_size = self.model.vocab_size;
        let splits_vocabulary = self.parallel.vocabulary.algorithm().is_some();
        if splits_vocabulary && vocab_size < pipeline * tensor {
            problems.add(format!(
                "parallel.vocabulary splits {vocab_size} tokens over pipeline {pipeline} x \
                 tensor {tensor} ranks: each needs at least one"
            ));
        }
        let moe = self.model.moe.as_ref();
        let pools_layers = moe.is_some_and(|moe| moe.load_balance_pool_layers);
        if pipeline > 1 && pools_layers {
            problems.add(
                "model.moe.load_balance_pool_layers averages over layers that \
                 parallel.pipeline puts on different ranks: turn one of them off",
            );
        }
    }

    fn check_tensor(&self, shape: &MeshShape, problems: &mut Problems) {
        let model = &self.model;
        let context = self.parallel.context_attention;
        let attention = model.attention(0);
        attention.layout_problems(shape, context, problems);
        if model.has_dense_layers() {
            model.dense().layout_problems(shape, problems);
        }
    }

    fn check_sequences(&self, shape: &MeshShape, problems: &mut Problems) {
        let length = self.data.sequence_length;
        let context = shape.context;
        let kind = self.parallel.context_attention;
        // Ring attention pairs an early and a late part of the sequence on each rank.
        let parts_per_rank = match kind {
            ContextKind::Ring if context > 1 => 2,
            ContextKind::Ring | ContextKind::Ulysses => 1,
        };
        let parts = parts_per_rank * context;
        if !length.is_multiple_of(parts) {
            let smaller = length / parts * parts;
            let larger = smaller + parts;
            let smaller = smaller.max(parts);
            problems.add(format!(
                "data.sequence_length {length} is not a multiple of {parts} (parallel.context \
                 {context} x {parts_per_rank}); nearest: {smaller} or {larger}"
            ));
        } else {
            let tokens = self.train.micro_batch * length / context;
            problems.divides(
                Quantity::new("train.micro_batch x data.sequence_length / context", tokens),
                Quantity::new("parallel.tensor", shape.tensor),
                "tensor ranks also split the tokens",
            );
        }
    }

    fn check_vocabulary(&self, shape: &MeshShape, problems: &mut Problems) {
        let vocab_size = self.model.vocab_size;
        if vocab_size < shape.tensor {
            problems.add(format!(
                "parallel.tensor {} is more than model.vocab_size {vocab_size}",
                shape.tensor
            ));
        }
    }

    fn check_zero(&self, shape: &MeshShape, problems: &mut Problems) {
        let level = self.parallel.zero;
        let Some(size) = self.parallel.zero_group_size else {
            return;
        };
        problems.divides(
            Quantity::new(
                "the number of dense replicas, data x context =",
                shape.data * shape.context,
            ),
            Quantity::new("parallel.zero_group_size", size),
            "all groups must have the same size",
        );
        if level == 0 {
            problems.add(
                "parallel.zero_group_size has no effect because parallel.zero is 0: give 1, 2 or 3",
            );
        }
    }

    fn check_recompute(&self, problems: &mut Problems) {
        let layers = &self.parallel.recompute.layers;
        if *layers != LayerSet::NONE {
            let key = "parallel.recompute.layers";
            layers.problems(key, self.model.layers, "write none", problems);
        }
    }

    /// Checks that nodes of `per_node` ranks divide the expert ranks, for hierarchical dispatch.
    fn check_nodes(&self, per_node: usize, ranks: usize, problems: &mut Problems) {
        if per_node == 0 {
            return;
        }
        // Members of a group agree whether nodes divide it.
        let mut is_checked = vec![false; ranks];
        for rank in 0..ranks {
            let Some(mesh) = self.mesh(rank, ranks).ok().filter(|_| !is_checked[rank]) else {
                continue;
            };
            if let Err(error) = hierarchical_groups(&mesh, per_node) {
                problems.add(error);
                return;
            }
            for member in mesh.group(GroupKind::Expert) {
                is_checked[member] = true;
            }
        }
    }
}

/// Refuses stages of a batch ramp that are not in order from 0.
fn check_stages(stages: &[BatchStage], problems: &mut Problems) {
    match stages.first() {
        None => problems.add("train.global_batch is an empty list: give a number or a stage"),
        Some(first) if first.tokens > 0 => problems.add(format!(
            "train.global_batch[0].tokens is {}; the first stage begins at 0",
            first.tokens
        )),
        Some(_) => {}
    }
    for (index, pair) in stages.windows(2).enumerate() {
        let tokens = pair[1].tokens;
        if tokens <= pair[0].tokens {
            problems.add(format!(
                "train.global_batch[{}].tokens is {tokens}; it must be more than the {} of the \
                 stage before",
                index + 1,
                pair[0].tokens
            ));
        }
    }
}

/// Returns the expert ranks on this rank's node, and the ranks with the same position among them
/// on all nodes.
///
/// # Errors
/// If nodes of `per_node` ranks do not divide the expert ranks.
pub(crate) fn hierarchical_groups(mesh: &Mesh, per_node: usize) -> Result<NodeSplit, String> {
    let groups = mesh.split_by_node(GroupKind::Expert, per_node);
    groups.ok_or_else(|| {
        format!(
            "hierarchical model.moe.dispatch needs the same number of expert ranks on every \
             node: nodes of {per_node} ranks do not divide the expert ranks {} (with \
             parallel.expert_tensor {} into whole experts); change ranks per node, \
             parallel.expert or expert_tensor, or use another dispatch",
            MemberRanges::new(&mesh.group(GroupKind::Expert)),
            mesh.shape().expert_tensor
        )
    })
}
