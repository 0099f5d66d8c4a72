//! `metrics.jsonl`, `routing.jsonl` and `ranks.jsonl` of rank 0, which a thread each writes.

use super::records::{DroppedLines, Progress, StepMetrics, ValidationMetrics};
use crate::{
    Error,
    lines::{Limits, LineWriter, MissingLines, Notice, Options, ResumePoint, Target, WrittenLines},
};
use serde::Serialize;
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Time within which an existing folder answers.
const OPEN_TIMEOUT: Duration = Duration::from_secs(2);

/// Time at the end of a run in which lines that wait are written.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// The files of rank 0; other ranks have none.
#[derive(Default)]
pub(in crate::train) struct MetricsFiles(Option<OpenFiles>);

struct OpenFiles {
    metrics: MetricsFile,
    /// Figures of each layer and expert, which are too long for each step.
    routing: MetricsFile,
    /// Figures of each rank, which are too long for each step.
    ranks: MetricsFile,
}

struct MetricsFile {
    path: PathBuf,
    lines: LineWriter,
}

impl MetricsFiles {
    /// Opens the files in `dir` for a run that resumes at `point`.
    ///
    /// # Errors
    /// If a file cannot be opened. A run that resumes tolerates what may pass, such as a full
    /// disk.
    pub(in crate::train) fn open(
        dir: &Path,
        point: ResumePoint,
        limits: Limits,
    ) -> Result<MetricsFiles, Error> {
        let start = |name: &str, reports_gap: bool| {
            MetricsFile::start(dir.join(name), point, limits, reports_gap)
        };
        let files = OpenFiles {
            metrics: start("metrics.jsonl", true),
            routing: start("routing.jsonl", false),
            ranks: start("ranks.jsonl", false),
        };
        for file in files.all() {
            let opened = file.lines.wait_until_open(OPEN_TIMEOUT, point.step > 0);
            opened.map_err(Error::io("cannot write", &file.path))?;
        }
        Ok(MetricsFiles(Some(files)))
    }

    /// Writes the line of a step, and those of the other files in steps that have them.
    pub(in crate::train) fn write_step(&self, metrics: &StepMetrics) {
        let Some(files) = &self.0 else {
            return;
        };
        files.metrics.push(metrics, metrics.step, true);
        if let Some(line) = &metrics.routing {
            files.routing.push(line, line.step, true);
        }
        if let Some(line) = &metrics.ranks {
            files.ranks.push(line, line.step, true);
        }
    }

    pub(in crate::train) fn write_validation(&self, line: &ValidationMetrics) {
        if let Some(files) = &self.0 {
            files.metrics.push(line, line.step, false);
        }
    }

    /// Returns the end of the lines so far, which a snapshot waits for.
    pub(in crate::train) fn position(&self) -> Vec<WrittenLines> {
        let files = self.0.iter().flat_map(OpenFiles::all);
        files.map(|file| file.lines.position()).collect()
    }

    /// Reports outages that began or ended, each once.
    pub(in crate::train) fn report(&self, progress: &mut dyn Progress) {
        for file in self.0.iter().flat_map(OpenFiles::all) {
            file.report(progress);
        }
    }

    /// Writes what waits, for some seconds at most, and reports what could not be written. With
    /// `is_hasty`, only while the disk answers.
    pub(in crate::train) fn finish(self, is_hasty: bool, progress: &mut dyn Progress) {
        let deadline = Instant::now() + END_TIMEOUT;
        for file in self.0.iter().flat_map(OpenFiles::all) {
            let lacking = file.lines.flush(deadline, is_hasty);
            file.report(progress);
            if let Some((missing, cause)) = lacking {
                let path = file.path.display();
                progress.warn(&format!(
                    "{} could not be written to {path}: {cause}",
                    describe(&missing)
                ));
            }
        }
    }
}

impl OpenFiles {
    fn all(&self) -> impl Iterator<Item = &MetricsFile> {
        [&self.metrics, &self.routing, &self.ranks].into_iter()
    }
}

impl MetricsFile {
    fn start(path: PathBuf, point: ResumePoint, limits: Limits, reports_gap: bool) -> MetricsFile {
        let target = Target::After {
            path: path.clone(),
            point,
        };
        let lines = LineWriter::start(Options {
            target,
            limits,
            record,
            reports_gap,
            on_open: None,
        });
        MetricsFile { path, lines }
    }

    fn push(&self, line: &impl Serialize, step: u64, is_of_step: bool) {
        let mut text = serde_json::to_string(line).expect("plain data");
        text.push('\n');
        self.lines.push(text, Some(step), is_of_step);
    }

    fn report(&self, progress: &mut dyn Progress) {
        let path = self.path.display();
        while let Some(notice) = self.lines.notice() {
            match notice {
                Notice::Outage(cause) => progress.warn(&format!(
                    "cannot write {path}: {cause}; training continues, and lines wait in memory"
                )),
                Notice::Recovered { outage, dropped } => {
                    let seconds = outage.as_secs_f64();
                    progress.note(&format!("{path} can be written again after {seconds:.0} s"));
                    if dropped.lines > 0 {
                        progress.warn(&format!(
                            "{} of {path} were dropped, because run.line_buffer_mib was full",
                            describe(&dropped)
                        ));
                    }
                }
                Notice::Interrupted(missing) => progress.warn(&format!(
                    "{path} lacks {}: the disk had not taken them when the run was interrupted",
                    describe(&missing)
                )),
            }
        }
    }
}

fn record(missing: &MissingLines) -> String {
    let (first_step, step) = missing.span.unwrap_or_default();
    let record = DroppedLines {
        step,
        first_step,
        dropped_steps: missing.steps,
        dropped_lines: missing.lines,
    };
    serde_json::to_string(&record).expect("plain data")
}

fn describe(missing: &MissingLines) -> String {
    let lines = missing.lines;
    let noun = if lines == 1 { "line" } else { "lines" };
    match missing.span {
        Some((first, last)) if first < last => format!("{lines} {noun} (steps {first} to {last})"),
        Some((step, _)) => format!("{lines} {noun} (step {step})"),
        None => format!("{lines} {noun}"),
    }
}
