//! Environment variables that libraries read when they are loaded.

use crate::Error;

/// Sets environment variables of this process and its children.
///
/// # Errors
/// If the process has started a thread, which might read the environment at the same time, or a
/// name or value is none.
pub fn set_variables(variables: &[(&str, &str)]) -> Result<(), Error> {
    let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count);
    let threads = threads.map_err(|error| Error::new(format!("/proc/self/task: {error}")))?;
    for (name, value) in variables {
        if threads > 1 {
            return Err(Error::new(format!(
                "{name} cannot be set by a process with {threads} threads"
            )));
        }
        let is_text = |text: &str| !text.is_empty() && !text.contains(['=', '\0']);
        if !is_text(name) || value.contains('\0') {
            return Err(Error::new(format!("{name:?} cannot be set to {value:?}")));
        }
        // SAFETY: this is the process's only thread.
        unsafe { std::env::set_var(name, value) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_sets_no_variable() {
        // The test harness runs each test in a thread.
        let error = set_variables(&[("MOERUN_TEST_VARIABLE", "1")]).unwrap_err();
        assert!(error.to_string().contains("threads"), "{error}");
        assert_eq!(std::env::var_os("MOERUN_TEST_VARIABLE"), None);
        assert!(set_variables(&[]).is_ok());
    }
}
