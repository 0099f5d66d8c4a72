//! Environment variables for the libraries of a device, which read them when they are loaded.

use crate::{cli::ConfigArgs, config_file, environment, hint::hinted};
use anyhow::{Result, anyhow};
use trainer::config::Config;

/// Settings of libtorch's caching allocator, under its present and its older name.
const ALLOCATOR: &str = "PYTORCH_ALLOC_CONF";
const OLD_ALLOCATOR: &str = "PYTORCH_CUDA_ALLOC_CONF";
/// Sizes and number of cuBLAS's work areas. With these its sums have a fixed order.
const CUBLAS: &str = "CUBLAS_WORKSPACE_CONFIG";

/// Sets what the ranks of this run need, of this process and its children, unless it is set. To be
/// called before any thread starts.
pub(crate) fn set_defaults(args: &ConfigArgs) {
    if environment::launched_by_moerun() {
        // The launcher has set them.
        return;
    }
    let Ok(config) = config_file::load(args) else {
        // The command reports that.
        return;
    };
    let kind = parallel::device_kind(&config.run.device);
    let missing = defaults(kind, config.run.deterministic, is_set);
    // A profiler may have started threads in this process.
    if let Err(error) = torch_ext::set_variables(&missing) {
        let list = missing
            .iter()
            .map(|(name, value)| format!("{name}={value}"));
        let list = list.collect::<Vec<_>>().join(" ");
        eprintln!("warning: {error}\nhint: start moerun with {list}");
    }
}

/// Refuses a rank on a GPU without the variable that `run.deterministic` needs.
///
/// # Errors
/// If it could not be set, or another machine's file does not have the key.
pub(crate) fn refuse_missing(config: &Config) -> Result<()> {
    let kind = parallel::device_kind(&config.run.device);
    if !config.run.deterministic || kind != "cuda" || is_set(CUBLAS) {
        return Ok(());
    }
    Err(hinted(
        anyhow!("run.deterministic needs {CUBLAS}, which is not set"),
        format!("set {CUBLAS}=:4096:8 where this machine's moerun starts"),
    ))
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some()
}

/// Returns the variables that ranks on this kind of device need and that are not set.
///
/// - Routed tokens differ from step to step, so freed blocks rarely fit: expandable segments join
///   them.
/// - CUDA's default is 8 hardware queues, and a rank has more streams than that.
fn defaults(
    kind: &str,
    deterministic: bool,
    is_set: impl Fn(&str) -> bool,
) -> Vec<(&'static str, &'static str)> {
    if kind != "cuda" {
        return Vec::new();
    }
    let mut variables = vec![("CUDA_DEVICE_MAX_CONNECTIONS", "32")];
    if !is_set(OLD_ALLOCATOR) {
        variables.push((ALLOCATOR, "expandable_segments:True"));
    }
    if deterministic {
        variables.push((CUBLAS, ":4096:8"));
    }
    variables.retain(|(name, _)| !is_set(name));
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set_for(kind: &str, deterministic: bool, given: &[&str]) -> String {
        let missing = defaults(kind, deterministic, |name| given.contains(&name));
        let text = missing
            .iter()
            .map(|(name, value)| format!("{name}={value}"));
        text.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_gpu_gets_expandable_segments_and_queues() {
        let all = "CUDA_DEVICE_MAX_CONNECTIONS=32 PYTORCH_ALLOC_CONF=expandable_segments:True";
        assert_eq!(set_for("cuda", false, &[]), all);
        let repeats = format!("{all} CUBLAS_WORKSPACE_CONFIG=:4096:8");
        assert_eq!(set_for("cuda", true, &[]), repeats);
    }

    #[test]
    fn variables_of_the_user_stay() {
        let queues = "CUDA_DEVICE_MAX_CONNECTIONS=32";
        for allocator in [ALLOCATOR, OLD_ALLOCATOR] {
            assert_eq!(set_for("cuda", true, &[allocator, CUBLAS]), queues);
        }
        let all = [ALLOCATOR, "CUDA_DEVICE_MAX_CONNECTIONS", CUBLAS];
        assert_eq!(set_for("cuda", true, &all), "");
    }

    #[test]
    fn other_devices_get_nothing_of_cuda() {
        assert_eq!(set_for("cpu", true, &[]), "");
        assert_eq!(set_for("npu", true, &[]), "");
    }
}
