//! `cargo x docs`: the book and the API documentation, with warnings as errors.

use crate::{cargo, failure::Failure, tree::Tree};
use anyhow::{Context, Result, ensure};
use std::{path::PathBuf, process::Command};

const MDBOOK: &str = "0.5.4";

/// Builds `target/book` and `target/doc`.
///
/// # Errors
/// If either cannot be built, or a warning is printed.
pub(crate) fn build(tree: &Tree) -> Result<()> {
    build_book(tree)?;
    let mut doc = cargo::command(tree, &["doc", "--workspace", "--no-deps"]);
    cargo::run(doc.env("RUSTDOCFLAGS", "-D warnings"))
}

fn build_book(tree: &Tree) -> Result<()> {
    ensure!(
        tree.file("docs/book.toml").is_some(),
        "docs/book.toml: not found"
    );
    let target = tree.root.join("target/book");
    let mut mdbook = Command::new(mdbook()?);
    mdbook.current_dir(&tree.root).arg("build");
    let output = mdbook
        .arg("--dest-dir")
        .arg(&target)
        .arg("docs")
        .output()
        .context("mdbook")?;
    let said = String::from_utf8_lossy(&output.stderr);
    eprint!("{said}");
    let has_warning = said
        .lines()
        .any(|line| line.contains("WARN") || line.contains("ERROR"));
    ensure!(
        output.status.success() && !has_warning,
        Failure::new("mdbook: warnings or errors", "fix the pages named above")
    );
    println!("docs: {}", target.join("index.html").display());
    Ok(())
}

/// Returns the program mdBook, which is installed at the first call.
fn mdbook() -> Result<PathBuf> {
    let root = cache()?.join(format!("mdbook-{MDBOOK}"));
    let program = root.join("bin/mdbook");
    if !program.exists() {
        eprintln!(
            "docs: installing mdBook {MDBOOK} into {} (minutes)",
            root.display()
        );
        let mut install = Command::new("cargo");
        install.args([
            "install",
            "mdbook",
            "--version",
            MDBOOK,
            "--locked",
            "--quiet",
        ]);
        install.args(["--no-default-features", "--root"]).arg(&root);
        // Its own build folder, which cargo removes.
        cargo::run(install.env_remove("CARGO_TARGET_DIR"))?;
    }
    Ok(program)
}

/// Returns the folder that `scripts/setup` downloads into.
fn cache() -> Result<PathBuf> {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(cache) = variable("MOERUN_CACHE") {
        return Ok(cache);
    }
    let home = || Some(variable("HOME")?.join(".cache"));
    let base = variable("XDG_CACHE_HOME")
        .or_else(home)
        .context("HOME is not set")?;
    Ok(base.join("moerun"))
}
