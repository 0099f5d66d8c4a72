//! One optimizer step: forward and backward of all microbatches, one exchange of the step's
//! figures, and the update.

use super::{
    Trainer,
    metrics::{
        records::{QkClipMetrics, StepMetrics},
        report::StepResults,
        summed_figures::SummedFigures,
    },
    microbatch::HostMicrobatches,
    own_figures::{StepFlags, StepLosses},
    passes::StepPlan,
    qk_clip,
    snapshots::ReservedSlot,
    stages::{StepInputs, StepStages},
    step_sums::{LossTerms, StepSums},
};
use crate::{
    Error,
    optim::{schedule::learning_rate, squared_norms},
    scalars::fetch_scalars,
};
use moe::balance::{BalanceScope, BatchTotals};
use parallel::{GradientBuckets, ReduceOp, pipeline::Schedule};
use std::time::Instant;
use tch::Tensor;

/// Results of forward and backward on this rank.
struct Accumulated {
    sums: StepSums,
    /// Counted tokens of all ranks.
    counted_tokens: u64,
}

/// Figures of a step that the host fetches from the device.
struct Fetched {
    /// Norm of all gradients of the model.
    grad_norm: f64,
    losses: StepLosses,
}

/// Changes that a step made.
struct Update {
    lr: f64,
    /// `None` if experts stay on their ranks: `model.moe.placement` is not set.
    moved_experts: Option<u64>,
    /// Attention logits of the step, if `optimizer.qk_clip` is set.
    qk_clip: Option<QkClipMetrics>,
}

impl Trainer {
    /// Runs one optimizer step. Returns its metrics, and true if `stop` was true on any rank.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If data cannot be read, a collective fails, or the loss is not finite.
    pub fn train_step(&mut self, stop: bool) -> Result<(StepMetrics, bool), Error> {
        let started = Instant::now();
        let step = self.step() + 1;
        self.reports.trace.begin(step, &self.config.run);
        self.data.position.skip_batches(&self.config);
        let Accumulated {
            sums,
            counted_tokens,
        } = self.accumulate()?;
        let Fetched { grad_norm, losses } = self.fetch(&sums.losses)?;
        let reserved = self.reserve_slot()?;
        let snapshot_due = reserved.is_some();
        let flags = StepFlags {
            stop,
            lacks_slot: reserved.as_ref().is_some_and(ReservedSlot::is_lacking),
        };
        let summed = self
            .own_figures(&sums, losses, flags)?
            .sum(&self.rank.world)?;
        self.refuse_divergence(&summed, grad_norm)?;
        let figures = &summed.step;
        self.durability
            .finish_copy(snapshot_due, figures, self.rank.world.size());
        let update = self.update(&summed, grad_norm)?;
        let step_tokens = self.data.position.step_tokens(&self.config);
        self.data.position.complete_step(&self.config);
        self.durability
            .complete_step(step, reserved, figures, update.moved_experts);
        let seconds = started.elapsed().as_secs_f64();
        self.durability.last_step_seconds = seconds;
        self.reports.trace.end(self.rank.world.rank());
        let stops = figures.stopping_ranks > 0.0;
        let metrics = summed.into_metrics(StepResults {
            step,
            counted_tokens,
            lr: update.lr,
            grad_norm,
            step_tokens,
            tokens: self.data.position.tokens,
            epochs: self.data.most_epochs(),
            seconds,
            moved_experts: update.moved_experts,
            qk_clip: update.qk_clip,
            snapshot: self.durability.metrics().filter(|_| snapshot_due),
            stage_ranks: self.rank.world.size() / self.rank.mesh.shape().pipeline,
            expert_slices: self.rank.mesh.shape().expert_tensor,
            times_passes: self.rank.device.computes_on_host(),
        });
        Ok((metrics, stops))
    }

    /// Computes losses and gradients of the next step without the update and returns the gradient
    /// norm. For tests and tools.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If data cannot be read or a collective fails.
    pub fn forward_backward(&self) -> Result<f64, Error> {
        self.accumulate()?;
        let parameters = &self.model.parameters;
        self.optimizer.grad_norm(parameters, &self.passes.gradients)
    }

    /// Fetches the losses of this rank, and with them the squares of which the norm is made.
    fn fetch(&self, terms: &LossTerms) -> Result<Fetched, Error> {
        let squares = squared_norms(&self.model.parameters, &self.passes.gradients);
        let [squares, cross_entropy, load_balance, z] = fetch_scalars([
            &squares,
            &terms.cross_entropy,
            &terms.load_balance,
            &terms.z,
        ])?;
        let sum = |terms: Vec<f64>| terms.into_iter().fold(0.0, |sum, term| sum + term);
        Ok(Fetched {
            grad_norm: self.optimizer.norm_of(&squares)?,
            losses: StepLosses {
                cross_entropy: sum(cross_entropy),
                load_balance: sum(load_balance),
                z: sum(z),
            },
        })
    }

    /// Runs forward and backward of all microbatches of the next step.
    fn accumulate(&self) -> Result<Accumulated, Error> {
        let position = &self.data.position;
        let StepPlan {
            plan,
            forward_schedule,
            ..
        } = self.passes.of_step(position.sequences(&self.config));
        let accumulation = plan.schedule.order.microbatches;
        // Consecutive microbatches of the global batch belong to one rank, so that the same
        // microbatches exist in every layout.
        let size = self.config.train.micro_batch as u64;
        let number = (self.rank.mesh.coordinates().data * accumulation) as u64;
        let first = position.samples + number * size;
        let data = &self.data.train;
        let batches = HostMicrobatches::of_step(data, first, size, accumulation);
        let positions = position.step_tokens(&self.config);
        let counted_tokens = self.counted_tokens(data, positions, || batches.counted_labels())?;
        let totals = |counts_le| BatchTotals {
            groups: self.groups_per_step(),
            positions: positions as f64,
            counted_tokens: counted_tokens as f64,
            counts_le,
        };
        let mut counts = None;
        if self.model.counts_whole_batch() {
            // The first backward needs the token counts of the last forward: count first.
            let sums = self.run_schedule(forward_schedule, None, &batches, totals(None))?;
            counts = Some(self.sum_counts(&sums)?);
        }
        let gradients = &self.passes.gradients;
        gradients.begin(accumulation);
        let totals = totals(counts.as_ref());
        let measures_logits = self.config.optimizer.qk_clip.is_some();
        if measures_logits {
            self.model.begin_largest_scores();
        }
        let mut sums = self.run_schedule(&plan.schedule, Some(gradients), &batches, totals)?;
        gradients.finish()?;
        if measures_logits {
            sums.largest_logits = self.model.take_largest_scores()?;
        }
        Ok(Accumulated {
            sums,
            counted_tokens,
        })
    }

    /// Runs `schedule` over the microbatches of `batches`, with backward if there are `gradients`.
    pub(super) fn run_schedule(
        &self,
        schedule: &Schedule,
        gradients: Option<&GradientBuckets>,
        batches: &HostMicrobatches,
        totals: BatchTotals,
    ) -> Result<StepSums, Error> {
        let order = &schedule.order;
        let sequence_length = self.config.data.sequence_length;
        let (last_rank, _) = order.rank_and_chunk(order.stages() - 1);
        let mesh = &self.rank.mesh;
        let inputs = StepInputs {
            model: &self.model,
            device: self.rank.device.as_ref(),
            gradients,
            batches,
            totals,
            vocabulary: order.vocabulary,
            last_rank,
            sequences: self.config.train.micro_batch as i64,
            positions: (sequence_length / mesh.shape().context) as i64,
            kind: self.config.train.dtype.kind(),
        };
        let mut stages = StepStages::new(inputs, &order.ranks[mesh.coordinates().pipeline]);
        let mut spans = self.passes.executor.run(schedule, &mut stages)?;
        if !self.rank.device.computes_on_host() {
            // In these times the host has only queued the passes.
            spans.clear();
        }
        stages.sums.record_spans(&spans, order.chunks);
        stages.sums.finish();
        Ok(stages.sums)
    }

    /// Sums the routed tokens of the whole batch over all ranks, `[L, E]`.
    fn sum_counts(&self, sums: &StepSums) -> Result<Tensor, Error> {
        let counts = sums
            .moe_layers
            .iter()
            .flat_map(|layer| &layer.tokens_per_expert);
        let counts: Vec<f32> = counts.map(|&tokens| tokens as f32).collect();
        let experts = sums.num_experts() as i64;
        let counts = Tensor::from_slice(&counts).view([-1, experts]);
        let summed = self.rank.device.upload(&counts);
        self.rank.world.all_reduce(&summed, ReduceOp::Sum)?.wait()?;
        Ok(summed)
    }

    /// Returns the number of token groups over which load balance is measured.
    fn groups_per_step(&self) -> f64 {
        let sequences = self.data.position.sequences(&self.config);
        let moe = self.config.model.moe.as_ref();
        match moe.map(|moe| moe.load_balance_over) {
            Some(BalanceScope::Sequence) => sequences as f64,
            Some(BalanceScope::Microbatch) => (sequences / self.config.train.micro_batch) as f64,
            Some(BalanceScope::Batch) | None => 1.0,
        }
    }

    /// Refuses a step whose loss or gradient norm is not finite.
    fn refuse_divergence(&self, summed: &SummedFigures, grad_norm: f64) -> Result<(), Error> {
        let loss = summed.step.cross_entropy;
        if loss.is_finite() && grad_norm.is_finite() {
            return Ok(());
        }
        Err(Error::Diverged {
            step: self.step() + 1,
            loss,
            grad_norm,
        })
    }

    /// Changes parameters, biases and the placement of experts, and waits for the device.
    fn update(&mut self, summed: &SummedFigures, grad_norm: f64) -> Result<Update, Error> {
        let lr = self.update_parameters(grad_norm, &summed.largest_logits)?;
        self.update_biases(&summed.step);
        let moved_experts = self.move_experts(&summed.step)?;
        let synchronized = self.rank.device.synchronize();
        // When another rank has failed, its error explains more than what the device reports, and
        // the computed values are useless.
        self.rank.world.check()?;
        synchronized?;
        let clip = self.config.optimizer.qk_clip.as_ref();
        Ok(Update {
            lr,
            moved_experts,
            qk_clip: clip.map(|clip| qk_clip::metrics(clip, &summed.largest_logits)),
        })
    }

    /// Updates the parameters and returns the learning rate. `largest_logits` are those of all
    /// heads of the model, with `optimizer.qk_clip`.
    pub(super) fn update_parameters(
        &mut self,
        grad_norm: f64,
        largest_logits: &[f32],
    ) -> Result<f64, Error> {
        let position = self.data.position.in_schedule();
        let lr = learning_rate(&self.config, position);
        self.optimizer.step(
            &self.model.parameters,
            &self.passes.gradients,
            position.step + 1,
            lr,
            grad_norm,
            self.rank.device.as_ref(),
        )?;
        if let Some(clip) = &self.config.optimizer.qk_clip {
            qk_clip::clip_heads(&self.model, clip, largest_logits)?;
        }
        self.model.mark_stale();
        Ok(lr)
    }
}
