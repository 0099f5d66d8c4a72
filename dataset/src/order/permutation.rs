//! Permutations of the windows of a source, computed on demand.
//!
//! A Feistel network over the smallest power of four that holds the range is repeated until the
//! result is in the range ("cycle walking", Black and Rogaway 2002, section 3).

/// Returns the image of `index` under the permutation of `0..len` that `key` selects.
pub(super) fn permute(index: u64, len: u64, key: u64) -> u64 {
    let half_bits = (64 - (len.max(2) - 1).leading_zeros()).div_ceil(2);
    let mask = (1u64 << half_bits) - 1;
    let mut value = index;
    loop {
        let mut left = value >> half_bits;
        let mut right = value & mask;
        for round in 0..4 {
            (left, right) = (right, left ^ (mix(key ^ mix(right ^ (round << 56))) & mask));
        }
        value = left << half_bits | right;
        if value < len {
            return value;
        }
    }
}

/// Returns the window of a source of `windows` windows that its draw number `draw` takes: each
/// epoch has an order of its own.
pub(super) fn window_of_draw(draw: u64, windows: u64, source: usize, seed: u64) -> u64 {
    let epoch = draw / windows;
    let key = mix(seed ^ mix(mix(source as u64 + 1) ^ epoch));
    permute(draw % windows, windows, key)
}

/// The finalizer of SplitMix64.
pub(super) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn a_permutation_has_every_position_once(len in 1u64..600, key in any::<u64>()) {
            let mut images: Vec<_> = (0..len).map(|index| permute(index, len, key)).collect();
            images.sort_unstable();
            prop_assert_eq!(images, (0..len).collect::<Vec<_>>());
        }
    }
}
