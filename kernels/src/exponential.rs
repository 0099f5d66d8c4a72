//! The exponential function, free of branches so that loops over it compile to vector code.

/// Returns e^x in fp32 within 1 unit in the last place.
///
/// Below -87 it returns the value at -87 (1e-38), above 88 that at 88; NaN stays NaN. The method is
/// that of Cephes' expf: x = n ln 2 + r, a polynomial of r, and n added to the exponent.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.3;
    const HIGHEST: f32 = 88.3;
    // Added to a number below 2^22, it leaves a whole number in the last bits of the mantissa.
    const WHOLE: f32 = 12_582_912.0;
    // Comparisons that let NaN through.
    let x = if x < LOWEST { LOWEST } else { x };
    let x = if x > HIGHEST { HIGHEST } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, WHOLE);
    let n = shifted - WHOLE;
    // ln 2 in two parts, so that the first multiplication is exact.
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 0.166_666_66);
    let p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    let power = shifted
        .to_bits()
        .wrapping_sub(WHOLE.to_bits())
        .wrapping_add(127)
        << 23;
    y * f32::from_bits(power)
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn it_matches_the_exponential_function() {
        for step in 0..2_000_000 {
            let x = -87.0 + step as f32 * 8.75e-5;
            let exact = f64::from(x).exp();
            let off = f64::from(exp(x)) / exact - 1.0;
            assert!(off.abs() < 1.2e-7, "exp({x}) is off by {off:e}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::INFINITY) > 2e38);
        assert_eq!(exp(0.0), 1.0);
    }
}
