//! Routing decisions of a trained model, token by token.

use super::loaded::{LoadedModel, TrainedBy};
use crate::{Error, data::Dataset};
use parallel::{Accelerator, Cpu};
use std::path::Path;

/// Experts that a trained router chose on real text.
#[derive(Debug, Clone)]
pub struct RoutingSample {
    /// Steps that the model was trained for.
    pub step: u64,
    /// For each MoE layer the experts of each token, `[T * K]`, in the order of the text.
    pub experts: Vec<Vec<i64>>,
    /// Experts per token, K.
    pub top_k: usize,
    /// Experts per layer, E.
    pub num_experts: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// True if the text is validation data, which the model was not trained on.
    pub is_validation: bool,
    /// Newer checkpoints that cannot be used, one line each.
    pub notes: Vec<String>,
}

/// Runs the newest checkpoint of the run in `folder` over about `tokens` tokens of its validation
/// data, or of its training data if it has no validation data. Documents are kept apart as in
/// training.
///
/// # Errors
/// If there is no usable checkpoint or no data, or the model has no MoE layers.
pub fn sample_routing(folder: &Path, tokens: usize) -> Result<RoutingSample, Error> {
    let LoadedModel {
        run,
        mut model,
        notes,
        ..
    } = LoadedModel::of_run(folder)?;
    let TrainedBy {
        step,
        config,
        documents,
    } = run.expect("the model is of a run");
    model.set_documents(documents.rules(&config.data)?);
    let moe = config.model.moe.as_ref();
    let moe = moe.ok_or_else(|| Error::Config("the model has no MoE layers".into()))?;
    let sequence = config.data.sequence_length;
    let is_validation = !config.data.validation.is_empty();
    let sources = if is_validation {
        &config.data.validation
    } else {
        &config.data.train
    };
    let data = Dataset::open(sources, sequence, config.model.vocab_size, config.run.seed)?;
    let windows = ((tokens / sequence).max(1) as u64).min(data.num_windows());
    let mut experts = vec![Vec::new(); config.model.num_moe_layers()];
    for window in 0..windows {
        let (inputs, _) = data.windows(window..window + 1)?;
        let output = tch::no_grad(|| model.forward(&Cpu.upload(&inputs)))?;
        for (experts, stats) in experts.iter_mut().zip(output.stats) {
            experts.extend(Vec::<i64>::try_from(stats.experts_tk.flatten(0, -1))?);
        }
    }
    Ok(RoutingSample {
        step,
        experts,
        top_k: moe.top_k,
        num_experts: moe.experts,
        sequence,
        is_validation,
        notes,
    })
}
