//! A finding of the doctor: a check, its result, and the fix of a problem.

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    check: &'static str,
    detail: String,
    severity: Severity,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Severity {
    Ok,
    /// A run works, but not as well as with this fix.
    Warn(String),
    /// A run fails without this fix.
    Fail(String),
}

impl Finding {
    pub(super) fn ok(check: &'static str, detail: impl Into<String>) -> Finding {
        Finding {
            check,
            detail: detail.into(),
            severity: Severity::Ok,
        }
    }

    pub(super) fn warn(
        check: &'static str,
        detail: impl Into<String>,
        fix: impl Into<String>,
    ) -> Finding {
        Finding {
            check,
            detail: detail.into(),
            severity: Severity::Warn(fix.into()),
        }
    }

    pub(super) fn fail(
        check: &'static str,
        detail: impl Into<String>,
        fix: impl Into<String>,
    ) -> Finding {
        Finding {
            check,
            detail: detail.into(),
            severity: Severity::Fail(fix.into()),
        }
    }

    pub(super) fn print(&self) {
        let (label, fix) = match &self.severity {
            Severity::Ok => ("ok", None),
            Severity::Warn(fix) => ("warn", Some(fix)),
            Severity::Fail(fix) => ("fail", Some(fix)),
        };
        println!("{label:<4} {}: {}", self.check, self.detail);
        if let Some(fix) = fix {
            println!("     fix: {fix}");
        }
    }

    pub(super) fn failed(&self) -> bool {
        matches!(self.severity, Severity::Fail(_))
    }
}
