//! Element types of tensors, with conversions to and from fp32.

/// An element in memory, which arithmetic converts to fp32.
pub(crate) trait Number: Copy + Send + Sync {
    fn wide(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn narrow(x: f32) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(x: f32) -> f32 {
        x
    }
}

/// A bfloat16: the upper half of an fp32.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(transparent)]
pub(crate) struct Bf16(u16);

impl Number for Bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    #[inline(always)]
    fn narrow(x: f32) -> Bf16 {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // The carry could turn a NaN into an infinity.
        Bf16(if x.is_nan() { 0x7fc0 } else { rounded as u16 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::tests::TestTensor;
    use proptest::prelude::*;
    use tch::{Kind, Tensor};

    proptest! {
        #[test]
        fn bf16_rounds_as_libtorch(bits in any::<u32>()) {
            let x = f32::from_bits(bits);
            let theirs = Tensor::from(x)
                .to_kind(Kind::BFloat16)
                .to_f64();
            let theirs = f64::try_from(theirs).unwrap();
            let ours = f64::from(Bf16::narrow(x).wide());
            let both_nan = ours.is_nan() && theirs.is_nan();
            prop_assert!(ours == theirs || both_nan, "{} {} {}", x, ours, theirs);
        }
    }
}
