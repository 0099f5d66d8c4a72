use super::*;
use crate::{
    Backend, Cpu, RankEnv, StoreServer, World,
    host_groups::GroupLimits,
    world::{Joining, run_on_threads_as},
};
use tch::kind::FLOAT_CPU;

const TIMEOUT: Duration = Duration::from_secs(60);

/// Joins each rank as one of a machine of `ranks_per_machine`, with trees for all larger groups.
fn with_trees(ranks_per_machine: usize) -> impl Fn(usize) -> Joining + Copy + Send + Sync {
    move |rank| Joining {
        machine: (rank / ranks_per_machine) as u64,
        limits: GroupLimits {
            without_tree: 2,
            always_lazy: false,
        },
    }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_kind(Kind::Float)).unwrap()
}

#[test]
fn a_tree_gathers_reduces_and_broadcasts() {
    for ranks_per_machine in [1, 3, 20] {
        run_on_threads_as(20, TIMEOUT, with_trees(ranks_per_machine), |world| {
            let group = world.all("tree").unwrap();
            let rank = world.rank();
            let own = Tensor::from_slice(&[rank as f32, 0.5]);
            let all = Tensor::zeros([40], FLOAT_CPU);
            group.all_gather(&all, &own).unwrap().wait().unwrap();
            let expected = (0..20)
                .flat_map(|rank| [rank as f32, 0.5])
                .collect::<Vec<f32>>();
            assert_eq!(floats(&all), expected);

            // The order of the sum is fixed.
            let thirds = || Tensor::from_slice(&[(rank as f32 + 1.0) / 3.0; 3]);
            let sum = || {
                let sum = thirds();
                group
                    .all_reduce(&sum, ReduceOp::Sum)
                    .unwrap()
                    .wait()
                    .unwrap();
                sum
            };
            let first = sum();
            assert!(first.equal(&sum()));
            assert!((floats(&first)[0] - 70.0).abs() < 1e-4);
            let most = Tensor::from_slice(&[rank as i64]);
            group
                .all_reduce(&most, ReduceOp::Max)
                .unwrap()
                .wait()
                .unwrap();
            assert_eq!(most.int64_value(&[0]), 19);

            for root in [0, 7, 19] {
                let value = Tensor::from_slice(&[rank as i32, -1]).view([2, 1]);
                group.broadcast(&value, root).unwrap().wait().unwrap();
                assert_eq!(
                    Vec::<i32>::try_from(value.view([2])).unwrap(),
                    [root as i32, -1]
                );
            }
            group.barrier().unwrap().wait().unwrap();
        });
    }
}

#[test]
fn large_tensors_and_messages_use_the_whole_group() {
    run_on_threads_as(6, TIMEOUT, with_trees(2), |world| {
        let group = world.all("tree").unwrap();
        let rank = world.rank();
        let sum = Tensor::full([100_000], rank as i64, FLOAT_CPU);
        // Started before an operation of the tree, and waited for afterwards.
        let work = group.all_reduce(&sum, ReduceOp::Sum).unwrap();
        group.barrier().unwrap().wait().unwrap();
        work.wait().unwrap();
        assert_eq!(floats(&sum.narrow(0, 99_999, 1)), [15.0]);
        let part = Tensor::zeros([1], FLOAT_CPU);
        let parts = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.]);
        let work = group.reduce_scatter(&part, &parts, ReduceOp::Sum);
        work.unwrap().wait().unwrap();
        assert_eq!(floats(&part), [6.0 * (rank as f32 + 1.0)]);
        let received = Tensor::zeros([1], FLOAT_CPU);
        let receive = group.recv(&received, (rank + 5) % 6, 3).unwrap();
        let send = group.send(&part, (rank + 1) % 6, 3).unwrap();
        send.wait().unwrap();
        receive.wait().unwrap();
        assert_eq!(floats(&received), [6.0 * ((rank + 5) % 6 + 1) as f32]);
        // A rank that leaves would close connections that others still use.
        group.barrier().unwrap().wait().unwrap();
    });
}

#[test]
fn an_abort_ends_a_wait_for_ranks_that_never_come() {
    let server = StoreServer::local().unwrap();
    let ranks = (0..4).map(|rank| {
        let env = RankEnv::single_node(rank, 4, server.access().clone());
        std::thread::spawn(move || {
            let joining = with_trees(1)(rank);
            let world = World::join_as(&env, TIMEOUT, Backend::Auto, &Cpu, joining).unwrap();
            let group = world.all("tree").unwrap();
            if rank == 0 {
                let other = group.clone();
                let aborter = std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(300));
                    other.abort();
                });
                let began = std::time::Instant::now();
                let error = group.barrier().unwrap().wait().unwrap_err().to_string();
                assert!(error.contains("the group was aborted"), "{error}");
                assert!(began.elapsed() < Duration::from_secs(5));
                assert!(group.barrier().is_err());
                aborter.join().unwrap();
            }
            let after = world.group(&format!("alone {rank}"), &[rank]).unwrap();
            after.barrier().unwrap().wait().unwrap();
        })
    });
    let ranks: Vec<_> = ranks.collect();
    for rank in ranks {
        rank.join().unwrap();
    }
}
