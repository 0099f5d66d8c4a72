//! The memory that processes of this machine may take: the machine's own, and the limits of control
//! groups, of versions 1 and 2, from this process's group up to the root.

use std::path::{Component, Path, PathBuf};

/// Returns how many bytes are available on this machine and in this process's control groups.
pub fn available_bytes() -> Option<u64> {
    Machine::default().available_bytes()
}

/// Returns how much memory this machine has, or this process's control groups if that is less.
pub fn total_bytes() -> Option<u64> {
    Machine::default().total_bytes()
}

/// The file systems that the kernel reports memory in.
struct Machine {
    proc: PathBuf,
    control_groups: PathBuf,
}

impl Default for Machine {
    fn default() -> Machine {
        Machine {
            proc: "/proc".into(),
            control_groups: "/sys/fs/cgroup".into(),
        }
    }
}

/// The names of the files of one version of control groups.
struct Version {
    limits: &'static [&'static str],
    usage: &'static str,
    /// The memory that the kernel can take back at once, in `memory.stat`.
    reclaimable: &'static str,
}

const VERSION_1: Version = Version {
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};
const VERSION_2: Version = Version {
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    reclaimable: "inactive_file",
};
/// Limits from here on stand for none: version 1 has no word for it.
const NO_LIMIT: u64 = 1 << 60;

/// The control group of this process in one hierarchy.
struct Group {
    version: &'static Version,
    /// The folder at which the hierarchy is mounted.
    mount: PathBuf,
    folder: PathBuf,
}

impl Machine {
    fn available_bytes(&self) -> Option<u64> {
        let mut available = self.meminfo_bytes("MemAvailable:")?;
        for group in self.groups() {
            for folder in group.levels() {
                let Some(limit) = group.version.limit(folder) else {
                    continue;
                };
                let used = group.version.used(folder);
                available = available.min(limit.saturating_sub(used));
            }
        }
        Some(available)
    }

    fn total_bytes(&self) -> Option<u64> {
        let mut total = self.meminfo_bytes("MemTotal:")?;
        for group in self.groups() {
            for folder in group.levels() {
                let limit = group.version.limit(folder);
                total = total.min(limit.unwrap_or(u64::MAX));
            }
        }
        Some(total)
    }

    fn meminfo_bytes(&self, name: &str) -> Option<u64> {
        let text = read(&self.proc.join("meminfo"))?;
        Some(number_after(&text, name)?.saturating_mul(1024))
    }

    /// Returns the groups of this process that can limit memory: one per hierarchy.
    fn groups(&self) -> Vec<Group> {
        let text = read(&self.proc.join("self/cgroup")).unwrap_or_default();
        text.lines().filter_map(|line| self.group(line)).collect()
    }

    /// Parses a line `NUMBER:CONTROLLERS:PATH`. Version 2 has no controllers in it.
    fn group(&self, line: &str) -> Option<Group> {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next()?;
        let path = fields.next()?;
        let (version, mount) = if controllers.is_empty() {
            (&VERSION_2, self.unified_mount())
        } else if controllers.split(',').any(|name| name == "memory") {
            (&VERSION_1, self.control_groups.join("memory"))
        } else {
            return None;
        };
        let mut folder = mount.clone();
        // A group outside this container's view is shown as `/../name`: only the mount is here.
        for part in Path::new(path).components() {
            match part {
                Component::Normal(name) => folder.push(name),
                Component::ParentDir => folder = mount.clone(),
                _ => {}
            }
        }
        // In a container without its own view, the path is that of the host, and the mount itself
        // is the container's group.
        if !folder.is_dir() {
            folder = mount.clone();
        }
        Some(Group {
            version,
            mount,
            folder,
        })
    }

    /// Returns the mount of version 2, which is below that of version 1 if both are there.
    fn unified_mount(&self) -> PathBuf {
        let hybrid = self.control_groups.join("unified");
        if hybrid.is_dir() {
            hybrid
        } else {
            self.control_groups.clone()
        }
    }
}

impl Group {
    /// Returns the folders from the process's own group to the root of the hierarchy.
    fn levels(&self) -> impl Iterator<Item = &Path> {
        let mount = &self.mount;
        self.folder
            .ancestors()
            .take_while(move |folder| folder.starts_with(mount))
    }
}

impl Version {
    /// Returns the smallest limit of a group itself.
    fn limit(&self, folder: &Path) -> Option<u64> {
        let mut smallest = None;
        for name in self.limits {
            // `max` stands for none.
            let limit = read(&folder.join(name)).and_then(|text| text.trim().parse().ok());
            smallest = smallest.into_iter().chain(limit).min();
        }
        // A parent's limit may be visible here although the parent is not.
        if let Some(stat) = read(&folder.join("memory.stat")) {
            let inherited = number_after(&stat, "hierarchical_memory_limit");
            smallest = smallest.into_iter().chain(inherited).min();
        }
        smallest.filter(|&limit| limit < NO_LIMIT)
    }

    /// Returns the memory that a group uses, without what the kernel takes back when needed.
    fn used(&self, folder: &Path) -> u64 {
        let used = read(&folder.join(self.usage));
        let used: u64 = used.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        let stat = read(&folder.join("memory.stat")).unwrap_or_default();
        used.saturating_sub(number_after(&stat, self.reclaimable).unwrap_or(0))
    }
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// Returns the number on the line that begins with the word `name`.
fn number_after(text: &str, name: &str) -> Option<u64> {
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() == Some(name) {
            return words.next()?.parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, write};

    const GIB: u64 = 1 << 30;

    /// A machine with 64 GiB, of which 32 are available.
    struct Fake {
        folder: tempfile::TempDir,
    }

    impl Fake {
        fn new(own_groups: &str) -> Fake {
            let fake = Fake {
                folder: tempfile::tempdir().unwrap(),
            };
            let meminfo = "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 33554432 kB\n";
            fake.write("proc/meminfo", meminfo);
            fake.write("proc/self/cgroup", own_groups);
            fake
        }

        fn write(&self, path: &str, text: impl ToString) -> &Fake {
            let path = self.folder.path().join(path);
            create_dir_all(path.parent().unwrap()).unwrap();
            write(path, text.to_string()).unwrap();
            self
        }

        /// Checks the total and the available GiB.
        #[track_caller]
        fn expect(&self, total: u64, available: u64) {
            let machine = Machine {
                proc: self.folder.path().join("proc"),
                control_groups: self.folder.path().join("sys"),
            };
            assert_eq!(machine.total_bytes(), Some(total * GIB));
            assert_eq!(machine.available_bytes(), Some(available * GIB));
        }
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(available_bytes().is_some_and(|bytes| bytes > 1 << 20));
        assert!(total_bytes() >= available_bytes());
    }

    #[test]
    fn without_limits_the_machine_counts() {
        Fake::new("").expect(64, 32);
        let fake = Fake::new("0::/user\n");
        fake.write("sys/user/memory.max", "max\n").expect(64, 32);
    }

    #[test]
    fn limits_of_version_2_hold_at_any_level() {
        let fake = Fake::new("0::/slurm/job_7/step_0\n");
        fake.write("sys/slurm/job_7/step_0/memory.max", "max\n");
        fake.write("sys/slurm/job_7/step_0/memory.current", GIB);
        fake.expect(64, 32);
        fake.write("sys/slurm/job_7/memory.max", 16 * GIB);
        fake.write("sys/slurm/job_7/memory.current", 6 * GIB);
        fake.expect(16, 10);
        // The kernel slows processes down from this one on.
        fake.write("sys/slurm/job_7/step_0/memory.high", 8 * GIB);
        fake.expect(8, 7);
        // The pages of files that are read are no reason to refuse.
        let stat = format!("anon 1\ninactive_file {}\n", 4 * GIB);
        fake.write("sys/slurm/job_7/memory.stat", stat);
        fake.write("sys/slurm/job_7/memory.current", 14 * GIB);
        fake.expect(8, 6);
    }

    #[test]
    fn limits_of_version_1_hold_at_any_level() {
        let fake = Fake::new("5:cpu,cpuacct:/x\n4:memory:/docker/abc\n1:name=systemd:/x\n0::/x\n");
        fake.write("sys/unified/x/cgroup.procs", "");
        fake.write(
            "sys/memory/docker/abc/memory.limit_in_bytes",
            i64::MAX - 4095,
        );
        fake.write("sys/memory/docker/abc/memory.usage_in_bytes", 2 * GIB);
        fake.expect(64, 32);
        fake.write("sys/memory/docker/abc/memory.limit_in_bytes", 12 * GIB);
        fake.expect(12, 10);
        fake.write("sys/memory/docker/memory.limit_in_bytes", 10 * GIB);
        fake.write("sys/memory/docker/memory.usage_in_bytes", 7 * GIB);
        fake.expect(10, 3);
        let stat = format!(
            "total_inactive_file {GIB}\nhierarchical_memory_limit {}\n",
            9 * GIB
        );
        fake.write("sys/memory/docker/memory.stat", stat);
        fake.expect(9, 3);
    }

    #[test]
    fn a_container_sees_its_own_group_at_the_mount() {
        // The path is that of the host, of which the container sees nothing else.
        let fake = Fake::new("4:memory:/kubepods/pod1/c2\n");
        fake.write("sys/memory/memory.limit_in_bytes", 4 * GIB);
        fake.write("sys/memory/memory.usage_in_bytes", GIB);
        fake.expect(4, 3);
        let fake = Fake::new("0::/../../other\n");
        fake.write("sys/memory.max", 4 * GIB)
            .write("sys/memory.current", GIB);
        fake.expect(4, 3);
    }
}
