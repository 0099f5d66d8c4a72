//! Sums, minima and maxima over ranks, in rank order: every rank and every run gets the same bits.

use super::super::ReduceOp;
use half::{bf16, f16};
use tch::Kind;

/// The number of elements that are combined at once: the block fits into the L1 cache.
const BLOCK: usize = 1024;

/// A number in memory and the type in which it is accumulated: 16-bit floats are added as fp32 and
/// rounded once.
trait Element: Copy + 'static {
    type Accumulator: Copy + PartialOrd;
    const ZERO: Self::Accumulator;
    fn widen(self) -> Self::Accumulator;
    fn narrow(wide: Self::Accumulator) -> Self;
    fn sum(a: Self::Accumulator, b: Self::Accumulator) -> Self::Accumulator;
}

macro_rules! element {
    ($type:ty as $wide:ty, $zero:expr, $widen:expr, $narrow:expr, $sum:expr) => {
        impl Element for $type {
            type Accumulator = $wide;
            const ZERO: $wide = $zero;
            #[inline(always)]
            fn widen(self) -> $wide {
                $widen(self)
            }
            #[inline(always)]
            fn narrow(wide: $wide) -> $type {
                $narrow(wide)
            }
            #[inline(always)]
            fn sum(a: $wide, b: $wide) -> $wide {
                $sum(a, b)
            }
        }
    };
}
element!(f32 as f32, 0.0, |x| x, |x| x, |a, b| a + b);
element!(f64 as f64, 0.0, |x| x, |x| x, |a, b| a + b);
element!(bf16 as f32, 0.0, bf16::to_f32, bf16::from_f32, |a, b| a + b);
element!(f16 as f32, 0.0, f16::to_f32, f16::from_f32, |a, b| a + b);
element!(i64 as i64, 0, |x| x, |x| x, i64::wrapping_add);
element!(i32 as i32, 0, |x| x, |x| x, i32::wrapping_add);
element!(u8 as u8, 0, |x| x, |x| x, u8::wrapping_add);

/// True if [`combine`] supports elements of this kind.
pub(super) fn supports_kind(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Float
            | Kind::Double
            | Kind::BFloat16
            | Kind::Half
            | Kind::Int64
            | Kind::Int
            | Kind::Uint8
    )
}

/// Combines the values of all `ranks`, in their order, into `out`. `None` stands for the values
/// that `out` holds.
///
/// All have the length of `out`, and consist of whole, aligned elements of a kind for which
/// [`supports_kind`] is true.
pub(super) fn combine(kind: Kind, op: ReduceOp, ranks: &[Option<&[u8]>], out: &mut [u8]) {
    match kind {
        Kind::Float => combine_typed::<f32>(op, ranks, out),
        Kind::Double => combine_typed::<f64>(op, ranks, out),
        Kind::BFloat16 => combine_typed::<bf16>(op, ranks, out),
        Kind::Half => combine_typed::<f16>(op, ranks, out),
        Kind::Int64 => combine_typed::<i64>(op, ranks, out),
        Kind::Int => combine_typed::<i32>(op, ranks, out),
        _ => combine_typed::<u8>(op, ranks, out),
    }
}

fn combine_typed<T>(op: ReduceOp, ranks: &[Option<&[u8]>], out: &mut [u8])
where
    T: Element,
{
    match op {
        ReduceOp::Sum => combine_blocks::<T>(T::sum, ranks, out),
        ReduceOp::Min => combine_blocks::<T>(|a, b| if b < a { b } else { a }, ranks, out),
        ReduceOp::Max => combine_blocks::<T>(|a, b| if b > a { b } else { a }, ranks, out),
    }
}

#[inline(always)]
fn combine_blocks<T>(
    with: impl Fn(T::Accumulator, T::Accumulator) -> T::Accumulator,
    ranks: &[Option<&[u8]>],
    out: &mut [u8],
) where
    T: Element,
{
    let mut sums = [T::ZERO; BLOCK];
    let block = BLOCK * size_of::<T>();
    for start in (0..out.len()).step_by(block) {
        let range = start..(start + block).min(out.len());
        for (index, rank) in ranks.iter().enumerate() {
            let bytes = rank.unwrap_or(&*out);
            let values = numbers::<T>(&bytes[range.clone()]);
            if index == 0 {
                for (sum, x) in sums.iter_mut().zip(values) {
                    *sum = x.widen();
                }
            } else {
                for (sum, x) in sums.iter_mut().zip(values) {
                    *sum = with(*sum, x.widen());
                }
            }
        }
        let results = numbers_mut::<T>(&mut out[range]);
        for (x, sum) in results.iter_mut().zip(&sums) {
            *x = T::narrow(*sum);
        }
    }
}

fn numbers<T>(bytes: &[u8]) -> &[T]
where
    T: Element,
{
    // SAFETY: every bit pattern is a number of these types.
    let (before, numbers, after) = unsafe { bytes.align_to::<T>() };
    assert!(
        before.is_empty() && after.is_empty(),
        "whole and aligned elements"
    );
    numbers
}

fn numbers_mut<T>(bytes: &mut [u8]) -> &mut [T]
where
    T: Element,
{
    // SAFETY: as above.
    let (before, numbers, after) = unsafe { bytes.align_to_mut::<T>() };
    assert!(
        before.is_empty() && after.is_empty(),
        "whole and aligned elements"
    );
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::{Device, Tensor};

    const KINDS: [Kind; 7] = [
        Kind::Float,
        Kind::Double,
        Kind::BFloat16,
        Kind::Half,
        Kind::Int64,
        Kind::Int,
        Kind::Uint8,
    ];

    fn bytes(tensor: &Tensor) -> Vec<u8> {
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        bytes
    }

    proptest! {
        #[test]
        fn results_are_those_of_libtorch_in_rank_order(
            ranks in 1..5usize,
            len in 0..3000i64,
            own in 0..5usize,
            seed in 0..1000i64,
        ) {
            tch::manual_seed(seed);
            for kind in KINDS {
                let draw = |_| {
                    let values = Tensor::randn([len], (Kind::Float, Device::Cpu)) * 9;
                    values.abs().to_kind(kind)
                };
                let values: Vec<Tensor> = (0..ranks).map(draw).collect();
                let raw: Vec<Vec<u8>> = values.iter().map(bytes).collect();
                let wide = |x: &Tensor| match kind {
                    Kind::BFloat16 | Kind::Half => x.to_kind(Kind::Float),
                    _ => x.shallow_clone(),
                };
                for op in [ReduceOp::Sum, ReduceOp::Min, ReduceOp::Max] {
                    let combined = |all: Tensor, x: &Tensor| match op {
                        ReduceOp::Sum => all + wide(x),
                        ReduceOp::Min => all.minimum(&wide(x)),
                        ReduceOp::Max => all.maximum(&wide(x)),
                    };
                    let expected = values[1..]
                        .iter()
                        .fold(wide(&values[0]), combined);
                    let mut out = raw
                        .get(own)
                        .cloned()
                        .unwrap_or(vec![0; raw[0].len()]);
                    let mut sources: Vec<_> = raw
                        .iter()
                        .map(|x| Some(x.as_slice()))
                        .collect();
                    if let Some(source) = sources.get_mut(own) {
                        *source = None;
                    }
                    combine(kind, op, &sources, &mut out);
                    prop_assert!(out == bytes(&expected.to_kind(kind)), "{:?} {:?}", kind, op);
                }
            }
        }
    }
}
