//! How alike the choices of neighbouring tokens are: local routing consistency (arXiv 2505.16056), which says what a cache
//! of experts, or one set of them for a segment of tokens, would be worth.

/// How often each expert is active in each segment of `segment` tokens of sequences of `sequence` tokens, from `experts`
/// `[T * K]`; what is left over at the end of a sequence is not counted.
fn counts(
    experts: &[i64],
    top_k: usize,
    num_experts: usize,
    sequence: usize,
    segment: usize,
) -> Vec<Vec<usize>> {
    let sequences = experts.chunks_exact(sequence * top_k);
    let segments = sequences.flat_map(|sequence| sequence.chunks_exact(segment * top_k));
    let count = |segment: &[i64]| {
        let mut counts = vec![0; num_experts];
        segment
            .iter()
            .for_each(|&expert| counts[expert as usize] += 1);
        counts
    };
    segments.map(count).collect()
}

/// Segment routing best performance: the best F1 with which one set of experts for each segment, those that are active in
/// at least so many of its tokens, covers what its tokens choose. 1: all tokens of a segment choose alike.
///
/// None where no sequence has a whole segment.
pub fn segment_routing(
    experts: &[i64],
    top_k: usize,
    num_experts: usize,
    sequence: usize,
    segment: usize,
) -> Option<f64> {
    let counts = counts(experts, top_k, num_experts, sequence, segment);
    let f1 = |least: usize| {
        let mut covered = 0;
        let mut in_vain = 0;
        let mut missed = 0;
        for &count in counts.iter().flatten() {
            if count >= least {
                covered += count;
                in_vain += segment - count;
            } else {
                missed += count;
            }
        }
        2.0 * covered as f64 / (2 * covered + in_vain + missed).max(1) as f64
    };
    (!counts.is_empty()).then(|| (1..=segment).map(f1).fold(0.0, f64::max))
}

/// Segment cache best hit rate: the share of choices that a cache of `cache` experts meets, the best ones for each segment.
///
/// None where no sequence has a whole segment.
pub fn segment_cache(
    experts: &[i64],
    top_k: usize,
    num_experts: usize,
    sequence: usize,
    (segment, cache): (usize, usize),
) -> Option<f64> {
    let counts = counts(experts, top_k, num_experts, sequence, segment);
    let mut hits = 0;
    let all = counts.len() * segment * top_k;
    for mut counts in counts {
        counts.sort_unstable_by(|a, b| b.cmp(a));
        hits += counts.iter().take(cache).sum::<usize>();
    }
    (all > 0).then(|| hits as f64 / all as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_choose_alike_are_consistent() {
        let same = [0i64, 1].repeat(8);
        assert_eq!(segment_routing(&same, 2, 8, 8, 4), Some(1.0));
        assert_eq!(segment_cache(&same, 2, 8, 8, (4, 2)), Some(1.0));
        assert_eq!(segment_cache(&same, 2, 8, 8, (4, 1)), Some(0.5));
    }

    #[test]
    fn by_hand() {
        // One segment of 4 tokens: expert 0 is active in 3, expert 1 in 1.
        let experts = [0i64, 0, 1, 0];
        // {0}: covers 3, in vain 1, misses 1: F1 = 6 / 8; {0, 1}: covers 4, in vain 4: 8 / 12.
        assert_eq!(segment_routing(&experts, 1, 4, 4, 4), Some(0.75));
        assert_eq!(segment_cache(&experts, 1, 4, 4, (4, 1)), Some(0.75));
        // Sequences of 3 tokens have no segment of 4.
        assert_eq!(segment_routing(&experts[..3], 1, 4, 3, 4), None);
    }

    #[test]
    fn tokens_that_share_nothing_are_as_bad_as_it_gets() {
        let experts: Vec<i64> = (0..16).collect();
        let one = segment_routing(&experts, 1, 16, 16, 16).unwrap();
        assert!((one - 2.0 * 16.0 / (32.0 + 240.0)).abs() < 1e-9, "{one}");
        assert_eq!(segment_cache(&experts, 1, 16, 16, (16, 4)), Some(0.25));
    }
}
