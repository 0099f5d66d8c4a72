//! Plans which ranks compute the tokens of an overloaded expert, and prints the plan.

use moe::lending::assignment::{Assignment, home_loads};
use moe::lending::least_loaded::{Imbalance, Planner};

/// Tokens per expert: expert 0 has most of them. Four ranks own two experts each.
const LOADS: [i64; 8] = [6000, 500, 300, 300, 300, 200, 200, 200];
const OWNERS: usize = 4;

fn main() {
    let plan = plan();
    println!(
        "tokens per rank without lending: {:?}",
        home_loads(&LOADS, OWNERS)
    );
    println!("tokens per rank with lending:    {:?}", loads(&plan));
    for share in plan.shares() {
        let home = plan.home(share.expert);
        if share.owner != home {
            println!(
                "rank {home} lends expert {} to rank {} for {} tokens",
                share.expert, share.owner, share.routed_tokens
            );
        }
    }
}

/// Plans with the defaults of moerun and a transfer that costs as much as 64 tokens.
fn plan() -> Assignment {
    let planner = Planner {
        capacity: 1.0,
        min_tokens: 64,
        threshold: 1.3,
        over: Imbalance::Device,
        strict_paper: false,
        nodes: Vec::new(),
    };
    planner.plan(&LOADS, OWNERS)
}

fn loads(plan: &Assignment) -> Vec<i64> {
    let mut loads = vec![0; OWNERS];
    for share in plan.shares() {
        loads[share.owner] += share.routed_tokens;
    }
    loads
}

#[test]
fn lending_evens_out_the_ranks_and_keeps_every_token() {
    let loads = loads(&plan());
    assert_eq!(loads.iter().sum::<i64>(), LOADS.iter().sum::<i64>());
    let most = *loads.iter().max().unwrap();
    assert!(most < home_loads(&LOADS, OWNERS)[0] / 2, "{loads:?}");
}
