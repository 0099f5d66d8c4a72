//! Factors of the columns in RMSNorm.

use tch::{Kind, Tensor};

/// The factor of each column: a weight, in the dtype of the rows, plus a constant. The sum is fp32.
#[derive(Clone, Copy)]
pub struct Gain<'a> {
    /// `[D]`.
    pub weight: &'a Tensor,
    /// 1 for weights that are stored minus one (Gemma), or else 0.
    pub offset: f32,
}

/// Returns true if normed rows are rounded to their dtype before the product with the gain, too.
///
/// Llama in Hugging Face transformers rounds there; Gemma and Qwen3-Next, with an offset, do not.
pub(crate) fn rounds_before(offset: f32) -> bool {
    offset == 0.0
}

impl<'a> From<&'a Tensor> for Gain<'a> {
    fn from(weight: &'a Tensor) -> Gain<'a> {
        Gain {
            weight,
            offset: 0.0,
        }
    }
}

impl Gain<'_> {
    /// Returns the sums in fp32.
    pub(crate) fn wide(self) -> Tensor {
        self.weight.to_kind(Kind::Float) + f64::from(self.offset)
    }
}
