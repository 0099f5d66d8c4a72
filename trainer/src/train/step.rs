//! One optimizer step: forward and backward of all microbatches, one collective sum of the step's
//! figures, and the update.

use super::{
    StepPlan, Trainer,
    metrics::{
        rank_figures::RankFigures,
        records::{SnapshotMetrics, StepMetrics},
        report::StepResults,
        step_figures::{FigureSizes, StepFigures},
        summed_figures::OwnFigures,
    },
    microbatch::{MicrobatchSource, TrainingBatches},
    snapshots::{ReservedSlot, Snapshots},
    stages::{StepInputs, StepStages},
    step_sums::{LossTerms, StepSums},
};
use crate::{
    Error,
    optim::{
        schedule::{Position, learning_rate},
        squared_norms,
    },
    scalars::fetch_scalars,
};
use checkpoint::run_folder::RunFolder;
use kernels::profile;
use moe::balance::{BalanceScope, BatchTotals, update_bias};
use parallel::{GradientBuckets, ReduceOp, pipeline::Schedule};
use std::time::Instant;
use tch::Tensor;

/// Figures of a step that the host fetches from the device.
struct Fetched {
    /// Norm of all gradients of the model.
    grad_norm: f64,
    losses: StepLosses,
}

/// Losses of a step on this rank.
struct StepLosses {
    cross_entropy: f64,
    load_balance: f64,
    z: f64,
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
        let is_traced = self.config.run.trace_step == Some(self.step + 1);
        if is_traced {
            profile::start();
        }
        if let Some(&batches) = self.skips.get(&(self.step + 1)) {
            let skipped = batches * self.global_batch() as u64;
            self.samples += skipped;
            self.counted_from.skipped += skipped;
        }
        let (sums, counted_tokens) = self.accumulate()?;
        let Fetched { grad_norm, losses } = self.fetch(&sums.losses)?;
        let reserved = self.reserve_slot()?;
        let own = self.own_figures(&sums, losses, stop, reserved.as_ref())?;
        let summed = own.sum(&self.world)?;
        let figures = &summed.step;
        let loss = figures.cross_entropy;
        if !loss.is_finite() || !grad_norm.is_finite() {
            let step = self.step + 1;
            return Err(Error::Diverged {
                step,
                loss,
                grad_norm,
            });
        }
        self.finish_copy(reserved.is_some(), figures);
        let lr = self.update_parameters(grad_norm)?;
        self.update_biases(figures);
        let moved_experts = self.move_experts(figures)?;
        let synchronized = self.device.synchronize();
        // When another rank has failed, its error explains more than what the device reports, and
        // the computed values are useless.
        self.world.check()?;
        synchronized?;
        let tokens = self.tokens_per_step();
        self.advance(moved_experts);
        self.agree_on_request(figures);
        let has_snapshot = reserved.is_some();
        self.reserved = reserved.map(|reserved| ReservedSlot {
            on_all_ranks: figures.ranks_without_slot == 0.0,
            ..reserved
        });
        let seconds = started.elapsed().as_secs_f64();
        self.last_step_seconds = seconds;
        if is_traced {
            self.write_trace();
        }
        let stops = figures.stopping_ranks > 0.0;
        let metrics = summed.into_metrics(StepResults {
            step: self.step,
            counted_tokens,
            lr,
            grad_norm,
            step_tokens: tokens,
            tokens: self.tokens,
            seconds,
            moved_experts,
            snapshot: self.snapshot_metrics().filter(|_| has_snapshot),
            stage_ranks: self.world.size() / self.mesh.shape().pipeline,
            times_passes: self.device.computes_on_host(),
        });
        Ok((metrics, stops))
    }

    fn snapshot_metrics(&self) -> Option<SnapshotMetrics> {
        let snapshots = self.snapshots.as_ref()?;
        Some(SnapshotMetrics {
            stall_ms: snapshots.cost.stall * 1e3,
            copy_ms: snapshots.cost.copy * 1e3,
            bytes: snapshots.cost.bytes,
            skipped: snapshots.skipped,
        })
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
        self.optimizer.grad_norm(parameters, &self.gradients)
    }

    /// Fetches the losses of this rank, and with them the squares of which the norm is made.
    fn fetch(&self, terms: &LossTerms) -> Result<Fetched, Error> {
        let squares = squared_norms(&self.model.parameters, &self.gradients);
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

    /// Runs forward and backward of all microbatches of the next step. Returns this rank's sums,
    /// and the counted tokens of all ranks.
    fn accumulate(&self) -> Result<(StepSums, u64), Error> {
        let size = self.config.train.micro_batch as u64;
        let StepPlan {
            plan,
            forward_schedule,
            ..
        } = self.step_plan();
        let accumulation = plan.schedule.order.microbatches;
        // Consecutive microbatches of the global batch belong to one rank, so that the same
        // microbatches exist in every layout.
        let number = (self.mesh.coordinates().data * accumulation) as u64;
        let batches = TrainingBatches {
            data: &self.train,
            device: self.device.as_ref(),
            first: self.samples + number * size,
            size,
        };
        let positions = self.tokens_per_step();
        let labels = (0..accumulation).map(|index| batches.labels(index));
        let counted_tokens = self.counted_tokens(&self.train, positions, labels)?;
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
        self.gradients.begin(accumulation);
        let sums = self.run_schedule(
            &plan.schedule,
            Some(&self.gradients),
            &batches,
            totals(counts.as_ref()),
        )?;
        self.gradients.finish()?;
        Ok((sums, counted_tokens))
    }

    /// Runs `schedule` over the microbatches of `batches`, with backward if there are `gradients`.
    pub(super) fn run_schedule(
        &self,
        schedule: &Schedule,
        gradients: Option<&GradientBuckets>,
        batches: &dyn MicrobatchSource,
        totals: BatchTotals,
    ) -> Result<StepSums, Error> {
        let order = &schedule.order;
        let sequence_length = self.config.data.sequence_length;
        let (last_rank, _) = order.rank_and_chunk(order.stages() - 1);
        let mut stages = StepStages::new(StepInputs {
            model: &self.model,
            device: self.device.as_ref(),
            gradients,
            batches,
            totals,
            vocabulary: order.vocabulary,
            last_rank,
            eod_token: self.config.data.eod_token,
            sequences: self.config.train.micro_batch as i64,
            positions: (sequence_length / self.mesh.shape().context) as i64,
            kind: self.config.train.dtype.kind(),
        });
        let mut spans = self.pipeline.run(schedule, &mut stages)?;
        if !self.device.computes_on_host() {
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
        let experts = num_experts(sums) as i64;
        let counts = Tensor::from_slice(&counts).view([-1, experts]);
        let summed = self.device.upload(&counts);
        self.world.all_reduce(&summed, ReduceOp::Sum)?.wait()?;
        Ok(summed)
    }

    /// Returns the number of token groups over which load balance is measured.
    fn groups_per_step(&self) -> f64 {
        let sequences = self.global_batch();
        let moe = self.config.model.moe.as_ref();
        match moe.map(|moe| moe.load_balance_over) {
            Some(BalanceScope::Sequence) => sequences as f64,
            Some(BalanceScope::Microbatch) => (sequences / self.config.train.micro_batch) as f64,
            Some(BalanceScope::Batch) | None => 1.0,
        }
    }

    /// Returns this rank's figures of the step.
    fn own_figures(
        &self,
        sums: &StepSums,
        losses: StepLosses,
        stop: bool,
        reserved: Option<&ReservedSlot>,
    ) -> Result<OwnFigures, Error> {
        let sizes = FigureSizes {
            moe_layers: sums.moe_layers.len(),
            experts: num_experts(sums),
        };
        let lacks_slot = reserved.is_some_and(|reserved| reserved.slot.is_none());
        let snapshots = self.snapshots.as_ref();
        let mut own = StepFigures::zeros(sizes);
        own.cross_entropy = losses.cross_entropy;
        own.load_balance = losses.load_balance;
        own.z = losses.z;
        own.stopping_ranks = f64::from(u8::from(stop));
        own.checkpoint_ranks = f64::from(u8::from(self.wants_checkpoint));
        own.ranks_without_slot = f64::from(u8::from(lacks_slot));
        own.snapshot_seconds = snapshots.map_or(0.0, Snapshots::cost_seconds);
        own.last_step_seconds = self.last_step_seconds;
        for (figures, sums) in own.moe_layers.iter_mut().zip(&sums.moe_layers) {
            figures
                .tokens_per_expert
                .clone_from(&sums.tokens_per_expert);
            figures.transfers = sums.transfers;
        }
        Ok(OwnFigures {
            sizes,
            step: own,
            rank: self.rank_figures(sums)?,
            lists_ranks: self.is_logged(self.step + 1),
        })
    }

    /// Returns the figures that this rank has for itself.
    fn rank_figures(&self, sums: &StepSums) -> Result<RankFigures, Error> {
        let mut tokens = vec![None; sums.moe_layers.len()];
        for (moe_layer, _, _) in self.model.local_moe_layers() {
            tokens[moe_layer] = Some(sums.moe_layers[moe_layer].computed_tokens);
        }
        // Without a pipeline, the step's metrics contain no times of passes.
        let has_pipeline = self.mesh.shape().pipeline > 1;
        Ok(RankFigures {
            tokens,
            peak_memory: self.device.memory()?.peak as f64,
            peak_resident: parallel::peak_resident()? as f64,
            wait_ratio: sums.wait_ratio,
            passes: if has_pipeline {
                sums.passes.clone()
            } else {
                Vec::new()
            },
        })
    }

    /// Updates the parameters and returns the learning rate.
    pub(super) fn update_parameters(&mut self, grad_norm: f64) -> Result<f64, Error> {
        let lr = learning_rate(&self.config, self.position());
        self.optimizer.step(
            &self.model.parameters,
            &self.gradients,
            self.step + 1,
            lr,
            grad_norm,
            self.device.as_ref(),
        )?;
        self.model.mark_stale();
        Ok(lr)
    }

    /// Updates the loss-free balancing biases from the routed tokens of the step.
    pub(super) fn update_biases(&self, figures: &StepFigures) {
        let Some(moe) = &self.config.model.moe else {
            return;
        };
        for (moe_layer, _, mut bias) in self.model.biases() {
            let tokens = &figures.moe_layers[moe_layer].tokens_per_expert;
            let tokens = self.device.upload(&Tensor::from_slice(tokens));
            update_bias(&mut bias, &tokens, moe.bias_update_rate);
        }
    }

    /// Moves experts if that is due and returns their number, with `model.moe.placement`.
    fn move_experts(&mut self, figures: &StepFigures) -> Result<Option<u64>, Error> {
        let Some(expert_placement) = &mut self.expert_placement else {
            return Ok(None);
        };
        let layers = figures.moe_layers.iter();
        let tokens: Vec<&[f64]> = layers.map(|layer| &layer.tokens_per_expert[..]).collect();
        let step = self.step + 1;
        let moved = expert_placement.step(step, &tokens, &self.model, &self.optimizer)?;
        Ok(Some(moved))
    }

    /// Returns the beginning of the next step.
    pub(super) fn position(&self) -> Position {
        Position {
            step: self.step,
            tokens: self.tokens,
        }
    }

    /// Counts the step as done.
    fn advance(&mut self, moved_experts: Option<u64>) {
        self.step += 1;
        // The tokens decide the batch, so they are counted last.
        self.samples += self.global_batch() as u64;
        self.tokens += self.tokens_per_step();
        if let Some(snapshots) = &mut self.snapshots {
            snapshots.progress.step_done(self.step);
            if moved_experts.is_some_and(|moved| moved > 0) {
                snapshots.forget_plan();
            }
        }
    }

    /// Writes the step's trace in a thread; a failure only logs a warning.
    fn write_trace(&mut self) {
        let rank = self.world.rank();
        let folder = self.config.run.dir.join("logs");
        let name = format!("rank-{rank}.trace.json");
        let path = folder.join(&name);
        let events = profile::stop();
        let step = self.step;
        self.trace = Some(std::thread::spawn(move || {
            let written = RunFolder::create_inside(&folder)
                .and_then(|logs| logs.remove(&name))
                .map_err(std::io::Error::other)
                .and_then(|()| profile::write(&events, rank, &path));
            let path = path.display();
            match written {
                Ok(()) => tracing::info!("wrote the trace of step {step} to {path}"),
                Err(error) => tracing::warn!("cannot write {path}: {error}"),
            }
        }));
    }
}

fn num_experts(sums: &StepSums) -> usize {
    let first = sums.moe_layers.first();
    first.map_or(0, |layer| layer.tokens_per_expert.len())
}
