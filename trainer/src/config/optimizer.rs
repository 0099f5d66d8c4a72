//! The section `optimizer`: the optimizer of each parameter, and its constants.

use super::dtype::Dtype;
use crate::{
    model::role::Role,
    optim::{
        adamw::{Adamw, AdamwConfig},
        muon::MuonConfig,
        qk_clip::QkClipConfig,
        rule::Rule,
        sgd::SgdConfig,
    },
};
use config_derive::ResumeKeys;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use tch::Kind;

/// The optimizer: AdamW, unless `groups` name others.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Decay rate of AdamW's first moment.
    #[on_resume(reported)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub beta1: f64,
    /// Decay rate of AdamW's second moment.
    #[on_resume(reported)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub beta2: f64,
    /// Term added to the denominator of AdamW's update.
    #[on_resume(reported)]
    #[schemars(range(min = 1e-15, max = 1.0))]
    pub eps: f64,
    /// Decoupled weight decay of AdamW and Muon, on matrices and embeddings. Norms and biases have
    /// none.
    #[on_resume(reported)]
    #[schemars(range(min = 0.0, max = 10.0))]
    pub weight_decay: f64,
    /// Keeps optimizer state and master weights in host memory and updates them there
    /// (ZeRO-Offload, arXiv 2101.06840). With AdamW, a GPU or NPU then holds 12 bytes less per bf16
    /// parameter and 8 bytes less per fp32 parameter, and steps take longer. Without effect on
    /// CPUs.
    #[on_resume(free)]
    pub offload: bool,
    /// Precision of the optimizer's state: moments and momentum. `bf16` takes half of the memory.
    /// Updates then compute in fp32 and round the new state stochastically.
    #[on_resume(reported)]
    pub state_dtype: Dtype,
    /// Optimizers by the roles of parameters. AdamW updates all that no group does, with the
    /// constants above: `[{muon: {}}]` is Muon for the matrices of attention, feed-forward layers
    /// and experts, and AdamW for the rest. A resume with other groups is refused unless it is
    /// accepted. State that the checkpoint lacks then starts at zero, and AdamW corrects the bias
    /// of its moments from there.
    #[on_resume(refused)]
    pub groups: Vec<GroupConfig>,
    /// After each update by any optimizer, shrinks the weights of queries and keys in heads whose
    /// largest attention logit of the step exceeded a threshold (QK-Clip of MuonClip, arXiv
    /// 2507.20534, section 2.1). Measuring takes half of the FLOPs of attention's forward pass, and
    /// again where backward recomputes attention. Off by default; `{}` has the paper's threshold.
    #[on_resume(reported)]
    pub qk_clip: Option<QkClipConfig>,
}

/// Parameters with an optimizer of their own: exactly one of `adamw`, `muon` and `sgd`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GroupConfig {
    /// Roles of the parameters. By default `matrix` and `expert` with Muon, and otherwise all that
    /// no other group updates.
    pub roles: Option<Vec<Role>>,
    /// Factor on the learning rate of the schedule.
    #[schemars(range(max = 1e3), extend("exclusiveMinimum" = 0))]
    pub lr_scale: f64,
    /// AdamW, with constants of its own.
    pub adamw: Option<AdamwConfig>,
    /// Muon: orthogonalized momentum, for matrices.
    pub muon: Option<MuonConfig>,
    /// Stochastic gradient descent with momentum.
    pub sgd: Option<SgdConfig>,
}

impl Default for GroupConfig {
    fn default() -> GroupConfig {
        GroupConfig {
            roles: None,
            lr_scale: 1.0,
            adamw: None,
            muon: None,
            sgd: None,
        }
    }
}

impl GroupConfig {
    /// Returns the optimizers that the group names, for a model that computes in `kind`. A valid
    /// group has one.
    pub(crate) fn rules(&self, config: &OptimizerConfig, kind: Kind) -> Vec<Arc<dyn Rule>> {
        let adamw = self.adamw.as_ref();
        let adamw = adamw.map(|keys| Arc::new(keys.resolve(&config.adamw())) as Arc<dyn Rule>);
        let muon = self.muon.as_ref();
        let muon = muon.map(|keys| Arc::new(keys.resolve(config.weight_decay, kind)) as _);
        let sgd = self.sgd.as_ref();
        let sgd = sgd.map(|keys| Arc::new(keys.clone()) as _);
        [adamw, muon, sgd].into_iter().flatten().collect()
    }

    /// True if the group sets a weight decay of its own.
    pub(crate) fn has_weight_decay(&self) -> bool {
        let adamw = self.adamw.as_ref().and_then(|keys| keys.weight_decay);
        let muon = self.muon.as_ref().and_then(|keys| keys.weight_decay);
        let sgd = self.sgd.as_ref().map(|keys| keys.weight_decay);
        [adamw, muon, sgd]
            .into_iter()
            .flatten()
            .any(|decay| decay > 0.0)
    }
}

impl OptimizerConfig {
    /// Returns AdamW with the section's constants.
    pub(crate) fn adamw(&self) -> Adamw {
        Adamw {
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            weight_decay: self.weight_decay,
        }
    }
}

impl Default for OptimizerConfig {
    fn default() -> OptimizerConfig {
        OptimizerConfig {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            offload: false,
            state_dtype: Dtype::Fp32,
            groups: Vec::new(),
            qk_clip: None,
        }
    }
}
