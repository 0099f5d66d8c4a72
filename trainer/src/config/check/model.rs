//! Checks of the section `model`.

use crate::{
    config::{
        Config, LayerSet,
        limits::{MAX_ACTIVATION, MAX_PARAMETERS},
    },
    problems::Problems,
};

impl Config {
    pub(super) fn check_model(&self, problems: &mut Problems) {
        let model = &self.model;
        let attention = model.attention(0);
        attention.problems(problems);
        if model.heads > 0 {
            let part = attention.rotary_part();
            model
                .rope
                .problems(model.rope_theta, part, model.layers, problems);
        }
        if model.has_dense_layers() && model.ffn.is_none() {
            problems.add("the model has dense layers, so model.ffn (their inner width) is needed");
        }
        if model.dense_layers > model.layers {
            problems.add(format!(
                "model.dense_layers {} is more than model.layers {}",
                model.dense_layers, model.layers
            ));
        }
        if let Some(moe) = &model.moe {
            moe.problems(problems);
            if let Some(layers) = &moe.layers {
                self.check_moe_layers(layers, problems);
            }
        }
    }

    fn check_moe_layers(&self, layers: &LayerSet, problems: &mut Problems) {
        let model = &self.model;
        if model.dense_layers > 0 || model.moe_every != 1 {
            problems.add(format!(
                "model.moe.layers names the MoE layers, and model.dense_layers {} and moe_every {} \
                 describe them too: leave those two out",
                model.dense_layers, model.moe_every
            ));
        }
        let advice = "leave model.moe out for a dense model";
        layers.problems("model.moe.layers", model.layers, advice, problems);
    }

    /// Checks that products of sizes stay far below 64 bits. No machine holds such tensors.
    pub(super) fn check_sizes(&self, problems: &mut Problems) {
        let model = &self.model;
        let parameters = model.num_parameters().total;
        if parameters > MAX_PARAMETERS {
            problems.add(format!(
                "model.hidden {}, layers {}, heads, vocab_size and ffn (also of moe.experts) make \
                 {parameters} parameters; at most {MAX_PARAMETERS} are possible",
                model.hidden, model.layers
            ));
        }
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
