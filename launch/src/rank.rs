//! One rank of a run: joins the others, trains, and says what went wrong where the launcher finds it.

use crate::cli::TrainArgs;
use crate::launcher::Assignment;
use crate::progress::TrainingView;
use crate::{config_file, environment};
use anyhow::{Context, Result, anyhow};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use parallel::{Accelerator, CpuAffinity, CpuTopology, RankEnv, World};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::fs::File;
use std::io::BufRead;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use trainer::config::Config;
use trainer::data::DatasetInfo;
use trainer::{Progress, ResumeSource, Trainer};

/// What a failing rank leaves for the launcher.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct FailureReport {
    /// Nanoseconds since the epoch: the first to fail is the one to show.
    pub(crate) at: u64,
    /// The error.
    pub(crate) message: String,
    /// Of what kind it is.
    pub(crate) kind: FailureKind,
}

/// What a failure is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FailureKind {
    /// A peer was gone, or did not answer.
    Peer,
    /// The loss of this step was not finite.
    Diverged { step: u64 },
    /// The snapshot that it was to go on from could not be read.
    Restore,
    /// Something of this rank's own, after so many steps in this attempt.
    Own { steps: u64 },
}

/// The launcher may know of an older state.
#[derive(Debug)]
struct NotRestored;

impl std::fmt::Display for NotRestored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the state to go on from cannot be read")
    }
}

/// The log of `rank`.
pub(crate) fn log_path(run: &Path, rank: usize) -> PathBuf {
    run.join("logs").join(format!("rank-{rank}.log"))
}

/// Where `rank` leaves the list of its last calls, when one of them fails.
fn flight_path(run: &Path, rank: usize) -> PathBuf {
    run.join("logs").join(format!("rank-{rank}.flight.json"))
}

/// Where `rank` leaves its failure.
pub(crate) fn failure_path(run: &Path, rank: usize) -> PathBuf {
    run.join("logs").join(format!("rank-{rank}.failure"))
}

/// A rank that `moerun` started: gets ready, and waits to be told which one it is.
pub(crate) fn run_assigned(args: &TrainArgs) -> Result<ExitCode> {
    exit_with_launcher()?;
    // When memory runs out, ranks go before keepers. Some systems do not allow it.
    let _ = std::fs::write("/proc/self/oom_score_adj", "300");
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut line)
        .context("cannot read what the launcher says")?;
    if line.is_empty() {
        // It ended, or needs nobody.
        return Ok(ExitCode::SUCCESS);
    }
    let assignment: Assignment =
        serde_json::from_str(&line).context("the launcher said something else than expected")?;
    run(args, &assignment.env(), "moerun", Some(&assignment))
}

/// One rank, from its beginning to the end of the process; `by` started it.
pub(crate) fn run(
    args: &TrainArgs,
    env: &RankEnv,
    by: &str,
    assignment: Option<&Assignment>,
) -> Result<ExitCode> {
    let config = config_file::load(&args.config)?;
    if let Err(problems) = config_file::refuse_problems(&args.config, &config, env.world_size) {
        // The same for all ranks: one of them says it.
        return if env.rank == 0 {
            Err(problems)
        } else {
            Ok(ExitCode::FAILURE)
        };
    }
    let dir = config.run.dir.clone();
    log_to_file(&dir, env.rank, assignment.is_some())?;
    let failure = failure_path(&dir, env.rank);
    let _ = std::fs::remove_file(&failure);
    // A panic is a bug of ours; it still ends as a message, not as a stack of frames on the terminal.
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!("{panic}\n{}", std::backtrace::Backtrace::force_capture())
    }));
    let steps = AtomicU64::new(0);
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| {
        train(config, env, by, assignment, &steps)
    }))
    .unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
        Err(anyhow!("internal error: {}", text.unwrap_or_default()))
    });
    let code = match result {
        Ok(()) => {
            finalize_mpi();
            0
        }
        Err(error) => {
            let message = format!("{error:#}");
            tracing::error!("{message}");
            let kind = match error.downcast_ref::<trainer::Error>() {
                Some(trainer::Error::Comm(_)) => FailureKind::Peer,
                Some(trainer::Error::Diverged { step, .. }) => {
                    FailureKind::Diverged { step: *step }
                }
                _ if error.is::<NotRestored>() => FailureKind::Restore,
                _ => FailureKind::Own {
                    steps: steps.load(Ordering::Relaxed),
                },
            };
            report(&dir, env.rank, message, kind);
            1
        }
    };
    // Without destructors: a process group whose peers are gone would wait for them.
    signal_hook::low_level::exit(code)
}

/// Leaves word of why a rank ends, for the launcher, or whoever reads the terminal.
fn report(dir: &Path, rank: usize, message: String, kind: FailureKind) {
    let at = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_nanos() as u64);
    let failure = FailureReport { at, message, kind };
    let text = serde_json::to_vec(&failure).expect("plain data");
    if std::fs::write(failure_path(dir, rank), text).is_err()
        || std::env::var(environment::LAUNCHER_PID).is_err()
    {
        eprintln!("error: rank {rank}: {}", failure.message);
    }
}

/// What has to happen before a rank may end well: mpirun takes one that says nothing for a failure.
pub(crate) fn finalize_mpi() {
    #[cfg(feature = "mpi")]
    parallel::finalize();
}

/// A rank that `moerun` started is killed when the launcher ends, however that happens.
pub(crate) fn exit_with_launcher() -> Result<()> {
    let Ok(launcher) = std::env::var(environment::LAUNCHER_PID) else {
        return Ok(());
    };
    set_pdeathsig(Signal::SIGKILL).context("cannot ask to end with the launcher")?;
    // It may have ended before the request.
    if nix::unistd::getppid().to_string() != launcher {
        return Err(anyhow!("the launcher ended before this rank started"));
    }
    Ok(())
}

/// Libtorch's own warnings go there too, but for rank 0, which speaks to the person.
fn log_to_file(dir: &Path, rank: usize, launched: bool) -> Result<()> {
    let path = log_path(dir, rank);
    let folder = path.parent().expect("a log has a folder");
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let file = File::options().create(true).append(true).open(&path);
    let file = file.with_context(|| format!("cannot write {}", path.display()))?;
    if launched {
        nix::unistd::dup2_stdout(&file).context("cannot share the log")?;
        if rank != 0 {
            nix::unistd::dup2_stderr(&file).context("cannot share the log")?;
        }
    }
    tracing_subscriber::fmt()
        .with_writer(Arc::new(file))
        .with_ansi(false)
        .with_target(false)
        .init();
    Ok(())
}

fn train(
    config: Config,
    env: &RankEnv,
    by: &str,
    assignment: Option<&Assignment>,
    done: &AtomicU64,
) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, stop.clone()).context("cannot handle signals")?;
    }
    // Counted before this rank sees its own processors only.
    tch::set_num_threads(threads(env) as i32);
    let device = parallel::accelerator(&config.run.device, env.local_rank)?;
    bind(config.run.cpu_affinity, env, device.numa_node());
    let timeout = Duration::from_secs(config.run.timeout_s);
    let world = World::join(env, timeout, config.run.backend, device.as_ref())?;
    let dir = config.run.dir.clone();
    let rank = env.rank;
    world.dump_calls_to(&flight_path(&dir, rank));
    // It cannot end in the ordinary way.
    world.on_stuck(move |error| {
        report(&dir, rank, error.to_string(), FailureKind::Peer);
        signal_hook::low_level::exit(1)
    });
    let joined = JoinedRank {
        env,
        by,
        assignment,
        done,
        stop: &stop,
        world: &world,
    };
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| joined.run(config, device)));
    // What a device says when another rank has failed looks like a failure of its own.
    world.check().map_err(trainer::Error::from)?;
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A rank that has met the others.
struct JoinedRank<'a> {
    env: &'a RankEnv,
    by: &'a str,
    assignment: Option<&'a Assignment>,
    done: &'a AtomicU64,
    stop: &'a AtomicBool,
    world: &'a World,
}

impl JoinedRank<'_> {
    fn run(&self, config: Config, device: Box<dyn Accelerator>) -> Result<()> {
        let JoinedRank {
            env,
            by,
            assignment,
            done,
            stop,
            world,
        } = *self;
        let dir = config.run.dir.clone();
        let steps = config.train.steps;
        let log_every = config.run.log_every;
        let validates = config.validation.is_some();
        let unigram = unigram_entropy(&config);
        let place = format!(
            "rank {} of {}, started by {by}, backend {}",
            env.rank,
            env.world_size,
            world.backend()
        );
        if env.rank == 0 {
            copy_tokenizer(&config);
        }
        let mut trainer = Trainer::new(config, world, device)?;
        let rank0 = env.rank == 0;
        let say = |text: String| {
            tracing::info!("{text}");
            if rank0 {
                eprintln!("{text}");
            }
        };
        tracing::info!("{place}");
        if rank0 && assignment.is_none() {
            // Who starts ranks in another way wants to see that it was understood.
            eprintln!("{place}");
        }
        // Those who watch a run have read it when the run began.
        let again = assignment
            .and_then(|assignment| assignment.keeper.as_ref())
            .is_some_and(|keeper| keeper.restore.is_some());
        if again {
            tracing::info!("{}", trainer.summary());
        } else {
            say(trainer.summary());
        }
        if let Some(assignment) = assignment {
            assignment
                .keeper
                .iter()
                .for_each(|keeper| trainer.use_keeper(keeper.clone()));
            trainer.skip_batches(assignment.skipped_batches.clone());
        }
        let warn = &mut |warning: &str| say(format!("warning: {warning}"));
        let resumed = trainer.resume(warn);
        let resumed = if again {
            resumed.context(NotRestored)
        } else {
            resumed.map_err(Into::into)
        };
        match resumed? {
            ResumeSource::Nothing => {}
            ResumeSource::Snapshot => {
                tracing::info!("going on from the snapshot of step {}", trainer.step())
            }
            ResumeSource::Checkpoint => {
                say(format!(
                    "going on from the checkpoint of step {} in {}",
                    trainer.step(),
                    dir.display()
                ));
            }
        }
        if trainer.step() >= steps {
            say(format!(
                "all {steps} steps are done: raise train.steps, or choose another run.dir to start from the beginning"
            ));
            return Ok(());
        }
        trainer.begin_snapshots(warn)?;
        if let Some(entropy) = unigram.filter(|_| !again) {
            say(format!(
                "unigram entropy of the training tokens: {entropy:.4} nats a token"
            ));
        }
        let mut view = TrainingView::new(steps, trainer.step(), log_every);
        let first = trainer.step();
        let outcome = trainer.run(&|| stop.load(Ordering::Relaxed), &mut view);
        done.store(trainer.step() - first, Ordering::Relaxed);
        view.finish();
        let outcome = outcome?;
        if outcome.stopped {
            say(format!(
                "stopped at step {} of {steps}; the same command goes on from there",
                outcome.step
            ));
        } else if rank0 {
            match (outcome.validation_loss.filter(|_| validates), unigram) {
            (Some(loss), Some(entropy)) => view.note(&format!(
                "done: validation loss {loss:.4}, unigram entropy {entropy:.4} nats a token; text: moerun generate --checkpoint {}",
                dir.display()
            )),
            _ => view.note(&format!("done; text: moerun generate --checkpoint {}", dir.display())),
        }
        }
        Ok(())
    }
}

/// Keeps this rank, and all threads that it starts from here on, on its processors.
fn bind(bind: CpuAffinity, env: &RankEnv, device: Option<usize>) {
    let own = Pid::from_raw(0);
    let Ok(allowed) = sched_getaffinity(own) else {
        return;
    };
    let allowed = (0..CpuSet::count())
        .filter(|&cpu| allowed.is_set(cpu).unwrap_or(false))
        .collect();
    let processors = CpuTopology::detect(allowed);
    let Some(cpus) = processors.cpus_for_rank(bind, env.local_rank, env.local_world_size, device)
    else {
        if bind == CpuAffinity::Cores {
            tracing::warn!(
                "run.cpu_affinity is cores, and this machine has fewer processors than ranks: none is bound"
            );
        }
        return;
    };
    let mut set = CpuSet::new();
    let bound = cpus
        .iter()
        .try_for_each(|&cpu| set.set(cpu))
        .and_then(|()| sched_setaffinity(own, &set));
    match bound {
        Ok(()) => tracing::info!("bound to processors {cpus:?}"),
        Err(error) => tracing::warn!("cannot be bound to processors {cpus:?}: {error}"),
    }
}

/// Threads of this rank: `OMP_NUM_THREADS`, else its share of the processors.
fn threads(env: &RankEnv) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let asked = std::env::var("OMP_NUM_THREADS")
        .ok()
        .and_then(|n| n.parse().ok());
    asked.unwrap_or((cores / env.local_world_size.max(1)).max(1))
}

/// The unigram entropy that `moerun data prepare` wrote beside the first source, where it did.
fn unigram_entropy(config: &Config) -> Option<f64> {
    let path = config
        .data
        .train
        .first()?
        .path
        .parent()?
        .join("dataset.json");
    let prepared: DatasetInfo = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    Some(prepared.unigram_entropy)
}

/// Puts the data's tokenizer beside the checkpoints, so that the run's folder is enough to generate with.
fn copy_tokenizer(config: &Config) {
    let beside = config
        .data
        .train
        .first()
        .and_then(|source| source.path.parent())
        .map(|f| f.join("tokenizer.json"));
    if let Some(path) = config
        .data
        .tokenizer
        .clone()
        .or(beside)
        .filter(|path| path.exists())
        && let Err(error) = std::fs::copy(&path, config.run.dir.join("tokenizer.json"))
    {
        tracing::warn!("cannot copy {}: {error}", path.display());
    }
}
