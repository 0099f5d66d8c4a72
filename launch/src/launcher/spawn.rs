//! Starting a keeper on this machine.

use super::processes::OWN_PROGRAM;
use crate::keeper::{KeeperSettings, Ready};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A keeper starts within this time.
pub(super) const KEEPER_START_TIMEOUT: Duration = Duration::from_secs(30);

/// Starts one whose log is that of `node`'s keeper in the run's folder `dir`.
pub(super) fn spawn_keeper(
    dir: &Path,
    node: usize,
    settings: &KeeperSettings,
) -> Result<(Child, Ready)> {
    let log = dir.join("logs").join(format!("keeper-{node}.log"));
    let file = File::options().create(true).append(true).open(&log);
    let file = file.with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new(OWN_PROGRAM);
    command
        .arg0("moerun")
        .args(["keeper", "serve"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(file);
    let mut child = command.spawn().context("cannot start a keeper")?;
    match handshake(&mut child, settings)
        .with_context(|| format!("the keeper of node {node}: see {}", log.display()))
    {
        Ok(ready) => Ok((child, ready)),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

fn handshake(child: &mut Child, settings: &KeeperSettings) -> Result<Ready> {
    let stdin = child.stdin.take();
    let stdout = child.stdout.take();
    let (mut stdin, stdout) = stdin
        .zip(stdout)
        .context("it has no standard input and output")?;
    writeln!(
        stdin,
        "{}",
        serde_json::to_string(settings).expect("plain data")
    )
    .context("it ended at once")?;
    let (sender, line) = crossbeam_channel::bounded(1);
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        let _ = sender.send(read.map(|_| line));
    });
    let line = line
        .recv_timeout(KEEPER_START_TIMEOUT)
        .context("it did not start in time")?
        .context("it said nothing")?;
    serde_json::from_str(&line).context("it did not start")
}
