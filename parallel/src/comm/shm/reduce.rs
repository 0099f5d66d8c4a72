//! Sums, minima and maxima over ranks: in the order of ranks, so that every rank and every run gets the same bits.

use super::super::ReduceOp;
use half::{bf16, f16};
use tch::Kind;

/// Elements that are combined at a time, in memory next to the processor.
const BLOCK: usize = 1024;

/// A number in memory, and what it is computed with: 16-bit numbers are added as fp32 and rounded once.
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

/// Whether [`combine`] knows elements of this kind.
pub(super) fn supports_kind(kind: Kind) -> bool {
    use Kind::{BFloat16, Double, Float, Half, Int, Int64, Uint8};
    matches!(kind, Float | Double | BFloat16 | Half | Int64 | Int | Uint8)
}

/// Combines what `ranks` give, in their order, into `out`; where one of them is None it is what `out` holds.
///
/// All have as many bytes as `out`, which are whole, aligned elements of `kind`, one that [`supports_kind`] knows.
pub(super) fn combine(kind: Kind, op: ReduceOp, ranks: &[Option<&[u8]>], out: &mut [u8]) {
    match kind {
        Kind::Float => all::<f32>(op, ranks, out),
        Kind::Double => all::<f64>(op, ranks, out),
        Kind::BFloat16 => all::<bf16>(op, ranks, out),
        Kind::Half => all::<f16>(op, ranks, out),
        Kind::Int64 => all::<i64>(op, ranks, out),
        Kind::Int => all::<i32>(op, ranks, out),
        _ => all::<u8>(op, ranks, out),
    }
}

fn all<T: Element>(op: ReduceOp, ranks: &[Option<&[u8]>], out: &mut [u8]) {
    match op {
        ReduceOp::Sum => each::<T>(T::sum, ranks, out),
        ReduceOp::Min => each::<T>(|a, b| if b < a { b } else { a }, ranks, out),
        ReduceOp::Max => each::<T>(|a, b| if b > a { b } else { a }, ranks, out),
    }
}

#[inline(always)]
fn each<T: Element>(
    with: impl Fn(T::Accumulator, T::Accumulator) -> T::Accumulator,
    ranks: &[Option<&[u8]>],
    out: &mut [u8],
) {
    let mut sums = [T::ZERO; BLOCK];
    let block = BLOCK * size_of::<T>();
    for start in (0..out.len()).step_by(block) {
        let range = start..(start + block).min(out.len());
        for (at, rank) in ranks.iter().enumerate() {
            let given =
                numbers::<T>(rank.map_or(&out[range.clone()], |bytes| &bytes[range.clone()]));
            match at {
                0 => sums
                    .iter_mut()
                    .zip(given)
                    .for_each(|(sum, x)| *sum = x.widen()),
                _ => sums
                    .iter_mut()
                    .zip(given)
                    .for_each(|(sum, x)| *sum = with(*sum, x.widen())),
            }
        }
        numbers_mut::<T>(&mut out[range])
            .iter_mut()
            .zip(&sums)
            .for_each(|(x, sum)| *x = T::narrow(*sum));
    }
}

fn numbers<T: Element>(bytes: &[u8]) -> &[T] {
    // SAFETY: every pattern of bits is a number of these types.
    let (before, numbers, after) = unsafe { bytes.align_to::<T>() };
    assert!(
        before.is_empty() && after.is_empty(),
        "whole and aligned elements"
    );
    numbers
}

fn numbers_mut<T: Element>(bytes: &mut [u8]) -> &mut [T] {
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

    fn bytes(tensor: &Tensor) -> Vec<u8> {
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        bytes
    }

    proptest! {
        #[test]
        fn as_libtorch_in_the_order_of_ranks(ranks in 1..5usize, len in 0..3000i64, own in 0..5usize, seed in 0..1000i64) {
            tch::manual_seed(seed);
            for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half, Kind::Int64, Kind::Int, Kind::Uint8] {
                let given: Vec<Tensor> = (0..ranks).map(|_| (Tensor::randn([len], (Kind::Float, Device::Cpu)) * 9).abs().to_kind(kind)).collect();
                let raw: Vec<Vec<u8>> = given.iter().map(bytes).collect();
                let wide = |x: &Tensor| if matches!(kind, Kind::BFloat16 | Kind::Half) { x.to_kind(Kind::Float) } else { x.shallow_clone() };
                for op in [ReduceOp::Sum, ReduceOp::Min, ReduceOp::Max] {
                    let expected = given[1..].iter().fold(wide(&given[0]), |all, x| match op {
                        ReduceOp::Sum => all + wide(x),
                        ReduceOp::Min => all.minimum(&wide(x)),
                        ReduceOp::Max => all.maximum(&wide(x)),
                    });
                    let mut out = raw.get(own).cloned().unwrap_or(vec![0; raw[0].len()]);
                    let sources: Vec<_> = raw.iter().enumerate().map(|(at, x)| (at != own).then_some(x.as_slice())).collect();
                    combine(kind, op, &sources, &mut out);
                    prop_assert!(out == bytes(&expected.to_kind(kind)), "{:?} {:?}", kind, op);
                }
            }
        }
    }
}
