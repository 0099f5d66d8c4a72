//! What every communicator has to do.

use super::{Outcome, Verdict, expect};
use crate::{Accelerator, Backend, CommError, Communicator, RankEnv, ReduceOp, World};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// No operation takes longer, but for those that are to.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(60);
/// The timeout that is tried.
const SHORT_TIMEOUT: Duration = Duration::from_secs(4);

type SharedComm = Arc<dyn Communicator>;

/// What the cases have.
struct TestContext<'a> {
    world: &'a World,
    /// The same ranks with a timeout of [`SHORT_TIMEOUT`].
    short_timeout_world: &'a World,
    all: SharedComm,
    device: &'a dyn Accelerator,
}

/// Tries everything, on all ranks of `env`, with tensors of `device`.
///
/// # Collective
/// All ranks.
///
/// # Errors
/// When the ranks cannot be joined.
pub fn communicator(
    env: &RankEnv,
    backend: Backend,
    device: &dyn Accelerator,
) -> Result<Vec<Outcome>, CommError> {
    let world = World::join(env, OPERATION_TIMEOUT, backend, device)?;
    let short_timeout_world = World::join(&env.again(1), SHORT_TIMEOUT, backend, device)?;
    let everyone: Vec<usize> = (0..world.size()).collect();
    let context = TestContext {
        world: &world,
        short_timeout_world: &short_timeout_world,
        all: world.chain("conformance", &everyone)?,
        device,
    };
    type Case = fn(&TestContext) -> Verdict;
    let cases: [(&str, Case); 14] = [
        ("all_reduce: every dtype, operation and shape", all_reduce),
        ("broadcast from every rank", broadcast),
        (
            "all_gather and reduce_scatter are each other's reverse",
            gather_and_scatter,
        ),
        ("all_to_all: uneven parts, empty ones too", all_to_all),
        ("send and recv: in order, by tag, any size", point_to_point),
        ("exchange: several messages as one operation", exchange),
        (
            "operations under way side by side, waited for in any order",
            concurrent_operations,
        ),
        ("groups beside one another", groups),
        ("what one group made another takes at once", chained),
        (
            "tensors that are dropped after a wait were sent whole",
            dropped,
        ),
        ("the same sums twice are equal to the bit", repeatable),
        (
            "wrong arguments are refused before anything is sent",
            refusals,
        ),
        (
            "a rank that does not come is named, with the call, within the timeout",
            timeout,
        ),
        ("an abort from another thread ends a wait", abort),
    ];
    let outcomes = cases.map(|(name, case)| Outcome {
        name,
        problem: case(&context).err(),
    });
    // Nobody leaves while others may still need it.
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

    /// Waits for the end of an operation, on the device too.
    fn done(&self, work: Result<crate::Work, CommError>) -> Verdict {
        self.done_in(&self.all, work)
    }

    fn done_in(&self, group: &SharedComm, work: Result<crate::Work, CommError>) -> Verdict {
        work.and_then(crate::Work::wait)
            .map_err(|e| e.to_string())?;
        // A device that gave an operation up may say so here; the group knows more.
        let synchronized = self.device.synchronize();
        group.check().map_err(|e| e.to_string())?;
        synchronized.map_err(|e| e.to_string())
    }

    fn full(&self, shape: &[i64], value: i64, kind: Kind) -> Tensor {
        self.device
            .upload(&Tensor::full(shape, value, (kind, Device::Cpu)))
    }

    /// `from..from + count` in rows of `width`.
    fn rows(&self, from: i64, count: i64, width: i64, kind: Kind) -> Tensor {
        let numbers = Tensor::arange_start(from, from + count * width, (Kind::Int64, Device::Cpu));
        self.device
            .upload(&numbers.to_kind(kind).view([count, width]))
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
                context.done(context.all.all_reduce(&x, op))?;
                let expected = vec![result as f64; x.numel()];
                expect(&format!("{op:?} of {kind:?} {shape:?}"), &x, &expected)?;
            }
        }
    }
    // Large enough for every library's ways with large messages.
    let x = context.full(&[3 << 20], rank, Kind::Float);
    context.done(context.all.all_reduce(&x, ReduceOp::Sum))?;
    expect(
        "a sum of 12 MiB",
        &x.narrow(0, (3 << 20) - 2, 2),
        &[(size * (size - 1) / 2) as f64; 2],
    )
}

fn broadcast(context: &TestContext) -> Verdict {
    for root in 0..context.size() {
        for kind in KINDS.into_iter().chain([Kind::Uint8, Kind::Bool]) {
            let value = if kind == Kind::Bool {
                i64::from(context.rank() == root)
            } else {
                context.rank() + 3
            };
            let x = context.full(&[2, 3], value, kind);
            context.done(context.all.broadcast(&x, root as usize))?;
            let expected = if kind == Kind::Bool { 1 } else { root + 3 };
            expect(
                &format!("{kind:?} of rank {root}"),
                &x,
                &[expected as f64; 6],
            )?;
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
            context.done(context.all.all_gather(&all, &own))?;
            let expected: Vec<f64> = (0..size * rows * 2).map(|n| n as f64).collect();
            expect(&format!("gathered {kind:?}"), &all, &expected)?;
            for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min] {
                let part = context.device.zeros(&[rows, 2], kind);
                context.done(context.all.reduce_scatter(&part, &all, op))?;
                let times = if op == ReduceOp::Sum { size } else { 1 };
                let first = rank * rows * 2;
                let expected: Vec<f64> = (first..first + rows * 2)
                    .map(|n| (n * times) as f64)
                    .collect();
                expect(&format!("{op:?} of {kind:?}, scattered"), &part, &expected)?;
            }
        }
    }
    Ok(())
}

fn all_to_all(context: &TestContext) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    // Rank r sends (2r + s) mod 4 rows to s: some none, some others more than they receive. Then rank 0 sends nothing at
    // all, then nobody does.
    let patterns: [fn(i64, i64) -> i64; 3] = [
        |from, to| (2 * from + to) % 4,
        |from, to| if from == 0 { 0 } else { from + to },
        |_, _| 0,
    ];
    for kind in KINDS {
        for width in [1, 5] {
            for rows in patterns {
                let send: Vec<i64> = (0..size).map(|to| rows(rank, to)).collect();
                let receive: Vec<i64> = (0..size).map(|from| rows(from, rank)).collect();
                // Each row says from whom it comes, to whom it goes and which it is.
                let value = |from: i64, to: i64, row: i64| from * 64 + to * 8 + row % 8;
                let parts = (0..size)
                    .flat_map(|to| (0..send[to as usize]).map(move |row| value(rank, to, row)));
                let parts: Vec<i64> = parts
                    .flat_map(|v| std::iter::repeat_n(v, width as usize))
                    .collect();
                let input = Tensor::from_slice(&parts)
                    .to_kind(kind)
                    .view([send.iter().sum::<i64>(), width]);
                let input = context.device.upload(&input);
                let output = context
                    .device
                    .zeros(&[receive.iter().sum::<i64>(), width], kind);
                context.done(context.all.all_to_all(&output, &input, &receive, &send))?;
                let expected = (0..size).flat_map(|from| {
                    (0..receive[from as usize]).map(move |r| value(from, rank, r))
                });
                let expected = expected.flat_map(|v| std::iter::repeat_n(v as f64, width as usize));
                // bf16 holds whole numbers up to 256 exactly: beyond, what it makes of them.
                let expected: Vec<f64> = expected.collect();
                let rounded = Tensor::from_slice(&expected)
                    .to_kind(kind)
                    .to_kind(Kind::Double);
                let expected = Vec::<f64>::try_from(rounded).map_err(|e| e.to_string())?;
                expect(&format!("{kind:?} in rows of {width}"), &output, &expected)?;
            }
        }
    }
    Ok(())
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
        // Received before they are sent, three under way, two of one tag.
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
        works.into_iter().try_for_each(|work| context.done(work))?;
        for (n, buffer) in buffers.iter().enumerate() {
            let expected = vec![(previous * 10 + n) as f64; elements as usize];
            expect(
                &format!("message {n} of {elements} elements"),
                buffer,
                &expected,
            )?;
        }
    }
    Ok(())
}

fn exchange(context: &TestContext) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    let others: Vec<i64> = (0..size).filter(|&other| other != rank).collect();
    // As many elements as the sum of both ranks: each pair has a size of its own.
    let sends: Vec<Tensor> = others
        .iter()
        .map(|other| context.full(&[rank + other], rank * 10 + other, Kind::Float))
        .collect();
    let receives: Vec<Tensor> = others
        .iter()
        .map(|other| context.device.zeros(&[rank + other], Kind::Float))
        .collect();
    let pair = |tensors: &'_ [Tensor]| -> Vec<(usize, usize)> {
        (0..tensors.len())
            .map(|n| (n, others[n] as usize))
            .collect()
    };
    let out: Vec<_> = pair(&sends)
        .into_iter()
        .map(|(n, other)| (&sends[n], other))
        .collect();
    let inp: Vec<_> = pair(&receives)
        .into_iter()
        .map(|(n, other)| (&receives[n], other))
        .collect();
    context.done(context.all.exchange(&out, &inp, 11))?;
    for (tensor, other) in receives.iter().zip(&others) {
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
    works
        .into_iter()
        .rev()
        .try_for_each(|work| context.done(work))?;
    for (n, x) in tensors.iter().enumerate() {
        let sum = size * (size - 1) / 2 + size * n as i64;
        expect("one of several sums", x, &vec![sum as f64; x.numel()])?;
    }
    Ok(())
}

fn groups(context: &TestContext) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    // Even and odd ranks; and each with its neighbour, in the opposite order of making.
    let members: Vec<usize> = (0..size)
        .filter(|other| other % 2 == rank % 2)
        .map(|other| other as usize)
        .collect();
    let pair: Vec<usize> = (rank / 2 * 2..(rank / 2 * 2 + 2).min(size))
        .map(|other| other as usize)
        .collect();
    let make = |name: &str, members: &[usize]| {
        context
            .world
            .group(name, members)
            .map_err(|e| e.to_string())
    };
    let half = make("every second", &members)?;
    let pair_group = make("neighbours", &pair)?;
    let x = context.full(&[4], rank, Kind::Int64);
    let y = context.full(&[4], rank, Kind::Int64);
    let first = half.all_reduce(&x, ReduceOp::Sum);
    let second = pair_group.all_reduce(&y, ReduceOp::Sum);
    context.done(second)?;
    context.done(first)?;
    expect(
        "every second rank's sum",
        &x,
        &[members.iter().sum::<usize>() as f64; 4],
    )?;
    expect(
        "the neighbours' sum",
        &y,
        &[pair.iter().sum::<usize>() as f64; 4],
    )
}

fn chained(context: &TestContext) -> Verdict {
    let rank = context.rank();
    let size = context.size();
    let pair: Vec<usize> = (rank / 2 * 2..(rank / 2 * 2 + 2).min(size))
        .map(|other| other as usize)
        .collect();
    let group = context
        .world
        .group("takers", &pair)
        .map_err(|e| e.to_string())?;
    let text = |e: CommError| e.to_string();
    for elements in [1, 1 << 20] {
        let x = context.full(&[elements], rank, Kind::Float);
        for group in [&context.all, &group, &context.all] {
            // Nothing but the order of what is queued keeps one after the other.
            group
                .all_reduce(&x, ReduceOp::Sum)
                .and_then(crate::Work::wait)
                .map_err(text)?;
        }
        context.done(context.all.barrier())?;
        let of_pair = |first: i64| {
            if (first + 2).min(size) - first == 2 {
                2
            } else {
                1
            }
        };
        let sum = size * (size - 1) / 2;
        let expected: i64 = (0..size).map(|other| sum * of_pair(other / 2 * 2)).sum();
        expect(
            "a sum of sums of sums",
            &x.narrow(0, elements - 1, 1),
            &[expected as f64],
        )?;
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
        work.and_then(crate::Work::wait)
            .map_err(|e| e.to_string())?;
        drop(own);
        // Takes the memory where it is given away.
        let _other = context.full(&[elements], -1, Kind::Float);
        let last = all
            .view([size, elements])
            .narrow(1, elements - 1, 1)
            .contiguous();
        let expected: Vec<f64> = (0..size).map(|other| (other + round) as f64).collect();
        expect("what was gathered", &last, &expected)?;
    }
    Ok(())
}

fn repeatable(context: &TestContext) -> Verdict {
    let wave = Tensor::arange(10_000, (Kind::Double, Device::Cpu)) * (1.37 + context.rank() as f64);
    let values = wave.sin().to_kind(Kind::Float);
    let sum = || -> Result<Tensor, String> {
        let x = context.device.upload(&values.copy());
        context.done(context.all.all_reduce(&x, ReduceOp::Sum))?;
        Ok(x.to_device(Device::Cpu))
    };
    let first = sum()?;
    let second = sum()?;
    if first.equal(&second) {
        Ok(())
    } else {
        Err("two sums of the same numbers differ".into())
    }
}

fn refusals(context: &TestContext) -> Verdict {
    let rows = context.size();
    let x = context.rows(0, rows, 1, Kind::Float);
    let output = x.empty_like();
    let mut splits = vec![1; rows as usize];
    splits[0] = 2;
    match context
        .all
        .all_to_all(&output, &x, &vec![1; rows as usize], &splits)
    {
        Ok(_) => return Err("splits that do not add up were taken".into()),
        Err(error)
            if error
                .to_string()
                .contains(&format!("rank {}: all_to_all in group", context.rank())) => {}
        Err(error) => {
            return Err(format!(
                "the refusal does not name rank, call and group: {error}"
            ));
        }
    }
    let other = context.device.zeros(&[rows, 1], Kind::Double);
    match context
        .all
        .all_to_all(&other, &x, &vec![1; rows as usize], &vec![1; rows as usize])
    {
        Ok(_) => Err("two dtypes were taken".into()),
        Err(_) => Ok(()),
    }
}

fn timeout(context: &TestContext) -> Verdict {
    let size = context.size();
    if size == 1 {
        return Ok(());
    }
    let group = context
        .short_timeout_world
        .all("somebody is late")
        .map_err(|e| e.to_string())?;
    let x = context.full(&[4], 1, Kind::Float);
    context.done_in(&group, group.all_reduce(&x, ReduceOp::Sum))?;
    let gather = || {
        context.done_in(
            &group,
            group.all_gather(&context.device.zeros(&[4 * size], Kind::Float), &x),
        )
    };
    let late = size - 1;
    let mut verdict = Ok(());
    if context.rank() != late {
        let began = Instant::now();
        let error = gather().err().unwrap_or_default();
        let took = began.elapsed();
        let expected = format!(
            "call 2, all_gather in group 'somebody is late': rank {late} is missing; its last call here is 1, all_reduce"
        );
        if !error.contains(&expected) {
            verdict = Err(format!(
                "the error is {error:?} and does not say: {expected}"
            ));
        } else if took > SHORT_TIMEOUT + Duration::from_secs(3) {
            verdict = Err(format!(
                "it took {took:.1?} where the timeout is {SHORT_TIMEOUT:?}"
            ));
        }
    }
    // The late one waits until the others have given up, and then comes, so that no operation stays under way.
    context.done(context.all.barrier())?;
    if context.rank() == late {
        // Nobody has to answer.
        let _ = gather();
    }
    context.done(context.all.barrier())?;
    verdict
}

fn abort(context: &TestContext) -> Verdict {
    if context.size() == 1 {
        return Ok(());
    }
    let group = context
        .world
        .all("to be aborted")
        .map_err(|e| e.to_string())?;
    let x = context.full(&[4], 1, Kind::Float);
    // The communicator is made by all, before one of them gives up.
    context.done_in(&group, group.all_reduce(&x, ReduceOp::Sum))?;
    let sum = || context.done_in(&group, group.all_reduce(&x, ReduceOp::Sum));
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
            Ok(()) => Err("an aborted operation ended well".into()),
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
    context.done(context.all.barrier())?;
    if context.rank() != 0 {
        // So that rank 0's operation is not under way for ever; where that one has gone, this one ends the same way.
        let aborter = abort_in(1000);
        let _ = sum();
        aborter.join().map_err(|_| "the aborting thread panicked")?;
    }
    context.done(context.all.barrier())?;
    verdict
}
