//! `cargo x tidy`: checks that change nothing.
//!
//! A check is a file in this folder and a line in [`CHECKS`]. It reads one file, one parsed Rust
//! file or the whole tree, and reports problems. A problem is waived by a comment with
//! `tidy: allow(CHECK)` at the end of its line or on a line of its own above.

mod bools;
mod comment_blocks;
mod comments;
mod cycles;
mod density;
mod docs;
mod for_each;
mod format;
mod generated;
mod lets;
mod links;
mod manifests;
mod pure_files;
mod report;
mod syntax;
mod tuples;
mod typos;
mod width;
mod words;

use crate::{
    failure::Failure,
    tree::{File, Language, Tree},
};
use anyhow::{Context, Result, anyhow, bail};
use report::{Problem, Report};
use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering},
    thread::{available_parallelism, scope},
};

/// A rule and the function that looks for violations of it.
pub(crate) struct Check {
    pub name: &'static str,
    /// The rule, for `--help`.
    pub rule: &'static str,
    run: Run,
}

/// The input of a check.
#[derive(Clone, Copy)]
enum Run {
    File(fn(&File, &mut Report)),
    Syntax(fn(&File, &syn::File, &mut Report)),
    Tree(fn(&Tree, &mut Report) -> Result<()>),
}

#[rustfmt::skip]
const CHECKS: [Check; 16] = [
    Check::new("format", "rustfmt's defaults at 100 columns", Run::Tree(format::check)),
    Check::new("width", "no line over 100 columns", Run::File(width::check)),
    Check::new("words", "no word or phrase of xtask/words.txt", Run::Tree(words::check)),
    Check::new("comments", "no comment of three words or fewer", Run::Syntax(comments::check)),
    Check::new("docs", "docs on what other crates use", Run::Tree(docs::check)),
    Check::new("cycles", "no import cycle between the files of a crate", Run::Tree(cycles::check)),
    Check::new("tuples", "no tuple as a parameter", Run::Syntax(tuples::check)),
    Check::new("bools", "no match on a bool", Run::Syntax(bools::check)),
    Check::new("lets", "no let that packs several bindings", Run::Syntax(lets::check)),
    Check::new("for_each", "no for_each, except in parallel", Run::Syntax(for_each::check)),
    Check::new("pure_files", "no input or output in decisions", Run::Syntax(pure_files::check)),
    Check::new("density", "at most 3.2 words per code line", Run::Tree(density::check)),
    Check::new("manifests", "complete manifests, used dependencies", Run::Tree(manifests::check)),
    Check::new("links", "no dead link in Markdown", Run::Tree(links::check)),
    Check::new("typos", "no known misspelling", Run::Tree(typos::check)),
    Check::new("generated", "a current reference and schema", Run::Tree(generated::check)),
];

impl Check {
    const fn new(name: &'static str, rule: &'static str, run: Run) -> Check {
        Check { name, rule, run }
    }
}

/// Returns the checks with their rules, one per line, for `--help`.
pub(crate) fn list() -> String {
    let line = |check: &Check| format!("  {:<10} {}", check.name, check.rule);
    let lines: Vec<String> = CHECKS.iter().map(line).collect();
    format!("Checks:\n{}", lines.join("\n"))
}

/// Runs the checks of these names, or all, and prints their problems.
///
/// # Errors
/// If there is a problem, a check cannot run, or a name is unknown.
pub(crate) fn run(tree: &Tree, names: &[String]) -> Result<()> {
    let checks = select(names)?;
    let mut reports = reports(tree, &checks)?;
    let mut problems = 0;
    let mut failed = 0;
    for check in &checks {
        let report = reports.entry(check.name).or_default();
        report
            .problems
            .retain(|problem| !waived(tree, check.name, problem));
        let key = |problem: &Problem| (problem.path.clone(), problem.line);
        report.problems.sort_by_key(key);
        for Problem {
            path,
            line,
            message,
        } in &report.problems
        {
            println!("{path}:{line}: {}: {message}", check.name);
        }
        problems += report.problems.len();
        failed += usize::from(!report.problems.is_empty());
    }
    for note in reports.values().flat_map(|report| &report.notes) {
        println!("{note}");
    }
    if problems == 0 {
        println!("tidy: ok");
        return Ok(());
    }
    let some =
        |count: usize, name: &str| format!("{count} {name}{}", if count == 1 { "" } else { "s" });
    bail!(Failure::new(
        format!(
            "tidy: {} in {}",
            some(problems, "problem"),
            some(failed, "check")
        ),
        "fix each line as it says; `cargo x fix` formats code and regenerates files",
    ))
}

fn select(names: &[String]) -> Result<Vec<&'static Check>> {
    if names.is_empty() {
        return Ok(CHECKS.iter().collect());
    }
    let find = |name: &String| {
        CHECKS
            .iter()
            .find(|check| check.name == name)
            .ok_or_else(|| {
                let known = CHECKS.map(|check| check.name).join(", ");
                let hint = format!("choose from {known}");
                anyhow!(Failure::new(format!("tidy: unknown check {name}"), hint))
            })
    };
    names.iter().map(find).collect()
}

/// Runs the checks side by side and returns the report of each.
fn reports(tree: &Tree, checks: &[&'static Check]) -> Result<BTreeMap<&'static str, Report>> {
    let next = AtomicUsize::new(0);
    let workers = available_parallelism().map_or(1, |count| count.get());
    scope(|threads| {
        let mut running = Vec::new();
        for check in checks {
            if let Run::Tree(run) = check.run {
                running.push(threads.spawn(move || {
                    let mut report = Report::default();
                    run(tree, &mut report).context(check.name)?;
                    Ok(BTreeMap::from([(check.name, report)]))
                }));
            }
        }
        for _ in 0..workers {
            running.push(threads.spawn(|| check_files(tree, checks, &next)));
        }
        let mut all: BTreeMap<&'static str, Report> = BTreeMap::new();
        for thread in running {
            let part: Result<_> = thread.join().map_err(|_| anyhow!("a check panicked"))?;
            for (name, report) in part? {
                all.entry(name).or_default().merge(report);
            }
        }
        Ok(all)
    })
}

/// Runs the checks of single files on those that no other thread has taken.
fn check_files(
    tree: &Tree,
    checks: &[&'static Check],
    next: &AtomicUsize,
) -> Result<BTreeMap<&'static str, Report>> {
    let mut reports: BTreeMap<&'static str, Report> = BTreeMap::new();
    let needs_syntax = checks
        .iter()
        .any(|check| matches!(check.run, Run::Syntax(_)));
    while let Some(file) = tree.files.get(next.fetch_add(1, Ordering::Relaxed)) {
        let parsed = match file.language {
            Language::Rust if needs_syntax => Some(syntax::parse(file)?),
            _ => None,
        };
        for check in checks {
            let report = reports.entry(check.name).or_default();
            match (check.run, &parsed) {
                (Run::File(run), _) => run(file, report),
                (Run::Syntax(run), Some(parsed)) => run(file, parsed, report),
                _ => {}
            }
        }
    }
    Ok(reports)
}

/// True if the source says that the rule does not hold for this line.
fn waived(tree: &Tree, check: &str, problem: &Problem) -> bool {
    let Some(file) = tree.file(&problem.path) else {
        return false;
    };
    let waiver = format!("tidy: allow({check})");
    let line = |number: usize| {
        file.text
            .lines()
            .nth(number.wrapping_sub(1))
            .unwrap_or_default()
    };
    let above = line(problem.line - 1).trim_start();
    line(problem.line).contains(&waiver)
        || (above.starts_with(['/', '#', '<']) && above.contains(&waiver))
}

/// Returns the problems of a check on one file, as `line: message`.
#[cfg(test)]
fn problems_in(path: &str, text: &str, name: &str) -> Vec<String> {
    problems(&Tree::of(&[(path, text)]), name)
}

/// Returns the problems of a check on a tree, as `line: message`.
#[cfg(test)]
fn problems(tree: &Tree, name: &str) -> Vec<String> {
    let checks = select(&[name.to_owned()]).unwrap();
    let report = reports(tree, &checks).unwrap().remove(name).unwrap();
    let problems = report
        .problems
        .iter()
        .filter(|problem| !waived(tree, name, problem));
    problems
        .map(|Problem { line, message, .. }| format!("{line}: {message}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_checks_are_refused_with_the_known_ones() {
        let error = run(&Tree::of(&[]), &["with".to_owned()]).unwrap_err();
        assert_eq!(error.to_string(), "tidy: unknown check with");
        let failure = error.downcast_ref::<Failure>().unwrap();
        assert!(failure.hint.contains("width, words"), "{}", failure.hint);
    }

    #[test]
    fn a_waiver_is_for_its_line_and_its_check() {
        let long = "a".repeat(101);
        let waived = |text: String| problems_in("a.rs", &text, "width").is_empty();
        assert!(waived(format!("{long} // tidy: allow(width)")));
        assert!(waived(format!("// tidy: allow(width)\n{long}")));
        assert!(!waived(format!("{long} // tidy: allow(words)")));
        assert!(!waived(format!("x // tidy: allow(width)\n{long}")));
    }

    #[test]
    fn the_tree_fails_with_one_problem() {
        let tree = Tree::of(&[("a.rs", &"a".repeat(101))]);
        let error = run(&tree, &["width".to_owned()]).unwrap_err();
        assert_eq!(error.to_string(), "tidy: 1 problem in 1 check");
        run(&Tree::of(&[("a.rs", "a")]), &["width".to_owned()]).unwrap();
    }
}
