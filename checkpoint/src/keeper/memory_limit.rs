//! The memory that a keeper may take.

use std::path::{Path, PathBuf};

/// Returns how many bytes are available on this machine and in this process's control group.
pub(super) fn available_bytes() -> Option<u64> {
    let machine = machine_bytes()?;
    Some(control_group_bytes().map_or(machine, |group| group.min(machine)))
}

/// Returns how much memory this machine has, or this process's control group if that is less.
pub fn total_bytes() -> Option<u64> {
    let machine = meminfo_bytes("MemTotal:")?;
    let group = control_group().and_then(|folder| read_number(&folder.join("memory.max")));
    Some(group.map_or(machine, |group| group.min(machine)))
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

fn read_number(path: &Path) -> Option<u64> {
    read(path)?.trim().parse().ok()
}

fn machine_bytes() -> Option<u64> {
    meminfo_bytes("MemAvailable:")
}

fn meminfo_bytes(name: &str) -> Option<u64> {
    let text = read(Path::new("/proc/meminfo"))?;
    let kib: u64 = text
        .lines()
        .find(|line| line.starts_with(name))?
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()?;
    Some(kib * 1024)
}

/// Returns what is left in a control group of version 2, if there is a limit.
fn control_group_bytes() -> Option<u64> {
    let folder = control_group()?;
    let most = read_number(&folder.join("memory.max"))?;
    let used = read_number(&folder.join("memory.current"))?;
    Some(most.saturating_sub(used))
}

/// Returns the folder of this process's control group of version 2.
fn control_group() -> Option<PathBuf> {
    let groups = read(Path::new("/proc/self/cgroup"))?;
    // Version 2 has one line, `0::PATH`.
    let path = groups
        .lines()
        .find_map(|line| line.strip_prefix("0::"))?
        .trim_start_matches('/');
    Some(Path::new("/sys/fs/cgroup").join(path))
}

/// Formats a number of bytes in MiB, as messages show it.
pub fn format_mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / 1048576.0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_machine_has_memory() {
        assert!(super::available_bytes().is_some_and(|bytes| bytes > 1 << 20));
        assert!(super::total_bytes() >= super::available_bytes());
        assert_eq!(super::format_mib(3 << 19), "1.5 MiB");
    }
}
