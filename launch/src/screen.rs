//! Output on standard error: bounded lines, fewer repetitions, and the progress bar.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

/// Bounds of the lines that wait for a terminal that takes none.
const MAX_LINES: usize = 2000;
const MAX_BYTES: usize = 256 * 1024;

/// Warnings of one kind that are shown in each period; the others are counted.
const BURST: u64 = 5;
const PERIOD: Duration = Duration::from_secs(10);

/// Kinds of warnings that are counted separately.
const MAX_KINDS: usize = 200;

/// Erases the line of the cursor, on which a progress bar may be.
const ERASE_LINE: &str = "\r\x1b[2K";

#[derive(Default)]
pub(crate) struct Screen {
    lines: VecDeque<String>,
    bytes: usize,
    /// Lines that found the queue full. Further ones are dropped until it is empty.
    dropped: u64,
    /// Lines that a write failed to show, and that no report names yet.
    lost: u64,
    /// The last state of the bar, if it is not shown yet.
    bar: Option<String>,
    repeated: HashMap<String, Repeated>,
}

/// Warnings of one kind in the current period.
struct Repeated {
    since: Instant,
    shown: u64,
    suppressed: u64,
    last: String,
}

impl Screen {
    /// Adds a line, unless it repeats others too often or too many wait.
    pub(crate) fn push(&mut self, text: String, now: Instant) {
        if self.admits(&text, now) {
            self.enqueue(text);
        }
    }

    fn enqueue(&mut self, text: String) {
        let has_room = self.lines.len() < MAX_LINES && self.bytes + text.len() <= MAX_BYTES;
        if self.dropped > 0 || !(has_room || self.lines.is_empty()) {
            self.dropped += 1;
            return;
        }
        self.bytes += text.len();
        self.lines.push_back(text);
    }

    /// Sets the state of the bar, in place of one that was not shown yet.
    pub(crate) fn show_bar(&mut self, frame: String) {
        self.bar = Some(frame);
    }

    /// Returns the text of the next write. On a terminal, a line first erases the bar that this or
    /// another process shows.
    pub(crate) fn take(&mut self, is_terminal: bool, now: Instant) -> Option<String> {
        self.report_suppressed(|repeated| now.duration_since(repeated.since) >= PERIOD);
        let Some(line) = self.lines.pop_front() else {
            return self.bar.take();
        };
        self.bytes -= line.len();
        if self.lines.is_empty() && self.dropped > 0 {
            let dropped = std::mem::take(&mut self.dropped);
            self.enqueue(format!(
                "warning: {dropped} lines are missing here: the terminal took none for some time"
            ));
        }
        let erase = if is_terminal { ERASE_LINE } else { "" };
        Some(format!("{erase}{line}\n"))
    }

    /// Counts a text that could not be written, on a full disk for example. The first write that
    /// succeeds afterwards reports how many there were.
    pub(crate) fn wrote(&mut self, has_succeeded: bool) {
        if !has_succeeded {
            self.lost += 1;
        } else if self.lost > 0 {
            let lost = std::mem::take(&mut self.lost);
            self.enqueue(format!(
                "warning: {lost} lines are missing here: they could not be written"
            ));
        }
    }

    /// Reports all that is still counted, at the end of the process.
    pub(crate) fn close(&mut self) {
        self.report_suppressed(|_| true);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.bar.is_none()
    }

    /// True if the screen has something to report when time passes.
    pub(crate) fn has_suppressed(&self) -> bool {
        self.repeated.values().any(|kind| kind.suppressed > 0)
    }

    fn admits(&mut self, text: &str, now: Instant) -> bool {
        if !text.starts_with("warning: ") {
            return true;
        }
        self.report_suppressed(|repeated| now.duration_since(repeated.since) >= PERIOD);
        let kind = kind(text);
        if self.repeated.len() >= MAX_KINDS && !self.repeated.contains_key(&kind) {
            return true;
        }
        let repeated = self.repeated.entry(kind).or_insert(Repeated {
            since: now,
            shown: 0,
            suppressed: 0,
            last: String::new(),
        });
        let is_shown = repeated.shown < BURST;
        if is_shown {
            repeated.shown += 1;
        } else {
            repeated.suppressed += 1;
            repeated.last = text.to_string();
        }
        is_shown
    }

    /// Ends the periods that `is_over` selects, and reports how many warnings they suppressed.
    fn report_suppressed(&mut self, is_over: impl Fn(&Repeated) -> bool) {
        let over = self.repeated.extract_if(|_, repeated| is_over(repeated));
        let over: Vec<Repeated> = over.map(|(_, repeated)| repeated).collect();
        for repeated in over.iter().filter(|repeated| repeated.suppressed > 0) {
            let count = repeated.suppressed;
            let last = repeated.last.trim_start_matches("warning: ");
            self.enqueue(format!("warning: {count} more like this one: {last}"));
        }
    }
}

/// Returns the first line of a warning without its numbers: warnings of one kind differ in those.
fn kind(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    line.chars().filter(|c| !c.is_ascii_digit()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(screen: &mut Screen, now: Instant) -> Vec<String> {
        std::iter::from_fn(|| screen.take(false, now)).collect()
    }

    #[test]
    fn repeated_warnings_are_counted() {
        let mut screen = Screen::default();
        let start = Instant::now();
        for step in 0..100 {
            screen.push(format!("warning: no token of step {step} counts"), start);
        }
        screen.push("step 100/200".into(), start);
        screen.push("warning: another".into(), start);
        let shown = all(&mut screen, start);
        assert_eq!(shown.len(), BURST as usize + 2);
        assert_eq!(shown[0], "warning: no token of step 0 counts\n");
        assert!(screen.has_suppressed());
        let later = all(&mut screen, start + PERIOD);
        assert_eq!(
            later,
            ["warning: 95 more like this one: no token of step 99 counts\n"]
        );
        screen.push(
            "warning: no token of step 100 counts".into(),
            start + PERIOD,
        );
        assert_eq!(all(&mut screen, start + PERIOD).len(), 1);
        screen.close();
        assert!(screen.is_empty());
    }

    #[test]
    fn lines_for_a_blocked_terminal_are_bounded_and_counted() {
        let mut screen = Screen::default();
        let now = Instant::now();
        for step in 0..5000 {
            screen.push(format!("step {step}"), now);
            screen.show_bar(format!("{step}/5000"));
        }
        let shown = all(&mut screen, now);
        assert_eq!(shown.len(), MAX_LINES + 2);
        assert_eq!(shown[MAX_LINES - 1], "step 1999\n");
        assert!(shown[MAX_LINES].starts_with("warning: 3000 lines are missing here"));
        assert_eq!(shown[MAX_LINES + 1], "4999/5000");
        screen.push("step 5000".into(), now);
        assert_eq!(all(&mut screen, now), ["step 5000\n"]);
        // A single line may be longer.
        screen.push("x".repeat(MAX_BYTES + 1), now);
        assert_eq!(all(&mut screen, now).len(), 1);
    }

    #[test]
    fn lines_that_could_not_be_written_are_counted() {
        let mut screen = Screen::default();
        for has_succeeded in [true, false, false, true, true] {
            screen.wrote(has_succeeded);
        }
        let shown = all(&mut screen, Instant::now());
        assert_eq!(shown.len(), 1);
        assert!(shown[0].starts_with("warning: 2 lines are missing here"));
    }

    #[test]
    fn a_line_replaces_the_bar_of_a_terminal() {
        let mut screen = Screen::default();
        let now = Instant::now();
        screen.push("warning: x".into(), now);
        assert_eq!(screen.take(true, now).unwrap(), "\r\x1b[2Kwarning: x\n");
    }
}
