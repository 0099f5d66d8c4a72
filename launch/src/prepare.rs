//! `moerun data prepare`: writes token files from text.

use crate::{cli::PrepareArgs, progress};
use anyhow::Result;
use dataset::prepare::{PrepareOptions, prepare};
use std::process::ExitCode;

pub(crate) fn run(args: PrepareArgs) -> Result<ExitCode> {
    let options = PrepareOptions {
        inputs: args.inputs,
        extensions: args
            .extensions
            .iter()
            .map(|extension| extension.trim_start_matches('.').to_lowercase())
            .collect(),
        text_key: args.text_key,
        output: args.output,
        tokenizer: args.tokenizer,
        vocab_size: args.vocab_size,
        validation_fraction: args.validation_fraction,
        max_bytes: args.max_mb.map(|mb| (mb * 1e6) as u64),
    };
    let bar = progress::Preparation::new();
    let prepared = prepare(&options, &|stage, done, total| bar.show(stage, done, total))?;
    bar.clear();
    println!(
        "{}: {} documents, {:.1} MB of text -> {} training tokens, {} validation tokens; \
         vocabulary {}; unigram entropy {:.3} nats per token",
        options.output.display(),
        prepared.documents,
        prepared.bytes as f64 / 1e6,
        prepared.train_tokens,
        prepared.validation_tokens,
        prepared.vocab_size,
        prepared.unigram_entropy
    );
    Ok(ExitCode::SUCCESS)
}
