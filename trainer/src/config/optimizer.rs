//! The section `optimizer`: constants of AdamW.

use config_derive::ResumeKeys;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Constants of AdamW.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Decay rate of the first moment.
    #[on_resume(reported)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub beta1: f64,
    /// Decay rate of the second moment.
    #[on_resume(reported)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub beta2: f64,
    /// Term added to the denominator of the update.
    #[on_resume(reported)]
    #[schemars(range(min = 1e-15, max = 1.0))]
    pub eps: f64,
    /// Decoupled weight decay of matrices and embeddings. Norms have none.
    #[on_resume(reported)]
    #[schemars(range(min = 0.0, max = 10.0))]
    pub weight_decay: f64,
    /// Keeps moments and master weights in host memory and updates them there (ZeRO-Offload,
    /// arXiv 2101.06840). A GPU or NPU then holds 12 bytes less per bf16 parameter and 8 bytes less
    /// per fp32 parameter, and steps take longer. Without effect on CPUs.
    #[on_resume(free)]
    pub offload: bool,
}

impl Default for OptimizerConfig {
    fn default() -> OptimizerConfig {
        OptimizerConfig {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            offload: false,
        }
    }
}
