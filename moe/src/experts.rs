//! SwiGLU experts: a feed-forward network for each group of rows (grouped GEMM), with its gradient.
//!
//! An expert is `down(silu(gate(x)) * up(x))`, with gate and up in one matrix (GLU Variants, arXiv
//! 2002.05202). For backward, only the input and optionally the gate-up product are kept.
// Shapes: R rows, D hidden, F ffn, E computed experts (local, then lent).

pub use crate::fp8::{Fp8Weights, has_fp8_kernel};

use crate::{
    fp8::{self, ExpertMatrix, Fp8Matrices},
    lending::{
        transfer::{expert_numel, split_matrices},
        weights::LentWeights,
    },
};
use kernels::{RowGroups, grouped_gemm, grouped_gemm_accumulate, swiglu, swiglu_backward};
use parallel::{Activation, GradientSum, Weight, add_gradients};
use tch::{Device, Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// Arithmetic of the experts' GEMMs.
#[derive(Debug, Clone)]
pub enum GemmPrecision {
    /// The dtype of the model.
    Model,
    /// 8-bit operands in forward and for the gradients of rows. Gradients of weights use the
    /// dtype of the model.
    Fp8(Fp8Weights),
}

impl GemmPrecision {
    /// Returns the same arithmetic for another layer.
    pub fn for_layer(&self) -> GemmPrecision {
        match self {
            GemmPrecision::Model => GemmPrecision::Model,
            GemmPrecision::Fp8(_) => GemmPrecision::Fp8(Fp8Weights::default()),
        }
    }

    /// Frees what is derived from the weights. To be called after each update of them.
    pub fn mark_stale(&self) {
        if let GemmPrecision::Fp8(weights) = self {
            weights.forget();
        }
    }

    /// Multiplies each group of rows by its own matrix of `which`.
    fn grouped(
        &self,
        rows: &Tensor,
        matrices: &ExpertMatrices,
        which: ExpertMatrix,
        groups: &RowGroups,
    ) -> Result<Tensor, Error> {
        // The weights are `[E, out, in]` in forward, and `[E, in, out]` in backward.
        let (stacks, in_backward) = match which {
            ExpertMatrix::GateUp => (&matrices.gate_up_proj, false),
            ExpertMatrix::Down => (&matrices.down_proj, false),
            ExpertMatrix::GateUpTransposed => (&matrices.gate_up_proj, true),
            ExpertMatrix::DownTransposed => (&matrices.down_proj, true),
        };
        // GEMMs of the model's dtype take matrices `[in, out]`, those in 8 bits `[out, in]`.
        let transpose = in_backward == matches!(self, GemmPrecision::Fp8(_));
        let orient = |stack: &Tensor| {
            if transpose {
                stack.transpose(1, 2)
            } else {
                stack.shallow_clone()
            }
        };
        let stacks: Vec<Tensor> = stacks.iter().map(orient).collect();
        let weights = match self {
            GemmPrecision::Model => return Ok(grouped_gemm(rows, &stacks, groups)),
            GemmPrecision::Fp8(weights) => weights,
        };
        let own = weights.get(which, &stacks[0]);
        let lent: Vec<_> = stacks[1..].iter().map(Fp8Matrices::of).collect();
        let all = if lent.is_empty() {
            own
        } else {
            Fp8Matrices::join(std::iter::once(own).chain(lent).collect())
        };
        fp8::grouped_matmul(rows, &all, groups)
    }
}

/// Computes SwiGLU networks: rows `x_rd` `[R, D]` in expert order, `counts[e]` of them for expert
/// `e`, to `[R, D]`. One expert is a dense feed-forward network.
///
/// `gate_up_proj` is `[E, 2F, D]`, first the rows of gate, then those of up. `down_proj` is
/// `[E, D, F]`. If `keep` is true, the gate-up product is kept for backward.
///
/// # Errors
/// If the counts do not add up to R.
pub fn grouped_swiglu(
    x_rd: &Activation,
    gate_up_proj: &Weight,
    down_proj: &Weight,
    counts: &[i64],
    keep: bool,
) -> Result<Tensor, Error> {
    let weights = ExpertWeights {
        gate_up_proj,
        down_proj,
        lent: None,
    };
    grouped_swiglu_with_lent(x_rd, weights, &counts.into(), &GemmPrecision::Model, keep)
}

/// Weights of the experts that a rank computes: its own, then lent ones.
pub(crate) struct ExpertWeights<'a> {
    /// `[L, 2F, D]`.
    pub(crate) gate_up_proj: &'a Weight,
    /// `[L, D, F]`.
    pub(crate) down_proj: &'a Weight,
    pub(crate) lent: Option<LentWeights>,
}

/// Computes [`grouped_swiglu`]. Rows of lent experts follow those of this rank's experts.
///
/// # Collective
/// If experts are lent, backward is one or two exchanges of all ranks of the expert group.
pub(crate) fn grouped_swiglu_with_lent(
    x_rd: &Activation,
    weights: ExpertWeights,
    groups: &RowGroups,
    gemm: &GemmPrecision,
    keep: bool,
) -> Result<Tensor, Error> {
    let ExpertWeights {
        gate_up_proj,
        down_proj,
        lent,
    } = weights;
    let rows = x_rd.value.size()[0];
    let num_local = gate_up_proj.shape()[0];
    let experts = num_local + lent.as_ref().map_or(0, LentWeights::count);
    if groups.num_rows() != rows || groups.num_groups() as i64 != experts {
        return Err(Error::new(format!(
            "experts: {groups:?} does not fit {rows} rows and {experts} experts"
        )));
    }
    let lent_weights = fetch_lent(lent.as_ref(), gate_up_proj, down_proj)?;
    let (out, hidden) = tch::no_grad(|| {
        let matrices = ExpertMatrices::new(gate_up_proj, down_proj, lent_weights);
        let hidden = gemm.grouped(&x_rd.value, &matrices, ExpertMatrix::GateUp, groups)?;
        let out = gemm.grouped(&swiglu(&hidden), &matrices, ExpertMatrix::Down, groups)?;
        Ok::<_, Error>((out, hidden))
    })?;
    let gate_up_tracker = gate_up_proj.tracker();
    let down_tracker = down_proj.tracker();
    let backward = SwigluBackward {
        gate_up_proj: gate_up_proj.clone(),
        down_proj: down_proj.clone(),
        lent,
        groups: groups.clone(),
        gemm: gemm.clone(),
        hidden: keep.then_some(hidden),
        out_shape: out.size(),
        out_options: (out.kind(), out.device()),
    };
    let saved = x_rd.saved();
    let mut out = attach_backward(
        &[&x_rd.value, &gate_up_tracker, &down_tracker],
        vec![out],
        move |grads| {
            let Some(grad_out) = backward.grad_out(grads[0].as_ref()) else {
                return Ok(vec![None, None, None]);
            };
            let matrices = backward.matrices()?;
            let grad_x = backward.run(grad_out, saved.get()?, &matrices)?;
            Ok(vec![Some(grad_x), None, None])
        },
    )?;
    Ok(out.remove(0))
}

fn fetch_lent(
    lent: Option<&LentWeights>,
    gate_up_proj: &Weight,
    down_proj: &Weight,
) -> Result<Option<Tensor>, Error> {
    lent.map(|lent| lent.weights(gate_up_proj, down_proj))
        .transpose()
}

/// State that backward needs, without the input.
struct SwigluBackward {
    gate_up_proj: Weight,
    down_proj: Weight,
    lent: Option<LentWeights>,
    groups: RowGroups,
    gemm: GemmPrecision,
    /// The gate-up product, if it is kept.
    hidden: Option<Tensor>,
    out_shape: Vec<i64>,
    out_options: (Kind, Device),
}

impl SwigluBackward {
    fn grad_out(&self, grad: Option<&Tensor>) -> Option<Tensor> {
        match grad {
            Some(grad) => Some(grad.contiguous()),
            // Other ranks may wait for lent weights or their gradients.
            None if self.lent.is_some() => {
                Some(Tensor::zeros(self.out_shape.as_slice(), self.out_options))
            }
            None => None,
        }
    }

    fn matrices(&self) -> Result<ExpertMatrices, Error> {
        let lent = fetch_lent(self.lent.as_ref(), &self.gate_up_proj, &self.down_proj)?;
        Ok(ExpertMatrices::new(
            &self.gate_up_proj,
            &self.down_proj,
            lent,
        ))
    }

    /// Returns the gradient of the input `x`, and adds those of the weights to their sums.
    fn run(&self, grad_out: Tensor, x: Tensor, matrices: &ExpertMatrices) -> Result<Tensor, Error> {
        let groups = &self.groups;
        let multiply = |rows: &Tensor, which| self.gemm.grouped(rows, matrices, which, groups);
        let hidden = match &self.hidden {
            Some(hidden) => hidden.shallow_clone(),
            None => multiply(&x, ExpertMatrix::GateUp)?,
        };
        let grad_activation = multiply(&grad_out, ExpertMatrix::DownTransposed)?;
        let (grad_hidden, activation) = swiglu_backward(&grad_activation, &hidden);
        let grad_x = multiply(&grad_hidden, ExpertMatrix::GateUpTransposed)?;
        let operands = WeightGradientOperands {
            x,
            grad_hidden,
            activation,
            grad_out,
            groups: groups.clone(),
            lent: self.lent.clone(),
        };
        add_gradients(&[&self.down_proj, &self.gate_up_proj], move |sums| {
            operands.add_to(sums[1], sums[0])
        })?;
        Ok(grad_x)
    }
}

/// Operands of the GEMMs that add up the gradients of the weights.
struct WeightGradientOperands {
    x: Tensor,
    grad_hidden: Tensor,
    activation: Tensor,
    grad_out: Tensor,
    groups: RowGroups,
    lent: Option<LentWeights>,
}

impl WeightGradientOperands {
    fn add_to(&self, grad_gate_up: &GradientSum, grad_down: &GradientSum) -> Result<(), Error> {
        let gate_up_shape = grad_gate_up.size();
        let down_shape = grad_down.size();
        let [own_groups, lent_groups] = self.groups.split_at(down_shape[0] as usize);
        // Gradients from helpers are in flight while this rank adds up its own.
        let pending = match &self.lent {
            None => None,
            Some(lent) => {
                let elements = expert_numel(&gate_up_shape) + expert_numel(&down_shape);
                lent.add_gradients(elements, &self.x, |all| {
                    let sums = split_matrices(all, &gate_up_shape, &down_shape);
                    self.add_lent(&sums, own_groups.num_rows(), &lent_groups);
                })?
            }
        };
        grad_down.grouped_gemm_accumulate(&self.grad_out, &self.activation, &own_groups);
        grad_gate_up.grouped_gemm_accumulate(&self.grad_hidden, &self.x, &own_groups);
        match pending {
            Some(pending) => pending.wait_and_add_to(grad_gate_up.tensor(), grad_down.tensor()),
            None => Ok(()),
        }
    }

    /// Adds the gradients of lent experts, whose rows follow the first `own_rows`.
    fn add_lent(&self, sums: &[Tensor; 2], own_rows: i64, lent_groups: &RowGroups) {
        let [grad_gate_up, grad_down] = sums;
        let lent_rows = |rows: &Tensor| rows.narrow(0, own_rows, rows.size()[0] - own_rows);
        grouped_gemm_accumulate(
            grad_down,
            &lent_rows(&self.grad_out),
            &lent_rows(&self.activation),
            lent_groups,
        );
        grouped_gemm_accumulate(
            grad_gate_up,
            &lent_rows(&self.grad_hidden),
            &lent_rows(&self.x),
            lent_groups,
        );
    }
}

/// Matrices of the experts that a rank computes: its own, then lent ones.
struct ExpertMatrices {
    /// Stacks `[E, 2F, D]`.
    gate_up_proj: Vec<Tensor>,
    /// Stacks `[E, D, F]`.
    down_proj: Vec<Tensor>,
}

impl ExpertMatrices {
    fn new(gate_up_proj: &Weight, down_proj: &Weight, lent: Option<Tensor>) -> ExpertMatrices {
        let mut matrices = ExpertMatrices {
            gate_up_proj: vec![gate_up_proj.value()],
            down_proj: vec![down_proj.value()],
        };
        if let Some(lent) = lent {
            let [gate_up_proj, down_proj] = split_matrices(
                &lent,
                &matrices.gate_up_proj[0].size(),
                &matrices.down_proj[0].size(),
            );
            matrices.gate_up_proj.push(gate_up_proj);
            matrices.down_proj.push(down_proj);
        }
        matrices
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Accelerator, Cpu, GradientBuckets, Replication};

    fn gradient_buckets(weights: [&Weight; 2]) -> GradientBuckets {
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

    fn absolute_sum(x: &Tensor) -> f64 {
        x.abs().sum(Kind::Float).double_value(&[])
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
        let gradients = gradient_buckets([&gate_up_proj, &down_proj]);
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
            let rows = x.narrow(0, start, len);
            let hidden = rows.matmul(&gate_up_proj.select(0, expert).tr());
            let halves = hidden.chunk(2, -1);
            let activation = halves[0].silu() * &halves[1];
            outs.push(activation.matmul(&down_proj.select(0, expert).tr()));
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
        let without_rows = grad_gate_up.narrow(0, 2 * ffn, 2 * ffn);
        assert_eq!(absolute_sum(&without_rows), 0.0);
    }

    #[test]
    fn fp8_gives_nearly_the_same_gradients() {
        let hidden = 32i64;
        let ffn = 16i64;
        let counts = [30i64, 0, 18];
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let weights = [random(&[3, 2 * ffn, hidden]), random(&[3, hidden, ffn])].map(Weight::new);
        let gradients = gradient_buckets([&weights[0], &weights[1]]);
        let mut x = random(&[48, hidden]).set_requires_grad(true);
        let probe = random(&[48, hidden]);
        let mut run = |gemm| {
            gradients.begin(1);
            let activation = Activation::kept(&x);
            let weights = ExpertWeights {
                gate_up_proj: &weights[0],
                down_proj: &weights[1],
                lent: None,
            };
            let groups = RowGroups::from(&counts[..]);
            let out = grouped_swiglu_with_lent(&activation, weights, &groups, &gemm, true).unwrap();
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
        let plain = run(GemmPrecision::Model);
        let fp8 = run(GemmPrecision::Fp8(Fp8Weights::default()));
        for (plain, fp8) in plain.iter().zip(&fp8) {
            let off = ((fp8 - plain).norm() / plain.norm()).double_value(&[]);
            assert!(
                off > 1e-4 && off < 0.08,
                "{:?} is off by {off}",
                plain.size()
            );
        }
    }

    #[test]
    fn backward_works_without_rows() {
        let weight = |shape: &[i64]| Weight::new(Cpu.zeros(shape, Kind::Float).fill_(1.0));
        let gate_up_proj = weight(&[2, 4, 3]);
        let down_proj = weight(&[2, 3, 2]);
        let gradients = gradient_buckets([&gate_up_proj, &down_proj]);
        let rows = |count| Activation::kept(&Cpu.zeros(&[count, 3], Kind::Float));
        let out = grouped_swiglu(&rows(0), &gate_up_proj, &down_proj, &[0, 0], true).unwrap();
        out.sum(Kind::Float).backward();
        gradients.finish().unwrap();
        assert_eq!(absolute_sum(&gradients.gradient(0)), 0.0);
        assert!(grouped_swiglu(&rows(1), &gate_up_proj, &down_proj, &[0, 0], true).is_err());
    }
}
