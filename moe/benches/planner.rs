//! Time of least-loaded plans, which is spent in every layer of every step: `cargo bench -p moe`.

use criterion::{Criterion, criterion_group, criterion_main};
use moe::lending::least_loaded::{Imbalance, Planner};
use std::hint::black_box;

/// Loads as trained routers have them: the `i`-th busiest of the experts has `1 / (i + 1)` of the busiest one's, in no order.
fn loads(experts: usize, mean: i64) -> Vec<i64> {
    let harmonic: f64 = (1..=experts).map(|rank| 1.0 / rank as f64).sum();
    let of_rank =
        |rank: usize| ((mean * experts as i64) as f64 / harmonic / (rank + 1) as f64) as i64;
    (0..experts)
        .map(|expert| of_rank(expert * 167 % experts))
        .collect()
}

fn planner(strict_paper: bool, nodes: Vec<usize>) -> Planner {
    Planner {
        capacity: 1.0,
        min_tokens: 1024,
        threshold: 1.3,
        over: Imbalance::Device,
        strict_paper,
        nodes,
    }
}

fn plans(criterion: &mut Criterion) {
    for (experts, owners) in [(256, 64), (512, 1024)] {
        let loads = loads(experts, 65536);
        let nodes: Vec<usize> = (0..owners).map(|owner| owner / 8).collect();
        let kinds = [
            ("default", planner(false, vec![])),
            ("nodes", planner(false, nodes)),
            ("paper", planner(true, vec![])),
        ];
        for (name, planner) in kinds {
            assert!(
                planner.plan(&loads, owners).lent_tokens() > 0,
                "there is something to plan"
            );
            criterion.bench_function(
                &format!("plan/{experts} experts on {owners}/{name}"),
                |bencher| {
                    bencher.iter(|| planner.plan(black_box(&loads), owners));
                },
            );
        }
    }
}

criterion_group!(benches, plans);
criterion_main!(benches);
