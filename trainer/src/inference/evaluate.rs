//! Losses of a trained model on token files, one per source.

use super::loaded::LoadedModel;
use crate::{
    Error,
    config::{DocumentRules, SourceConfig, source_names},
    data::{
        Dataset,
        bits_per_byte::{bits_per_byte, bytes_per_token},
        count_labels,
    },
    hub::ByteProgress,
    model::Model,
};
use dataset::info::DatasetInfo;
use moe::balance::BatchTotals;
use parallel::{Accelerator, Cpu};
use serde::Serialize;
use std::path::Path;

/// Data to evaluate a model on.
#[derive(Debug, Clone)]
pub struct EvaluateOptions {
    /// Token files; their weights are not used.
    pub sources: Vec<SourceConfig>,
    /// Sequences of each source, from its start; by default all.
    pub sequences: Option<u64>,
    /// Tokens of a sequence; by default those of training, or the longest context of a folder.
    pub sequence_length: Option<usize>,
}

/// The loss of a model on one source.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SourceLoss {
    pub source: String,
    pub sequences: u64,
    /// Tokens whose loss counts.
    pub counted_tokens: u64,
    /// Mean cross-entropy over the counted tokens, in nats per token.
    pub loss: f64,
    /// Exponential of the loss.
    pub perplexity: f64,
    /// Estimated cross-entropy per byte of text in bits, if `dataset.json` records bytes: from the
    /// mean bytes per token of the whole file. None if some tokens do not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
}

/// Loads a model and passes its loss on each source to `write`, in order. Documents are kept apart
/// and labels ignored as in training, by the token that ended documents there. `note` receives
/// notes about the choice of the checkpoint.
///
/// # Errors
/// If there is no usable model, a source is missing, damaged, too short, or of another vocabulary,
/// or a rule of the run needs the token that ends a document and it is not known.
pub fn evaluate(
    model: &Path,
    options: &EvaluateOptions,
    progress: &ByteProgress,
    note: &mut dyn FnMut(&str),
    write: &mut dyn FnMut(SourceLoss),
) -> Result<(), Error> {
    let mut loaded = LoadedModel::open(model, progress)?;
    for line in &loaded.notes {
        note(line);
    }
    let length = options.sequence_length.unwrap_or(loaded.context);
    if length == 0 || length > loaded.context {
        return Err(Error::Config(format!(
            "sequences of {length} tokens do not fit the model, whose context has {}: give a \
             --sequence-length from 1 to {}",
            loaded.context, loaded.context
        )));
    }
    // All are opened first, so that a wrong path is found before anything is computed.
    let mut opened = Vec::new();
    let names = source_names(&options.sources);
    for (source, name) in options.sources.iter().zip(names) {
        opened.push((name, Evaluated::open(source, &loaded, length)?));
    }
    for (name, source) in opened {
        let windows = source.data.num_windows();
        let sequences = options.sequences.unwrap_or(windows).min(windows);
        loaded.model.set_documents(source.documents);
        write(source.evaluate(&loaded.model, name, sequences)?);
    }
    Ok(())
}

struct Evaluated {
    data: Dataset,
    bytes_per_token: Option<f64>,
    documents: Option<DocumentRules>,
}

impl Evaluated {
    fn open(source: &SourceConfig, model: &LoadedModel, length: usize) -> Result<Evaluated, Error> {
        let vocab_size = model.model.config().vocab_size;
        let info = DatasetInfo::of_tokens(&source.path)?;
        if let Some(info) = &info
            && info.vocab_size > vocab_size
        {
            return Err(Error::Data(format!(
                "{} has a vocabulary of {}, and the model one of {vocab_size}: prepare the data \
                 with the tokenizer of the model",
                source.path.display(),
                info.vocab_size
            )));
        }
        let trained = model.run.as_ref();
        let documents = trained.map(|run| run.documents.rules(&run.config.data));
        let masking = trained.filter(|run| run.config.data.eod_mask_loss);
        let data = Dataset::open(std::slice::from_ref(source), length, vocab_size, 0)?;
        Ok(Evaluated {
            documents: documents.transpose()?.flatten(),
            data: data.masked_after(masking.and_then(|run| run.documents.end)),
            bytes_per_token: bytes_per_token(source, info.as_ref(), masking.is_some()),
        })
    }

    fn evaluate(&self, model: &Model, name: String, sequences: u64) -> Result<SourceLoss, Error> {
        let mut sum = 0.0;
        let mut counted_tokens = 0;
        // A divisor of 1 leaves the sum over the tokens.
        let totals = BatchTotals {
            groups: 1.0,
            positions: 1.0,
            counted_tokens: 1.0,
            counts_le: None,
        };
        for window in 0..sequences {
            let (inputs, labels) = self.data.windows(window..window + 1)?;
            counted_tokens += count_labels(&labels);
            let inputs = Cpu.upload(&inputs);
            let loss = tch::no_grad(|| -> Result<f64, Error> {
                let output = model.forward(&inputs)?;
                let loss = model.cross_entropy(&output.hidden_td, &labels, &totals)?;
                Ok(loss.double_value(&[]))
            })?;
            sum += loss;
        }
        if counted_tokens == 0 {
            return Err(Error::Data(format!(
                "no token of the {sequences} sequences of {name} counts"
            )));
        }
        let loss = sum / counted_tokens as f64;
        Ok(SourceLoss {
            source: name,
            sequences,
            counted_tokens,
            loss,
            perplexity: loss.exp(),
            bits_per_byte: self.bytes_per_token.map(|bytes| bits_per_byte(loss, bytes)),
        })
    }
}
