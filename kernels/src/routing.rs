//! Parameters, outputs and gradients of a router.
// Shapes: T tokens, K chosen experts of a token, E experts, G groups of tokens.

use tch::Tensor;

/// The rule by which a router turns logits into routing weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterScoring {
    /// True if a score is the sigmoid of its logit, not the softmax over all logits.
    pub sigmoid: bool,
    /// True if the weights of a token are normalized to sum to one.
    pub normalize: bool,
    /// Factor on all weights, applied last.
    pub scale: f64,
}

/// The differentiable outputs of a router.
pub struct RouterOutput {
    /// `[T, K]` fp32: routing weights.
    pub weights_tk: Tensor,
    /// `[G, E]` fp32: probabilities summed over the tokens of each group.
    pub prob_sums_ge: Tensor,
    /// `[]` fp32: the squared log-sum-exp of the logits, summed over all tokens.
    pub z_sum: Tensor,
}

/// Gradients of a [`RouterOutput`]; `None` stands for zero.
#[derive(Clone, Copy, Default)]
pub struct RouterGradients<'a> {
    pub weights_tk: Option<&'a Tensor>,
    pub prob_sums_ge: Option<&'a Tensor>,
    pub z_sum: Option<&'a Tensor>,
}
