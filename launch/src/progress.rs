//! Progress of a run: a bar on a terminal, plain lines elsewhere.

use crate::{hint::printable, terminal};
use console::Term;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use parking_lot::Mutex;
use std::{
    io::{IsTerminal, Result},
    time::{Duration, Instant},
};
use trainer::{Progress, StepMetrics, ValidationMetrics};

/// Frames per second of a bar, at most.
const BAR_HZ: u8 = 20;

/// Shows the progress of training, on rank 0.
pub(crate) struct TrainingView {
    bar: Option<ProgressBar>,
    log_every: u64,
    started: Instant,
    first_step: Option<u64>,
}

impl TrainingView {
    pub(crate) fn new(steps: u64, done: u64, log_every: u64) -> TrainingView {
        let bar = std::io::stderr().is_terminal().then(|| {
            let frames = Box::new(BarFrames::default());
            let target = ProgressDrawTarget::term_like_with_hz(frames, BAR_HZ);
            let bar = ProgressBar::with_draw_target(Some(steps), target).with_position(done);
            // One line at any width: lines of the launcher take the place of the last one.
            let template = "{bar:16.cyan/blue} {pos}/{len} {wide_msg}";
            bar.set_style(ProgressStyle::with_template(template).expect("a fixed template"));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        TrainingView {
            bar,
            log_every,
            started: Instant::now(),
            first_step: None,
        }
    }

    fn line(&self, text: &str) {
        eprintln!("{text}");
        if let Some(bar) = &self.bar {
            // The line has taken the place of the bar.
            bar.tick();
        }
        tracing::info!("{}", printable(text));
    }

    pub(crate) fn remove_bar(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Progress for TrainingView {
    fn step(&mut self, record: &StepMetrics, steps: u64) {
        let first = *self.first_step.get_or_insert(record.step);
        // The first step warms caches and does not count for the pace.
        if record.step == first {
            self.started = Instant::now();
        }
        let steps_left = (steps - record.step) as f64;
        let eta = match record.step - first {
            0 => "-".to_string(),
            timed => {
                let elapsed = self.started.elapsed();
                format_duration(elapsed.mul_f64(steps_left / timed as f64))
            }
        };
        let figures = format!(
            "loss {:.4}  lr {:.2e}  grad norm {:.3}  {:.0} tokens/s{}",
            record.loss,
            record.lr,
            record.grad_norm,
            record.tokens_per_s,
            balance(record)
        );
        let line = format!("step {}/{steps}  {figures}  eta {eta}", record.step);
        tracing::info!("{line}");
        match &self.bar {
            Some(bar) => {
                bar.set_position(record.step);
                // The end of the line may be cut off.
                bar.set_message(format!("eta {eta}  {figures}"));
            }
            None if record.step == first
                || record.step.is_multiple_of(self.log_every)
                || record.step == steps =>
            {
                eprintln!("{line}");
            }
            None => {}
        }
    }

    fn validation(&mut self, metrics: &ValidationMetrics) {
        for line in validation_lines(metrics) {
            self.line(&line);
        }
    }

    fn note(&mut self, message: &str) {
        self.line(message);
    }

    fn warn(&mut self, message: &str) {
        self.line(&format!("warning: {message}"));
    }
}

/// Returns a line for each source of validation data if there are several, and one for the mean.
fn validation_lines(metrics: &ValidationMetrics) -> Vec<String> {
    let step = metrics.step;
    let figures = |loss: f64, bits: Option<&f64>| {
        let bits = bits.map_or(String::new(), |bits| format!("  bits per byte {bits:.4}"));
        format!("loss {loss:.4}  perplexity {:.1}{bits}", loss.exp())
    };
    let of_source = |(name, &loss): (&String, &f64)| {
        let figures = figures(loss, metrics.bits_per_byte.get(name));
        format!("step {step}  validation of {name}: {figures}")
    };
    let sources = metrics.validation.iter();
    let mut lines: Vec<String> = match metrics.validation.len() {
        1 => Vec::new(),
        _ => sources.map(of_source).collect(),
    };
    let only = metrics.bits_per_byte.values().next();
    let bits = only.filter(|_| metrics.validation.len() == 1);
    let mean = figures(metrics.validation_loss, bits);
    lines.push(format!("step {step}  validation {mean}"));
    lines
}

/// Draws the bar through [`terminal`], whose thread waits for a terminal that takes nothing.
///
/// Each frame begins by erasing the line, so that any earlier frame may be left out.
#[derive(Debug, Default)]
struct BarFrames {
    frame: Mutex<String>,
}

impl BarFrames {
    fn add(&self, text: &str) -> Result<()> {
        self.frame.lock().push_str(text);
        Ok(())
    }

    /// Moves the cursor by `lines` or columns; `direction` is the letter of the control sequence.
    fn move_cursor(&self, count: usize, direction: char) -> Result<()> {
        match count {
            0 => Ok(()),
            count => self.add(&format!("\x1b[{count}{direction}")),
        }
    }
}

impl TermLike for BarFrames {
    fn width(&self) -> u16 {
        Term::stderr().size().1
    }

    fn move_cursor_up(&self, count: usize) -> Result<()> {
        self.move_cursor(count, 'A')
    }

    fn move_cursor_down(&self, count: usize) -> Result<()> {
        self.move_cursor(count, 'B')
    }

    fn move_cursor_right(&self, count: usize) -> Result<()> {
        self.move_cursor(count, 'C')
    }

    fn move_cursor_left(&self, count: usize) -> Result<()> {
        self.move_cursor(count, 'D')
    }

    fn write_line(&self, text: &str) -> Result<()> {
        self.add(&format!("{text}\n"))
    }

    fn write_str(&self, text: &str) -> Result<()> {
        self.add(text)
    }

    fn clear_line(&self) -> Result<()> {
        self.add("\r\x1b[2K")
    }

    fn flush(&self) -> Result<()> {
        let frame = std::mem::take(&mut *self.frame.lock());
        if !frame.is_empty() {
            terminal::show_bar(frame);
        }
        Ok(())
    }
}

/// Formats the imbalance of experts and ranks in the worst layer, and the share of lent tokens.
fn balance(record: &StepMetrics) -> String {
    let Some(moe) = &record.moe else {
        return String::new();
    };
    let mut text = format!("  imbalance {:.2}", moe.expert_imbalance.largest);
    if !record.has_single_rank() {
        text += &format!(", ranks {:.2}", moe.rank_imbalance.largest);
    }
    if moe.lent_fraction() > 0.0 {
        text += &format!(", lent {:.0}%", moe.lent_fraction() * 100.0);
    }
    text
}

fn format_duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h{minutes:02}m"),
    }
}

/// Time between two plain lines of a transfer.
const TRANSFER_LINES: Duration = Duration::from_secs(10);

/// A shorter transfer has no plain line.
const SHORT_TRANSFER: Duration = Duration::from_secs(1);

/// Shows bytes that are read or written, and their rate.
pub(crate) struct Transfer {
    action: &'static str,
    bar: Option<ProgressBar>,
    started: Instant,
    last_line: Mutex<Instant>,
}

impl Transfer {
    pub(crate) fn new(action: &'static str) -> Transfer {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let template = "{bar:24.cyan/blue} {msg} {bytes} of {total_bytes}, {bytes_per_sec}";
            bar.set_style(ProgressStyle::with_template(template).expect("a fixed template"));
            bar.set_message(action);
            bar
        });
        Transfer {
            action,
            bar,
            started: Instant::now(),
            last_line: Mutex::new(Instant::now()),
        }
    }

    pub(crate) fn show(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            if done == total {
                bar.finish_and_clear();
            }
            return;
        }
        let elapsed = self.started.elapsed();
        let mut last_line = self.last_line.lock();
        let is_due = last_line.elapsed() >= TRANSFER_LINES;
        let is_end = done == total && elapsed >= SHORT_TRANSFER;
        if is_due || is_end {
            *last_line = Instant::now();
            let [done, total] = [done, total].map(|bytes| bytes as f64 / 1e9);
            let rate = done / elapsed.as_secs_f64();
            eprintln!(
                "{}: {done:.1} of {total:.1} GB, {rate:.2} GB/s",
                self.action
            );
        }
    }

    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
