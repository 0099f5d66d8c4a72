//! A model's parameters: one list that optimizer, gradient buckets and checkpoints iterate over.

use super::{
    build_context::BuildContext,
    init::normal,
    options::{Init, ParameterOptions},
    position::ShardPosition,
    replicas::Replicas,
    slices::{RowSlice, row_slices, slices_in_rows},
    spec::ParamSpec,
};
use checkpoint::{TensorSlice, advise_huge_pages};
use parallel::{
    Accelerator, CommError, Replication, Weight, matrix_shape, own_rows, sharding::ShardedWeights,
};
use parking_lot::Mutex;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Names of the rows of a parameter.
struct RowNames {
    /// The matrix in each physical slot, over all ranks.
    experts_by_slot: Vec<usize>,
    /// Global slices of the rows, in order.
    slices: Vec<RowSlice>,
}

impl RowNames {
    fn new(spec: &ParamSpec, position: &ShardPosition, experts_by_slot: Vec<usize>) -> RowNames {
        let own = &experts_by_slot[spec.own_experts(position)];
        RowNames {
            slices: row_slices(spec.slices(position, own)),
            experts_by_slot,
        }
    }
}

/// One tensor of this rank, as a matrix: all dimensions but the last are rows.
pub struct Parameter {
    pub(crate) spec: ParamSpec,
    /// Position of this rank.
    position: ShardPosition,
    names: Mutex<RowNames>,
    /// Value that the model computes with.
    pub weight: Weight,
    /// Rows that this rank keeps and updates.
    pub own: Range<i64>,
    /// The rows `own` in the model's dtype. Aliases `weight` unless the weight is sharded.
    stored: Tensor,
    /// The rows `own` in fp32, `[rows, columns]`, which the optimizer updates. Aliases `stored`
    /// except for bf16 models and with `optimizer.offload`, which keeps it in host memory.
    pub master: Tensor,
    /// True if `stored` does not alias `master`.
    has_separate_master: bool,
    /// Ranks with the same values.
    pub replicas: Replicas,
    /// True if the gradient norm counts the rows `own` on this rank and not on another replica.
    pub counted: bool,
    /// True if weight decay applies.
    pub decay: bool,
    /// Factor on the learning rate.
    pub lr_scale: f64,
}

impl Parameter {
    /// Returns the global slices of `tensor`, which has the rows `own`: the master, a moment or a
    /// gradient.
    pub fn slices(&self, tensor: &Tensor) -> Vec<(TensorSlice, Tensor)> {
        let names = self.names.lock();
        let slices = slices_in_rows(&names.slices, &self.own).map(|(slice, rows)| {
            let part = tensor.narrow(0, rows.start - self.own.start, rows.end - rows.start);
            let part = part.view(slice.shape.as_slice());
            (slice, part)
        });
        slices.collect()
    }

    /// Returns the global slices of `rows` of `own`, with their values in the master.
    pub(crate) fn slices_of_rows(&self, rows: &Range<i64>) -> Vec<(TensorSlice, Tensor)> {
        let names = self.names.lock();
        let slices = slices_in_rows(&names.slices, rows).map(|(slice, rows)| {
            let start = rows.start - self.own.start;
            let part = self.master.narrow(0, start, rows.end - rows.start);
            let part = part.view(slice.shape.as_slice());
            (slice, part)
        });
        slices.collect()
    }

    /// Returns the global slices of the rows that this rank updates.
    pub(crate) fn own_slices(&self) -> Vec<TensorSlice> {
        let names = self.names.lock();
        let slices = slices_in_rows(&names.slices, &self.own);
        slices.map(|(slice, _)| slice).collect()
    }

    /// Returns the expert in each physical slot of all ranks, or 0 alone without experts.
    pub(crate) fn experts_by_slot(&self) -> Vec<usize> {
        self.names.lock().experts_by_slot.clone()
    }

    /// Sets the expert in each physical slot, and with it the global slices of the rows. Leaves the
    /// values as they are.
    pub(crate) fn set_experts(&self, experts_by_slot: &[usize]) {
        *self.names.lock() = RowNames::new(&self.spec, &self.position, experts_by_slot.to_vec());
    }

    /// Copies the master to the weight that the model computes with.
    pub(crate) fn sync_from_master(&self) {
        if let Some(mut model_dtype_copy) = self.model_dtype_copy() {
            let values = self.master.to_kind(model_dtype_copy.kind());
            tch::no_grad(|| model_dtype_copy.copy_(&values));
        }
    }

    /// Returns the copy of the master in the model's dtype, unless it is the master itself.
    pub(crate) fn model_dtype_copy(&self) -> Option<Tensor> {
        self.has_separate_master
            .then(|| self.stored.shallow_clone())
    }
}

/// All parameters of a rank, in the order of use in the forward pass.
pub struct Parameters {
    list: Vec<Parameter>,
    kind: Kind,
    seed: u64,
    draws_values: bool,
    zero: u8,
    /// Replica groups, indexed by [`Replicas`].
    replications: Vec<Replication>,
    offloaded: bool,
}

/// Memory of a parameter in the model's dtype and in fp32.
struct Placed {
    value: Tensor,
    master: Tensor,
}

impl Parameters {
    /// Returns an empty list.
    pub(crate) fn new(ctx: &BuildContext) -> Parameters {
        Parameters {
            list: Vec::new(),
            kind: ctx.dtype.kind(),
            seed: ctx.seed,
            draws_values: ctx.draws_values,
            zero: ctx.groups.zero,
            replications: ctx.groups.replications.clone(),
            offloaded: ctx.offload,
        }
    }

    /// True if masters and moments are in host memory and weights in that of a device.
    pub(crate) fn are_offloaded(&self) -> bool {
        self.offloaded
    }

    /// Returns the dtype that the model computes in.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the seed of the run.
    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    /// Iterates over the parameters in the order of use.
    pub fn iter(&self) -> std::slice::Iter<'_, Parameter> {
        self.list.iter()
    }

    pub(crate) fn get(&self, index: usize) -> &Parameter {
        &self.list[index]
    }

    /// Returns the number of parameters.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// True if there are no parameters.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Adds the part of a parameter that the rank at `position` holds, and returns its weight.
    pub(crate) fn add(
        &mut self,
        device: &dyn Accelerator,
        spec: &ParamSpec,
        position: &ShardPosition,
        options: ParameterOptions,
    ) -> Weight {
        let names = RowNames::new(spec, position, (0..spec.matrices() as usize).collect());
        let shape = spec.local_shape(position);
        let shape = shape.as_slice();
        let replicas = spec.replicas(position);
        let (rows, cols) = matrix_shape(shape);
        debug_assert_eq!(
            rows,
            names.slices.last().map_or(0, |slice| slice.rows.end),
            "every row belongs to a slice"
        );
        let replication = &self.replications[replicas as usize];
        let rank = replication.shard_group.rank();
        let ranks = replication.shard_group.size();
        let counted = replication.replica_group.rank() == 0;
        let own = own_rows(rows, rank, ranks);
        let count = own.end - own.start;
        let kind = self.kind;
        let draw = |rows: &Range<i64>| {
            let values = self.draw(&names.slices, rows, cols, options.init);
            self.place(device, values)
        };
        let has_separate_master = self.offloaded || kind != Kind::Float;
        let (weight, stored, master) = if self.zero == 3 && ranks > 1 {
            let Placed { value, master } = draw(&own);
            let weight = Weight::without_value(shape, kind, value.device());
            (weight, value, master)
        } else {
            let Placed { value, master } = draw(&(0..rows));
            let own_of = |tensor: &Tensor| tensor.narrow(0, own.start, count);
            let master = if !has_separate_master || ranks == 1 {
                own_of(&master)
            } else {
                own_of(&master).copy()
            };
            let weight = Weight::new(value.view(shape));
            (weight, own_of(&value), master)
        };
        let handle = weight.clone();
        self.list.push(Parameter {
            spec: spec.clone(),
            position: *position,
            names: Mutex::new(names),
            weight,
            own,
            stored,
            master,
            has_separate_master,
            replicas,
            counted,
            decay: options.decay,
            lr_scale: options.lr_scale,
        });
        handle
    }

    /// Draws the initial values of `rows`, `[rows, cols]` on the host.
    fn draw(&self, row_slices: &[RowSlice], rows: &Range<i64>, cols: i64, init: Init) -> Tensor {
        let count = rows.end - rows.start;
        if !self.draws_values {
            let mut values = Tensor::empty([count, cols], (Kind::Float, Device::Cpu));
            advise_huge_pages(&values);
            let _ = values.fill_(f64::NAN);
            return values;
        }
        let values: Vec<f32> = match init {
            Init::Ones => vec![1.0; (count * cols) as usize],
            Init::Zeros => vec![0.0; (count * cols) as usize],
            Init::Normal(std) => slices_in_rows(row_slices, rows)
                .flat_map(|(slice, _)| {
                    let TensorSlice {
                        name,
                        global_shape,
                        offset,
                        shape,
                    } = &slice;
                    normal(self.seed, name, global_shape, offset, shape, std)
                })
                .collect(),
        };
        Tensor::from_slice(&values).view([count, cols])
    }

    /// Moves initial values to the device, except for masters that stay on the host.
    fn place(&self, device: &dyn Accelerator, values: Tensor) -> Placed {
        if self.offloaded {
            let value = device.upload(&values.to_kind(self.kind));
            return Placed {
                value,
                master: values,
            };
        }
        let master = device.upload(&values);
        Placed {
            value: master.to_kind(self.kind),
            master,
        }
    }

    /// Returns the parameters from index `first` on as a unit that is gathered together.
    pub(crate) fn unit(&self, first: usize) -> Unit {
        let shard = |replicas: Replicas| {
            let group = &self.replications[replicas as usize].shard_group;
            let members: Vec<_> = self.list[first..]
                .iter()
                .filter(|parameter| parameter.replicas == replicas)
                .map(|parameter| (parameter.weight.clone(), parameter.stored.shallow_clone()))
                .collect();
            let is_sharded = self.zero > 0 && group.size() > 1 && !members.is_empty();
            is_sharded.then(|| ShardedWeights::new(members, group.clone(), self.zero < 3))
        };
        Unit(Replicas::ALL.into_iter().filter_map(shard).collect())
    }

    /// True if ranks keep unsharded gradients during a step.
    pub(crate) fn keep_gradients(&self) -> bool {
        self.zero < 2
    }

    /// Returns the replicas of each kind, indexed by [`Replicas`].
    pub(crate) fn replications(&self) -> &[Replication] {
        &self.replications
    }
}

/// Sharded weights that are gathered together; empty if this rank's weights are not sharded.
pub(crate) struct Unit(Vec<ShardedWeights>);

impl Unit {
    /// Starts to gather the weights.
    pub(crate) fn prefetch(&self) -> Result<(), CommError> {
        self.0.iter().try_for_each(ShardedWeights::prefetch)
    }

    /// Makes the weights available until [`Unit::release`] was called as often.
    pub(crate) fn gather(&self) -> Result<(), CommError> {
        self.0.iter().try_for_each(ShardedWeights::gather)
    }

    pub(crate) fn release(&self) {
        for weights in &self.0 {
            weights.release();
        }
    }

    /// Marks gathered weights as stale after an update of the shards.
    pub(crate) fn mark_stale(&self) {
        for weights in &self.0 {
            weights.mark_stale();
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
