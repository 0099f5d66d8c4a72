//! The thread that writes lines to a file.

use super::{
    backlog::{Backlog, Limits, Line, MissingLines, Record},
    health::{Health, Notice},
    target::{OpenFile, Target, may_pass, needs_reopening},
};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::{
    collections::VecDeque,
    fs::File,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

/// Bytes of a single write, unless a line is longer.
const BATCH_BYTES: usize = 256 * 1024;

/// Time until a failed write is tried again: the first, and the longest.
const RETRY_TIME: Duration = Duration::from_millis(100);
const MAX_RETRY_TIME: Duration = Duration::from_secs(1);

/// Called with the file each time it is opened, in the writer's thread.
type OnOpen = Box<dyn Fn(&File) + Send>;

/// Settings of a [`LineWriter`].
pub struct Options {
    pub target: Target,
    /// Bounds of the lines that wait.
    pub limits: Limits,
    /// Makes the line, without its end, that stands for missing ones in the file.
    pub record: fn(&MissingLines) -> String,
    /// True if every step has a line, so that a gap before the step of the resume is reported.
    pub reports_gap: bool,
    /// Called with the file each time it is opened, in the writer's thread.
    pub on_open: Option<OnOpen>,
}

/// A file of lines with its writer thread. Dropping it ends the thread, which first writes what
/// the file takes without a wait.
pub struct LineWriter {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Wakes the thread that writes.
    queued: Condvar,
    /// Wakes those that wait for the file.
    progressed: Condvar,
}

struct State {
    backlog: Backlog,
    health: Health,
    notices: VecDeque<Notice>,
    opening: Opening,
    /// True while the thread waits for lines.
    is_idle: bool,
    /// True once the writer is dropped.
    is_abandoned: bool,
}

impl State {
    /// Notes that the file has the next `bytes` bytes.
    fn complete(&mut self, bytes: usize) {
        if let Some(dropped) = self.backlog.complete(bytes) {
            self.health.dropped(dropped);
        }
    }
}

/// The first attempt to open the file.
enum Opening {
    Pending,
    Open,
    Failed(io::Error),
}

/// A point in the order of lines.
#[derive(Clone)]
pub struct WrittenLines {
    shared: Arc<Shared>,
    /// Number of lines before it.
    lines: u64,
}

impl LineWriter {
    /// Starts the thread, which opens the file.
    pub fn start(options: Options) -> LineWriter {
        let thread = WriterThread::new(options);
        let shared = thread.shared.clone();
        std::thread::spawn(move || thread.run());
        LineWriter { shared }
    }

    /// Waits until the file is open, for `limit` at most. A disk that does not answer is no error.
    ///
    /// # Errors
    /// If the file cannot be opened. With `tolerant`, only if that will not pass by itself, as a
    /// full disk or a lost connection does.
    pub fn wait_until_open(&self, limit: Duration, tolerant: bool) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.state.lock();
        while matches!(state.opening, Opening::Pending) {
            let waited = self.shared.progressed.wait_until(&mut state, deadline);
            if waited.timed_out() {
                break;
            }
        }
        match &state.opening {
            Opening::Failed(error) if !(tolerant && may_pass(error)) => Err(copy_error(error)),
            _ => Ok(()),
        }
    }

    /// Adds a line, or drops it if too many wait. Never waits for the disk.
    ///
    /// `text` ends with a line end. `is_of_step` is true for the one line that every step has.
    pub fn push(&self, text: String, step: Option<u64>, is_of_step: bool) {
        let mut state = self.shared.state.lock();
        state.backlog.push(Line {
            text,
            step,
            is_of_step,
        });
        let is_idle = std::mem::take(&mut state.is_idle);
        drop(state);
        if is_idle {
            self.shared.queued.notify_one();
        }
    }

    /// Returns the next report on the file, each once per outage.
    pub fn notice(&self) -> Option<Notice> {
        let mut state = self.shared.state.lock();
        let state = &mut *state;
        let earlier = state.notices.pop_front();
        earlier.or_else(|| {
            let all_accepted = !state.backlog.is_dropping();
            state.health.notice(Instant::now(), all_accepted)
        })
    }

    /// Returns the end of the lines so far.
    pub fn position(&self) -> WrittenLines {
        let lines = self.shared.state.lock().backlog.accepted();
        WrittenLines {
            shared: self.shared.clone(),
            lines,
        }
    }

    /// Waits until the file has all lines, until `deadline` at most, or with `is_hasty` only while
    /// the disk answers. Returns the lines that it lacks and why.
    pub fn flush(&self, deadline: Instant, is_hasty: bool) -> Option<(MissingLines, String)> {
        let mut state = self.shared.state.lock();
        loop {
            if state.backlog.is_empty() && !state.backlog.is_dropping() {
                return None;
            }
            let now = Instant::now();
            let gives_up = is_hasty && state.health.is_out(now);
            if gives_up || now >= deadline {
                let cause = state.health.cause(now);
                let cause = cause.unwrap_or_else(|| "the disk is too slow".into());
                return Some((state.backlog.unwritten(), cause));
            }
            // In short waits: nothing wakes this thread when a write begins to hang.
            let until = deadline.min(now + RETRY_TIME);
            self.shared.progressed.wait_until(&mut state, until);
        }
    }
}

impl Drop for LineWriter {
    fn drop(&mut self) {
        self.flush(Instant::now() + MAX_RETRY_TIME, true);
        self.shared.state.lock().is_abandoned = true;
        self.shared.queued.notify_one();
    }
}

impl WrittenLines {
    /// Waits until the file has the lines, while its disk answers.
    pub fn wait(&self) {
        let mut state = self.shared.state.lock();
        while state.backlog.written() < self.lines
            && !state.is_abandoned
            && !state.health.is_out(Instant::now())
        {
            self.shared.progressed.wait_for(&mut state, RETRY_TIME);
        }
    }
}

struct WriterThread {
    shared: Arc<Shared>,
    target: Target,
    reports_gap: bool,
    on_open: Option<OnOpen>,
    file: Option<OpenFile>,
    was_open: bool,
    retry: Duration,
}

impl WriterThread {
    fn new(options: Options) -> WriterThread {
        let record: Record = options.record;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                backlog: Backlog::new(options.limits, record),
                health: Health::default(),
                notices: VecDeque::new(),
                opening: Opening::Pending,
                is_idle: false,
                is_abandoned: false,
            }),
            queued: Condvar::new(),
            progressed: Condvar::new(),
        });
        WriterThread {
            shared,
            target: options.target,
            reports_gap: options.reports_gap,
            on_open: options.on_open,
            file: None,
            was_open: false,
            retry: RETRY_TIME,
        }
    }

    fn run(mut self) {
        // Opens the file even if no line waits.
        self.attempt(|_| Vec::new());
        self.remove_if_begun_late();
        while self.wait_for_lines() {
            self.attempt(|backlog| backlog.batch(BATCH_BYTES));
        }
    }

    /// Removes an empty file that is to begin after step 0, until it has its first line: to the
    /// next resume, an empty file is one whose disk took no line.
    fn remove_if_begun_late(&self) {
        let begins_late = self
            .file
            .as_ref()
            .is_some_and(|file| file.last_step.is_none());
        if let Target::After { point, .. } = &self.target
            && begins_late
            && self.reports_gap
            && point.step > 0
        {
            self.target.remove();
        }
    }

    /// Opens the file if necessary, and writes what `take` returns then.
    fn attempt(&mut self, take: impl FnOnce(&Backlog) -> Vec<u8>) {
        let shared = self.shared.clone();
        shared.state.lock().health.started(Instant::now());
        let (written, result) = match self.open() {
            Ok(file) => {
                let batch = take(&shared.state.lock().backlog);
                file.write(&batch)
            }
            Err(error) => (0, Err(error)),
        };
        let mut state = shared.state.lock();
        state.complete(written);
        match result {
            Ok(()) => {
                state.health.succeeded();
                self.retry = RETRY_TIME;
            }
            Err(error) => {
                if needs_reopening(&error) {
                    self.file = None;
                }
                state.health.failed(Instant::now(), error.to_string());
                if matches!(state.opening, Opening::Pending) {
                    state.opening = Opening::Failed(error);
                }
            }
        }
        shared.progressed.notify_all();
    }

    fn open(&mut self) -> io::Result<&mut OpenFile> {
        self.file.take_if(|open| self.target.is_lost(open));
        let file = match self.file.take() {
            Some(file) => file,
            None if self.was_open => self.reopen()?,
            None => {
                let file = self.target.open()?;
                self.opened(&file);
                file
            }
        };
        Ok(self.file.insert(file))
    }

    /// Opens the file again. A line of which it has a part continues there.
    fn reopen(&mut self) -> io::Result<OpenFile> {
        let pending = {
            let backlog = &mut self.shared.state.lock().backlog;
            backlog.restart_line();
            backlog.batch(BATCH_BYTES)
        };
        let (file, held) = self.target.reopen(&pending)?;
        self.shared.state.lock().complete(held);
        if let Some(on_open) = &self.on_open {
            on_open(&file.file);
        }
        Ok(file)
    }

    fn opened(&mut self, file: &OpenFile) {
        if let Some(on_open) = &self.on_open {
            on_open(&file.file);
        }
        let mut state = self.shared.state.lock();
        if let (Target::After { point, .. }, Some(last), false) =
            (&self.target, file.last_step, self.was_open)
            && self.reports_gap
            && last < point.step
        {
            let missing = MissingLines {
                lines: point.step - last,
                steps: point.step - last,
                span: Some((last + 1, point.step)),
            };
            state.backlog.report_missing_first(&missing);
            state.notices.push_back(Notice::Interrupted(missing));
        }
        state.opening = Opening::Open;
        self.was_open = true;
    }

    /// Waits for lines, and after a failure some time longer. Returns false at the end.
    fn wait_for_lines(&mut self) -> bool {
        let mut state = self.shared.state.lock();
        if state.health.cause(Instant::now()).is_some() {
            let deadline = Instant::now() + self.retry;
            self.retry = (self.retry * 2).min(MAX_RETRY_TIME);
            wait_for_retry(&self.shared, &mut state, deadline);
        } else {
            while state.backlog.is_empty() && !state.is_abandoned {
                state.is_idle = true;
                self.shared.queued.wait(&mut state);
            }
            state.is_idle = false;
        }
        !state.is_abandoned
    }
}

/// Waits until a deadline, or until the writer is dropped.
fn wait_for_retry(shared: &Shared, state: &mut MutexGuard<State>, deadline: Instant) {
    while !state.is_abandoned {
        if shared.queued.wait_until(state, deadline).timed_out() {
            return;
        }
    }
}

fn copy_error(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lines::ResumePoint;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::{
        io::{Read, Write},
        ops::RangeInclusive,
        os::fd::OwnedFd,
        path::{Path, PathBuf},
    };

    fn options(target: Target) -> Options {
        Options {
            target,
            limits: Limits {
                lines: 1000,
                bytes: 1 << 20,
            },
            record: |missing| format!("{{\"step\":0,\"missing\":{}}}", missing.lines),
            reports_gap: true,
            on_open: None,
        }
    }

    fn resume(path: PathBuf, step: u64) -> LineWriter {
        let point = ResumePoint {
            step,
            repeats_validation: false,
        };
        LineWriter::start(options(Target::After { path, point }))
    }

    fn push(writer: &LineWriter, step: u64) {
        writer.push(format!("{{\"step\":{step}}}\n"), Some(step), true);
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn wait_for_notice(writer: &LineWriter) -> Notice {
        let deadline = soon();
        loop {
            if let Some(notice) = writer.notice() {
                return notice;
            }
            assert!(Instant::now() < deadline, "no notice");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_resumed_file_holds_each_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/metrics.jsonl");
        let writer = resume(path.clone(), 0);
        for step in 1..=4 {
            push(&writer, step);
        }
        drop(writer);
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"step\": 5, \"lo");
        std::fs::write(&path, text).unwrap();
        let writer = resume(path.clone(), 2);
        push(&writer, 3);
        assert_eq!(writer.flush(soon(), false), None);
        assert_eq!(writer.notice(), None);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n");
        // A killed run whose disk had not taken steps 4 and 5.
        drop(writer);
        let writer = resume(path.clone(), 5);
        push(&writer, 6);
        assert_eq!(writer.flush(soon(), false), None);
        let lost = MissingLines {
            lines: 2,
            steps: 2,
            span: Some((4, 5)),
        };
        assert_eq!(writer.notice(), Some(Notice::Interrupted(lost)));
        let text = std::fs::read_to_string(&path).unwrap();
        let expected = "{\"step\":3}\n{\"step\":0,\"missing\":2}\n{\"step\":6}\n";
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn a_full_disk_is_reported_once_and_never_waited_for() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let writer = LineWriter::start(options(Target::Open(full)));
        let position = writer.position();
        push(&writer, 1);
        let Notice::Outage(cause) = wait_for_notice(&writer) else {
            panic!("no outage");
        };
        assert!(cause.contains("No space left"), "{cause}");
        let began = Instant::now();
        for step in 2..=3000 {
            push(&writer, step);
        }
        position.wait();
        writer.position().wait();
        assert_eq!(writer.notice(), None);
        let (missing, cause) = writer.flush(soon(), true).unwrap();
        assert_eq!((missing.lines, missing.span), (3000, Some((1, 3000))));
        assert!(cause.contains("No space left"), "{cause}");
        drop(writer);
        assert!(began.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn a_hanging_disk_delays_lines_and_then_drops_them() {
        let (mut reader, pipe) = std::io::pipe().unwrap();
        let writer = LineWriter::start(options(Target::Open(File::from(OwnedFd::from(pipe)))));
        // More than a pipe holds: its writer blocks.
        let blocked = "x".repeat(100_000);
        writer.push(format!("{blocked}\n"), None, false);
        let began = Instant::now();
        while !matches!(writer.notice(), Some(Notice::Outage(_))) {
            assert!(began.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(20));
        }
        let pushed = Instant::now();
        for step in 1..=2000 {
            push(&writer, step);
        }
        writer.position().wait();
        assert!(pushed.elapsed() < Duration::from_secs(1));
        let drain = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        assert_eq!(writer.flush(soon(), false), None);
        let Notice::Recovered { dropped, .. } = wait_for_notice(&writer) else {
            panic!("no recovery");
        };
        push(&writer, 2001);
        assert_eq!(writer.flush(soon(), false), None);
        drop(writer);
        let text = drain.join().unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let missing = dropped.lines;
        assert!(missing > 0 && dropped.span.unwrap().1 == 2000);
        assert_eq!(lines.len() as u64, 1 + (2000 - missing) + 1 + 1);
        assert_eq!(lines[1], "{\"step\":1}");
        let record = format!("{{\"step\":0,\"missing\":{missing}}}");
        assert_eq!(lines[lines.len() - 2..], [&record, "{\"step\":2001}"]);
    }

    #[test]
    fn a_removed_file_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let writer = resume(path.clone(), 0);
        push(&writer, 1);
        assert_eq!(writer.flush(soon(), false), None);
        std::fs::remove_file(&path).unwrap();
        push(&writer, 2);
        assert_eq!(writer.flush(soon(), false), None);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"step\":2}\n");
    }

    /// Returns a descriptor that every write fails on, with ENOTCONN as on a lost FUSE mount.
    fn unmounted() -> File {
        let flags = SockFlag::empty();
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None);
        File::from(socket.unwrap())
    }

    fn line(step: u64) -> Line {
        Line {
            text: format!("{{\"step\":{step}}}\n"),
            step: Some(step),
            is_of_step: true,
        }
    }

    fn write_steps(thread: &mut WriterThread, steps: RangeInclusive<u64>) {
        for step in steps {
            thread.shared.state.lock().backlog.push(line(step));
        }
        thread.attempt(|backlog| backlog.batch(BATCH_BYTES));
    }

    /// Writes 100 steps to the file of `target`. After 50 its file system goes away and comes back;
    /// `left` is what failed writes left in the file. Returns its text.
    fn text_after_remount(target: Target, left: &str) -> String {
        let path = target.path().unwrap().to_path_buf();
        let mut thread = WriterThread::new(options(target));
        write_steps(&mut thread, 1..=50);
        thread.file.as_mut().unwrap().file = unmounted();
        write_steps(&mut thread, 51..=75);
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(left.as_bytes()).unwrap();
        for _ in 0..3 {
            thread.attempt(|backlog| backlog.batch(BATCH_BYTES));
        }
        write_steps(&mut thread, 76..=100);
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_stale_descriptor_is_replaced_and_each_line_is_there_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let lines =
            |steps: RangeInclusive<u64>| -> String { steps.map(|step| line(step).text).collect() };
        let expected = lines(1..=100);
        // The last is not what this run wrote, and no whole line.
        let two_lines = lines(51..=52) + "{";
        let all_left = ["", "{\"st", "{\"step\":51}", &two_lines, "{\"step\":7"];
        for (number, left) in all_left.into_iter().enumerate() {
            let target = Target::After {
                path: path(&format!("metrics-{number}")),
                point: ResumePoint::default(),
            };
            assert_eq!(text_after_remount(target, left), expected, "{left}");
        }
        for (number, left) in all_left[..3].iter().enumerate() {
            let target = Target::Append(path(&format!("log-{number}")));
            assert_eq!(text_after_remount(target, left), expected, "{left}");
        }
        let mixed = lines(1..=50) + "of libtorch\n" + &lines(51..=100);
        let log = Target::Append(path("log"));
        assert_eq!(text_after_remount(log, "of libtorch"), mixed);
    }

    fn missing_after_resume(path: &Path, step: u64) -> Option<(u64, u64)> {
        let writer = resume(path.to_path_buf(), step);
        writer
            .wait_until_open(Duration::from_secs(10), true)
            .unwrap();
        match writer.notice() {
            Some(Notice::Interrupted(missing)) => missing.span,
            None => None,
            other => panic!("{other:?}"),
        }
    }

    fn wait_until_absent(path: &Path) {
        let deadline = soon();
        while path.exists() {
            assert!(Instant::now() < deadline, "{} stays", path.display());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The disk filled up before the first line, and the run resumes from memory.
    #[test]
    fn a_gap_at_the_start_is_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let record = "{\"step\":5,\"first_step\":1}\n{\"step\":6}\n";
        for text in ["", "\0\0\0\0", "{\"step\":1,", record] {
            let path = folder.path().join("metrics.jsonl");
            std::fs::write(&path, text).unwrap();
            assert_eq!(missing_after_resume(&path, 4), Some((1, 4)), "{text}");
            let text = std::fs::read_to_string(&path).unwrap();
            assert_eq!(text, "{\"step\":0,\"missing\":4}\n");
        }
    }

    /// A run that resumes in a new folder, or whose file the user removed, lacks no lines. Its
    /// restarts lack none either.
    #[test]
    fn a_file_that_begins_at_a_resume_lacks_no_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        for _ in 0..2 {
            // Before the first line.
            assert_eq!(missing_after_resume(&path, 200), None);
            wait_until_absent(&path);
        }
        let writer = resume(path.clone(), 200);
        push(&writer, 201);
        push(&writer, 202);
        drop(writer);
        assert_eq!(missing_after_resume(&path, 201), None);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":201}\n");
        for _ in 0..2 {
            assert_eq!(missing_after_resume(&path, 200), None);
            wait_until_absent(&path);
        }
        // The validation of step 200 is repeated again.
        let validation = "{\"step\":200,\"validation_loss\":2.0}\n";
        std::fs::write(&path, validation).unwrap();
        let repeating = ResumePoint {
            step: 200,
            repeats_validation: true,
        };
        let opened = Target::After {
            path: path.clone(),
            point: repeating,
        };
        assert_eq!(opened.open().unwrap().last_step, None);
        // A fresh run that failed before its first step.
        let path = folder.path().join("fresh.jsonl");
        for _ in 0..2 {
            assert_eq!(missing_after_resume(&path, 0), None);
            assert!(path.exists());
        }
    }

    /// The rest of a line alone would be no line of the new file.
    #[test]
    fn a_line_that_a_removed_file_had_in_part_is_written_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let target = Target::After {
            path: path.clone(),
            point: ResumePoint::default(),
        };
        let mut thread = WriterThread::new(options(target));
        thread.attempt(|_| Vec::new());
        thread.shared.state.lock().backlog.push(line(1));
        thread.attempt(|backlog| backlog.batch(BATCH_BYTES)[..4].to_vec());
        std::fs::remove_file(&path).unwrap();
        write_steps(&mut thread, 2..=2);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":1}\n{\"step\":2}\n");
    }

    #[test]
    fn links_and_folders_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/dev/full", &link).unwrap();
        for path in [link, folder.path().to_path_buf()] {
            let writer = resume(path, 0);
            let opened = writer.wait_until_open(Duration::from_secs(10), true);
            assert!(opened.is_err());
        }
    }
}
