//! Floating-point formats of tensors.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Floating-point format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floating point.
    #[default]
    Fp32,
    /// bfloat16 (8 bits of exponent, 7 of fraction).
    Bf16,
}

impl Dtype {
    /// Returns the kind of tensors in this format.
    pub fn kind(self) -> tch::Kind {
        match self {
            Dtype::Fp32 => tch::Kind::Float,
            Dtype::Bf16 => tch::Kind::BFloat16,
        }
    }
}
