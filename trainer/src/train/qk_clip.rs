//! Executes the plan of QK-clip on the rows that a rank keeps.

use super::metrics::records::QkClipMetrics;
use crate::{
    Error,
    model::{Model, decoder::attention_name},
    optim::qk_clip::QkClipConfig,
};
use std::collections::BTreeMap;
use tch::Tensor;

/// Returns the figures of a step with these largest logits of all heads of the model.
pub(super) fn metrics(config: &QkClipConfig, largest: &[f32]) -> QkClipMetrics {
    let clipped = largest.iter().filter(|&&largest| config.clips(largest));
    let most = largest.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    QkClipMetrics {
        largest_logit: f64::from(most),
        clipped_heads: clipped.count() as u64,
    }
}

/// Scales this rank's rows of queries and keys: masters and their copies in the model's dtype.
/// `largest` are the largest logits by layer and query head of the whole model.
///
/// # Errors
/// If libtorch refuses an operation.
pub(super) fn clip_heads(
    model: &Model,
    config: &QkClipConfig,
    largest: &[f32],
) -> Result<(), Error> {
    let mut factors = BTreeMap::new();
    for (layer, largest) in largest.chunks_exact(model.config().heads).enumerate() {
        let rows = model.config().attention(layer).score_rows();
        for (part, of_rows) in config.row_factors(&rows, largest) {
            factors.insert(format!("{}.{part}", attention_name(layer)), of_rows);
        }
    }
    for parameter in model.parameters.iter() {
        let Some(factors) = factors.get(&parameter.spec.name(0)) else {
            continue;
        };
        for (slice, mut rows) in parameter.slices(&parameter.master) {
            let first = slice.offset[0] as usize;
            let own = &factors[first..first + slice.shape[0] as usize];
            let mut shape = vec![1; slice.shape.len()];
            shape[0] = -1;
            let own = Tensor::from_slice(own)
                .to_device(rows.device())
                .view(shape.as_slice());
            let _ = tch::no_grad(|| rows.f_mul_(&own))?;
        }
        parameter.sync_from_master();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BuildContext, ModelPart, ProcessGroups, config::Dtype};
    use parallel::Cpu;
    use serde_json::{Value, json};
    use std::collections::HashMap;
    use tch::kind::{FLOAT_CPU, INT64_CPU};

    const HEADS: usize = 4;

    /// A layer of grouped attention whose two keys serve two query heads of width 4 each.
    fn grouped() -> Value {
        json!({"kv_heads": 2, "head_dim": 4, "attention": {"grouped": {"bias": "qkv"}}})
    }

    /// A layer of latent attention: queries of width 2 + 3, keys of width 3 and values of width 5.
    fn latent() -> Value {
        json!({"attention": {"latent": {
            "query_rank": 7, "kv_rank": 6, "nope_dim": 3, "rope_dim": 2, "value_dim": 5,
        }}})
    }

    fn model(keys: &Value, dtype: Dtype, offload: bool) -> Model {
        let mut config = json!({
            "layers": 1, "hidden": 16, "heads": HEADS, "vocab_size": 11, "ffn": 12, "init_std": 0.5,
        });
        config
            .as_object_mut()
            .unwrap()
            .extend(keys.as_object().unwrap().clone());
        let config = serde_json::from_value(config).unwrap();
        let groups = ProcessGroups::single_rank();
        let ctx = BuildContext {
            offload,
            ..BuildContext::single_rank(12, dtype, &Cpu, &groups)
        };
        let model = Model::new(&config, ModelPart::whole(1), &ctx);
        for parameter in model.parameters.iter() {
            if parameter.spec.part.ends_with("_bias") {
                let mut master = parameter.master.shallow_clone();
                let phases = Tensor::arange(master.numel() as i64, FLOAT_CPU) * 1.7;
                tch::no_grad(|| master.copy_(&phases.sin().view_as(&master)));
                parameter.sync_from_master();
            }
        }
        model
    }

    /// Returns the largest logit of each head over the same microbatches.
    fn measured(model: &Model) -> Vec<f32> {
        model.begin_largest_scores();
        for first in [0, 5] {
            let tokens = (Tensor::arange(24, INT64_CPU) * 7 + first).remainder(11);
            tch::no_grad(|| model.forward(&tokens.view([2, 12])).unwrap());
        }
        model.take_largest_scores().unwrap()
    }

    fn masters(model: &Model) -> HashMap<&'static str, Tensor> {
        let of_attention = model
            .parameters
            .iter()
            .filter(|p| p.spec.block.ends_with("attention"));
        of_attention
            .map(|p| (p.spec.part, p.master.copy()))
            .collect()
    }

    /// Scales the rows `rows` of a tensor.
    fn scale(tensors: &HashMap<&'static str, Tensor>, part: &str, rows: [usize; 2], factor: f64) {
        let mut rows = tensors[part].narrow(0, rows[0] as i64, (rows[1] - rows[0]) as i64);
        let _ = rows.g_mul_scalar_(factor);
    }

    fn scale_grouped(tensors: &HashMap<&'static str, Tensor>, factors: &[f64]) {
        for key_head in 0..2 {
            let pair = [factors[2 * key_head], factors[2 * key_head + 1]];
            let of_key = pair[0].min(pair[1]).sqrt();
            let rows = |head: usize| [4 * head, 4 * head + 4];
            for [query, key] in [["query", "key"], ["query_bias", "key_bias"]] {
                scale(tensors, key, rows(key_head), of_key);
                for (index, factor) in pair.iter().enumerate() {
                    scale(tensors, query, rows(2 * key_head + index), factor / of_key);
                }
            }
        }
    }

    fn scale_latent(tensors: &HashMap<&'static str, Tensor>, factors: &[f64]) {
        for (head, factor) in factors.iter().enumerate() {
            scale(tensors, "query", [5 * head, 5 * head + 2], *factor);
            scale(
                tensors,
                "query",
                [5 * head + 2, 5 * head + 5],
                factor.sqrt(),
            );
            scale(tensors, "kv_up", [8 * head, 8 * head + 3], factor.sqrt());
        }
    }

    type ScaleFn = fn(&HashMap<&'static str, Tensor>, &[f64]);

    #[test]
    fn clipped_weights_are_the_formula_and_their_logits_within_the_threshold() {
        let cases: [(Value, ScaleFn); 2] = [(grouped(), scale_grouped), (latent(), scale_latent)];
        for (keys, scale) in cases {
            let model = model(&keys, Dtype::Fp32, false);
            let before = measured(&model);
            let mut sorted = before.clone();
            sorted.sort_by(f32::total_cmp);
            assert!(sorted[0] > 0.0, "{before:?}");
            // Between two heads' logits, so that one head stays as it is.
            let threshold = f64::from(sorted[0] + sorted[1]) / 2.0;
            let config = QkClipConfig { threshold };
            let expected = masters(&model);
            let factor = |&logit: &f32| (threshold / f64::from(logit)).min(1.0);
            scale(&expected, &before.iter().map(factor).collect::<Vec<_>>());
            clip_heads(&model, &config, &before).unwrap();
            model.mark_stale();
            for (part, ours) in masters(&model) {
                assert!(ours.allclose(&expected[part], 1e-6, 1e-7, false), "{part}");
            }
            assert_eq!(metrics(&config, &before).clipped_heads, HEADS as u64 - 1);
            let after = measured(&model);
            for (before, after) in before.iter().zip(&after) {
                let expected = f64::from(*before).min(threshold);
                let change = f64::from(*after) / expected - 1.0;
                assert!(change.abs() < 1e-5, "{before} {after} {threshold}");
            }
        }
    }

    #[test]
    fn masters_on_the_host_and_copies_in_bf16_change_alike() {
        let largest = [1.0, 3.0, 4.0, 0.5];
        let config = QkClipConfig { threshold: 0.75 };
        for keys in [grouped(), latent()] {
            let clipped = |dtype, offload| {
                let model = model(&keys, dtype, offload);
                clip_heads(&model, &config, &largest).unwrap();
                for parameter in model.parameters.iter() {
                    let weight = parameter.weight.value();
                    let master = parameter.master.to_kind(weight.kind());
                    assert_eq!(weight.view_as(&master), master, "{}", parameter.spec.part);
                }
                masters(&model)
            };
            let plain = clipped(Dtype::Fp32, false);
            assert_eq!(clipped(Dtype::Fp32, true), plain);
            assert_eq!(clipped(Dtype::Bf16, false), plain);
            assert_eq!(clipped(Dtype::Bf16, true), plain);
        }
    }

    #[test]
    fn heads_below_the_threshold_keep_their_bits() {
        let model = model(&grouped(), Dtype::Fp32, false);
        let before = masters(&model);
        let config = QkClipConfig { threshold: 2.0 };
        clip_heads(&model, &config, &[1.0, 2.0, f32::NEG_INFINITY, 0.0]).unwrap();
        assert_eq!(masters(&model), before);
        clip_heads(&model, &config, &[1.0, 1.0, 1.0, 3.0]).unwrap();
        let after = masters(&model);
        let first_key_head = |part: &str| {
            let rows = before[part].size()[0] / 2;
            after[part].narrow(0, 0, rows) == before[part].narrow(0, 0, rows)
        };
        assert!(
            ["query", "query_bias", "key", "key_bias"]
                .into_iter()
                .all(first_key_head)
        );
        assert_ne!(after["key"], before["key"]);
        assert!(
            ["value", "value_bias", "output"]
                .iter()
                .all(|&part| after[part] == before[part])
        );
    }
}
