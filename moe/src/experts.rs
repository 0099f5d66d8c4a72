//! Experts: a gated feed-forward network for each group of rows (grouped GEMM), with its gradient.
//!
//! For backward, only the input and optionally the gate-up product are kept.
// Shapes: R rows, D hidden, F ffn, E computed experts (local, then lent).

pub use crate::fp8::{Fp8Weights, has_fp8_kernel};

use crate::{
    fp8::{self, ExpertMatrix, Fp8Matrices},
    lending::{
        transfer::{expert_numel, split_stacks},
        weights::LentWeights,
    },
};
use kernels::{Glu, RowGroups, add_group_bias, grouped_gemm, grouped_gemm_accumulate, sum_groups};
use parallel::{Activation, GradientSum, Weight, add_gradients};
use tch::Tensor;
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
            ExpertMatrix::GateUp => (&matrices.0[GATE_UP], false),
            ExpertMatrix::Down => (&matrices.0[DOWN], false),
            ExpertMatrix::GateUpTransposed => (&matrices.0[GATE_UP], true),
            ExpertMatrix::DownTransposed => (&matrices.0[DOWN], true),
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

/// Gated feed-forward networks: those of this rank's experts, or one of a dense layer.
///
/// A network is `down(activation(gate(x), up(x)))`, with gate and up in one matrix (GLU Variants,
/// arXiv 2002.05202).
#[derive(Clone)]
pub struct GluNetworks {
    /// `[L, 2F, D]`: of each network the rows of gate, then those of up.
    pub gate_up_proj: Weight,
    /// `[L, D, F]`.
    pub down_proj: Weight,
    pub biases: Option<GluBiases>,
    pub activation: Glu,
}

/// Biases of gated feed-forward networks.
#[derive(Clone)]
pub struct GluBiases {
    /// `[L, 2F, 1]`, in the order of the rows of gate-up.
    pub gate_up: Weight,
    /// `[L, d, 1]`, added to the columns of the result from `first_column` on. Ranks that split the
    /// networks add up their results, so each adds a part of the bias.
    pub down: Weight,
    pub first_column: i64,
}

impl GluNetworks {
    /// Returns SwiGLU networks with these matrices and without biases.
    pub fn swiglu(gate_up_proj: Weight, down_proj: Weight) -> GluNetworks {
        GluNetworks {
            gate_up_proj,
            down_proj,
            biases: None,
            activation: Glu::Swiglu,
        }
    }

    /// Returns all weights, each a stack with one tensor per network: gate-up, down, and the biases
    /// of both.
    pub fn weights(&self) -> Vec<&Weight> {
        let mut weights = vec![&self.gate_up_proj, &self.down_proj];
        if let Some(biases) = &self.biases {
            weights.extend([&biases.gate_up, &biases.down]);
        }
        weights
    }

    /// Returns the columns of the results `[R, D]` that the bias of down is added to.
    fn biased_columns(&self, results: &Tensor) -> Option<Tensor> {
        let GluBiases {
            down, first_column, ..
        } = self.biases.as_ref()?;
        Some(results.narrow(1, *first_column, down.shape()[1]))
    }

    /// Returns the values of [`GluNetworks::weights`].
    pub(crate) fn values(&self) -> Vec<Tensor> {
        let weights = self.weights().into_iter();
        weights.map(Weight::value).collect()
    }

    /// Returns the number of networks.
    fn count(&self) -> i64 {
        self.gate_up_proj.shape()[0]
    }

    /// Returns the bytes of one network.
    pub(crate) fn bytes(&self) -> i64 {
        let weights = self.weights().into_iter();
        let elements = weights
            .map(|weight| expert_numel(weight.shape()))
            .sum::<i64>();
        elements * self.gate_up_proj.kind().elt_size_in_bytes() as i64
    }
}

/// Computes networks: rows `x_rd` `[R, D]` in the order of the networks, `counts[e]` of them for
/// network `e`, to `[R, D]`. If `keep` is true, the gate-up product is kept for backward.
///
/// # Errors
/// If the counts do not add up to R.
pub fn grouped_glu(
    x_rd: &Activation,
    networks: &GluNetworks,
    counts: &[i64],
    keep: bool,
) -> Result<Tensor, Error> {
    let model = &GemmPrecision::Model;
    grouped_glu_with_lent(x_rd, networks, None, &counts.into(), model, keep)
}

/// Computes [`grouped_glu`]. Rows of the `lent` networks follow those of this rank's.
///
/// # Collective
/// If experts are lent, backward is one or two exchanges of all ranks of the expert group.
pub(crate) fn grouped_glu_with_lent(
    x_rd: &Activation,
    networks: &GluNetworks,
    lent: Option<LentWeights>,
    groups: &RowGroups,
    gemm: &GemmPrecision,
    keep: bool,
) -> Result<Tensor, Error> {
    let rows = x_rd.value.size()[0];
    let experts = networks.count() + lent.as_ref().map_or(0, LentWeights::count);
    if groups.num_rows() != rows || groups.num_groups() as i64 != experts {
        return Err(Error::new(format!(
            "experts: {groups:?} does not fit {rows} rows and {experts} experts"
        )));
    }
    let mut computation = Computation {
        networks: networks.clone(),
        lent,
        groups: groups.clone(),
        gemm: gemm.clone(),
        hidden: None,
    };
    let matrices = computation.matrices()?;
    let (out, hidden) = tch::no_grad(|| {
        let hidden = computation.hidden(&x_rd.value, &matrices)?;
        let activation = networks.activation.forward(&hidden);
        let out = computation.multiply(&activation, &matrices, ExpertMatrix::Down)?;
        if let Some(columns) = networks.biased_columns(&out) {
            add_group_bias(&columns, &matrices.bias(DOWN_BIAS), groups)?;
        }
        Ok::<_, Error>((out, hidden))
    })?;
    computation.hidden = keep.then_some(hidden);
    let out_shape = out.size();
    let out_options = (out.kind(), out.device());
    let weights = networks.weights().into_iter();
    let trackers: Vec<Tensor> = weights.map(Weight::tracker).collect();
    let inputs = std::iter::once(&x_rd.value)
        .chain(&trackers)
        .collect::<Vec<&Tensor>>();
    let of_trackers = trackers.len();
    let saved = x_rd.saved();
    let mut out = attach_backward(&inputs, vec![out], move |grads| {
        let mut grad_inputs: Vec<_> = (0..=of_trackers).map(|_| None).collect();
        let grad_out = match grads[0].as_ref() {
            Some(grad) => grad.contiguous(),
            // Other ranks may wait for lent weights or their gradients.
            None if computation.lent.is_some() => Tensor::zeros(out_shape.as_slice(), out_options),
            None => return Ok(grad_inputs),
        };
        let matrices = computation.matrices()?;
        grad_inputs[0] = Some(computation.backward(grad_out, saved.get()?, &matrices)?);
        Ok(grad_inputs)
    })?;
    Ok(out.remove(0))
}

/// A computation of rows by networks, from forward to backward, without its input.
struct Computation {
    networks: GluNetworks,
    lent: Option<LentWeights>,
    groups: RowGroups,
    gemm: GemmPrecision,
    /// The gate-up product, if it is kept for backward.
    hidden: Option<Tensor>,
}

impl Computation {
    fn matrices(&self) -> Result<ExpertMatrices, Error> {
        let mut stacks: Vec<Vec<Tensor>> = Vec::new();
        let own = self.networks.weights();
        stacks.extend(own.iter().map(|weight| vec![weight.value()]));
        if let Some(lent) = &self.lent {
            let shapes = own
                .iter()
                .map(|weight| weight.shape().to_vec())
                .collect::<Vec<Vec<i64>>>();
            let lent = split_stacks(&lent.weights(&own)?, &shapes);
            for (stacks, lent) in stacks.iter_mut().zip(lent) {
                stacks.push(lent);
            }
        }
        Ok(ExpertMatrices(stacks))
    }

    fn multiply(
        &self,
        rows: &Tensor,
        matrices: &ExpertMatrices,
        which: ExpertMatrix,
    ) -> Result<Tensor, Error> {
        self.gemm.grouped(rows, matrices, which, &self.groups)
    }

    /// Returns the gate-up product `[R, 2F]` of the input `x`, with its bias.
    fn hidden(&self, x: &Tensor, matrices: &ExpertMatrices) -> Result<Tensor, Error> {
        let hidden = self.multiply(x, matrices, ExpertMatrix::GateUp)?;
        if self.networks.biases.is_some() {
            add_group_bias(&hidden, &matrices.bias(GATE_UP_BIAS), &self.groups)?;
        }
        Ok(hidden)
    }

    /// Returns the gradient of the input `x`, and adds those of the weights to their sums.
    fn backward(
        &self,
        grad_out: Tensor,
        x: Tensor,
        matrices: &ExpertMatrices,
    ) -> Result<Tensor, Error> {
        let hidden = match &self.hidden {
            Some(hidden) => hidden.shallow_clone(),
            None => self.hidden(&x, matrices)?,
        };
        let grad_activation = self.multiply(&grad_out, matrices, ExpertMatrix::DownTransposed)?;
        let glu = self.networks.activation;
        let (grad_hidden, activation) = glu.backward(&grad_activation, &hidden);
        let grad_x = self.multiply(&grad_hidden, matrices, ExpertMatrix::GateUpTransposed)?;
        let operands = GradientOperands {
            x,
            grad_hidden,
            activation,
            grad_columns: self.networks.biased_columns(&grad_out),
            grad_out,
        };
        let groups = self.groups.clone();
        let lent = self.lent.clone();
        // The last weight of forward is the first of backward.
        let last_first = self
            .networks
            .weights()
            .into_iter()
            .rev()
            .collect::<Vec<&Weight>>();
        add_gradients(&last_first, move |sums| {
            let sums: Vec<&GradientSum> = sums.iter().copied().rev().collect();
            add_to_sums(&sums, &operands, &groups, lent.as_ref())
        })?;
        Ok(grad_x)
    }
}

/// Rows from which the gradients of the weights are computed.
struct GradientOperands {
    x: Tensor,
    grad_hidden: Tensor,
    activation: Tensor,
    grad_out: Tensor,
    /// The columns of `grad_out` with a bias, if there are biases.
    grad_columns: Option<Tensor>,
}

/// Adds the gradients of all weights to `sums`, in their order. Lent networks return theirs home.
fn add_to_sums(
    sums: &[&GradientSum],
    operands: &GradientOperands,
    groups: &RowGroups,
    lent: Option<&LentWeights>,
) -> Result<(), Error> {
    let shapes: Vec<Vec<i64>> = sums.iter().map(|sum| sum.size()).collect();
    let [own_groups, lent_groups] = groups.split_at(shapes[0][0] as usize);
    // Gradients from helpers are in flight while this rank adds up its own.
    let pending = match lent {
        None => None,
        Some(lent) => {
            let elements = shapes.iter().map(|shape| expert_numel(shape)).sum();
            lent.add_gradients(elements, &operands.x, |all| {
                let lent_rows = operands.after(own_groups.num_rows());
                lent_rows.accumulate(&split_stacks(all, &shapes), &lent_groups)
            })?
        }
    };
    operands.add_own(sums, &own_groups)?;
    match pending {
        Some(pending) => {
            let sums = sums
                .iter()
                .map(|sum| sum.tensor())
                .collect::<Vec<&Tensor>>();
            pending.wait_and_add_to(&sums)
        }
        None => Ok(()),
    }
}

impl GradientOperands {
    /// Returns the operands of the rows after the first `own_rows`.
    fn after(&self, own_rows: i64) -> GradientOperands {
        let rest = |rows: &Tensor| rows.narrow(0, own_rows, rows.size()[0] - own_rows);
        GradientOperands {
            x: rest(&self.x),
            grad_hidden: rest(&self.grad_hidden),
            activation: rest(&self.activation),
            grad_out: rest(&self.grad_out),
            grad_columns: self.grad_columns.as_ref().map(rest),
        }
    }

    /// Adds the gradients of this rank's networks, in `groups`, to the weights' sums.
    fn add_own(&self, sums: &[&GradientSum], groups: &RowGroups) -> Result<(), Error> {
        sums[DOWN].grouped_gemm_accumulate(&self.grad_out, &self.activation, groups);
        sums[GATE_UP].grouped_gemm_accumulate(&self.grad_hidden, &self.x, groups);
        self.add_to_biases(groups, |index| sums[index].tensor().shallow_clone())
    }

    /// Adds the gradients of lent networks, in `groups`, to sums in fp32.
    fn accumulate(&self, sums: &[Tensor], groups: &RowGroups) -> Result<(), Error> {
        grouped_gemm_accumulate(&sums[DOWN], &self.grad_out, &self.activation, groups);
        grouped_gemm_accumulate(&sums[GATE_UP], &self.grad_hidden, &self.x, groups);
        self.add_to_biases(groups, |index| sums[index].shallow_clone())
    }

    /// Adds the gradients of the biases, if there are any, to the tensors that `sum` returns.
    fn add_to_biases(
        &self,
        groups: &RowGroups,
        sum: impl Fn(usize) -> Tensor,
    ) -> Result<(), Error> {
        let Some(grad_columns) = &self.grad_columns else {
            return Ok(());
        };
        let of_groups = |rows: &Tensor| rows.narrow(0, 0, groups.num_rows());
        let sum = |index: usize| sum(index).squeeze_dim(-1);
        sum_groups(&sum(GATE_UP_BIAS), &of_groups(&self.grad_hidden), groups)?;
        sum_groups(&sum(DOWN_BIAS), &of_groups(grad_columns), groups)
    }
}

/// The index of each weight in the order of [`GluNetworks::weights`].
const GATE_UP: usize = 0;
const DOWN: usize = 1;
const GATE_UP_BIAS: usize = 2;
const DOWN_BIAS: usize = 3;

/// Weights of the networks that a rank computes: stacks of its own, then lent ones, of each of
/// [`GluNetworks::weights`].
struct ExpertMatrices(Vec<Vec<Tensor>>);

impl ExpertMatrices {
    /// Returns the bias of each network, `[E, N]`.
    fn bias(&self, index: usize) -> Tensor {
        match self.0[index].as_slice() {
            [own] => own.squeeze_dim(-1),
            stacks => Tensor::cat(stacks, 0).squeeze_dim(-1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::ClampedGlu;
    use parallel::{Accelerator, Cpu, GradientBuckets, Replication};
    use tch::Kind;

    fn gradient_buckets(networks: &GluNetworks) -> GradientBuckets {
        let alone = [Replication::alone()];
        let weights = networks.weights().into_iter();
        let gradients = GradientBuckets::new(
            &weights.map(|w| (w.clone(), 0)).collect::<Vec<_>>(),
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
        let networks = GluNetworks::swiglu(gate_up_proj, down_proj);
        let gradients = gradient_buckets(&networks);
        let mut run = |keep| {
            gradients.begin(1);
            let ours = grouped_glu(&Activation::kept(&x), &networks, &counts, keep).unwrap();
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
    fn biases_and_a_clamped_activation_have_the_gradients_of_autograd() {
        let glu = ClampedGlu {
            alpha: 1.5,
            limit: 0.4,
        };
        let hidden = 6i64;
        let ffn = 5i64;
        let counts = [3i64, 0, 2];
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let shapes = [
            [3, 2 * ffn, hidden],
            [3, hidden, ffn],
            [3, 2 * ffn, 1],
            [3, 4, 1],
        ];
        let values = shapes.each_ref().map(|shape| random(shape));
        let [gate_up_proj, down_proj, gate_up, down] =
            values.each_ref().map(|value| Weight::new(value.copy()));
        let networks = GluNetworks {
            biases: Some(GluBiases {
                gate_up,
                down,
                first_column: 1,
            }),
            activation: Glu::Clamped(glu),
            ..GluNetworks::swiglu(gate_up_proj, down_proj)
        };
        let gradients = gradient_buckets(&networks);
        let mut x = random(&[5, hidden]).set_requires_grad(true);
        let probe = random(&[5, hidden]);
        let ours = grouped_glu(&Activation::kept(&x), &networks, &counts, false).unwrap();
        (&ours * &probe).sum(Kind::Float).backward();
        let grad_x = x.grad().copy();
        x.zero_grad();
        let values = values.map(|value| value.set_requires_grad(true));
        let mut outs = Vec::new();
        for (expert, start, len) in [(0, 0, 3), (2, 3, 2)] {
            let [gate_up_proj, down_proj, gate_up, down] =
                values.each_ref().map(|value| value.select(0, expert));
            let rows = x.narrow(0, start, len);
            let halves = (rows.matmul(&gate_up_proj.tr()) + gate_up.tr()).chunk(2, -1);
            let gate = halves[0].clamp_max(0.4);
            let up = halves[1].clamp(-0.4, 0.4);
            let activation = (&gate * 1.5).sigmoid() * gate * (up + 1.0);
            let bias = down.tr().constant_pad_nd([1, 1]);
            outs.push(activation.matmul(&down_proj.tr()) + bias);
        }
        let plain = Tensor::cat(&outs, 0);
        (&plain * &probe).sum(Kind::Float).backward();
        assert!(ours.allclose(&plain, 1e-5, 1e-6, false));
        assert!(grad_x.allclose(&x.grad(), 1e-5, 1e-6, false));
        for (index, value) in values.iter().enumerate() {
            let grad = gradients.gradient(index).view_as(value);
            assert!(grad.allclose(&value.grad(), 1e-5, 1e-6, false), "{index}");
        }
    }

    #[test]
    fn fp8_gives_nearly_the_same_gradients() {
        let hidden = 32i64;
        let ffn = 16i64;
        let counts = [30i64, 0, 18];
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let weight = |shape: &[i64]| Weight::new(random(shape));
        let networks = GluNetworks {
            biases: Some(GluBiases {
                gate_up: weight(&[3, 2 * ffn, 1]),
                down: weight(&[3, hidden, 1]),
                first_column: 0,
            }),
            ..GluNetworks::swiglu(weight(&[3, 2 * ffn, hidden]), weight(&[3, hidden, ffn]))
        };
        let gradients = gradient_buckets(&networks);
        let mut x = random(&[48, hidden]).set_requires_grad(true);
        let probe = random(&[48, hidden]);
        let mut run = |gemm| {
            gradients.begin(1);
            let activation = Activation::kept(&x);
            let groups = RowGroups::from(&counts[..]);
            let out =
                grouped_glu_with_lent(&activation, &networks, None, &groups, &gemm, true).unwrap();
            (&out * &probe).sum(Kind::Float).backward();
            let grad_x = x.grad().copy();
            x.zero_grad();
            [
                out.detach(),
                grad_x,
                gradients.gradient(0).copy(),
                gradients.gradient(1).copy(),
                gradients.gradient(2).copy(),
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
        let networks = GluNetworks::swiglu(weight(&[2, 4, 3]), weight(&[2, 3, 2]));
        let gradients = gradient_buckets(&networks);
        let rows = |count| Activation::kept(&Cpu.zeros(&[count, 3], Kind::Float));
        let out = grouped_glu(&rows(0), &networks, &[0, 0], true).unwrap();
        out.sum(Kind::Float).backward();
        gradients.finish().unwrap();
        assert_eq!(absolute_sum(&gradients.gradient(0)), 0.0);
        assert!(grouped_glu(&rows(1), &networks, &[0, 0], true).is_err());
    }
}
