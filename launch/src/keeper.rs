//! `moerun keeper`: the keeper's process, and its end.

use crate::cli::RunArgs;
use crate::registry::KeeperRegistry;
use anyhow::{Context, Result, anyhow};
use checkpoint::keeper::{Secret, serve};
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// What the launcher tells a keeper, as a line on its standard input.
#[derive(Serialize, Deserialize)]
pub(crate) struct KeeperSettings {
    pub(crate) socket: String,
    pub(crate) secret: Secret,
    pub(crate) listen: SocketAddr,
    pub(crate) memory: Option<u64>,
    pub(crate) orphan_timeout_s: u64,
}

/// What it answers on standard output.
#[derive(Serialize, Deserialize)]
pub(crate) struct Ready {
    pub(crate) address: SocketAddr,
}

pub(crate) fn serve() -> Result<ExitCode> {
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut line)
        .context("cannot read the settings")?;
    let settings: KeeperSettings = serde_json::from_str(&line)
        .context("a keeper is started by 'moerun train', which tells it what to do")?;
    // Neither the launcher's end nor a key on its terminal is this process's; where it leads a session already, fine.
    let _ = nix::unistd::setsid();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
    let settings = serve::Settings {
        socket: settings.socket,
        secret: settings.secret,
        listen: settings.listen,
        memory_limit: settings.memory,
        orphan_timeout: Duration::from_secs(settings.orphan_timeout_s),
    };
    let ready = |address| {
        let line = serde_json::to_string(&Ready { address }).expect("plain data");
        // Where nobody reads it, nobody will connect either, and the keeper ends.
        let _ = writeln!(std::io::stdout(), "{line}").and_then(|()| std::io::stdout().flush());
    };
    serve::run(settings, ready).map_err(|e| anyhow!("the keeper: {e}"))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn stop(args: &RunArgs) -> Result<ExitCode> {
    let Some(registry) = KeeperRegistry::load(&args.run)? else {
        println!("no keepers are known in {}", args.run.display());
        return Ok(ExitCode::SUCCESS);
    };
    let mut stopped = 0;
    for number in 0..registry.keepers.len() {
        match registry
            .connect(number, Duration::from_secs(5))
            .map(|mut peer| peer.stop())
        {
            Ok(_) => {
                stopped += 1;
                wait_for_end(registry.keepers[number].pid);
            }
            Err(error) => eprintln!("warning: {error:#}"),
        }
    }
    KeeperRegistry::remove(&args.run);
    println!(
        "{stopped} of {} keepers were stopped; what was in their memory only is gone",
        registry.keepers.len()
    );
    Ok(ExitCode::SUCCESS)
}

/// A moment for a process of this machine to be gone, and with it what it has open.
fn wait_for_end(pid: i32) {
    let begun = Instant::now();
    while kill(Pid::from_raw(pid), None).is_ok() && begun.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(5));
    }
}
