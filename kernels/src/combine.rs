//! The weighted sum of each token's expert outputs, gathered in one pass over memory.
// Shapes: T tokens, K chosen experts of a token, N rows, D hidden.

use crate::{
    cuda,
    number::Number,
    profile::{Cost, span},
    rows::{HostData, Indices, for_kind, for_rows, host_kind},
    tensors::{LAST_DIM, empty_as, sizes},
};
use multiversion::multiversion;
use tch::{Device, Kind, Tensor};

/// Elements of a row that are summed at once.
const CHUNK: usize = 64;

/// Returns the weighted sum of each token's rows, `[T, D]` in the dtype of `rows` `[N, D]`.
///
/// `row_ids` `[T, K]` int32 holds the row of each routed token, or -1 if it has none. A row belongs
/// to one routed token. The weights are `[T, K]` fp32, or 1.
///
/// # Panics
/// If a row id is out of range.
pub fn combine(rows: &Tensor, row_ids: &Tensor, weights: Option<&Tensor>) -> Tensor {
    let cost = || Cost::passes(1.5, rows);
    span("combine", "forward", cost, || {
        let weights = weights.map(|weights| weights.to_kind(Kind::Float).contiguous());
        let weights = weights.as_ref();
        if let Some(gpu) = on_gpu(&[rows], row_ids) {
            return cuda::combine(gpu, rows, row_ids, weights);
        }
        let Some(kind) = on_host(&[rows], row_ids) else {
            return combine_by_libtorch(rows, row_ids, weights);
        };
        let [tokens] = sizes(row_ids);
        let [_, width] = sizes(rows);
        let out = empty_as(rows, [tokens, width]);
        for_kind!(kind, combine_on_threads(rows, row_ids, weights, &out));
        out
    })
}

/// Returns the gradients of `rows`, `[N, D]` in their dtype, and of `weights`, `[T, K]` fp32.
///
/// `grad` is the gradient of the result of [`combine`].
///
/// # Panics
/// If a row id is out of range.
pub fn combine_backward(
    grad: &Tensor,
    rows: &Tensor,
    row_ids: &Tensor,
    weights: &Tensor,
) -> (Tensor, Tensor) {
    let cost = || Cost::passes(2.5, rows);
    span("combine", "backward", cost, || {
        let grad = grad.to_kind(rows.kind()).contiguous();
        let weights = weights.to_kind(Kind::Float).contiguous();
        if let Some(gpu) = on_gpu(&[&grad, rows], row_ids) {
            return cuda::combine_backward(gpu, &grad, rows, row_ids, &weights);
        }
        let Some(kind) = on_host(&[&grad, rows], row_ids) else {
            return backward_by_libtorch(&grad, rows, row_ids, &weights);
        };
        let grad_rows = rows.empty_like();
        let grad_weights = weights.zeros_like();
        let inputs = BackwardInputs {
            grad: &grad,
            rows,
            row_ids,
            weights: &weights,
        };
        for_kind!(kind, backward_on_threads(inputs, &grad_rows, &grad_weights));
        (grad_rows, grad_weights)
    })
}

fn on_host(tensors: &[&Tensor], row_ids: &Tensor) -> Option<Kind> {
    let indexed =
        row_ids.device() == Device::Cpu && row_ids.kind() == Kind::Int && row_ids.is_contiguous();
    host_kind(tensors).filter(|_| indexed)
}

fn on_gpu(tensors: &[&Tensor], row_ids: &Tensor) -> Option<&'static dyn cuda::Gpu> {
    let indexed = cuda::same_device_contiguous(tensors[0], row_ids, Kind::Int);
    cuda::gpu(tensors).filter(|_| indexed)
}

/// Returns the row of each routed token, `[T, K, D]`, or an arbitrary one if it has none.
fn gather_rows(rows: &Tensor, row_ids: &Tensor) -> Tensor {
    let [tokens, top_k] = sizes(row_ids);
    let [count, width] = sizes(rows);
    if count == 0 {
        return empty_as(rows, [tokens, top_k, width]).zero_();
    }
    let row_ids = row_ids.clamp_min(0).flatten(0, -1);
    let shape = [tokens as i64, top_k as i64, width as i64];
    rows.index_select(0, &row_ids).view(shape)
}

/// Returns the weights of routed tokens, and zero for those without a row: `[T, K, 1]` of `kind`.
fn factors(row_ids: &Tensor, weights: Option<&Tensor>, kind: Kind) -> Tensor {
    let has_row = row_ids.ge(0).to_kind(Kind::Float);
    let factors = match weights {
        Some(weights) => weights * &has_row,
        None => has_row,
    };
    factors.to_kind(kind).unsqueeze(-1)
}

pub(crate) fn combine_by_libtorch(
    rows: &Tensor,
    row_ids: &Tensor,
    weights: Option<&Tensor>,
) -> Tensor {
    let weighted = gather_rows(rows, row_ids) * factors(row_ids, weights, rows.kind());
    weighted.sum_dim_intlist([1i64].as_slice(), false, rows.kind())
}

pub(crate) fn backward_by_libtorch(
    grad: &Tensor,
    rows: &Tensor,
    row_ids: &Tensor,
    weights: &Tensor,
) -> (Tensor, Tensor) {
    let factors = factors(row_ids, Some(weights), rows.kind());
    let grad_routed = grad.unsqueeze(1) * factors;
    // Routed tokens without a row write to one that is dropped: to leave them out, the host would
    // have to wait for their number.
    let [count, width] = sizes(rows);
    let flat_ids = row_ids.flatten(0, -1).to_kind(Kind::Int64);
    let flat_ids = flat_ids.masked_fill(&flat_ids.lt(0), count as i64);
    let with_dropped = empty_as(rows, [count + 1, width]).zero_();
    let grad_rows = with_dropped
        .index_copy(0, &flat_ids, &grad_routed.flatten(0, 1))
        .narrow(0, 0, count as i64);
    let products = gather_rows(rows, row_ids) * grad.unsqueeze(1);
    let products = products.to_kind(Kind::Float);
    let dots = products.sum_dim_intlist(LAST_DIM, false, Kind::Float);
    (grad_rows, dots * row_ids.ge(0))
}

fn combine_on_threads<T>(rows: &Tensor, row_ids: &Tensor, weights: Option<&Tensor>, out: &Tensor)
where
    T: Number,
{
    let [tokens, top_k] = sizes(row_ids);
    let [_, width] = sizes(rows);
    // SAFETY: `on_host` has checked the device, layout and dtype; the rest is created here.
    let [rows, out] = unsafe { HostData::<T>::of_all([rows, out]) };
    // SAFETY: as above.
    let row_ids = unsafe { Indices::<i32>::of(row_ids) };
    // SAFETY: as above.
    let weights = weights.map(|weights| unsafe { HostData::<f32>::of(weights) });
    for_rows(tokens, width * top_k, |_, range| {
        let mut weighted = Vec::with_capacity(top_k);
        for token in range {
            let token = token..token + 1;
            let weights = weights.as_ref().map(|weights| weights.rows(&token, top_k));
            weighted.clear();
            for (k, row_id) in row_ids.rows(&token, top_k).iter().enumerate() {
                if let Ok(row_id) = usize::try_from(*row_id) {
                    let weight = weights.map_or(1.0, |weights| weights[k]);
                    let row = rows.rows(&(row_id..row_id + 1), width);
                    weighted.push(WeightedRow { row, weight });
                }
            }
            // SAFETY: each token belongs to one thread.
            sum(&weighted, unsafe { out.rows_mut(&token, width) });
        }
    });
}

struct WeightedRow<'a, T> {
    row: &'a [T],
    weight: f32,
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn sum<T>(rows: &[WeightedRow<T>], out: &mut [T])
where
    T: Number,
{
    for (index, out) in out.chunks_mut(CHUNK).enumerate() {
        let start = index * CHUNK;
        let mut sums = [0f32; CHUNK];
        for WeightedRow { row, weight } in rows {
            let row = &row[start..start + out.len()];
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += weight * x.wide();
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = T::narrow(sum);
        }
    }
}

struct BackwardInputs<'a> {
    grad: &'a Tensor,
    rows: &'a Tensor,
    row_ids: &'a Tensor,
    weights: &'a Tensor,
}

fn backward_on_threads<T>(inputs: BackwardInputs, grad_rows: &Tensor, grad_weights: &Tensor)
where
    T: Number,
{
    let BackwardInputs {
        grad,
        rows,
        row_ids,
        weights,
    } = inputs;
    let [tokens, top_k] = sizes(row_ids);
    let [_, width] = sizes(rows);
    // SAFETY: as in `combine_on_threads`.
    let [grad, rows, grad_rows] = unsafe { HostData::<T>::of_all([grad, rows, grad_rows]) };
    // SAFETY: as above.
    let row_ids = unsafe { Indices::<i32>::of(row_ids) };
    // SAFETY: as above.
    let [weights, grad_weights] =
        [weights, grad_weights].map(|x| unsafe { HostData::<f32>::of(x) });
    for_rows(tokens, width * top_k, |_, range| {
        for token in range {
            let token = token..token + 1;
            let grad = grad.rows(&token, width);
            let weights = weights.rows(&token, top_k);
            // SAFETY: each token belongs to one thread.
            let grad_weights = unsafe { grad_weights.rows_mut(&token, top_k) };
            let routed = row_ids.rows(&token, top_k).iter().zip(weights);
            for ((row_id, weight), grad_weight) in routed.zip(grad_weights) {
                let Ok(row_id) = usize::try_from(*row_id) else {
                    continue;
                };
                let row_id = row_id..row_id + 1;
                let row = rows.rows(&row_id, width);
                // SAFETY: a row belongs to one routed token, as the caller promises.
                let grad_row = unsafe { grad_rows.rows_mut(&row_id, width) };
                *grad_weight = weighted_gradient(grad, row, *weight, grad_row);
            }
        }
    });
}

/// Computes `grad_row = weight * grad` and returns the dot product of `grad` and `row`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn weighted_gradient<T>(token_grad: &[T], row: &[T], weight: f32, grad_row: &mut [T]) -> f32
where
    T: Number,
{
    let mut lanes = [0f32; CHUNK];
    let chunks = token_grad.chunks(CHUNK).zip(row.chunks(CHUNK));
    for ((token_grad, row), grad_row) in chunks.zip(grad_row.chunks_mut(CHUNK)) {
        let elements = token_grad.iter().zip(row).zip(grad_row);
        for (((token_grad, row), grad_row), lane) in elements.zip(&mut lanes) {
            let token_grad = token_grad.wide();
            *lane += token_grad * row.wide();
            *grad_row = T::narrow(weight * token_grad);
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::tests::randn;
    use proptest::prelude::*;
    use tch::kind::{FLOAT_CPU, INT64_CPU};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn it_matches_libtorch(
            tokens in 0i64..40,
            top_k in 1i64..5,
            width in 1i64..200,
            missing: bool,
            weighted: bool,
            bf16: bool,
            seed in 0i64..1000,
        ) {
            tch::set_num_threads(2);
            tch::manual_seed(seed);
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            let tolerance = if bf16 { 3e-2 } else { 1e-5 };
            // A permutation in which some routed tokens may have no row.
            let routed = tokens * top_k;
            let row_ids = Tensor::randperm(routed, INT64_CPU);
            let row_ids = row_ids.view([tokens, top_k]);
            let count = if missing { routed * 2 / 3 } else { routed };
            let row_ids = row_ids
                .masked_fill(&row_ids.ge(count), -1)
                .to_kind(Kind::Int);
            let rows = randn(&[count, width], kind);
            let grad = randn(&[tokens, width], kind);
            let weights = randn(&[tokens, top_k], Kind::Float);
            let some = weighted.then_some(&weights);
            let wide = |x: &Tensor| x.to_kind(Kind::Float);
            let out = combine(&rows, &row_ids, some);
            let plain = combine_by_libtorch(&wide(&rows), &row_ids, some);
            prop_assert!(wide(&out).allclose(&plain, tolerance, tolerance, false));
            let (grad_rows, grad_weights) = combine_backward(&grad, &rows, &row_ids, &weights);
            let (plain_rows, plain_weights) =
                backward_by_libtorch(&wide(&grad), &wide(&rows), &row_ids, &weights);
            prop_assert!(wide(&grad_rows).allclose(&plain_rows, tolerance, tolerance, false));
            prop_assert!(grad_weights.allclose(&plain_weights, 1e-4, 1e-3, false));
        }
    }

    #[test]
    #[should_panic]
    fn a_row_id_out_of_range_panics() {
        let rows = Tensor::zeros([2, 4], FLOAT_CPU);
        let row_ids = Tensor::from_slice(&[2i32]).view([1, 1]);
        let _ = combine(&rows, &row_ids, None);
    }
}
