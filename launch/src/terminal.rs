//! Prints of this program. These macros replace those of the standard library, so that no text from
//! a file or another process can control the terminal, wherever it is printed.
//!
//! Each print is a single write, so that lines of several processes never mix. A closed terminal
//! or pipe ends no command that does more than print, and a blocked one does not stop training:
//! [`start_writer`] moves the writes to a thread.

use crate::{hint::printable, screen::Screen};
use nix::errno::Errno;
use parking_lot::{Condvar, Mutex};
use std::{
    fmt::Arguments,
    io::IsTerminal,
    os::fd::AsFd,
    sync::OnceLock,
    time::{Duration, Instant},
};

/// Time after which suppressed repetitions are looked for.
const TICK: Duration = Duration::from_secs(1);

/// Time in which a process that ends waits for its terminal.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// Time until an output without room, which does not block, is tried again.
const FULL_OUTPUT_RETRY: Duration = Duration::from_millis(10);

macro_rules! println {
    () => {
        $crate::terminal::print_line(format_args!(""))
    };
    ($($text:tt)*) => {
        $crate::terminal::print_line(format_args!($($text)*))
    };
}

macro_rules! print {
    ($($text:tt)*) => {
        $crate::terminal::print_text(format_args!($($text)*))
    };
}

macro_rules! eprintln {
    ($($text:tt)*) => {
        $crate::terminal::print_error_line(format_args!($($text)*))
    };
}

pub(crate) fn print_line(text: Arguments) {
    let _ = write(std::io::stdout(), &(printable(&text.to_string()) + "\n"));
}

pub(crate) fn print_text(text: Arguments) {
    let _ = write(std::io::stdout(), &printable(&text.to_string()));
}

pub(crate) fn print_error_line(text: Arguments) {
    let text = printable(&text.to_string());
    match WRITER.get() {
        Some(writer) => writer.change(|screen| screen.push(text, Instant::now())),
        None => {
            let _ = write(std::io::stderr(), &(text + "\n"));
        }
    }
}

/// The writer of standard error, in processes that train or watch those that do.
static WRITER: OnceLock<Writer> = OnceLock::new();

struct Writer {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    screen: Screen,
    is_writing: bool,
}

/// Starts a thread for the lines on standard error.
pub(crate) fn start_writer() {
    let mut is_new = false;
    let writer = WRITER.get_or_init(|| {
        is_new = true;
        Writer {
            state: Mutex::new(State {
                screen: Screen::default(),
                is_writing: false,
            }),
            changed: Condvar::new(),
        }
    });
    if is_new {
        std::thread::spawn(|| writer.run());
    }
}

/// Shows the progress bar, in place of its last state.
pub(crate) fn show_bar(frame: String) {
    match WRITER.get() {
        Some(writer) => writer.change(|screen| screen.show_bar(frame)),
        None => {
            let _ = write(std::io::stderr(), &frame);
        }
    }
}

/// Waits until all lines are written, for a second at most.
pub(crate) fn flush() {
    let Some(writer) = WRITER.get() else {
        return;
    };
    let deadline = Instant::now() + END_TIMEOUT;
    writer.change(Screen::close);
    let mut state = writer.state.lock();
    while state.is_writing || !state.screen.is_empty() {
        if writer.changed.wait_until(&mut state, deadline).timed_out() {
            return;
        }
    }
}

impl Writer {
    fn change(&self, change: impl FnOnce(&mut Screen)) {
        change(&mut self.state.lock().screen);
        self.changed.notify_all();
    }

    fn run(&self) {
        let mut state = self.state.lock();
        loop {
            let is_terminal = std::io::stderr().is_terminal();
            match state.screen.take(is_terminal, Instant::now()) {
                Some(text) => {
                    state.is_writing = true;
                    drop(state);
                    let is_written = write(std::io::stderr(), &text);
                    state = self.state.lock();
                    state.is_writing = false;
                    state.screen.wrote(is_written);
                    self.changed.notify_all();
                }
                None if state.screen.has_suppressed() => {
                    self.changed.wait_for(&mut state, TICK);
                }
                None => self.changed.wait(&mut state),
            }
        }
    }
}

/// Writes text in a single call, unless the output takes it in parts. Returns false if it could
/// not be written, as to a closed pipe, which has no reader to tell.
fn write(output: impl AsFd, text: &str) -> bool {
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        match nix::unistd::write(&output, rest) {
            Ok(written) => rest = &rest[written..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => std::thread::sleep(FULL_OUTPUT_RETRY),
            Err(_) => return false,
        }
    }
    true
}
