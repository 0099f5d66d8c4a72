//! Ranks with Ascend NPUs, tested without one: `tests/ascend` implements the interfaces of CANN and
//! torch_npu in host memory.

use crate::fixture::{
    COMMAND_TIMEOUT, Experiment, assert_close, assert_stopped_rank_is_named, curve, finish,
    free_port, ranks, start, text,
};
use serde_json::Value;
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

/// Returns the folder of the stand-in libraries, built once per version of their sources.
fn libraries() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/ascend");
        let mut hasher = DefaultHasher::new();
        for name in ["build.sh", "acl.h", "acl.cpp", "hccl.cpp", "torch_npu.cpp"] {
            std::fs::read(sources.join(name)).unwrap().hash(&mut hasher);
        }
        let folder =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ascend-{:016x}", hasher.finish()));
        if !folder.exists() {
            let include =
                std::env::var("MOERUN_TORCH_INCLUDE").expect("cargo sets it: see ./scripts/setup");
            let unfinished = folder.with_extension(std::process::id().to_string());
            let built = Command::new(sources.join("build.sh"))
                .arg(include)
                .arg(&unfinished)
                .output()
                .unwrap();
            assert!(built.status.success(), "{}", text(&built));
            std::fs::rename(&unfinished, &folder).unwrap();
        }
        folder
    })
}

/// Sets the environment of `command` so that it loads the stand-in.
fn with_npus(command: &mut Command) -> &mut Command {
    // These processes use Gloo twice, as itself and as HCCL. c10d's flight recorder cannot do that.
    command
        .env("MOERUN_ASCEND_LIB", libraries())
        .env("TORCH_FR_BUFFER_SIZE", "0")
}

#[test]
fn hccl_conforms() {
    let experiment = Experiment::new();
    for ranks in ["1", "2", "3", "4", "8"] {
        let args = [
            "conformance",
            "--device",
            "npu",
            "--backend",
            "hccl",
            "-n",
            ranks,
        ];
        let output = finish(with_npus(&mut experiment.moerun(&args)));
        assert!(output.status.success(), "{ranks} ranks: {}", text(&output));
        assert_eq!(
            text(&output).matches("ok ").count(),
            20,
            "{}",
            text(&output)
        );
    }
}

#[test]
fn npus_train_as_processors_do() {
    let experiment = Experiment::new();
    let layouts: [&[&str]; 5] = [
        &["parallel.zero=2"],
        &[
            "parallel.pipeline=2",
            "parallel.expert=1",
            "parallel.tensor=2",
        ],
        &[
            "parallel.pipeline=2",
            "parallel.vocabulary=vocab-2",
            "train.micro_batch=1",
        ],
        &[
            "parallel.context=2",
            "parallel.expert=4",
            "model.moe.dispatch=least_loaded",
        ],
        &[
            "parallel.expert=4",
            "model.moe.dispatch=least_loaded",
            "model.moe.least_loaded.threshold=1",
            "model.moe.least_loaded.min_tokens=1",
        ],
    ];
    for layout in layouts {
        let run = |dir: &str, device: &str| {
            let set = [format!("run.dir={dir}"), format!("run.device={device}")];
            let mut command = experiment.train(4, &["train.steps=5"]);
            for change in layout.iter().map(|change| change.to_string()).chain(set) {
                command.args(["--set", &change]);
            }
            let output = finish(with_npus(&mut command));
            assert!(
                output.status.success(),
                "{layout:?} on {device}: {}",
                text(&output)
            );
            let curve = curve(&experiment, dir);
            std::fs::remove_dir_all(experiment.path(dir)).unwrap();
            curve
        };
        let npu = run("npu", "npu");
        assert_close(&run("cpu", "cpu"), &npu, 1e-5);
        assert_eq!(npu, run("npu", "npu"), "{layout:?}: the same layout twice");
    }
}

/// Returns the peak device memory of tensors on the most loaded rank, in bytes.
fn peak_memory(experiment: &Experiment, run: &str) -> u64 {
    let lines = std::fs::read_to_string(experiment.path(run).join("metrics.jsonl")).unwrap();
    let steps = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let peak = |step: Value| {
        let peak = &step["rank_distributions"]["peak_memory"]["largest"];
        peak.as_f64().map(|bytes| bytes as u64)
    };
    steps.filter_map(peak).max().unwrap()
}

#[test]
fn an_optimizers_state_on_the_host_changes_nothing_but_memory() {
    let experiment = Experiment::new();
    let train = |changes: &[&str]| {
        let output = finish(with_npus(
            experiment
                .train(4, changes)
                .args(["--set", "run.device=npu"]),
        ));
        assert!(output.status.success(), "{changes:?}: {}", text(&output));
        text(&output)
    };
    for (number, (layout, bytes, tolerance)) in [
        (
            [
                "parallel.zero=0",
                "train.dtype=fp32",
                "model.moe={experts: 8, top_k: 2, ffn: 32, placement: {every: 1, min_gain: 0}}",
            ],
            8,
            1e-5,
        ),
        (
            ["parallel.zero=3", "train.dtype=fp32", "parallel.tensor=2"],
            8,
            1e-5,
        ),
        (
            ["parallel.zero=1", "train.dtype=bf16", "parallel.expert=4"],
            12,
            1e-3,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let folders = ["device", "host", "resumed"].map(|name| format!("{name}{number}"));
        let [device, host, resumed] = folders.each_ref().map(|name| format!("run.dir={name}"));
        let run = |changes: &[&str]| {
            train(
                &[
                    &layout[..],
                    &["snapshot.every=5", "validation.every=5"],
                    changes,
                ]
                .concat(),
            )
        };
        run(&["train.steps=10", &device]);
        let said = run(&["train.steps=10", &host, "optimizer.offload=true"]);
        assert!(said.contains("optimizer state in host memory"), "{said}");
        // A run resumes if its first half kept the optimizer state elsewhere.
        let begun = if number == 1 {
            "optimizer.offload=false"
        } else {
            "optimizer.offload=true"
        };
        run(&["train.steps=5", &resumed, begun]);
        let said = run(&["train.steps=10", &resumed, "optimizer.offload=true"]);
        assert!(
            said.contains("resuming from the checkpoint of step 5"),
            "{said}"
        );
        let [device, host, resumed] = folders;
        assert_close(
            &curve(&experiment, &device),
            &curve(&experiment, &host),
            tolerance,
        );
        assert_close(
            &curve(&experiment, &host),
            &curve(&experiment, &resumed),
            if number == 1 { 1e-5 } else { 0.0 },
        );
        let moved = curve(&experiment, &host)
            .iter()
            .filter_map(|step| step["moved_experts"].as_u64())
            .sum::<u64>();
        assert_eq!(moved > 0, number == 0, "{layout:?}: {moved} experts moved");
        let mut plan = experiment.moerun(&["plan", "mesh", "small.yaml", "-n", "4"]);
        for change in layout
            .iter()
            .chain(&["run.device=npu", "optimizer.offload=true"])
        {
            plan.args(["--set", change]);
        }
        let plan = text(&finish(&mut plan));
        let kept = plan
            .lines()
            .skip(3)
            .take_while(|line| !line.is_empty())
            .filter_map(|line| line.split_whitespace().rev().nth(7)?.parse::<u64>().ok());
        let kept = kept.min().unwrap();
        let saved = peak_memory(&experiment, &device) - peak_memory(&experiment, &host);
        assert!(
            saved * 100 >= kept * bytes * 95,
            "{layout:?}: {saved} bytes saved of {kept} parameters"
        );
        assert!(
            plan.contains("With optimizer.offload, optimizer state"),
            "{plan}"
        );
    }
}

#[test]
fn what_an_optimizers_state_on_the_host_saves_is_measured() {
    let experiment = Experiment::new();
    let bench = |more: &[&str]| {
        let args = [
            "bench",
            "recompute",
            "small.yaml",
            "-n",
            "2",
            "--rounds",
            "1",
            "--steps",
            "4",
        ];
        let mut bench = experiment.moerun(&args);
        bench
            .args(["--set", "run.device=npu", "--set", "train.micro_batch=4"])
            .args(more);
        let output = finish(with_npus(&mut bench));
        assert!(output.status.success(), "{}", text(&output));
        let lines = String::from_utf8(output.stdout).unwrap();
        lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .collect::<Vec<_>>()
    };
    let mib = |line: &Value| line["measured_mib"].as_f64().unwrap();
    let measured = bench(&[]);
    let all = &measured[5];
    let offload = &measured[6];
    assert_eq!(
        (&all["case"], &offload["case"]),
        (&Value::from("all layers"), &Value::from("offload"))
    );
    assert!(
        offload["offload"] == true && mib(offload) < mib(&measured[0]),
        "{measured:?}"
    );
    // Recomputation alone cannot save this much.
    let fit = (mib(all) - 0.1).to_string();
    let chosen = bench(&["--fit-mib", &fit]).pop().unwrap();
    assert!(
        chosen["case"] == "fit" && chosen["offload"] == true && mib(&chosen) < mib(all),
        "{chosen}"
    );
}

#[test]
fn npus_without_hccl_go_by_the_hosts_memory() {
    let experiment = Experiment::new();
    let args = [
        "conformance",
        "--device",
        "npu",
        "--backend",
        "gloo",
        "-n",
        "2",
    ];
    let output = finish(with_npus(&mut experiment.moerun(&args)));
    assert!(output.status.success(), "{}", text(&output));
    let layout = [
        "train.steps=3",
        "parallel.pipeline=2",
        "parallel.vocabulary=vocab-2",
        "train.micro_batch=1",
    ];
    assert!(
        finish(experiment.train(4, &layout).args(["--set", "run.dir=cpu"]))
            .status
            .success()
    );
    let changes = [
        "--set",
        "run.dir=npu",
        "--set",
        "run.device=npu",
        "--set",
        "run.backend=gloo",
    ];
    let output = finish(with_npus(experiment.train(4, &layout).args(changes)));
    assert!(output.status.success(), "{}", text(&output));
    assert_close(&curve(&experiment, "cpu"), &curve(&experiment, "npu"), 1e-5);
    for (run, measures) in [("cpu", true), ("npu", false)] {
        let times = [
            ("metrics.jsonl", ["\"wait_ratio\"", "\"pass_ms\""]),
            ("ranks.jsonl", ["\"rank_wait_ratio\"", "\"rank_pass_ms\""]),
        ];
        for (file, figures) in times {
            let lines = std::fs::read_to_string(experiment.path(run).join(file)).unwrap();
            for figure in figures {
                assert_eq!(lines.contains(figure), measures, "{figure} on {run}");
            }
        }
    }
}

#[test]
fn a_stopped_rank_is_named_over_hccl() {
    let experiment = Experiment::new();
    let port = free_port();
    let changes = ["train.steps=100000", "run.timeout_s=6", "run.device=npu"];
    let run = ranks(&experiment, 4, &changes, |command, rank| {
        with_npus(command);
        format!(
            "RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=4 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
        )
    });
    assert_stopped_rank_is_named(&experiment, 2, run);
}

#[test]
fn what_is_missing_is_said_in_one_sentence() {
    let experiment = Experiment::new();
    let refused = |changes: &[&str], expected: &str| {
        let output = finish(experiment.train(2, changes).env_remove("MOERUN_ASCEND_LIB"));
        let said = text(&output);
        assert!(
            !output.status.success() && said.contains(expected),
            "{said}"
        );
        assert!(!said.contains("panic"), "{said}");
    };
    refused(&["run.device=npu"], "libtorch_npu.so could not be loaded");
    refused(
        &["run.backend=hccl"],
        "run.backend is hccl, which needs npu devices",
    );
    refused(
        &["run.backend=nccl"],
        "run.backend is nccl, which needs cuda devices",
    );
    if !Path::new("/dev/nvidiactl").exists() {
        refused(&["run.device=cuda"], "libtorch_cuda.so could not be loaded");
    }
}

/// Operations of the host on the stand-in, outside of backward and in it, in the order of `Count`
/// in `torch_npu.cpp`.
#[derive(Debug, Clone, Copy, Default)]
struct HostCounts([[f64; 6]; 2]);

impl HostCounts {
    /// Adds up the files of all processes.
    fn read(folder: &Path) -> HostCounts {
        let mut counts = HostCounts::default();
        for file in std::fs::read_dir(folder).unwrap() {
            let bytes = std::fs::read(file.unwrap().path()).unwrap();
            let numbers = bytes.chunks_exact(8);
            let sums = counts.0.iter_mut().flatten();
            for (sum, number) in sums.zip(numbers) {
                *sum += u64::from_le_bytes(number.try_into().unwrap()) as f64;
            }
        }
        counts
    }

    /// Returns `factor` times the difference.
    fn difference(self, other: HostCounts, factor: f64) -> HostCounts {
        let mut result = self;
        for (a, b) in result.0.iter_mut().flatten().zip(other.0.iter().flatten()) {
            *a = (*a - b) * factor;
        }
        result
    }

    /// Returns how often the host waited for the device, outside of backward and in it.
    fn waits(self) -> [f64; 2] {
        self.0
            .map(|[_, _, copies_in, copies_out, others, _]| copies_in + copies_out + others)
    }

    /// Returns the number of operators and copies within the device.
    fn launches(self) -> f64 {
        self.0.iter().map(|counts| counts[0]).sum()
    }

    /// Returns how often a thread used a device that it had not set, or another one.
    fn uses_of_other_devices(self) -> f64 {
        self.0.iter().map(|counts| counts[5]).sum()
    }
}

/// Layers of the model whose microbatch is measured as a whole.
const LAYERS: usize = 16;

/// Operations of the host per microbatch and rank.
struct MicrobatchCounts {
    /// In each MoE layer.
    layer: HostCounts,
    /// Outside of the layers.
    rest: HostCounts,
    /// In a model of [`LAYERS`] layers.
    whole: HostCounts,
}

/// Runs steps of models on the stand-in and returns the counts of one microbatch.
fn counts_of_a_microbatch(ranks: usize, changes: &[&str]) -> MicrobatchCounts {
    const STEPS: usize = 2;
    let experiment = Experiment::new();
    let run = |layers: usize, microbatches: usize| {
        let name = format!("{layers}-{microbatches}");
        let folder = experiment.path(&format!("counts-{name}"));
        std::fs::create_dir(&folder).unwrap();
        let sequences = 2 * microbatches * ranks;
        let mut command = experiment.train(ranks, changes);
        for change in [
            format!("train.steps={STEPS}"),
            format!("train.global_batch={sequences}"),
            format!("model.layers={layers}"),
            format!("run.dir=run-{name}"),
            // Clipping copies a scale to the device in the steps that need it.
            "train.grad_clip=0".to_string(),
        ] {
            command.args(["--set", &change]);
        }
        command.args(["--set", "run.device=npu"]);
        let output = finish(with_npus(&mut command).env("MOERUN_STANDIN_COUNTS", &folder));
        assert!(output.status.success(), "{changes:?}: {}", text(&output));
        HostCounts::read(&folder)
    };
    // The difference leaves only what grows with the microbatches.
    let per_microbatch = 1.0 / (2 * STEPS * ranks) as f64;
    // The rehearsal before the first step has two microbatches.
    let microbatch = |layers| run(layers, 4).difference(run(layers, 2), per_microbatch);
    let first = microbatch(1);
    let whole = microbatch(LAYERS);
    let layer = whole.difference(first, 1.0 / (LAYERS - 1) as f64);
    MicrobatchCounts {
        layer,
        rest: first.difference(layer, 1.0),
        whole,
    }
}

#[test]
fn the_host_waits_once_for_each_layer_and_microbatch() {
    let layouts: [(usize, &[&str]); 4] = [
        (1, &["parallel={}"]),
        (1, &["parallel={recompute: {layers: all}}"]),
        (2, &["parallel={expert: 2}"]),
        (2, &["parallel={expert: 2, recompute: {layers: all}}"]),
    ];
    for (ranks, changes) in layouts {
        let MicrobatchCounts { layer, rest, whole } = counts_of_a_microbatch(ranks, changes);
        eprintln!("{changes:?}:\n  layer {layer:?}\n  rest {rest:?}\n  whole {whole:?}");
        assert_eq!(layer.waits(), [1.0, 0.0], "{changes:?}: a layer");
        assert_eq!(rest.waits(), [0.0, 0.0], "{changes:?}: outside of layers");
        assert_eq!(whole.waits(), [LAYERS as f64, 0.0], "{changes:?}: a model");
    }
}

#[test]
fn each_thread_uses_the_device_of_its_rank() {
    let experiment = Experiment::new();
    let layouts: [&[&str]; 4] = [
        &[
            "parallel.pipeline=2",
            "parallel.vocabulary=vocab-2",
            "train.micro_batch=1",
        ],
        &[
            "parallel.pipeline=2",
            "parallel.vocabulary=vocab-2",
            "train.micro_batch=1",
            "run.backend=gloo",
        ],
        &[
            "parallel.expert=4",
            "parallel.zero=1",
            "model.moe.dispatch=least_loaded",
            "optimizer.offload=true",
        ],
        &["parallel.context=2", "parallel.expert=4", "parallel.zero=3"],
    ];
    for (number, layout) in layouts.into_iter().enumerate() {
        let folder = experiment.path(&format!("counts-{number}"));
        std::fs::create_dir(&folder).unwrap();
        let run_dir = format!("run.dir=run-{number}");
        let settings = [
            "train.steps=3",
            "snapshot.every=1",
            "run.device=npu",
            &run_dir,
        ];
        let mut command = experiment.train(4, &[&settings[..], layout].concat());
        let output = finish(with_npus(&mut command).env("MOERUN_STANDIN_COUNTS", &folder));
        assert!(output.status.success(), "{layout:?}: {}", text(&output));
        let counts = HostCounts::read(&folder);
        assert!(counts.launches() > 0.0, "{layout:?}: nothing was counted");
        let uses = counts.uses_of_other_devices();
        assert_eq!(uses, 0.0, "{layout:?}: uses of other devices");
    }
}

/// The first uses of operators by a process on the stand-in.
struct FirstUses {
    before_communicators: usize,
    after: Vec<String>,
}

fn first_uses(file: &Path) -> FirstUses {
    let lines = std::fs::read_to_string(file).unwrap();
    let lines: Vec<&str> = lines.lines().collect();
    let made = lines.iter().position(|line| *line == "communicator");
    let made = made.expect("the rank joins others");
    let after = &lines[made + 1..];
    FirstUses {
        before_communicators: made,
        after: after.iter().map(ToString::to_string).collect(),
    }
}

#[test]
fn steps_do_not_wait_for_kernels_that_are_loaded_late() {
    let experiment = Experiment::new();
    let changes = [
        "train.steps=3",
        "parallel.pipeline=2",
        "parallel.vocabulary=vocab-2",
        "train.micro_batch=1",
        "run.timeout_s=30",
        "run.device=npu",
    ];
    let mut command = experiment.train(4, &changes);
    let output = finish(with_npus(&mut command).env("MOERUN_STANDIN_LAZY_LOADING", "1"));
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn each_operation_is_rehearsed_before_the_first_communicator() {
    let experiment = Experiment::new();
    let layouts: [&[&str]; 7] = [
        &["parallel.expert=1"],
        &["parallel.expert=1", "train.dtype=bf16"],
        &["parallel.zero=3", "parallel.recompute.layers=all"],
        &[
            "parallel.expert=1",
            "parallel.pipeline=2",
            "parallel.vocabulary=vocab-1",
            "train.micro_batch=1",
        ],
        &["parallel.context=2"],
        &["parallel.tensor=2"],
        &[
            "model.moe.dispatch=least_loaded",
            "model.moe.least_loaded.threshold=1",
            "model.moe.least_loaded.min_tokens=1",
        ],
    ];
    for (number, layout) in layouts.into_iter().enumerate() {
        let folder = experiment.path(&format!("uses-{number}"));
        std::fs::create_dir(&folder).unwrap();
        let dir = format!("run.dir=run-{number}");
        let common = [dir.as_str(), "run.device=npu", "train.steps=3"];
        let mut command = experiment.train(2, &[&common, layout].concat());
        let output = finish(with_npus(&mut command).env("MOERUN_STANDIN_USES", &folder));
        assert!(output.status.success(), "{layout:?}: {}", text(&output));
        let files = std::fs::read_dir(&folder).unwrap();
        let files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
        assert_eq!(files.len(), 2, "{layout:?}");
        for file in files {
            let uses = first_uses(&file);
            assert!(uses.before_communicators > 50, "{layout:?}");
            assert_eq!(uses.after, Vec::<String>::new(), "{layout:?}");
        }
        let log = experiment.path(&format!("run-{number}/logs/rank-1.log"));
        let log = std::fs::read_to_string(log).unwrap();
        assert!(log.contains("rehearsed a step in"), "{log}");
    }
}

#[test]
fn a_process_that_waits_for_its_rank_has_loaded_the_devices_library() {
    let experiment = Experiment::new();
    let mut command = experiment.train(1, &["run.device=npu"]);
    with_npus(&mut command)
        .stdin(Stdio::piped())
        .env("MOERUN_LAUNCHER_PID", std::process::id().to_string());
    let mut waiting = start(&mut command);
    let maps = format!("/proc/{}/maps", waiting.id());
    let library = libraries().file_name().unwrap().to_string_lossy();
    let has_loaded = || std::fs::read_to_string(&maps).is_ok_and(|maps| maps.contains(&*library));
    let began = Instant::now();
    while !has_loaded() {
        assert!(began.elapsed() < COMMAND_TIMEOUT, "nothing is loaded");
        assert_eq!(waiting.try_wait().unwrap(), None, "it does not wait");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(waiting.try_wait().unwrap(), None, "it does not wait");
    drop(waiting.stdin.take());
    assert!(waiting.wait().unwrap().success());
}
