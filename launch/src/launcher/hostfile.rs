//! A file with the machines of a run, as mpirun takes it, and starting moerun on them.

use crate::cli::TrainArgs;
use anyhow::{Context, Result, anyhow, bail};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The machines, the launcher's own first.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Hostfile {
    pub(super) names: Vec<String>,
    /// Ranks of each, where the file says so.
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
                return Err(format!("line {number}: {name} is there twice"));
            }
            let mut slots = None;
            for word in words {
                let count = word
                    .strip_prefix("slots=")
                    .and_then(|count| count.parse().ok())
                    .filter(|&count| count > 0);
                slots =
                    Some(count.ok_or_else(|| {
                        format!("line {number}: {word} is not of the form slots=N")
                    })?);
            }
            if !hosts.names.is_empty() && slots != hosts.slots {
                return Err(format!(
                    "line {number}: every machine needs as many slots as the first one"
                ));
            }
            hosts.slots = slots;
            hosts.names.push(name.to_string());
        }
        if hosts.names.is_empty() {
            Err("it names no machine".into())
        } else {
            Ok(hosts)
        }
    }

    /// Starts the same command on the other machines, in the same folder; they end with the sessions that are returned.
    pub(super) fn start_agents(
        &self,
        args: &TrainArgs,
        head: &str,
        per_machine: usize,
    ) -> Result<SshSessions> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let folder = std::env::current_dir().context("cannot find this folder")?;
        let mut sessions = SshSessions(Vec::new());
        for (machine, name) in self.names.iter().enumerate().skip(1) {
            let mut words = vec![
                "cd".to_string(),
                shell_quote(&folder)?,
                "&&".into(),
                "exec".into(),
                shell_quote(&program)?,
            ];
            words.extend(["train".into(), shell_quote(&args.config.config)?]);
            for change in &args.config.set {
                words.extend(["--set".into(), shell_quote(Path::new(change))?]);
            }
            words.push(format!(
                "--nnodes {} --node-rank {machine} --rdzv {head} -n {per_machine}",
                self.names.len()
            ));
            let mut command = Command::new(&args.ssh);
            // Out of the terminal's group: Ctrl-C is the launcher's, which stops the machines in good order.
            command
                .arg(name)
                .arg(words.join(" "))
                .stdin(Stdio::null())
                .process_group(0);
            let child = command
                .spawn()
                .with_context(|| format!("cannot start {} for {name}", args.ssh.display()))?;
            sessions.0.push(child);
        }
        Ok(sessions)
    }
}

/// Connections to other machines.
pub(super) struct SshSessions(Vec<Child>);

impl Drop for SshSessions {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// For a shell.
fn shell_quote(path: &Path) -> Result<String> {
    let Some(text) = path.to_str() else {
        bail!("{} is not text", path.display())
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
            ("", "names no machine"),
            ("a\na", "line 2: a is there twice"),
            ("a slots=2\nb", "line 2: every machine needs as many slots"),
            ("a slots=x", "line 1: slots=x is not of the form"),
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
