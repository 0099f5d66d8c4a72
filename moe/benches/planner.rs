//! Benchmark of least-loaded plans, which every layer makes in every step: `cargo bench -p moe`.

use criterion::{Criterion, criterion_group, criterion_main};
use moe::lending::least_loaded::{Imbalance, Planner};
use std::hint::black_box;

/// Returns loads like those of trained routers: expert number `i` by load has `1 / (i + 1)` of the
/// largest load. The experts are not in order of load.
fn loads(experts: usize, mean: i64) -> Vec<i64> {
    let harmonic: f64 = (1..=experts).map(|i| 1.0 / i as f64).sum();
    let total = (mean * experts as i64) as f64;
    let load = |i: usize| (total / harmonic / (i + 1) as f64) as i64;
    (0..experts)
        .map(|expert| load(expert * 167 % experts))
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

fn bench_plans(criterion: &mut Criterion) {
    for (experts, owners) in [(256, 64), (512, 1024)] {
        let loads = loads(experts, 65536);
        let nodes: Vec<usize> = (0..owners).map(|owner| owner / 8).collect();
        let kinds = [
            ("default", planner(false, vec![])),
            ("nodes", planner(false, nodes)),
            ("paper", planner(true, vec![])),
        ];
        for (name, planner) in kinds {
            let lent_tokens = planner.plan(&loads, owners).lent_tokens();
            assert!(lent_tokens > 0, "the plan lends nothing");
            let id = format!("plan/{experts} experts on {owners}/{name}");
            criterion.bench_function(&id, |bencher| {
                bencher.iter(|| planner.plan(black_box(&loads), owners));
            });
        }
    }
}

criterion_group!(benches, bench_plans);
criterion_main!(benches);
