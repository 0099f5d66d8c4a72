//! Experts: a SwiGLU feed-forward network for each group of rows (grouped GEMM), with its gradient.
//!
//! `down_proj(silu(gate(x)) * up(x))`, gate and up in one matrix (GLU Variants, arXiv 2002.05202). Of the activations
//! only the input and, if wanted, the gate-up product are kept for backward; the rest is computed again.
// Shapes: R rows, D hidden, F ffn, E experts (here: local ones).

use crate::fp8;
use crate::lending::transfer::{expert_numel, split_matrices};
use crate::lending::weights::LentWeights;
use kernels::{grouped_gemm, grouped_gemm_accumulate, swiglu, swiglu_backward};
use parallel::{Activation, Weight, add_gradients};
use tch::Tensor;
use torch_ext::{Error, attach_backward};

/// The arithmetic of experts' products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GemmPrecision {
    /// The model's.
    Model,
    /// 8-bit operands in forward and for the gradients of rows; gradients of weights in the model's.
    Fp8,
}

impl GemmPrecision {
    /// Each group of rows times its own matrix: those of the first of `matrices`, `[E, out, in]` (or `[E, in, out]` if not
    /// `transposed`), then those of the next.
    fn grouped(
        self,
        rows: &Tensor,
        matrices: &[Tensor],
        counts: &[i64],
        transposed: bool,
    ) -> Result<Tensor, Error> {
        // Products take matrices `[in, out]`, those in 8 bits `[out, in]`.
        let turned = transposed == (self == GemmPrecision::Model);
        let turn = |some: &Tensor| {
            if turned {
                some.transpose(1, 2)
            } else {
                some.shallow_clone()
            }
        };
        let matrices: Vec<Tensor> = matrices.iter().map(turn).collect();
        match self {
            GemmPrecision::Model => Ok(grouped_gemm(rows, &matrices, counts)),
            GemmPrecision::Fp8 => fp8::grouped_matmul(rows, &Tensor::cat(&matrices, 0), counts),
        }
    }
}

/// Rows `x_rd` `[R, D]`, in expert order with `counts[e]` rows for expert `e`, through `gate_up_proj_efd` `[E, 2F, D]`
/// (rows of gate, then rows of up) and `down_proj_edf` `[E, D, F]`: `[R, D]`. With `keep` the gate-up product is kept for
/// backward.
///
/// A dense feed-forward network is the case of one expert.
///
/// # Errors
/// When the counts do not add up to R.
pub fn grouped_swiglu(
    x_rd: &Activation,
    gate_up_proj_efd: &Weight,
    down_proj_edf: &Weight,
    counts: &[i64],
    keep: bool,
) -> Result<Tensor, Error> {
    grouped_swiglu_with_lent(
        x_rd,
        gate_up_proj_efd,
        down_proj_edf,
        None,
        counts,
        GemmPrecision::Model,
        keep,
    )
}

/// As [`grouped_swiglu`], with rows for lent experts after those for this rank's.
///
/// # Collective
/// Where experts are lent, backward is an exchange, or two, of all ranks of the expert group.
pub(crate) fn grouped_swiglu_with_lent(
    x_rd: &Activation,
    gate_up_proj_efd: &Weight,
    down_proj_edf: &Weight,
    lent_weights: Option<LentWeights>,
    counts: &[i64],
    gemm: GemmPrecision,
    keep: bool,
) -> Result<Tensor, Error> {
    let rows = x_rd.value.size()[0];
    let num_local = gate_up_proj_efd.shape()[0];
    let experts = num_local
        + lent_weights
            .as_ref()
            .map_or(0, |lent_weights| lent_weights.count());
    if counts.iter().sum::<i64>() != rows || counts.len() as i64 != experts {
        return Err(Error::new(format!(
            "{experts} experts were given {rows} rows in groups {counts:?}"
        )));
    }
    let weights = lent_weights
        .as_ref()
        .map(|lent_weights| lent_weights.weights(gate_up_proj_efd, down_proj_edf))
        .transpose()?;
    let (out, hidden) = tch::no_grad(|| {
        let here = ExpertMatrices::new(gate_up_proj_efd, down_proj_edf, weights);
        let hidden = gemm.grouped(&x_rd.value, &here.gate_up_proj, counts, true)?;
        let out = gemm.grouped(&swiglu(&hidden), &here.down_proj, counts, true)?;
        Ok::<_, Error>((out, hidden))
    })?;
    let kept = keep.then_some(hidden);
    let saved = x_rd.saved();
    let gate_up_proj = gate_up_proj_efd.clone();
    let down_proj = down_proj_edf.clone();
    let counts = counts.to_vec();
    let grad_gate_up = gate_up_proj_efd.tracker();
    let grad_down = down_proj_edf.tracker();
    let grad_shape = out.size();
    let options = (out.kind(), out.device());
    let mut out = attach_backward(
        &[&x_rd.value, &grad_gate_up, &grad_down],
        vec![out],
        move |grads| {
            let grad_out = match &grads[0] {
                Some(grad) => grad.contiguous(),
                // Others may wait for lent weights or their gradients.
                None if lent_weights.is_some() => Tensor::zeros(grad_shape.as_slice(), options),
                None => return Ok(vec![None, None, None]),
            };
            let weights = lent_weights
                .as_ref()
                .map(|lent_weights| lent_weights.weights(&gate_up_proj, &down_proj))
                .transpose()?;
            let x = saved.get()?;
            let here = ExpertMatrices::new(&gate_up_proj, &down_proj, weights);
            let hidden = match &kept {
                Some(hidden) => hidden.shallow_clone(),
                None => gemm.grouped(&x, &here.gate_up_proj, &counts, true)?,
            };
            let grad_activation = gemm.grouped(&grad_out, &here.down_proj, &counts, false)?;
            let (grad_hidden, activation) = swiglu_backward(&grad_activation, &hidden);
            let grad_x = gemm.grouped(&grad_hidden, &here.gate_up_proj, &counts, false)?;
            let lent_weights = lent_weights.clone();
            let counts = counts.clone();
            add_gradients(&[&down_proj, &gate_up_proj], move |sums| {
                let grad_down = sums[0];
                let grad_gate_up = sums[1];
                let down_proj = grad_down.size();
                let gate_up_proj = grad_gate_up.size();
                let (own, lent_counts) = counts.split_at(down_proj[0] as usize);
                let own_rows: i64 = own.iter().sum();
                // What helpers owe is on its way while this rank adds up its own.
                let returning = match lent_weights {
                    None => None,
                    Some(lent_weights) => {
                        let rest =
                            |rows: &Tensor| rows.narrow(0, own_rows, rows.size()[0] - own_rows);
                        lent_weights.add_gradients(
                            expert_numel(&gate_up_proj) + expert_numel(&down_proj),
                            &x,
                            |all| {
                                let [grad_gate_up, grad_down] =
                                    split_matrices(all, &gate_up_proj, &down_proj);
                                grouped_gemm_accumulate(
                                    &grad_down,
                                    &rest(&grad_out),
                                    &rest(&activation),
                                    lent_counts,
                                );
                                grouped_gemm_accumulate(
                                    &grad_gate_up,
                                    &rest(&grad_hidden),
                                    &rest(&x),
                                    lent_counts,
                                );
                            },
                        )?
                    }
                };
                grad_down.grouped_gemm_accumulate(&grad_out, &activation, own);
                grad_gate_up.grouped_gemm_accumulate(&grad_hidden, &x, own);
                returning.map_or(Ok(()), |returning| {
                    returning.wait_and_add_to(grad_gate_up.tensor(), grad_down.tensor())
                })
            })?;
            Ok(vec![Some(grad_x), None, None])
        },
    )?;
    Ok(out.remove(0))
}

/// The matrices of the experts that a rank works on: its own, then lent ones.
struct ExpertMatrices {
    /// `[E, 2F, D]` each.
    gate_up_proj: Vec<Tensor>,
    /// `[E, D, F]` each.
    down_proj: Vec<Tensor>,
}

impl ExpertMatrices {
    fn new(
        gate_up_proj: &Weight,
        down_proj: &Weight,
        lent_weights: Option<Tensor>,
    ) -> ExpertMatrices {
        let mut here = ExpertMatrices {
            gate_up_proj: vec![gate_up_proj.value()],
            down_proj: vec![down_proj.value()],
        };
        if let Some(lent_weights) = lent_weights {
            let [gate_up_proj, down_proj] = split_matrices(
                &lent_weights,
                &here.gate_up_proj[0].size(),
                &here.down_proj[0].size(),
            );
            here.gate_up_proj.push(gate_up_proj);
            here.down_proj.push(down_proj);
        }
        here
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Accelerator, Cpu, GradientBuckets, Replication};
    use tch::Kind;

    fn collect(weights: [&Weight; 2]) -> GradientBuckets {
        let alone = [Replication::alone()];
        let gradients = GradientBuckets::new(
            &weights.map(|w| (w.clone(), 0)),
            &alone,
            1 << 20,
            true,
            &Cpu,
        )
        .unwrap();
        gradients.begin(1);
        gradients
    }

    #[test]
    fn the_gradients_are_those_of_autograd_expert_by_expert() {
        let hidden = 6i64;
        let ffn = 5i64;
        let counts = [3i64, 0, 2];
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let values = [random(&[3, 2 * ffn, hidden]), random(&[3, hidden, ffn])];
        let mut x = random(&[5, hidden]).set_requires_grad(true);
        let probe = random(&[5, hidden]);
        let [gate_up_proj, down_proj] = values.each_ref().map(|value| Weight::new(value.copy()));
        let gradients = collect([&gate_up_proj, &down_proj]);
        let mut run = |keep| {
            gradients.begin(1);
            let ours = grouped_swiglu(
                &Activation::kept(&x),
                &gate_up_proj,
                &down_proj,
                &counts,
                keep,
            )
            .unwrap();
            (&ours * &probe).sum(Kind::Float).backward();
            let grad_x = x.grad().copy();
            x.zero_grad();
            (
                ours.detach(),
                grad_x,
                gradients.gradient(0).copy(),
                gradients.gradient(1).copy(),
            )
        };
        let (ours, grad_x, grad_gate_up, grad_down) = run(true);
        assert_eq!(
            run(false),
            (
                ours.copy(),
                grad_x.copy(),
                grad_gate_up.copy(),
                grad_down.copy()
            )
        );
        let [gate_up_proj, down_proj] = values.map(|value| value.set_requires_grad(true));
        let mut outs = Vec::new();
        for (expert, start, len) in [(0, 0, 3), (2, 3, 2)] {
            let h = x
                .narrow(0, start, len)
                .matmul(&gate_up_proj.select(0, expert).tr());
            let halves = h.chunk(2, -1);
            outs.push((halves[0].silu() * &halves[1]).matmul(&down_proj.select(0, expert).tr()));
        }
        let plain = Tensor::cat(&outs, 0);
        (&plain * &probe).sum(Kind::Float).backward();
        assert!(ours.allclose(&plain, 1e-5, 1e-6, false));
        for (grad, plain) in [
            (&grad_x, x.grad()),
            (&grad_gate_up, gate_up_proj.grad()),
            (&grad_down, down_proj.grad()),
        ] {
            let plain = plain.view_as(grad);
            assert!(
                grad.allclose(&plain, 1e-5, 1e-6, false),
                "{:?}",
                plain.size()
            );
        }
        assert_eq!(
            grad_gate_up
                .narrow(0, 2 * ffn, 2 * ffn)
                .abs()
                .sum(Kind::Float)
                .double_value(&[]),
            0.0
        );
    }

    #[test]
    fn fp8_trains_on_nearly_the_same_gradients() {
        let hidden = 32i64;
        let ffn = 16i64;
        let counts = [30i64, 0, 18];
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let weights = [random(&[3, 2 * ffn, hidden]), random(&[3, hidden, ffn])].map(Weight::new);
        let gradients = collect([&weights[0], &weights[1]]);
        let mut x = random(&[48, hidden]).set_requires_grad(true);
        let probe = random(&[48, hidden]);
        let mut run = |gemm| {
            gradients.begin(1);
            let activation = Activation::kept(&x);
            let out = grouped_swiglu_with_lent(
                &activation,
                &weights[0],
                &weights[1],
                None,
                &counts,
                gemm,
                true,
            )
            .unwrap();
            (&out * &probe).sum(Kind::Float).backward();
            let grad_x = x.grad().copy();
            x.zero_grad();
            [
                out.detach(),
                grad_x,
                gradients.gradient(0).copy(),
                gradients.gradient(1).copy(),
            ]
        };
        for (plain, fp8) in run(GemmPrecision::Model)
            .iter()
            .zip(&run(GemmPrecision::Fp8))
        {
            let off = ((fp8 - plain).norm() / plain.norm()).double_value(&[]);
            assert!(
                off > 1e-4 && off < 0.08,
                "{:?} is off by {off}",
                plain.size()
            );
        }
    }

    #[test]
    fn no_rows_at_all_trains_on() {
        let weight = |shape: &[i64]| Weight::new(Cpu.zeros(shape, Kind::Float).fill_(1.0));
        let gate_up_proj = weight(&[2, 4, 3]);
        let down_proj = weight(&[2, 3, 2]);
        let gradients = collect([&gate_up_proj, &down_proj]);
        let rows = |count| Activation::kept(&Cpu.zeros(&[count, 3], Kind::Float));
        let out = grouped_swiglu(&rows(0), &gate_up_proj, &down_proj, &[0, 0], true).unwrap();
        out.sum(Kind::Float).backward();
        gradients.finish().unwrap();
        assert_eq!(
            gradients
                .gradient(0)
                .abs()
                .sum(Kind::Float)
                .double_value(&[]),
            0.0
        );
        assert!(grouped_swiglu(&rows(1), &gate_up_proj, &down_proj, &[0, 0], true).is_err());
    }
}
