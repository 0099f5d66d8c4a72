//! The probability that in-memory snapshots survive, for given failure rates.
//!
//! After a node is lost, its state is unprotected until it is rebuilt and encoded again: the
//! *window*. A group is lost when more of its nodes fail within one window than it has parities.
//! REFT (arXiv 2310.12670) and GEMINI reason in the same way; the formulas are ours. The death of
//! processes does not count, because keepers outlive it.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A cluster, its redundancy and its failure rates.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// The number of nodes in each group.
    pub groups: Vec<usize>,
    /// The number of nodes of a group that may be lost.
    pub max_losses: usize,
    /// The mean time between failures of a node, in hours.
    pub mtbf_h: f64,
    /// The shape of the Weibull distribution of a node's life. With 1, failures are equally likely
    /// at any age.
    pub weibull_shape: f64,
    /// The length of the window, in hours.
    pub window_h: f64,
}

impl Cluster {
    /// Returns the probability that a node fails within one window.
    pub fn node_failure_probability(&self) -> f64 {
        let windows = self.window_h / self.weibull_scale();
        1.0 - (-windows.powf(self.weibull_shape)).exp()
    }

    /// Returns the probability that every group survives one window: binomial over its nodes.
    pub fn window_survival(&self) -> f64 {
        let fails = self.node_failure_probability();
        self.groups
            .iter()
            .map(|&nodes| self.group_survival(nodes, fails))
            .product()
    }

    fn group_survival(&self, nodes: usize, fails: f64) -> f64 {
        let survives = 1.0 - fails;
        (0..=self.max_losses.min(nodes))
            .map(|lost| {
                choose(nodes, lost) * fails.powi(lost as i32) * survives.powi((nodes - lost) as i32)
            })
            .sum()
    }

    /// Returns the probability that every group survives consecutive windows for `hours` hours.
    pub fn run_survival(&self, hours: f64) -> f64 {
        self.window_survival().powf(hours / self.window_h)
    }

    /// Simulates windows, and returns the fraction that every group survives.
    pub fn simulate(&self, trials: u64, seed: u64) -> f64 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let scale = self.weibull_scale();
        // Draws a life from the Weibull distribution, by its inverse.
        let mut fails = || {
            let uniform = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
            let life = scale * (-(1.0 - uniform).ln()).powf(1.0 / self.weibull_shape);
            life < self.window_h
        };
        let mut survived = 0u64;
        for _ in 0..trials {
            let mut all_survive = true;
            for &nodes in &self.groups {
                let lost = (0..nodes).filter(|_| fails()).count();
                all_survive &= lost <= self.max_losses;
            }
            survived += u64::from(all_survive);
        }
        survived as f64 / trials as f64
    }

    /// Returns the scale for which the mean life is the MTBF.
    fn weibull_scale(&self) -> f64 {
        self.mtbf_h / gamma(1.0 + 1.0 / self.weibull_shape)
    }
}

fn choose(n: usize, k: usize) -> f64 {
    let mut product = 1.0;
    for i in 0..k {
        product = product * (n - i) as f64 / (i + 1) as f64;
    }
    product
}

/// Computes the gamma function by Lanczos' approximation, for arguments above 1/2. The relative
/// error is below 1e-13.
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
    let mut sum = TERMS[0];
    for (i, term) in TERMS[1..].iter().enumerate() {
        sum += term / (x + (i + 1) as f64);
    }
    let t = x + 7.5;
    (2.0 * std::f64::consts::PI).sqrt() * t.powf(x + 0.5) * (-t).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cluster(nodes: usize, group: usize, max_losses: usize, window_h: f64) -> Cluster {
        Cluster {
            groups: vec![group; nodes / group],
            max_losses,
            mtbf_h: 67.6 * 24.0,
            weibull_shape: 1.0,
            window_h,
        }
    }

    /// Checks worked values for a node MTBF of 67.6 days, which is that of OPT-175B's logbook:
    /// 124 nodes and about 110 failures in 60 days.
    #[test]
    fn worked_values() {
        let near = |cluster: Cluster, expected: f64| {
            let value = cluster.window_survival();
            assert!((value - expected).abs() < 1e-3, "{value} is not {expected}");
        };
        near(cluster(128, 1, 0, 6.0), 0.623);
        near(cluster(128, 8, 1, 6.0), 0.9940);
        near(cluster(128, 4, 1, 6.0), 0.9974);
        near(cluster(128, 2, 1, 6.0), 0.9991);
        near(cluster(384, 1, 0, 24.0), 0.0034);
        near(cluster(384, 8, 1, 24.0), 0.761);
    }

    #[test]
    fn gamma_is_the_factorial() {
        let values = [
            (1.0, 1.0),
            (2.0, 1.0),
            (5.0, 24.0),
            (1.5, 0.886_226_925_452_758),
        ];
        for (x, value) in values {
            assert!((gamma(x) / value - 1.0).abs() < 1e-12, "gamma({x})");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn the_formula_agrees_with_a_simulation(
            groups in prop::collection::vec(1usize..9, 1..6),
            max_losses in 0usize..3,
            window_h in 50.0f64..800.0,
            weibull_shape in 0.6f64..1.6,
            seed in any::<u64>(),
        ) {
            let cluster = Cluster {
                groups,
                max_losses,
                mtbf_h: 1600.0,
                weibull_shape,
                window_h,
            };
            let trials = 20_000;
            let formula = cluster.window_survival();
            let simulated = cluster.simulate(trials, seed);
            let deviation = (formula * (1.0 - formula) / trials as f64).sqrt();
            let error = (formula - simulated).abs();
            prop_assert!(error < 5.0 * deviation + 1e-4, "{} and {}", formula, simulated);
        }
    }
}
