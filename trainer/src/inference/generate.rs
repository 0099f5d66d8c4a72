//! Text out of a checkpoint.

use crate::Error;
use crate::config::Config;
use crate::data::END_OF_DOCUMENT;
use crate::inference::LoadedModel;
use crate::model::Model;
use parallel::{Accelerator, Cpu};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// What to generate.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// A run's folder, its folder of checkpoints, or one checkpoint.
    pub checkpoint: PathBuf,
    /// How the text begins.
    pub prompt: String,
    /// Tokens to add at most.
    pub max_tokens: usize,
    /// 0: always the likeliest token; 1: as the model says.
    pub temperature: f64,
    /// Choose among this many likeliest tokens; 0: among all.
    pub top_k: usize,
    /// Decides the choices.
    pub seed: i64,
    /// Another tokenizer.json than the run's.
    pub tokenizer: Option<PathBuf>,
}

/// Generates on one CPU, handing text to `write` as it comes.
///
/// # Errors
/// When there is no usable checkpoint or tokenizer.
pub fn generate(options: &GenerateOptions, write: &mut dyn FnMut(&str)) -> Result<(), Error> {
    let LoadedModel {
        path,
        config,
        model,
        ..
    } = LoadedModel::open(&options.checkpoint)?;
    let tokenizer = crate::data::load_tokenizer(&find_tokenizer(options, &config, &path)?)?;
    let length = config.data.sequence_length;
    tch::manual_seed(options.seed);

    let failed = |e: tokenizers::Error| Error::Tokenizer(format!("the tokenizer failed: {e}"));
    let end = tokenizer.token_to_id(END_OF_DOCUMENT);
    let mut tokens: Vec<u32> = tokenizer
        .encode(options.prompt.as_str(), false)
        .map_err(failed)?
        .get_ids()
        .to_vec();
    if tokens.is_empty() {
        // An empty prompt is the start of a document.
        tokens.push(end.unwrap_or(0));
    }
    let start = tokens.len();
    write(&options.prompt);
    let mut written = String::new();
    for _ in 0..options.max_tokens {
        let next = tch::no_grad(|| {
            next_token(
                &model,
                &tokens[tokens.len().saturating_sub(length)..],
                options,
            )
        })?;
        if Some(next) == end {
            break;
        }
        tokens.push(next);
        // A character may need several tokens: write what is whole.
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
    let logits = model
        .logits(&hidden.narrow(0, ids.len() as i64 - 1, 1))
        .view([-1]);
    if options.temperature <= 0.0 {
        return Ok(logits.argmax(-1, false).int64_value(&[]) as u32);
    }
    let mut logits = logits / options.temperature;
    let vocab = logits.size()[0];
    if options.top_k > 0 && (options.top_k as i64) < vocab {
        let least = logits.topk(options.top_k as i64, -1, true, true).0.min();
        logits = logits.masked_fill(&logits.lt_tensor(&least), f64::NEG_INFINITY);
    }
    Ok(logits
        .softmax(-1, Kind::Float)
        .multinomial(1, false)
        .int64_value(&[0]) as u32)
}

fn find_tokenizer(
    options: &GenerateOptions,
    config: &Config,
    checkpoint: &Path,
) -> Result<PathBuf, Error> {
    let beside_data = config
        .data
        .train
        .first()
        .and_then(|source| source.path.parent())
        .map(|f| f.join("tokenizer.json"));
    let with_run = checkpoint
        .ancestors()
        .nth(2)
        .map(|folder| folder.join("tokenizer.json"));
    let places: Vec<PathBuf> = match &options.tokenizer {
        Some(path) => vec![path.clone()],
        None => [with_run, config.data.tokenizer.clone(), beside_data]
            .into_iter()
            .flatten()
            .collect(),
    };
    places
        .iter()
        .find(|path| path.exists())
        .cloned()
        .ok_or_else(|| {
            let places: Vec<_> = places
                .iter()
                .map(|path| path.display().to_string())
                .collect();
            Error::Tokenizer(format!(
                "no tokenizer at {}: name one with --tokenizer",
                places.join(", ")
            ))
        })
}
