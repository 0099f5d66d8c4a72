//! How likely it is that nothing has to come from disk: survival of in-memory snapshots for given failure rates.
//!
//! After a node is lost its state is unprotected until it is rebuilt and encoded again: the *window*. A group is lost when
//! more of its nodes fail within one window than it has parities (REFT, arXiv 2310.12670, and GEMINI reason alike; the
//! formulas are ours). Death of processes does not count: keepers outlive it.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A cluster and what may happen to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Sizes of the groups, in nodes.
    pub groups: Vec<usize>,
    /// Nodes of a group that may be lost.
    pub survives: usize,
    /// Mean time between failures of a node, in hours.
    pub mtbf_h: f64,
    /// Shape of the Weibull distribution of a node's life; 1: failures come at any age alike.
    pub shape: f64,
    /// The window, in hours.
    pub window_h: f64,
}

impl Cluster {
    /// Probability that a node fails within one window.
    pub fn node_failure_probability(&self) -> f64 {
        // The scale for which the mean life is the MTBF.
        let scale = self.mtbf_h / gamma(1.0 + 1.0 / self.shape);
        1.0 - (-(self.window_h / scale).powf(self.shape)).exp()
    }

    /// Probability that every group survives one window: binomial over each group's nodes.
    pub fn window(&self) -> f64 {
        let fails = self.node_failure_probability();
        let group = |&nodes: &usize| -> f64 {
            (0..=self.survives.min(nodes))
                .map(|lost| {
                    choose(nodes, lost)
                        * fails.powi(lost as i32)
                        * (1.0 - fails).powi((nodes - lost) as i32)
                })
                .sum()
        };
        self.groups.iter().map(group).product()
    }

    /// Probability that every group survives windows one after the other for so many hours.
    pub fn run(&self, hours: f64) -> f64 {
        self.window().powf(hours / self.window_h)
    }

    /// The share of `trials` simulated windows that every group survives, drawn from `seed`.
    pub fn simulate(&self, trials: u64, seed: u64) -> f64 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let scale = self.mtbf_h / gamma(1.0 + 1.0 / self.shape);
        let survived = (0..trials).filter(|_| {
            self.groups.iter().fold(true, |all, &nodes| {
                let dies = |_: &usize| {
                    // A life drawn from the Weibull distribution, by its inverse.
                    let uniform = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
                    scale * (-(1.0 - uniform).ln()).powf(1.0 / self.shape) < self.window_h
                };
                (0..nodes).filter(dies).count() <= self.survives && all
            })
        });
        survived.count() as f64 / trials as f64
    }
}

fn choose(n: usize, k: usize) -> f64 {
    (0..k).fold(1.0, |product, i| product * (n - i) as f64 / (i + 1) as f64)
}

/// Lanczos' approximation of the gamma function, for arguments above 1/2; relative error under 1e-13.
fn gamma(x: f64) -> f64 {
    const TERMS: [f64; 9] = [
        0.999_999_999_999_809_9,
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    let x = x - 1.0;
    let sum = TERMS[1..]
        .iter()
        .enumerate()
        .fold(TERMS[0], |sum, (i, term)| sum + term / (x + (i + 1) as f64));
    let t = x + 7.5;
    (2.0 * std::f64::consts::PI).sqrt() * t.powf(x + 0.5) * (-t).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cluster(nodes: usize, group: usize, survives: usize, window_h: f64) -> Cluster {
        Cluster {
            groups: vec![group; nodes / group],
            survives,
            mtbf_h: 67.6 * 24.0,
            shape: 1.0,
            window_h,
        }
    }

    /// Worked values for a node MTBF of 67.6 days (OPT-175B's logbook: 124 nodes, about 110 failures in 60 days).
    #[test]
    fn worked_values() {
        let near = |value: f64, expected: f64| {
            assert!((value - expected).abs() < 1e-3, "{value} is not {expected}")
        };
        near(cluster(128, 1, 0, 6.0).window(), 0.623);
        near(cluster(128, 8, 1, 6.0).window(), 0.9940);
        near(cluster(128, 4, 1, 6.0).window(), 0.9974);
        near(cluster(128, 2, 1, 6.0).window(), 0.9991);
        near(cluster(384, 1, 0, 24.0).window(), 0.0034);
        near(cluster(384, 8, 1, 24.0).window(), 0.761);
    }

    #[test]
    fn gamma_is_the_factorial() {
        for (x, value) in [
            (1.0, 1.0),
            (2.0, 1.0),
            (5.0, 24.0),
            (1.5, 0.886_226_925_452_758),
        ] {
            assert!((gamma(x) / value - 1.0).abs() < 1e-12, "gamma({x})");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn the_formula_is_what_a_simulation_gives(
            groups in prop::collection::vec(1usize..9, 1..6), survives in 0usize..3, window_h in 50.0f64..800.0,
            shape in 0.6f64..1.6, seed in any::<u64>(),
        ) {
            let cluster = Cluster { groups, survives, mtbf_h: 1600.0, shape, window_h };
            let (formula, trials) = (cluster.window(), 20_000u64);
            let simulated = cluster.simulate(trials, seed);
            let deviation = (formula * (1.0 - formula) / trials as f64).sqrt();
            prop_assert!((formula - simulated).abs() < 5.0 * deviation + 1e-4, "{} and {}", formula, simulated);
        }
    }
}
