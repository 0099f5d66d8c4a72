//! This rank's stages during one step: computes the passes that the pipeline's executor asks for.

use super::{
    microbatch::{HostMicrobatches, Microbatch},
    step_sums::StepSums,
};
use crate::{
    Error,
    model::{
        BatchContext, Model,
        vocabulary::{self, LocalSoftmax},
        with_gradient,
    },
};
use moe::balance::BatchTotals;
use parallel::{
    Accelerator, DeferredGradient, GradientBuckets,
    pipeline::{Collective, CollectiveFn, CollectiveKind, Pass, PassKind, Stages, Vocabulary},
};
use std::{collections::HashMap, rc::Rc};
use tch::{Kind, Tensor};

/// A forward pass whose backward is still to come.
struct InFlight {
    /// Input from another stage or from the shared embedding; backward ends there.
    input: Option<Tensor>,
    output: Tensor,
    /// Known part of the total loss: the last stage's cross-entropy and auxiliary losses.
    loss: Option<Tensor>,
}

/// Tensors that passes of vocabulary parallelism leave for collectives and later passes.
#[derive(Default)]
struct VocabularyState {
    hidden: Option<Tensor>,
    embedded: Option<Tensor>,
    softmax: Option<LocalSoftmax>,
    hidden_gradient: Option<Tensor>,
    embedding_gradient: Option<Tensor>,
}

impl VocabularyState {
    fn softmax(&self) -> &LocalSoftmax {
        self.softmax.as_ref().expect("S comes first")
    }
}

/// The stages of this rank during one step, or one evaluation without gradients.
pub(crate) struct StepStages<'a> {
    inputs: StepInputs<'a>,
    /// Microbatches that a pass has needed and a later one may need.
    microbatches: HashMap<usize, Rc<Microbatch>>,
    /// Number of passes of each microbatch that are still to come.
    passes_left: HashMap<usize, usize>,
    in_flight: HashMap<(usize, usize), InFlight>,
    deferred: HashMap<(usize, usize), Vec<DeferredGradient>>,
    vocabulary_state: HashMap<usize, VocabularyState>,
    pub(crate) sums: StepSums,
}

/// Everything that the passes of a step need.
pub(crate) struct StepInputs<'a> {
    pub(crate) model: &'a Model,
    pub(crate) device: &'a dyn Accelerator,
    /// `None` to evaluate without gradients.
    pub(crate) gradients: Option<&'a GradientBuckets>,
    pub(crate) batches: &'a HostMicrobatches<'a>,
    pub(crate) totals: BatchTotals<'a>,
    /// Algorithm of vocabulary parallelism, if all ranks share the vocabulary.
    pub(crate) vocabulary: Option<Vocabulary>,
    /// Pipeline rank of the last stage.
    pub(crate) last_rank: usize,
    /// Sequences of a microbatch.
    pub(crate) sequences: i64,
    /// Positions of a sequence on this rank.
    pub(crate) positions: i64,
    pub(crate) kind: Kind,
}

impl StepInputs<'_> {
    /// Returns the shape `[T, D]` of a microbatch over all tensor-parallel ranks.
    fn whole_shape(&self) -> [i64; 2] {
        let tokens = self.sequences * self.positions;
        [tokens, self.model.config().hidden as i64]
    }

    /// Returns the shape `[T / ranks, D]` that this rank sends to other stages.
    fn message_shape(&self) -> [i64; 2] {
        let [tokens, hidden] = self.whole_shape();
        [tokens / self.model.tensor().size() as i64, hidden]
    }

    /// True if forward of model chunk `chunk` reads tokens or labels.
    fn forward_reads(&self, chunk: usize, input: Option<&Tensor>) -> bool {
        let computes_loss = self.model.part().stages[chunk].last && self.vocabulary.is_none();
        input.is_none() || self.model.reads_documents() || computes_loss
    }
}

/// Adds `term` to `loss`.
fn add_loss(loss: Option<Tensor>, term: Tensor) -> Tensor {
    match loss {
        Some(loss) => loss + term,
        None => term,
    }
}

impl<'a> StepStages<'a> {
    /// Prepares for these `passes` of this rank.
    pub(crate) fn new(inputs: StepInputs<'a>, passes: &[Pass]) -> StepStages<'a> {
        let config = inputs.model.config();
        let experts = config.moe.as_ref().map_or(0, |moe| moe.experts);
        let sums = StepSums::new(config.num_moe_layers(), experts);
        let mut passes_left = HashMap::new();
        for pass in passes {
            *passes_left.entry(pass.microbatch).or_insert(0) += 1;
        }
        StepStages {
            inputs,
            microbatches: HashMap::new(),
            passes_left,
            in_flight: HashMap::new(),
            deferred: HashMap::new(),
            vocabulary_state: HashMap::new(),
            sums,
        }
    }

    /// Returns microbatch `index`, which the first pass that needs it uploads.
    fn microbatch(&mut self, index: usize) -> Result<Rc<Microbatch>, Error> {
        if let Some(known) = self.microbatches.get(&index) {
            return Ok(known.clone());
        }
        let StepInputs {
            model,
            device,
            batches,
            ..
        } = self.inputs;
        let microbatch = Rc::new(batches.upload(index, model, device)?);
        self.microbatches.insert(index, microbatch.clone());
        Ok(microbatch)
    }

    /// Notes that a pass has run, and drops its microbatch after the last one.
    fn end_pass(&mut self, microbatch: usize) {
        if let Some(left) = self.passes_left.get_mut(&microbatch) {
            *left -= 1;
            if *left == 0 {
                self.microbatches.remove(&microbatch);
            }
        }
    }

    fn forward(
        &mut self,
        chunk: usize,
        microbatch: usize,
        input: Option<Tensor>,
    ) -> Result<Option<Tensor>, Error> {
        let model = self.inputs.model;
        let is_training = self.inputs.gradients.is_some();
        let part = &model.part().stages[chunk];
        let batch = if self.inputs.forward_reads(chunk, input.as_ref()) {
            Some(self.microbatch(microbatch)?)
        } else {
            None
        };
        // This stage's backward ends at an input from elsewhere.
        let input = input.map(|input| input.set_requires_grad(is_training));
        let x = match (&input, &batch) {
            (Some(input), _) => input.shallow_clone(),
            (None, Some(batch)) => model.embed(&batch.tokens)?,
            (None, None) => unreachable!("the first stage reads its microbatch"),
        };
        let context = match &batch {
            Some(batch) => batch.context.clone(),
            None => BatchContext::of_whole_sequences(self.inputs.sequences),
        };
        let out = model.forward_stage(chunk, &x, &context)?;
        let aux = model.aux_losses(chunk, &out.stats, &self.inputs.totals);
        for (moe_layer, moe_stats) in model.moe_layers(chunk).zip(out.moe_stats) {
            self.sums.add_moe_stats(moe_layer, moe_stats);
        }
        let mut loss = None;
        if let Some(aux) = aux {
            self.sums.losses.load_balance.push(aux.load_balance);
            self.sums.losses.z.push(aux.z);
            loss = Some(aux.total);
        }
        if let Some(batch) = batch.filter(|_| part.last && self.inputs.vocabulary.is_none()) {
            let cross_entropy = self.cross_entropy(&out.hidden_td, &batch.labels)?;
            loss = Some(add_loss(loss, cross_entropy));
        }
        let output = out.hidden_td;
        if part.last && self.inputs.vocabulary.is_some() {
            self.vocabulary_state_mut(microbatch).hidden = Some(output.detach());
        }
        let sent = (!part.last).then(|| output.detach());
        if is_training {
            let in_flight = InFlight {
                input,
                output,
                loss,
            };
            self.in_flight.insert((chunk, microbatch), in_flight);
        }
        Ok(sent)
    }

    fn cross_entropy(&mut self, hidden_td: &Tensor, labels: &Tensor) -> Result<Tensor, Error> {
        let model = self.inputs.model;
        let cross_entropy = model.cross_entropy(hidden_td, labels, &self.inputs.totals)?;
        // All tensor-parallel ranks have the loss; one counts it.
        if model.tensor().rank() == 0 {
            self.sums.losses.cross_entropy.push(cross_entropy.detach());
        }
        Ok(cross_entropy)
    }

    /// Runs backward of a stage from the gradient of its output. `BackwardInput` leaves the
    /// gradients of the weights to a later pass.
    fn backward(&mut self, pass: Pass, gradient: Option<Tensor>) -> Result<Option<Tensor>, Error> {
        let model = self.inputs.model;
        let part = &model.part().stages[pass.chunk];
        let gradients = self.inputs.gradients.expect("backward needs gradients");
        let key = (pass.chunk, pass.microbatch);
        let InFlight {
            input,
            output,
            mut loss,
        } = self.in_flight.remove(&key).expect("forward comes first");
        if let Some(gradient) = gradient {
            let zero = self.inputs.device.zeros(&[], Kind::Float);
            let root = with_gradient(zero, &output, gradient)?;
            loss = Some(add_loss(loss, root));
        }
        // A stage whose loss depends on no weight has no backward.
        if let Some(loss) = loss.filter(Tensor::requires_grad) {
            match pass.kind {
                PassKind::BackwardInput => {
                    let ((), deferred) = gradients
                        .defer_weight_gradients(|| loss.f_backward().map_err(Error::from))?;
                    self.deferred.insert(key, deferred);
                }
                _ => loss.f_backward()?,
            }
        }
        let input_gradient = input.map(|input| input.grad());
        if part.first && model.part().vocabulary.is_some() {
            self.vocabulary_state_mut(pass.microbatch)
                .embedding_gradient = input_gradient;
            return Ok(None);
        }
        Ok(input_gradient)
    }

    /// Runs pass S: logits and their local softmax.
    fn logits(&mut self, microbatch: usize, hidden: &Tensor) -> Result<(), Error> {
        let model = self.inputs.model;
        let labels = self.microbatch(microbatch)?.labels.flatten(0, -1);
        let scale = model.loss_scale(&self.inputs.totals);
        let is_training = self.inputs.gradients.is_some();
        let vocabulary = self.inputs.vocabulary.filter(|_| is_training);
        let softmax = model.with_head(|head, rows| {
            Ok(tch::no_grad(|| {
                vocabulary::logits(hidden, head, rows, &labels, scale, vocabulary)
            }))
        })?;
        self.vocabulary_state_mut(microbatch).softmax = Some(softmax);
        Ok(())
    }

    /// Runs pass T with the results of the collective after S: the loss and the correction of the
    /// softmax.
    fn logits_backward(&mut self, microbatch: usize, results: &[Tensor]) -> Result<(), Error> {
        let model = self.inputs.model;
        // All ranks have the loss; the one of the last stage counts it.
        if model.part().has_last() && model.tensor().rank() == 0 {
            let loss = results[0].shallow_clone();
            self.sums.losses.cross_entropy.push(loss);
        }
        let softmax = self.vocabulary_state_mut(microbatch).softmax.take();
        let softmax = softmax.expect("S comes first");
        if self.inputs.gradients.is_none() {
            return Ok(());
        }
        let vocabulary = self.inputs.vocabulary;
        let with_input = vocabulary.is_some_and(Vocabulary::gradient_after_t);
        let correction = &results[1];
        let gradient = model.with_head(|head, _| {
            Ok(tch::no_grad(|| {
                softmax.backward(head, correction, with_input)
            })?)
        })?;
        self.vocabulary_state_mut(microbatch).hidden_gradient = gradient;
        Ok(())
    }

    /// Runs pass IF: lookup in this rank's rows.
    fn embed(&mut self, microbatch: usize) -> Result<(), Error> {
        let tokens = self.microbatch(microbatch)?.tokens.flatten(0, -1);
        let embedded = self.inputs.model.with_embedding(|embedding, rows| {
            Ok(tch::no_grad(|| {
                vocabulary::embed_rows(&tokens, embedding, rows)
            }))
        })?;
        self.vocabulary_state_mut(microbatch).embedded = Some(embedded);
        Ok(())
    }

    /// Runs pass IB: gradient of this rank's rows.
    fn embed_backward(&mut self, microbatch: usize, gradient: &Tensor) -> Result<(), Error> {
        let tokens = self.microbatch(microbatch)?.tokens.flatten(0, -1);
        let (embedding, rows) = self.inputs.model.own_embedding();
        let contribution = embedding.contribution()?;
        tch::no_grad(|| vocabulary::add_rows(&tokens, gradient, contribution.sum().tensor(), rows));
        contribution.finish()?;
        self.vocabulary_state.remove(&microbatch);
        Ok(())
    }

    fn vocabulary_state_mut(&mut self, microbatch: usize) -> &mut VocabularyState {
        self.vocabulary_state.entry(microbatch).or_default()
    }

    fn run_pass(&mut self, pass: Pass, mut inputs: Vec<Tensor>) -> Result<Option<Tensor>, Error> {
        let Pass {
            kind,
            chunk,
            microbatch,
        } = pass;
        match kind {
            PassKind::Forward => {
                let input = inputs.pop();
                return match self.inputs.gradients {
                    Some(_) => self.forward(chunk, microbatch, input),
                    None => tch::no_grad(|| self.forward(chunk, microbatch, input)),
                };
            }
            PassKind::Backward | PassKind::BackwardInput => {
                // With `vocab-2` the collective also gives the inputs of T; the gradient is last.
                return self.backward(pass, inputs.pop());
            }
            PassKind::BackwardWeight => {
                let deferred = self.deferred.remove(&(chunk, microbatch));
                for contribution in deferred.unwrap_or_default() {
                    contribution()?;
                }
            }
            PassKind::Logits => self.logits(microbatch, &inputs[0])?,
            PassKind::Normalize => {
                let softmax = self.vocabulary_state_mut(microbatch).softmax.as_mut();
                let softmax = softmax.expect("S comes first");
                tch::no_grad(|| softmax.normalize(&inputs[0]));
            }
            PassKind::LogitsBackward => self.logits_backward(microbatch, &inputs)?,
            PassKind::Embed => self.embed(microbatch)?,
            PassKind::EmbedBackward => self.embed_backward(microbatch, &inputs[0])?,
        }
        Ok(None)
    }
}

impl Stages for StepStages<'_> {
    type Error = Error;

    fn compute(&mut self, pass: Pass, inputs: Vec<Tensor>) -> Result<Option<Tensor>, Error> {
        let output = self.run_pass(pass, inputs)?;
        self.end_pass(pass.microbatch);
        Ok(output)
    }

    fn collective_fn(&mut self, collective: Collective) -> Result<CollectiveFn, Error> {
        let model = self.inputs.model;
        let part = model.part();
        let tensor = model.tensor();
        let whole_shape = self.inputs.whole_shape();
        let whole = self.inputs.device.empty(&whole_shape, self.inputs.kind);
        let rows = tensor.local_range(whole_shape[0]);
        let first_rows = part.has_first().then(|| rows.clone());
        let last_rows = part.has_last().then_some(rows);
        let ranks_of_stage = |rank: usize| rank * tensor.size()..(rank + 1) * tensor.size();
        let first = ranks_of_stage(0);
        let last = ranks_of_stage(self.inputs.last_rank);
        let divisor = model.loss_scale(&self.inputs.totals).logits_divisor;
        let is_naive = self.inputs.vocabulary == Some(Vocabulary::Naive);
        let state = self.vocabulary_state_mut(collective.microbatch);
        Ok(match collective.kind {
            CollectiveKind::Hidden => vocabulary::collect(whole, state.hidden.take(), last),
            CollectiveKind::Maximum => vocabulary::maximum(state.softmax().largest()),
            CollectiveKind::Statistics if is_naive => state.softmax().sum_over_ranks(divisor),
            CollectiveKind::Statistics => state.softmax().exchange(divisor, last_rows),
            CollectiveKind::HiddenGradient => {
                let gradient = state.hidden_gradient.take().expect("T comes first");
                vocabulary::sum(gradient, last_rows)
            }
            CollectiveKind::Embedding => {
                let embedded = state.embedded.take().expect("IF comes first");
                vocabulary::sum(embedded, first_rows)
            }
            CollectiveKind::EmbeddingGradient => {
                vocabulary::collect(whole, state.embedding_gradient.take(), first)
            }
        })
    }

    fn buffer(&self) -> Tensor {
        let shape = self.inputs.message_shape();
        self.inputs.device.empty(&shape, self.inputs.kind)
    }
}
