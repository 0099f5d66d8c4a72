//! Initial values that depend only on a parameter's global name, the element's index and the seed.
//!
//! Any rank can draw any part of any parameter without drawing the rest.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use rayon::prelude::*;

/// Draws the slice at `offset` of size `shape`, row-major, of the tensor `name` of shape `global`:
/// normal with standard deviation `std`.
pub(crate) fn normal(
    seed: u64,
    name: &str,
    global: &[i64],
    offset: &[i64],
    shape: &[i64],
    std: f64,
) -> Vec<f32> {
    // Trailing dimensions that are taken whole make runs of consecutive values.
    let mut run = 1;
    let mut outer = shape.len();
    while outer > 0 {
        outer -= 1;
        run *= shape[outer] as usize;
        if shape[outer] != global[outer] {
            break;
        }
    }
    let stride: Vec<i64> = (0..global.len())
        .map(|dim| global[dim + 1..].iter().product())
        .collect();
    let mut values = vec![0f32; shape.iter().product::<i64>() as usize];
    values
        .par_chunks_mut(run.max(1))
        .enumerate()
        .for_each(|(number, values)| {
            // The run's index along the outer dimensions, then its start in the whole tensor.
            let mut left = number as i64;
            let mut start: i64 = (outer..shape.len())
                .map(|dim| offset[dim] * stride[dim])
                .sum();
            for dim in (0..outer).rev() {
                start += (offset[dim] + left % shape[dim]) * stride[dim];
                left /= shape[dim];
            }
            fill(seed, name, start as usize, values, std);
        });
    values
}

/// Fills `values` with the elements from `start` on of the stream of (`seed`, `name`).
fn fill(seed: u64, name: &str, start: usize, values: &mut [f32], std: f64) {
    // Even, so that no chunk splits a Box-Muller pair.
    const CHUNK: usize = 1 << 16;
    let odd = start % 2;
    let head = odd.min(values.len());
    let (first, rest) = values.split_at_mut(head);
    if let [value] = first {
        *value = pairs(seed, name, start - 1)
            .next()
            .expect("the stream does not end")
            .1
            * std as f32;
    }
    rest.par_chunks_mut(CHUNK)
        .enumerate()
        .for_each(|(chunk, values)| {
            let drawn = pairs(seed, name, start + odd + chunk * CHUNK);
            for (pair, (a, b)) in values.chunks_mut(2).zip(drawn) {
                pair[0] = a * std as f32;
                if let Some(second) = pair.get_mut(1) {
                    *second = b * std as f32;
                }
            }
        });
}

/// Returns pairs of standard normal values from the even index `start` on.
fn pairs(seed: u64, name: &str, start: usize) -> impl Iterator<Item = (f32, f32)> {
    let mut stream = ChaCha8Rng::from_seed(key(seed, name));
    stream.set_word_pos(start as u128);
    std::iter::from_fn(move || {
        // In (0, 1], so that the logarithm is finite.
        let radius = (-2.0 * ((f64::from(stream.next_u32()) + 1.0) / 4294967296.0).ln()).sqrt();
        let angle = std::f64::consts::TAU * (f64::from(stream.next_u32()) / 4294967296.0);
        Some(((radius * angle.cos()) as f32, (radius * angle.sin()) as f32))
    })
}

/// Returns the seed and three FNV-1a hashes of the name with different initial values.
fn key(seed: u64, name: &str) -> [u8; 32] {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    for (part, bytes) in key[8..].chunks_mut(8).enumerate() {
        let start = 0xcbf2_9ce4_8422_2325 ^ (part as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let hash = name.bytes().fold(start, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        bytes.copy_from_slice(&hash.to_le_bytes());
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(seed: u64, name: &str, start: i64, len: i64) -> Vec<f32> {
        normal(seed, name, &[1 << 20], &[start], &[len], 0.5)
    }

    #[test]
    fn values_depend_on_name_index_and_seed() {
        let long = line(1, "layers.0.q", 0, 200_001);
        for start in [0, 1, 65_535, 65_536, 131_073] {
            assert_eq!(
                long[start..start + 60_000],
                line(1, "layers.0.q", start as i64, 60_000)
            );
        }
        assert_ne!(long[..8], line(2, "layers.0.q", 0, 8));
        assert_ne!(long[..8], line(1, "layers.0.k", 0, 8));
        let mean = long.iter().map(|&v| f64::from(v)).sum::<f64>() / long.len() as f64;
        let variance = long.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / long.len() as f64;
        assert!(
            mean.abs() < 0.005 && (variance.sqrt() - 0.5).abs() < 0.005,
            "{mean} {variance}"
        );
    }

    #[test]
    fn a_slice_has_the_values_of_the_whole() {
        let global = [3i64, 5, 7];
        let whole = normal(1, "w", &global, &[0, 0, 0], &global, 1.0);
        for (offset, shape) in [
            ([1i64, 2, 3], [2i64, 3, 4]),
            ([2, 0, 0], [1, 5, 7]),
            ([0, 1, 0], [3, 2, 7]),
            ([0, 0, 6], [1, 1, 1]),
        ] {
            let part = normal(1, "w", &global, &offset, &shape, 1.0);
            let mut expected = Vec::new();
            for i in 0..shape[0] {
                for j in 0..shape[1] {
                    for k in 0..shape[2] {
                        expected.push(
                            whole[(((offset[0] + i) * 5 + offset[1] + j) * 7 + offset[2] + k)
                                as usize],
                        );
                    }
                }
            }
            assert_eq!(part, expected);
        }
    }
}
