//! The erasure code of a stripe: it computes parities, and lost chunks from the remaining ones.

use crate::stripes::Redundancy;
use rusty_erasure::matrix::Matrix;

/// Bytes per chunk that Reed-Solomon codes at a time. So few keep a whole stripe in the cache.
const BLOCK_BYTES: usize = 64 << 10;

/// Bytes that [`xor`] sums at a time. So few keep the output in the first-level cache.
const XOR_BLOCK_BYTES: usize = 4 << 10;

/// The reason why chunks cannot be coded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodeError {
    /// A Reed-Solomon code over 256 symbols cannot be this wide.
    #[error("erasure coding {data} + {parity}: {reason}")]
    Unsupported {
        data: usize,
        parity: usize,
        reason: String,
    },
    /// More chunks are lost than there are parities.
    #[error("{left} of {total} chunks are left, and {needed} are needed")]
    TooFewChunks {
        left: usize,
        total: usize,
        needed: usize,
    },
    /// The coder refused to decode.
    #[error("cannot decode: {0}")]
    Decode(String),
}

/// A code for stripes with a fixed number of data and parity chunks.
pub struct ErasureCode {
    data: usize,
    parity: usize,
    kind: Kind,
}

enum Kind {
    /// Each parity is a copy of the one data chunk.
    Copies,
    /// The one parity is the XOR of the data.
    Xor,
    ReedSolomon(rusty_erasure::Coder),
}

impl ErasureCode {
    /// Returns the code for stripes of `data` data chunks and `parity` parities.
    ///
    /// # Errors
    /// If a Reed-Solomon code cannot be this wide.
    pub fn new(
        redundancy: Redundancy,
        data: usize,
        parity: usize,
    ) -> Result<ErasureCode, CodeError> {
        let kind = match (redundancy, parity) {
            // A group with an odd node has stripes of more chunks: one copy cannot cover both.
            (Redundancy::Copies(_), _) if data == 1 => Kind::Copies,
            (_, 1) => Kind::Xor,
            _ => {
                let matrix = Matrix::cauchy(data, parity);
                let coder = matrix.and_then(rusty_erasure::coder);
                let coder = coder.map_err(|e| CodeError::Unsupported {
                    data,
                    parity,
                    reason: e.to_string(),
                })?;
                Kind::ReedSolomon(coder)
            }
        };
        Ok(ErasureCode { data, parity, kind })
    }

    /// Computes the parities of data chunks of equal length.
    ///
    /// # Panics
    /// If the chunks are not those of a stripe of this code.
    pub fn encode(&self, data: &[&[u8]], parity: &mut [&mut [u8]]) {
        assert!(
            data.len() == self.data && parity.len() == self.parity,
            "{} + {} chunks for a code of {} + {}",
            data.len(),
            parity.len(),
            self.data,
            self.parity
        );
        match &self.kind {
            Kind::Copies => {
                for parity in parity {
                    parity.copy_from_slice(data[0]);
                }
            }
            Kind::Xor => xor(data, parity[0]),
            Kind::ReedSolomon(coder) => {
                let len = data[0].len();
                for start in (0..len).step_by(BLOCK_BYTES) {
                    let end = (start + BLOCK_BYTES).min(len);
                    let data: Vec<&[u8]> = data.iter().map(|chunk| &chunk[start..end]).collect();
                    let chunks = parity.iter_mut();
                    let mut parity: Vec<&mut [u8]> =
                        chunks.map(|chunk| &mut chunk[start..end]).collect();
                    coder
                        .encode(&data, &mut parity)
                        .expect("shapes are checked above");
                }
            }
        }
    }

    /// Computes chunk `wanted` of a stripe from the remaining ones, all of equal length. The data
    /// chunks come first, then the parities.
    ///
    /// # Errors
    /// If too few chunks are left.
    pub fn rebuild(
        &self,
        chunks: &[Option<&[u8]>],
        wanted: usize,
        out: &mut [u8],
    ) -> Result<(), CodeError> {
        if let Some(present) = chunks[wanted] {
            out.copy_from_slice(present);
            return Ok(());
        }
        let present: Vec<&[u8]> = chunks.iter().flatten().copied().collect();
        if present.len() < self.data {
            return Err(CodeError::TooFewChunks {
                left: present.len(),
                total: chunks.len(),
                needed: self.data,
            });
        }
        match &self.kind {
            Kind::Copies => out.copy_from_slice(present[0]),
            Kind::Xor => xor(&present, out),
            Kind::ReedSolomon(coder) => decode(coder, chunks, wanted, out)?,
        }
        Ok(())
    }
}

fn decode(
    coder: &rusty_erasure::Coder,
    chunks: &[Option<&[u8]>],
    wanted: usize,
    out: &mut [u8],
) -> Result<(), CodeError> {
    let is_present: Vec<bool> = chunks.iter().map(Option::is_some).collect();
    let plan = coder
        .decode_plan(&is_present, &[wanted])
        .map_err(|e| CodeError::Decode(e.to_string()))?;
    for start in (0..out.len()).step_by(BLOCK_BYTES) {
        let end = (start + BLOCK_BYTES).min(out.len());
        let chunks = chunks.iter().copied();
        let blocks: Vec<Option<&[u8]>> = chunks
            .map(|chunk| chunk.map(|chunk| &chunk[start..end]))
            .collect();
        coder
            .recover_with(&plan, &blocks, &mut [&mut out[start..end]])
            .map_err(|e| CodeError::Decode(e.to_string()))?;
    }
    Ok(())
}

/// Computes the XOR of all `sources` in one pass over memory, four of them at a time.
///
/// # Panics
/// If the sources and `out` differ in length.
pub fn xor(sources: &[&[u8]], out: &mut [u8]) {
    assert!(
        sources.iter().all(|source| source.len() == out.len()),
        "chunks differ in length"
    );
    for (index, out) in out.chunks_mut(XOR_BLOCK_BYTES).enumerate() {
        let len = out.len();
        out.fill(0);
        for group in sources.chunks(4) {
            let block = |number: usize| &group[number][index * XOR_BLOCK_BYTES..][..len];
            match group.len() {
                4 => {
                    let first = block(0).iter().zip(block(1));
                    let second = block(2).iter().zip(block(3));
                    for (out, ((a, b), (c, d))) in out.iter_mut().zip(first.zip(second)) {
                        *out ^= a ^ b ^ c ^ d;
                    }
                }
                3 => {
                    let first = block(0).iter().zip(block(1));
                    for (out, ((a, b), c)) in out.iter_mut().zip(first.zip(block(2))) {
                        *out ^= a ^ b ^ c;
                    }
                }
                2 => {
                    let both = block(0).iter().zip(block(1));
                    for (out, (a, b)) in out.iter_mut().zip(both) {
                        *out ^= a ^ b;
                    }
                }
                _ => {
                    for (out, a) in out.iter_mut().zip(block(0)) {
                        *out ^= a;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{prelude::*, sample::Index};

    fn redundancy() -> impl Strategy<Value = Redundancy> {
        let copies = (1usize..4).prop_map(Redundancy::Copies);
        let sizes = (1usize..9, 1usize..5);
        let parity = sizes.prop_map(|(data, parity)| Redundancy::Parity { data, parity });
        prop_oneof![copies, parity]
    }

    /// Returns pseudorandom chunks of `len` bytes.
    fn random_chunks(count: usize, len: usize, seed: u64) -> Vec<Vec<u8>> {
        let mut state = seed;
        let mut byte = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 56) as u8
        };
        let mut chunk = || (0..len).map(|_| byte()).collect();
        (0..count).map(|_| chunk()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn any_chunks_are_rebuilt_from_any_that_suffice(
            redundancy in redundancy(),
            len in 0usize..700,
            seed in any::<u64>(),
            lost in prop::collection::vec(any::<Index>(), 4),
        ) {
            let (data, parity) = match redundancy {
                Redundancy::Parity { data, parity } => (data, parity),
                other => (1, other.max_losses()),
            };
            let code = ErasureCode::new(redundancy, data, parity).unwrap();
            let mut chunks = random_chunks(data, len, seed);
            let mut parities = vec![vec![7u8; len]; parity];
            let views: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
            let mut outputs: Vec<_> = parities.iter_mut().map(Vec::as_mut_slice).collect();
            code.encode(&views, &mut outputs);
            chunks.extend(parities);
            let mut left: Vec<Option<&[u8]>> =
                chunks.iter().map(|chunk| Some(chunk.as_slice())).collect();
            for index in lost.iter().take(parity) {
                left[index.index(chunks.len())] = None;
            }
            for (wanted, chunk) in chunks.iter().enumerate() {
                let mut out = vec![3u8; len];
                code.rebuild(&left, wanted, &mut out).unwrap();
                prop_assert_eq!(&out, chunk, "{:?} chunk {}", redundancy, wanted);
            }
        }
    }

    #[test]
    fn too_few_chunks_are_an_error() {
        let redundancy = Redundancy::Parity { data: 4, parity: 2 };
        let code = ErasureCode::new(redundancy, 4, 2).unwrap();
        let left: [Option<&[u8]>; 6] = [Some(&[1]), None, None, None, Some(&[2]), Some(&[3])];
        let error = code.rebuild(&left, 1, &mut [0]).unwrap_err();
        let expected = "3 of 6 chunks are left, and 4 are needed";
        assert_eq!(error.to_string(), expected);
    }
}
