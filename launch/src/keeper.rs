//! `moerun keeper`: runs a keeper process, or stops those of a run.

use crate::{
    cli::RunArgs,
    hint::{WithHint, hinted},
    rank_log,
    registry::KeeperRegistry,
    signals::ignored_signals,
};
use anyhow::{Context, Result, anyhow};
use checkpoint::keeper::{Peer, Secret, serve};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2},
    iterator::Signals,
};
use std::{
    io::{BufRead, Read, Write},
    net::SocketAddr,
    process::ExitCode,
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest line of settings.
const MAX_SETTINGS_BYTES: u64 = 1 << 20;
/// A scheduler's signal for a limit of CPU time, which signal-hook does not name.
const SIGXCPU: i32 = Signal::SIGXCPU as i32;

/// The launcher's line on a keeper's standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct KeeperSettings {
    pub(crate) socket: String,
    pub(crate) secret: Secret,
    pub(crate) listen: SocketAddr,
    /// Bytes that the keeper may use.
    pub(crate) memory: Option<u64>,
    pub(crate) orphan_timeout_s: u64,
}

/// The keeper's answer on standard output.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Ready {
    pub(crate) address: SocketAddr,
}

pub(crate) fn serve() -> Result<ExitCode> {
    let signals = receive_signals()?;
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .take(MAX_SETTINGS_BYTES)
        .read_line(&mut line)
        .context("cannot read the keeper's settings")?;
    let settings: KeeperSettings = serde_json::from_str(&line)
        .context("cannot parse the keeper's settings")
        .hint("use 'moerun train', which starts keepers")?;
    // A session of its own: the keeper outlives the launcher, and Ctrl-C does not reach it. Fails
    // harmlessly if the process leads a session already.
    let _ = nix::unistd::setsid();
    rank_log::log_to_stderr()?;
    let settings = serve::Settings {
        socket: settings.socket,
        secret: settings.secret,
        listen: settings.listen,
        memory_limit: settings.memory,
        orphan_timeout: Duration::from_secs(settings.orphan_timeout_s),
    };
    let ready = |address| {
        let line = serde_json::to_string(&Ready { address }).expect("plain data");
        let mut stdout = std::io::stdout();
        // It fails if the launcher has ended meanwhile: then no launcher knows this keeper.
        writeln!(stdout, "{line}")?;
        stdout.flush()
    };
    let served = serve::run_with_signals(settings, signals, ready);
    rank_log::flush();
    served.map_err(|e| anyhow!("the keeper: {e}"))?;
    Ok(ExitCode::SUCCESS)
}

/// Catches the signals by which a scheduler or a user ends a run, and returns those that concern
/// the keeper. It has to outlive the ranks and the launcher: their newest state is in its memory.
fn receive_signals() -> Result<Receiver<i32>> {
    let caught = [SIGINT, SIGHUP, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU];
    let mut received = Signals::new(caught).context("cannot handle signals")?;
    let (sender, signals) = channel();
    // The launcher handles ignored signals too, and a child of a process that handles a signal
    // starts with its default action, which ends it. So the keeper catches them and does nothing.
    let ignored = ignored_signals();
    let concerns_keeper = move |signal| {
        let is_ignored = Signal::try_from(signal).is_ok_and(|signal| ignored.contains(signal));
        // Ctrl-C and a closed terminal are the launcher's business.
        signal != SIGINT && signal != SIGHUP && !is_ignored
    };
    let forward = move || {
        for signal in received.forever() {
            if concerns_keeper(signal) && sender.send(signal).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .spawn(forward)
        .context("cannot start a thread")?;
    Ok(signals)
}

pub(crate) fn stop(args: &RunArgs) -> Result<ExitCode> {
    let Some(registry) = KeeperRegistry::load(&args.run)? else {
        println!("{} has no keepers", args.run.display());
        return Ok(ExitCode::SUCCESS);
    };
    let mut stopped = 0;
    let mut unanswered = 0;
    for (node, keeper) in registry.keepers.iter().enumerate() {
        match Peer::connect(keeper.address, &registry.secret, CONNECT_TIMEOUT) {
            Ok(mut peer) => {
                // A keeper may exit before it replies.
                let _ = peer.stop();
                stopped += 1;
                wait_for_exit(keeper.pid);
            }
            Err(error) => {
                let address = keeper.address;
                eprintln!("warning: cannot reach the keeper of node {node} at {address}: {error}");
                // A keeper that is busy or stopped is still there.
                unanswered += usize::from(!error.is_lost());
            }
        }
    }
    let keepers = registry.keepers.len();
    println!("stopped {stopped} of {keepers} keepers; state that was only in memory is lost");
    if unanswered > 0 {
        return Err(hinted(
            anyhow!("{unanswered} of {keepers} keepers did not answer, and may still run"),
            "try again; a stopped process answers after SIGCONT",
        ));
    }
    KeeperRegistry::remove(&args.run);
    Ok(ExitCode::SUCCESS)
}

/// Waits for a process of this machine to exit and close its files, for two seconds at most.
fn wait_for_exit(pid: i32) {
    let began = Instant::now();
    while kill(Pid::from_raw(pid), None).is_ok() && began.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(5));
    }
}
