//! Checks of the section `model`.

use crate::{
    config::{
        Config, LeastLoadedConfig, MoeConfig, RouterConfig,
        limits::{MAX_ACTIVATION, MAX_PARAMETERS},
    },
    problems::{Problems, Quantity},
};

impl Config {
    pub(super) fn check_model(&self, problems: &mut Problems) {
        let model = &self.model;
        self.check_heads(problems);
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
            check_moe(moe, problems);
        }
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
        let attention = model.heads.max(model.kv_heads()) * model.head_dim();
        let dense = [
            model.hidden,
            attention,
            model.ffn.unwrap_or(0),
            model.vocab_size,
        ];
        let moe = model.moe.iter().flat_map(|moe| {
            let routed = moe.top_k * moe.ffn.max(model.hidden) * self.parallel.expert_tensor;
            [routed, moe.shared_experts * moe.ffn, moe.experts]
        });
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
        let mask = self.document_mask_elements();
        if mask > MAX_ACTIVATION {
            problems.add(format!(
                "data.eod_token: keeping documents apart in {micro_batch} x {length} tokens takes \
                 a mask of {mask} values; at most {MAX_ACTIVATION} are possible (shorten \
                 data.sequence_length, or split sequences by parallel.context with ring attention)"
            ));
        }
    }

    fn check_heads(&self, problems: &mut Problems) {
        let model = &self.model;
        let heads = || Quantity::new("model.heads", model.heads);
        if model.head_dim.is_none() {
            problems.divides(
                Quantity::new("model.hidden", model.hidden),
                heads(),
                "or give model.head_dim",
            );
        }
        problems.divides(
            heads(),
            Quantity::new("model.kv_heads", model.kv_heads()),
            "each key head must serve the same number of query heads",
        );
        if model.heads > 0 {
            let head_dim = model.head_dim();
            model
                .rope
                .check(model.rope_theta, head_dim, model.layers, problems);
        }
    }
}

fn check_moe(moe: &MoeConfig, problems: &mut Problems) {
    let router = &moe.router;
    problems.divides(
        Quantity::new("model.moe.experts", moe.experts),
        Quantity::new("model.moe.router.groups", router.groups),
        "all groups must have the same size",
    );
    check_least_loaded(moe, problems);
    if moe.top_k == 1 && router.normalize == Some(true) {
        problems.add(
            "model.moe.router.normalize is true and model.moe.top_k is 1: the weight of a token's \
             only expert would always be 1, so that the loss has no gradient for the router; \
             leave normalize out",
        );
    }
    if router.even_groups {
        check_even_groups(moe, router, problems);
    } else {
        check_top_groups(moe, router, problems);
    }
}

fn check_least_loaded(moe: &MoeConfig, problems: &mut Problems) {
    let least_loaded = &moe.least_loaded;
    let is_default = *least_loaded == LeastLoadedConfig::default();
    if !is_default && !moe.dispatch.least_loaded() {
        problems.add(
            "model.moe.least_loaded has no effect with this model.moe.dispatch: use \
             least_loaded or hierarchical_least_loaded",
        );
    }
}

fn check_even_groups(moe: &MoeConfig, router: &RouterConfig, problems: &mut Problems) {
    problems.divides(
        Quantity::new("model.moe.top_k", moe.top_k),
        Quantity::new("model.moe.router.groups", router.groups),
        "with even_groups a token chooses the same number of experts in each group",
    );
    if router.top_groups > 1 && router.top_groups != router.groups {
        problems.add(format!(
            "model.moe.router.even_groups chooses from every group, but top_groups is {}: \
             leave one of them out",
            router.top_groups
        ));
    }
    if router.groups > 0 && moe.top_k > moe.experts {
        problems.add(format!(
            "model.moe.top_k {} is more than model.moe.experts {}",
            moe.top_k, moe.experts
        ));
    }
}

fn check_top_groups(moe: &MoeConfig, router: &RouterConfig, problems: &mut Problems) {
    let groups = router.groups;
    let top_groups = router.top_groups;
    if top_groups > groups {
        problems.add(format!(
            "model.moe.router.top_groups {top_groups} is more than model.moe.router.groups {groups}"
        ));
        return;
    }
    if groups == 0 {
        return;
    }
    let choices = moe.experts / groups * top_groups;
    if moe.top_k > choices {
        problems.add(format!(
            "model.moe.top_k {} is more than the {choices} experts that a token may choose \
             from (experts {} / groups {groups} x top_groups {top_groups})",
            moe.top_k, moe.experts
        ));
    }
}
