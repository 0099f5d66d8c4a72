//! Log-likelihoods of texts under a model.

use super::loaded::{LoadedModel, find_tokenizer};
use crate::{Error, hub::ByteProgress};
use dataset::tokenizer::{END_OF_DOCUMENT, load_tokenizer};
use parallel::{Accelerator, Cpu};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// A text and what follows it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreRequest {
    /// Text before the continuation. If it is empty, the continuation follows the token that begins
    /// a text, or else the one that ends a document.
    pub context: String,
    /// Text of which the log-likelihood is computed.
    pub continuation: String,
}

/// The likelihood of a continuation.
#[derive(Debug, Clone, Serialize)]
pub struct Score {
    /// Sum of the tokens' log-probabilities, in nats.
    pub log_likelihood: f64,
    /// True if each token is the likeliest one.
    pub is_greedy: bool,
    /// Tokens of the continuation.
    pub tokens: usize,
}

/// Loads a model and passes the score of each request to `write`, in order.
///
/// Context and continuation are tokenized together, and the continuation has the tokens after those
/// of the context alone, as in lm-evaluation-harness. The token that began the documents of a run's
/// data comes before each text. Longer texts than the model's context lose their beginning.
///
/// # Errors
/// If there is no usable model or tokenizer, or a continuation has no tokens or does not fit.
pub fn score(
    model: &Path,
    tokenizer: Option<PathBuf>,
    requests: &[ScoreRequest],
    progress: &ByteProgress,
    note: &mut dyn FnMut(&str),
    write: &mut dyn FnMut(Score),
) -> Result<(), Error> {
    let LoadedModel {
        context,
        document_start,
        start_token,
        tokenizers,
        model,
        notes,
        ..
    } = LoadedModel::open(model, progress)?;
    for line in &notes {
        note(line);
    }
    let path = find_tokenizer(&tokenizer.map_or(tokenizers, |given| vec![given]))?;
    let tokenizer = load_tokenizer(&path)?;
    let failed = |error| Error::Tokenizer(format!("the tokenizer failed: {error}"));
    let encode = |text: &str| -> Result<Vec<i64>, Error> {
        let tokens = tokenizer.encode(text, false).map_err(failed)?;
        Ok(tokens.get_ids().iter().map(|&id| i64::from(id)).collect())
    };
    let end = tokenizer.token_to_id(END_OF_DOCUMENT);
    let start_token = start_token.or(end).unwrap_or(0);
    for (number, request) in requests.iter().enumerate() {
        let ScoreRequest {
            context: before,
            continuation,
        } = request;
        // Spaces at the end of the context belong to the first token of the continuation.
        let kept = before.trim_end();
        let whole = encode(&format!("{before}{continuation}"))?;
        // Something has to come before the first token.
        let first = match kept {
            "" => Some(start_token),
            _ => document_start,
        };
        let mut tokens: Vec<i64> = first.map(i64::from).into_iter().collect();
        let start = tokens.len() + encode(kept)?.len();
        tokens.extend(whole);
        let size = model.config().vocab_size as i64;
        if let Some(token) = tokens.iter().find(|&&token| token >= size) {
            return Err(Error::Tokenizer(format!(
                "request {}: the tokenizer has the token {token}, and the model a vocabulary of \
                 {size}: name the tokenizer of the model's data with --tokenizer",
                number + 1
            )));
        }
        let count = tokens.len().saturating_sub(start);
        if count == 0 || count > context {
            return Err(Error::Data(format!(
                "request {}: the continuation has {count} tokens; it needs 1 to {context}",
                number + 1
            )));
        }
        // The last token is only predicted.
        let first = (tokens.len() - 1).saturating_sub(context);
        let inputs = &tokens[first..tokens.len() - 1];
        let input = Cpu.upload(&Tensor::from_slice(inputs).view([1, -1]));
        let logits = tch::no_grad(|| -> Result<Tensor, Error> {
            let hidden = model.forward(&input)?.hidden_td;
            let from = (inputs.len() - count) as i64;
            Ok(model.logits(&hidden.narrow(0, from, count as i64)))
        })?;
        let targets = Tensor::from_slice(&tokens[tokens.len() - count..]);
        let log_probabilities = logits.log_softmax(-1, Kind::Float);
        let chosen = log_probabilities.gather(1, &targets.unsqueeze(1), false);
        write(Score {
            log_likelihood: chosen.sum(Kind::Double).double_value(&[]),
            is_greedy: logits.argmax(-1, false) == targets,
            tokens: count,
        });
    }
    Ok(())
}
