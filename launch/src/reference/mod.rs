//! `moerun reference`: writes the reference pages and the JSON schema from doc comments.
//!
//! The command is hidden. `cargo x fix` writes the files; `cargo x tidy` and a test check them.

mod cli;
mod config;
mod markdown;
mod metrics;
mod schema;

use crate::cli::ReferenceArgs;
use crate::config_file;
use crate::hint::WithHint;
use anyhow::{Context, Result, anyhow};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

struct GeneratedFile {
    path: PathBuf,
    text: String,
}

/// Writes the generated files, or checks them with `--check`.
///
/// # Errors
/// If a file cannot be written, or is stale.
pub(crate) fn run(args: &ReferenceArgs) -> Result<ExitCode> {
    let files = generate(args);
    if args.check {
        check(&files)?;
    } else {
        for file in &files {
            write(file)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn generate(args: &ReferenceArgs) -> Vec<GeneratedFile> {
    let page = |name: &str, text: String| GeneratedFile {
        path: args.dir.join(name),
        text,
    };
    vec![
        page("configuration.md", config::page()),
        page("command-line.md", cli::page()),
        page("metrics.md", metrics::page()),
        GeneratedFile {
            path: args.schema.clone(),
            text: config_file::schema(),
        },
    ]
}

fn check(files: &[GeneratedFile]) -> Result<()> {
    let is_stale = |file: &&GeneratedFile| {
        let text = std::fs::read_to_string(&file.path);
        text.map_or(true, |text| text != file.text)
    };
    let stale: Vec<String> = files
        .iter()
        .filter(is_stale)
        .map(|file| file.path.display().to_string())
        .collect();
    let verb = match stale.len() {
        0 => return Ok(()),
        1 => "is",
        _ => "are",
    };
    Err(anyhow!("{} {verb} stale", stale.join(", "))).hint("cargo x fix")
}

fn write(file: &GeneratedFile) -> Result<()> {
    let path = file.path.display();
    let folder = file.path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&file.path, &file.text))
        .with_context(|| format!("cannot write {path}"))?;
    println!("{path}");
    Ok(())
}
