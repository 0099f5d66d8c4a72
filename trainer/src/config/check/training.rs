//! Checks of data, training, snapshots and restarts.

use super::problems::Problems;
use crate::config::{Config, Dtype, ParityConfig, RedundancyConfig, ScheduleConfig};

/// Smallest `optimizer.eps` that keeps updates finite with bf16 gradients.
const MIN_BF16_EPS: f64 = 1e-12;

/// Widths of fp8 matrices are multiples of this.
const FP8_WIDTH: usize = 16;

/// The numbers that all learning-rate schedules have.
struct ScheduleNumbers {
    lr: f64,
    warmup_steps: u64,
    decay_steps: u64,
}

impl ScheduleNumbers {
    fn new(schedule: &ScheduleConfig) -> ScheduleNumbers {
        match schedule {
            ScheduleConfig::Power(power) => ScheduleNumbers {
                lr: power.a.min(power.max_lr),
                warmup_steps: power.warmup_steps,
                decay_steps: power.decay_steps,
            },
            ScheduleConfig::Wsd(wsd) => ScheduleNumbers {
                lr: wsd.lr,
                warmup_steps: wsd.warmup_steps,
                decay_steps: wsd.decay_steps,
            },
            ScheduleConfig::Cosine(ramp) | ScheduleConfig::Linear(ramp) => ScheduleNumbers {
                lr: ramp.lr,
                warmup_steps: ramp.warmup_steps,
                decay_steps: 0,
            },
            ScheduleConfig::Constant(constant) => ScheduleNumbers {
                lr: constant.lr,
                warmup_steps: constant.warmup_steps,
                decay_steps: 0,
            },
        }
    }
}

impl Config {
    pub(super) fn check_data(&self, problems: &mut Problems) {
        let data = &self.data;
        problems.positive("data.sequence_length", data.sequence_length);
        if data.train.is_empty() {
            problems.add(
                "data.train lists no source: prepare one with 'moerun data prepare' and name it",
            );
        }
        for (key, sources) in [("train", &data.train), ("validation", &data.validation)] {
            for (index, source) in sources.iter().enumerate() {
                problems.above_zero(&format!("data.{key}[{index}].weight"), source.weight);
            }
        }
        let vocab_size = self.model.vocab_size;
        if let Some(token) = data.eod_token
            && token as usize >= vocab_size
        {
            problems.add(format!(
                "data.eod_token {token} is outside of model.vocab_size {vocab_size}"
            ));
        }
        if let Some(validation) = &self.validation {
            problems.positive("validation.sequences", validation.sequences);
            problems.positive("validation.every", validation.every as usize);
            if data.validation.is_empty() {
                problems.add("there is a validation section, but data.validation lists no source");
            }
        }
    }

    pub(super) fn check_snapshots(&self, ranks: usize, problems: &mut Problems) {
        let snapshot = &self.snapshot;
        let restart = &self.restart;
        problems.positive("snapshot.nodes_per_domain", snapshot.nodes_per_domain);
        problems.positive("restart.window_s", restart.window_s as usize);
        if let Some(gib) = snapshot.memory_gib {
            problems.above_zero("snapshot.memory_gib", gib);
        }
        problems.above_zero("restart.heartbeat_timeout_s", restart.heartbeat_timeout_s);
        if let Some(seconds) = restart.step_timeout_s {
            problems.above_zero("restart.step_timeout_s", seconds);
        }
        match snapshot.redundancy {
            RedundancyConfig::Copies(copies) => {
                problems.positive("snapshot.redundancy.copies", copies);
            }
            RedundancyConfig::Parity(ParityConfig { data, parity }) => {
                problems.positive("snapshot.redundancy.parity.data", data);
                problems.positive("snapshot.redundancy.parity.parity", parity);
            }
            RedundancyConfig::Auto | RedundancyConfig::None => {}
        }
        if let Err(reason) = self.protection(self.nodes(ranks).len()) {
            let per_node = self.parallel.ranks_per_node.unwrap_or(ranks);
            problems.add(format!(
                "snapshot.redundancy: {reason} (nodes are groups of parallel.ranks_per_node \
                 ranks, here {ranks} of {per_node})"
            ));
        }
    }

    pub(super) fn check_training(&self, problems: &mut Problems) {
        let run = &self.run;
        let train = &self.train;
        problems.positive("train.steps", train.steps as usize);
        problems.positive("train.global_batch", train.global_batch);
        problems.positive("train.micro_batch", train.micro_batch);
        problems.positive("checkpoint.keep", self.checkpoint.keep);
        problems.above_zero("parallel.bucket_mib", self.parallel.bucket_mib);
        problems.positive("run.timeout_s", run.timeout_s as usize);
        problems.positive("run.log_every", run.log_every as usize);
        if !["auto", "cpu", "cuda", "npu"].contains(&run.device.as_str()) {
            problems.add(format!(
                "run.device is {:?}; use auto, cpu, cuda or npu",
                run.device
            ));
        }
        if train.grad_clip.is_nan() || train.grad_clip < 0.0 {
            problems.add(format!(
                "train.grad_clip is {}; use 0 for no limit",
                train.grad_clip
            ));
        }
        self.check_schedule(problems);
        self.check_fp8_experts(problems);
        if train.dtype == Dtype::Bf16 && self.optimizer.eps < MIN_BF16_EPS {
            problems.add(format!(
                "optimizer.eps is {}; with bf16 gradients use at least {MIN_BF16_EPS:e}",
                self.optimizer.eps
            ));
        }
    }

    fn check_schedule(&self, problems: &mut Problems) {
        if let ScheduleConfig::Power(power) = &self.schedule
            && (power.b.is_nan() || power.b >= 0.0)
        {
            problems.add(format!(
                "schedule.power.b is {}; the exponent must be below 0",
                power.b
            ));
        }
        let ScheduleNumbers {
            lr,
            warmup_steps,
            decay_steps,
        } = ScheduleNumbers::new(&self.schedule);
        problems.above_zero("the schedule's learning rate", lr);
        let scheduled = warmup_steps + decay_steps;
        let steps = self.train.steps;
        if scheduled > steps {
            problems.add(format!(
                "the schedule's warmup_steps {warmup_steps} + decay_steps {decay_steps} = \
                 {scheduled} is more than train.steps {steps}"
            ));
        }
    }

    fn check_fp8_experts(&self, problems: &mut Problems) {
        if !self.train.fp8_experts {
            return;
        }
        let Some(moe) = &self.model.moe else {
            problems.add("train.fp8_experts needs experts: give model.moe, or leave it out");
            return;
        };
        let ffn = moe.ffn / self.parallel.expert_tensor.max(1);
        let widths = [self.model.hidden, ffn];
        if widths.iter().any(|width| !width.is_multiple_of(FP8_WIDTH)) {
            problems.add(format!(
                "train.fp8_experts multiplies matrices whose widths are multiples of \
                 {FP8_WIDTH}; model.hidden and each rank's part of model.moe.ffn are {widths:?}"
            ));
        } else if self.train.dtype != Dtype::Bf16 {
            problems.add("train.fp8_experts needs train.dtype: bf16, which its results are in");
        }
    }
}
