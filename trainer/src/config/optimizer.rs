//! Constants of AdamW and of the learning-rate schedules.

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

/// The learning-rate schedule.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ScheduleConfig {
    /// The Power scheduler (arXiv 2408.13359): `min(max_lr, beta * a * n^b)` after `n` tokens,
    /// where `beta` is the number of tokens per step, in units of 4096.
    Power(PowerConfig),
    /// Warmup, a constant rate, and decay over the last steps.
    Wsd(WsdConfig),
    /// Warmup, then half a cosine from `lr` to `lr * final_ratio`.
    Cosine(RampConfig),
    /// Warmup, then a straight line from `lr` to `lr * final_ratio`.
    Linear(RampConfig),
    /// Warmup, then a constant rate.
    Constant(ConstantConfig),
}

impl Default for ScheduleConfig {
    fn default() -> ScheduleConfig {
        ScheduleConfig::Power(PowerConfig::default())
    }
}

/// Constants of the Power scheduler. The defaults are those of arXiv 2408.13359.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PowerConfig {
    /// Amplitude of the power law.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub a: f64,
    /// Exponent of the power law, a negative number.
    #[schemars(range(min = -10.0), extend("exclusiveMaximum" = 0))]
    pub b: f64,
    /// Upper limit of the learning rate.
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0))]
    pub max_lr: f64,
    /// Steps of linear warmup. It ends at the rate that the power law gives there.
    pub warmup_steps: u64,
    /// Steps of exponential decay to zero at the end of the run.
    pub decay_steps: u64,
}

impl Default for PowerConfig {
    fn default() -> PowerConfig {
        PowerConfig {
            a: 4.0,
            b: -0.51,
            max_lr: 0.02,
            warmup_steps: 100,
            decay_steps: 0,
        }
    }
}

/// Warmup, stable rate, decay.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WsdConfig {
    /// Learning rate between warmup and decay.
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// Steps of linear warmup.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Steps of decay at the end of the run, along `1 - sqrt(x)`.
    pub decay_steps: u64,
}

/// A rate that falls until the end of the run.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RampConfig {
    /// Learning rate after warmup.
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// Steps of linear warmup.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Last learning rate over `lr`.
    #[schemars(range(min = 0.0, max = 1.0))]
    #[serde(default)]
    pub final_ratio: f64,
}

/// A constant rate.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConstantConfig {
    /// Learning rate after warmup.
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// Steps of linear warmup.
    #[serde(default)]
    pub warmup_steps: u64,
}
