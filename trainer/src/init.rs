//! Initial values that depend on a parameter's global name, the index and the seed alone: any rank can draw any
//! part of any parameter without drawing the rest.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

/// Elements `0..len` of the normal distribution with standard deviation `std` that belongs to (`seed`, `name`).
pub(crate) fn normal(seed: u64, name: &str, len: usize, std: f64) -> Vec<f32> {
    // Even, so that the two values of a Box-Muller pair stay together.
    const CHUNK: usize = 1 << 16;
    let mut values = vec![0f32; len];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        let mut stream = ChaCha8Rng::from_seed(key(seed, name));
        stream.set_word_pos((chunk * CHUNK) as u128);
        for pair in values.chunks_mut(2) {
            // (0, 1]: the logarithm is finite.
            let radius = (-2.0 * ((f64::from(stream.next_u32()) + 1.0) / 4294967296.0).ln()).sqrt();
            let angle = std::f64::consts::TAU * (f64::from(stream.next_u32()) / 4294967296.0);
            pair[0] = (std * radius * angle.cos()) as f32;
            if let Some(second) = pair.get_mut(1) {
                *second = (std * radius * angle.sin()) as f32;
            }
        }
    });
    values
}

/// Seed, then three FNV-1a hashes of the name from different starts.
fn key(seed: u64, name: &str) -> [u8; 32] {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    for (part, bytes) in key[8..].chunks_mut(8).enumerate() {
        let start = 0xcbf2_9ce4_8422_2325 ^ (part as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let hash = name.bytes().fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        bytes.copy_from_slice(&hash.to_le_bytes());
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_depend_on_name_index_and_seed() {
        let long = normal(1, "layers.0.q", 200_001, 0.5);
        assert_eq!(long[..70_000], normal(1, "layers.0.q", 70_000, 0.5));
        assert_ne!(long[..8], normal(2, "layers.0.q", 8, 0.5));
        assert_ne!(long[..8], normal(1, "layers.0.k", 8, 0.5));
        let mean = long.iter().map(|&v| f64::from(v)).sum::<f64>() / long.len() as f64;
        let variance = long.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / long.len() as f64;
        assert!(mean.abs() < 0.005 && (variance.sqrt() - 0.5).abs() < 0.005, "{mean} {variance}");
    }
}
