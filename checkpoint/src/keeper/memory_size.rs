//! Amounts of memory as text.

/// Formats a number of bytes in MiB, as messages show it.
pub fn format_mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / 1048576.0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_are_shown_in_mib() {
        assert_eq!(super::format_mib(3 << 19), "1.5 MiB");
    }
}
