//! `moerun bench import`: rates of reading and writing the folder of a model, compared with `cat`,
//! `cp` and a baseline.

use super::{
    figures::{mib, round},
    runner::{baseline_line, with_temp_dir},
};
use crate::{
    cli::{ImportArgs, WeightDtype},
    model::dtype,
};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::{Value, json};
use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::Instant,
};
use trainer::{PartAction, ReadPart, read_part, rewrite_folder, write_synthetic_folder};

/// Ranks that divide the experts.
const RANKS: usize = 2;

pub(crate) fn run(args: &ImportArgs) -> Result<ExitCode> {
    if let (Some(rank), Some(folder)) = (args.rank, &args.folder) {
        println!("{}", line_of_rank(args, folder, rank)?);
        return Ok(ExitCode::SUCCESS);
    }
    with_temp_dir(|temporary| measure(args, temporary))
}

/// Reads one rank's part, or fills its memory, and returns the figures.
fn line_of_rank(args: &ImportArgs, folder: &Path, rank: usize) -> Result<Value> {
    let action = if args.fill {
        PartAction::Fill
    } else {
        PartAction::Read
    };
    let ReadPart {
        bytes,
        seconds,
        peak_resident,
        weights,
    } = read_part(folder, rank, RANKS, dtype(args.dtype), action)?;
    Ok(json!({
        "bytes": bytes, "seconds": seconds, "peak_resident": peak_resident, "weights": weights,
    }))
}

/// State of the page cache: it has the folder, or not.
#[derive(Clone, Copy)]
enum Cache {
    Warm,
    Cold,
}

impl Cache {
    fn name(self) -> &'static str {
        match self {
            Cache::Warm => "warm",
            Cache::Cold => "cold",
        }
    }

    /// Reads all files, or makes the system forget them.
    fn prepare(self, files: &[PathBuf]) -> Result<()> {
        match self {
            Cache::Warm => {
                cat(files)?;
            }
            Cache::Cold => {
                for path in files {
                    let file = File::open(path)?;
                    file.sync_all()?;
                    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
                }
            }
        }
        Ok(())
    }
}

fn measure(args: &ImportArgs, temporary: &Path) -> Result<ExitCode> {
    let folder = temporary.join("model");
    let bytes = write_synthetic_folder(&folder, (args.gib * f64::from(1 << 30)) as u64)?;
    let files = weight_files(&folder)?;
    for cache in [Cache::Warm, Cache::Cold] {
        cache.prepare(&files)?;
        let reference = gigabytes(bytes) / cat(&files)?;
        cache.prepare(&files)?;
        let filled = longest(&run_ranks(&folder, args.dtype, PartAction::Fill)?);
        let ranks = run_ranks(&folder, args.dtype, PartAction::Read)?;
        let figure = |rank: &Value, key: &str| rank[key].as_f64().unwrap_or(0.0);
        let seconds = longest(&ranks);
        let peaks = ranks.iter().map(|rank| mib(figure(rank, "peak_resident")));
        let over_weights = ranks
            .iter()
            .map(|rank| figure(rank, "peak_resident") - figure(rank, "weights"));
        let rate = gigabytes(bytes) / seconds;
        let mut line = json!({
            "bench": "import",
            "case": format!("read, {} cache", cache.name()),
            "gb": round(gigabytes(bytes), 2),
            "ranks": RANKS,
            "gb_per_s": round(rate, 3),
            "cat_gb_per_s": round(reference, 3),
            "share_of_cat": round(rate / reference, 3),
            "fill_gb_per_s": round(gigabytes(bytes) / filled, 3),
            "share_of_fill": round(filled / seconds, 3),
            "peak_resident_mib": peaks.collect::<Vec<_>>(),
            "largest_over_weights_mib": mib(over_weights.fold(0.0, f64::max)),
        });
        if let Some(baseline) = &args.baseline {
            cache.prepare(&files)?;
            let command = format!("{baseline} {}", folder.display());
            let theirs = baseline_line(&command, "seconds")?;
            let their_seconds = theirs["seconds"].as_f64().unwrap_or(f64::NAN);
            line["baseline"] = theirs;
            line["times_as_fast"] = json!(round(their_seconds / seconds, 2));
        }
        println!("{line}");
    }
    println!("{}", export_line(&folder, temporary, &files, bytes)?);
    Ok(ExitCode::SUCCESS)
}

fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// Compares an export with `cp`, both with a warm cache and until the disk has the bytes.
fn export_line(folder: &Path, temporary: &Path, files: &[PathBuf], bytes: u64) -> Result<Value> {
    Cache::Warm.prepare(files)?;
    let started = Instant::now();
    let copy = temporary.join("copy");
    succeed(Command::new("cp").arg("-r").arg(folder).arg(&copy))?;
    for path in weight_files(&copy)? {
        File::open(path)?.sync_all()?;
    }
    let copied = started.elapsed().as_secs_f64();
    std::fs::remove_dir_all(&copy)?;
    Cache::Warm.prepare(files)?;
    let exported = temporary.join("export");
    let seconds = rewrite_folder(folder, &exported)?;
    std::fs::remove_dir_all(&exported)?;
    Ok(json!({
        "bench": "import",
        "case": "export",
        "gb": round(gigabytes(bytes), 2),
        "gb_per_s": round(gigabytes(bytes) / seconds, 3),
        "cp_gb_per_s": round(gigabytes(bytes) / copied, 3),
        "share_of_cp": round(copied / seconds, 3),
    }))
}

fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
    let mut files: Vec<PathBuf> = entries.iter().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "safetensors"));
    files.sort();
    Ok(files)
}

/// Returns the seconds that `cat` takes for these files.
fn cat(files: &[PathBuf]) -> Result<f64> {
    let started = Instant::now();
    succeed(Command::new("cat").args(files).stdout(Stdio::null()))?;
    Ok(started.elapsed().as_secs_f64())
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

/// Returns the seconds of the slower rank.
fn longest(ranks: &[Value]) -> f64 {
    let seconds = ranks.iter().filter_map(|rank| rank["seconds"].as_f64());
    seconds.fold(0.0, f64::max)
}

/// Lets two processes of one thread each read the folder, or fill as much memory, and returns the
/// line of each.
fn run_ranks(folder: &Path, dtype: WeightDtype, action: PartAction) -> Result<Vec<Value>> {
    let this = std::env::current_exe().context("cannot find this program's file")?;
    let dtype = dtype.to_possible_value().expect("no dtype is hidden");
    let start = |rank: usize| -> Result<Child> {
        let mut command = Command::new(&this);
        command
            .args(["bench", "import", "--dtype", dtype.get_name()])
            .args(["--rank", &rank.to_string(), "--folder"])
            .arg(folder)
            .args((action == PartAction::Fill).then_some("--fill"))
            .env("RAYON_NUM_THREADS", "1")
            .env("OMP_NUM_THREADS", "1")
            .stdout(Stdio::piped());
        command.spawn().context("cannot start moerun bench import")
    };
    let ranks = (0..RANKS).map(start).collect::<Result<Vec<Child>>>()?;
    let line = |rank: Child| -> Result<Value> {
        let output = rank.wait_with_output()?;
        if !output.status.success() {
            bail!("moerun bench import --rank: {}", output.status);
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    ranks.into_iter().map(line).collect()
}
