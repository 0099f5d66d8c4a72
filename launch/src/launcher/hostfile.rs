//! A hostfile in mpirun's format, and the ssh sessions that start an agent on each of its machines.

use crate::{argument_ranges::MAX_LOCAL_RANKS, cli::TrainArgs, hint::one_line};
use anyhow::{Context, Result, anyhow, bail};
use std::{
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
};

/// Machines of a run; the launcher runs on the first.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Hostfile {
    pub(super) names: Vec<String>,
    /// Ranks of each machine, if the file says so.
    pub(super) slots: Option<usize>,
}

impl Hostfile {
    pub(super) fn read(path: &Path) -> Result<Hostfile> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        Hostfile::parse(&text).map_err(|reason| anyhow!("{}: {reason}", path.display()))
    }

    fn parse(text: &str) -> Result<Hostfile, String> {
        let mut hosts = Hostfile {
            names: Vec::new(),
            slots: None,
        };
        for (number, line) in text.lines().enumerate() {
            let number = number + 1;
            let mut words = line
                .split('#')
                .next()
                .unwrap_or_default()
                .split_whitespace();
            let Some(name) = words.next() else { continue };
            if hosts.names.iter().any(|other| other == name) {
                let name = one_line(name);
                return Err(format!("line {number}: {name} is listed twice"));
            }
            let mut slots = None;
            for word in words {
                let Some(count) = parse_slots(word) else {
                    let word = one_line(word);
                    return Err(format!(
                        "line {number}: {word} is not of the form slots=N, with N from 1 to \
                         {MAX_LOCAL_RANKS}"
                    ));
                };
                slots = Some(count);
            }
            if !hosts.names.is_empty() && slots != hosts.slots {
                return Err(format!(
                    "line {number}: every machine needs the same number of slots"
                ));
            }
            hosts.slots = slots;
            hosts.names.push(name.to_string());
        }
        if hosts.names.is_empty() {
            Err("no machine is listed".into())
        } else {
            Ok(hosts)
        }
    }

    /// Starts the same command in the same folder on the other machines.
    ///
    /// Dropping the sessions ends the commands.
    pub(super) fn start_agents(
        &self,
        args: &TrainArgs,
        head: &str,
        ranks_per_machine: usize,
    ) -> Result<SshSessions> {
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let folder = std::env::current_dir().context("cannot find the current folder")?;
        let start = [
            format!("cd {} && exec", shell_quote(&folder)?),
            shell_quote(&program)?,
            "train".into(),
            shell_quote(&args.config.config)?,
        ];
        let mut words = Vec::from(start);
        for change in &args.config.set {
            words.extend(["--set".into(), shell_quote(Path::new(change))?]);
        }
        let machines = self.names.len();
        let mut sessions = SshSessions(Vec::new());
        for (machine, name) in self.names.iter().enumerate().skip(1) {
            let command = format!(
                "{} --nnodes {machines} --node-rank {machine} --rdzv {head} -n {ranks_per_machine}",
                words.join(" ")
            );
            let mut ssh = Command::new(&args.ssh);
            // Outside the terminal's process group: Ctrl-C reaches only the launcher, which stops
            // the machines in order.
            ssh.arg(name)
                .arg(command)
                .stdin(Stdio::null())
                .process_group(0);
            let child = ssh
                .spawn()
                .with_context(|| format!("cannot start {} for {name}", args.ssh.display()))?;
            sessions.0.push(child);
        }
        Ok(sessions)
    }
}

fn parse_slots(word: &str) -> Option<usize> {
    let count = word.strip_prefix("slots=")?.parse().ok()?;
    (1..=MAX_LOCAL_RANKS as usize)
        .contains(&count)
        .then_some(count)
}

/// One ssh process for each other machine. Dropping this kills them.
pub(super) struct SshSessions(Vec<Child>);

impl Drop for SshSessions {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Quotes a path as one word for a shell.
fn shell_quote(path: &Path) -> Result<String> {
    let Some(text) = path.to_str() else {
        bail!("{}: not valid UTF-8", path.display())
    };
    Ok(format!("'{}'", text.replace('\'', "'\\''")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostfiles_are_read_as_mpirun_reads_them() {
        let hosts = Hostfile::parse("# two\nnode1 slots=4\n\nnode2 slots=4 # the other\n").unwrap();
        assert_eq!(
            hosts,
            Hostfile {
                names: vec!["node1".into(), "node2".into()],
                slots: Some(4)
            }
        );
        assert_eq!(Hostfile::parse("a\nb").unwrap().slots, None);
        for (text, expected) in [
            ("", "no machine is listed"),
            ("a\na", "line 2: a is listed twice"),
            (
                "a slots=2\nb",
                "line 2: every machine needs the same number of slots",
            ),
            ("a slots=x", "line 1: slots=x is not of the form"),
            ("a slots=0", "line 1: slots=0 is not of the form"),
            (
                "a slots=99999999999999999999",
                "is not of the form slots=N, with N from 1 to 4096",
            ),
            (
                "a \u{1b}[2Jslots",
                "line 1: \\u001b[2Jslots is not of the form",
            ),
            ("a\u{7}\na\u{7}", "line 2: a\\u0007 is listed twice"),
        ] {
            assert!(
                Hostfile::parse(text).unwrap_err().contains(expected),
                "{text}"
            );
        }
    }

    #[test]
    fn paths_are_quoted_for_a_shell() {
        assert_eq!(
            shell_quote(Path::new("it's here")).unwrap(),
            "'it'\\''s here'"
        );
    }
}
