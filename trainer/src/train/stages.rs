//! This rank's stages at work on the microbatches of a step: what a pipeline's executor calls.

use crate::Error;
use crate::model::vocabulary::{self, LocalSoftmax};
use crate::model::{Documents, Model, with_gradient};
use moe::MoeStats;
use moe::balance::BatchTotals;
use parallel::pipeline::simulate::Span;
use parallel::pipeline::{
    Collective, CollectiveFn, CollectiveKind, Pass, PassKind, Stages, Vocabulary,
};
use parallel::{Accelerator, DeferredGradient, GradientBuckets};
use std::collections::HashMap;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// What the microbatches of a step gave on this rank; sums over ranks are the step's figures.
pub(crate) struct StepSums {
    pub(crate) cross_entropy: f64,
    pub(crate) load_balance: f64,
    pub(crate) z: f64,
    /// By MoE layer of the model; zero for layers of other ranks.
    pub(crate) moe_layers: Vec<MoeLayerSums>,
    /// Share of the time in which this rank waited for others.
    pub(crate) wait_ratio: f64,
    /// Seconds of each kind of pass in each chunk, and how many there were: `[kinds * chunks]`.
    pub(crate) passes: Vec<(f64, f64)>,
}

/// What a MoE layer did, in figures that add up over microbatches and ranks.
#[derive(Clone)]
pub(crate) struct MoeLayerSums {
    /// Choices of each expert, `[E]`.
    pub(crate) tokens_per_expert: Vec<f64>,
    /// Rows worked on.
    pub(crate) rows: f64,
    /// What moved: see [`MoeLayerSums::MOVED`].
    pub(crate) moved: [f64; MoeLayerSums::MOVED],
}

impl MoeLayerSums {
    /// Rows worked on for others, bytes of weights lent, bytes sent to other nodes, seconds of planning.
    pub(crate) const MOVED: usize = 4;

    fn add(&mut self, moe_stats: &MoeStats) {
        self.tokens_per_expert
            .iter_mut()
            .zip(&moe_stats.tokens_per_expert)
            .for_each(|(sum, &tokens_per_expert)| *sum += tokens_per_expert as f64);
        self.rows += moe_stats.computed_tokens as f64;
        let moved = [
            moe_stats.lent_tokens as f64,
            moe_stats.lent_bytes as f64,
            moe_stats.internode_bytes as f64,
            moe_stats.plan_seconds,
        ];
        self.moved
            .iter_mut()
            .zip(moved)
            .for_each(|(sum, moved)| *sum += moved);
    }
}

impl StepSums {
    /// Takes up when passes of `chunks` chunks ran.
    pub(crate) fn record_spans(&mut self, spans: &[Span], chunks: usize) {
        let total = spans.last().map_or(0.0, |span| span.end);
        let busy: f64 = spans.iter().map(|span| span.end - span.start).sum();
        self.wait_ratio = if total > 0.0 { 1.0 - busy / total } else { 0.0 };
        self.passes = vec![(0.0, 0.0); PassKind::NAMES.len() * chunks];
        for Span { pass, start, end } in spans {
            let kind = PassKind::NAMES
                .iter()
                .position(|(kind, _)| *kind == pass.kind)
                .expect("all kinds are listed");
            let (seconds, count) = &mut self.passes[kind * chunks + pass.chunk];
            (*seconds, *count) = (*seconds + end - start, *count + 1.0);
        }
    }
}

/// A forward whose backward is to come.
struct InFlight {
    /// Where another stage, or the vocabulary's ranks, made it.
    input: Option<Tensor>,
    output: Tensor,
    /// What of the total loss is known: the last stage's cross-entropy, auxiliary losses.
    loss: Option<Tensor>,
}

/// What passes of the vocabulary leave for collectives and later passes.
#[derive(Default)]
struct VocabularyState {
    hidden: Option<Tensor>,
    embedded: Option<Tensor>,
    softmax: Option<LocalSoftmax>,
    hidden_gradient: Option<Tensor>,
    embedding_gradient: Option<Tensor>,
}

/// One step, or one pass over data without learning.
pub(crate) struct StepStages<'a> {
    model: &'a Model,
    device: &'a dyn Accelerator,
    /// None where nothing is learned.
    gradients: Option<&'a GradientBuckets>,
    /// Inputs and labels `[B, S]` of a microbatch.
    batch: &'a dyn Fn(usize) -> Result<(Tensor, Tensor), Error>,
    totals: BatchTotals<'a>,
    algorithm: Option<Vocabulary>,
    /// Rank in the pipeline of the last stage.
    last_rank: usize,
    /// Ends a document, where tokens see only their own.
    eod_token: Option<u32>,
    /// `[T, D]` of a microbatch, and this rank's part of it between stages.
    whole: [i64; 2],
    shape: [i64; 2],
    kind: Kind,
    sequences: i64,
    in_flight: HashMap<(usize, usize), InFlight>,
    deferred: HashMap<(usize, usize), Vec<DeferredGradient>>,
    vocabulary_state: HashMap<usize, VocabularyState>,
    pub(crate) sums: StepSums,
}

/// What a step is made of.
pub(crate) struct StepInputs<'a> {
    pub(crate) model: &'a Model,
    pub(crate) device: &'a dyn Accelerator,
    pub(crate) gradients: Option<&'a GradientBuckets>,
    pub(crate) batch: &'a dyn Fn(usize) -> Result<(Tensor, Tensor), Error>,
    pub(crate) totals: BatchTotals<'a>,
    pub(crate) algorithm: Option<Vocabulary>,
    pub(crate) last_rank: usize,
    pub(crate) eod_token: Option<u32>,
    pub(crate) sequences: i64,
    /// Positions of a sequence that this rank has.
    pub(crate) positions: i64,
    pub(crate) kind: Kind,
}

impl<'a> StepStages<'a> {
    pub(crate) fn new(inputs: StepInputs<'a>) -> StepStages<'a> {
        let StepInputs {
            model,
            device,
            gradients,
            batch,
            totals,
            algorithm,
            ..
        } = inputs;
        let StepInputs {
            last_rank,
            eod_token,
            sequences,
            positions,
            kind,
            ..
        } = inputs;
        let experts = model.config().moe.as_ref().map_or(0, |moe| moe.experts);
        let moe_layers = model.config().num_moe_layers();
        StepStages {
            model,
            device,
            gradients,
            batch,
            totals,
            algorithm,
            last_rank,
            eod_token,
            whole: [sequences * positions, model.config().hidden as i64],
            shape: [
                sequences * positions / model.tensor().size() as i64,
                model.config().hidden as i64,
            ],
            kind,
            sequences,
            in_flight: HashMap::new(),
            deferred: HashMap::new(),
            vocabulary_state: HashMap::new(),
            sums: StepSums {
                cross_entropy: 0.0,
                load_balance: 0.0,
                z: 0.0,
                moe_layers: vec![
                    MoeLayerSums {
                        tokens_per_expert: vec![0.0; experts],
                        rows: 0.0,
                        moved: [0.0; MoeLayerSums::MOVED]
                    };
                    moe_layers
                ],
                wait_ratio: 0.0,
                passes: Vec::new(),
            },
        }
    }

    fn forward(
        &mut self,
        chunk: usize,
        microbatch: usize,
        input: Option<Tensor>,
    ) -> Result<Option<Tensor>, Error> {
        let model = self.model;
        let learning = self.gradients.is_some();
        let part = &model.part().stages[chunk];
        // What comes from elsewhere is where this stage's backward ends.
        let input = input.map(|input| input.set_requires_grad(learning));
        let x = match &input {
            Some(input) => input.shallow_clone(),
            None => model.embed(&model.own_positions(&(self.batch)(microbatch)?.0))?,
        };
        let documents = match self.eod_token {
            Some(end) => Some(Arc::new(Documents::of(&(self.batch)(microbatch)?.0, end))),
            None => None,
        };
        let out = model.forward_stage(chunk, &x, self.sequences, documents.as_ref())?;
        let auxiliary = model.aux_losses(chunk, &out.stats, &self.totals);
        self.sums.load_balance += auxiliary.load_balance;
        self.sums.z += auxiliary.z;
        for (moe_layer, moe_stats) in model.moe_layers(chunk).zip(&out.moe_stats) {
            self.sums.moe_layers[moe_layer].add(moe_stats);
        }
        let mut loss = auxiliary.total;
        if part.last && self.algorithm.is_none() {
            let labels = model.own_positions(&(self.batch)(microbatch)?.1);
            let cross_entropy = model.cross_entropy(&out.hidden_td, &labels, &self.totals)?;
            // All ranks that split matrices know it; one counts it.
            if model.tensor().rank() == 0 {
                self.sums.cross_entropy += cross_entropy.double_value(&[]);
            }
            loss = Some(loss.map_or(cross_entropy.shallow_clone(), |loss| loss + cross_entropy));
        }
        let output = out.hidden_td;
        if part.last && self.algorithm.is_some() {
            self.vocabulary_state_mut(microbatch).hidden = Some(output.detach());
        }
        let sent = (!part.last).then(|| output.detach());
        if learning {
            self.in_flight.insert(
                (chunk, microbatch),
                InFlight {
                    input,
                    output,
                    loss,
                },
            );
        }
        Ok(sent)
    }

    /// Backward of a stage from the gradient of its output; `split` keeps the weights' gradients for a later pass.
    fn backward(&mut self, pass: Pass, gradient: Option<Tensor>) -> Result<Option<Tensor>, Error> {
        let Pass {
            kind,
            chunk,
            microbatch,
        } = pass;
        let part = &self.model.part().stages[chunk];
        let model = self.model;
        let gradients = self
            .gradients
            .expect("a schedule with backward passes learns");
        let in_flight = self
            .in_flight
            .remove(&(chunk, microbatch))
            .expect("forward comes first");
        let InFlight {
            input,
            output,
            mut loss,
        } = in_flight;
        if let Some(gradient) = gradient {
            let zero = self.device.zeros(&[], Kind::Float);
            let root = with_gradient(zero, &output, gradient)?;
            loss = Some(loss.map_or(root.shallow_clone(), |loss| loss + root));
        }
        // A stage without anything to learn from has nothing to do.
        if let Some(loss) = loss.filter(Tensor::requires_grad) {
            match kind {
                PassKind::BackwardInput => {
                    let ((), deferred) = gradients
                        .defer_weight_gradients(|| loss.f_backward().map_err(Error::from))?;
                    self.deferred.insert((chunk, microbatch), deferred);
                }
                _ => loss.f_backward()?,
            }
        }
        let of_input = input.map(|input| input.grad());
        if part.first && model.part().vocabulary.is_some() {
            self.vocabulary_state_mut(microbatch).embedding_gradient = of_input;
            return Ok(None);
        }
        Ok(of_input)
    }

    fn vocabulary_state_mut(&mut self, microbatch: usize) -> &mut VocabularyState {
        self.vocabulary_state.entry(microbatch).or_default()
    }

    fn labels(&self, microbatch: usize) -> Result<Tensor, Error> {
        Ok(self
            .model
            .own_positions(&(self.batch)(microbatch)?.1)
            .flatten(0, -1))
    }

    fn tokens(&self, microbatch: usize) -> Result<Tensor, Error> {
        Ok(self
            .model
            .own_positions(&(self.batch)(microbatch)?.0)
            .flatten(0, -1))
    }
}

impl Stages for StepStages<'_> {
    type Error = Error;

    fn compute(&mut self, pass: Pass, mut inputs: Vec<Tensor>) -> Result<Option<Tensor>, Error> {
        let Pass {
            kind,
            chunk,
            microbatch,
        } = pass;
        match kind {
            PassKind::Forward => {
                let input = inputs.pop();
                return match self.gradients {
                    Some(_) => self.forward(chunk, microbatch, input),
                    None => tch::no_grad(|| self.forward(chunk, microbatch, input)),
                };
            }
            PassKind::Backward | PassKind::BackwardInput => {
                // With `vocab-2` the collective also brings what T needs; the gradient is the last.
                return self.backward(pass, inputs.pop());
            }
            PassKind::BackwardWeight => {
                for contribution in self
                    .deferred
                    .remove(&(chunk, microbatch))
                    .unwrap_or_default()
                {
                    contribution()?;
                }
            }
            PassKind::Logits => {
                let labels = self.labels(microbatch)?;
                let factor = 1.0 / self.totals.tokens;
                let algorithm = self.algorithm.filter(|_| self.gradients.is_some());
                let divisor = self.model.logits_divisor();
                let softmax = self.model.with_head(|head, rows| {
                    let hidden = &inputs[0];
                    Ok(tch::no_grad(|| {
                        vocabulary::logits(hidden, head, rows, &labels, factor, divisor, algorithm)
                    }))
                })?;
                self.vocabulary_state_mut(microbatch).softmax = Some(softmax);
            }
            PassKind::Normalize => {
                let softmax = self
                    .vocabulary_state_mut(microbatch)
                    .softmax
                    .as_mut()
                    .expect("S comes first");
                tch::no_grad(|| softmax.normalize(&inputs[0]));
            }
            PassKind::LogitsBackward => {
                // Every rank knows the loss; the one of the last stage counts it.
                if self.model.part().has_last() && self.model.tensor().rank() == 0 {
                    self.sums.cross_entropy += inputs[0].double_value(&[]);
                }
                let softmax = self
                    .vocabulary_state_mut(microbatch)
                    .softmax
                    .take()
                    .expect("S comes first");
                if self.gradients.is_some() {
                    let input_too = self.algorithm.is_some_and(Vocabulary::gradient_after_t);
                    let gradient = self.model.with_head(|head, _| {
                        Ok(tch::no_grad(|| {
                            softmax.backward(head, &inputs[1], input_too)
                        })?)
                    })?;
                    self.vocabulary_state_mut(microbatch).hidden_gradient = gradient;
                }
            }
            PassKind::Embed => {
                let tokens = self.tokens(microbatch)?;
                let embedded = self.model.with_embedding(|embedding, rows| {
                    Ok(tch::no_grad(|| {
                        vocabulary::rows_of(&tokens, embedding, rows)
                    }))
                })?;
                self.vocabulary_state_mut(microbatch).embedded = Some(embedded);
            }
            PassKind::EmbedBackward => {
                let tokens = self.tokens(microbatch)?;
                let (embedding, rows) = self.model.own_embedding();
                let contribution = embedding.contribution()?;
                tch::no_grad(|| {
                    vocabulary::add_rows(&tokens, &inputs[0], contribution.sum().tensor(), rows)
                });
                contribution.finish()?;
                self.vocabulary_state.remove(&microbatch);
            }
        }
        Ok(None)
    }

    fn collective_fn(&mut self, collective: Collective) -> Result<CollectiveFn, Error> {
        let part = self.model.part();
        let tensor = self.model.tensor();
        let whole = self.device.empty(&self.whole, self.kind);
        let rows = tensor.local_range(self.whole[0]);
        let of_first = part.has_first().then(|| rows.clone());
        let of_last = part.has_last().then_some(rows);
        let roots = |rank: usize| rank * tensor.size()..(rank + 1) * tensor.size();
        let first = roots(0);
        let last = roots(self.last_rank);
        let divisor = self.model.logits_divisor();
        let naive = self.algorithm == Some(Vocabulary::Naive);
        let of = self.vocabulary_state_mut(collective.microbatch);
        Ok(match collective.kind {
            CollectiveKind::Hidden => vocabulary::collect(whole, of.hidden.take(), last),
            CollectiveKind::Maximum => {
                vocabulary::maximum(of.softmax.as_ref().expect("S comes first").largest())
            }
            CollectiveKind::Statistics if naive => of
                .softmax
                .as_ref()
                .expect("S comes first")
                .sum_over_ranks(divisor),
            CollectiveKind::Statistics => of
                .softmax
                .as_ref()
                .expect("S comes first")
                .exchange(divisor, of_last),
            CollectiveKind::HiddenGradient => {
                vocabulary::sum(of.hidden_gradient.take().expect("T comes first"), of_last)
            }
            CollectiveKind::Embedding => {
                vocabulary::sum(of.embedded.take().expect("IF comes first"), of_first)
            }
            CollectiveKind::EmbeddingGradient => {
                vocabulary::collect(whole, of.embedding_gradient.take(), first)
            }
        })
    }

    fn buffer(&self) -> Tensor {
        self.device.empty(&self.shape, self.kind)
    }
}
