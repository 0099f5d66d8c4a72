//! Progress of a command: a bar on a terminal, plain lines elsewhere.

use crate::{prepare::Event, printable::printable};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

/// Time between plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Shows progress, and messages, on standard error.
pub(crate) struct ProgressView {
    bar: Option<ProgressBar>,
    stage: &'static str,
    started: Instant,
    shown: Instant,
}

impl ProgressView {
    pub(crate) fn new() -> ProgressView {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let template = "{bar:24.cyan/blue} {wide_msg}";
            bar.set_style(ProgressStyle::with_template(template).expect("a fixed template"));
            bar
        });
        ProgressView {
            bar,
            stage: "",
            started: Instant::now(),
            shown: Instant::now(),
        }
    }

    pub(crate) fn show(&mut self, event: Event) {
        match event {
            Event::Note(note) => self.line(note),
            Event::Warning(warning) => self.line(&format!("warning: {warning}")),
            Event::Progress { stage, done, total } => {
                if stage != self.stage {
                    self.stage = stage;
                    self.started = Instant::now();
                    self.shown = Instant::now();
                }
                let text = describe(stage, done, total, self.started.elapsed());
                match &self.bar {
                    Some(bar) => {
                        bar.set_length(total.unwrap_or(0));
                        bar.set_position(done);
                        bar.set_message(text);
                    }
                    None if self.shown.elapsed() >= LINE_INTERVAL => {
                        self.shown = Instant::now();
                        eprintln!("{text}");
                    }
                    None => {}
                }
            }
        }
    }

    fn line(&self, text: &str) {
        let text = printable(text);
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Returns a line such as `tokenizing: 12.0 of 50.0 MB, 30.1 MB/s, 1s left`.
fn describe(stage: &str, done: u64, total: Option<u64>, elapsed: Duration) -> String {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let rate = mb(done) / elapsed.as_secs_f64().max(1e-9);
    let Some(total) = total.filter(|&total| total >= done) else {
        return format!("{stage}: {:.1} MB, {rate:.1} MB/s", mb(done));
    };
    let left = mb(total - done) / rate.max(1e-9);
    let left = match done {
        0 => "-".to_string(),
        _ => duration(left),
    };
    format!(
        "{stage}: {:.1} of {:.1} MB, {rate:.1} MB/s, {left} left",
        mb(done),
        mb(total)
    )
}

fn duration(seconds: f64) -> String {
    let seconds = seconds.min(1e9) as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h{minutes:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_rate_and_time_left() {
        let line = |done, total| describe("tokenizing", done, total, Duration::from_secs(2));
        assert_eq!(
            line(20_000_000, Some(50_000_000)),
            "tokenizing: 20.0 of 50.0 MB, 10.0 MB/s, 3s left"
        );
        assert_eq!(line(20_000_000, None), "tokenizing: 20.0 MB, 10.0 MB/s");
        let long = line(1_000_000, Some(3_000_000_000_000));
        assert!(long.ends_with("1666h39m left"), "{long}");
    }
}
