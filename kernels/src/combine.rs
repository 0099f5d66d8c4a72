//! What a token's experts gave, added up: gathering rows, weighting and summing them in one pass over memory.
// Shapes: T tokens, C top_k of a token, N rows, D hidden.

use crate::cuda;
use crate::number::Number;
use crate::profile::{Cost, part};
use crate::rows::{Indices, Numbers, for_kind, for_rows, host_kind};
use multiversion::multiversion;
use tch::{Device, Kind, Tensor};

/// Numbers of a row that are summed at once.
const CHUNK: usize = 64;

/// The sum of each token's rows, of the dtype of `rows` `[N, D]`: `[T, D]`. `row_ids` `[T, C]` int64 says which row a choice has, and -1
/// that it has none; every row is one choice's. Each counts as `weights` `[T, C]` fp32 says, or as 1.
///
/// # Panics
/// When a choice's row is not there.
pub fn combine(rows: &Tensor, row_ids: &Tensor, weights: Option<&Tensor>) -> Tensor {
    part(
        "rows",
        "combined",
        || Cost::passes(1.5, rows),
        || {
            let weights = weights.map(|weights| weights.to_kind(Kind::Float).contiguous());
            if let Some(gpu) = on_gpu(&[rows], row_ids) {
                return cuda::combine(gpu, rows, row_ids, weights.as_ref());
            }
            let Some(kind) = on_host(&[rows], row_ids) else {
                return combine_by_libtorch(rows, row_ids, weights.as_ref());
            };
            let out = Tensor::empty([row_ids.size()[0], rows.size()[1]], (kind, Device::Cpu));
            for_kind!(
                kind,
                combine_on_threads(rows, row_ids, weights.as_ref(), &out)
            );
            out
        },
    )
}

/// The gradients of `rows` `[N, D]`, of their dtype, and of `weights` `[T, C]`, fp32, given that of [`combine`]'s result.
///
/// # Panics
/// When a choice's row is not there.
pub fn combine_backward(
    grad: &Tensor,
    rows: &Tensor,
    row_ids: &Tensor,
    weights: &Tensor,
) -> (Tensor, Tensor) {
    part(
        "rows",
        "combined, backward",
        || Cost::passes(2.5, rows),
        || {
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
            for_kind!(
                kind,
                backward_on_threads([&grad, rows, row_ids, &weights], &grad_rows, &grad_weights)
            );
            (grad_rows, grad_weights)
        },
    )
}

fn on_host(tensors: &[&Tensor], row_ids: &Tensor) -> Option<Kind> {
    let indexed =
        row_ids.device() == Device::Cpu && row_ids.kind() == Kind::Int64 && row_ids.is_contiguous();
    host_kind(tensors).filter(|_| indexed)
}

fn on_gpu(tensors: &[&Tensor], row_ids: &Tensor) -> Option<&'static dyn cuda::Gpu> {
    cuda::gpu(tensors).filter(|_| cuda::same_device_contiguous(tensors[0], row_ids, Kind::Int64))
}

/// Each choice's row, whichever where it has none: `[T, C, D]`.
fn gather_rows(rows: &Tensor, row_ids: &Tensor) -> Tensor {
    let shape = [row_ids.size()[0], row_ids.size()[1], rows.size()[1]];
    match rows.size()[0] {
        0 => Tensor::zeros(shape, (rows.kind(), rows.device())),
        _ => rows
            .index_select(0, &row_ids.clamp_min(0).flatten(0, -1))
            .view(shape),
    }
}

/// `weights` of the top_k that have a row, and nothing of the others: `[T, C, 1]` of `kind`.
fn factors(row_ids: &Tensor, weights: Option<&Tensor>, kind: Kind) -> Tensor {
    let there = row_ids.ge(0).to_kind(Kind::Float);
    weights
        .map_or_else(|| there.shallow_clone(), |weights| weights * &there)
        .to_kind(kind)
        .unsqueeze(-1)
}

pub(crate) fn combine_by_libtorch(
    rows: &Tensor,
    row_ids: &Tensor,
    weights: Option<&Tensor>,
) -> Tensor {
    let gather_rows = gather_rows(rows, row_ids) * factors(row_ids, weights, rows.kind());
    gather_rows.sum_dim_intlist([1i64].as_slice(), false, rows.kind())
}

pub(crate) fn backward_by_libtorch(
    grad: &Tensor,
    rows: &Tensor,
    row_ids: &Tensor,
    weights: &Tensor,
) -> (Tensor, Tensor) {
    let grad_routed = grad.unsqueeze(1) * factors(row_ids, Some(weights), rows.kind());
    let there = row_ids.flatten(0, -1).ge(0).nonzero().squeeze_dim(-1);
    let places = row_ids.flatten(0, -1).index_select(0, &there);
    let grad_routed = grad_routed.flatten(0, 1).index_select(0, &there);
    let grad_rows = rows.zeros_like().index_copy(0, &places, &grad_routed);
    let along = (gather_rows(rows, row_ids) * grad.unsqueeze(1)).to_kind(Kind::Float);
    let grad_weights =
        along.sum_dim_intlist([-1i64].as_slice(), false, Kind::Float) * row_ids.ge(0);
    (grad_rows, grad_weights)
}

fn combine_on_threads<T: Number>(
    rows: &Tensor,
    row_ids: &Tensor,
    weights: Option<&Tensor>,
    out: &Tensor,
) {
    let tokens = row_ids.size()[0] as usize;
    let top_k = row_ids.size()[1] as usize;
    let width = rows.size()[1] as usize;
    // SAFETY: all were checked, or made, to be in host memory without gaps, of the type that is named.
    let (rows, row_ids, out) = unsafe {
        (
            Numbers::<T>::of(rows),
            Indices::of(row_ids),
            Numbers::<T>::of(out),
        )
    };
    // SAFETY: likewise.
    let weights = weights.map(|weights| unsafe { Numbers::<f32>::of(weights) });
    for_rows(tokens, width * top_k, |_, range| {
        let mut chosen = Vec::with_capacity(top_k);
        for token in range {
            let one = token..token + 1;
            let weights = weights.as_ref().map(|weights| weights.part(&one, top_k));
            chosen.clear();
            for (choice, row_id) in row_ids.part(&one, top_k).iter().enumerate() {
                if let Ok(row_id) = usize::try_from(*row_id) {
                    let weight = weights.map_or(1.0, |weights| weights[choice]);
                    chosen.push((rows.part(&(row_id..row_id + 1), width), weight));
                }
            }
            // SAFETY: a token's row is one thread's.
            sum(&chosen, unsafe { out.part_mut(&one, width) });
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn sum<T: Number>(rows: &[(&[T], f32)], out: &mut [T]) {
    for (index, out) in out.chunks_mut(CHUNK).enumerate() {
        let start = index * CHUNK;
        let mut sums = [0f32; CHUNK];
        for (row, weight) in rows {
            for (sum, x) in sums.iter_mut().zip(&row[start..start + out.len()]) {
                *sum += weight * x.wide();
            }
        }
        out.iter_mut()
            .zip(sums)
            .for_each(|(out, sum)| *out = T::narrow(sum));
    }
}

fn backward_on_threads<T: Number>(
    [grad, rows, row_ids, weights]: [&Tensor; 4],
    grad_rows: &Tensor,
    grad_weights: &Tensor,
) {
    let tokens = row_ids.size()[0] as usize;
    let top_k = row_ids.size()[1] as usize;
    let width = rows.size()[1] as usize;
    // SAFETY: as in forward.
    let (grad, rows, grad_rows) = unsafe {
        (
            Numbers::<T>::of(grad),
            Numbers::<T>::of(rows),
            Numbers::<T>::of(grad_rows),
        )
    };
    // SAFETY: likewise.
    let (row_ids, weights, grad_weights) = unsafe {
        (
            Indices::of(row_ids),
            Numbers::<f32>::of(weights),
            Numbers::<f32>::of(grad_weights),
        )
    };
    for_rows(tokens, width * top_k, |_, range| {
        for token in range {
            let one = token..token + 1;
            let grad = grad.part(&one, width);
            let weights = weights.part(&one, top_k);
            // SAFETY: a token's weights are one thread's.
            let grad_weights = unsafe { grad_weights.part_mut(&one, top_k) };
            for ((row_id, weight), of_weight) in row_ids
                .part(&one, top_k)
                .iter()
                .zip(weights)
                .zip(grad_weights)
            {
                let Ok(row_id) = usize::try_from(*row_id) else {
                    continue;
                };
                let place = row_id..row_id + 1;
                // SAFETY: a row is one choice's, as the caller promises.
                *of_weight = scale(grad, rows.part(&place, width), *weight, unsafe {
                    grad_rows.part_mut(&place, width)
                });
            }
        }
    });
}

/// `of_row = weight * grad`; gives the product of `grad` and `row`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn scale<T: Number>(grad: &[T], row: &[T], weight: f32, of_row: &mut [T]) -> f32 {
    let mut lanes = [0f32; CHUNK];
    for ((grad, row), of_row) in grad
        .chunks(CHUNK)
        .zip(row.chunks(CHUNK))
        .zip(of_row.chunks_mut(CHUNK))
    {
        for (((grad, row), of_row), lane) in grad.iter().zip(row).zip(of_row).zip(&mut lanes) {
            let grad = grad.wide();
            *lane += grad * row.wide();
            *of_row = T::narrow(weight * grad);
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn it_is_libtorchs_sum_with_its_gradients(
            (tokens, top_k, width) in (0i64..40, 1i64..5, 1i64..200), missing: bool, weighted: bool, bf16: bool, seed in 0i64..1000,
        ) {
            tch::set_num_threads(2);
            tch::manual_seed(seed);
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            let tolerance = if bf16 { 3e-2 } else { 1e-5 };
            let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
            // A permutation, of which some top_k have none.
            let row_ids = Tensor::randperm(tokens * top_k, (Kind::Int64, Device::Cpu)).view([tokens, top_k]);
            let count = if missing { tokens * top_k * 2 / 3 } else { tokens * top_k };
            let row_ids = row_ids.masked_fill(&row_ids.ge(count), -1);
            let (rows, grad) = (random(&[count, width]).to_kind(kind), random(&[tokens, width]).to_kind(kind));
            let weights = random(&[tokens, top_k]);
            let some = weighted.then_some(&weights);
            let wide = |x: &Tensor| x.to_kind(Kind::Float);
            let (out, plain) = (combine(&rows, &row_ids, some), combine_by_libtorch(&wide(&rows), &row_ids, some));
            prop_assert!(wide(&out).allclose(&plain, tolerance, tolerance, false));
            let (grad_rows, grad_weights) = combine_backward(&grad, &rows, &row_ids, &weights);
            let (plain_rows, plain_weights) = backward_by_libtorch(&wide(&grad), &wide(&rows), &row_ids, &weights);
            prop_assert!(wide(&grad_rows).allclose(&plain_rows, tolerance, tolerance, false));
            prop_assert!(grad_weights.allclose(&plain_weights, 1e-4, 1e-3, false));
        }
    }

    #[test]
    #[should_panic]
    fn a_row_that_is_not_there_is_not_read() {
        let rows = Tensor::zeros([2, 4], (Kind::Float, Device::Cpu));
        let _ = combine(&rows, &Tensor::from_slice(&[2i64]).view([1, 1]), None);
    }
}
