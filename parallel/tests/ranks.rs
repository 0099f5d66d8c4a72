//! Collectives of real communicators, whose ranks are threads of this process.

use parallel::{
    Backend, Communicator, Cpu, RankEnv, World, collectives, conformance, run_on_threads,
};
use std::{sync::Arc, time::Duration};
use tch::{Device, Kind, Tensor};

/// Runs `body` on ranks that are threads of this process, with the communicator of all of them.
fn run_with_group<T>(
    size: usize,
    timeout: Duration,
    body: fn(&World, Arc<dyn Communicator>) -> T,
) -> Vec<T>
where
    T: Send + 'static,
{
    run_on_threads(size, timeout, move |world| {
        body(world, world.all("all").unwrap())
    })
}

const TIMEOUT: Duration = Duration::from_secs(30);

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.flatten(0, -1).to_kind(Kind::Float)).unwrap()
}

fn range(from: i64, to: i64) -> Tensor {
    Tensor::arange_start(from, to, (Kind::Float, Device::Cpu))
}

#[test]
fn gradients_of_collectives_match_derivatives_by_hand() {
    run_with_group(2, TIMEOUT, |_, group| {
        let rank = group.rank() as i64;
        let leaf = || range(0, 4).set_requires_grad(true);
        let weight = range(0, 4) + rank as f64; // w_r[i] = i + r

        let x = leaf();
        let y = collectives::copy_to_group(&x, &group).unwrap();
        (y * &weight).sum(Kind::Float).backward();
        assert_eq!(floats(&x.grad()), [1., 3., 5., 7.]); // w_0 + w_1

        let x = leaf();
        let y = collectives::reduce_from_group(&x, &group).unwrap();
        assert_eq!(floats(&y), [0., 2., 4., 6.]);
        (y * &weight).sum(Kind::Float).backward();
        assert_eq!(floats(&x.grad()), floats(&weight));

        let x = (range(0, 2) + rank as f64 * 2.0).set_requires_grad(true);
        let y = collectives::gather_from_group(&x, &group).unwrap();
        assert_eq!(floats(&y), [0., 1., 2., 3.]);
        (y * &weight).sum(Kind::Float).backward();
        let both = [1., 3., 5., 7.];
        assert_eq!(
            floats(&x.grad()),
            both[rank as usize * 2..rank as usize * 2 + 2]
        );

        let x = leaf();
        let y = collectives::scatter_to_group(&x, &group).unwrap();
        (y * (rank as f64 + 1.0)).sum(Kind::Float).backward();
        assert_eq!(floats(&x.grad()), [1., 1., 2., 2.]);

        // Rank 0 sends 1 row to itself and 3 to rank 1; rank 1 sends all 4 to rank 0.
        let x = leaf();
        let (receive, send) = if rank == 0 {
            ([1, 4], [1, 3])
        } else {
            ([3, 0], [4, 0])
        };
        let y = collectives::all_to_all(&x, &group, &receive, &send).unwrap();
        (y * (rank as f64 + 1.0)).sum(Kind::Float).backward();
        assert_eq!(
            floats(&x.grad()),
            if rank == 0 {
                [1., 2., 2., 2.]
            } else {
                [1., 1., 1., 1.]
            }
        );
    });
}

#[test]
fn gloo_conforms() {
    conforms(Backend::Gloo);
}

#[test]
fn shared_memory_conforms() {
    conforms(Backend::Auto);
}

fn conforms(backend: Backend) {
    for size in [1, 2, 3, 4, 8] {
        let outcomes = run_with_envs(size, move |env| {
            conformance::communicator(env, backend, &Cpu).unwrap()
        });
        for (rank, outcomes) in outcomes.iter().enumerate() {
            for outcome in outcomes {
                let name = outcome.name;
                assert_eq!(outcome.problem, None, "{size} ranks, rank {rank}: {name}");
            }
        }
    }
}

/// Runs `body` on threads that have not joined a world yet.
fn run_with_envs<T>(size: usize, body: impl Fn(&RankEnv) -> T + Copy + Send + 'static) -> Vec<T>
where
    T: Send + 'static,
{
    let server = parallel::StoreServer::local().unwrap();
    let run = |rank| {
        let env = RankEnv::single_node(rank, size, server.access().clone());
        std::thread::spawn(move || body(&env))
    };
    let ranks: Vec<_> = (0..size).map(run).collect();
    ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
}
