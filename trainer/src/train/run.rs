//! The loop over the steps of a run, and its reports.

use super::{
    Trainer, evaluation,
    metrics::{
        files::MetricsFiles,
        records::{Progress, StepMetrics},
    },
    trace::TraceWriter,
};
use crate::{
    Error,
    data::report::epochs_line,
    lines::{Limits, ResumePoint},
};

/// Final state of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Number of completed steps.
    pub step: u64,
    /// True if a rank was told to stop before the last step.
    pub stopped: bool,
    /// The last validation loss, in nats per token.
    pub validation_loss: Option<f64>,
}

/// Requests to a run from outside. A request to one rank is one to all.
pub trait RunRequests {
    /// True if the run has to stop after the step.
    fn wants_stop(&self) -> bool;

    /// True if the run has to write a checkpoint and continue.
    fn wants_checkpoint(&self) -> bool {
        false
    }

    /// Notes that the ranks now write the checkpoint that one of them was asked for.
    fn begin_checkpoint(&self) {}
}

impl<F: Fn() -> bool> RunRequests for F {
    fn wants_stop(&self) -> bool {
        self()
    }
}

/// The files that a run writes besides its state.
#[derive(Default)]
pub(super) struct Reports {
    pub(super) files: MetricsFiles,
    pub(super) trace: TraceWriter,
}

impl Trainer {
    /// Trains to the last step of the configuration, or until `requests` of any rank stop the run.
    ///
    /// A checkpoint that cannot be written before the end is reported to `progress`, and training
    /// continues.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If a step fails, or the last checkpoint cannot be written.
    pub fn run(
        &mut self,
        requests: &dyn RunRequests,
        progress: &mut dyn Progress,
    ) -> Result<Outcome, Error> {
        let point = ResumePoint {
            step: self.step(),
            repeats_validation: std::mem::take(&mut self.resumption.repeats_validation)
                || self.validates_at_start(),
        };
        if self.rank.is_first() {
            let limits = Limits::of_mib(self.config.run.line_buffer_mib);
            self.reports.files = MetricsFiles::open(&self.config.run.dir, point, limits)?;
        }
        let outcome = self.run_steps(point.repeats_validation, requests, progress);
        let files = std::mem::take(&mut self.reports.files);
        files.finish(outcome.is_err(), progress);
        self.durability.finish(progress);
        if outcome.is_ok() {
            self.reports.trace.finish();
        }
        outcome
    }

    fn run_steps(
        &mut self,
        repeats_validation: bool,
        requests: &dyn RunRequests,
        progress: &mut dyn Progress,
    ) -> Result<Outcome, Error> {
        let steps = self.config.train.steps;
        let mut outcome = Outcome {
            step: self.step(),
            stopped: false,
            validation_loss: None,
        };
        if repeats_validation {
            outcome.validation_loss = self.report_validation(progress)?;
        }
        while self.step() < steps && !outcome.stopped {
            self.durability.requests.is_asked = requests.wants_checkpoint();
            let (metrics, stopped) = self.train_step(requests.wants_stop())?;
            if self.durability.requests.step >= Some(self.step()) {
                requests.begin_checkpoint();
            }
            outcome.stopped = stopped && self.step() < steps;
            if self.rank.is_first() {
                self.report_step(&metrics, progress);
            }
            let is_last = self.step() == steps || outcome.stopped;
            // A stop does not wait for a validation: the run makes up for it when it resumes.
            if evaluation::is_due(&self.config, self.step(), is_last) && !outcome.stopped {
                outcome.validation_loss = self.report_validation(progress)?;
            }
            self.persist(is_last, progress)?;
        }
        outcome.step = self.step();
        Ok(outcome)
    }

    /// True if the run begins with a validation of its initial weights.
    fn validates_at_start(&self) -> bool {
        let section = self.config.validation.as_ref();
        self.step() == 0 && section.is_some_and(|section| section.at_start)
    }

    fn report_step(&self, metrics: &StepMetrics, progress: &mut dyn Progress) {
        self.reports.files.write_step(metrics);
        self.reports.files.report(progress);
        progress.step(metrics, self.config.train.steps);
        if self.is_logged(metrics.step) {
            let samples = self.data.position.samples;
            tracing::info!("{}", epochs_line(&self.config, &self.data.train, samples));
        }
        if metrics.counted_tokens == 0 {
            progress.warn(&format!(
                "no token of step {} counts in the loss, because the masks of the data leave none",
                metrics.step
            ));
        }
    }

    /// True if the files that have only some steps have `step`.
    pub(super) fn is_logged(&self, step: u64) -> bool {
        let is_end = step == 1 || step == self.config.train.steps;
        is_end || step.is_multiple_of(self.config.run.log_every)
    }

    /// Validates and writes the line of the current step. Returns the loss.
    fn report_validation(&self, progress: &mut dyn Progress) -> Result<Option<f64>, Error> {
        let Some(line) = self.validate()? else {
            return Ok(None);
        };
        if self.rank.is_first() {
            self.reports.files.write_validation(&line);
            progress.validation(&line);
        }
        Ok(Some(line.validation_loss))
    }
}
