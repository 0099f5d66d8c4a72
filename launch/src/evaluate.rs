//! `moerun evaluate`: log-likelihoods of texts.

use crate::{cli::EvaluateArgs, progress::Transfer};
use anyhow::{Context, Result};
use std::{io::Write, process::ExitCode};
use trainer::{ScoreRequest, score};

pub(crate) fn run(args: EvaluateArgs) -> Result<ExitCode> {
    let path = args.requests.display().to_string();
    let text =
        std::fs::read_to_string(&args.requests).with_context(|| format!("cannot read {path}"))?;
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    let parse = |(number, line): (usize, &str)| {
        let request: Result<ScoreRequest, _> = serde_json::from_str(line);
        request.with_context(|| format!("{path}, line {}", number + 1))
    };
    let requests: Vec<ScoreRequest> = lines.map(parse).collect::<Result<_>>()?;
    let model = args.model.path();
    let mut out = std::io::stdout().lock();
    let bar = Transfer::new("loading");
    let progress = |done, total| bar.show(done, total);
    score(&model, args.tokenizer, &requests, &progress, &mut |score| {
        let line = serde_json::to_string(&score).expect("a score is plain data");
        // Printing fails if the reader has closed the pipe.
        let _ = writeln!(out, "{line}");
    })?;
    Ok(ExitCode::SUCCESS)
}
