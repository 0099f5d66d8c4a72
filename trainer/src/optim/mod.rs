//! The optimizer of a run: state and updates of all parameters, gradient norm and clipping.
//!
//! Each optimizer is a [`rule::Rule`] in a file of its own. The parts of a run that keep, move or
//! count state iterate over its names.

pub(crate) mod adamw;
#[cfg(test)]
mod golden_file;
pub(crate) mod groups;
mod matrix_exchange;
mod matrix_plan;
pub(crate) mod muon;
mod offload;
pub(crate) mod qk_clip;
pub(crate) mod rate_jump;
mod rounded_state;
mod rounding;
pub(crate) mod rule;
pub(crate) mod schedule;
pub(crate) mod sgd;

use crate::{
    Error,
    config::OptimizerConfig,
    model::{
        parameters::{Parameter, Parameters},
        role::Role,
    },
    scalars::fetch_scalars,
};
use groups::Groups;
use kernels::sum_of_squares;
use matrix_exchange::MatrixRounds;
use offload::Offload;
use parallel::{Accelerator, Communicator, GradientBuckets, ReduceOp};
use rounded_state::{chunks, update_rows, with_wide_state};
use rounding::Rounding;
use rule::{MatrixRule, RowUpdate, StepScalars, Update};
use std::{collections::BTreeMap, sync::Arc};
use tch::{Kind, Tensor};

pub use matrix_exchange::StageRanks;
pub(crate) use matrix_exchange::{HeldMatrices, exchange_bytes};

/// The optimizer's state on this rank.
pub struct Optimizer {
    groups: Groups,
    grad_clip: f64,
    /// State of each parameter.
    states: Vec<Vec<NamedState>>,
    batches: Vec<Batch>,
    starts: StateStarts,
    /// Set if masters are in host memory.
    offload: Option<Offload>,
    /// All ranks, which sum their parts of the squared gradient norm.
    world: Arc<dyn Communicator>,
    stage: StageRanks,
}

/// A tensor that the optimizer keeps for a parameter, in the shape of its master.
pub(crate) struct NamedState {
    /// Kind of the tensor in a checkpoint.
    pub(crate) name: &'static str,
    pub(crate) tensor: Tensor,
}

/// Steps after which the state of parameters began as zeros, by [`ParamSpec::parameter_name`]. The
/// state of all others began with the run.
pub(crate) type StateStarts = BTreeMap<String, u64>;

/// Parameters that one update changes, with equal constants.
struct Batch {
    role: Role,
    /// Step after which the state began.
    start: u64,
    decay: bool,
    lr_scale: f64,
    members: Vec<usize>,
    /// The rounds of the last step, if the update needs whole matrices.
    rounds: Option<MatrixRounds>,
}

/// Batches parameters in the order in which each batch's first parameter appears.
fn batches(parameters: &Parameters, groups: &Groups, starts: &StateStarts) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    for (index, parameter) in parameters.iter().enumerate() {
        let role = parameter.spec.role;
        let start = starts.get(&parameter.spec.parameter_name());
        let start = start.copied().unwrap_or(0);
        let fits = |batch: &&mut Batch| {
            groups.are_together(batch.role, role)
                && batch.start == start
                && batch.decay == parameter.decay
                && batch.lr_scale == parameter.lr_scale
        };
        match batches.iter_mut().find(fits) {
            Some(batch) => batch.members.push(index),
            None => batches.push(Batch {
                role,
                start,
                decay: parameter.decay,
                lr_scale: parameter.lr_scale,
                members: vec![index],
                rounds: None,
            }),
        }
    }
    batches
}

/// Returns the squared norm of each gradient that this rank counts, `[]` fp64 on its device.
pub(crate) fn squared_norms(parameters: &Parameters, gradients: &GradientBuckets) -> Vec<Tensor> {
    let all = parameters.iter().enumerate();
    let counted = all.filter(|(_, parameter)| parameter.counted);
    counted
        .map(|(index, _)| sum_of_squares(&gradients.gradient(index)))
        .collect()
}

impl Optimizer {
    /// Creates the state of `parameters`, in the memory of their masters.
    ///
    /// # Errors
    /// If there is no memory to stage gradients on the host.
    pub fn new(
        config: &OptimizerConfig,
        grad_clip: f64,
        parameters: &Parameters,
        device: &dyn Accelerator,
        world: Arc<dyn Communicator>,
        stage: StageRanks,
    ) -> Result<Optimizer, Error> {
        let masters = || parameters.iter().map(|parameter| &parameter.master);
        let largest = masters().map(Tensor::numel).max().unwrap_or(0);
        let offload = if parameters.are_offloaded() {
            Some(Offload::new(device, largest as i64, parameters.kind())?)
        } else {
            None
        };
        let groups = Groups::new(config, parameters.kind());
        let zeros = |parameter: &Parameter| {
            let names = groups.of(parameter.spec.role).rule.state().iter();
            let like = &parameter.master;
            let named = names.map(|name| NamedState {
                name,
                tensor: Tensor::zeros(like.size(), (groups.state_kind(), like.device())),
            });
            named.collect()
        };
        Ok(Optimizer {
            grad_clip,
            states: parameters.iter().map(zeros).collect(),
            batches: batches(parameters, &groups, &StateStarts::new()),
            starts: StateStarts::new(),
            groups,
            offload,
            world,
            stage,
        })
    }

    /// Returns the state of parameter `index`.
    pub(crate) fn state(&self, index: usize) -> &[NamedState] {
        &self.states[index]
    }

    /// Returns the steps after which state began.
    pub(crate) fn state_starts(&self) -> &StateStarts {
        &self.starts
    }

    /// Sets the steps after which state began.
    pub(crate) fn set_state_starts(&mut self, starts: StateStarts, parameters: &Parameters) {
        self.batches = batches(parameters, &self.groups, &starts);
        self.starts = starts;
    }

    /// Returns the names of the state of parameters with this role.
    pub(crate) fn state_names(&self, role: Role) -> &'static [&'static str] {
        self.groups.of(role).rule.state()
    }

    /// Transforms one matrix of each shape on `device`, as if this rank owned one, and drops the
    /// results.
    pub(crate) fn transform_each_shape(&self, parameters: &Parameters, device: &dyn Accelerator) {
        let mut done = Vec::new();
        for parameter in parameters.iter() {
            let shape = parameter.spec.matrix_shape();
            if let Update::Matrices(rule) = self.groups.of(parameter.spec.role).rule.update()
                && !done.contains(&(rule.kind(), shape))
            {
                let _ = rule.transform(&device.zeros(&shape, rule.kind()));
                done.push((rule.kind(), shape));
            }
        }
    }

    /// Returns the norm of all gradients of the model. Each counts once, whatever the layout.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn grad_norm(
        &self,
        parameters: &Parameters,
        gradients: &GradientBuckets,
    ) -> Result<f64, Error> {
        let [squares] = fetch_scalars([&squared_norms(parameters, gradients)])?;
        self.norm_of(&squares)
    }

    /// Returns the norm of all gradients of the model from the fetched [`squared_norms`] of each
    /// rank.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If a collective fails.
    pub(crate) fn norm_of(&self, squares: &[f64]) -> Result<f64, Error> {
        let total = Tensor::from_slice(&[squares.iter().sum::<f64>()]);
        self.world.all_reduce(&total, ReduceOp::Sum)?.wait()?;
        Ok(total.double_value(&[0]).sqrt())
    }

    /// Updates the parameters in step `step` (1 is the first) with learning rate `lr`, and clips
    /// the gradients by their norm. Afterwards the gradients have no meaning.
    ///
    /// # Collective
    /// All ranks of the stage.
    ///
    /// # Errors
    /// If libtorch refuses an operation or a collective fails.
    pub fn step(
        &mut self,
        parameters: &Parameters,
        gradients: &GradientBuckets,
        step: u64,
        lr: f64,
        grad_norm: f64,
        device: &dyn Accelerator,
    ) -> Result<(), Error> {
        // As torch.nn.utils.clip_grad_norm_; the kernel divides by the scale in its own pass.
        let is_clipped = self.grad_clip > 0.0 && grad_norm > self.grad_clip;
        let scale = is_clipped.then(|| (grad_norm + 1e-6) / self.grad_clip);
        let is_rounded = self.groups.state_kind() != Kind::Float;
        for batch in &mut self.batches {
            let update = |&index: &usize| {
                let parameter = parameters.get(index);
                let state = self.states[index].iter();
                let rounding = || Rounding::new(parameter.own_slices(), parameters.seed(), step);
                RowUpdate {
                    master: parameter.master.shallow_clone(),
                    gradient: gradients.gradient(index),
                    state: state.map(|state| state.tensor.shallow_clone()).collect(),
                    stored: parameter.model_dtype_copy(),
                    rounding: is_rounded.then(rounding),
                }
            };
            let updates: Vec<RowUpdate> = batch.members.iter().map(update).collect();
            let group = self.groups.of(batch.role);
            let scalars = StepScalars {
                step: step - batch.start,
                lr: lr * batch.lr_scale * group.lr_scale,
                decays: batch.decay,
                scale,
            };
            match (group.rule.update(), &self.offload) {
                (Update::Rows(rule), Some(offload)) => {
                    offload.update(device, rule, &updates, scalars)?;
                }
                (Update::Rows(rule), None) => update_rows(rule, &updates, scalars)?,
                (Update::Matrices(rule), _) => {
                    update_matrices(&self.stage, rule, parameters, batch, &updates, scalars)?;
                }
            }
        }
        Ok(())
    }
}

/// Updates parameters by transformed matrices, which take the place of their gradients.
///
/// With masters in host memory, gradients and transformed matrices are copied chunk by chunk, and
/// matrices are transformed on the device.
fn update_matrices(
    stage: &StageRanks,
    rule: &dyn MatrixRule,
    parameters: &Parameters,
    batch: &mut Batch,
    updates: &[RowUpdate],
    scalars: StepScalars,
) -> Result<(), Error> {
    for chunk in updates.iter().flat_map(chunks) {
        let mut gradient = chunk.gradient.shallow_clone();
        let by_master = RowUpdate {
            gradient: gradient.to_device(chunk.master.device()),
            ..chunk
        };
        with_wide_state(&by_master, |part| rule.prepare(part, scalars))?;
        if gradient.device() != by_master.gradient.device() {
            tch::no_grad(|| gradient.f_copy_(&by_master.gradient))?;
        }
    }
    let known = batch.rounds.take();
    let known = known.filter(|rounds| rounds.fits(parameters, &batch.members));
    let rounds =
        known.unwrap_or_else(|| MatrixRounds::new(stage, rule, parameters, &batch.members));
    let gradients = updates.iter().map(|update| update.gradient.shallow_clone());
    rounds.run(stage, rule, &gradients.collect::<Vec<_>>())?;
    batch.rounds = Some(rounds);
    for (&index, update) in batch.members.iter().zip(updates) {
        let shape = parameters.get(index).spec.matrix_shape();
        for chunk in chunks(update) {
            let by_master = RowUpdate {
                gradient: chunk.gradient.to_device(chunk.master.device()),
                ..chunk
            };
            rule.apply(&by_master, shape, scalars)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        BuildContext, Model, ModelPart, ProcessGroups,
        config::{Dtype, ModelConfig},
    };
    use parallel::{Cpu, Local, Replication};
    use serde_json::{Value, json};
    use tch::kind::FLOAT_CPU;

    /// Returns the weights, masters and state after three steps with given gradients, the first of
    /// them after step `start`, when all state begins.
    fn after_steps(optimizer: &Value, dtype: Dtype, offload: bool, start: u64) -> Vec<Tensor> {
        let model = json!({
            "layers": 2, "hidden": 8, "heads": 2, "vocab_size": 11, "ffn": 12, "dense_layers": 1,
            "moe": {"experts": 3, "top_k": 1, "ffn": 6},
        });
        let model: ModelConfig = serde_json::from_value(model).unwrap();
        let groups = ProcessGroups::single_rank();
        let ctx = BuildContext {
            offload,
            ..BuildContext::single_rank(4, dtype, &Cpu, &groups)
        };
        let model = Model::new(&model, ModelPart::whole(2), &ctx);
        let parameters = &model.parameters;
        let weights: Vec<_> = parameters.iter().map(|p| (p.weight.clone(), 0)).collect();
        let single = [Replication::alone()];
        let gradients = GradientBuckets::new(&weights, &single, 1 << 20, true, &Cpu).unwrap();
        let config = serde_json::from_value(optimizer.clone()).unwrap();
        let world = Arc::new(Local::new(0, "alone"));
        let stage = StageRanks::alone();
        let mut optimizer = Optimizer::new(&config, 1.0, parameters, &Cpu, world, stage).unwrap();
        if start > 0 {
            let names = parameters.iter().map(|p| (p.spec.parameter_name(), start));
            optimizer.set_state_starts(names.collect(), parameters);
        }
        gradients.begin(1);
        for step in 1..4 {
            for index in 0..parameters.len() {
                // Other tests draw from libtorch's generator at the same time.
                let mut gradient = gradients.gradient(index);
                let count = gradient.numel() as i64;
                let phases = Tensor::arange(count, FLOAT_CPU) * 1.7 + (step * 31) as f64;
                gradient.copy_(&(phases + index as f64).sin().view_as(&gradient));
            }
            let norm = optimizer.grad_norm(parameters, &gradients).unwrap();
            let stepped = optimizer.step(parameters, &gradients, start + step, 1e-2, norm, &Cpu);
            stepped.unwrap();
        }
        let states = optimizer.states.iter().flatten();
        let states = states.map(|state| state.tensor.shallow_clone());
        let values = parameters.iter().flat_map(|parameter| {
            let weight = parameter.weight.value();
            [weight, parameter.master.shallow_clone()]
        });
        values.chain(states).collect()
    }

    #[test]
    fn state_that_begins_later_is_corrected_from_there() {
        let adamw = json!({"groups": [{"muon": {}}, {"adamw": {}}]});
        let first = after_steps(&adamw, Dtype::Fp32, false, 0);
        assert_eq!(after_steps(&adamw, Dtype::Fp32, false, 1000), first);
    }

    #[test]
    fn state_in_host_memory_changes_nothing() {
        for groups in [
            json!([]),
            json!([{"muon": {}}]),
            json!([{"muon": {"dtype": "fp32"}}, {"sgd": {}}]),
        ] {
            for state in ["fp32", "bf16"] {
                for dtype in [Dtype::Fp32, Dtype::Bf16] {
                    let optimizer = json!({"groups": groups, "state_dtype": state});
                    let plain = after_steps(&optimizer, dtype, false, 0);
                    assert!(
                        plain
                            .iter()
                            .all(|x| bool::try_from(x.isfinite().all()).unwrap())
                    );
                    assert_eq!(
                        after_steps(&optimizer, dtype, true, 0),
                        plain,
                        "{optimizer}"
                    );
                }
            }
        }
    }
}
