//! `moerun evaluate`: log-likelihoods of texts, and losses on token files.

use crate::{cli::EvaluateArgs, hint::printable, progress::Transfer};
use anyhow::{Context, Result};
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};
use trainer::{EvaluateOptions, ScoreRequest, config::SourceConfig, evaluate, score};

pub(crate) fn run(args: EvaluateArgs) -> Result<ExitCode> {
    match args.requests {
        Some(requests) => score_requests(&args.model.path(), args.tokenizer, &requests),
        None => evaluate_data(args),
    }
}

fn evaluate_data(args: EvaluateArgs) -> Result<ExitCode> {
    let source = |path: &PathBuf| SourceConfig {
        format: args.format,
        dtype: args.dtype,
        ..SourceConfig::new(path)
    };
    let options = EvaluateOptions {
        sources: args.data.iter().map(source).collect(),
        sequences: args.sequences.map(|count| count as u64),
        sequence_length: args.sequence_length,
    };
    let bar = Transfer::new("loading");
    let progress = |done, total| bar.show(done, total);
    evaluate(
        &args.model.path(),
        &options,
        &progress,
        &mut note,
        &mut |loss| {
            print_line(&serde_json::to_string(&loss).expect("a loss is plain data"));
        },
    )?;
    Ok(ExitCode::SUCCESS)
}

fn note(note: &str) {
    eprintln!("{}", printable(note));
}

/// Prints a line, which fails if the reader has closed the pipe.
fn print_line(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn score_requests(model: &Path, tokenizer: Option<PathBuf>, requests: &Path) -> Result<ExitCode> {
    let path = requests.display().to_string();
    let text = std::fs::read_to_string(requests).with_context(|| format!("cannot read {path}"))?;
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    let parse = |(number, line): (usize, &str)| {
        let request: Result<ScoreRequest, _> = serde_json::from_str(line);
        request.with_context(|| format!("{path}, line {}", number + 1))
    };
    let requests: Vec<ScoreRequest> = lines.map(parse).collect::<Result<_>>()?;
    let bar = Transfer::new("loading");
    let progress = |done, total| bar.show(done, total);
    score(
        model,
        tokenizer,
        &requests,
        &progress,
        &mut note,
        &mut |score| {
            print_line(&serde_json::to_string(&score).expect("a score is plain data"));
        },
    )?;
    Ok(ExitCode::SUCCESS)
}
