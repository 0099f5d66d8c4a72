//! Checks of the section `model`.

use crate::{
    config::{
        Config, LayerSet, ModelConfig,
        limits::{MAX_ACTIVATION, MAX_PARAMETERS},
    },
    problems::Problems,
};

impl ModelConfig {
    /// Returns every reason why no run can have this model, one sentence each.
    pub(crate) fn problems(&self) -> Vec<String> {
        let ranges = self.range_problems();
        if !ranges.is_empty() {
            // The other checks do arithmetic, which needs numbers within their ranges.
            return ranges;
        }
        let mut problems = Problems::default();
        self.check_number_of_parameters(&mut problems);
        if problems.is_empty() {
            self.check(&mut problems);
        }
        problems.into_list()
    }

    pub(super) fn check(&self, problems: &mut Problems) {
        let attention = self.attention(0);
        attention.problems(problems);
        if self.heads > 0 {
            let part = attention.rotary_part();
            self.rope
                .problems(self.rope_theta, part, self.layers, problems);
        }
        if self.has_dense_layers() && self.ffn.is_none() {
            problems.add("the model has dense layers, so model.ffn (their inner width) is needed");
        }
        if self.dense_layers > self.layers {
            problems.add(format!(
                "model.dense_layers {} is more than model.layers {}",
                self.dense_layers, self.layers
            ));
        }
        if let Some(moe) = &self.moe {
            moe.problems(problems);
            if let Some(layers) = &moe.layers {
                self.check_moe_layers(layers, problems);
            }
        }
    }

    fn check_moe_layers(&self, layers: &LayerSet, problems: &mut Problems) {
        if self.dense_layers > 0 || self.moe_every != 1 {
            problems.add(format!(
                "model.moe.layers names the MoE layers, and model.dense_layers {} and moe_every {} \
                 describe them too: leave those two out",
                self.dense_layers, self.moe_every
            ));
        }
        let advice = "leave model.moe out for a dense model";
        layers.problems("model.moe.layers", self.layers, advice, problems);
    }

    fn check_number_of_parameters(&self, problems: &mut Problems) {
        let parameters = self.num_parameters().total;
        if parameters > MAX_PARAMETERS {
            problems.add(format!(
                "model.hidden {}, layers {}, heads, vocab_size and ffn (also of moe.experts) make \
                 {parameters} parameters; at most {MAX_PARAMETERS} are possible",
                self.hidden, self.layers
            ));
        }
    }
}

impl Config {
    /// Checks that products of sizes stay far below 64 bits. No machine holds such tensors.
    pub(super) fn check_sizes(&self, problems: &mut Problems) {
        let model = &self.model;
        model.check_number_of_parameters(problems);
        let dense = [
            model.hidden,
            model.attention(0).widest(),
            model.ffn.unwrap_or(0),
            model.vocab_size,
        ];
        let slices = self.parallel.expert_tensor;
        let moe = model.moe.iter().map(|moe| moe.widest(model.hidden, slices));
        let widest = dense.into_iter().chain(moe).max().unwrap_or(0);
        let micro_batch = self.train.micro_batch;
        let length = self.data.sequence_length;
        let tokens = (micro_batch * length / self.parallel.context).max(1);
        let elements = widest as u128 * tokens as u128;
        if elements > MAX_ACTIVATION {
            problems.add(format!(
                "train.micro_batch {micro_batch} x data.sequence_length {length} tokens with up to \
                 {widest} values each are {elements} values; at most {MAX_ACTIVATION} are possible"
            ));
        }
        let sequences = self.sequence_shape();
        let masks = model.shared_masks(0..model.layers, &sequences, true);
        let mask: u128 = masks.iter().map(|mask| mask.elements(&sequences)).sum();
        if mask > MAX_ACTIVATION {
            problems.add(format!(
                "data.eod_token: keeping documents apart in {micro_batch} x {length} tokens takes \
                 a mask of {mask} values; at most {MAX_ACTIVATION} are possible (shorten \
                 data.sequence_length, split sequences by parallel.context with ring attention, or \
                 set data.mask_documents to false)"
            ));
        }
    }
}
