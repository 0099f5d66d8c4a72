//! Starts a keeper on this machine, and kills one that an earlier launcher or agent started.

use super::rank_source::OWN_PROGRAM;
use crate::keeper::{KeeperSettings, Ready};
use anyhow::{Context, Result};
use checkpoint::run_folder::RunFolder;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

/// The time within which the disk must open a keeper's log.
const LOG_TIMEOUT: Duration = Duration::from_secs(2);
/// The time within which a started keeper must answer.
pub(super) const KEEPER_START_TIMEOUT: Duration = Duration::from_secs(30);

/// Starts the keeper of `node`, which logs to the run's folder `dir`.
pub(super) fn spawn_keeper(
    dir: &Path,
    node: usize,
    settings: &KeeperSettings,
) -> Result<(Child, Ready)> {
    let logs = dir.join("logs");
    let name = format!("keeper-{node}.log");
    let log = logs.join(&name);
    let mut command = Command::new(OWN_PROGRAM);
    command
        .arg0("moerun")
        .args(["keeper", "serve"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(open_log(logs, name));
    let mut child = command.spawn().context("cannot start a keeper")?;
    let ready = handshake(&mut child, settings);
    match ready.with_context(|| format!("the keeper of node {node} (log: {})", log.display())) {
        Ok(ready) => Ok((child, ready)),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

/// Opens a keeper's log. Without it the keeper runs all the same: its memory is worth more.
fn open_log(logs: PathBuf, name: String) -> Stdio {
    let path = logs.join(&name);
    let open = move || {
        let folder = RunFolder::create_inside(&logs).map_err(std::io::Error::other)?;
        folder.append_file(&name).map_err(std::io::Error::other)
    };
    match parallel::within(LOG_TIMEOUT, open) {
        Ok(file) => file.into(),
        Err(error) => {
            let path = path.display();
            eprintln!("warning: the keeper starts without its log {path}: {error}");
            Stdio::null()
        }
    }
}

/// Returns the real path of the folder with the logs of the run in `dir`, if the disk answers.
pub(super) fn real_logs(dir: &Path) -> Option<PathBuf> {
    let logs = dir.join("logs");
    parallel::within(LOG_TIMEOUT, move || logs.canonicalize()).ok()
}

/// Kills a keeper that is no child of this process and logs to the real path `logs`. Does not ask
/// the disk, which may hang.
///
/// Its number may belong to another process by now, or to one of another container.
pub(super) fn kill_earlier_keeper(logs: &Path, pid: i32) {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let is_keeper =
        std::fs::read(process.join("cmdline")).is_ok_and(|line| line.ends_with(b"keeper\0serve\0"));
    let log = std::fs::read_link(process.join("fd/2"));
    let is_of_run = log.is_ok_and(|log| log.starts_with(logs));
    if is_keeper && is_of_run {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Sends the settings and waits for the keeper's address.
fn handshake(child: &mut Child, settings: &KeeperSettings) -> Result<Ready> {
    let stdin = child.stdin.take();
    let stdout = child.stdout.take();
    let pipes = stdin.zip(stdout);
    let (mut stdin, stdout) = pipes.context("no pipes to its standard input and output")?;
    let settings = serde_json::to_string(settings).expect("plain data");
    writeln!(stdin, "{settings}").context("exited at once")?;
    let (sender, line) = crossbeam_channel::bounded(1);
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        let _ = sender.send(read.map(|_| line));
    });
    let line = line
        .recv_timeout(KEEPER_START_TIMEOUT)
        .context("did not start in time")?
        .context("did not answer")?;
    serde_json::from_str(&line).context("did not start")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, os::unix::process::ExitStatusExt};

    /// Starts a process that looks like a keeper with its log in `logs`.
    fn keeper(logs: &Path) -> Child {
        std::fs::create_dir_all(logs).unwrap();
        let log = File::create(logs.join("keeper-0.log")).unwrap();
        Command::new("sh")
            .args(["-c", "read line", "keeper", "serve"])
            .stdin(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    #[test]
    fn an_earlier_keeper_is_killed_without_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let mut own = keeper(&run.join("logs"));
        let mut other = keeper(&folder.path().join("other/logs"));
        let logs = real_logs(&run).unwrap();
        std::fs::remove_dir_all(&run).unwrap();
        kill_earlier_keeper(&logs, other.id() as i32);
        kill_earlier_keeper(&logs, own.id() as i32);
        // An end of input would be its status 1.
        assert_eq!(own.wait().unwrap().signal(), Some(Signal::SIGKILL as i32));
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
