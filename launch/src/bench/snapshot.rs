//! `moerun bench snapshot`: costs of snapshots in memory, and rates of copying and erasure coding.

use super::{
    figures::{median, round},
    runner::{baseline_line, train, with_temp_dir, write_tokens},
};
use crate::{cli::SnapshotBenchArgs, hint::hinted, machine_memory::refuse_bytes};
use anyhow::{Result, anyhow, bail};
use checkpoint::{
    Checkpoint, ErasureCode, Redundancy, Staging, TensorSlice,
    keeper::{DEFAULT_CHUNK_BYTES, Node, Peer, Secret, Topology, serve},
};
use serde_json::{Value, json};
use std::{
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};
use tch::{Device, Kind, Tensor};
use trainer::{CopyTimer, KeeperAccess};

/// Tokens per step of the runs.
const TOKENS: f64 = 2048.0;

const CASES: [&str; 9] = [
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

pub(crate) fn run(args: &SnapshotBenchArgs) -> Result<ExitCode> {
    refuse_bytes("bench snapshot", (args.mib as u128) << 21)?;
    let wanted = |case: &str| args.case.is_empty() || args.case.iter().any(|other| other == case);
    let is_known = |case: &&String| CASES.contains(&case.as_str());
    if let Some(unknown) = args.case.iter().find(|case| !is_known(case)) {
        return Err(hinted(
            anyhow!("--case {unknown}: no such case"),
            format!("use {}", CASES.join(", ")),
        ));
    }
    if wanted("copy") {
        println!("{}", copy(args)?);
    }
    for (case, data, parity) in [
        ("encode-4+1", 4, 1),
        ("encode-4+2", 4, 2),
        ("encode-8+2", 8, 2),
        ("decode-4+2", 4, 2),
    ] {
        if wanted(case) {
            println!("{}", erasure_code(args, case, data, parity)?);
        }
    }
    if wanted("load") {
        println!("{}", with_temp_dir(|folder| load(args, folder))?);
    }
    if wanted("stall") || wanted("every-10") || wanted("every-1") {
        let measured = with_temp_dir(|folder| runs(args, folder))?;
        for line in measured.lines(args) {
            if wanted(line["case"].as_str().unwrap_or_default()) {
                println!("{line}");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One figure and the baseline's.
struct Comparison<'a> {
    case: &'a str,
    metric: &'a str,
    ours: f64,
    baseline: Option<f64>,
    baseline_name: Option<&'a str>,
}

impl Comparison<'_> {
    /// A rate in GB/s, compared with a plain copy of the same bytes.
    fn with_memcpy(case: &str, ours: Vec<f64>, memcpy: Vec<f64>) -> Comparison<'_> {
        Comparison {
            case,
            metric: "gb_per_s",
            ours: median(ours),
            baseline: Some(median(memcpy)),
            baseline_name: Some("memcpy"),
        }
    }

    /// Returns the line, whose ratio is above 1 if ours is better.
    fn line(&self) -> Value {
        let lower_is_better = self.metric.ends_with("_ms");
        let ratio = self.baseline.map(|baseline| {
            if lower_is_better {
                baseline / self.ours
            } else {
                self.ours / baseline
            }
        });
        json!({
            "bench": "snapshot",
            "case": self.case,
            "metric": self.metric,
            "ours": round(self.ours, 3),
            "baseline": self.baseline.map(|baseline| round(baseline, 3)),
            "baseline_name": self.baseline_name,
            "ratio": ratio.map(|ratio| round(ratio, 3)),
        })
    }
}

fn with(mut line: Value, more: Value) -> Value {
    for (key, value) in more.as_object().into_iter().flatten() {
        line[key] = value.clone();
    }
    line
}

/// Measures a rank's copy into its keeper's memory, with checksums and reports, against a plain
/// copy of the same bytes.
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
            ready.send(address).expect("the bench waits for it");
            Ok(())
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
        // The first round touches memory for the first time.
        if step > 0 {
            plain.push(bytes as f64 / memcpy / 1e9);
            ours.push(bytes as f64 / seconds / 1e9);
        }
    }
    drop(timer);
    peer.stop().map_err(|e| anyhow!("{e}"))?;
    Ok(with(
        Comparison::with_memcpy("copy", ours, plain).line(),
        json!({"mib": args.mib, "rounds": args.rounds, "threads": 1}),
    ))
}

/// Measures reading a checkpoint from the page cache into existing tensors, against a plain copy of
/// the same bytes.
fn load(args: &SnapshotBenchArgs, folder: &Path) -> Result<Value> {
    const VALUES_PER_TENSOR: i64 = 4 << 20;
    let count = args.mib.div_ceil(16);
    let name = |index: usize| TensorSlice::whole(format!("tensor {index}"), &[VALUES_PER_TENSOR]);
    let random = || Tensor::rand([VALUES_PER_TENSOR], (Kind::Float, Device::Cpu));
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
    let with_checksum = round(median(checked), 3);
    let mib = bytes >> 20;
    Ok(with(
        Comparison::with_memcpy("load", ours, plain).line(),
        json!({
            "with_checksum": with_checksum, "mib": mib, "rounds": args.rounds, "threads": 1,
        }),
    ))
}

/// Bytes that begin at a cache line. Where the allocator put them would change rates by a fifth.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    const CACHE_LINE: usize = 64;

    fn new(len: usize, byte: impl Fn(usize) -> u8) -> Aligned {
        let memory = vec![0; len + Aligned::CACHE_LINE];
        let start = memory.as_ptr().align_offset(Aligned::CACHE_LINE);
        let mut aligned = Aligned { memory, start, len };
        for (at, value) in aligned.bytes_mut().iter_mut().enumerate() {
            *value = byte(at);
        }
        aligned
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..][..self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.len]
    }
}

/// Measures encoding, or rebuilding one of two lost chunks, in GB/s of data on one core.
fn erasure_code(args: &SnapshotBenchArgs, case: &str, data: usize, parity: usize) -> Result<Value> {
    let code = ErasureCode::new(Redundancy::Parity { data, parity }, data, parity)
        .map_err(|error| anyhow!(error))?;
    let shard = (args.mib << 20) / data / DEFAULT_CHUNK_BYTES * DEFAULT_CHUNK_BYTES;
    if shard == 0 {
        let kib = DEFAULT_CHUNK_BYTES >> 10;
        let mib = args.mib;
        bail!("--mib {mib}: too little for {data} chunks of {kib} KiB");
    }
    let is_decode = case.starts_with("decode");
    let bytes = |i: usize| Aligned::new(shard, |at| (at * 31 + i * 7 + (at >> 8)) as u8);
    let ones = || Aligned::new(shard, |_| 1);
    let chunks: Vec<Aligned> = (0..data).map(bytes).collect();
    let mut parities: Vec<Aligned> = (0..parity).map(|_| ones()).collect();
    let mut copied = ones();
    let mut ours = Vec::new();
    let mut plain = Vec::new();
    for round in 0..=args.rounds {
        let begun = Instant::now();
        for chunk in &chunks {
            copied
                .bytes_mut()
                .copy_from_slice(std::hint::black_box(chunk.bytes()));
        }
        let memcpy = begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        for start in (0..shard).step_by(DEFAULT_CHUNK_BYTES) {
            let range = start..start + DEFAULT_CHUNK_BYTES;
            if is_decode {
                // The first two are lost. The first is rebuilt from the others and the parities.
                let lost = [None, None].into_iter();
                let kept = chunks[2..].iter().chain(&parities);
                let shards: Vec<Option<&[u8]>> = lost
                    .chain(kept.map(|shard| Some(&shard.bytes()[range.clone()])))
                    .collect();
                code.rebuild(&shards, 0, &mut copied.bytes_mut()[range])
                    .map_err(|error| anyhow!(error))?;
            } else {
                let data: Vec<&[u8]> = chunks
                    .iter()
                    .map(|chunk| &chunk.bytes()[range.clone()])
                    .collect();
                let mut out: Vec<&mut [u8]> = parities
                    .iter_mut()
                    .map(|parity| &mut parity.bytes_mut()[range.clone()])
                    .collect();
                code.encode(&data, &mut out);
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        if round > 0 {
            ours.push((shard * data) as f64 / seconds / 1e9);
            plain.push((shard * data) as f64 / memcpy / 1e9);
        }
    }
    let chunk_kib = DEFAULT_CHUNK_BYTES >> 10;
    Ok(with(
        Comparison::with_memcpy(case, ours, plain).line(),
        json!({
            "mib": args.mib, "chunk_kib": chunk_kib, "rounds": args.rounds, "threads": 1,
        }),
    ))
}

/// Returns an experiment whose parameters and moments take about `mib` MiB.
fn config(folder: &Path, mib: usize, every: u64, steps: u64) -> Value {
    // 12 bytes of state per parameter; embedding and output have 5.2 million, a layer 3.4 million.
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

/// Measurements of runs with and without snapshots.
#[derive(Default)]
struct RunTimes {
    stall_ms: Vec<f64>,
    copy_ms: Vec<f64>,
    snapshot_bytes: f64,
    baseline_stall_ms: Vec<f64>,
    /// Steps during which a snapshot is copied.
    copying_step_ms: Vec<f64>,
    /// Steps of the same runs without a copy.
    plain_step_ms: Vec<f64>,
    /// Steps of runs without keepers.
    keeperless_step_ms: Vec<f64>,
}

fn runs(args: &SnapshotBenchArgs, folder: &Path) -> Result<RunTimes> {
    write_tokens(folder, 10240)?;
    let mut measured = RunTimes::default();
    // The first steps are slow.
    let steps_after_start = |config: Value| -> Result<Vec<Value>> {
        Ok(train(folder, &config, 1, Some(args.threads))?.split_off(4))
    };
    for round in 1..=args.rounds {
        eprintln!("snapshots in a run: round {round} of {}", args.rounds);
        // One snapshot after every second step, so that both kinds of steps meet the same machine.
        let steps = steps_after_start(config(folder, args.mib, 2, 25))?;
        measured.add_steps_with_snapshots(&steps);
        let steps = steps_after_start(config(folder, args.mib, 0, 14))?;
        let times = steps.iter().filter_map(|step| step["step_ms"].as_f64());
        measured.keeperless_step_ms.extend(times);
        if let Some(text) = &args.baseline {
            let command = text.replace("{mib}", &args.mib.to_string());
            let line = baseline_line(&command, "stall_ms")?;
            let stall = line["stall_ms"].as_f64().unwrap_or(f64::NAN);
            measured.baseline_stall_ms.push(stall);
        }
    }
    Ok(measured)
}

impl RunTimes {
    fn add_steps_with_snapshots(&mut self, steps: &[Value]) {
        for pair in steps.windows(2) {
            let step_after = pair[1]["step_ms"].as_f64().unwrap_or_default();
            let figure = |key: &str| pair[0]["snapshot"][key].as_f64();
            match (figure("stall_ms"), figure("copy_ms")) {
                (Some(stall), Some(copy)) => {
                    self.copying_step_ms.push(step_after);
                    self.stall_ms.push(stall);
                    self.copy_ms.push(copy);
                    self.snapshot_bytes = figure("bytes").unwrap_or(self.snapshot_bytes);
                }
                _ => self.plain_step_ms.push(step_after),
            }
        }
    }

    fn lines(self, args: &SnapshotBenchArgs) -> Vec<Value> {
        let sizes = json!({
            "mib": round(self.snapshot_bytes / 1048576.0, 1),
            "rounds": args.rounds,
            "threads": args.threads,
        });
        let snapshots = self.stall_ms.len();
        let has_baseline = args.baseline.is_some();
        let stall = Comparison {
            case: "stall",
            metric: "stall_ms",
            ours: median(self.stall_ms),
            baseline: has_baseline.then(|| median(self.baseline_stall_ms)),
            baseline_name: args.baseline.as_deref(),
        };
        let copy_ms = round(median(self.copy_ms), 2);
        let mut lines = vec![with(
            with(stall.line(), sizes.clone()),
            json!({"copy_ms": copy_ms, "snapshots": snapshots}),
        )];
        let copying = median(self.copying_step_ms);
        let plain = median(self.plain_step_ms);
        let keeperless = median(self.keeperless_step_ms);
        let tokens_per_s = |step_ms: f64| TOKENS / step_ms * 1e3;
        for (case, every) in [("every-10", 10.0), ("every-1", 1.0)] {
            let mixed = ((every - 1.0) * plain + copying) / every;
            let rate = Comparison {
                case,
                metric: "tokens_per_s",
                ours: tokens_per_s(mixed),
                baseline: Some(tokens_per_s(plain)),
                baseline_name: Some("steps without a snapshot"),
            };
            let without_keepers = round(tokens_per_s(keeperless), 1);
            lines.push(with(
                with(rate.line(), sizes.clone()),
                json!({"without_keepers": without_keepers}),
            ));
        }
        lines
    }
}
