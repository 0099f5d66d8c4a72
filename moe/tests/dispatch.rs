//! All dispatch modes compute equal results: outputs, and gradients of tokens, routing weights and
//! experts.
//!
//! The loads are of all kinds, and every rank has different tokens. Ranks are threads that connect
//! over loopback.

use kernels::{ClampedGlu, Glu};
use moe::{
    MoeLayer, MoeStats, MoeWeights, Router, SavePolicy,
    balance::BalanceScope,
    dispatch::{Dispatcher, Hierarchy, LeastLoaded},
    experts::{GemmPrecision, GluBiases, GluNetworks},
    lending::least_loaded::{Imbalance, Planner},
    plan::ExpertTopology,
};
use parallel::{
    Activation, Communicator, Cpu, GradientBuckets, Local, Replication, Weight, World,
    run_on_threads, tensor::TensorParallel,
};
use parking_lot::Mutex;
use std::{sync::Arc, time::Duration};
use tch::{Kind, Tensor};

const HIDDEN: i64 = 12;
const FFN: i64 = 8;
/// A limit that many values exceed.
const CLAMPED: ClampedGlu = ClampedGlu {
    alpha: 1.702,
    limit: 0.5,
};
const TIMEOUT: Duration = Duration::from_secs(60);

/// The experts of each rank's tokens.
#[derive(Clone)]
struct Case {
    name: &'static str,
    num_experts: usize,
    top_k: usize,
    slices: usize,
    /// True if experts have biases and the clamped GLU.
    biased: bool,
    /// `[rank][T * K]`.
    chosen: Vec<Vec<i64>>,
}

#[derive(Clone, Copy, PartialEq, Debug)]
struct Mode {
    least_loaded: bool,
    /// Plan with the published algorithm.
    strict_paper: bool,
    ranks_per_node: Option<usize>,
    save: bool,
    chunks: usize,
}

const STANDARD: Mode = Mode {
    least_loaded: false,
    strict_paper: false,
    ranks_per_node: None,
    save: true,
    chunks: 1,
};

struct Outcome {
    hidden: Tensor,
    grad_tokens: Tensor,
    grad_routing_weights: Tensor,
    /// Gradients of the experts' weights.
    grad_experts: Vec<Tensor>,
    moe_stats: MoeStats,
}

/// Returns numbers that depend only on the seed, so that all ranks have equal ones.
fn numbers(seed: i64, shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    let indices = Tensor::arange(count, (Kind::Double, tch::Device::Cpu));
    let values = (indices * 0.7391 + seed as f64 * 1.313).sin();
    (values * 0.7).to_kind(Kind::Float).view(shape)
}

/// Process groups for all modes. They are shared because joining takes longer than all else.
struct Groups {
    all: Arc<dyn Communicator>,
    lending: Arc<dyn Communicator>,
    /// For nodes of one rank, and of two.
    hierarchies: Vec<Hierarchy>,
}

impl Groups {
    fn join(world: &World) -> Groups {
        let rank = world.rank();
        let ranks = world.size();
        let hierarchy = |per_node: usize| {
            let node = rank / per_node;
            let number = rank % per_node;
            let intra_node: Vec<usize> = (node * per_node..(node + 1) * per_node).collect();
            let inter_node: Vec<usize> = (number..ranks).step_by(per_node).collect();
            let intra_name = format!("intra_node of {per_node}");
            let inter_name = format!("inter_node {per_node}");
            Hierarchy {
                intra_node: world.group(&intra_name, &intra_node).unwrap(),
                inter_node: world.group(&inter_name, &inter_node).unwrap(),
            }
        };
        let hierarchies = vec![hierarchy(1), hierarchy(2)];
        Groups {
            all: world.all("all").unwrap(),
            lending: world.all("lending").unwrap(),
            hierarchies,
        }
    }
}

impl Mode {
    fn least_loaded(&self, groups: &Groups, topology: &ExpertTopology) -> Option<LeastLoaded> {
        if !self.least_loaded {
            return None;
        }
        let nodes = match self.ranks_per_node {
            Some(_) => topology.owner_nodes(),
            None => vec![],
        };
        let planner = Planner {
            capacity: 1.0,
            min_tokens: 0,
            threshold: 1.0,
            over: Imbalance::Device,
            strict_paper: self.strict_paper,
            nodes,
        };
        Some(LeastLoaded {
            planner: Arc::new(Mutex::new(planner)),
            lending: groups.lending.clone(),
        })
    }
}

/// Returns a rank's slice of its experts: gate-up `[L, 2F, D]` and down `[L, D, F]`.
fn local_experts(case: &Case, owners: usize, rank: usize) -> [Tensor; 2] {
    let num_experts = case.num_experts as i64;
    let local = num_experts / owners as i64;
    let first = (rank / case.slices) as i64 * local;
    let ffn = FFN / case.slices as i64;
    let column = (rank % case.slices) as i64 * ffn;
    let own = |weights: Tensor| weights.narrow(0, first, local).narrow(2, column, ffn);
    let gate_up_proj = own(numbers(1, &[num_experts, 2, FFN, HIDDEN])).contiguous();
    let down_proj = own(numbers(2, &[num_experts, HIDDEN, FFN])).contiguous();
    [gate_up_proj.view([local, 2 * ffn, HIDDEN]), down_proj]
}

/// Returns a rank's slice of its experts' biases.
fn local_biases(case: &Case, owners: usize, rank: usize, mode: Mode) -> GluBiases {
    let num_experts = case.num_experts as i64;
    let local = num_experts / owners as i64;
    let first = (rank / case.slices) as i64 * local;
    let slice = (rank % case.slices) as i64;
    let of_slice = |biases: Tensor, width: i64| {
        let own = width / case.slices as i64;
        let biases = biases.narrow(0, first, local).narrow(2, slice * own, own);
        let stack = biases.contiguous().view([local, -1, 1]);
        Weight::new(stack).scale_uses(mode.chunks)
    };
    GluBiases {
        gate_up: of_slice(numbers(4, &[num_experts, 2, FFN]), FFN),
        down: of_slice(numbers(5, &[num_experts, 1, HIDDEN]), HIDDEN),
        first_column: slice * (HIDDEN / case.slices as i64),
    }
}

fn build_layer(groups: &Groups, case: &Case, mode: Mode) -> MoeLayer {
    let group = groups.all.clone();
    let rank = group.rank();
    let per_node = mode.ranks_per_node.unwrap_or(group.size());
    let topology = ExpertTopology {
        slices: case.slices,
        nodes: (0..group.size()).map(|rank| rank / per_node).collect(),
    };
    let least_loaded = mode.least_loaded(groups, &topology);
    let hierarchy = mode
        .ranks_per_node
        .map(|per_node| groups.hierarchies[per_node - 1].clone());
    let [gate_up_proj, down_proj] = local_experts(case, topology.owners(), rank)
        .map(|weights| Weight::new(weights).scale_uses(mode.chunks));
    let alone: Arc<dyn Communicator> = Arc::new(Local::new(rank, "alone"));
    MoeLayer {
        router: Router::new(case.num_experts, case.top_k),
        dispatcher: Dispatcher::new(
            group,
            case.num_experts,
            topology.clone(),
            least_loaded,
            hierarchy,
            mode.chunks,
        ),
        balance_scope: BalanceScope::Sequence,
        tensor: TensorParallel::new(alone.clone(), 1),
        sequence: alone,
        gemm: GemmPrecision::Model,
        save: SavePolicy {
            dispatched: mode.save,
            experts: mode.save,
        },
        weights: MoeWeights {
            router: Weight::new(numbers(3, &[case.num_experts as i64, HIDDEN])),
            router_bias: None,
            bias: Mutex::new(None),
            experts: GluNetworks {
                biases: case
                    .biased
                    .then(|| local_biases(case, topology.owners(), rank, mode)),
                activation: if case.biased {
                    Glu::Clamped(CLAMPED)
                } else {
                    Glu::Swiglu
                },
                ..GluNetworks::swiglu(gate_up_proj, down_proj)
            },
            shared: None,
        },
    }
}

fn run(groups: &Groups, case: &Case, mode: Mode) -> Outcome {
    let rank = groups.all.rank();
    let seed = rank as i64;
    let layer = build_layer(groups, case, mode);
    let weights = layer.weights.experts.weights().into_iter();
    let weights = weights
        .map(|weight| (weight.clone(), 0))
        .collect::<Vec<_>>();
    let count = weights.len();
    let gradients =
        GradientBuckets::new(&weights, &[Replication::alone()], 1 << 20, true, &Cpu).unwrap();
    gradients.begin(1);
    let experts = case.chosen[rank].clone();
    let top_k = case.top_k as i64;
    let tokens = experts.len() as i64 / top_k;
    let x = numbers(10 + seed, &[tokens, HIDDEN]).set_requires_grad(true);
    let weights_tk = numbers(20 + seed, &[tokens, top_k]).set_requires_grad(true);
    let plan = layer.dispatcher.plan(&experts, case.top_k).unwrap();
    let x_td = Activation::kept(&x);
    let routed = layer
        .forward_routed(&x_td, &weights_tk, experts, &plan, |_| Ok(None))
        .unwrap();
    let probe = numbers(30 + seed, &[tokens, HIDDEN]);
    (&routed.hidden_td * probe).sum(Kind::Float).backward();
    gradients.finish().unwrap();
    Outcome {
        hidden: routed.hidden_td.detach(),
        grad_tokens: x.grad().copy(),
        grad_routing_weights: weights_tk.grad().copy(),
        grad_experts: (0..count)
            .map(|index| gradients.gradient(index).copy())
            .collect(),
        moe_stats: routed.moe_stats,
    }
}

/// Returns the outcomes of each run, by rank.
fn run_all(runs: &[(Case, Mode)]) -> Vec<Vec<Outcome>> {
    let mut outcomes = runs
        .iter()
        .map(|_| Vec::new())
        .collect::<Vec<Vec<Outcome>>>();
    for ranks in [2, 4] {
        let indices: Vec<usize> = (0..runs.len())
            .filter(|&index| runs[index].0.chosen.len() == ranks)
            .collect();
        let own = indices
            .iter()
            .map(|&index| runs[index].clone())
            .collect::<Vec<(Case, Mode)>>();
        let by_rank = run_on_threads(ranks, TIMEOUT, move |world| {
            let groups = Groups::join(world);
            own.iter()
                .map(|(case, mode)| run(&groups, case, *mode))
                .collect::<Vec<_>>()
        });
        for outcomes_of_rank in by_rank {
            for (&index, outcome) in indices.iter().zip(outcomes_of_rank) {
                outcomes[index].push(outcome);
            }
        }
    }
    outcomes
}

/// Draws the experts of `tokens` tokens. The first expert of a `share` of them is one of `hot`.
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
    let case = |name, num_experts, top_k, slices, chosen| Case {
        name,
        num_experts,
        top_k,
        slices,
        biased: false,
        chosen,
    };
    let biased = |name, slices, chosen| Case {
        biased: true,
        ..case(name, 8, 2, slices, chosen)
    };
    let draw = |ranks: u64, tokens: usize, experts, top_k, hot: &[i64], share| {
        (0..ranks)
            .map(|rank| drawn(rank + 1, tokens, experts, top_k, hot, share))
            .collect::<Vec<_>>()
    };
    vec![
        case("even", 8, 2, 1, draw(4, 30, 8, 2, &[], 0.0)),
        case("all to one expert", 8, 1, 1, vec![vec![5; 23]; 4]),
        case(
            "most to one rank's",
            8,
            2,
            1,
            draw(4, 40, 8, 2, &[2, 3], 0.9),
        ),
        case(
            "a hot expert on each rank",
            8,
            2,
            1,
            draw(4, 40, 8, 2, &[0, 2, 4, 6], 0.9),
        ),
        case(
            "experts without tokens",
            16,
            1,
            1,
            draw(4, 9, 3, 1, &[], 0.0),
        ),
        case(
            "fewer tokens than ranks",
            4,
            1,
            1,
            vec![vec![3], vec![], vec![], vec![]],
        ),
        case(
            "no token at all",
            4,
            2,
            1,
            vec![vec![], vec![], vec![], vec![]],
        ),
        case(
            "tokens on one rank",
            8,
            2,
            1,
            vec![vec![], drawn(3, 50, 8, 2, &[7], 0.9), vec![], vec![]],
        ),
        // With alpha 1, the published planner names a helper twice, and its backward hangs.
        case("ragged", 2, 1, 1, vec![vec![0; 100], vec![0; 101]]),
        case(
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
        case("split experts", 4, 2, 2, draw(4, 30, 4, 2, &[0], 0.9)),
        biased("biases", 1, draw(4, 40, 8, 2, &[2, 3], 0.9)),
        biased("split biases", 2, draw(4, 40, 8, 2, &[2, 3], 0.9)),
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

fn assert_close(name: &str, ours: &Outcome, standard: &Outcome) {
    let assert_close = |part: &str, a: &Tensor, b: &Tensor| {
        let distance = distance(a, b);
        assert!(distance < 1e-6, "{name}: {part} differs by {distance}");
    };
    assert_close("output", &ours.hidden, &standard.hidden);
    assert_close("grad_tokens", &ours.grad_tokens, &standard.grad_tokens);
    assert_close(
        "grad_routing_weights",
        &ours.grad_routing_weights,
        &standard.grad_routing_weights,
    );
    for (ours, standard) in ours.grad_experts.iter().zip(&standard.grad_experts) {
        assert_close("gradient of the experts", ours, standard);
    }
}

fn modes(case: &Case) -> Vec<Mode> {
    let mut modes = vec![STANDARD];
    for least_loaded in [false, true] {
        for ranks_per_node in [None, Some(1), Some(2)] {
            for save in [true, false] {
                for chunks in [1, 3] {
                    modes.push(Mode {
                        least_loaded,
                        strict_paper: false,
                        ranks_per_node,
                        save,
                        chunks,
                    });
                }
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
fn all_modes_compute_what_standard_dispatch_computes() {
    let mut runs: Vec<(Case, Mode)> = Vec::new();
    for case in cases() {
        for mode in modes(&case) {
            runs.push((case.clone(), mode));
        }
    }
    let outcomes = run_all(&runs);
    let mut standard: &[Outcome] = &[];
    let mut lent_bytes = 0;
    for ((case, mode), ours) in runs.iter().zip(&outcomes) {
        if *mode == STANDARD {
            standard = ours;
        }
        for (rank, (ours, standard)) in ours.iter().zip(standard).enumerate() {
            let name = format!("{} on rank {rank}, {mode:?}", case.name);
            assert_close(&name, ours, standard);
        }
        lent_bytes += sum(ours, |stats| stats.lent_bytes);
        check_loads(case, mode, ours);
    }
    assert!(lent_bytes > 0);
}

fn sum(outcomes: &[Outcome], figure: fn(&MoeStats) -> i64) -> i64 {
    outcomes
        .iter()
        .map(|outcome| figure(&outcome.moe_stats))
        .sum()
}

fn check_loads(case: &Case, mode: &Mode, outcomes: &[Outcome]) {
    if !mode.least_loaded {
        assert_eq!(sum(outcomes, |stats| stats.lent_tokens), 0);
    } else if !mode.strict_paper {
        // No rank exceeds the mean, rounded up.
        let total = sum(outcomes, |stats| stats.computed_tokens) as u64;
        let capacity = total.div_ceil(outcomes.len() as u64) as i64;
        for outcome in outcomes {
            let tokens = outcome.moe_stats.computed_tokens;
            assert!(tokens <= capacity, "{}: {tokens} of {total}", case.name);
        }
    }
}

#[test]
fn equal_runs_have_equal_bits() {
    let case = &cases()[2];
    let modes = [
        Mode {
            least_loaded: true,
            ..STANDARD
        },
        Mode {
            least_loaded: true,
            ranks_per_node: Some(2),
            save: false,
            ..STANDARD
        },
    ];
    let runs = modes.map(|mode| (case.clone(), mode));
    let first = run_all(&runs);
    let second = run_all(&runs);
    for (first, second) in first.iter().flatten().zip(second.iter().flatten()) {
        assert!(first.hidden == second.hidden);
        assert!(first.grad_tokens == second.grad_tokens);
        assert!(first.grad_routing_weights == second.grad_routing_weights);
        assert!(first.grad_experts == second.grad_experts);
        assert_eq!(first.moe_stats.lent_bytes, second.moe_stats.lent_bytes);
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
            biased: false,
            chosen,
        };
        let hierarchical = Mode {
            ranks_per_node: Some(2),
            ..STANDARD
        };
        let outcomes = run_all(&[(case.clone(), hierarchical)]).remove(0);
        for (rank, outcome) in outcomes.iter().enumerate() {
            // Ranks 0 and 1, with experts 0 to 7, are one node; ranks 2 and 3 are the other.
            let is_remote = |&expert: &i64| (expert / 8) as usize != rank / 2;
            let experts = &case.chosen[rank];
            let tokens = experts.chunks(top_k);
            let crossing = tokens.filter(|token| token.iter().any(is_remote)).count();
            let sent = outcome.moe_stats.internode_bytes;
            assert_eq!(sent, crossing as i64 * HIDDEN * 4, "rank {rank}");
            let remote = experts.iter().filter(|&expert| is_remote(expert)).count();
            assert!(
                remote > crossing,
                "no token has two experts on a remote node"
            );
        }
    }
}
