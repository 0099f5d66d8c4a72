//! The test suite for communicators.

use super::outcome::{Outcome, Verdict, expect, text};
use crate::{
    Accelerator, Backend, CommError, Communicator, RankEnv, ReduceOp, Work, World, world::Joining,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tch::{Device, Kind, Tensor};

/// For operations that must not time out.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(60);
/// For the operation that must time out.
const SHORT_TIMEOUT: Duration = Duration::from_secs(4);

type SharedComm = Arc<dyn Communicator>;

/// The context that all test cases share.
struct TestContext<'a> {
    world: &'a World,
    /// A world of the same ranks with a timeout of [`SHORT_TIMEOUT`].
    short_timeout_world: &'a World,
    all: SharedComm,
    device: &'a dyn Accelerator,
}

/// Runs the suite on all ranks of `env`, with tensors on `device`.
///
/// # Collective
/// All ranks.
///
/// # Errors
/// If the ranks cannot join.
pub fn communicator(
    env: &RankEnv,
    backend: Backend,
    device: &dyn Accelerator,
) -> Result<Vec<Outcome>, CommError> {
    communicator_as(env, backend, device, Joining::default())
}

/// Runs the suite on a rank that joins as `joining` tells.
fn communicator_as(
    env: &RankEnv,
    backend: Backend,
    device: &dyn Accelerator,
    joining: Joining,
) -> Result<Vec<Outcome>, CommError> {
    let join = |env: &RankEnv, timeout| World::join_as(env, timeout, backend, device, joining);
    let world = join(env, OPERATION_TIMEOUT)?;
    let short_timeout_world = join(&env.for_another_world(1), SHORT_TIMEOUT)?;
    let everyone: Vec<usize> = (0..world.size()).collect();
    let context = TestContext {
        world: &world,
        short_timeout_world: &short_timeout_world,
        all: world.p2p_group("conformance", &everyone)?,
        device,
    };
    type Case = fn(&TestContext) -> Verdict;
    let cases: [(&str, Case); 14] = [
        ("all_reduce: every dtype, operation and shape", all_reduce),
        ("broadcast from every rank", broadcast),
        (
            "all_gather and reduce_scatter are inverse",
            gather_and_scatter,
        ),
        ("all_to_all: uneven and empty parts", all_to_all),
        ("send and recv: in order, by tag, any size", point_to_point),
        ("exchange: several messages as one operation", exchange),
        (
            "concurrent operations, waited for in any order",
            concurrent_operations,
        ),
        ("overlapping groups", groups),
        ("operations of several groups on one tensor", chained),
        ("tensors dropped after a wait", dropped),
        ("repeated sums are bit-identical", repeatable),
        (
            "wrong arguments are rejected before anything is sent",
            refusals,
        ),
        (
            "a missing rank is reported, with the call, within the timeout",
            timeout,
        ),
        ("an abort from another thread ends a wait", abort),
    ];
    let outcomes = cases.map(|(name, case)| Outcome {
        name,
        problem: case(&context).err(),
    });
    // No rank leaves while others may still need it.
    context.all.barrier()?.wait()?;
    Ok(outcomes.to_vec())
}

impl TestContext<'_> {
    fn rank(&self) -> i64 {
        self.all.rank() as i64
    }

    fn size(&self) -> i64 {
        self.all.size() as i64
    }

    /// Waits until an operation is complete, also on the device.
    fn finish(&self, work: Result<Work, CommError>) -> Verdict {
        self.finish_in(&self.all, work)
    }

    fn finish_in(&self, group: &SharedComm, work: Result<Work, CommError>) -> Verdict {
        work.and_then(Work::wait).map_err(text)?;
        let synchronized = self.device.synchronize();
        // The group's error says more than the device's.
        group.check().map_err(text)?;
        synchronized.map_err(text)
    }

    fn full(&self, shape: &[i64], value: i64, kind: Kind) -> Tensor {
        let host = Tensor::full(shape, value, (kind, Device::Cpu));
        self.device.upload(&host)
    }

    /// Returns the numbers from `from` on, in `count` rows of `width`.
    fn rows(&self, from: i64, count: i64, width: i64, kind: Kind) -> Tensor {
        let end = from + count * width;
        let numbers = Tensor::arange_start(from, end, (Kind::Int64, Device::Cpu));
        let host = numbers.to_kind(kind).view([count, width]);
        self.device.upload(&host)
    }
}

const KINDS: [Kind; 6] = [
    Kind::Float,
    Kind::Double,
    Kind::BFloat16,
    Kind::Half,
    Kind::Int64,
    Kind::Int,
];

fn all_reduce(context: &TestContext) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    for kind in KINDS.into_iter().chain([Kind::Uint8]) {
        for shape in [
            &[0i64] as &[i64],
            &[],
            &[1],
            &[17],
            &[3, 0, 2],
            &[5, 7],
            &[1 << 14],
        ] {
            for (op, result) in [
                (ReduceOp::Sum, size * (size + 1) / 2),
                (ReduceOp::Min, 1),
                (ReduceOp::Max, size),
            ] {
                let x = context.full(shape, rank + 1, kind);
                context.finish(context.all.all_reduce(&x, op))?;
                let expected = vec![result as f64; x.numel()];
                expect(&format!("{op:?} of {kind:?} {shape:?}"), &x, &expected)?;
            }
        }
    }
    // Libraries use other algorithms for large messages.
    let elements = 3 << 20;
    let x = context.full(&[elements], rank, Kind::Float);
    context.finish(context.all.all_reduce(&x, ReduceOp::Sum))?;
    expect(
        "a sum of 12 MiB",
        &x.narrow(0, elements - 2, 2),
        &[(size * (size - 1) / 2) as f64; 2],
    )
}

fn broadcast(context: &TestContext) -> Verdict {
    for root in 0..context.size() {
        for kind in KINDS.into_iter().chain([Kind::Uint8, Kind::Bool]) {
            let is_bool = kind == Kind::Bool;
            let value = if is_bool {
                i64::from(context.rank() == root)
            } else {
                context.rank() + 3
            };
            let x = context.full(&[2, 3], value, kind);
            context.finish(context.all.broadcast(&x, root as usize))?;
            let expected = if is_bool { 1 } else { root + 3 };
            let what = format!("{kind:?} of rank {root}");
            expect(&what, &x, &[expected as f64; 6])?;
        }
    }
    Ok(())
}

fn gather_and_scatter(context: &TestContext) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    for kind in KINDS {
        for rows in [0, 1, 3] {
            let own = context.rows(rank * rows * 2, rows, 2, kind);
            let all = context.device.zeros(&[size * rows, 2], kind);
            context.finish(context.all.all_gather(&all, &own))?;
            let expected: Vec<f64> = (0..size * rows * 2).map(|n| n as f64).collect();
            expect(&format!("gathered {kind:?}"), &all, &expected)?;
            for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min] {
                let part = context.device.zeros(&[rows, 2], kind);
                context.finish(context.all.reduce_scatter(&part, &all, op))?;
                let factor = if op == ReduceOp::Sum { size } else { 1 };
                let first = rank * rows * 2;
                let numbers = first..first + rows * 2;
                let expected: Vec<f64> = numbers.map(|n| (n * factor) as f64).collect();
                expect(&format!("{op:?} of {kind:?}, scattered"), &part, &expected)?;
            }
        }
    }
    Ok(())
}

/// Rows from one rank to another in an all-to-all.
type Rows = fn(from: i64, to: i64) -> i64;

fn all_to_all(context: &TestContext) -> Verdict {
    let patterns: [Rows; 3] = [
        // Some parts are empty, and others larger than what comes back.
        |from, to| (2 * from + to) % 4,
        // Rank 0 sends nothing.
        |from, to| if from == 0 { 0 } else { from + to },
        // No rank sends anything.
        |_, _| 0,
    ];
    for kind in KINDS {
        for width in [1, 5] {
            for rows in patterns {
                all_to_all_once(context, kind, width, rows)?;
            }
        }
    }
    Ok(())
}

fn all_to_all_once(context: &TestContext, kind: Kind, width: i64, rows: Rows) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    let send: Vec<i64> = (0..size).map(|to| rows(rank, to)).collect();
    let receive: Vec<i64> = (0..size).map(|from| rows(from, rank)).collect();
    // Each row contains its source, its destination and its number.
    let matrix = |pairs: &[(i64, i64)]| {
        let mut values = Vec::new();
        for &(from, to) in pairs {
            for row in 0..rows(from, to) {
                let value = from * 64 + to * 8 + row % 8;
                values.extend(std::iter::repeat_n(value, width as usize));
            }
        }
        let count = values.len() as i64 / width;
        let matrix = Tensor::from_slice(&values).to_kind(kind);
        matrix.view([count, width])
    };
    let sent: Vec<(i64, i64)> = (0..size).map(|to| (rank, to)).collect();
    let received = (0..size)
        .map(|from| (from, rank))
        .collect::<Vec<(i64, i64)>>();
    let input = context.device.upload(&matrix(&sent));
    let expected = matrix(&received);
    let output = context.device.zeros(&expected.size(), kind);
    context.finish(context.all.all_to_all(&output, &input, &receive, &send))?;
    // The expected values are rounded to `kind` as well: bf16 is exact only up to 256.
    let expected = expected.to_kind(Kind::Double).flatten(0, -1);
    let expected = Vec::<f64>::try_from(expected).map_err(text)?;
    expect(&format!("{kind:?} in rows of {width}"), &output, &expected)
}

fn point_to_point(context: &TestContext) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    if size == 1 {
        return Ok(());
    }
    let next = ((rank + 1) % size) as usize;
    let previous = ((rank + size - 1) % size) as usize;
    for elements in [0, 1, 1000, 1 << 18] {
        // Receives are posted before the sends. Two of the three messages have the same tag.
        let tags = [7, 7, 3];
        let messages: Vec<Tensor> = (0..3)
            .map(|n| context.full(&[elements], rank * 10 + n, Kind::Float))
            .collect();
        let buffers: Vec<Tensor> = (0..3)
            .map(|_| context.device.zeros(&[elements], Kind::Float))
            .collect();
        let mut works = Vec::new();
        for (buffer, tag) in buffers.iter().zip(tags) {
            works.push(context.all.recv(buffer, previous, tag));
        }
        for (message, tag) in messages.iter().zip(tags) {
            works.push(context.all.send(message, next, tag));
        }
        for work in works {
            context.finish(work)?;
        }
        for (n, buffer) in buffers.iter().enumerate() {
            let expected = vec![(previous * 10 + n) as f64; elements as usize];
            let what = format!("message {n} of {elements} elements");
            expect(&what, buffer, &expected)?;
        }
    }
    Ok(())
}

fn exchange(context: &TestContext) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    let others = (0..size)
        .filter(|&other| other != rank)
        .collect::<Vec<i64>>();
    // The sum of both ranks is the number of elements, so that pairs have different sizes.
    let sent = others
        .iter()
        .map(|other| context.full(&[rank + other], rank * 10 + other, Kind::Float))
        .collect::<Vec<Tensor>>();
    let received = others
        .iter()
        .map(|other| context.device.zeros(&[rank + other], Kind::Float))
        .collect::<Vec<Tensor>>();
    let peers = others.iter().map(|&other| other as usize);
    let sends = sent
        .iter()
        .zip(peers.clone())
        .collect::<Vec<(&Tensor, usize)>>();
    let receives = received
        .iter()
        .zip(peers)
        .collect::<Vec<(&Tensor, usize)>>();
    context.finish(context.all.exchange(&sends, &receives, 11))?;
    for (tensor, other) in received.iter().zip(&others) {
        let expected = vec![(other * 10 + rank) as f64; (rank + other) as usize];
        expect(&format!("from rank {other}"), tensor, &expected)?;
    }
    Ok(())
}

fn concurrent_operations(context: &TestContext) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    let tensors: Vec<Tensor> = (0..6)
        .map(|n| context.full(&[1 << (2 * n)], rank + n, Kind::Float))
        .collect();
    let works: Vec<_> = tensors
        .iter()
        .map(|x| context.all.all_reduce(x, ReduceOp::Sum))
        .collect();
    for work in works.into_iter().rev() {
        context.finish(work)?;
    }
    for (n, x) in tensors.iter().enumerate() {
        let sum = size * (size - 1) / 2 + size * n as i64;
        expect("a concurrent sum", x, &vec![sum as f64; x.numel()])?;
    }
    Ok(())
}

fn groups(context: &TestContext) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    // The even or the odd ranks, and pairs of neighbours.
    let half: Vec<usize> = (0..size as usize)
        .filter(|other| other % 2 == rank as usize % 2)
        .collect();
    let pair = pair_of(rank, size);
    let half_group = context.world.group("every second", &half).map_err(text)?;
    let pair_group = context.world.group("neighbours", &pair).map_err(text)?;
    let x = context.full(&[4], rank, Kind::Int64);
    let y = context.full(&[4], rank, Kind::Int64);
    let first = half_group.all_reduce(&x, ReduceOp::Sum);
    let second = pair_group.all_reduce(&y, ReduceOp::Sum);
    context.finish(second)?;
    context.finish(first)?;
    let sum = |members: &[usize]| [members.iter().sum::<usize>() as f64; 4];
    expect("every second rank's sum", &x, &sum(&half))?;
    expect("the neighbours' sum", &y, &sum(&pair))
}

/// Returns the rank and its neighbour, if it has one: ranks 0 and 1, 2 and 3, and so on.
fn pair_of(rank: i64, size: i64) -> Vec<usize> {
    let first = rank / 2 * 2;
    let end = (first + 2).min(size);
    (first as usize..end as usize).collect()
}

fn chained(context: &TestContext) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    let pair = pair_of(rank, size);
    let group = context.world.group("takers", &pair).map_err(text)?;
    for elements in [1, 1 << 20] {
        let x = context.full(&[elements], rank, Kind::Float);
        for group in [&context.all, &group, &context.all] {
            // On a device, only the order in which operations are queued separates them.
            let work = group.all_reduce(&x, ReduceOp::Sum);
            work.and_then(Work::wait).map_err(text)?;
        }
        context.finish(context.all.barrier())?;
        let sum = size * (size - 1) / 2;
        let expected = (0..size)
            .map(|other| sum * pair_of(other, size).len() as i64)
            .sum::<i64>();
        let last = x.narrow(0, elements - 1, 1);
        expect("a sum of sums of sums", &last, &[expected as f64])?;
    }
    Ok(())
}

fn dropped(context: &TestContext) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    let elements = 1 << 18;
    for round in 0..4 {
        let all = context.device.empty(&[elements * size], Kind::Float);
        let own = context.full(&[elements], rank + round, Kind::Float);
        let work = context.all.all_gather(&all, &own);
        work.and_then(Work::wait).map_err(text)?;
        drop(own);
        // Reuses the memory if it is free.
        let _other = context.full(&[elements], -1, Kind::Float);
        let last = all
            .view([size, elements])
            .narrow(1, elements - 1, 1)
            .contiguous();
        let expected = (0..size)
            .map(|other| (other + round) as f64)
            .collect::<Vec<f64>>();
        expect("the gathered values", &last, &expected)?;
    }
    Ok(())
}

fn repeatable(context: &TestContext) -> Verdict {
    let wave = Tensor::arange(10_000, (Kind::Double, Device::Cpu)) * (1.37 + context.rank() as f64);
    let values = wave.sin().to_kind(Kind::Float);
    let sum = || -> Result<Tensor, String> {
        let x = context.device.upload(&values.copy());
        context.finish(context.all.all_reduce(&x, ReduceOp::Sum))?;
        Ok(x.to_device(Device::Cpu))
    };
    let first = sum()?;
    let second = sum()?;
    if !first.equal(&second) {
        return Err("two sums of the same numbers differ".into());
    }
    Ok(())
}

fn refusals(context: &TestContext) -> Verdict {
    let rows = context.size();
    let x = context.rows(0, rows, 1, Kind::Float);
    let output = x.empty_like();
    let right = vec![1; rows as usize];
    let mut wrong = right.clone();
    wrong[0] = 2;
    let error = match context.all.all_to_all(&output, &x, &right, &wrong) {
        Ok(_) => return Err("splits that do not add up were accepted".into()),
        Err(error) => error.to_string(),
    };
    let expected = format!("rank {}: all_to_all in group", context.rank());
    if !error.contains(&expected) {
        return Err(format!(
            "the error is {error:?} and does not contain: {expected}"
        ));
    }
    let other = context.device.zeros(&[rows, 1], Kind::Double);
    match context.all.all_to_all(&other, &x, &right, &right) {
        Ok(_) => Err("two dtypes were accepted".into()),
        Err(_) => Ok(()),
    }
}

fn timeout(context: &TestContext) -> Verdict {
    let size = context.size();
    if size == 1 {
        return Ok(());
    }
    let group = context.short_timeout_world.all("late rank");
    let group = group.map_err(text)?;
    let x = context.full(&[4], 1, Kind::Float);
    context.finish_in(&group, group.all_reduce(&x, ReduceOp::Sum))?;
    let gather = || {
        let output = context.device.zeros(&[4 * size], Kind::Float);
        context.finish_in(&group, group.all_gather(&output, &x))
    };
    let late = size - 1;
    let mut verdict = Ok(());
    if context.rank() != late {
        let began = Instant::now();
        let error = gather().err().unwrap_or_default();
        let took = began.elapsed();
        let expected = format!(
            "call 2, all_gather in group 'late rank': rank {late} is missing; its last call here \
             is 1, all_reduce"
        );
        if !error.contains(&expected) {
            verdict = Err(format!(
                "the error is {error:?} and does not contain: {expected}"
            ));
        } else if took > SHORT_TIMEOUT + Duration::from_secs(3) {
            verdict = Err(format!(
                "the error took {took:.1?}, but the timeout is {SHORT_TIMEOUT:?}"
            ));
        }
    }
    // The late rank makes its call after the others' has timed out, so that no operation is left.
    context.finish(context.all.barrier())?;
    if context.rank() == late {
        // The call may fail, since the other ranks do not wait any longer.
        let _ = gather();
    }
    context.finish(context.all.barrier())?;
    verdict
}

fn abort(context: &TestContext) -> Verdict {
    if context.size() == 1 {
        return Ok(());
    }
    let group = context.world.all("to be aborted").map_err(text)?;
    let x = context.full(&[4], 1, Kind::Float);
    // All ranks have created the communicator before one of them aborts it.
    context.finish_in(&group, group.all_reduce(&x, ReduceOp::Sum))?;
    let sum = || context.finish_in(&group, group.all_reduce(&x, ReduceOp::Sum));
    let abort_in = |pause: u64| {
        let other = group.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(pause));
            other.abort();
        })
    };
    let mut verdict = Ok(());
    if context.rank() == 0 {
        let aborter = abort_in(300);
        let began = Instant::now();
        verdict = match sum() {
            Ok(()) => Err("an aborted operation succeeded".into()),
            Err(_) if began.elapsed() > Duration::from_secs(10) => {
                Err("the abort came late".into())
            }
            Err(_) if group.all_reduce(&x, ReduceOp::Sum).is_ok() => {
                Err("an aborted group works again".into())
            }
            Err(_) => Ok(()),
        };
        aborter.join().map_err(|_| "the aborting thread panicked")?;
    }
    context.finish(context.all.barrier())?;
    if context.rank() != 0 {
        // Completes rank 0's operation. If rank 0 has left it, this one is aborted too.
        let aborter = abort_in(1000);
        let _ = sum();
        aborter.join().map_err(|_| "the aborting thread panicked")?;
    }
    context.finish(context.all.barrier())?;
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cpu, StoreServer, host_groups::GroupLimits};

    /// Runs the suite, whose sums are exact in bf16 for a number of ranks that is a power of two.
    fn conforms(size: usize, backend: Backend, joining: impl Fn(usize) -> Joining) {
        let server = StoreServer::local().unwrap();
        let start = |rank| {
            let env = RankEnv::single_node(rank, size, server.access().clone());
            let joining = joining(rank);
            std::thread::spawn(move || communicator_as(&env, backend, &Cpu, joining).unwrap())
        };
        let ranks: Vec<_> = (0..size).map(start).collect();
        for (rank, outcomes) in ranks.into_iter().enumerate() {
            for outcome in outcomes.join().unwrap() {
                let name = outcome.name;
                assert_eq!(outcome.problem, None, "{size} ranks, rank {rank}: {name}");
            }
        }
    }

    #[test]
    fn groups_that_are_joined_on_use_conform() {
        for backend in [Backend::Auto, Backend::Gloo] {
            let limits = GroupLimits {
                always_lazy: true,
                ..GroupLimits::default()
            };
            conforms(4, backend, |_| Joining {
                limits,
                ..Joining::default()
            });
        }
    }

    #[test]
    fn trees_conform() {
        let limits = GroupLimits {
            without_tree: 2,
            always_lazy: false,
        };
        let machine_of = |rank: usize| Joining {
            machine: rank as u64 / 3,
            limits,
        };
        for backend in [Backend::Auto, Backend::Gloo] {
            conforms(8, backend, machine_of);
        }
    }
}
