//! Checks against the device of a rank, which the configuration does not show.

use crate::config::Config;
use moe::experts::has_fp8_kernel;

impl Config {
    /// Returns the reason why a rank cannot run on its device, if there is one.
    /// `compute_capability` is that of an NVIDIA GPU, and None for other devices.
    pub fn device_problem(&self, compute_capability: Option<(i32, i32)>) -> Option<String> {
        let (major, minor) = compute_capability.filter(|_| self.train.fp8_experts)?;
        (!has_fp8_kernel(major)).then(|| {
            format!(
                "train.fp8_experts needs a GPU of compute capability 9 (Hopper), for which alone \
                 libtorch 2.11.0 has the kernel, and this one has {major}.{minor}: leave \
                 fp8_experts out, which computes the experts in bf16"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::optim::schedule::tests::config;

    #[test]
    fn experts_in_8_bits_are_refused_on_all_gpus_but_hopper() {
        let mut config = config("steps: 100, global_batch: 4 | constant: {lr: 1.0}");
        let capabilities = [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)];
        for capability in capabilities {
            assert_eq!(config.device_problem(Some(capability)), None);
        }
        config.train.fp8_experts = true;
        assert_eq!(config.device_problem(None), None);
        for (major, minor) in capabilities {
            let problem = config.device_problem(Some((major, minor)));
            assert_eq!(
                problem.is_none(),
                major == 9,
                "{major}.{minor}: {problem:?}"
            );
            let names_it = |problem: String| {
                let texts = ["train.fp8_experts".to_string(), format!("{major}.{minor}")];
                texts.iter().all(|text| problem.contains(text))
            };
            assert!(problem.is_none_or(names_it), "{major}.{minor}");
        }
    }
}
