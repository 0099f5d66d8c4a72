//! The router of an MoE layer: its configuration, its parameters and its rule.

use crate::{
    config::limits::MAX_EXPERTS,
    model::{
        bias::bias_spec,
        spec::{Dim, ParamSpec, Role, Split},
    },
    problems::{Problems, Quantity},
};
use config_derive::ResumeKeys;
use moe::{GroupScore, Router, Score};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The router's rule.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields, default)]
pub struct RouterConfig {
    /// Function from logits to scores.
    #[on_resume(refused)]
    pub score: Score,
    /// Scales the routing weights of each token to a sum of 1. By default true, except with
    /// `top_k: 1`: the weight of a single expert would always be 1, and the router could not learn
    /// from the loss.
    #[on_resume(refused)]
    pub normalize: Option<bool>,
    /// Factor on the routing weights.
    #[on_resume(refused)]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub scale: f64,
    /// Number of groups that the experts are divided into.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_EXPERTS))]
    pub groups: usize,
    /// Number of groups from which a token may choose (DeepSeek-V3, arXiv 2412.19437).
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_EXPERTS))]
    pub top_groups: usize,
    /// Score by which a token chooses `top_groups` groups. By default `max` with softmax scores, as
    /// in DeepSeek-V2, and `top2_sum` with sigmoid scores, as in DeepSeek-V3.
    #[on_resume(refused)]
    pub group_score: Option<GroupScore>,
    /// Chooses the same number of experts in each group (MoGE, arXiv 2505.21411): the load of
    /// groups is then even.
    #[on_resume(refused)]
    pub even_groups: bool,
    /// Chooses experts round-robin instead of by score, so that all have the same load. For
    /// benchmarks only: routing weights still follow the scores, but the model learns nothing
    /// useful.
    #[on_resume(refused)]
    pub force_balance: bool,
    /// Bias of the router, other than that of loss-free balancing (`bias_update_rate`).
    #[on_resume(refused)]
    pub bias: Option<RouterBias>,
}

/// A bias of the router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RouterBias {
    /// Part of the scores that select experts, but not of the routing weights. It never changes: a
    /// checkpoint brings it, or it is 0.
    Frozen,
    /// Part of the logits, and trained like a weight (gpt-oss).
    Trained,
}

impl Default for RouterConfig {
    fn default() -> RouterConfig {
        RouterConfig {
            score: Score::Softmax,
            normalize: None,
            scale: 1.0,
            groups: 1,
            top_groups: 1,
            group_score: None,
            even_groups: false,
            force_balance: false,
            bias: None,
        }
    }
}

/// Descriptions of the router's parameters.
pub(super) struct RouterSpecs {
    pub(super) gate: ParamSpec,
    /// Set if the bias is trained.
    pub(super) bias: Option<ParamSpec>,
}

impl RouterSpecs {
    /// Returns the descriptions in the order of use.
    pub(super) fn into_list(self) -> Vec<ParamSpec> {
        std::iter::once(self.gate).chain(self.bias).collect()
    }
}

/// Numbers of experts that a router selects from, and selects.
#[derive(Debug, Clone, Copy)]
pub(super) struct Selection {
    pub(super) experts: usize,
    pub(super) top_k: usize,
}

impl RouterConfig {
    /// Sets the values that unset keys stand for.
    pub(super) fn resolve(&mut self, top_k: usize) {
        self.normalize = Some(self.normalizes(top_k));
        if self.limits_groups() {
            self.group_score = Some(self.group_score());
        }
    }

    /// Returns true if a token may choose from some of the groups only.
    fn limits_groups(&self) -> bool {
        self.top_groups < self.groups && !self.even_groups
    }

    fn group_score(&self) -> GroupScore {
        let of_scores = match self.score {
            Score::Softmax => GroupScore::Max,
            Score::Sigmoid => GroupScore::Top2Sum,
        };
        self.group_score.unwrap_or(of_scores)
    }

    /// Returns true if the routing weights of each token are scaled to a sum of 1.
    fn normalizes(&self, top_k: usize) -> bool {
        self.normalize.unwrap_or(top_k > 1)
    }

    /// Describes the parameters in the MoE block with this global name.
    pub(super) fn specs(&self, experts: usize, hidden: usize, block: &str) -> RouterSpecs {
        let experts = Dim::new("model.moe.experts", experts as u64);
        let dims = [experts, Dim::hidden(hidden)];
        let is_trained = self.bias == Some(RouterBias::Trained);
        RouterSpecs {
            gate: ParamSpec::single(block, "gate", &dims, Split::Whole, Role::Router),
            bias: is_trained.then(|| bias_spec(block, "gate_bias", experts, Split::Whole)),
        }
    }

    pub(super) fn rule(&self, Selection { experts, top_k }: Selection) -> Router {
        Router {
            num_experts: experts,
            top_k,
            score: self.score,
            normalize: self.normalizes(top_k),
            scale: self.scale,
            groups: self.groups,
            top_groups: self.top_groups,
            group_score: self.group_score(),
            even_groups: self.even_groups,
            force_balance: self.force_balance,
        }
    }

    /// Adds the reasons why the rule cannot make this selection.
    pub(super) fn problems(&self, selection: Selection, problems: &mut Problems) {
        problems.divides(
            Quantity::new("model.moe.experts", selection.experts),
            Quantity::new("model.moe.router.groups", self.groups),
            "all groups must have the same size",
        );
        if selection.top_k == 1 && self.normalize == Some(true) {
            problems.add(
                "model.moe.router.normalize is true and model.moe.top_k is 1: the weight of a \
                 token's only expert would always be 1, so the loss has no gradient for the \
                 router; leave normalize out",
            );
        }
        if self.force_balance {
            self.forced_problems(problems);
        }
        if self.group_score.is_some() && !self.limits_groups() {
            problems.add(
                "model.moe.router.group_score has no effect: a token may choose from every group \
                 (give top_groups less than groups, or leave group_score out)",
            );
        }
        if self.even_groups {
            self.even_group_problems(selection, problems);
        } else {
            self.top_group_problems(selection, problems);
        }
    }

    /// Refuses keys of the selection by score, which round-robin selection ignores.
    fn forced_problems(&self, problems: &mut Problems) {
        let given = [
            (self.bias == Some(RouterBias::Frozen), "bias: frozen"),
            (self.groups > 1, "groups"),
            (self.top_groups > 1, "top_groups"),
            (self.even_groups, "even_groups"),
            (self.group_score.is_some(), "group_score"),
        ];
        for (_, key) in given.iter().filter(|(is_given, _)| *is_given) {
            problems.add(format!(
                "model.moe.router.{key} has no effect with force_balance, which chooses experts \
                 round-robin: leave one of them out"
            ));
        }
    }

    fn even_group_problems(&self, selection: Selection, problems: &mut Problems) {
        let Selection { experts, top_k } = selection;
        problems.divides(
            Quantity::new("model.moe.top_k", top_k),
            Quantity::new("model.moe.router.groups", self.groups),
            "with even_groups a token chooses the same number of experts in each group",
        );
        if self.top_groups > 1 && self.top_groups != self.groups {
            problems.add(format!(
                "model.moe.router.even_groups chooses from every group, but top_groups is {}: \
                 leave one of them out",
                self.top_groups
            ));
        }
        if self.groups > 0 && top_k > experts {
            problems.add(format!(
                "model.moe.top_k {top_k} is more than model.moe.experts {experts}"
            ));
        }
    }

    fn top_group_problems(&self, selection: Selection, problems: &mut Problems) {
        let Selection { experts, top_k } = selection;
        let groups = self.groups;
        let top_groups = self.top_groups;
        if top_groups > groups {
            problems.add(format!(
                "model.moe.router.top_groups {top_groups} is more than model.moe.router.groups \
                 {groups}"
            ));
            return;
        }
        if groups == 0 {
            return;
        }
        let choices = experts / groups * top_groups;
        if top_k > choices {
            problems.add(format!(
                "model.moe.top_k {top_k} is more than the {choices} experts that a token may \
                 choose from (experts {experts} / groups {groups} x top_groups {top_groups})"
            ));
        }
    }
}
