//! Text generation from a checkpoint.

use super::loaded::{LoadedModel, find_tokenizer};
use crate::{Error, hub::ByteProgress, model::Model};
use dataset::tokenizer::{END_OF_DOCUMENT, load_tokenizer};
use parallel::{Accelerator, Cpu};
use std::path::PathBuf;
use tch::{Kind, Tensor};

/// Prompt and sampling of [`generate`].
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// A run's folder, its `checkpoints` folder, one checkpoint, or the folder of a Hugging Face
    /// model.
    pub checkpoint: PathBuf,
    /// Beginning of the text.
    pub prompt: String,
    /// Maximum number of tokens to add.
    pub max_tokens: usize,
    /// Divisor of the logits. 1 samples from the model's distribution, 0 takes the likeliest token.
    pub temperature: f64,
    /// Number of likeliest tokens to sample from; 0 samples from all.
    pub top_k: usize,
    /// Seed of the sampled tokens.
    pub seed: i64,
    /// A `tokenizer.json` that replaces the run's.
    pub tokenizer: Option<PathBuf>,
}

/// Generates text on one CPU and passes it to `write` piece by piece. Calls `warn` first with a
/// message for each newer checkpoint that cannot be used.
///
/// # Errors
/// If there is no usable checkpoint or tokenizer.
pub fn generate(
    options: &GenerateOptions,
    progress: &ByteProgress,
    warn: &mut dyn FnMut(&str),
    write: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    let LoadedModel {
        context: length,
        tokenizers,
        model,
        notes,
        document_start,
        start_token,
        mut end_tokens,
        run,
    } = LoadedModel::open(&options.checkpoint, progress)?;
    for note in notes {
        warn(&note);
    }
    let given = options.tokenizer.clone();
    let tokenizer_path = find_tokenizer(&given.map_or(tokenizers, |given| vec![given]))?;
    let tokenizer = load_tokenizer(&tokenizer_path)?;
    tch::manual_seed(options.seed);

    let failed =
        |error: tokenizers::Error| Error::Tokenizer(format!("the tokenizer failed: {error}"));
    if end_tokens.is_empty() {
        end_tokens.extend(tokenizer.token_to_id(END_OF_DOCUMENT));
    }
    // Most released models expect the tokens that their tokenizers put before a text.
    let prompt = tokenizer.encode(options.prompt.as_str(), run.is_none());
    let mut tokens: Vec<u32> = document_start.into_iter().collect();
    tokens.extend(prompt.map_err(failed)?.get_ids());
    let size = model.config().vocab_size;
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= size) {
        return Err(Error::Tokenizer(format!(
            "the tokenizer {} has the token {token} for a part of the prompt, and the model a \
             vocabulary of {size}: name the tokenizer of the model's data with --tokenizer",
            tokenizer_path.display()
        )));
    }
    if tokens.is_empty() {
        // An empty prompt is the start of a document.
        let first = start_token.or(end_tokens.first().copied());
        tokens.push(first.filter(|&first| (first as usize) < size).unwrap_or(0));
    }
    let start = tokens.len();
    write(&options.prompt);
    let mut written = String::new();
    for _ in 0..options.max_tokens {
        let context = &tokens[tokens.len().saturating_sub(length)..];
        let next = tch::no_grad(|| next_token(&model, context, options))?;
        if end_tokens.contains(&next) {
            break;
        }
        tokens.push(next);
        // A character may need several tokens; text with a partial one waits.
        let text = tokenizer.decode(&tokens[start..], false).map_err(failed)?;
        if !text.ends_with('\u{FFFD}') && text.starts_with(&written) {
            write(&text[written.len()..]);
            written = text;
        }
    }
    Ok(())
}

fn next_token(model: &Model, tokens: &[u32], options: &GenerateOptions) -> Result<u32, Error> {
    let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
    let input = Cpu.upload(&Tensor::from_slice(&ids).view([1, -1]));
    let hidden = model.forward(&input)?.hidden_td;
    let last = hidden.narrow(0, ids.len() as i64 - 1, 1);
    let logits = model.logits(&last).view([-1]);
    if options.temperature <= 0.0 {
        return Ok(logits.argmax(-1, false).int64_value(&[]) as u32);
    }
    let mut logits = logits / options.temperature;
    let top_k = options.top_k as i64;
    if top_k > 0 && top_k < logits.size()[0] {
        let least = logits.topk(top_k, -1, true, true).0.min();
        logits = logits.masked_fill(&logits.lt_tensor(&least), f64::NEG_INFINITY);
    }
    let probabilities = logits.softmax(-1, Kind::Float);
    let sampled = probabilities.multinomial(1, false);
    Ok(sampled.int64_value(&[0]) as u32)
}
