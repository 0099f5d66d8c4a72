//! What every communicator has to do.

use super::{Outcome, Verdict, expect};
use crate::{Accelerator, Backend, CommError, Communicator, RankEnv, ReduceOp, World};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// No operation takes longer, but for those that are to.
const PATIENCE: Duration = Duration::from_secs(60);
/// The timeout that is tried.
const SHORT: Duration = Duration::from_secs(4);

type Shared = Arc<dyn Communicator>;

/// What the cases have.
struct Bench<'a> {
    world: &'a World,
    /// The same ranks with a timeout of [`SHORT`].
    hasty: &'a World,
    all: Shared,
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
    let world = World::join(env, PATIENCE, backend, device)?;
    let hasty = World::join(&env.again(1), SHORT, backend, device)?;
    let everyone: Vec<usize> = (0..world.size()).collect();
    let bench = Bench {
        world: &world,
        hasty: &hasty,
        all: world.chain("conformance", &everyone)?,
        device,
    };
    type Case = fn(&Bench) -> Verdict;
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
            side_by_side,
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
        problem: case(&bench).err(),
    });
    // Nobody leaves while others may still need it.
    bench.all.barrier()?.wait()?;
    Ok(outcomes.to_vec())
}

impl Bench<'_> {
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

    fn done_in(&self, group: &Shared, work: Result<crate::Work, CommError>) -> Verdict {
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

fn all_reduce(bench: &Bench) -> Verdict {
    let rank = bench.rank();
    let size = bench.size();
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
                let x = bench.full(shape, rank + 1, kind);
                bench.done(bench.all.all_reduce(&x, op))?;
                let expected = vec![result as f64; x.numel()];
                expect(&format!("{op:?} of {kind:?} {shape:?}"), &x, &expected)?;
            }
        }
    }
    // Large enough for every library's ways with large messages.
    let x = bench.full(&[3 << 20], rank, Kind::Float);
    bench.done(bench.all.all_reduce(&x, ReduceOp::Sum))?;
    expect(
        "a sum of 12 MiB",
        &x.narrow(0, (3 << 20) - 2, 2),
        &[(size * (size - 1) / 2) as f64; 2],
    )
}

fn broadcast(bench: &Bench) -> Verdict {
    for root in 0..bench.size() {
        for kind in KINDS.into_iter().chain([Kind::Uint8, Kind::Bool]) {
            let value = if kind == Kind::Bool {
                i64::from(bench.rank() == root)
            } else {
                bench.rank() + 3
            };
            let x = bench.full(&[2, 3], value, kind);
            bench.done(bench.all.broadcast(&x, root as usize))?;
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

fn gather_and_scatter(bench: &Bench) -> Verdict {
    let rank = bench.rank();
    let size = bench.size();
    for kind in KINDS {
        for rows in [0, 1, 3] {
            let own = bench.rows(rank * rows * 2, rows, 2, kind);
            let all = bench.device.zeros(&[size * rows, 2], kind);
            bench.done(bench.all.all_gather(&all, &own))?;
            let expected: Vec<f64> = (0..size * rows * 2).map(|n| n as f64).collect();
            expect(&format!("gathered {kind:?}"), &all, &expected)?;
            for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min] {
                let part = bench.device.zeros(&[rows, 2], kind);
                bench.done(bench.all.reduce_scatter(&part, &all, op))?;
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

fn all_to_all(bench: &Bench) -> Verdict {
    let rank = bench.rank();
    let size = bench.size();
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
                let input = bench.device.upload(&input);
                let output = bench
                    .device
                    .zeros(&[receive.iter().sum::<i64>(), width], kind);
                bench.done(bench.all.all_to_all(&output, &input, &receive, &send))?;
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

fn point_to_point(bench: &Bench) -> Verdict {
    let rank = bench.rank();
    let size = bench.size();
    if size == 1 {
        return Ok(());
    }
    let next = ((rank + 1) % size) as usize;
    let previous = ((rank + size - 1) % size) as usize;
    for elements in [0, 1, 1000, 1 << 18] {
        // Received before they are sent, three under way, two of one tag.
        let tags = [7, 7, 3];
        let messages: Vec<Tensor> = (0..3)
            .map(|n| bench.full(&[elements], rank * 10 + n, Kind::Float))
            .collect();
        let buffers: Vec<Tensor> = (0..3)
            .map(|_| bench.device.zeros(&[elements], Kind::Float))
            .collect();
        let mut works = Vec::new();
        for (buffer, tag) in buffers.iter().zip(tags) {
            works.push(bench.all.recv(buffer, previous, tag));
        }
        for (message, tag) in messages.iter().zip(tags) {
            works.push(bench.all.send(message, next, tag));
        }
        works.into_iter().try_for_each(|work| bench.done(work))?;
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

fn exchange(bench: &Bench) -> Verdict {
    let rank = bench.rank();
    let size = bench.size();
    let others: Vec<i64> = (0..size).filter(|&other| other != rank).collect();
    // As many elements as the sum of both ranks: each pair has a size of its own.
    let sends: Vec<Tensor> = others
        .iter()
        .map(|other| bench.full(&[rank + other], rank * 10 + other, Kind::Float))
        .collect();
    let receives: Vec<Tensor> = others
        .iter()
        .map(|other| bench.device.zeros(&[rank + other], Kind::Float))
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
    bench.done(bench.all.exchange(&out, &inp, 11))?;
    for (tensor, other) in receives.iter().zip(&others) {
        let expected = vec![(other * 10 + rank) as f64; (rank + other) as usize];
        expect(&format!("from rank {other}"), tensor, &expected)?;
    }
    Ok(())
}

fn side_by_side(bench: &Bench) -> Verdict {
    let rank = bench.rank();
    let size = bench.size();
    let tensors: Vec<Tensor> = (0..6)
        .map(|n| bench.full(&[1 << (2 * n)], rank + n, Kind::Float))
        .collect();
    let works: Vec<_> = tensors
        .iter()
        .map(|x| bench.all.all_reduce(x, ReduceOp::Sum))
        .collect();
    works
        .into_iter()
        .rev()
        .try_for_each(|work| bench.done(work))?;
    for (n, x) in tensors.iter().enumerate() {
        let sum = size * (size - 1) / 2 + size * n as i64;
        expect("one of several sums", x, &vec![sum as f64; x.numel()])?;
    }
    Ok(())
}

fn groups(bench: &Bench) -> Verdict {
    let rank = bench.rank();
    let size = bench.size();
    // Even and odd ranks; and each with its neighbour, in the opposite order of making.
    let members: Vec<usize> = (0..size)
        .filter(|other| other % 2 == rank % 2)
        .map(|other| other as usize)
        .collect();
    let pair: Vec<usize> = (rank / 2 * 2..(rank / 2 * 2 + 2).min(size))
        .map(|other| other as usize)
        .collect();
    let make =
        |name: &str, members: &[usize]| bench.world.group(name, members).map_err(|e| e.to_string());
    let half = make("every second", &members)?;
    let pair_group = make("neighbours", &pair)?;
    let x = bench.full(&[4], rank, Kind::Int64);
    let y = bench.full(&[4], rank, Kind::Int64);
    let first = half.all_reduce(&x, ReduceOp::Sum);
    let second = pair_group.all_reduce(&y, ReduceOp::Sum);
    bench.done(second)?;
    bench.done(first)?;
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

fn chained(bench: &Bench) -> Verdict {
    let rank = bench.rank();
    let size = bench.size();
    let pair: Vec<usize> = (rank / 2 * 2..(rank / 2 * 2 + 2).min(size))
        .map(|other| other as usize)
        .collect();
    let group = bench
        .world
        .group("takers", &pair)
        .map_err(|e| e.to_string())?;
    let text = |e: CommError| e.to_string();
    for elements in [1, 1 << 20] {
        let x = bench.full(&[elements], rank, Kind::Float);
        for group in [&bench.all, &group, &bench.all] {
            // Nothing but the order of what is queued keeps one after the other.
            group
                .all_reduce(&x, ReduceOp::Sum)
                .and_then(crate::Work::wait)
                .map_err(text)?;
        }
        bench.done(bench.all.barrier())?;
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

fn dropped(bench: &Bench) -> Verdict {
    let rank = bench.rank();
    let size = bench.size();
    let elements = 1 << 18;
    for round in 0..4 {
        let all = bench.device.empty(&[elements * size], Kind::Float);
        let own = bench.full(&[elements], rank + round, Kind::Float);
        let work = bench.all.all_gather(&all, &own);
        work.and_then(crate::Work::wait)
            .map_err(|e| e.to_string())?;
        drop(own);
        // Takes the memory where it is given away.
        let _other = bench.full(&[elements], -1, Kind::Float);
        let last = all
            .view([size, elements])
            .narrow(1, elements - 1, 1)
            .contiguous();
        let expected: Vec<f64> = (0..size).map(|other| (other + round) as f64).collect();
        expect("what was gathered", &last, &expected)?;
    }
    Ok(())
}

fn repeatable(bench: &Bench) -> Verdict {
    let wave = Tensor::arange(10_000, (Kind::Double, Device::Cpu)) * (1.37 + bench.rank() as f64);
    let values = wave.sin().to_kind(Kind::Float);
    let sum = || -> Result<Tensor, String> {
        let x = bench.device.upload(&values.copy());
        bench.done(bench.all.all_reduce(&x, ReduceOp::Sum))?;
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

fn refusals(bench: &Bench) -> Verdict {
    let rows = bench.size();
    let x = bench.rows(0, rows, 1, Kind::Float);
    let output = x.empty_like();
    let mut splits = vec![1; rows as usize];
    splits[0] = 2;
    match bench
        .all
        .all_to_all(&output, &x, &vec![1; rows as usize], &splits)
    {
        Ok(_) => return Err("splits that do not add up were taken".into()),
        Err(error)
            if error
                .to_string()
                .contains(&format!("rank {}: all_to_all in group", bench.rank())) => {}
        Err(error) => {
            return Err(format!(
                "the refusal does not name rank, call and group: {error}"
            ));
        }
    }
    let other = bench.device.zeros(&[rows, 1], Kind::Double);
    match bench
        .all
        .all_to_all(&other, &x, &vec![1; rows as usize], &vec![1; rows as usize])
    {
        Ok(_) => Err("two dtypes were taken".into()),
        Err(_) => Ok(()),
    }
}

fn timeout(bench: &Bench) -> Verdict {
    let size = bench.size();
    if size == 1 {
        return Ok(());
    }
    let group = bench
        .hasty
        .all("somebody is late")
        .map_err(|e| e.to_string())?;
    let x = bench.full(&[4], 1, Kind::Float);
    bench.done_in(&group, group.all_reduce(&x, ReduceOp::Sum))?;
    let gather = || {
        bench.done_in(
            &group,
            group.all_gather(&bench.device.zeros(&[4 * size], Kind::Float), &x),
        )
    };
    let late = size - 1;
    let mut verdict = Ok(());
    if bench.rank() != late {
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
        } else if took > SHORT + Duration::from_secs(3) {
            verdict = Err(format!("it took {took:.1?} where the timeout is {SHORT:?}"));
        }
    }
    // The late one waits until the others have given up, and then comes, so that no operation stays under way.
    bench.done(bench.all.barrier())?;
    if bench.rank() == late {
        // Nobody has to answer.
        let _ = gather();
    }
    bench.done(bench.all.barrier())?;
    verdict
}

fn abort(bench: &Bench) -> Verdict {
    if bench.size() == 1 {
        return Ok(());
    }
    let group = bench
        .world
        .all("to be aborted")
        .map_err(|e| e.to_string())?;
    let x = bench.full(&[4], 1, Kind::Float);
    // The communicator is made by all, before one of them gives up.
    bench.done_in(&group, group.all_reduce(&x, ReduceOp::Sum))?;
    let sum = || bench.done_in(&group, group.all_reduce(&x, ReduceOp::Sum));
    let abort_in = |pause: u64| {
        let other = group.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(pause));
            other.abort();
        })
    };
    let mut verdict = Ok(());
    if bench.rank() == 0 {
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
    bench.done(bench.all.barrier())?;
    if bench.rank() != 0 {
        // So that rank 0's operation is not under way for ever; where that one has gone, this one ends the same way.
        let aborter = abort_in(1000);
        let _ = sum();
        aborter.join().map_err(|_| "the aborting thread panicked")?;
    }
    bench.done(bench.all.barrier())?;
    verdict
}
