//! Rotary position embedding (arXiv 2104.09864) in the half-split form of Llama and HF
//! transformers.
//!
//! Element `i` of a head is rotated with element `i + n / 2`, where the first `n` elements of the
//! head rotate.

use super::{
    activations::FP32_BYTES,
    batch::BatchContext,
    rope_scaling::{RopeScaling, Unscaled},
    rotary_part::RotaryPart,
};
use crate::{config::layer_set::LayerSet, problems::Problems};
use config_derive::ResumeKeys;
use kernels::apply_rotary;
use parallel::Accelerator;
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields, default)]
pub struct RopeConfig {
    /// Part of each head that rotates, from the head's first element on (partial rotary embedding).
    #[on_resume(refused)]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0))]
    pub fraction: f64,
    /// Scaling of the frequencies for sequences longer than those of pretraining: one of `linear`,
    /// `dynamic`, `ntk_alpha`, `llama3`, `yarn` and `longrope`. Without it there is none.
    #[on_resume(refused)]
    pub scaling: Option<RopeScaling>,
    /// Layers whose queries and keys rotate. The other layers get no position information (NoPE,
    /// arXiv 2305.19466).
    #[on_resume(refused)]
    pub layers: LayerSet,
}

impl Default for RopeConfig {
    fn default() -> RopeConfig {
        RopeConfig {
            fraction: 1.0,
            scaling: None,
            layers: LayerSet::ALL,
        }
    }
}

/// Numbers of elements that messages give have this many digits after the point, and so have
/// fractions that they suggest.
const DIGITS: i32 = 6;

/// Distance from a whole number of elements that a fraction of a head may have: fractions such as
/// a third are written with few digits.
const WHOLE: f64 = 0.01;

/// Rotation of a head from one position to the next.
pub(crate) struct Frequencies {
    /// Radians of each pair, `[n / 2]`.
    pub(crate) radians: Vec<f32>,
    /// Factor on cosines and sines.
    pub(crate) attention_factor: f64,
}

impl RopeConfig {
    /// Returns the number of elements of a head of `head_dim` that rotate.
    pub(crate) fn width(&self, head_dim: usize) -> usize {
        (self.fraction * head_dim as f64).round() as usize
    }

    /// Returns the bytes of the tables of a number of positions, in fp32 and in the model's dtype,
    /// which has elements of `element` bytes.
    pub(crate) fn table_bytes(&self, head_dim: usize, positions: u64, element: u64) -> u64 {
        let numbers = TABLE_TENSORS * positions * self.width(head_dim) as u64 / 2;
        let converted = if element == FP32_BYTES { 0 } else { element };
        numbers * (FP32_BYTES + converted)
    }

    /// Returns the part of a head of `head_dim` that rotates, without rounding of `fraction`.
    pub(crate) fn exact_fraction(&self, head_dim: usize) -> f64 {
        match head_dim {
            0 => self.fraction,
            _ => self.width(head_dim) as f64 / head_dim as f64,
        }
    }

    /// Returns the rotation of `width` elements of a head, in a run with sequences of `length`
    /// tokens. It is computed in fp64 and rounded once.
    pub(crate) fn frequencies(&self, theta: f64, width: usize, length: usize) -> Frequencies {
        let unscaled = Unscaled { theta, width };
        let round = |radians: f64| radians as f32;
        match &self.scaling {
            None => Frequencies {
                radians: unscaled.radians().map(round).collect(),
                attention_factor: 1.0,
            },
            Some(scaling) => Frequencies {
                radians: scaling
                    .radians(unscaled, length)
                    .into_iter()
                    .map(round)
                    .collect(),
                attention_factor: scaling.attention_factor(),
            },
        }
    }

    /// Returns the factor by which latent attention multiplies the scale of its softmax, in every
    /// layer: 1 except with YaRN's `mscale_all_dim` (DeepSeek-V3).
    pub fn softmax_scale_factor(&self) -> f64 {
        match &self.scaling {
            Some(RopeScaling::Yarn(scaling)) => scaling.softmax_scale_factor(),
            _ => 1.0,
        }
    }

    /// Adds what is impossible or useless in a model of `layers` layers, whose queries and keys
    /// have the rotary part `part`.
    pub(crate) fn problems(
        &self,
        theta: f64,
        part: RotaryPart,
        layers: usize,
        problems: &mut Problems,
    ) {
        if self.layers == LayerSet::NONE {
            if self.scaling.is_some() || self.fraction != 1.0 {
                problems.add(
                    "model.rope.layers selects no layer, so model.rope.scaling and \
                     model.rope.fraction have no effect: leave them out",
                );
            }
            return;
        }
        let advice = "write none for a model without rotary position embedding";
        self.layers
            .problems("model.rope.layers", layers, advice, problems);
        if part.width == 0 {
            // The checks of attention refuse such heads.
            return;
        }
        let width = self.width(part.width);
        if !self.selects_pairs(part.width) {
            problems.add(self.odd_width(part));
        } else if let Some(scaling) = &self.scaling {
            scaling.problems(Unscaled { theta, width }, part, problems);
        }
    }

    /// Returns true if whole pairs of `width` elements rotate, and at least one.
    fn selects_pairs(&self, width: usize) -> bool {
        let rotating = self.width(width);
        let is_whole = (self.fraction * width as f64 - rotating as f64).abs() < WHOLE;
        is_whole && rotating > 0 && rotating.is_multiple_of(2)
    }

    /// Describes a number of rotating elements that is not even.
    fn odd_width(&self, part: RotaryPart) -> String {
        let RotaryPart {
            width, width_key, ..
        } = part;
        let fraction = self.fraction;
        if fraction == 1.0 {
            return format!(
                "{width_key} {width} is odd; rotary embedding rotates elements in pairs, so the \
                 width must be even"
            );
        }
        let nearest = (self.width(width) / 2 * 2).max(2);
        format!(
            "model.rope.fraction {fraction} of {width_key} {width} is {} elements, which is not an \
             even number; {} would be {nearest}",
            rounded(fraction * width as f64),
            rounded(nearest as f64 / width as f64)
        )
    }
}

/// Returns `x` without the noise of its last digits, for messages.
fn rounded(x: f64) -> f64 {
    let unit = 10f64.powi(DIGITS);
    (x * unit).round() / unit
}

/// Number of tensors of a table.
const TABLE_TENSORS: u64 = 3;

/// Cosines and sines of this rank's positions, or of all positions of a sequence if positions begin
/// at 0 in each document.
pub(crate) struct Rope {
    /// The table in fp32, from which the others are made.
    table: Mutex<Table>,
    /// The table in the dtypes that have been used.
    by_kind: Mutex<HashMap<Kind, Table>>,
}

/// `[positions, n / 2]` each, with the factor on cosines and sines.
struct Table {
    cos: Tensor,
    sin: Tensor,
    /// For backward, which rotates back.
    minus_sin: Tensor,
}

impl Table {
    fn map(&self, change: impl Fn(&Tensor) -> Tensor) -> Table {
        Table {
            cos: change(&self.cos),
            sin: change(&self.sin),
            minus_sin: change(&self.minus_sin),
        }
    }
}

impl Rope {
    pub(crate) fn new(
        device: &dyn Accelerator,
        positions: &[i64],
        frequencies: &Frequencies,
    ) -> Rope {
        let Frequencies {
            radians,
            attention_factor,
        } = frequencies;
        // Single precision, as in HF transformers.
        let angles: Vec<f32> = positions
            .iter()
            .flat_map(|&position| radians.iter().map(move |f| position as f32 * f))
            .collect();
        let shape = [positions.len() as i64, radians.len() as i64];
        let angles = device.upload(&Tensor::from_slice(&angles).view(shape));
        let scaled = |table: Tensor| match *attention_factor {
            1.0 => table,
            factor => table * factor,
        };
        let sin = scaled(angles.sin());
        let table = Table {
            cos: scaled(angles.cos()),
            minus_sin: sin.neg(),
            sin,
        };
        Rope {
            table: Mutex::new(table),
            by_kind: Mutex::default(),
        }
    }

    /// Returns the table in a dtype.
    fn table(&self, kind: Kind) -> Table {
        let mut by_kind = self.by_kind.lock();
        let convert = || self.table.lock().map(|table| table.to_kind(kind));
        let table = by_kind.entry(kind).or_insert_with(convert);
        table.map(Tensor::shallow_clone)
    }

    /// Rotates `x` `[batch, heads, sequence, head_dim]` by the positions of its tokens: those in
    /// their documents if `batch` has them, or else the first ones.
    pub(crate) fn apply(&self, x: &Tensor, batch: &BatchContext) -> Result<Tensor, Error> {
        let Table {
            cos,
            sin,
            minus_sin,
        } = self.table(x.kind());
        let positions = batch.positions.as_ref();
        let positions = positions.map(|positions| positions.tensor());
        let out = tch::no_grad(|| apply_rotary(x, &cos, &sin, positions.as_ref()));
        let mut out = attach_backward(&[x], vec![out], move |grads| {
            // The gradient is rotated back.
            let rotate_back =
                |grad: &Tensor| apply_rotary(grad, &cos, &minus_sin, positions.as_ref());
            Ok(vec![grads[0].as_ref().map(rotate_back)])
        })?;
        Ok(out.remove(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{documents::DocumentPositions, rope_scaling::YarnScaling};
    use parallel::Cpu;
    use serde_json::{Value, json};
    use std::sync::Arc;

    /// Returns the context of a microbatch whose tokens have these positions.
    fn at(positions: Option<&Tensor>) -> BatchContext {
        let positions = positions.map(Tensor::shallow_clone);
        BatchContext {
            positions: positions.map(|tensor| Arc::new(DocumentPositions::new(tensor))),
            ..BatchContext::of_whole_sequences(1)
        }
    }

    fn config(value: Value) -> RopeConfig {
        serde_json::from_value(value).unwrap()
    }

    fn rope(config: &RopeConfig, positions: &[i64], head_dim: usize) -> Rope {
        let width = config.width(head_dim);
        let frequencies = config.frequencies(10_000.0, width, positions.len());
        Rope::new(&Cpu, positions, &frequencies)
    }

    #[test]
    fn tables_of_a_dtype_are_made_once() {
        let rope = rope(&RopeConfig::default(), &[0, 1, 2], 4);
        let table = |kind| rope.table(kind);
        let first = table(Kind::BFloat16);
        assert_eq!(first.cos.data_ptr(), table(Kind::BFloat16).cos.data_ptr());
        assert_eq!(first.sin, table(Kind::Float).sin.to_kind(Kind::BFloat16));
        assert_eq!(first.minus_sin, first.sin.neg());
        assert_eq!(first.cos.size(), [3, 2]);
    }

    #[test]
    fn rotation_keeps_lengths_and_its_gradient_rotates_back() {
        let yarn = json!({"yarn": {
            "factor": 2.0, "original_length": 64, "attention_factor": 1.5,
        }});
        let in_documents = Tensor::from_slice(&[0i64, 1, 0, 1, 2]).view([1, 5]);
        for (config, positions, factor) in [
            (json!({}), None, 1.0),
            (json!({"fraction": 0.5}), None, 1.0),
            (json!({"scaling": yarn.clone()}), None, 1.5),
            (json!({"scaling": yarn}), Some(&in_documents), 1.5),
        ] {
            let rope = rope(&self::config(config), &[3, 4, 5, 6, 7], 8);
            let x = Cpu
                .empty(&[1, 2, 5, 8], Kind::Float)
                .uniform_(-1.0, 1.0)
                .set_requires_grad(true);
            let y = rope.apply(&x, &at(positions)).unwrap();
            let length = |x: &Tensor| x.square().sum(Kind::Float).double_value(&[]).sqrt();
            assert!((length(&y) - factor * length(&x)).abs() < 1e-4);
            // For y = R x, the gradient of |y|^2 / 2 is R^T R x, the squared factor times x.
            (y.square().sum(Kind::Float) / 2.0).backward();
            let expected = &x * (factor * factor);
            assert!(x.grad().allclose(&expected, 1e-5, 1e-6, false));
        }
    }

    #[test]
    fn pairs_turn_by_their_radians_per_position() {
        // Position 0 is not rotated; element 0 rotates with element 2 by one radian per position.
        let unit = Tensor::from_slice(&[1f32, 0., 0., 0.]).view([1, 1, 1, 4]);
        let turned = |config: &RopeConfig, position| {
            let rope = rope(config, &[position], 4);
            let turned = rope.apply(&unit, &at(None)).unwrap();
            Vec::<f32>::try_from(turned.flatten(0, -1)).unwrap()
        };
        let whole = RopeConfig::default();
        assert_eq!(turned(&whole, 0), [1.0, 0.0, 0.0, 0.0]);
        let rotated = turned(&whole, 1);
        assert!((rotated[0] - 1f32.cos()).abs() < 1e-6);
        assert!((rotated[2] - 1f32.sin()).abs() < 1e-6);
        // Of two rotating elements, the second is the other one of the pair.
        let rotated = turned(&config(json!({"fraction": 0.5})), 1);
        assert!((rotated[1] - 1f32.sin()).abs() < 1e-6);
        assert_eq!(rotated[2..], [0.0, 0.0]);
    }

    #[test]
    fn documents_rotate_as_if_they_were_alone() {
        let rope = rope(&RopeConfig::default(), &[0, 1, 2, 3, 4, 5, 6], 8);
        let positions = Tensor::from_slice(&[0i64, 1, 2, 0, 1, 2, 3]).view([1, 7]);
        let x = Cpu.empty(&[1, 2, 7, 8], Kind::Float).uniform_(-1.0, 1.0);
        let together = rope.apply(&x, &at(Some(&positions))).unwrap();
        for (start, length) in [(0, 3), (3, 4)] {
            let document = |x: &Tensor| x.narrow(2, start, length);
            let alone = rope.apply(&document(&x), &at(None)).unwrap();
            assert_eq!(document(&together), alone);
        }
    }

    /// A case of `scripts/golden/rope.py`.
    #[derive(Deserialize)]
    struct GoldenCase {
        name: String,
        rope: RopeConfig,
        theta: f64,
        head_dim: usize,
        length: usize,
        radians: Vec<f64>,
        attention_factor: f64,
        softmax_scale_factor: Option<f64>,
    }

    #[test]
    fn frequencies_are_those_of_transformers() {
        let golden = include_str!("../../tests/golden/rope.json");
        let cases: Vec<GoldenCase> = serde_json::from_str(golden).unwrap();
        assert!(!cases.is_empty());
        for case in cases {
            let GoldenCase { name, rope, .. } = &case;
            let mut problems = Problems::default();
            let part = RotaryPart {
                width: case.head_dim,
                width_key: "model.head_dim",
                scales_softmax: case.softmax_scale_factor.is_some(),
            };
            rope.problems(case.theta, part, 1, &mut problems);
            assert_eq!(problems.into_list(), Vec::<String>::new(), "{name}");
            let width = rope.width(case.head_dim);
            let ours = rope.frequencies(case.theta, width, case.length);
            assert_eq!(ours.radians.len(), case.radians.len(), "{name}");
            for (ours, theirs) in ours.radians.iter().zip(&case.radians) {
                // transformers computes in fp32, with an exponent as large as ln(theta).
                let is_equal = (f64::from(*ours) - theirs).abs() < 3e-6 * theirs;
                assert!(is_equal, "{name}: {ours} and {theirs}");
            }
            let factor = ours.attention_factor;
            assert!(
                (factor - case.attention_factor).abs() < 1e-6,
                "{name}: {factor}"
            );
            if let Some(theirs) = case.softmax_scale_factor {
                let ours = rope.softmax_scale_factor();
                assert!((ours - theirs).abs() < 1e-6, "{name}: {ours} and {theirs}");
            }
        }
    }

    fn problems_of(value: Value, width: usize, scales_softmax: bool) -> String {
        let part = RotaryPart {
            width,
            width_key: "model.head_dim",
            scales_softmax,
        };
        let mut problems = Problems::default();
        config(value).problems(10_000.0, part, 4, &mut problems);
        problems.into_list().join("; ")
    }

    fn problems(value: Value) -> String {
        problems_of(value, 12, false)
    }

    #[test]
    fn possible_values_are_accepted() {
        for value in [
            json!({}),
            json!({"fraction": 0.5}),
            json!({"layers": "none"}),
            json!({"layers": {"all_but": {"every": 4, "from": 3}}}),
            json!({"scaling": {"llama3": {
                "factor": 8.0, "low": 1.0, "high": 4.0, "original_length": 64,
            }}}),
        ] {
            assert_eq!(problems(value), "");
        }
    }

    #[test]
    fn impossible_values_are_refused() {
        let yarn = |more: Value| {
            let mut yarn = json!({"factor": 4.0, "original_length": 64});
            yarn.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            json!({"scaling": {"yarn": yarn}})
        };
        let longrope = |more: Value| {
            let list = [1.0; 6];
            let mut longrope = json!({"short": list, "long": list, "original_length": 64});
            longrope
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            json!({"scaling": {"longrope": longrope}})
        };
        let llama3 = json!({"factor": 8.0, "low": 4.0, "high": 4.0, "original_length": 64});
        for (value, problem) in [
            (
                json!({"fraction": 0.3}),
                "is 3.6 elements, which is not an even number; 0.333333 would be 4",
            ),
            (json!({"fraction": 0.25}), "not an even number"),
            (json!({"fraction": 0.01}), "would be 2"),
            (
                json!({"layers": [4]}),
                "names layer 4; the model has 0 to 3",
            ),
            (json!({"layers": []}), "write none"),
            (json!({"layers": {"every": 2, "from": 4}}), "write none"),
            (json!({"layers": "none", "fraction": 0.5}), "no effect"),
            (
                json!({"fraction": 1.0 / 6.0, "scaling": {"ntk_alpha": {"alpha": 2.0}}}),
                "more than 2",
            ),
            (json!({"scaling": {"llama3": llama3}}), "not below high"),
            (yarn(json!({"beta_slow": 33.0})), "beta_fast above"),
            (
                yarn(json!({"original_length": 4, "truncate": false})),
                "original_length 4",
            ),
            (yarn(json!({"mscale": 1.0})), "without mscale_all_dim"),
            (
                yarn(json!({"mscale": 1.0, "attention_factor": 1.0})),
                "leave one of them out",
            ),
            (longrope(json!({})), "needs factor or attention_factor"),
            (
                longrope(json!({"factor": 1.0, "long": [1.0]})),
                "long has 1",
            ),
        ] {
            let found = problems(value.clone());
            assert!(found.contains(problem), "{value}: {found}");
        }
        assert_eq!(
            problems_of(json!({}), 3, false),
            "model.head_dim 3 is odd; rotary embedding rotates elements in pairs, so the width \
             must be even"
        );
        for (value, width) in [(json!({"layers": "none"}), 3), (json!({}), 0)] {
            assert_eq!(problems_of(value, width, false), "");
        }
    }

    #[test]
    fn suggested_fractions_are_accepted() {
        for width in 2..200 {
            let found = problems_of(json!({"fraction": 0.3001}), width, false);
            let Some(suggestion) = found.split("; ").nth(1) else {
                continue;
            };
            let fraction = suggestion.split(' ').next().unwrap();
            let fraction: f64 = fraction.parse().unwrap();
            assert_eq!(problems_of(json!({"fraction": fraction}), width, false), "");
        }
    }

    #[test]
    fn factors_of_yarn_without_effect_are_refused() {
        let yarn = |more: &[(&str, f64)]| {
            let mut yarn = json!({"factor": 4.0, "original_length": 64});
            for (key, value) in more {
                yarn[key] = json!(value);
            }
            json!({"scaling": {"yarn": yarn}})
        };
        let all = ("mscale_all_dim", 1.0);
        for (factors, without_effect) in [
            (vec![all], true),
            (vec![all, ("attention_factor", 1.5)], true),
            // Cosines and sines get the quotient.
            (vec![all, ("mscale", 0.7)], false),
        ] {
            let grouped = problems_of(yarn(&factors), 12, false);
            assert_eq!(
                grouped.contains("only scales the softmax of latent attention"),
                without_effect,
                "{grouped}"
            );
            assert_eq!(problems_of(yarn(&factors), 12, true), "");
        }
    }

    #[test]
    fn only_yarn_changes_the_scale_of_the_softmax() {
        assert_eq!(RopeConfig::default().softmax_scale_factor(), 1.0);
        let yarn = json!({"factor": 40.0, "original_length": 4096, "mscale_all_dim": 1.0});
        let yarn: YarnScaling = serde_json::from_value(yarn).unwrap();
        // The factor of DeepSeek-V3.
        assert!((yarn.softmax_scale_factor() - 1.8739).abs() < 1e-4);
    }
}
