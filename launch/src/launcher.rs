//! Starts one process for each rank, watches them, and ends them all when one fails.

use crate::cli::TrainArgs;
use crate::rank::{Failure, failure_path, log_path};
use crate::{config_file, environment};
use anyhow::{Context, Result, anyhow};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parallel::RankEnv;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use torch_ext::Store;

/// How often children are looked at.
const TICK: Duration = Duration::from_millis(20);
/// After one rank failed, the others may be about to say that they failed first.
const SETTLING: Duration = Duration::from_millis(400);

pub(crate) fn run(args: &TrainArgs) -> Result<ExitCode> {
    let config = config_file::load(&args.config)?;
    let ranks = args.nproc_per_node;
    config_file::refuse_problems(&args.config, &config, ranks)?;
    let dir = config.run.dir.clone();
    let logs = dir.join("logs");
    std::fs::create_dir_all(&logs).with_context(|| format!("cannot make the run's folder {}", logs.display()))?;
    let store = Store::tcp("127.0.0.1", args.master_port, true, Duration::from_secs(10)).map_err(|e| {
        anyhow!("cannot serve on port {}: {e}; choose another with --master-port, or leave it out", args.master_port)
    })?;
    let signals = Signals::register()?;
    let mut ranks = Ranks::start(args, &dir, ranks, store.port()?)?;
    let ended = ranks.watch(&signals, Duration::from_secs(config.run.timeout_s));
    ranks.kill();
    match ended {
        End::Done if signals.count() > 0 => Ok(ExitCode::from(128 + signals.last() as u8)),
        End::Done => Ok(ExitCode::SUCCESS),
        End::Killed => {
            Err(anyhow!("stopped without a checkpoint of this moment; the same command goes on from the last one"))
        }
        End::Failed(failed) => Err(explain(&dir, &failed)),
    }
}

/// Signals that a person or a scheduler sent, counted.
struct Signals {
    count: Arc<AtomicUsize>,
    last: Arc<AtomicUsize>,
}

impl Signals {
    fn register() -> Result<Signals> {
        let signals = Signals { count: Arc::default(), last: Arc::default() };
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let (count, last) = (signals.count.clone(), signals.last.clone());
            std::thread::spawn({
                let mut iterator = signal_hook::iterator::Signals::new([signal]).context("cannot handle signals")?;
                move || {
                    for signal in iterator.forever() {
                        last.store(signal as usize, Ordering::SeqCst);
                        count.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
        }
        Ok(signals)
    }

    fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    fn last(&self) -> usize {
        self.last.load(Ordering::SeqCst)
    }
}

enum End {
    Done,
    /// By a second signal, or because ranks did not stop in time after the first.
    Killed,
    /// The ranks that had failed before the others were ended.
    Failed(Vec<(usize, ExitStatus)>),
}

struct Ranks {
    children: Vec<Child>,
}

impl Ranks {
    fn start(args: &TrainArgs, dir: &Path, count: usize, port: u16) -> Result<Ranks> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut ranks = Ranks { children: Vec::new() };
        for rank in 0..count {
            // What an earlier run left is not this one's.
            let _ = std::fs::remove_file(failure_path(dir, rank));
            let env = RankEnv::on_this_machine(rank, count, port);
            let mut command = Command::new(&program);
            command.arg("train").arg(&args.config.config);
            for change in &args.config.set {
                command.arg("--set").arg(change);
            }
            // Libtorch's own warnings of the other ranks go to their logs; rank 0 speaks to the person.
            let log = File::options().create(true).append(true).open(log_path(dir, rank));
            let log = log.with_context(|| format!("cannot write {}", log_path(dir, rank).display()))?;
            command
                .envs(environment::variables(&env))
                .env(environment::LAUNCHER_PID, std::process::id().to_string())
                .stdin(Stdio::null())
                .stdout(log.try_clone().context("cannot share the log")?)
                // Out of the terminal's group: Ctrl-C reaches the launcher, which stops the ranks in good order.
                .process_group(0);
            if rank != 0 {
                command.stderr(log);
            }
            let child = command.spawn().with_context(|| format!("cannot start rank {rank}"));
            match child {
                Ok(child) => ranks.children.push(child),
                Err(error) => {
                    ranks.kill();
                    return Err(error);
                }
            }
        }
        Ok(ranks)
    }

    fn watch(&mut self, signals: &Signals, patience: Duration) -> End {
        let mut asked: Option<Instant> = None;
        loop {
            let mut running = 0;
            for rank in 0..self.children.len() {
                match self.children[rank].try_wait() {
                    Ok(Some(status)) if !status.success() => {
                        std::thread::sleep(SETTLING);
                        return End::Failed(self.failed());
                    }
                    Ok(Some(_)) => {}
                    // A child that cannot be waited for counts as running until it can.
                    Ok(None) | Err(_) => running += 1,
                }
            }
            if running == 0 {
                return End::Done;
            }
            match asked {
                None if signals.count() > 0 => {
                    eprintln!("stopping after this step, with a checkpoint; a second signal stops at once");
                    self.signal(Signal::SIGTERM);
                    asked = Some(Instant::now());
                }
                Some(since) if signals.count() > 1 || since.elapsed() > patience => return End::Killed,
                _ => {}
            }
            std::thread::sleep(TICK);
        }
    }

    fn signal(&self, signal: Signal) {
        for child in &self.children {
            // A rank that has just ended needs no signal.
            let _ = kill(Pid::from_raw(child.id() as i32), signal);
        }
    }

    /// Ends and reaps every rank that still runs.
    fn kill(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn failed(&mut self) -> Vec<(usize, ExitStatus)> {
        let statuses = self.children.iter_mut().map(|child| child.try_wait().ok().flatten());
        statuses.enumerate().filter_map(|(rank, status)| Some((rank, status?))).filter(|(_, s)| !s.success()).collect()
    }
}

/// The failure that came first: a rank that was killed says nothing itself, and the others only that it is gone.
fn explain(dir: &Path, failed: &[(usize, ExitStatus)]) -> anyhow::Error {
    let report = |rank: usize| serde_json::from_slice::<Failure>(&std::fs::read(failure_path(dir, rank)).ok()?).ok();
    let killed = failed.iter().find(|(rank, status)| status.signal().is_some() && report(*rank).is_none());
    let first =
        failed.iter().filter_map(|(rank, _)| Some((*rank, report(*rank)?))).min_by_key(|(_, failure)| failure.at);
    let (rank, reason) = match (killed, first, failed.first()) {
        (Some((rank, status)), _, _) => (*rank, ended(*status)),
        (None, Some((rank, failure)), _) => (rank, failure.message),
        (None, None, Some((rank, status))) => (*rank, ended(*status)),
        (None, None, None) => (0, "it failed without a word".to_string()),
    };
    anyhow!("rank {rank} failed: {reason}\n  its log: {}", log_path(dir, rank).display())
}

/// How a process ended, in words.
fn ended(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(number), _) => {
            let name =
                Signal::try_from(number).map_or_else(|_| format!("signal {number}"), |signal| signal.to_string());
            let hint = if number == Signal::SIGKILL as i32 { " (by hand, or because memory ran out)" } else { "" };
            format!("it was ended by {name}{hint}")
        }
        (None, Some(code)) => format!("it ended with status {code}"),
        (None, None) => format!("it ended with {status}"),
    }
}
