//! How much memory a keeper may take.

use std::path::Path;

/// Bytes that this machine, or the control group this process is in, has left.
pub(crate) fn available_bytes() -> Option<u64> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let text = read(Path::new("/proc/meminfo"))?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let machine = line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024;
    let group = read(Path::new("/proc/self/cgroup")).and_then(|groups| {
        // Control groups of version 2 have one line, `0::PATH`.
        let path = groups
            .lines()
            .find_map(|line| line.strip_prefix("0::"))?
            .trim_start_matches('/')
            .to_string();
        let folder = Path::new("/sys/fs/cgroup").join(path);
        let number = |name: &str| read(&folder.join(name))?.trim().parse::<u64>().ok();
        Some(number("memory.max")?.saturating_sub(number("memory.current")?))
    });
    Some(group.map_or(machine, |group| group.min(machine)))
}

/// Bytes as people read them.
pub fn format_mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / 1048576.0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_machine_says_what_it_has() {
        assert!(super::available_bytes().is_some_and(|bytes| bytes > 1 << 20));
        assert_eq!(super::format_mib(3 << 19), "1.5 MiB");
    }
}
