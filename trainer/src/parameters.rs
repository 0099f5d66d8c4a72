//! A model's parameters: one list that the optimizer, the gradient buckets and the checkpoints go through.

use crate::init::normal;
use checkpoint::Place;
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

/// Which other ranks hold the same values, and so share the gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replicas {
    /// The replicas of this rank's dense layers.
    Dense,
    /// The replicas of this rank's experts.
    Expert,
    /// The replicas of the first and of the last stage: an embedding that is also the output layer.
    Ends,
}

/// One tensor of this rank.
pub struct Parameter {
    /// What it is: its box of a global tensor; several for experts, whose tensors are stacked along dim 0, in order.
    pub places: Vec<Place>,
    /// Whether dim 0 stacks several global parameters (a rank's experts).
    pub stacked: bool,
    /// What the model computes with.
    pub weight: Weight,
    /// fp32 values that the optimizer updates; in fp32 the weight itself.
    pub master: Tensor,
    /// Who else holds it.
    pub replicas: Replicas,
    /// Whether its gradient counts in the norm here, and not on another rank that holds it too.
    pub counted: bool,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Factor on the learning rate.
    pub lr_scale: f64,
}

impl Parameter {
    /// The global parameters in `tensor`, a tensor of this parameter's shape (the master, a moment, a gradient).
    pub fn parts<'a>(&'a self, tensor: &'a Tensor) -> impl Iterator<Item = (&'a Place, Tensor)> {
        self.places.iter().enumerate().map(move |(index, place)| {
            let part = if self.stacked { tensor.select(0, index as i64) } else { tensor.shallow_clone() };
            (place, part)
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

    /// Adds a parameter that this rank holds whole; returns the weight to compute with.
    pub(crate) fn dense(&mut self, device: &dyn Accelerator, name: &str, shape: &[i64], traits: Traits) -> Weight {
        self.add(device, vec![Place::whole(name, shape)], false, Replicas::Dense, traits)
    }

    /// Adds a parameter of which this rank holds one box.
    pub(crate) fn sharded(&mut self, device: &dyn Accelerator, place: Place, traits: Traits) -> Weight {
        self.add(device, vec![place], false, Replicas::Dense, traits)
    }

    /// Adds the copy of a parameter that an earlier stage holds too, whose gradient is the sum of both.
    pub(crate) fn copy_of_first(
        &mut self,
        device: &dyn Accelerator,
        name: &str,
        shape: &[i64],
        traits: Traits,
    ) -> Weight {
        let weight = self.add(device, vec![Place::whole(name, shape)], false, Replicas::Ends, traits);
        self.list.last_mut().expect("it was added").counted = false;
        weight
    }

    /// Says that the parameter added last has a copy on the last stage.
    pub(crate) fn last_has_a_copy(&mut self) {
        self.list.last_mut().expect("one was added").replicas = Replicas::Ends;
    }

    /// Adds `names.len()` global parameters of shape `shape` stacked along a new dim 0.
    pub(crate) fn stacked(
        &mut self,
        device: &dyn Accelerator,
        names: Vec<String>,
        shape: &[i64],
        replicas: Replicas,
        traits: Traits,
    ) -> Weight {
        let places = names.into_iter().map(|name| Place::whole(name, shape)).collect();
        self.add(device, places, true, replicas, traits)
    }

    fn add(
        &mut self,
        device: &dyn Accelerator,
        places: Vec<Place>,
        stacked: bool,
        replicas: Replicas,
        traits: Traits,
    ) -> Weight {
        let values: Vec<f32> = match traits.init {
            Init::Ones => vec![1.0; places.iter().map(|place| place.shape.iter().product::<i64>() as usize).sum()],
            Init::Normal(std) => places
                .iter()
                .flat_map(|place| normal(self.seed, &place.name, &place.global, &place.offset, &place.shape, std))
                .collect(),
        };
        let mut shape = if stacked { vec![places.len() as i64] } else { Vec::new() };
        shape.extend(&places[0].shape);
        let master = device.upload(&Tensor::from_slice(&values).view(shape.as_slice()));
        // In fp32 both share memory.
        let value = if self.kind == Kind::Float { master.detach() } else { master.to_kind(self.kind) };
        let weight = Weight::new(value);
        let handle = weight.clone();
        let Traits { decay, lr_scale, .. } = traits;
        self.list.push(Parameter { places, stacked, weight, master, replicas, counted: true, decay, lr_scale });
        handle
    }
}
