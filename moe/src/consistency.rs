//! Local routing consistency: how alike neighboring tokens are routed (arXiv 2505.16056).
//!
//! It predicts the value of an expert cache, or of one set of experts per segment of tokens.

/// Counts the tokens of each expert in each segment of `segment` tokens. Experts are `[T * K]`, of
/// sequences of `sequence` tokens; the remainder of a sequence is not counted.
fn count_by_segment(
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
        for &expert in segment {
            counts[expert as usize] += 1;
        }
        counts
    };
    segments.map(count).collect()
}

/// Returns the segment routing best performance (SRP): how well one set of experts per segment
/// covers the routed tokens, as the best F1 score. 1 if all tokens of a segment use equal experts.
///
/// The set has the experts that at least a number of the segment's tokens use, and that number is
/// the best one. Returns None if no sequence has a whole segment.
pub fn segment_routing(
    experts: &[i64],
    top_k: usize,
    num_experts: usize,
    sequence: usize,
    segment: usize,
) -> Option<f64> {
    let counts = count_by_segment(experts, top_k, num_experts, sequence, segment);
    let f1 = |min_tokens: usize| {
        let mut covered = 0;
        let mut unused = 0;
        let mut missed = 0;
        for &count in counts.iter().flatten() {
            if count >= min_tokens {
                covered += count;
                unused += segment - count;
            } else {
                missed += count;
            }
        }
        2.0 * covered as f64 / (2 * covered + unused + missed).max(1) as f64
    };
    (!counts.is_empty()).then(|| (1..=segment).map(f1).fold(0.0, f64::max))
}

/// Returns the segment cache best hit rate (SCH): the share of routed tokens that find their expert
/// in a cache of the `cache` best experts of each segment.
///
/// Returns None if no sequence has a whole segment.
pub fn segment_cache(
    experts: &[i64],
    top_k: usize,
    num_experts: usize,
    sequence: usize,
    segment: usize,
    cache: usize,
) -> Option<f64> {
    let counts = count_by_segment(experts, top_k, num_experts, sequence, segment);
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
    fn tokens_with_equal_experts_are_consistent() {
        let same = [0i64, 1].repeat(8);
        assert_eq!(segment_routing(&same, 2, 8, 8, 4), Some(1.0));
        assert_eq!(segment_cache(&same, 2, 8, 8, 4, 2), Some(1.0));
        assert_eq!(segment_cache(&same, 2, 8, 8, 4, 1), Some(0.5));
    }

    #[test]
    fn small_cases_by_hand() {
        // One segment of 4 tokens: expert 0 is active in 3, expert 1 in 1.
        let experts = [0i64, 0, 1, 0];
        // {0}: 3 covered, 1 unused, 1 missed: F1 = 6 / 8. {0, 1}: 4 covered, 4 unused: 8 / 12.
        assert_eq!(segment_routing(&experts, 1, 4, 4, 4), Some(0.75));
        assert_eq!(segment_cache(&experts, 1, 4, 4, 4, 1), Some(0.75));
        // Sequences of 3 tokens have no segment of 4.
        assert_eq!(segment_routing(&experts[..3], 1, 4, 3, 4), None);
    }

    #[test]
    fn tokens_without_common_experts_are_least_consistent() {
        let experts: Vec<i64> = (0..16).collect();
        let one = segment_routing(&experts, 1, 16, 16, 16).unwrap();
        assert!((one - 2.0 * 16.0 / (32.0 + 240.0)).abs() < 1e-9, "{one}");
        assert_eq!(segment_cache(&experts, 1, 16, 16, 16, 4), Some(0.25));
    }
}
