//! The code of a stripe: parities of chunks, and chunks out of what is left.

use crate::stripes::Redundancy;
use rusty_erasure::matrix::Matrix;

/// Bytes that are coded at once: few enough that a stripe's share of them stays in the cache.
const BLOCK: usize = 64 << 10;

/// Makes parities and rebuilds chunks for a number of data and parity chunks.
pub struct ErasureCode {
    data: usize,
    parity: usize,
    kind: Kind,
}

enum Kind {
    /// Each parity is the one chunk of data.
    Copies,
    /// One parity.
    Xor,
    ReedSolomon(rusty_erasure::Coder),
}

impl ErasureCode {
    /// The code of `redundancy` for stripes of `data` chunks and `parity` parities.
    ///
    /// # Errors
    /// When a Reed-Solomon code over 256 symbols cannot be so wide.
    pub fn new(redundancy: Redundancy, data: usize, parity: usize) -> Result<ErasureCode, String> {
        let kind = match (redundancy, parity) {
            (Redundancy::Copies(_), _) => Kind::Copies,
            (_, 1) => Kind::Xor,
            _ => {
                let matrix = Matrix::cauchy(data, parity);
                let coder = matrix.and_then(rusty_erasure::coder);
                Kind::ReedSolomon(
                    coder.map_err(|e| format!("erasure coding {data} + {parity}: {e}"))?,
                )
            }
        };
        Ok(ErasureCode { data, parity, kind })
    }

    /// Parities of `data` chunks of equal length.
    pub fn encode(&self, data: &[&[u8]], parity: &mut [&mut [u8]]) {
        assert!(
            data.len() == self.data && parity.len() == self.parity,
            "a stripe of this code"
        );
        match &self.kind {
            Kind::Copies => parity
                .iter_mut()
                .for_each(|parity| parity.copy_from_slice(data[0])),
            Kind::Xor => xor(data, parity[0]),
            Kind::ReedSolomon(coder) => {
                for start in (0..data[0].len()).step_by(BLOCK) {
                    let end = (start + BLOCK).min(data[0].len());
                    let data: Vec<&[u8]> = data.iter().map(|chunk| &chunk[start..end]).collect();
                    let mut parity: Vec<&mut [u8]> = parity
                        .iter_mut()
                        .map(|chunk| &mut chunk[start..end])
                        .collect();
                    coder
                        .encode(&data, &mut parity)
                        .expect("shapes are checked above");
                }
            }
        }
    }

    /// Chunk `wanted` of a stripe (data first, then parity) out of those that are there, all of one length.
    ///
    /// # Errors
    /// When too few are left.
    pub fn rebuild(
        &self,
        chunks: &[Option<&[u8]>],
        wanted: usize,
        out: &mut [u8],
    ) -> Result<(), String> {
        if let Some(there) = chunks[wanted] {
            out.copy_from_slice(there);
            return Ok(());
        }
        let present: Vec<usize> = (0..chunks.len())
            .filter(|&index| chunks[index].is_some())
            .collect();
        if present.len() < self.data {
            return Err(format!(
                "{} of {} chunks are left, and {} are needed",
                present.len(),
                chunks.len(),
                self.data
            ));
        }
        let chunk = |index: usize| chunks[index].expect("it is present");
        match &self.kind {
            Kind::Copies => out.copy_from_slice(chunk(present[0])),
            Kind::Xor => xor(&present.iter().map(|&i| chunk(i)).collect::<Vec<_>>(), out),
            Kind::ReedSolomon(coder) => {
                let there: Vec<bool> = chunks.iter().map(Option::is_some).collect();
                let plan = coder
                    .decode_plan(&there, &[wanted])
                    .map_err(|e| e.to_string())?;
                for start in (0..out.len()).step_by(BLOCK) {
                    let end = (start + BLOCK).min(out.len());
                    let chunks: Vec<_> = chunks
                        .iter()
                        .map(|chunk| chunk.map(|chunk| &chunk[start..end]))
                        .collect();
                    coder
                        .recover_with(&plan, &chunks, &mut [&mut out[start..end]])
                        .map_err(|e| e.to_string())?;
                }
            }
        }
        Ok(())
    }
}

/// The XOR of all `sources`, in one pass over memory: four at a time into a block of `out` that stays in the first cache.
pub fn xor(sources: &[&[u8]], out: &mut [u8]) {
    const BLOCK: usize = 4 << 10;
    assert!(
        sources.iter().all(|source| source.len() == out.len()),
        "chunks of one length"
    );
    for (index, out) in out.chunks_mut(BLOCK).enumerate() {
        let len = out.len();
        out.fill(0);
        for four in sources.chunks(4) {
            let part = |number: usize| &four[number][index * BLOCK..][..len];
            match four.len() {
                4 => {
                    let a = part(0);
                    let b = part(1);
                    let c = part(2);
                    let d = part(3);
                    let values = a.iter().zip(b).zip(c).zip(d);
                    out.iter_mut()
                        .zip(values)
                        .for_each(|(out, (((a, b), c), d))| *out ^= a ^ b ^ c ^ d);
                }
                3 => {
                    let values = part(0).iter().zip(part(1)).zip(part(2));
                    out.iter_mut()
                        .zip(values)
                        .for_each(|(out, ((a, b), c))| *out ^= a ^ b ^ c);
                }
                2 => out
                    .iter_mut()
                    .zip(part(0).iter().zip(part(1)))
                    .for_each(|(out, (a, b))| *out ^= a ^ b),
                _ => out.iter_mut().zip(part(0)).for_each(|(out, a)| *out ^= a),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn redundancy() -> impl Strategy<Value = Redundancy> {
        prop_oneof![
            (1usize..4).prop_map(Redundancy::Copies),
            (1usize..9, 1usize..5).prop_map(|(data, parity)| Redundancy::Parity { data, parity }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn any_chunks_are_rebuilt_from_any_that_suffice(
            redundancy in redundancy(), len in 0usize..700, seed in any::<u64>(), lost in prop::collection::vec(any::<prop::sample::Index>(), 4),
        ) {
            let (data, parity) = match redundancy {
                Redundancy::Parity { data, parity } => (data, parity),
                other => (1, other.survives()),
            };
            let code = ErasureCode::new(redundancy, data, parity).unwrap();
            let mut state = seed;
            let mut byte = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            };
            let mut chunks: Vec<Vec<u8>> = (0..data).map(|_| (0..len).map(|_| byte()).collect()).collect();
            let mut parities = vec![vec![7u8; len]; parity];
            let views: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
            code.encode(&views, &mut parities.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>());
            chunks.extend(parities);
            let lost: Vec<usize> = lost.iter().take(parity).map(|index| index.index(chunks.len())).collect();
            let left: Vec<Option<&[u8]>> =
                chunks.iter().enumerate().map(|(i, chunk)| (!lost.contains(&i)).then_some(chunk.as_slice())).collect();
            for (wanted, chunk) in chunks.iter().enumerate() {
                let mut out = vec![3u8; len];
                code.rebuild(&left, wanted, &mut out).unwrap();
                prop_assert_eq!(&out, chunk, "{:?} chunk {}", redundancy, wanted);
            }
        }
    }

    #[test]
    fn too_few_chunks_are_an_error() {
        let code = ErasureCode::new(Redundancy::Parity { data: 4, parity: 2 }, 4, 2).unwrap();
        let error = code
            .rebuild(
                &[Some(&[1]), None, None, None, Some(&[2]), Some(&[3])],
                1,
                &mut [0],
            )
            .unwrap_err();
        assert_eq!(error, "3 of 6 chunks are left, and 4 are needed");
    }
}
