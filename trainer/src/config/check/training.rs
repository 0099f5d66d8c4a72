//! Checks of data, training, snapshots and restarts.

use crate::{
    config::{Config, Dtype},
    problems::Problems,
};
use parallel::Backend;

/// Smallest `optimizer.eps` that keeps updates finite with bf16 gradients.
const MIN_BF16_EPS: f64 = 1e-12;

impl Config {
    pub(super) fn check_data(&self, problems: &mut Problems) {
        let data = &self.data;
        if data.train.is_empty() {
            problems.add(
                "data.train lists no source: prepare one with 'moerun data prepare' and name it",
            );
        }
        let vocab_size = self.model.vocab_size;
        if let Some(token) = data.eod_token
            && token as usize >= vocab_size
        {
            problems.add(format!(
                "data.eod_token {token} is outside of model.vocab_size {vocab_size}"
            ));
        }
        if data.eod_mask_loss && data.eod_token.is_none() {
            problems.add(
                "data.eod_mask_loss needs data.eod_token, the token that ends a document: give \
                 it, or leave eod_mask_loss out",
            );
        }
        if self.validation.is_some() && data.validation.is_empty() {
            problems.add("there is a validation section, but data.validation lists no source");
        }
    }

    pub(super) fn check_snapshots(&self, ranks: usize, problems: &mut Problems) {
        if let Err(reason) = self.protection(self.nodes(ranks).len()) {
            let per_node = self.parallel.ranks_per_node.unwrap_or(ranks);
            problems.add(format!(
                "snapshot.redundancy: {reason} (nodes are groups of parallel.ranks_per_node \
                 ranks, here {ranks} of {per_node})"
            ));
        }
    }

    pub(super) fn check_training(&self, problems: &mut Problems) {
        let run = &self.run;
        if run.tls.is_some() && !matches!(run.backend, Backend::Auto | Backend::Gloo) {
            problems
                .add("run.tls encrypts Gloo only: set run.backend to gloo, or leave run.tls out");
        }
        let train = &self.train;
        if !["auto", "cpu", "cuda", "npu"].contains(&run.device.as_str()) {
            problems.add(format!(
                "run.device is {:?}; use auto, cpu, cuda or npu",
                run.device
            ));
        }
        self.check_schedule(problems);
        self.check_fp8_experts(problems);
        if train.dtype == Dtype::Bf16 && self.optimizer.eps < MIN_BF16_EPS {
            problems.add(format!(
                "optimizer.eps is {}; with bf16 gradients use at least {MIN_BF16_EPS:e}",
                self.optimizer.eps
            ));
        }
    }

    fn check_fp8_experts(&self, problems: &mut Problems) {
        if !self.train.fp8_experts {
            return;
        }
        let Some(moe) = &self.model.moe else {
            problems.add("train.fp8_experts needs experts: give model.moe, or leave it out");
            return;
        };
        moe.fp8_problems(self.model.hidden, self.parallel.expert_tensor, problems);
        if self.train.dtype != Dtype::Bf16 {
            problems.add("train.fp8_experts needs train.dtype: bf16, which its results are in");
        }
    }
}
