//! `moerun data prepare`.

use crate::cli::PrepareArgs;
use crate::progress;
use anyhow::Result;
use std::process::ExitCode;
use trainer::data::{PrepareOptions, prepare};

pub(crate) fn run(args: PrepareArgs) -> Result<ExitCode> {
    let job = PrepareOptions {
        inputs: args.inputs,
        extensions: args
            .extensions
            .iter()
            .map(|e| e.trim_start_matches('.').to_lowercase())
            .collect(),
        text_key: args.text_key,
        output: args.output,
        tokenizer: args.tokenizer,
        vocab_size: args.vocab_size,
        validation_fraction: args.validation_fraction,
        max_bytes: args.max_mb.map(|mb| (mb * 1e6) as u64),
    };
    let bar = progress::Preparation::new();
    let prepared = prepare(&job, &|what, done, of| bar.show(what, done, of))?;
    bar.clear();
    println!(
        "{}: {} documents, {:.1} MB of text -> {} tokens to train on, {} to validate with; vocabulary {}; unigram \
         entropy {:.3} nats a token",
        job.output.display(),
        prepared.documents,
        prepared.bytes as f64 / 1e6,
        prepared.train_tokens,
        prepared.validation_tokens,
        prepared.vocab_size,
        prepared.unigram_entropy
    );
    Ok(ExitCode::SUCCESS)
}
