//! Checks of a machine: libraries, memory, limits, devices and disk.

use super::finding::Finding;
use crate::open_files::{self, Need, RunSize};
use nix::sys::statvfs::statvfs;
use parallel::Backend;
use std::{net::TcpListener, path::Path, process::Command};
use trainer::{EqualRanks, RankMemory, config::Config};

const MIB: u64 = 1 << 20;

/// Ranks of this machine, and of the run.
#[derive(Clone, Copy)]
pub(super) struct RankCounts {
    pub(super) local: usize,
    pub(super) total: usize,
}

pub(super) fn libtorch() -> Finding {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let path = maps
        .lines()
        .find(|line| line.ends_with("/libtorch_cpu.so"))
        .and_then(|line| line.find('/').map(|at| &line[at..]));
    let path = path.unwrap_or("loaded");
    let version = env!("CARGO_PKG_VERSION");
    let detail = format!("{path} (moerun {version} is built against 2.11.0)");
    Finding::ok("libtorch", detail)
}

/// Number of processors that this process may use.
pub(super) fn num_processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

pub(super) fn processors(ranks: usize) -> Finding {
    let cores = num_processors();
    let plural = if ranks == 1 { "" } else { "s" };
    let detail = format!("{cores} for {ranks} rank{plural} of this machine");
    if cores < ranks {
        let fix = "start fewer ranks: they share processors and wait for each other";
        Finding::warn("processors", detail, fix)
    } else {
        Finding::ok("processors", detail)
    }
}

/// Returns the available bytes: those of `/proc/meminfo`, or of the control group if fewer.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let available = line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024;
    let number = |path: &str| {
        std::fs::read_to_string(path)
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let limit = number("/sys/fs/cgroup/memory.max")
        .or_else(|| number("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
    let used = number("/sys/fs/cgroup/memory.current")
        .or_else(|| number("/sys/fs/cgroup/memory/memory.usage_in_bytes"));
    Some(limit.map_or(available, |limit| {
        available.min(limit.saturating_sub(used.unwrap_or(0)))
    }))
}

pub(super) fn memory(config: Option<&Config>, ranks: RankCounts) -> Finding {
    let RankCounts { local, total } = ranks;
    let Some(available) = available_memory() else {
        return Finding::warn("memory", "/proc/meminfo cannot be read", "mount /proc");
    };
    let needed = config.and_then(|config| {
        let mut config = config.clone();
        config.run.device = parallel::device_kind(&config.run.device).to_string();
        let on_host = config.run.device == "cpu";
        let ranks = config.memory(total).ok()?;
        let held = |rank: &RankMemory| rank.host + if on_host { rank.total() } else { 0 };
        let bytes_of_each =
            |equal: &EqualRanks| vec![held(&equal.memory); equal.ranks.len().min(local)];
        let mut bytes: Vec<u64> = ranks.iter().flat_map(bytes_of_each).collect();
        bytes.sort_unstable_by(|a, b| b.cmp(a));
        Some(bytes.iter().take(local).sum::<u64>()).filter(|&bytes| bytes > 0)
    });
    let have = available / MIB;
    match needed.map(|needed| needed / MIB) {
        Some(needed) if needed > have => Finding::fail(
            "memory",
            format!("{have} MiB are available, and {local} ranks hold about {needed} MiB"),
            "use more machines, a smaller train.micro_batch, parallel.zero or recompute: see \
             'moerun plan mesh'",
        ),
        Some(needed) => Finding::ok(
            "memory",
            format!("{have} MiB available, about {needed} MiB held by {local} ranks"),
        ),
        None => Finding::ok("memory", format!("{have} MiB available")),
    }
}

/// Checks `/dev/shm`, through which MPI and NCCL send messages within a machine. moerun itself uses
/// memory without a file system.
pub(super) fn shared_memory(config: Option<&Config>, ranks: usize, mpi_launch: bool) -> Finding {
    const BYTES_PER_RANK: u64 = 32 * MIB;
    let fix = "remove files from /dev/shm, or enlarge it: 'mount -o remount,size=8g /dev/shm', in \
               a container --shm-size=8g";
    let uses_it = |config: &Config| {
        let is_wanted = matches!(config.run.backend, Backend::Mpi | Backend::Nccl);
        is_wanted || parallel::device_kind(&config.run.device) == "cuda"
    };
    let is_used = mpi_launch || config.is_some_and(uses_it);
    let (detail, is_small) = match statvfs("/dev/shm") {
        Err(error) => (format!("/dev/shm: {error}"), true),
        Ok(stat) => {
            let free = stat.blocks_available() * stat.fragment_size();
            let detail = format!("{} MiB are free in /dev/shm", free / MIB);
            (detail, free < BYTES_PER_RANK * ranks as u64)
        }
    };
    if !is_small {
        return Finding::ok("shared memory", detail);
    }
    if is_used {
        return Finding::warn("shared memory", detail, fix);
    }
    let detail = format!("{detail}; only MPI and NCCL use it");
    Finding::ok("shared memory", detail)
}

pub(super) fn open_files(config: Option<&Config>, ranks: RankCounts) -> Finding {
    let RankCounts { local, total } = ranks;
    let size = match config {
        Some(config) => RunSize::new(config, total, local),
        None => RunSize {
            ranks: total,
            local_ranks: local,
            peers: total,
            machines: total.div_ceil(local.max(1)),
            keepers: 0,
            node_ranks: 0,
        },
    };
    let Need { process, files } = size.largest();
    let Some(limit) = open_files::limit() else {
        return Finding::warn(
            "open files",
            "the limit cannot be read",
            open_files::fix(files),
        );
    };
    let detail = format!("{process} needs up to {files}, and the limit is {limit}");
    if limit < files {
        Finding::fail("open files", detail, open_files::fix(files))
    } else {
        Finding::ok("open files", detail)
    }
}

/// Checks the port of the rendezvous, if one is given.
pub(super) fn port(port: u16) -> Option<Finding> {
    if port == 0 {
        return None;
    }
    Some(match TcpListener::bind(("0.0.0.0", port)) {
        Ok(_) => Finding::ok("port", format!("{port} is free")),
        Err(error) => Finding::fail(
            "port",
            format!("{port} cannot be used: {error}"),
            format!(
                "stop the process that uses it ('ss -ltnp sport = :{port}'), or choose another \
                 --master-port"
            ),
        ),
    })
}

pub(super) fn gpus(config: Option<&Config>) -> Finding {
    let wanted = config.is_some_and(|config| config.run.device == "cuda");
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
    let Some(driver) = driver.as_deref().and_then(|text| text.lines().next()) else {
        return if wanted {
            Finding::fail(
                "GPU",
                "run.device is cuda, but there is no NVIDIA driver",
                "install the driver (nvidia-smi must list the GPUs), give the container access \
                 to its devices, or use run.device: cpu",
            )
        } else {
            Finding::ok("GPU", "none")
        };
    };
    match parallel::accelerator("cuda", 0) {
        Ok(_) => {
            let kernels = match kernels::load_gpu_kernels(0) {
                Ok(architecture) => format!("kernels for {architecture}"),
                Err(error) => {
                    format!("libtorch's operations instead of moerun's faster kernels: {error}")
                }
            };
            Finding::ok(
                "GPU",
                format!("{} with {driver}; {kernels}", tch::Cuda::device_count()),
            )
        }
        Err(error) => Finding::fail(
            "GPU",
            format!("{driver}, but: {error}"),
            "run ./scripts/setup --cuda, or use run.device: cpu",
        ),
    }
}

/// Checks NPUs, if the experiment or the machine has one.
pub(super) fn npus(config: Option<&Config>) -> Option<Finding> {
    let wanted = config
        .is_some_and(|config| config.run.device == "npu" || config.run.backend == Backend::Hccl);
    if !wanted && !std::path::Path::new("/dev/davinci_manager").exists() {
        return None;
    }
    Some(match parallel::accelerator("npu", 0) {
        Ok(_) => Finding::ok("NPU", "libtorch_npu and its driver work"),
        Err(error) => Finding::fail(
            "NPU",
            error.to_string(),
            "follow docs/ascend.md, or use run.device: cpu",
        ),
    })
}

/// Checks the MPI library that is built in, and the mpirun in PATH.
///
/// Under mpirun, the ranks check whether it fits.
pub(super) fn mpi(config: Option<&Config>, mpi_launch: bool) -> Finding {
    let wanted = config.is_some_and(|config| config.run.backend == Backend::Mpi);
    let Some(library) = parallel::mpi_library() else {
        let detail = "this moerun was built without it";
        return if wanted {
            Finding::fail(
                "MPI",
                format!("run.backend is mpi, but {detail}"),
                "run ./scripts/setup --mpi and build with 'cargo build --release --features mpi'",
            )
        } else {
            Finding::ok("MPI", detail)
        };
    };
    if mpi_launch {
        return Finding::ok("MPI", library);
    }
    let program = std::env::var_os("MOERUN_MPIRUN").unwrap_or("mpirun".into());
    let output = Command::new(&program).arg("--version").output();
    let version = output.ok().filter(|output| output.status.success());
    let Some(version) = version.and_then(|output| String::from_utf8(output.stdout).ok()) else {
        let fix = format!(
            "add the bin folder of {library} to PATH (./scripts/setup --mpi prints its own)"
        );
        let detail = format!("{library} is built in, but there is no mpirun in PATH");
        return if wanted {
            Finding::fail("MPI", detail, fix)
        } else {
            Finding::warn("MPI", detail, fix)
        };
    };
    let version = version.lines().next().unwrap_or_default().to_string();
    // "Open MPI v5.0.11, ..." and "mpirun (Open MPI) 5.0.11".
    let number = |text: &str| {
        text.split([' ', ',', 'v'])
            .find(|word| word.contains('.'))
            .map(str::to_string)
    };
    if number(&library) == number(&version) {
        Finding::ok("MPI", format!("{library}; {version}"))
    } else {
        Finding::fail(
            "MPI",
            format!("{library} is built in, but mpirun in PATH is {version}"),
            "use the mpirun of the library that moerun was built with, or set MPICC to the other \
             one's and build again",
        )
    }
}

/// Checks that the folder of the run can be written and has space for its checkpoints.
pub(super) fn disk(config: &Config) -> Finding {
    let dir = &config.run.dir;
    let probe = dir.join(".doctor");
    let written = std::fs::create_dir_all(dir)
        .and_then(|()| std::fs::write(&probe, b"moerun"))
        .and_then(|()| std::fs::remove_file(&probe));
    if let Err(error) = written {
        let detail = format!("{} cannot be written: {error}", dir.display());
        let fix = "free space there, get permission to write, or choose another run.dir";
        return Finding::fail("disk", detail, fix);
    }
    let free =
        statvfs(Path::new(dir)).map_or(0, |stat| stat.blocks_available() * stat.fragment_size());
    // While the next checkpoint is written, there is one more than are kept.
    let checkpoints = config.checkpoint.keep as u128 + 1;
    let needed = config.checkpoint_bytes() * checkpoints;
    let detail = format!(
        "{} MiB are free in {}; {checkpoints} checkpoints take about {} MiB",
        free / MIB,
        dir.display(),
        needed / u128::from(MIB)
    );
    if u128::from(free) < needed {
        Finding::fail(
            "disk",
            detail,
            "free space, choose another run.dir, or reduce checkpoint.keep",
        )
    } else {
        Finding::ok("disk", detail)
    }
}
