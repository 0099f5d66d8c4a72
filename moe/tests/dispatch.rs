//! Every way to dispatch computes what the standard one computes: outputs, gradients of tokens, of routing weights and of
//! experts, for loads of every kind, with other tokens on every rank. Ranks are threads, joined over loopback.

use moe::balance::BalanceScope;
use moe::dispatch::{Dispatcher, Hierarchy, LeastLoaded};
use moe::experts::GemmPrecision;
use moe::lending::least_loaded::{Imbalance, Planner};
use moe::plan::ExpertTopology;
use moe::{MoeLayer, MoeStats, MoeWeights, Router, SavePolicy};
use parallel::tensor::TensorParallel;
use parallel::{
    Activation, Communicator, Cpu, GradientBuckets, Local, Replication, Weight, World,
    run_on_threads,
};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tch::{Kind, Tensor};

const HIDDEN: i64 = 12;
const FFN: i64 = 8;
const SOON: Duration = Duration::from_secs(60);

/// What each rank's tokens choose.
#[derive(Clone)]
struct Case {
    name: &'static str,
    num_experts: usize,
    top_k: usize,
    slices: usize,
    /// `[rank][T * K]`.
    chosen: Vec<Vec<i64>>,
}

#[derive(Clone, Copy, PartialEq, Debug)]
struct Mode {
    least_loaded: bool,
    /// With the published algorithm's plans.
    strict_paper: bool,
    ranks_per_node: Option<usize>,
    keep: bool,
    /// In which tokens travel.
    parts: usize,
}

const STANDARD: Mode = Mode {
    least_loaded: false,
    strict_paper: false,
    ranks_per_node: None,
    keep: true,
    parts: 1,
};

struct Outcome {
    hidden: Tensor,
    grad_tokens: Tensor,
    grad_routing_weights: Tensor,
    grad_gate_up: Tensor,
    grad_down: Tensor,
    moe_stats: MoeStats,
}

/// The same numbers for the same name, whatever the rank.
fn numbers(seed: i64, shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    let values = (Tensor::arange(count, (Kind::Double, tch::Device::Cpu)) * 0.7391
        + seed as f64 * 1.313)
        .sin();
    (values * 0.7).to_kind(Kind::Float).view(shape)
}

/// The groups that any mode may want: joining takes longer than all else.
struct Groups {
    all: Arc<dyn Communicator>,
    lending: Arc<dyn Communicator>,
    /// For nodes of one rank, and of two.
    split_by_node: Vec<Hierarchy>,
}

impl Groups {
    fn join(world: &World) -> Groups {
        let rank = world.rank();
        let ranks = world.size();
        let split_by_node = |per_node: usize| {
            let node = rank / per_node;
            let place = rank % per_node;
            let intra_node: Vec<usize> = (node * per_node..(node + 1) * per_node).collect();
            let inter_node: Vec<usize> = (place..ranks).step_by(per_node).collect();
            Hierarchy {
                intra_node: world
                    .group(&format!("intra_node of {per_node}"), &intra_node)
                    .unwrap(),
                inter_node: world
                    .group(&format!("inter_node {per_node}"), &inter_node)
                    .unwrap(),
            }
        };
        let split_by_node = vec![split_by_node(1), split_by_node(2)];
        Groups {
            all: world.all("all").unwrap(),
            lending: world.all("lending").unwrap(),
            split_by_node,
        }
    }
}

fn run(groups: &Groups, case: &Case, mode: Mode) -> Outcome {
    let group = groups.all.clone();
    let rank = group.rank();
    let per_node = mode.ranks_per_node.unwrap_or(group.size());
    let topology = ExpertTopology {
        slices: case.slices,
        nodes: (0..group.size()).map(|rank| rank / per_node).collect(),
    };
    let least_loaded = mode.least_loaded.then(|| LeastLoaded {
        planner: Arc::new(Mutex::new(Planner {
            capacity: 1.0,
            min_tokens: 0,
            threshold: 1.0,
            over: Imbalance::Device,
            strict_paper: mode.strict_paper,
            nodes: if mode.ranks_per_node.is_some() {
                topology.owner_nodes()
            } else {
                vec![]
            },
        })),
        lending: groups.lending.clone(),
    });
    let hierarchy = mode
        .ranks_per_node
        .map(|per_node| groups.split_by_node[per_node - 1].clone());
    let local = (case.num_experts / topology.owners()) as i64;
    let owner = (rank / case.slices) as i64;
    let slice = (rank % case.slices) as i64;
    let ffn = FFN / case.slices as i64;
    // This rank's slice of its experts.
    let gate_up_proj = numbers(1, &[case.num_experts as i64, 2, FFN, HIDDEN]);
    let gate_up_proj = gate_up_proj
        .narrow(0, owner * local, local)
        .narrow(2, slice * ffn, ffn);
    let down_proj = numbers(2, &[case.num_experts as i64, HIDDEN, FFN]);
    let down_proj = down_proj
        .narrow(0, owner * local, local)
        .narrow(2, slice * ffn, ffn);
    let gate_up_proj = Weight::new(gate_up_proj.contiguous().view([local, 2 * ffn, HIDDEN]));
    let down_proj = Weight::new(down_proj.contiguous());
    let alone: Arc<dyn Communicator> = Arc::new(Local::new(rank, "alone"));
    let gate_up_proj = gate_up_proj.scale_uses(mode.parts);
    let down_proj = down_proj.scale_uses(mode.parts);
    let weights = [(gate_up_proj.clone(), 0), (down_proj.clone(), 0)];
    let gradients =
        GradientBuckets::new(&weights, &[Replication::alone()], 1 << 20, true, &Cpu).unwrap();
    gradients.begin(1);
    let layer = MoeLayer {
        router: Router::new(case.num_experts, case.top_k),
        dispatcher: Dispatcher::new(
            group,
            case.num_experts,
            topology,
            least_loaded,
            hierarchy,
            mode.parts,
        ),
        balance_scope: BalanceScope::Sequence,
        tensor: TensorParallel::new(alone.clone(), 1),
        sequence: alone,
        gemm: GemmPrecision::Model,
        keep: SavePolicy {
            dispatched: mode.keep,
            experts: mode.keep,
        },
        weights: MoeWeights {
            router: Weight::new(numbers(3, &[case.num_experts as i64, HIDDEN])),
            bias: None,
            gate_up_proj,
            down_proj,
            shared: None,
        },
    };
    let experts = case.chosen[rank].clone();
    let tokens = (experts.len() / case.top_k) as i64;
    let x = numbers(10 + rank as i64, &[tokens, HIDDEN]).set_requires_grad(true);
    let weights_tk =
        numbers(20 + rank as i64, &[tokens, case.top_k as i64]).set_requires_grad(true);
    let plan = layer.dispatcher.plan(&experts, case.top_k).unwrap();
    let routed = layer
        .forward_routed(&Activation::kept(&x), &weights_tk, experts, &plan, |_| {
            Ok(None)
        })
        .unwrap();
    let probe = numbers(30 + rank as i64, &[tokens, HIDDEN]);
    (&routed.hidden_td * probe).sum(Kind::Float).backward();
    gradients.finish().unwrap();
    Outcome {
        hidden: routed.hidden_td.detach(),
        grad_tokens: x.grad().copy(),
        grad_routing_weights: weights_tk.grad().copy(),
        grad_gate_up: gradients.gradient(0).copy(),
        grad_down: gradients.gradient(1).copy(),
        moe_stats: routed.moe_stats,
    }
}

/// Each of `runs`: what it gave on each rank.
fn run_all(runs: &[(Case, Mode)]) -> Vec<Vec<Outcome>> {
    let mut outcomes: Vec<Vec<Outcome>> = runs.iter().map(|_| Vec::new()).collect();
    for ranks in [2, 4] {
        let of_ranks = |(case, _): &&(Case, Mode)| case.chosen.len() == ranks;
        let own: Vec<(Case, Mode)> = runs.iter().filter(of_ranks).cloned().collect();
        let parts = run_on_threads(ranks, SOON, move |world| {
            let groups = Groups::join(world);
            own.iter()
                .map(|(case, mode)| run(&groups, case, *mode))
                .collect::<Vec<_>>()
        });
        for part in parts {
            let places = runs
                .iter()
                .zip(&mut outcomes)
                .filter(|(run, _)| of_ranks(run));
            places
                .zip(part)
                .for_each(|((_, place), outcome)| place.push(outcome));
        }
    }
    outcomes
}

/// Choices of a small generator: `share` of the tokens choose `hot` first, the rest of the choices are drawn.
fn drawn(
    seed: u64,
    tokens: usize,
    num_experts: usize,
    top_k: usize,
    hot: &[i64],
    share: f64,
) -> Vec<i64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = |below: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        ((state >> 33) % below as u64) as usize
    };
    let mut chosen = Vec::new();
    for _ in 0..tokens {
        let mut token: Vec<i64> = Vec::new();
        if !hot.is_empty() && (next(1000) as f64) < share * 1000.0 {
            token.push(hot[next(hot.len())]);
        }
        while token.len() < top_k {
            let expert = next(num_experts) as i64;
            if !token.contains(&expert) {
                token.push(expert);
            }
        }
        chosen.extend(token);
    }
    chosen
}

fn cases() -> Vec<Case> {
    let on = |name, num_experts, top_k, slices, chosen| Case {
        name,
        num_experts,
        top_k,
        slices,
        chosen,
    };
    let each = |ranks: u64, tokens: usize, experts, top_k, hot: &[i64], share| {
        (0..ranks)
            .map(|rank| drawn(rank + 1, tokens, experts, top_k, hot, share))
            .collect::<Vec<_>>()
    };
    vec![
        on("even", 8, 2, 1, each(4, 30, 8, 2, &[], 0.0)),
        on("all to one expert", 8, 1, 1, vec![vec![5; 23]; 4]),
        on(
            "most to one rank's",
            8,
            2,
            1,
            each(4, 40, 8, 2, &[2, 3], 0.9),
        ),
        on(
            "a hot expert on each rank",
            8,
            2,
            1,
            each(4, 40, 8, 2, &[0, 2, 4, 6], 0.9),
        ),
        on(
            "experts without tokens",
            16,
            1,
            1,
            each(4, 9, 3, 1, &[], 0.0),
        ),
        on(
            "fewer tokens than ranks",
            4,
            1,
            1,
            vec![vec![3], vec![], vec![], vec![]],
        ),
        on(
            "no token at all",
            4,
            2,
            1,
            vec![vec![], vec![], vec![], vec![]],
        ),
        on(
            "tokens on one rank",
            8,
            2,
            1,
            vec![vec![], drawn(3, 50, 8, 2, &[7], 0.9), vec![], vec![]],
        ),
        // 100 + 101 tokens with alpha 1: here the published planner names a helper twice, and its backward hangs.
        on("ragged", 2, 1, 1, vec![vec![0; 100], vec![0; 101]]),
        on(
            "ragged and many experts",
            8,
            4,
            1,
            vec![
                drawn(1, 17, 8, 4, &[0], 1.0),
                drawn(2, 3, 8, 4, &[0], 1.0),
                drawn(3, 0, 8, 4, &[], 0.0),
                drawn(4, 31, 8, 4, &[1], 1.0),
            ],
        ),
        on("split experts", 4, 2, 2, each(4, 30, 4, 2, &[0], 0.9)),
    ]
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let norm = |x: &Tensor| {
        x.to_kind(Kind::Double)
            .square()
            .sum(Kind::Double)
            .sqrt()
            .double_value(&[])
    };
    let difference = norm(&(a - b));
    let size = norm(b);
    if difference == 0.0 {
        0.0
    } else {
        difference / size
    }
}

fn assert_same(what: &str, ours: &Outcome, standard: &Outcome) {
    for (part, a, b) in [
        ("output", &ours.hidden, &standard.hidden),
        (
            "gradient of tokens",
            &ours.grad_tokens,
            &standard.grad_tokens,
        ),
        (
            "gradient of routing weights",
            &ours.grad_routing_weights,
            &standard.grad_routing_weights,
        ),
        (
            "gradient of gate-up",
            &ours.grad_gate_up,
            &standard.grad_gate_up,
        ),
        (
            "gradient of down_proj",
            &ours.grad_down,
            &standard.grad_down,
        ),
    ] {
        let far = distance(a, b);
        assert!(far < 1e-6, "{what}: {part} is {far} away");
    }
}

fn modes(case: &Case) -> Vec<Mode> {
    let mut modes = vec![STANDARD];
    for least_loaded in [false, true] {
        for ranks_per_node in [None, Some(1), Some(2)] {
            for keep in [true, false] {
                modes.push(Mode {
                    least_loaded,
                    strict_paper: false,
                    ranks_per_node,
                    keep,
                    parts: 1,
                });
                modes.push(Mode {
                    least_loaded,
                    strict_paper: false,
                    ranks_per_node,
                    keep,
                    parts: 3,
                });
            }
        }
    }
    modes.push(Mode {
        least_loaded: true,
        strict_paper: true,
        ..STANDARD
    });
    // A node holds whole owners.
    modes.retain(|mode| mode.ranks_per_node.is_none_or(|ranks| ranks >= case.slices));
    modes
}

#[test]
fn every_way_computes_what_standard_dispatch_computes() {
    let runs: Vec<(Case, Mode)> = cases()
        .iter()
        .flat_map(|case| modes(case).into_iter().map(|mode| (case.clone(), mode)))
        .collect();
    let outcomes = run_all(&runs);
    let mut standard: &[Outcome] = &[];
    let mut lent = 0;
    for ((case, mode), ours) in runs.iter().zip(&outcomes) {
        if *mode == STANDARD {
            standard = ours;
        }
        for (rank, (ours, standard)) in ours.iter().zip(standard).enumerate() {
            assert_same(
                &format!("{} on rank {rank}, {mode:?}", case.name),
                ours,
                standard,
            );
        }
        let rows: Vec<i64> = ours
            .iter()
            .map(|outcome| outcome.moe_stats.computed_tokens)
            .collect();
        let lent_tokens: i64 = ours
            .iter()
            .map(|outcome| outcome.moe_stats.lent_tokens)
            .sum();
        lent += ours
            .iter()
            .map(|outcome| outcome.moe_stats.lent_bytes)
            .sum::<i64>();
        if mode.least_loaded && !mode.strict_paper {
            // Nobody works on more than its share, rounded up.
            let total = rows.iter().sum::<i64>() as u64;
            let capacity = total.div_ceil(rows.len() as u64) as i64;
            assert!(
                rows.iter().all(|&rows| rows <= capacity),
                "{}: {rows:?}",
                case.name
            );
        } else if !mode.least_loaded {
            assert_eq!(lent_tokens, 0);
        }
    }
    assert!(lent > 0);
}

#[test]
fn the_same_way_twice_is_the_same_to_the_bit() {
    let case = &cases()[2];
    let modes = [
        Mode {
            least_loaded: true,
            ..STANDARD
        },
        Mode {
            least_loaded: true,
            ranks_per_node: Some(2),
            keep: false,
            ..STANDARD
        },
    ];
    let runs = modes.map(|mode| (case.clone(), mode));
    for (first, second) in run_all(&runs)
        .iter()
        .flatten()
        .zip(run_all(&runs).iter().flatten())
    {
        assert!(first.hidden == second.hidden && first.grad_tokens == second.grad_tokens);
        assert!(
            first.grad_routing_weights == second.grad_routing_weights
                && first.grad_gate_up == second.grad_gate_up
        );
        assert!(
            first.grad_down == second.grad_down
                && first.moe_stats.lent_bytes == second.moe_stats.lent_bytes
        );
    }
}

#[test]
fn a_token_crosses_to_a_node_once() {
    for top_k in [4, 6] {
        let chosen: Vec<Vec<i64>> = (0..4)
            .map(|rank| drawn(rank + 9, 37, 16, top_k, &[1], 0.5))
            .collect();
        let case = Case {
            name: "many experts",
            num_experts: 16,
            top_k,
            slices: 1,
            chosen,
        };
        let split_by_node = Mode {
            ranks_per_node: Some(2),
            ..STANDARD
        };
        for (rank, outcome) in run_all(&[(case.clone(), split_by_node)])[0]
            .iter()
            .enumerate()
        {
            // Ranks 0 and 1, with experts 0 to 7, are one node; 2 and 3 the other.
            let other = |&expert: &i64| (expert / 8) as usize != rank / 2;
            let distinct = case.chosen[rank]
                .chunks(top_k)
                .filter(|token| token.iter().any(other))
                .count() as i64;
            assert_eq!(
                outcome.moe_stats.internode_bytes,
                distinct * HIDDEN * 4,
                "rank {rank}"
            );
            let choices = case.chosen[rank]
                .iter()
                .filter(|&expert| other(expert))
                .count() as i64;
            assert!(choices > distinct, "there is something to save");
        }
    }
}
