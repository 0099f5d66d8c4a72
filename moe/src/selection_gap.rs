//! The gap between the experts that a token selects and the next best ones.
//!
//! Rounding may decide between scores that are almost equal. Two layouts round differently, so a
//! comparison of their results needs to know such ties.
// Shapes: T tokens, E experts, N scores.

use crate::router::Router;
use std::cell::Cell;
use tch::{Kind, Tensor};

thread_local! {
    /// The smallest gap so far, while gaps are measured on this thread.
    static SMALLEST: Cell<Option<f64>> = const { Cell::new(None) };
}

/// Runs `body` and returns its result, and the smallest of the [`Router::selection_gaps`] of all
/// tokens that are routed on this thread meanwhile. Without any it is infinite.
pub fn smallest_gap_during<T>(body: impl FnOnce() -> T) -> (T, f64) {
    SMALLEST.set(Some(f64::INFINITY));
    let result = body();
    let smallest = SMALLEST.take();
    (result, smallest.unwrap_or(f64::INFINITY))
}

/// Records the gaps of a selection, if they are measured.
pub(crate) fn record(router: &Router, logits_te: &Tensor, bias_e: Option<&Tensor>) {
    let Some(smallest) = SMALLEST.get() else {
        return;
    };
    let gaps_t = router.selection_gaps(logits_te, bias_e);
    if gaps_t.numel() > 0 {
        SMALLEST.set(Some(smallest.min(gaps_t.min().double_value(&[]))));
    }
}

impl Router {
    /// Returns how far each token is from another selection, `[T]` fp64: the gap between the score
    /// of the last selected and of the first rejected expert, over the former. With groups it is
    /// the smallest such gap, between experts and between groups.
    ///
    /// Scores are computed in fp64 from `logits_te` `[T, E]` and `bias_e` `[E]`, as
    /// [`Router::route`] does in fp32. A token that cannot select otherwise has an infinite gap.
    pub fn selection_gaps(&self, logits_te: &Tensor, bias_e: Option<&Tensor>) -> Tensor {
        let logits_te = logits_te.detach().to_kind(Kind::Double);
        if self.force_balance {
            return infinite(&logits_te.select(1, 0));
        }
        let mut scores_te = self.scores(&logits_te);
        if let Some(bias_e) = bias_e {
            scores_te += bias_e;
        }
        if self.even_groups {
            let per_group = self.top_k / self.groups;
            let gaps = relative_gaps(&self.by_group(&scores_te), per_group);
            return gaps.amin([1i64].as_slice(), false);
        }
        if self.top_groups == self.groups {
            return relative_gaps(&scores_te, self.top_k);
        }
        let between_groups = relative_gaps(&self.group_scores(&scores_te), self.top_groups);
        let within = self.mask_all_but_top_groups(&scores_te);
        relative_gaps(&within, self.top_k).minimum(&between_groups)
    }
}

/// Returns the gap between the `k`-th and the next largest of the scores `[.., N]`, over the
/// former.
fn relative_gaps(scores: &Tensor, k: usize) -> Tensor {
    let k = k as i64;
    let Some(&count) = scores.size().last() else {
        return infinite(scores);
    };
    if k >= count {
        return infinite(&scores.select(-1, 0));
    }
    let (best, _) = scores.topk(k + 1, -1, true, true);
    let selected = best.select(-1, k - 1);
    let rejected = best.select(-1, k);
    (&selected - rejected) / selected.abs().clamp_min(f64::MIN_POSITIVE)
}

fn infinite(like: &Tensor) -> Tensor {
    like.full_like(f64::INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::router::{GroupScore, Score};

    /// One part in 10^8 is below the resolution of fp32.
    const TINY: f64 = 1e-8;

    fn gaps(router: &Router, logits: &[f64]) -> Vec<f64> {
        let logits = Tensor::from_slice(logits).view([-1, 4]);
        Vec::try_from(router.selection_gaps(&logits, None)).unwrap()
    }

    fn grouped(score: Score, top_groups: usize, top_k: usize) -> Router {
        Router {
            score,
            groups: 2,
            top_groups,
            group_score: match score {
                Score::Softmax => GroupScore::Max,
                Score::Sigmoid => GroupScore::Top2Sum,
            },
            ..Router::new(4, top_k)
        }
    }

    /// Returns the logits whose softmax are these probabilities.
    fn softmax_logits(probs: [f64; 4]) -> [f64; 4] {
        probs.map(f64::ln)
    }

    #[test]
    fn a_tie_between_experts() {
        let router = Router::new(4, 2);
        let tied = softmax_logits([0.4, 0.3, 0.3 * (1.0 - TINY), 0.1]);
        let clear = softmax_logits([0.4, 0.3, 0.2, 0.1]);
        let gaps = gaps(&router, &[tied, clear].concat());
        assert!((gaps[0] / TINY - 1.0).abs() < 1e-6, "{gaps:?}");
        assert!((gaps[1] - 1.0 / 3.0).abs() < 1e-9, "{gaps:?}");
        // A tie among the selected experts is none between selections.
        let tied = softmax_logits([0.35, 0.35, 0.2, 0.1]);
        let gap = router.selection_gaps(&Tensor::from_slice(&tied).view([1, 4]), None);
        assert!(gap.double_value(&[0]) > 0.4);
    }

    #[test]
    fn the_bias_makes_a_tie() {
        let router = Router::new(4, 1);
        let logits = Tensor::from_slice(&softmax_logits([0.4, 0.3, 0.2, 0.1])).view([1, 4]);
        let bias = Tensor::from_slice(&[0.0, 0.1, 0.0, 0.0]);
        let gap = router.selection_gaps(&logits, Some(&bias));
        assert!(gap.double_value(&[0]).abs() < 1e-12);
    }

    #[test]
    fn a_tie_between_groups() {
        // The group of the best expert is selected.
        let router = grouped(Score::Softmax, 1, 1);
        let tied = softmax_logits([0.4, 0.1, 0.4 * (1.0 - TINY), 0.1]);
        assert!(gaps(&router, &tied)[0] < 2.0 * TINY);
        // Sigmoid scores of both experts of a group add up; no two experts are close.
        let router = grouped(Score::Sigmoid, 1, 1);
        let logit = |score: f64| (score / (1.0 - score)).ln();
        let tied = [0.8, 0.1, 0.6, 0.3 + TINY].map(logit);
        let expected = TINY / 0.9;
        assert!((gaps(&router, &tied)[0] / expected - 1.0).abs() < 1e-6);
        // Both groups are selected, so that only experts compete.
        let all = grouped(Score::Sigmoid, 2, 1);
        assert!(gaps(&all, &tied)[0] > 0.2);
    }

    #[test]
    fn experts_of_rejected_groups_do_not_tie() {
        // Expert 2 equals expert 1, but its group is rejected.
        let router = grouped(Score::Softmax, 1, 1);
        let gap = gaps(&router, &softmax_logits([0.5, 0.2, 0.2, 0.1]))[0];
        assert!((gap - 0.6).abs() < 1e-9, "{gap}");
        // The token selects every expert of its only group: the groups decide.
        let router = grouped(Score::Softmax, 1, 2);
        let gap = gaps(&router, &softmax_logits([0.5, 0.2, 0.2, 0.1]))[0];
        assert!((gap - 0.6).abs() < 1e-9, "{gap}");
    }

    #[test]
    fn even_groups_tie_within_a_group() {
        let router = Router {
            groups: 2,
            even_groups: true,
            ..Router::new(4, 2)
        };
        let tied = softmax_logits([0.5, 0.1, 0.2, 0.2]);
        assert!(gaps(&router, &tied)[0].abs() < 1e-12);
    }

    #[test]
    fn tokens_without_a_choice_have_an_infinite_gap() {
        let forced = Router {
            force_balance: true,
            ..Router::new(4, 2)
        };
        for router in [forced, Router::new(4, 4)] {
            assert_eq!(gaps(&router, &[1.0; 4]), [f64::INFINITY]);
        }
    }

    #[test]
    fn the_smallest_gap_of_several_selections_is_kept() {
        let route = |logits: [f64; 4]| {
            let logits = Tensor::from_slice(&logits).to_kind(Kind::Float);
            record(&Router::new(4, 2), &logits.view([1, 4]), None);
        };
        let ((), smallest) = smallest_gap_during(|| {
            route(softmax_logits([0.4, 0.3, 0.2, 0.1]));
            route(softmax_logits([0.4, 0.3, 0.27, 0.03]));
            route(softmax_logits([0.4, 0.3, 0.15, 0.15]));
        });
        assert!((smallest - 0.1).abs() < 1e-6, "{smallest}");
        let ((), none) = smallest_gap_during(|| ());
        assert_eq!(none, f64::INFINITY);
    }
}
