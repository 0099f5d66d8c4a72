//! Collectives among real ranks: threads of this process, joined over loopback, with answers one can do by hand.

use parallel::{Communicator, ReduceOp, World, collectives, on_threads};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// Ranks that are threads of this process, with the communicator of all of them.
fn on_ranks<T: Send + 'static>(size: usize, timeout: Duration, body: fn(&World, Arc<dyn Communicator>) -> T) -> Vec<T> {
    on_threads(size, timeout, move |world| body(world, world.all("all").unwrap()))
}

const SOON: Duration = Duration::from_secs(30);

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.flatten(0, -1).to_kind(Kind::Float)).unwrap()
}

fn range(from: i64, to: i64) -> Tensor {
    Tensor::arange_start(from, to, (Kind::Float, Device::Cpu))
}

#[test]
fn collectives_by_hand() {
    for size in 1..=4usize {
        on_ranks(size, SOON, |_, group| {
            let (rank, size) = (group.rank() as i64, group.size() as i64);
            for kind in [Kind::Float, Kind::BFloat16, Kind::Int64] {
                let x = Tensor::full([3], rank + 1, (kind, Device::Cpu));
                group.all_reduce(&x, ReduceOp::Sum).unwrap().wait().unwrap();
                assert_eq!(floats(&x), [(size * (size + 1) / 2) as f32; 3]);
                let x = Tensor::full([1], rank, (kind, Device::Cpu));
                group.all_reduce(&x, ReduceOp::Max).unwrap().wait().unwrap();
                assert_eq!(floats(&x), [(size - 1) as f32]);
                let x = Tensor::full([1], rank, (kind, Device::Cpu));
                group.broadcast(&x, (size - 1) as usize).unwrap().wait().unwrap();
                assert_eq!(floats(&x), [(size - 1) as f32]);
            }
            let gathered = Tensor::zeros([size * 2], (Kind::Float, Device::Cpu));
            group.all_gather(&gathered, &range(rank * 2, rank * 2 + 2)).unwrap().wait().unwrap();
            assert_eq!(floats(&gathered), floats(&range(0, size * 2)));
            let part = Tensor::zeros([2], (Kind::Float, Device::Cpu));
            group.reduce_scatter(&part, &range(0, size * 2), ReduceOp::Sum).unwrap().wait().unwrap();
            assert_eq!(floats(&part), floats(&(range(rank * 2, rank * 2 + 2) * size as f64)));
            // Rank r sends r rows to everyone: rank 0 sends nothing and still takes part.
            let send = vec![rank; size as usize];
            let receive: Vec<i64> = (0..size).collect();
            let input = Tensor::full([rank * size, 2], rank, (Kind::Float, Device::Cpu));
            let output = Tensor::zeros([receive.iter().sum::<i64>(), 2], (Kind::Float, Device::Cpu));
            group.all_to_all(&output, &input, &receive, &send).unwrap().wait().unwrap();
            let expected: Vec<f32> = (0..size).flat_map(|r| vec![r as f32; 2 * r as usize]).collect();
            assert_eq!(floats(&output), expected);
            group.barrier().unwrap();
        });
    }
}

#[test]
fn point_to_point_in_a_ring() {
    let received = on_ranks(3, SOON, |_, group| {
        let (next, previous) = ((group.rank() + 1) % 3, (group.rank() + 2) % 3);
        let (out, inp) = (Tensor::from_slice(&[group.rank() as f32]), Tensor::from_slice(&[0f32]));
        let sent = group.send(&out, next, 7).unwrap();
        group.recv(&inp, previous, 7).unwrap().wait().unwrap();
        sent.wait().unwrap();
        floats(&inp)[0]
    });
    assert_eq!(received, [2., 0., 1.]);
}

#[test]
fn gradients_of_collectives_are_those_of_the_whole() {
    // y = sum over ranks of r-dependent functions; gradients are compared with the derivative done by hand.
    on_ranks(2, SOON, |_, group| {
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
        assert_eq!(floats(&x.grad()), both[rank as usize * 2..rank as usize * 2 + 2]);

        let x = leaf();
        let y = collectives::scatter_to_group(&x, &group).unwrap();
        (y * (rank as f64 + 1.0)).sum(Kind::Float).backward();
        assert_eq!(floats(&x.grad()), [1., 1., 2., 2.]);

        // Rank 0 sends 1 row to itself and 3 to rank 1; rank 1 sends all 4 to rank 0.
        let x = leaf();
        let (receive, send) = if rank == 0 { ([1, 4], [1, 3]) } else { ([3, 0], [4, 0]) };
        let y = collectives::all_to_all(&x, &group, &receive, &send).unwrap();
        (y * (rank as f64 + 1.0)).sum(Kind::Float).backward();
        assert_eq!(floats(&x.grad()), if rank == 0 { [1., 2., 2., 2.] } else { [1., 1., 1., 1.] });
    });
}

#[test]
fn wrong_splits_are_refused_before_anything_is_sent() {
    on_ranks(2, SOON, |_, group| {
        let x = range(0, 4);
        let error = group.all_to_all(&x.empty_like(), &x, &[2, 2], &[3, 2]).err().unwrap().to_string();
        assert!(error.contains("input splits [3, 2] do not divide 4 rows among 2 ranks"), "{error}");
    });
}

#[test]
fn a_rank_that_does_not_come_is_a_timeout_naming_the_operation() {
    let errors = on_ranks(2, Duration::from_secs(2), |_, group| {
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_secs(4));
            return String::new();
        }
        let started = Instant::now();
        let error = group.all_reduce(&range(0, 4), ReduceOp::Sum).unwrap().wait().unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(4));
        error.to_string()
    });
    assert!(errors[0].contains("rank 0: all_reduce in group 'all' of ranks [0, 1] failed"), "{}", errors[0]);
}

#[test]
fn an_abort_ends_a_wait() {
    on_ranks(2, SOON, |_, group| {
        if group.rank() == 0 {
            let other = group.clone();
            let aborter = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                other.abort();
            });
            let started = Instant::now();
            let error = group.all_reduce(&range(0, 4), ReduceOp::Sum).unwrap().wait().unwrap_err();
            assert!(error.to_string().contains("aborted") && started.elapsed() < Duration::from_secs(5));
            aborter.join().unwrap();
            assert!(group.barrier().is_err(), "an aborted group stays aborted");
        } else {
            // Comes late, so that rank 0 waits; then leaves, which frees rank 0's queue.
            std::thread::sleep(Duration::from_secs(1));
        }
    });
}

#[test]
fn groups_beside_one_another() {
    let sums = on_ranks(4, SOON, |world, _| {
        let members = if world.rank() < 2 { [0, 1] } else { [2, 3] };
        let half = world.group("half", &members).unwrap();
        let x = Tensor::from_slice(&[world.rank() as f32]);
        half.all_reduce(&x, ReduceOp::Sum).unwrap().wait().unwrap();
        floats(&x)[0]
    });
    assert_eq!(sums, [1., 1., 5., 5.]);
}
