//! Rotary position embedding (arXiv 2104.09864) in the half-split form of Llama and HF
//! transformers.
//!
//! Element `i` of a head is rotated with element `i + head_dim / 2`.

use kernels::apply_rotary;
use parallel::Accelerator;
use parking_lot::Mutex;
use std::collections::HashMap;
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// Cosines and sines of this rank's positions.
pub(crate) struct Rope {
    /// The table in fp32, from which the others are made.
    table: Mutex<Table>,
    /// The table in the dtypes that have been used.
    by_kind: Mutex<HashMap<Kind, Table>>,
}

/// `[positions, head_dim / 2]` each.
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
        head_dim: usize,
        theta: f64,
    ) -> Rope {
        let half = head_dim / 2;
        // Single precision, as in HF transformers.
        let frequencies: Vec<f32> = (0..half)
            .map(|i| (1.0 / theta.powf(2.0 * i as f64 / head_dim as f64)) as f32)
            .collect();
        let angles: Vec<f32> = positions
            .iter()
            .flat_map(|&position| frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        let angles =
            device.upload(&Tensor::from_slice(&angles).view([positions.len() as i64, half as i64]));
        let sin = angles.sin();
        let table = Table {
            cos: angles.cos(),
            minus_sin: sin.neg(),
            sin,
        };
        Rope {
            table: Mutex::new(table),
            by_kind: Mutex::default(),
        }
    }

    /// Returns the table of the first `length` positions in a dtype.
    fn table(&self, length: i64, kind: Kind) -> Table {
        let mut by_kind = self.by_kind.lock();
        let convert = || self.table.lock().map(|table| table.to_kind(kind));
        let table = by_kind.entry(kind).or_insert_with(convert);
        table.map(|table| table.narrow(0, 0, length))
    }

    /// Rotates `x` `[batch, heads, sequence, head_dim]` by the first positions.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor, Error> {
        let length = x.size()[2];
        let Table {
            cos,
            sin,
            minus_sin,
        } = self.table(length, x.kind());
        let out = tch::no_grad(|| apply_rotary(x, &cos, &sin));
        let mut out = attach_backward(&[x], vec![out], move |grads| {
            // The gradient is rotated back.
            let rotate_back = |grad: &Tensor| apply_rotary(grad, &cos, &minus_sin);
            Ok(vec![grads[0].as_ref().map(rotate_back)])
        })?;
        Ok(out.remove(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::Cpu;

    #[test]
    fn tables_of_a_dtype_are_made_once() {
        let rope = Rope::new(&Cpu, &[0, 1, 2], 4, 10_000.0);
        let table = |kind| rope.table(2, kind);
        let first = table(Kind::BFloat16);
        assert_eq!(first.cos.data_ptr(), table(Kind::BFloat16).cos.data_ptr());
        assert_eq!(first.sin, table(Kind::Float).sin.to_kind(Kind::BFloat16));
        assert_eq!(first.minus_sin, first.sin.neg());
        assert_eq!(first.cos.size(), [2, 2]);
    }

    #[test]
    fn rotation_keeps_lengths_and_its_gradient_rotates_back() {
        let rope = Rope::new(&Cpu, &[3, 4, 5, 6, 7], 4, 10_000.0);
        let x = Cpu
            .empty(&[1, 2, 5, 4], Kind::Float)
            .uniform_(-1.0, 1.0)
            .set_requires_grad(true);
        let y = rope.apply(&x).unwrap();
        assert!(
            (y.square().sum(Kind::Float) - x.square().sum(Kind::Float))
                .double_value(&[])
                .abs()
                < 1e-4
        );
        // For y = R x, the gradient of |y|^2 / 2 is R^T R x = x.
        (y.square().sum(Kind::Float) / 2.0).backward();
        assert!(x.grad().allclose(&x, 1e-5, 1e-6, false));
        // Position 0 is not rotated; element 0 rotates with element 2 by one radian per position.
        let unit = Tensor::from_slice(&[1f32, 0., 0., 0.]).view([1, 1, 1, 4]);
        let at = |position| {
            Rope::new(&Cpu, &[position], 4, 10_000.0)
                .apply(&unit)
                .unwrap()
        };
        assert_eq!(at(0), unit);
        let rotated = Vec::<f32>::try_from(at(1).flatten(0, -1)).unwrap();
        assert!((rotated[0] - 1f32.cos()).abs() < 1e-6);
        assert!((rotated[2] - 1f32.sin()).abs() < 1e-6);
    }
}
