//! Problems that a check reports.

/// A line that breaks a rule.
#[derive(Debug)]
pub(super) struct Problem {
    pub path: String,
    pub line: usize,
    pub message: String,
}

/// Problems, and figures worth printing even when there are none.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub problems: Vec<Problem>,
    pub notes: Vec<String>,
}

impl Report {
    pub(super) fn problem(&mut self, path: &str, line: usize, message: impl Into<String>) {
        self.problems.push(Problem {
            path: path.to_owned(),
            line,
            message: message.into(),
        });
    }

    pub(super) fn note(&mut self, line: impl Into<String>) {
        self.notes.push(line.into());
    }

    pub(super) fn merge(&mut self, other: Report) {
        self.problems.extend(other.problems);
        self.notes.extend(other.notes);
    }
}
