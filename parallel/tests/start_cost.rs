//! A start costs each rank the same, whatever the number of ranks is.

use parallel::{
    Backend, GroupKind, Mesh, MeshShape,
    start_cost::{JoinCost, PlannedGroup, StartCost, StartPlan},
};
use proptest::prelude::*;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(60);

fn measure(ranks: usize, ranks_per_machine: usize, groups: Vec<PlannedGroup>) -> StartCost {
    let plan = StartPlan {
        ranks,
        ranks_per_machine,
        backend: Backend::Auto,
        groups,
    };
    StartCost::measure(&plan, TIMEOUT).unwrap()
}

fn everyone(ranks: usize) -> PlannedGroup {
    PlannedGroup {
        name: "world".into(),
        members: vec![(0..ranks).collect()],
    }
}

/// Each group has one rank of every machine.
fn across_machines(ranks: usize, ranks_per_machine: usize) -> PlannedGroup {
    let group = |first| (first..ranks).step_by(ranks_per_machine).collect();
    PlannedGroup {
        name: "replicas".into(),
        members: (0..ranks_per_machine).map(group).collect(),
    }
}

fn assert_small(what: &str, cost: &JoinCost, requests: u64, bytes: u64) {
    let most = cost.most_traffic;
    let is_small = most.requests <= requests && most.bytes <= bytes;
    assert!(is_small, "{what}: {cost:?}");
}

#[test]
fn a_rank_asks_the_same_of_the_store_in_a_world_of_any_size() {
    let mut bytes_per_rank = Vec::new();
    for ranks in [8, 32, 128] {
        let groups = vec![everyone(ranks), across_machines(ranks, 8)];
        let cost = measure(ranks, 8, groups);
        println!("{ranks} ranks: {cost:?}");
        // The last rank to come reads the reports of all.
        assert_small("the world", &cost.world, 8, 600 + 60 * ranks as u64);
        bytes_per_rank.push(cost.world.total.bytes as f64 / ranks as f64);
    }
    assert!(
        bytes_per_rank[2] < bytes_per_rank[0] + 100.0,
        "{bytes_per_rank:?}"
    );
}

#[test]
fn groups_of_one_machine_cost_four_requests_of_any_size() {
    for ranks in [2, 8, 32, 128] {
        let cost = measure(ranks, ranks, vec![everyone(ranks)]);
        assert_small(&format!("{ranks} ranks"), &cost.groups[0], 4, 400);
    }
}

#[test]
fn open_files_of_a_large_group_grow_with_its_logarithm() {
    for ranks in [96, 192] {
        let cost = measure(ranks, 1, vec![everyone(ranks)]);
        println!("{ranks} ranks: {cost:?}");
        // A level of a tree has up to 16 ranks, each of which stores an address for all others.
        assert_small(&format!("{ranks} ranks"), &cost.groups[0], 80, 24_000);
        assert!(cost.groups[0].files_per_rank < 40.0, "{cost:?}");
    }
}

/// Creates 3 groups of 256 ranks. Prints times, for which a test machine is too busy.
#[test]
fn many_ranks_of_a_machine_join() {
    let groups = ["one", "two", "three"].map(|name| PlannedGroup {
        name: name.into(),
        ..everyone(256)
    });
    let cost = measure(256, 256, groups.into());
    println!("256 ranks: {cost:?}");
    for group in &cost.groups {
        assert_small("256 ranks", group, 4, 400);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn groups_of_drawn_meshes_cost_four_requests(
        data in 1usize..4,
        context in 1usize..3,
        tensor in 1usize..3,
        pipeline in 1usize..3,
    ) {
        let shape = MeshShape {
            data,
            context,
            tensor,
            pipeline,
            expert: data,
            expert_tensor: 1,
        };
        let ranks = data * context * tensor * pipeline;
        let mesh = |rank| Mesh::new(shape, rank, ranks).unwrap();
        let kinds = GroupKind::ALL;
        let groups = kinds.map(|kind| {
            let group_of = |rank| mesh(rank).group(kind);
            let mut members: Vec<Vec<usize>> = (0..ranks).map(group_of).collect();
            members.sort();
            members.dedup();
            let name = format!("{kind:?}");
            PlannedGroup { name, members }
        });
        let cost = measure(ranks, ranks, groups.into());
        for group in &cost.groups {
            let most = group.most_traffic;
            prop_assert!(most.requests <= 4 && most.bytes <= 400, "{:?}", group);
        }
    }
}
