//! Frequencies of rotary position embedding, and their scaling for sequences longer than those of
//! pretraining.
//!
//! The formulas and the golden values of the tests are those of Hugging Face transformers
//! (`modeling_rope_utils.py`). Below, `n` is the number of elements of a head that rotate, and
//! `theta^(-2 i / n)` the frequency of pair `i` without scaling.

use super::rotary_part::RotaryPart;
use crate::{
    config::limits::{MAX_TOKENS, MAX_WIDTH},
    problems::Problems,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Scaling of the frequencies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Divides all frequencies (arXiv 2306.15595).
    Linear(LinearScaling),
    /// Raises `model.rope_theta` with the length of sequences (dynamic NTK scaling).
    Dynamic(DynamicScaling),
    /// Raises `model.rope_theta` by a constant (Hunyuan; `dynamic` with `alpha` in Hugging Face
    /// transformers).
    NtkAlpha(NtkAlphaScaling),
    /// Divides low frequencies, with a linear transition to high ones (Llama 3.1).
    Llama3(Llama3Scaling),
    /// Divides low frequencies, with a transition linear in their index (YaRN, arXiv 2309.00071).
    Yarn(YarnScaling),
    /// Divides each frequency by a number of its own (LongRoPE, arXiv 2402.13753).
    Longrope(LongropeScaling),
}

/// Linear scaling.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinearScaling {
    /// Divisor of all frequencies.
    #[schemars(range(min = 1.0, max = 1e6))]
    pub factor: f64,
}

/// Dynamic NTK scaling. It depends on `data.sequence_length`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DynamicScaling {
    /// Growth of the scaling with the length of sequences: `model.rope_theta` is multiplied by
    /// `(factor * length / original_length - (factor - 1))^(n / (n - 2))`, for `n` rotating
    /// elements, in sequences longer than `original_length`.
    #[schemars(range(min = 1.0, max = 1e6))]
    pub factor: f64,
    /// Sequence length up to which nothing is scaled.
    #[schemars(range(min = 1, max = MAX_TOKENS))]
    pub original_length: usize,
}

/// NTK scaling with a constant factor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NtkAlphaScaling {
    /// `model.rope_theta` is multiplied by `alpha^(n / (n - 2))`, for `n` rotating elements.
    #[schemars(range(min = 1.0, max = 1e6))]
    pub alpha: f64,
}

/// Scaling of Llama 3.1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Llama3Scaling {
    /// Divisor of low frequencies.
    #[schemars(range(min = 1.0, max = 1e6))]
    pub factor: f64,
    /// Number of rotations within `original_length` at or below which a frequency counts as low
    /// (`low_freq_factor`).
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub low: f64,
    /// Number of rotations within `original_length` at or above which a frequency counts as high
    /// (`high_freq_factor`).
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub high: f64,
    /// Sequence length used in pretraining.
    #[schemars(range(min = 1, max = MAX_TOKENS))]
    pub original_length: usize,
}

/// Scaling of YaRN, and its factors for attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct YarnScaling {
    /// Divisor of low frequencies.
    #[schemars(range(min = 1.0, max = 1e6))]
    pub factor: f64,
    /// Sequence length used in pretraining.
    #[schemars(range(min = 1, max = MAX_TOKENS))]
    pub original_length: usize,
    /// Number of rotations within `original_length` at or above which a frequency is not scaled.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    #[serde(default = "default_beta_fast")]
    pub beta_fast: f64,
    /// Number of rotations within `original_length` at or below which a frequency is divided by
    /// `factor`.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    #[serde(default = "default_beta_slow")]
    pub beta_slow: f64,
    /// Rounds the ends of the transition to whole indices of frequencies.
    #[serde(default = "default_truncate")]
    pub truncate: bool,
    /// Factor on cosines and sines. By default `m(mscale) / m(mscale_all_dim)` if both are given,
    /// or else `m(1)`, where `m(x)` is `0.1 x ln(factor) + 1`.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    #[serde(default)]
    pub attention_factor: Option<f64>,
    /// Strength of the factor on cosines and sines.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    #[serde(default)]
    pub mscale: Option<f64>,
    /// Strength of the factor on the scale of the softmax, which latent attention multiplies by
    /// `m(mscale_all_dim)^2` (DeepSeek-V3): in every layer, also outside `model.rope.layers`, and
    /// also if `model.multipliers.attention` gives the scale.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    #[serde(default)]
    pub mscale_all_dim: Option<f64>,
}

/// LongRoPE. It depends on `data.sequence_length`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LongropeScaling {
    /// Divisors of the frequencies in sequences of up to `original_length` tokens.
    #[schemars(length(max = MAX_WIDTH), inner(range(min = 1e-6, max = 1e6)))]
    pub short: Vec<f64>,
    /// Divisors of the frequencies in longer sequences.
    #[schemars(length(max = MAX_WIDTH), inner(range(min = 1e-6, max = 1e6)))]
    pub long: Vec<f64>,
    /// Sequence length used in pretraining.
    #[schemars(range(min = 2, max = MAX_TOKENS))]
    pub original_length: usize,
    /// Ratio of the longest sequence to `original_length`. It makes the factor on cosines and sines
    /// `sqrt(1 + ln(factor) / ln(original_length))`.
    #[schemars(range(min = 1.0, max = 1e6))]
    #[serde(default)]
    pub factor: Option<f64>,
    /// Factor on cosines and sines, instead of `factor`.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    #[serde(default)]
    pub attention_factor: Option<f64>,
}

fn default_beta_fast() -> f64 {
    32.0
}

fn default_beta_slow() -> f64 {
    1.0
}

fn default_truncate() -> bool {
    true
}

/// Frequencies without scaling: `theta` and the number `n` of rotating elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unscaled {
    pub(crate) theta: f64,
    /// Number of rotating elements, which is even.
    pub(crate) width: usize,
}

impl Unscaled {
    /// Returns the radians per position of each pair.
    pub(crate) fn radians(self) -> impl Iterator<Item = f64> {
        let Unscaled { theta, width } = self;
        (0..width / 2).map(move |i| 1.0 / theta.powf(2.0 * i as f64 / width as f64))
    }

    /// Returns the same with a larger `theta`, by which the lowest frequency is divided by about
    /// `factor` (NTK-aware scaling).
    fn ntk(self, factor: f64) -> Unscaled {
        let width = self.width as f64;
        Unscaled {
            theta: self.theta * factor.powf(width / (width - 2.0)),
            ..self
        }
    }

    /// Returns the index, with a fraction, of the frequency with this many `turns` within `length`
    /// tokens.
    fn index(self, turns: f64, length: usize) -> f64 {
        let Unscaled { theta, width } = self;
        width as f64 * (length as f64 / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
    }
}

impl RopeScaling {
    /// Returns the radians per position of each pair, in sequences of `length` tokens.
    pub(crate) fn radians(&self, unscaled: Unscaled, length: usize) -> Vec<f64> {
        let radians = unscaled.radians();
        match self {
            RopeScaling::Linear(LinearScaling { factor }) => radians.map(|w| w / factor).collect(),
            RopeScaling::Dynamic(DynamicScaling {
                factor,
                original_length,
            }) => {
                let longer = length.max(*original_length) as f64 / *original_length as f64;
                unscaled
                    .ntk(factor * longer - (factor - 1.0))
                    .radians()
                    .collect()
            }
            RopeScaling::NtkAlpha(NtkAlphaScaling { alpha }) => {
                unscaled.ntk(*alpha).radians().collect()
            }
            RopeScaling::Llama3(scaling) => radians.map(|w| scaling.scale(w)).collect(),
            RopeScaling::Yarn(scaling) => {
                let divided = scaling.divided(unscaled);
                let scale =
                    |(w, divided): (f64, f64)| w / scaling.factor * divided + w * (1.0 - divided);
                radians.zip(divided).map(scale).collect()
            }
            RopeScaling::Longrope(scaling) => {
                let is_long = length > scaling.original_length;
                let divisors = if is_long {
                    &scaling.long
                } else {
                    &scaling.short
                };
                radians.zip(divisors).map(|(w, by)| w / by).collect()
            }
        }
    }

    /// Returns the factor on cosines and sines.
    pub(crate) fn attention_factor(&self) -> f64 {
        match self {
            RopeScaling::Yarn(scaling) => scaling.attention_factor(),
            RopeScaling::Longrope(scaling) => scaling.attention_factor(),
            RopeScaling::Linear(_)
            | RopeScaling::Dynamic(_)
            | RopeScaling::NtkAlpha(_)
            | RopeScaling::Llama3(_) => 1.0,
        }
    }

    /// Adds what makes the scaling impossible or useless for queries and keys with this rotary
    /// part.
    pub(crate) fn problems(&self, unscaled: Unscaled, part: RotaryPart, problems: &mut Problems) {
        let width = unscaled.width;
        match self {
            RopeScaling::Linear(_) => {}
            RopeScaling::Dynamic(_) | RopeScaling::NtkAlpha(_) => {
                if width <= 2 {
                    problems.add(format!(
                        "model.rope.scaling: dynamic and ntk_alpha need more than 2 rotating \
                         elements per head (here {width}); use another scaling"
                    ));
                }
            }
            RopeScaling::Llama3(Llama3Scaling { low, high, .. }) => {
                if low >= high {
                    problems.add(format!(
                        "model.rope.scaling.llama3.low {low} is not below high {high}: \
                         frequencies between them are scaled in part (Llama 3.1 has 1 and 4)"
                    ));
                }
            }
            RopeScaling::Yarn(scaling) => {
                scaling.factor_problems(part, problems);
                scaling.transition_problems(unscaled, problems);
            }
            RopeScaling::Longrope(scaling) => scaling.list_problems(width, problems),
        }
    }
}

impl Llama3Scaling {
    fn scale(&self, radians: f64) -> f64 {
        let turns = self.original_length as f64 * radians / (2.0 * PI);
        let kept = (turns - self.low) / (self.high - self.low);
        let kept = kept.clamp(0.0, 1.0);
        (1.0 - kept) * radians / self.factor + kept * radians
    }
}

impl YarnScaling {
    /// Returns `0.1 strength ln(factor) + 1`.
    fn magnitude(&self, strength: f64) -> f64 {
        0.1 * strength * self.factor.ln() + 1.0
    }

    /// Returns the factor on the scale of the softmax in latent attention.
    pub(crate) fn softmax_scale_factor(&self) -> f64 {
        let magnitude = self.mscale_all_dim.map_or(1.0, |x| self.magnitude(x));
        magnitude * magnitude
    }

    fn attention_factor(&self) -> f64 {
        if let Some(factor) = self.attention_factor {
            return factor;
        }
        match (self.mscale, self.mscale_all_dim) {
            (Some(mscale), Some(all)) => self.magnitude(mscale) / self.magnitude(all),
            _ => self.magnitude(1.0),
        }
    }

    /// Returns the indices of frequencies between which the transition lies.
    fn transition(&self, unscaled: Unscaled) -> (f64, f64) {
        let mut low = unscaled.index(self.beta_fast, self.original_length);
        let mut high = unscaled.index(self.beta_slow, self.original_length);
        if self.truncate {
            low = low.floor();
            high = high.ceil();
        }
        (low.max(0.0), high.min(unscaled.width as f64 - 1.0))
    }

    /// Returns the share of each frequency that is divided by the factor.
    fn divided(&self, unscaled: Unscaled) -> impl Iterator<Item = f64> {
        let (low, high) = self.transition(unscaled);
        // Kimi K2 has equal ends, for which transformers makes the transition this long.
        let length = if low == high { 0.001 } else { high - low };
        (0..unscaled.width / 2).map(move |i| ((i as f64 - low) / length).clamp(0.0, 1.0))
    }

    fn transition_problems(&self, unscaled: Unscaled, problems: &mut Problems) {
        let theta = unscaled.theta;
        if theta <= 1.0 {
            problems.add(format!(
                "model.rope.scaling.yarn scales low frequencies, but all are equal with \
                 model.rope_theta {theta}: give one above 1, or use another scaling"
            ));
            return;
        }
        let (low, high) = self.transition(unscaled);
        if self.beta_slow > self.beta_fast || low > high {
            problems.add(format!(
                "model.rope.scaling.yarn: no frequency of model.rope_theta {theta} rotates between \
                 beta_slow {} and beta_fast {} times within original_length {}; give the sequence \
                 length used in pretraining, and beta_fast above beta_slow",
                self.beta_slow, self.beta_fast, self.original_length
            ));
        }
    }

    fn factor_problems(&self, part: RotaryPart, problems: &mut Problems) {
        if self.mscale_all_dim.is_some() && self.mscale.is_none() && !part.scales_softmax {
            problems.add(
                "model.rope.scaling.yarn.mscale_all_dim has no effect: without mscale it only \
                 scales the softmax of latent attention; leave it out",
            );
        }
        if self.mscale.is_some() && self.attention_factor.is_some() {
            problems.add(
                "model.rope.scaling.yarn has attention_factor and mscale, which both set the \
                 factor on cosines and sines: leave one of them out",
            );
        } else if self.mscale.is_some() && self.mscale_all_dim.is_none() {
            problems.add(
                "model.rope.scaling.yarn.mscale has no effect without mscale_all_dim: give both, \
                 or leave mscale out",
            );
        }
    }
}

impl LongropeScaling {
    fn attention_factor(&self) -> f64 {
        let from_factor = || {
            let factor = self.factor.unwrap_or(1.0);
            (1.0 + factor.ln() / (self.original_length as f64).ln()).sqrt()
        };
        self.attention_factor.unwrap_or_else(from_factor)
    }

    fn list_problems(&self, width: usize, problems: &mut Problems) {
        for (key, list) in [("short", &self.short), ("long", &self.long)] {
            if list.len() != width / 2 {
                problems.add(format!(
                    "model.rope.scaling.longrope.{key} has {} numbers; the {width} rotating \
                     elements of a head need {}, one for each pair",
                    list.len(),
                    width / 2
                ));
            }
        }
        if self.factor.is_some() == self.attention_factor.is_some() {
            problems.add(
                "model.rope.scaling.longrope needs factor or attention_factor, and only one of \
                 them: both set the factor on cosines and sines",
            );
        }
    }
}
