//! Checks of data, training, snapshots and restarts.

use crate::{
    config::{Config, Dtype, LayerSet},
    model::{attention::grouped::QkNorm, decoder::model_specs, role::Role},
    optim::{groups::Groups, muon::AdjustLr},
    problems::Problems,
};
use parallel::Backend;

/// Smallest `eps` of AdamW that keeps updates finite with bf16 gradients.
const MIN_BF16_EPS: f64 = 1e-12;

impl Config {
    pub(super) fn check_data(&self, problems: &mut Problems) {
        let data = &self.data;
        if data.train.is_empty() {
            problems.add(
                "data.train lists no source: prepare one with 'moerun data prepare' and name it",
            );
        }
        self.check_documents(problems);
        data.check_sources(problems);
        if self.validation.is_some() && data.validation.is_empty() {
            problems.add("there is a validation section, but data.validation lists no source");
        }
    }

    /// Checks the token that ends a document, and the keys that use it. The data may record the
    /// token, which is not read here.
    fn check_documents(&self, problems: &mut Problems) {
        let data = &self.data;
        let vocab_size = self.model.vocab_size;
        if let Some(token) = data.eod_token
            && token as usize >= vocab_size
        {
            problems.add(format!(
                "data.eod_token {token} is outside of model.vocab_size {vocab_size}"
            ));
        }
        if data.reset_positions && self.model.rope.layers == LayerSet::NONE {
            problems.add(
                "data.reset_positions has no effect, because model.rope.layers selects no layer: \
                 leave it out",
            );
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
        if !["auto", "cpu", "cuda", "npu"].contains(&run.device.as_str()) {
            problems.add(format!(
                "run.device is {:?}; use auto, cpu, cuda or npu",
                run.device
            ));
        }
        self.check_schedule(problems);
        self.check_fp8_experts(problems);
        self.check_optimizer(problems);
    }

    fn check_optimizer(&self, problems: &mut Problems) {
        let optimizer = &self.optimizer;
        // A model with problems may have no parameters that could be listed.
        let known = problems.is_empty();
        let has_role = |role: &Role| !known || model_specs(&self.model).any(|s| s.role == *role);
        let roles: Vec<Role> = Role::ALL.into_iter().filter(has_role).collect();
        Groups::check(optimizer, self.train.dtype.kind(), &roles, problems);
        if optimizer.qk_clip.is_some() && self.model.qk_norm != QkNorm::None {
            problems.add(
                "optimizer.qk_clip has no effect with model.qk_norm, which normalizes queries and \
                 keys whatever their weights are: leave one of them out",
            );
        }
        let mut all_eps = vec![("optimizer.eps".to_string(), optimizer.eps)];
        for (index, group) in optimizer.groups.iter().enumerate() {
            let key = format!("optimizer.groups[{index}]");
            let eps = group.adamw.as_ref().and_then(|adamw| adamw.eps);
            all_eps.extend(eps.map(|eps| (format!("{key}.adamw.eps"), eps)));
            let scale = group.muon.as_ref().map(|muon| muon.adjust_lr);
            let mup = self.model.mup.as_ref();
            if scale == Some(AdjustLr::Original) && mup.is_some_and(|mup| mup.width != 1.0) {
                problems.add(format!(
                    "{key}.muon.adjust_lr: original suits all widths already, but model.mup.width \
                     scales the learning rate of matrices: use match_rms_adamw, or leave \
                     model.mup.width out"
                ));
            }
        }
        for (key, eps) in all_eps {
            if self.train.dtype == Dtype::Bf16 && eps < MIN_BF16_EPS {
                problems.add(format!(
                    "{key} is {eps}; with bf16 gradients use at least {MIN_BF16_EPS:e}"
                ));
            }
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

#[cfg(test)]
mod tests {
    use crate::{
        config::{QkClipConfig, QkNorm},
        optim::schedule::tests::config,
    };

    #[test]
    fn clipping_of_heads_needs_weights_that_decide_about_logits() {
        let mut config = config("steps: 100, global_batch: 4 | constant: {lr: 1.0}");
        config.optimizer.qk_clip = Some(QkClipConfig::default());
        let without = config.problems(1);
        for norm in [QkNorm::Full, QkNorm::Head, QkNorm::HeadAfterRope] {
            config.model.qk_norm = norm;
            let problems = config.problems(1);
            let [problem] = problems
                .iter()
                .filter(|p| !without.contains(p))
                .collect::<Vec<_>>()[..]
            else {
                panic!("{problems:?}");
            };
            let keys = [
                "optimizer.qk_clip",
                "model.qk_norm",
                "leave one of them out",
            ];
            assert!(keys.iter().all(|key| problem.contains(key)), "{problem}");
        }
        config.model.qk_norm = QkNorm::None;
        config.optimizer.qk_clip = Some(QkClipConfig { threshold: -1.0 });
        let refusal = "optimizer.qk_clip.threshold is -1";
        assert!(
            config
                .problems(1)
                .iter()
                .any(|problem| problem.starts_with(refusal))
        );
    }
}
