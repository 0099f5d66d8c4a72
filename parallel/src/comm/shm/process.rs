//! Process identities, by which ranks notice that another has exited.

/// Returns this process's id and start time in one number.
pub(super) fn process_identity() -> u64 {
    let process = std::process::id();
    u64::from(process) << 32 | start_ticks(process).unwrap_or(0)
}

/// True if the process with this identity still runs.
pub(super) fn is_alive(identity: u64) -> bool {
    let process = (identity >> 32) as u32;
    identity == 0 || start_ticks(process) == Some(identity & 0xffff_ffff)
}

/// Returns the lower half of a process's start time in kernel ticks, or `None` after its exit.
fn start_ticks(process: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in parentheses may contain anything. The state follows it; the time is field 22.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let has_exited = matches!(fields.next()?, "Z" | "X");
    let ticks: u64 = fields.nth(18)?.parse().ok()?;
    (!has_exited).then_some(ticks & 0xffff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_exited_is_not_alive() {
        assert!(is_alive(process_identity()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        // The child may be a zombie already.
        let ticks = start_ticks(child.id()).unwrap_or(1);
        let identity = u64::from(child.id()) << 32 | ticks;
        child.wait().unwrap();
        assert!(!is_alive(identity));
        assert!(!is_alive(process_identity() ^ 1));
    }
}
