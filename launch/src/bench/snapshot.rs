//! `moerun bench snapshot`: what a snapshot in memory costs, and how fast its redundancy is made.

use super::{last_json_line, median, round, train, with_temp_dir, write_tokens};
use crate::cli::SnapshotBenchArgs;
use anyhow::{Result, anyhow, bail};
use checkpoint::keeper::{DEFAULT_CHUNK_BYTES, Node, Peer, Secret, Topology, serve};
use checkpoint::{Checkpoint, ErasureCode, Redundancy, Staging, TensorSlice};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use trainer::{CopyTimer, KeeperAccess};

/// Tokens of a step of the runs.
const TOKENS: f64 = 2048.0;

pub(crate) fn run(args: &SnapshotBenchArgs) -> Result<ExitCode> {
    if args.rounds == 0 || args.mib == 0 {
        bail!("--rounds and --mib must be at least 1");
    }
    let wanted = |case: &str| args.case.is_empty() || args.case.iter().any(|other| other == case);
    let known = [
        "copy",
        "encode-4+1",
        "encode-4+2",
        "encode-8+2",
        "decode-4+2",
        "load",
        "stall",
        "every-10",
        "every-1",
    ];
    if let Some(unknown) = args
        .case
        .iter()
        .find(|case| !known.contains(&case.as_str()))
    {
        bail!("there is no case {unknown}; there are {}", known.join(", "));
    }
    if wanted("copy") {
        println!("{}", copy(args)?);
    }
    for (case, data, parity) in [
        ("encode-4+1", 4, 1),
        ("encode-4+2", 4, 2),
        ("encode-8+2", 8, 2),
    ] {
        if wanted(case) {
            println!("{}", code(args, case, data, parity, false)?);
        }
    }
    if wanted("decode-4+2") {
        println!("{}", code(args, "decode-4+2", 4, 2, true)?);
    }
    if wanted("load") {
        with_temp_dir(|folder| {
            println!("{}", load(args, folder)?);
            Ok(ExitCode::SUCCESS)
        })?;
    }
    if wanted("stall") || wanted("every-10") || wanted("every-1") {
        return with_temp_dir(|folder| runs(args, folder, &wanted));
    }
    Ok(ExitCode::SUCCESS)
}

fn line(
    case: &str,
    metric: &str,
    ours: f64,
    baseline: Option<(f64, &str)>,
    higher_is_better: bool,
) -> Value {
    let ratio = baseline.map(|(theirs, _)| {
        if higher_is_better {
            ours / theirs
        } else {
            theirs / ours
        }
    });
    json!({
        "bench": "snapshot",
        "case": case,
        "metric": metric,
        "ours": round(ours, 3),
        "baseline": baseline.map(|(theirs, _)| round(theirs, 3)),
        "baseline_name": baseline.map(|(_, name)| name),
        "ratio": ratio.map(|ratio| round(ratio, 3)),
    })
}

fn with(mut line: Value, more: Value) -> Value {
    for (key, value) in more.as_object().into_iter().flatten() {
        line[key] = value.clone();
    }
    line
}

/// A rank's copy into its keeper's memory, checksums and reports included, beside a plain copy of the same bytes.
fn copy(args: &SnapshotBenchArgs) -> Result<Value> {
    tch::set_num_threads(1);
    let secret = Secret::random().map_err(|e| anyhow!("{e}"))?;
    let socket = format!("moerun-bench/{}", secret.name());
    let settings = serve::Settings {
        socket: socket.clone(),
        secret: secret.clone(),
        listen: ([127, 0, 0, 1], 0).into(),
        memory_limit: None,
        orphan_timeout: Duration::from_secs(600),
    };
    let (ready, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        serve::run(settings, |address| {
            ready.send(address).expect("its asker waits")
        })
    });
    let address = address.recv()?;
    let mut peer =
        Peer::connect(address, &secret, Duration::from_secs(60)).map_err(|e| anyhow!("{e}"))?;
    let topology = Topology {
        generation: 1,
        nodes: vec![Node {
            address,
            ranks: vec![0],
        }],
        redundancy: Redundancy::None,
        groups: vec![vec![0]],
        chunk_bytes: DEFAULT_CHUNK_BYTES,
    };
    peer.set_up(&topology, 0).map_err(|e| anyhow!("{e}"))?;
    let access = KeeperAccess {
        socket,
        secret,
        generation: 1,
        chunk: DEFAULT_CHUNK_BYTES,
        restore: None,
    };
    let device = parallel::accelerator("cpu", 0)?;
    let mut timer = CopyTimer::new(access, device.as_ref(), args.mib)?;
    let bytes = args.mib << 20;
    let from = vec![7u8; bytes];
    let mut to = vec![1u8; bytes];
    let mut ours = Vec::new();
    let mut plain = Vec::new();
    for step in 0..=args.rounds {
        let begun = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&to);
        let memcpy = begun.elapsed().as_secs_f64();
        let seconds = timer.copy(step as u64 + 1)?;
        // The first touches memory for the first time.
        if step > 0 {
            plain.push(bytes as f64 / memcpy / 1e9);
            ours.push(bytes as f64 / seconds / 1e9);
        }
    }
    drop(timer);
    peer.stop().map_err(|e| anyhow!("{e}"))?;
    let result = line(
        "copy",
        "gb_per_s",
        median(ours),
        Some((median(plain), "memcpy")),
        true,
    );
    Ok(with(
        result,
        json!({"mib": args.mib, "rounds": args.rounds, "threads": 1}),
    ))
}

/// A checkpoint out of the page cache into tensors that are there, beside a plain copy of as many bytes.
fn load(args: &SnapshotBenchArgs, folder: &Path) -> Result<Value> {
    const NUMBERS: i64 = 4 << 20;
    let count = args.mib.div_ceil(16);
    let name = |index: usize| TensorSlice::whole(format!("tensor {index}"), &[NUMBERS]);
    let random = || Tensor::rand([NUMBERS], (Kind::Float, Device::Cpu));
    let staging = Staging::new(folder, 1);
    staging.begin()?;
    let shard =
        staging.write_shard(0, (0..count).map(|index| (name(index), random())).collect())?;
    let path = staging.commit(vec![shard], count, Value::Null)?;
    let into: Vec<Tensor> = (0..count).map(|_| random()).collect();
    let bytes = count << 24;
    let from = vec![7u8; bytes];
    let mut to = vec![1u8; bytes];
    let mut ours = Vec::new();
    let mut checked = Vec::new();
    let mut plain = Vec::new();
    for _ in 0..args.rounds {
        let rate = |begun: Instant| bytes as f64 / begun.elapsed().as_secs_f64() / 1e9;
        let begun = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&to);
        plain.push(rate(begun));
        let begun = Instant::now();
        let mut checkpoint = Checkpoint::open(&path)?;
        for (index, into) in into.iter().enumerate() {
            checkpoint.tensor_into(&name(index), into)?;
        }
        ours.push(rate(begun));
        checkpoint.verify_file(0)?;
        checked.push(rate(begun));
    }
    let result = line(
        "load",
        "gb_per_s",
        median(ours),
        Some((median(plain), "memcpy")),
        true,
    );
    let with_checksum = round(median(checked), 3);
    Ok(with(
        result,
        json!({"with_checksum": with_checksum, "mib": bytes >> 20, "rounds": args.rounds, "threads": 1}),
    ))
}

/// GB/s of data on one core, chunks of a snapshot at a time.
fn code(
    args: &SnapshotBenchArgs,
    case: &str,
    data: usize,
    parity: usize,
    decode: bool,
) -> Result<Value> {
    let code = ErasureCode::new(Redundancy::Parity { data, parity }, data, parity)
        .map_err(|e| anyhow!(e))?;
    let shard = (args.mib << 20) / data / DEFAULT_CHUNK_BYTES * DEFAULT_CHUNK_BYTES;
    if shard == 0 {
        bail!(
            "--mib {} is too little for {data} chunks of {} KiB",
            args.mib,
            DEFAULT_CHUNK_BYTES >> 10
        );
    }
    let bytes = |i: usize| {
        (0..shard)
            .map(|at| (at * 31 + i * 7 + (at >> 8)) as u8)
            .collect::<Vec<u8>>()
    };
    let chunks: Vec<Vec<u8>> = (0..data).map(bytes).collect();
    let mut parities = vec![vec![1u8; shard]; parity];
    let mut copied = vec![1u8; shard];
    let mut ours = Vec::new();
    let mut plain = Vec::new();
    for turn in 0..=args.rounds {
        let begun = Instant::now();
        for chunk in &chunks {
            copied.copy_from_slice(std::hint::black_box(chunk));
        }
        let memcpy = begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        for start in (0..shard).step_by(DEFAULT_CHUNK_BYTES) {
            let data: Vec<&[u8]> = chunks
                .iter()
                .map(|chunk| &chunk[start..start + DEFAULT_CHUNK_BYTES])
                .collect();
            if decode {
                // Two are lost: one is made out of the others and both parities.
                let (first, second) = parities.split_at_mut(1);
                let left: Vec<Option<&[u8]>> = (2..data.len())
                    .map(|i| Some(data[i]))
                    .chain([
                        Some(&first[0][start..start + DEFAULT_CHUNK_BYTES]),
                        Some(&second[0][start..start + DEFAULT_CHUNK_BYTES]),
                    ])
                    .collect();
                let shards: Vec<Option<&[u8]>> = [None, None].into_iter().chain(left).collect();
                code.rebuild(&shards, 0, &mut copied[start..start + DEFAULT_CHUNK_BYTES])
                    .map_err(|e| anyhow!(e))?;
            } else {
                let mut out: Vec<&mut [u8]> = parities
                    .iter_mut()
                    .map(|p| &mut p[start..start + DEFAULT_CHUNK_BYTES])
                    .collect();
                code.encode(&data, &mut out);
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        if turn > 0 {
            ours.push((shard * data) as f64 / seconds / 1e9);
            plain.push((shard * data) as f64 / memcpy / 1e9);
        }
    }
    let result = line(
        case,
        "gb_per_s",
        median(ours),
        Some((median(plain), "memcpy")),
        true,
    );
    Ok(with(
        result,
        json!({"mib": args.mib, "chunk_kib": DEFAULT_CHUNK_BYTES >> 10, "rounds": args.rounds, "threads": 1}),
    ))
}

/// A model whose parameters and moments are about as large as asked for.
fn config(folder: &Path, mib: usize, every: u64, steps: u64) -> Value {
    // 12 bytes of state a parameter; embedding and output 5.2 million, a layer 3.4 million.
    let layers = ((mib as f64 * 1048576.0 / 12.0 - 5.24e6) / 3.42e6)
        .round()
        .max(1.0);
    json!({
        "run": {"dir": folder.join("run"), "device": "cpu"},
        "model": {
            "vocab_size": 10240, "hidden": 256, "layers": layers as u64, "heads": 8, "kv_heads": 4,
            "moe": {"experts": 8, "top_k": 2, "ffn": 512},
        },
        "data": {"train": [{"path": folder.join("tokens")}], "sequence_length": 256},
        "train": {"steps": steps, "global_batch": 8, "micro_batch": 8},
        "schedule": {"constant": {"lr": 1e-3}},
        "checkpoint": {"every": 0},
        "snapshot": {"every": every},
        "restart": {"standby": false},
    })
}

fn runs(
    args: &SnapshotBenchArgs,
    folder: &Path,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<ExitCode> {
    write_tokens(folder, 10240)?;
    let mut stalls = Vec::new();
    let mut copies = Vec::new();
    let mut bytes = 0.0f64;
    let mut baseline = Vec::new();
    // Milliseconds of steps beside which a snapshot is copied, of the others, and of a run without keepers.
    let mut copying = Vec::new();
    let mut plain = Vec::new();
    let mut without = Vec::new();
    for turn in 1..=args.rounds {
        eprintln!("snapshots in a run: round {turn} of {}", args.rounds);
        // One after every second step, so that both kinds of steps meet the same machine. The first steps are slow.
        let steps = train(
            folder,
            &config(folder, args.mib, 2, 25),
            1,
            Some(args.threads),
        )?
        .split_off(4);
        for pair in steps.windows(2) {
            let after = pair[1]["step_ms"].as_f64().unwrap_or_default();
            let figure = |key: &str| pair[0]["snapshot"][key].as_f64();
            match (figure("stall_ms"), figure("copy_ms")) {
                (Some(stall), Some(copy)) => {
                    copying.push(after);
                    stalls.push(stall);
                    copies.push(copy);
                    bytes = figure("bytes").unwrap_or(bytes);
                }
                _ => plain.push(after),
            }
        }
        let steps = train(
            folder,
            &config(folder, args.mib, 0, 14),
            1,
            Some(args.threads),
        )?
        .split_off(4);
        without.extend(steps.iter().filter_map(|step| step["step_ms"].as_f64()));
        if let Some(text) = &args.baseline {
            let mut command = Command::new("sh");
            command.args(["-c", &text.replace("{mib}", &args.mib.to_string())]);
            baseline.push(
                last_json_line(command, text, "stall_ms")?["stall_ms"]
                    .as_f64()
                    .unwrap_or(f64::NAN),
            );
        }
    }
    let more = |line: Value| {
        let sizes = json!({"mib": round(bytes / 1048576.0, 1), "rounds": args.rounds, "threads": args.threads});
        with(line, sizes)
    };
    if wanted("stall") {
        let theirs = args
            .baseline
            .as_deref()
            .map(|name| (median(baseline), name));
        let line = line("stall", "stall_ms", median(stalls.clone()), theirs, false);
        println!(
            "{}",
            with(
                more(line),
                json!({"copy_ms": round(median(copies), 2), "snapshots": stalls.len()})
            )
        );
    }
    let copying = median(copying);
    let plain = median(plain);
    let without = median(without);
    for (case, every) in [("every-10", 10.0), ("every-1", 1.0)] {
        if wanted(case) {
            let rate = |step_ms: f64| TOKENS / step_ms * 1e3;
            let mixed = ((every - 1.0) * plain + copying) / every;
            let line = line(
                case,
                "tokens_per_s",
                rate(mixed),
                Some((rate(plain), "steps without a snapshot")),
                true,
            );
            println!(
                "{}",
                with(
                    more(line),
                    json!({"without_keepers": round(rate(without), 1)})
                )
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
