//! A hostfile in mpirun's format, and the ssh sessions that start an agent on each of its machines.

use crate::{argument_ranges::MAX_LOCAL_RANKS, cli::TrainArgs, hint::one_line};
use anyhow::{Context, Result, anyhow, bail};
use std::{
    io::Write,
    net::{Ipv6Addr, SocketAddr},
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
            check_host(name).map_err(|reason| {
                let name = one_line(name);
                format!("line {number}: {name} is no host: {reason}")
            })?;
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

    /// Returns the host of this machine as the rendezvous needs it: without a user's name, and
    /// brackets around an IPv6 address.
    pub(super) fn own_host(&self) -> String {
        let name = &self.names[0];
        let host = name
            .rsplit_once('@')
            .map_or(name.as_str(), |(_, host)| host);
        match host.parse::<Ipv6Addr>() {
            Ok(address) => format!("[{address}]"),
            Err(_) => host.to_string(),
        }
    }

    /// Starts the same command in the same folder on the other machines.
    ///
    /// Dropping the sessions ends the commands.
    ///
    /// # Errors
    /// If the ssh program cannot be started.
    pub(super) fn start_agents(&self, start: &AgentStart) -> Result<SshSessions> {
        let command = start.command(self.names.len())?;
        let program = start.args.ssh.display();
        let mut sessions = SshSessions(Vec::new());
        for (machine, name) in self.names.iter().enumerate().skip(1) {
            let has_input = !start.input.is_empty();
            let stdin = if has_input {
                Stdio::piped()
            } else {
                Stdio::null()
            };
            let mut ssh = Command::new(&start.args.ssh);
            // Outside the terminal's process group: Ctrl-C reaches only the launcher, which stops
            // the machines in order.
            ssh.args(["--", ssh_host(name)])
                .arg(format!("{command} --node-rank {machine}"))
                .stdin(stdin)
                .process_group(0);
            let child = ssh.spawn();
            let child = child.with_context(|| format!("cannot start {program} for {name}"))?;
            sessions.0.push(child);
            let stdin = sessions.0.last_mut().and_then(|child| child.stdin.take());
            if let Some(mut stdin) = stdin {
                // A session that has ended already is missed when its agent does not join.
                let _ = writeln!(stdin, "{}", start.input);
            }
        }
        Ok(sessions)
    }
}

/// The command that starts agents.
pub(super) struct AgentStart<'a> {
    pub(super) args: &'a TrainArgs,
    /// Address of the launcher. A host's name may mean something else on another machine.
    pub(super) head: SocketAddr,
    pub(super) ranks_per_machine: usize,
    /// The line on the standard input of each agent, by which it knows the run's token;
    /// empty for none. Others could read an argument.
    pub(super) input: &'a str,
}

impl AgentStart<'_> {
    /// Returns the command for a shell of another machine, except for the machine's number.
    fn command(&self, machines: usize) -> Result<String> {
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let folder = std::env::current_dir().context("cannot find the current folder")?;
        let mut words = vec![
            format!("cd {} && exec", shell_quote(&folder)?),
            shell_quote(&program)?,
            "train".into(),
            shell_quote(&self.args.config.config)?,
        ];
        for change in &self.args.config.set {
            words.extend(["--set".into(), shell_quote(Path::new(change))?]);
        }
        let head = self.head.to_string();
        let ranks = self.ranks_per_machine;
        words.push(format!("--nnodes {machines} -n {ranks}"));
        // A shell would take the brackets of an IPv6 address for a pattern.
        words.extend(["--rdzv".into(), shell_quote(Path::new(&head))?]);
        if !self.input.is_empty() {
            words.push("--token-stdin".into());
        }
        Ok(words.join(" "))
    }
}

/// Refuses the name of a machine that ssh could take for something else than a host.
fn check_host(name: &str) -> Result<(), String> {
    let (user, host) = name.rsplit_once('@').unwrap_or(("user", name));
    for part in [user, host] {
        if part.starts_with('-') {
            return Err("it begins with '-'".into());
        }
        if part.is_empty() {
            return Err("a part of it is empty".into());
        }
    }
    let is_word = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_');
    let strange = user.chars().find(|&c| !is_word(c));
    let is_host = |c: char| is_word(c) || matches!(c, ':' | '%' | '[' | ']');
    match strange.or(host.chars().find(|&c| !is_host(c))) {
        Some(c) => Err(format!("{c:?} is not possible in a name")),
        None => Ok(()),
    }
}

/// Returns the host as ssh takes it: without brackets around an IPv6 address.
fn ssh_host(name: &str) -> &str {
    let inner = name
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    inner.unwrap_or(name)
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
    use crate::mutated::{MUTATIONS, mutated};
    use proptest::prelude::*;

    const TWO_HOSTS: &[u8] = b"# two\nnode1 slots=4\n\nfd00::2 slots=4\n";

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(MUTATIONS))]

        #[test]
        fn mutated_hostfiles(text in mutated(TWO_HOSTS.to_vec())) {
            let _ = Hostfile::parse(&String::from_utf8_lossy(&text));
        }
    }

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
            (
                "a\u{7}",
                "line 1: a\\u0007 is no host: '\\u{7}' is not possible",
            ),
            ("a\n-V slots=1", "line 2: -V is no host: it begins with '-'"),
            (
                "-oProxyCommand=touch${IFS}x slots=1",
                "line 1: -oProxyCommand=touch${IFS}x is no host: it begins with '-'",
            ),
            ("me@-oX", "line 1: me@-oX is no host: it begins with '-'"),
            ("-l@a", "line 1: -l@a is no host: it begins with '-'"),
            ("me@", "line 1: me@ is no host: a part of it is empty"),
            (
                "a;reboot",
                "line 1: a;reboot is no host: ';' is not possible",
            ),
            ("a$(id)", "'$' is not possible"),
            ("a=b", "'=' is not possible"),
            ("m e@a", "line 1: e@a is not of the form slots=N"),
            ("a\u{0}b", "'\\0' is not possible"),
        ] {
            assert!(
                Hostfile::parse(text).unwrap_err().contains(expected),
                "{text}"
            );
        }
    }

    #[test]
    fn users_and_addresses_are_hosts() {
        let hosts = Hostfile::parse("me@node-1.site\n10.0.0.2\nfd00::2\n[fd00::3]\n").unwrap();
        assert_eq!(hosts.own_host(), "node-1.site");
        assert_eq!(ssh_host(&hosts.names[3]), "fd00::3");
        let hosts = Hostfile::parse("fd00::2").unwrap();
        assert_eq!(hosts.own_host(), "[fd00::2]");
    }

    #[test]
    fn paths_are_quoted_for_a_shell() {
        assert_eq!(
            shell_quote(Path::new("it's here")).unwrap(),
            "'it'\\''s here'"
        );
    }
}
