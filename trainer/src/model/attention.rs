//! Grouped-query attention (arXiv 2305.13245) with rotary positions, through libtorch's fused kernel.
// Shapes: B batch, S sequence, D hidden, H query heads, G key/value heads, d head width.

use super::norm::rms_norm;
use super::rope::Rope;
use crate::config::{ModelConfig, QkNorm};
use crate::parameters::{Init, Parameters, Traits};
use parallel::{Accelerator, Weight, linear};
use tch::Tensor;
use torch_ext::Error;

pub(crate) struct Attention {
    query: Weight,
    key: Weight,
    value: Weight,
    output: Weight,
    norms: Option<(Weight, Weight)>,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    scale: f64,
    norm_eps: f64,
    norm_over: QkNorm,
}

impl Attention {
    pub(crate) fn new(
        parameters: &mut Parameters,
        device: &dyn Accelerator,
        config: &ModelConfig,
        name: &str,
        matrix: Traits,
        output: Traits,
    ) -> Attention {
        let (heads, kv_heads) = (config.heads as i64, config.kv_heads() as i64);
        let (head_dim, hidden) = (config.head_dim() as i64, config.hidden as i64);
        let mut dense =
            |part: &str, shape: &[i64], traits| parameters.dense(device, &format!("{name}.{part}"), shape, traits);
        let query = dense("query", &[heads * head_dim, hidden], matrix);
        let key = dense("key", &[kv_heads * head_dim, hidden], matrix);
        let value = dense("value", &[kv_heads * head_dim, hidden], matrix);
        let norm = Traits { init: Init::Ones, decay: false, lr_scale: 1.0 };
        let norms = match config.qk_norm {
            QkNorm::None => None,
            QkNorm::Full => {
                Some((dense("query_norm", &[heads * head_dim], norm), dense("key_norm", &[kv_heads * head_dim], norm)))
            }
            QkNorm::Head => Some((dense("query_norm", &[head_dim], norm), dense("key_norm", &[head_dim], norm))),
        };
        let output = dense("output", &[hidden, heads * head_dim], output);
        // Maximal update parameterisation scales by the width itself, not its root.
        let scale = if config.mup.is_some() { 1.0 / head_dim as f64 } else { 1.0 / (head_dim as f64).sqrt() };
        let (norm_eps, norm_over) = (config.norm_eps, config.qk_norm);
        Attention { query, key, value, output, norms, heads, kv_heads, head_dim, scale, norm_eps, norm_over }
    }

    /// `x_td` `[B * S, D]` to the same shape.
    pub(crate) fn forward(&self, x_td: &Tensor, batch: i64, rope: &Rope) -> Result<Tensor, Error> {
        let (mut query, mut key) = (linear(x_td, &self.query)?, linear(x_td, &self.key)?);
        let value = self.split(&linear(x_td, &self.value)?, batch, self.kv_heads);
        if let (QkNorm::Full, Some((query_norm, key_norm))) = (self.norm_over, &self.norms) {
            query = rms_norm(&query, query_norm, self.norm_eps)?;
            key = rms_norm(&key, key_norm, self.norm_eps)?;
        }
        let (mut query, mut key) = (self.split(&query, batch, self.heads), self.split(&key, batch, self.kv_heads));
        if let (QkNorm::Head, Some((query_norm, key_norm))) = (self.norm_over, &self.norms) {
            query = rms_norm(&query, query_norm, self.norm_eps)?;
            key = rms_norm(&key, key_norm, self.norm_eps)?;
        }
        let query = rope.apply(&query, 0)?;
        let key = self.repeat(&rope.apply(&key, 0)?);
        let value = self.repeat(&value);
        let mixed =
            Tensor::scaled_dot_product_attention(&query, &key, &value, None::<Tensor>, 0.0, true, self.scale, false);
        let merged = mixed.transpose(1, 2).reshape([-1, self.heads * self.head_dim]);
        linear(&merged, &self.output)
    }

    /// `[B * S, heads * d]` to `[B, heads, S, d]`.
    fn split(&self, x: &Tensor, batch: i64, heads: i64) -> Tensor {
        x.view([batch, -1, heads, self.head_dim]).transpose(1, 2)
    }

    /// Each key or value head once for every query head it serves: `[B, G, S, d]` to `[B, H, S, d]`.
    fn repeat(&self, x: &Tensor) -> Tensor {
        let times = self.heads / self.kv_heads;
        if times == 1 {
            return x.shallow_clone();
        }
        let (batch, kv_heads, length, head_dim) = x.size4().expect("keys and values have four dims");
        x.unsqueeze(2).expand([batch, kv_heads, times, length, head_dim], false).reshape([
            batch,
            kv_heads * times,
            length,
            head_dim,
        ])
    }
}
