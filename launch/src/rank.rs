//! One rank of a run: joins the others, trains, and reports its failure to the launcher.

use crate::{
    cli::TrainArgs,
    config_diff, config_file, device_variables, environment, hint, machine_memory,
    open_files::{self, RunSize},
    progress::{TrainingView, Transfer},
    protocol::{Assignment, FailureKind, FailureReport, RankInput, failure_path, flight_path},
    rank_log, run_lock,
    signals::{self, Signals, StopMode},
    terminal,
};
use anyhow::{Context, Result, anyhow};
use checkpoint::run_folder::RunFolder;
use dataset::info::DatasetInfo;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::{prctl::set_pdeathsig, signal::Signal},
    unistd::Pid,
};
use parallel::{Accelerator, CpuAffinity, CpuTopology, RankEnv, World, agreement::sum_over_ranks};
use std::{
    any::Any,
    fmt,
    io::BufRead,
    os::fd::AsFd,
    panic::AssertUnwindSafe,
    path::Path,
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use trainer::{
    Progress, ResumeReport, ResumeSource, RunRequests, Trainer,
    config::{Config, TlsConfig},
    lines::Limits,
};

/// Time in which the disk takes a failure report.
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);

/// Context of an error that older state may help with: the launcher decides by it.
#[derive(Debug)]
struct NotRestored;

impl fmt::Display for NotRestored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot read the snapshot to resume from")
    }
}

/// The circumstances of a rank's start.
#[derive(Clone, Copy)]
pub(crate) struct RankStart<'a> {
    pub(crate) env: &'a RankEnv,
    /// Name of the program that started the rank.
    pub(crate) launcher: &'a str,
    /// None under another launcher than moerun's.
    pub(crate) input: Option<&'a RankInput>,
    pub(crate) signals: &'a Signals,
}

impl<'a> RankStart<'a> {
    fn assignment(&self) -> Option<&'a Assignment> {
        self.input.map(|input| &input.assignment)
    }
}

/// The end of a rank that did not fail.
enum RankEnd {
    /// All steps are done.
    Finished,
    /// The ranks stopped in order, because one of them received this signal.
    Stopped(Signal),
}

impl RankEnd {
    fn status(&self) -> i32 {
        match self {
            RankEnd::Finished => 0,
            RankEnd::Stopped(signal) => i32::from(signals::stop_status(*signal)),
        }
    }
}

/// Runs a process of the launcher: loads everything, then waits for its assignment.
pub(crate) fn run_assigned(args: &TrainArgs, signals: &Signals) -> Result<ExitCode> {
    exit_with_launcher()?;
    // When memory runs out, the kernel kills ranks before keepers. Some systems do not allow it.
    let _ = std::fs::write("/proc/self/oom_score_adj", "300");
    if !has_assignment() {
        load_ahead(args);
    }
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut line)
        .context("cannot read the launcher's assignment")?;
    if line.is_empty() {
        // The launcher exited or did not need this standby.
        return Ok(ExitCode::SUCCESS);
    }
    let input: RankInput =
        serde_json::from_str(&line).context("cannot parse the launcher's assignment")?;
    let start = RankStart {
        env: &input.env(),
        launcher: "moerun",
        input: Some(&input),
        signals,
    };
    run(args, &start)
}

/// True if the launcher's assignment need not be waited for.
fn has_assignment() -> bool {
    let stdin = std::io::stdin();
    let mut files = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    poll(&mut files, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Loads the device's library, which takes seconds, while the process waits for a rank. A failure
/// is reported by the rank, for whose machine it matters.
fn load_ahead(args: &TrainArgs) {
    if let Ok(config) = config_file::load(&args.config) {
        let _ = parallel::load_ahead(&config.run.device);
    }
}

/// Runs one rank and exits the process.
pub(crate) fn run(args: &TrainArgs, start: &RankStart) -> Result<ExitCode> {
    let env = start.env;
    let assignment = start.assignment();
    let config = match assignment {
        // The launcher's: the file may have been edited since.
        Some(assignment) => serde_json::from_str(&assignment.config)
            .context("cannot parse the launcher's configuration")?,
        None => config_file::load(&args.config)?,
    };
    if let Err(problems) = config_file::refuse_problems(&args.config, &config, env.world_size) {
        return report_on_rank_0(env, problems);
    }
    if assignment.is_none()
        && let Err(refused) =
            machine_memory::refuse_too_large(&config, env.local_world_size, env.world_size)
    {
        // Machines differ: the first rank of each reports for its machine.
        return report_if(env.local_rank == 0, refused);
    }
    if assignment.is_none()
        && let Err(refused) = open_files::refuse_too_many(
            RunSize::new(&config, env.world_size, env.local_world_size).rank(),
        )
    {
        return report_if(env.local_rank == 0, refused);
    }
    if assignment.is_none()
        && let Err(refused) = config_diff::refuse_changes(&config, &args.accept_changes)
    {
        return report_on_rank_0(env, refused);
    }
    let dir = config.run.dir.clone();
    let lock = match assignment {
        // The launcher has the lock. Of other launchers' ranks, the first takes it for all.
        None if env.rank == 0 => Some(run_lock::acquire(&dir)?),
        _ => None,
    };
    let limits = Limits::of_mib(config.run.line_buffer_mib);
    rank_log::log_to_file(&dir, env.rank, assignment.is_some(), limits)?;
    // A panic is a bug: it goes to the log with a backtrace, and to the terminal as one message.
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = std::backtrace::Backtrace::force_capture();
        tracing::error!("{panic}\n{backtrace}")
    }));
    let steps_done = AtomicU64::new(0);
    let training = Training {
        start: *start,
        accepted_changes: &args.accept_changes,
        steps_done: &steps_done,
    };
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| training.train(config)));
    let result = result.unwrap_or_else(|panic| Err(internal_error(&*panic)));
    let status = match result {
        Ok(end) => {
            finalize_mpi();
            end.status()
        }
        Err(error) => {
            let message = hint::message(&error);
            tracing::error!("{message}");
            let kind = failure_kind(&error, steps_done.load(Ordering::Relaxed));
            report(&dir, env.rank, message, kind);
            failure_status(start.signals, assignment.is_some())
        }
    };
    drop(lock);
    flush_output();
    // Without destructors: a process group whose peers are gone would wait for them.
    signal_hook::low_level::exit(status)
}

/// Returns the exit status of a rank that failed.
///
/// A scheduler that has signalled the rank learns that the run was stopped. The launcher learns
/// that the rank failed.
fn failure_status(signals: &Signals, is_launched: bool) -> i32 {
    match signals.exit_status() {
        status if status > 0 && !is_launched => i32::from(status),
        _ => 1,
    }
}

/// Writes what waits for the log and the terminal, while they take it.
fn flush_output() {
    rank_log::flush();
    terminal::flush();
}

/// Returns an error that all ranks find on rank 0 alone.
fn report_on_rank_0(env: &RankEnv, error: anyhow::Error) -> Result<ExitCode> {
    report_if(env.rank == 0, error)
}

fn report_if(reports: bool, error: anyhow::Error) -> Result<ExitCode> {
    if reports {
        Err(error)
    } else {
        Ok(ExitCode::FAILURE)
    }
}

/// Refuses a run of which a process on this machine may open too many files.
fn refuse_open_files(config: &Config, env: &RankEnv) -> Result<()> {
    let size = RunSize::new(config, env.world_size, env.local_world_size);
    let needs = [size.rank(), size.keeper()];
    needs.into_iter().try_for_each(open_files::refuse_too_many)
}

fn internal_error(panic: &(dyn Any + Send)) -> anyhow::Error {
    let text = match panic.downcast_ref::<String>() {
        Some(text) => text.as_str(),
        None => panic.downcast_ref::<&str>().copied().unwrap_or_default(),
    };
    anyhow!("internal error: {text}")
}

fn failure_kind(error: &anyhow::Error, steps: u64) -> FailureKind {
    match error.downcast_ref::<trainer::Error>() {
        Some(trainer::Error::Comm(_)) => FailureKind::Peer,
        Some(&trainer::Error::Diverged { step, .. }) => FailureKind::Diverged { step },
        _ if error.is::<NotRestored>() => FailureKind::Restore,
        _ => FailureKind::Own { steps },
    }
}

/// Leaves a failure report for the launcher, or prints it if there is none.
fn report(dir: &Path, rank: usize, message: String, kind: FailureKind) {
    let at = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_nanos() as u64);
    let failure = FailureReport {
        pid: std::process::id(),
        at,
        message,
        kind,
    };
    let text = serde_json::to_vec(&failure).expect("plain data");
    // Under another launcher the folder may belong to a run that refused this one.
    let is_read = environment::launched_by_moerun();
    let path = failure_path(dir, rank);
    if !is_read || parallel::write_within(REPORT_TIMEOUT, path, text).is_err() {
        eprintln!("error: rank {rank}: {}", failure.message);
    }
}

/// Finalizes MPI, without which mpirun takes the exit of a rank for a failure.
pub(crate) fn finalize_mpi() {
    #[cfg(feature = "mpi")]
    parallel::finalize();
}

/// Has the kernel kill this process when the launcher that started it ends.
pub(crate) fn exit_with_launcher() -> Result<()> {
    let Some(launcher) = environment::launcher_pid()? else {
        return Ok(());
    };
    set_pdeathsig(Signal::SIGKILL).context("cannot request to exit with the launcher")?;
    // The launcher may have exited before the request.
    if nix::unistd::getppid().to_string() != launcher {
        return Err(anyhow!("the launcher exited before this rank started"));
    }
    Ok(())
}

/// The start of a rank, and what it reports while it trains.
#[derive(Clone, Copy)]
struct Training<'a> {
    start: RankStart<'a>,
    accepted_changes: &'a [String],
    /// Receives the number of steps of this generation.
    steps_done: &'a AtomicU64,
}

impl Training<'_> {
    fn train(self, config: Config) -> Result<RankEnd> {
        let env = self.start.env;
        if self.start.assignment().is_some() {
            // The limits of an agent's machine differ from the launcher's.
            refuse_open_files(&config, env)?;
        }
        device_variables::refuse_missing(&config)?;
        // Before set_cpu_affinity, which reduces the processors that this rank sees.
        tch::set_num_threads(threads(env)? as i32);
        let device = parallel::accelerator(&config.run.device, env.local_rank)?;
        set_cpu_affinity(config.run.cpu_affinity, env, device.numa_node());
        let timeout = Duration::from_secs(config.run.timeout_s);
        let mut joining = env.clone();
        joining.gloo_tls = config.run.tls.as_ref().map(TlsConfig::to_gloo);
        let world = World::join(&joining, timeout, config.run.backend, device.as_ref())?;
        let dir = config.run.dir.clone();
        let rank = env.rank;
        world.dump_calls_to(&flight_path(&dir, rank));
        let signals = self.start.signals.clone();
        let is_launched = self.start.assignment().is_some();
        // A stuck rank cannot exit in the ordinary way.
        world.on_stuck(move |error| {
            report(&dir, rank, error.to_string(), FailureKind::Peer);
            flush_output();
            signal_hook::low_level::exit(failure_status(&signals, is_launched))
        });
        let joined = JoinedRank {
            training: self,
            world: &world,
        };
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| joined.run(config, device)));
        // A device's error after another rank failed looks like a failure of its own.
        world.check().map_err(trainer::Error::from)?;
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// A rank that has joined the others.
struct JoinedRank<'a> {
    training: Training<'a>,
    world: &'a World,
}

impl JoinedRank<'_> {
    fn run(&self, config: Config, device: Box<dyn Accelerator>) -> Result<RankEnd> {
        let dir = config.run.dir.clone();
        let steps = config.train.steps;
        let log_every = config.run.log_every;
        let validates = config.validation.is_some();
        let unigram_entropy = unigram_entropy(&config);
        let warnings = config.warnings();
        let start_line = self.start_line();
        let is_restart = self
            .start()
            .assignment()
            .is_some_and(Assignment::is_restart);
        // The first start has copied it, and a restart does not depend on the disk.
        let copies_tokenizer = self.is_rank0() && !is_restart;
        let with_tokenizer = copies_tokenizer.then(|| config.clone());
        let mut trainer = Trainer::new(config, self.world, device)?;
        // A run refuses the tokenizer of other data.
        if let Some(config) = with_tokenizer {
            copy_tokenizer(&config);
        }
        tracing::info!("{start_line}");
        if self.is_rank0() && self.start().assignment().is_none() {
            // Shows users of another launcher that moerun understood it.
            eprintln!("{start_line}");
        }
        // After a restart, the user has already seen the summary.
        if is_restart {
            tracing::info!("{}", trainer.summary());
        } else {
            self.print(&trainer.summary());
            for warning in warnings {
                self.warn(&warning);
            }
        }
        self.restore(&mut trainer, &dir, is_restart)?;
        if self.is_rank0() && !is_restart {
            self.report_data(&trainer);
        }
        if trainer.step() >= steps {
            self.print(&format!(
                "all {steps} steps are done\n\
                 hint: raise train.steps to continue, or change run.dir to start over"
            ));
            return Ok(RankEnd::Finished);
        }
        trainer.begin_snapshots(&mut |warning| self.warn(warning))?;
        if let Some(entropy) = unigram_entropy.filter(|_| !is_restart) {
            self.print(&format!(
                "unigram entropy of the training tokens: {entropy:.4} nats per token"
            ));
        }
        let first = trainer.step();
        let mut view = TrainingView::new(steps, first, log_every);
        let signals = self.start().signals;
        signals.set_mode(self.stop_mode());
        let outcome = trainer.run(&SignalRequests(signals), &mut view);
        let steps_done = trainer.step() - first;
        self.training
            .steps_done
            .store(steps_done, Ordering::Relaxed);
        view.remove_bar();
        let outcome = outcome?;
        if outcome.stopped {
            let step = outcome.step;
            self.print(&format!(
                "stopped at step {step} of {steps}; run the same command to resume"
            ));
            return Ok(RankEnd::Stopped(self.agree_on_signal(&trainer)));
        }
        if self.is_rank0() {
            let dir = dir.display();
            let loss = outcome.validation_loss.filter(|_| validates);
            let losses = match (loss, unigram_entropy) {
                (Some(loss), Some(entropy)) => format!(
                    ": validation loss {loss:.4}, unigram entropy {entropy:.4} nats per token"
                ),
                _ => String::new(),
            };
            view.note(&format!(
                "done{losses}\ngenerate text with: moerun generate --checkpoint {dir}"
            ));
        }
        Ok(RankEnd::Finished)
    }

    fn start(&self) -> &RankStart<'_> {
        &self.training.start
    }

    /// Returns the reaction to stop signals while training.
    fn stop_mode(&self) -> StopMode {
        // The launcher kills its ranks if they have to stop at once.
        match self.start().assignment() {
            Some(_) => StopMode::Count,
            None => StopMode::ExitAtSecond,
        }
    }

    /// Returns the signal that stopped the run, the same on all ranks.
    ///
    /// # Collective
    /// All ranks.
    fn agree_on_signal(&self, trainer: &Trainer) -> Signal {
        let own = self.start().signals.last_stop();
        let received = signals::STOPS.map(|signal| f64::from(u8::from(own == Some(signal))));
        let agreed = match sum_over_ranks(trainer.communicator(), &received) {
            Ok(ranks) => ranks.iter().position(|ranks| *ranks > 0.0),
            // The state is saved, so this is no failure.
            Err(_) => None,
        };
        let agreed = agreed.map(|index| signals::STOPS[index]);
        agreed.or(own).unwrap_or(Signal::SIGTERM)
    }

    /// Loads the snapshot or checkpoint to resume from, if there is one.
    fn restore(&self, trainer: &mut Trainer, dir: &Path, is_restart: bool) -> Result<()> {
        if let Some(input) = self.start().input {
            if let Some(keeper) = input.keeper_access() {
                trainer.use_keeper(keeper);
            }
            trainer.skip_batches(input.assignment.skipped_batches.clone());
        }
        trainer.accept_changes(self.training.accepted_changes.to_vec());
        if self.is_rank0() {
            let bar = Transfer::new("loading, rank 0");
            trainer.show_loading(Box::new(move |done, total| bar.show(done, total)));
        }
        let resumed = trainer.resume(&mut |warning| self.warn(warning));
        let source = if is_restart {
            resumed.context(NotRestored)?
        } else {
            resumed?
        };
        let step = trainer.step();
        match source {
            ResumeSource::Nothing => {}
            ResumeSource::Folder => {
                for note in &trainer.resume_report().notes {
                    self.print(note);
                }
                return Ok(());
            }
            ResumeSource::Snapshot => {
                tracing::info!("resuming from the snapshot of step {step}")
            }
            ResumeSource::Checkpoint => {
                let dir = dir.display();
                self.print(&format!(
                    "resuming from the checkpoint of step {step} in {dir}"
                ));
            }
        }
        self.report_changes(trainer, dir);
        Ok(())
    }

    /// Prints and records how the run differs from the one that it resumes.
    fn report_changes(&self, trainer: &Trainer, dir: &Path) {
        let ResumeReport {
            changes,
            notes,
            data_rules,
        } = trainer.resume_report();
        for change in changes {
            self.print(&format!("changed since the saved state: {change}"));
        }
        for note in notes.iter().chain(data_rules) {
            self.print(note);
        }
        if self.is_rank0()
            && let Err(error) = config_diff::record(trainer, dir)
        {
            self.warn(&format!("{error:#}"));
        }
    }

    fn report_data(&self, trainer: &Trainer) {
        let report = trainer.data_report();
        for line in &report.lines {
            self.print(line);
        }
        for warning in &report.warnings {
            self.warn(warning);
        }
    }

    fn is_rank0(&self) -> bool {
        self.start().env.rank == 0
    }

    fn start_line(&self) -> String {
        let RankEnv {
            rank, world_size, ..
        } = self.start().env;
        let launcher = self.start().launcher;
        let backend = self.world.backend();
        format!("rank {rank} of {world_size}, started by {launcher}, backend {backend}")
    }

    /// Logs a line; rank 0 also prints it.
    fn print(&self, text: &str) {
        tracing::info!("{text}");
        if self.is_rank0() {
            eprintln!("{text}");
        }
    }

    fn warn(&self, warning: &str) {
        self.print(&format!("warning: {warning}"));
    }
}

/// Requests to the training loop by signals to this rank.
struct SignalRequests<'a>(&'a Signals);

impl RunRequests for SignalRequests<'_> {
    fn wants_stop(&self) -> bool {
        self.0.stop_count() > 0
    }

    fn wants_checkpoint(&self) -> bool {
        self.0.wants_checkpoint()
    }

    fn begin_checkpoint(&self) {
        self.0.take_checkpoint_requests();
    }
}

/// Binds this thread, and all threads that it starts from now on, to the rank's processors.
fn set_cpu_affinity(affinity: CpuAffinity, env: &RankEnv, device_node: Option<usize>) {
    let this_thread = Pid::from_raw(0);
    let Ok(allowed) = sched_getaffinity(this_thread) else {
        return;
    };
    let allowed = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false));
    let topology = CpuTopology::detect(allowed.collect());
    let local_size = env.local_world_size;
    let cpus = topology.cpus_for_rank(affinity, env.local_rank, local_size, device_node);
    let Some(cpus) = cpus else {
        if affinity == CpuAffinity::Cores {
            tracing::warn!(
                "run.cpu_affinity is cores, but this machine has fewer processors than ranks: \
                 no rank is bound"
            );
        }
        return;
    };
    let mut set = CpuSet::new();
    let bound = cpus
        .iter()
        .try_for_each(|&cpu| set.set(cpu))
        .and_then(|()| sched_setaffinity(this_thread, &set));
    match bound {
        Ok(()) => tracing::info!("bound to processors {cpus:?}"),
        Err(error) => tracing::warn!("cannot bind to processors {cpus:?}: {error}"),
    }
}

/// Returns the rank's number of threads: `OMP_NUM_THREADS`, else its share of the processors.
///
/// # Errors
/// If the variable is no number of threads.
fn threads(env: &RankEnv) -> Result<usize> {
    if let Some(threads) = environment::requested_threads()? {
        return Ok(threads);
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Ok((processors / env.local_world_size.max(1)).max(1))
}

/// Returns the unigram entropy that `moerun data prepare` left next to the first source.
fn unigram_entropy(config: &Config) -> Option<f64> {
    let source = config.data.train.first()?;
    let prepared = DatasetInfo::of_tokens(&source.path).ok()??;
    Some(prepared.unigram_entropy)
}

/// Copies the tokenizer of the data to the run's folder, which is then enough to generate text.
fn copy_tokenizer(config: &Config) {
    let next_to_data = || {
        let folder = config.data.train.first()?.path.parent()?;
        Some(folder.join("tokenizer.json"))
    };
    let configured = config.data.tokenizer.clone();
    let Some(path) = configured
        .or_else(next_to_data)
        .filter(|path| path.exists())
    else {
        return;
    };
    let copied = std::fs::read(&path)
        .map_err(anyhow::Error::from)
        .and_then(|bytes| {
            let run = RunFolder::open(&config.run.dir)?;
            Ok(run.write_file("tokenizer.json", &bytes)?)
        });
    if let Err(error) = copied {
        tracing::warn!("cannot copy {}: {error:#}", path.display());
    }
}
