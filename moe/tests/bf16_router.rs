//! In a bf16 model the router selects as exact arithmetic on the same bf16 numbers does.
// Shapes: T tokens, D hidden, E experts, K selected experts.

use moe::{
    MoeLayer, MoeWeights, Router, RoutingReplay, SavePolicy,
    balance::BalanceScope,
    dispatch::Dispatcher,
    experts::{GemmPrecision, GluNetworks},
    plan::{ExpertTopology, count_tokens_per_expert},
};
use parallel::{Activation, Communicator, Local, Weight, tensor::TensorParallel};
use parking_lot::Mutex;
use std::{collections::BTreeSet, sync::Arc};
use tch::{Device, Kind, Tensor};

const TOKENS: i64 = 4096;
const HIDDEN: i64 = 256;
const EXPERTS: i64 = 32;
const TOP_K: usize = 4;

/// Returns numbers that look random, rounded to bf16.
fn numbers(seed: i64, shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    let indices = Tensor::arange(count, (Kind::Double, Device::Cpu));
    let values = ((indices + seed) * 12.9898).sin() * 43758.5453;
    let uniform = &values - values.floor();
    ((uniform - 0.5) * 2.0).to_kind(Kind::BFloat16).view(shape)
}

fn layer(router_ed: &Tensor) -> MoeLayer {
    let alone: Arc<dyn Communicator> = Arc::new(Local::new(0, "alone"));
    let topology = ExpertTopology {
        slices: 1,
        nodes: vec![0],
    };
    let experts = EXPERTS as usize;
    MoeLayer {
        router: Router::new(experts, TOP_K),
        dispatcher: Dispatcher::new(alone.clone(), experts, topology, None, None, 1),
        balance_scope: BalanceScope::Microbatch,
        tensor: TensorParallel::new(alone.clone(), 1),
        sequence: alone,
        gemm: GemmPrecision::Model,
        save: SavePolicy {
            dispatched: true,
            experts: true,
        },
        weights: MoeWeights {
            router: Weight::new(router_ed.shallow_clone()),
            router_bias: None,
            bias: Mutex::new(None),
            experts: GluNetworks::swiglu(
                Weight::new(numbers(3, &[EXPERTS, 16, HIDDEN])),
                Weight::new(numbers(4, &[EXPERTS, HIDDEN, 8])),
            ),
            shared: None,
        },
    }
}

/// Returns the experts with the largest of the logits `[T, E]` of each token.
fn best(logits_te: &Tensor) -> Vec<BTreeSet<i64>> {
    let (_, experts_tk) = logits_te.topk(TOP_K as i64, -1, true, true);
    by_token(&Vec::try_from(experts_tk.flatten(0, -1)).unwrap())
}

fn by_token(experts: &[i64]) -> Vec<BTreeSet<i64>> {
    let tokens = experts.chunks(TOP_K);
    tokens
        .map(|experts| experts.iter().copied().collect())
        .collect()
}

fn differing(a: &[BTreeSet<i64>], b: &[BTreeSet<i64>]) -> usize {
    a.iter().zip(b).filter(|(a, b)| a != b).count()
}

#[test]
fn choices_are_those_of_fp64() {
    let x_td = numbers(1, &[TOKENS, HIDDEN]);
    let router_ed = numbers(2, &[EXPERTS, HIDDEN]) * 0.1;
    let exact_te = x_td
        .to_kind(Kind::Double)
        .matmul(&router_ed.to_kind(Kind::Double).tr());
    let exact = best(&exact_te);
    let output = layer(&router_ed)
        .forward(&Activation::kept(&x_td), 1, &RoutingReplay::default())
        .unwrap();
    let ours = by_token(&Vec::<i64>::try_from(output.stats.experts_tk.flatten(0, -1)).unwrap());
    assert_eq!(differing(&ours, &exact), 0);
    let experts: Vec<i64> = exact.into_iter().flatten().collect();
    assert_eq!(
        output.moe_stats.tokens_per_expert.get(),
        count_tokens_per_expert(&experts, EXPERTS as usize)
    );

    // Logits of a bf16 GEMM are rounded, and close experts tie.
    let rounded = best(&exact_te.to_kind(Kind::BFloat16));
    let changed = differing(&rounded, &ours);
    eprintln!("bf16 logits would change the experts of {changed} of {TOKENS} tokens");
    assert!(changed > 40);
}
