//! A model's parameters: one list that the optimizer, the gradient buckets and the checkpoints go through.

use crate::init::normal;
use parallel::{Accelerator, Weight};
use tch::{Kind, Tensor};

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Init {
    /// Normal with this standard deviation.
    Normal(f64),
    /// All ones.
    Ones,
}

/// What holds for a parameter besides its values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Traits {
    pub(crate) init: Init,
    /// Whether weight decay applies.
    pub(crate) decay: bool,
    /// Factor on the learning rate.
    pub(crate) lr_scale: f64,
}

/// One tensor of this rank.
pub struct Parameter {
    /// Global name; for stacked parameters the names of its slices along dim 0, in order.
    pub names: Vec<String>,
    /// Whether dim 0 stacks several global parameters (a rank's experts).
    pub stacked: bool,
    /// What the model computes with.
    pub weight: Weight,
    /// fp32 values that the optimizer updates; in fp32 the weight itself.
    pub master: Tensor,
    /// Whether it belongs to this rank's experts rather than to every replica of the dense layers.
    pub expert: bool,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Factor on the learning rate.
    pub lr_scale: f64,
}

impl Parameter {
    /// The global parameters in `tensor`, a tensor of this parameter's shape (the master, a moment, a gradient).
    pub fn parts<'a>(&'a self, tensor: &'a Tensor) -> impl Iterator<Item = (&'a str, Tensor)> {
        self.names.iter().enumerate().map(move |(index, name)| {
            let part = if self.stacked { tensor.select(0, index as i64) } else { tensor.shallow_clone() };
            (name.as_str(), part)
        })
    }
}

/// All parameters of a rank, in the order of use in the forward pass.
pub struct Parameters {
    list: Vec<Parameter>,
    kind: Kind,
    seed: u64,
}

impl Parameters {
    pub(crate) fn new(kind: Kind, seed: u64) -> Parameters {
        Parameters { list: Vec::new(), kind, seed }
    }

    /// All of them.
    pub fn iter(&self) -> std::slice::Iter<'_, Parameter> {
        self.list.iter()
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Adds a parameter that every rank holds whole; returns the weight to compute with.
    pub(crate) fn dense(&mut self, device: &dyn Accelerator, name: &str, shape: &[i64], traits: Traits) -> Weight {
        self.add(device, vec![name.to_string()], false, shape, false, traits)
    }

    /// Adds `names.len()` global parameters of shape `shape` stacked along a new dim 0.
    pub(crate) fn stacked(
        &mut self,
        device: &dyn Accelerator,
        names: Vec<String>,
        shape: &[i64],
        expert: bool,
        traits: Traits,
    ) -> Weight {
        self.add(device, names, true, shape, expert, traits)
    }

    fn add(
        &mut self,
        device: &dyn Accelerator,
        names: Vec<String>,
        stacked: bool,
        part_shape: &[i64],
        expert: bool,
        traits: Traits,
    ) -> Weight {
        let part_len = part_shape.iter().product::<i64>() as usize;
        let values: Vec<f32> = match traits.init {
            Init::Ones => vec![1.0; part_len * names.len()],
            Init::Normal(std) => names.iter().flat_map(|name| normal(self.seed, name, part_len, std)).collect(),
        };
        let mut shape = if stacked { vec![names.len() as i64] } else { Vec::new() };
        shape.extend(part_shape);
        let master = device.upload(&Tensor::from_slice(&values).view(shape.as_slice()));
        // In fp32 both share memory.
        let value = if self.kind == Kind::Float { master.detach() } else { master.to_kind(self.kind) };
        let weight = Weight::new(value);
        let handle = weight.clone();
        let Traits { decay, lr_scale, .. } = traits;
        self.list.push(Parameter { names, stacked, weight, master, expert, decay, lr_scale });
        handle
    }
}
