//! `moerun generate`: prints text while the model produces it.

use crate::{cli::GenerateArgs, hint::printable, progress::Transfer};
use anyhow::Result;
use std::{io::Write, process::ExitCode};
use trainer::GenerateOptions;

pub(crate) fn run(args: GenerateArgs) -> Result<ExitCode> {
    let options = GenerateOptions {
        checkpoint: args.model.path(),
        prompt: args.prompt,
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        seed: args.seed,
        tokenizer: args.tokenizer,
    };
    let mut out = std::io::stdout().lock();
    let mut warn = |warning: &str| {
        let warning = printable(warning);
        let _ = writeln!(std::io::stderr(), "warning: {warning}");
    };
    let bar = Transfer::new("loading");
    let progress = |done, total| bar.show(done, total);
    trainer::generate(&options, &progress, &mut warn, &mut |text| {
        // Printing fails if the reader has closed the pipe.
        let _ = write!(out, "{}", printable(text)).and_then(|()| out.flush());
    })?;
    let _ = writeln!(out);
    Ok(ExitCode::SUCCESS)
}
