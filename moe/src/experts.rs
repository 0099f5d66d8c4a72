//! Experts: a SwiGLU feed-forward network for each group of rows (grouped GEMM), with its gradient.
//!
//! `down(silu(gate(x)) * up(x))`, gate and up in one matrix (GLU Variants, arXiv 2002.05202). Of the activations
//! only the input and the gate-up product are kept for backward; the rest is computed again.
// Shapes: R rows, D hidden, F ffn, E experts (here: local ones).

use tch::Tensor;
use torch_ext::{Error, attach_backward};

/// Rows `x_rd` `[R, D]`, in expert order with `counts[e]` rows for expert `e`, through `gate_up_efd` `[E, 2F, D]`
/// (rows of gate, then rows of up) and `down_edf` `[E, D, F]`: `[R, D]`. Experts without rows get zero gradients.
///
/// A dense feed-forward network is the case of one expert.
///
/// # Errors
/// When the counts do not add up to R.
pub fn grouped_swiglu(x_rd: &Tensor, gate_up_efd: &Tensor, down_edf: &Tensor, counts: &[i64]) -> Result<Tensor, Error> {
    let rows = x_rd.size()[0];
    if counts.iter().sum::<i64>() != rows || counts.len() as i64 != gate_up_efd.size()[0] {
        return Err(Error::new(format!(
            "{} experts were given {} rows in groups {counts:?}",
            gate_up_efd.size()[0],
            rows
        )));
    }
    let (out, hidden) = tch::no_grad(|| {
        let hidden = grouped_matmul(x_rd, gate_up_efd, counts, true);
        let out = grouped_matmul(&activation(&hidden), down_edf, counts, true);
        (out, hidden)
    });
    let (x, gate_up, down) = (x_rd.detach(), gate_up_efd.detach(), down_edf.detach());
    let counts = counts.to_vec();
    let mut out = attach_backward(&[x_rd, gate_up_efd, down_edf], vec![out], move |grads| {
        let Some(grad_out) = &grads[0] else { return Ok(vec![None, None, None]) };
        let grad_out = grad_out.contiguous();
        let grad_down = grouped_outer(&grad_out, &activation(&hidden), &counts, &down);
        let grad_activation = grouped_matmul(&grad_out, &down, &counts, false);
        let grad_hidden = activation_backward(&grad_activation, &hidden);
        let grad_gate_up = grouped_outer(&grad_hidden, &x, &counts, &gate_up);
        let grad_x = grouped_matmul(&grad_hidden, &gate_up, &counts, false);
        Ok(vec![Some(grad_x), Some(grad_gate_up), Some(grad_down)])
    })?;
    Ok(out.remove(0))
}

/// `silu(gate) * up` of `[R, 2F]`: `[R, F]`.
fn activation(hidden: &Tensor) -> Tensor {
    let halves = hidden.chunk(2, -1);
    halves[0].silu().multiply_(&halves[1])
}

fn activation_backward(grad: &Tensor, hidden: &Tensor) -> Tensor {
    let halves = hidden.chunk(2, -1);
    let out = hidden.empty_like();
    let parts = out.chunk(2, -1);
    parts[0].shallow_clone().copy_(&halves[0].silu_backward(&(grad * &halves[1])));
    parts[1].shallow_clone().copy_(&halves[0].silu().multiply_(grad));
    out
}

/// Each group of rows times its own matrix of `weights` `[E, out, in]` (or `[E, in, out]` if not `transposed`).
fn grouped_matmul(rows: &Tensor, weights: &Tensor, counts: &[i64], transposed: bool) -> Tensor {
    let (_, first, second) = weights.size3().expect("experts' weights have three dims");
    let out = Tensor::empty([rows.size()[0], if transposed { first } else { second }], (rows.kind(), rows.device()));
    for_each_group(counts, |expert, start, len| {
        let weight = weights.select(0, expert);
        let weight = if transposed { weight.tr() } else { weight };
        let _ = rows.narrow(0, start, len).mm_out(&out.narrow(0, start, len), &weight);
    });
    out
}

/// The weight gradient of each group, `left^T right`, of the shape of `weights`; zero where there are no rows.
fn grouped_outer(left: &Tensor, right: &Tensor, counts: &[i64], weights: &Tensor) -> Tensor {
    let out = weights.empty_like();
    for (expert, &count) in counts.iter().enumerate() {
        if count == 0 {
            let _ = out.select(0, expert as i64).zero_();
        }
    }
    for_each_group(counts, |expert, start, len| {
        let (left, right) = (left.narrow(0, start, len), right.narrow(0, start, len));
        let _ = left.tr().mm_out(&out.select(0, expert), &right);
    });
    out
}

fn for_each_group(counts: &[i64], mut body: impl FnMut(i64, i64, i64)) {
    let mut start = 0;
    for (expert, &len) in counts.iter().enumerate() {
        if len > 0 {
            body(expert as i64, start, len);
        }
        start += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Accelerator, Cpu};
    use tch::Kind;

    #[test]
    fn the_gradients_are_those_of_autograd_expert_by_expert() {
        let (hidden, ffn, counts) = (6i64, 5i64, [3i64, 0, 2]);
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Double).uniform_(-1.0, 1.0).set_requires_grad(true);
        let (x, gate_up, down) = (random(&[5, hidden]), random(&[3, 2 * ffn, hidden]), random(&[3, hidden, ffn]));
        let probe = random(&[5, hidden]).detach();
        let ours = grouped_swiglu(&x, &gate_up, &down, &counts).unwrap();
        (&ours * &probe).sum(Kind::Double).backward();
        let leaves = [x, gate_up, down];
        let grads = leaves.each_ref().map(|leaf| leaf.grad().copy());
        let [mut x, mut gate_up, mut down] = leaves;
        for leaf in [&mut x, &mut gate_up, &mut down] {
            leaf.zero_grad();
        }
        let mut outs = Vec::new();
        for (expert, start, len) in [(0, 0, 3), (2, 3, 2)] {
            let h = x.narrow(0, start, len).matmul(&gate_up.select(0, expert).tr());
            let halves = h.chunk(2, -1);
            outs.push((halves[0].silu() * &halves[1]).matmul(&down.select(0, expert).tr()));
        }
        let plain = Tensor::cat(&outs, 0);
        (&plain * &probe).sum(Kind::Double).backward();
        assert!(ours.allclose(&plain, 1e-12, 1e-12, false));
        for (leaf, grad) in [&x, &gate_up, &down].into_iter().zip(&grads) {
            let worst = (grad - leaf.grad()).abs().max().double_value(&[]);
            assert!(worst < 1e-12, "{:?} differs by {worst}", leaf.size());
        }
        assert_eq!(grads[1].select(0, 1).abs().sum(Kind::Double).double_value(&[]), 0.0);
    }

    #[test]
    fn no_rows_at_all_trains_on() {
        let weight = |shape: &[i64]| Cpu.zeros(shape, Kind::Float).fill_(1.0).set_requires_grad(true);
        let (gate_up, down) = (weight(&[2, 4, 3]), weight(&[2, 3, 2]));
        let out = grouped_swiglu(&Cpu.zeros(&[0, 3], Kind::Float), &gate_up, &down, &[0, 0]).unwrap();
        out.sum(Kind::Float).backward();
        assert_eq!(gate_up.grad().abs().sum(Kind::Float).double_value(&[]), 0.0);
        assert!(grouped_swiglu(&Cpu.zeros(&[1, 3], Kind::Float), &gate_up, &down, &[0, 0]).is_err());
    }
}
