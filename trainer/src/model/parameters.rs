//! A model's parameters: one list that the optimizer, the gradient buckets and the checkpoints go through.

use crate::model::init::normal;
use checkpoint::TensorSlice;
use parallel::sharding::{ShardedWeights, own_rows};
use parallel::{Accelerator, CommError, Replication, Weight, matrix_shape};
use parking_lot::Mutex;
use std::ops::Range;
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
pub(crate) struct ParameterOptions {
    pub(crate) init: Init,
    /// Whether weight decay applies.
    pub(crate) decay: bool,
    /// Factor on the learning rate.
    pub(crate) lr_scale: f64,
}

/// Which other ranks hold the same values, and so share the gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replicas {
    /// Those with the same part of the dense layers.
    Dense,
    /// All ranks of the stage: what tensor parallelism does not split.
    Stage,
    /// Those with the same part of the experts.
    Expert,
    /// Those of the first and of the last stage: an embedding that is also the output layer.
    TiedEmbedding,
}

impl Replicas {
    /// Every kind, in the order of its number.
    pub const ALL: [Replicas; 4] = [
        Replicas::Dense,
        Replicas::Stage,
        Replicas::Expert,
        Replicas::TiedEmbedding,
    ];
}

/// Rows of a tensor that are a box of a global one.
#[derive(Debug, Clone)]
pub(crate) struct RowSlice {
    place: TensorSlice,
    rows: Range<i64>,
}

/// One tensor of this rank, as a matrix: all dims but the last are rows.
pub struct Parameter {
    /// What each of its rows is, in order.
    row_slices: Mutex<Vec<RowSlice>>,
    /// What the model computes with.
    pub weight: Weight,
    /// The rows that this rank keeps and updates.
    pub own: Range<i64>,
    /// They, in the model's dtype: memory of the weight where that is whole.
    stored: Tensor,
    /// They, in fp32, `[rows, columns]`: what the optimizer updates. The same memory, but for bf16 and with `optimizer.offload`,
    /// where it is the host's.
    pub master: Tensor,
    /// Whether `stored` is other memory than `master`.
    has_separate_master: bool,
    /// Who else holds it.
    pub replicas: Replicas,
    /// Whether the gradient of its own rows counts in the norm here, and not on another rank that has them too.
    pub counted: bool,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Factor on the learning rate.
    pub lr_scale: f64,
}

impl Parameter {
    /// Which slices of global tensors the rows of `tensor` are, which has this rank's rows: the master, a moment, a gradient.
    pub fn slices(&self, tensor: &Tensor) -> Vec<(TensorSlice, Tensor)> {
        let row_slices = self.row_slices.lock();
        let parts = slices_in_rows(&row_slices, &self.own).map(|(place, rows)| {
            let part = tensor.narrow(0, rows.start - self.own.start, rows.end - rows.start);
            let part = part.view(place.shape.as_slice());
            (place, part)
        });
        parts.collect()
    }

    /// Says that its rows are now those of `places`; their values are not touched.
    pub(crate) fn rename(&self, places: Vec<TensorSlice>) {
        *self.row_slices.lock() = row_slices(places);
    }

    /// Takes over what the master has become.
    pub(crate) fn sync_from_master(&self) {
        if let Some(mut model_dtype_copy) = self.model_dtype_copy() {
            tch::no_grad(|| model_dtype_copy.copy_(&self.master.to_kind(model_dtype_copy.kind())));
        }
    }

    /// What has the master's values in the model's dtype, where it is not the master itself.
    pub(crate) fn model_dtype_copy(&self) -> Option<Tensor> {
        self.has_separate_master
            .then(|| self.stored.shallow_clone())
    }
}

/// Boxes one after another.
fn row_slices(places: Vec<TensorSlice>) -> Vec<RowSlice> {
    let mut next = 0;
    let row_slice = |place: TensorSlice| {
        let rows = next..next + place.shape[0];
        next = rows.end;
        RowSlice { place, rows }
    };
    places.into_iter().map(row_slice).collect()
}

/// The slices that the rows `wanted` are, with the rows of each.
fn slices_in_rows(
    row_slices: &[RowSlice],
    wanted: &Range<i64>,
) -> impl Iterator<Item = (TensorSlice, Range<i64>)> {
    row_slices
        .iter()
        .filter_map(move |RowSlice { place, rows }| {
            let common = rows.start.max(wanted.start)..rows.end.min(wanted.end);
            if common.start >= common.end {
                return None;
            }
            let mut place = place.clone();
            place.offset[0] += common.start - rows.start;
            place.shape[0] = common.end - common.start;
            Some((place, common))
        })
}

/// A rank's box of a tensor of shape `global`: all of it but `along` in dim `dim`.
pub(crate) fn slice(name: &str, global: &[i64], dim: usize, along: &Range<i64>) -> TensorSlice {
    let mut place = TensorSlice::whole(name, global);
    place.offset[dim] = along.start;
    place.shape[dim] = along.end - along.start;
    place
}

/// All parameters of a rank, in the order of use in the forward pass.
pub struct Parameters {
    list: Vec<Parameter>,
    kind: Kind,
    seed: u64,
    zero: u8,
    /// By the number of [`Replicas`].
    replications: Vec<Replication>,
    offloaded: bool,
}

impl Parameters {
    /// For ranks that share out, by ZeRO stage `zero`: nothing, the optimizer's state, gradients too, weights too. `offloaded`:
    /// masters stay in the host's memory.
    pub(crate) fn new(
        kind: Kind,
        seed: u64,
        zero: u8,
        replications: Vec<Replication>,
        offloaded: bool,
    ) -> Parameters {
        Parameters {
            list: Vec::new(),
            kind,
            seed,
            zero,
            replications,
            offloaded,
        }
    }

    /// Whether masters, and so moments, are in the host's memory, and weights in that of a device.
    pub(crate) fn are_offloaded(&self) -> bool {
        self.offloaded
    }

    /// The dtype that the model computes in.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// All of them.
    pub fn iter(&self) -> std::slice::Iter<'_, Parameter> {
        self.list.iter()
    }

    /// Number `index`.
    pub(crate) fn get(&self, index: usize) -> &Parameter {
        &self.list[index]
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Adds a parameter that is one box of a global one; returns the weight to compute with.
    pub(crate) fn one(
        &mut self,
        device: &dyn Accelerator,
        place: TensorSlice,
        replicas: Replicas,
        options: ParameterOptions,
    ) -> Weight {
        let shape = place.shape.clone();
        self.add(device, &shape, vec![place], replicas, options)
    }

    /// Adds a parameter of shape `shape` whose rows are those of `places`, in order.
    pub(crate) fn add(
        &mut self,
        device: &dyn Accelerator,
        shape: &[i64],
        places: Vec<TensorSlice>,
        replicas: Replicas,
        options: ParameterOptions,
    ) -> Weight {
        let row_slices = row_slices(places);
        let (rows, cols) = matrix_shape(shape);
        debug_assert_eq!(
            rows,
            row_slices.last().map_or(0, |row_slice| row_slice.rows.end),
            "every row belongs to a slice"
        );
        let replication = &self.replications[replicas as usize];
        let rank = replication.shard_group.rank();
        let ranks = replication.shard_group.size();
        let own = own_rows(rows, rank, ranks);
        let counted = replication.replica_group.rank() == 0;
        let count = own.end - own.start;
        let draw = |rows: &Range<i64>| {
            let values: Vec<f32> = match options.init {
                Init::Ones => vec![1.0; ((rows.end - rows.start) * cols) as usize],
                Init::Normal(std) => slices_in_rows(&row_slices, rows)
                    .flat_map(|(place, _)| {
                        normal(
                            self.seed,
                            &place.name,
                            &place.global_shape,
                            &place.offset,
                            &place.shape,
                            std,
                        )
                    })
                    .collect(),
            };
            Tensor::from_slice(&values).view([rows.end - rows.start, cols])
        };
        let kind = self.kind;
        let offloaded = self.offloaded;
        // In the model's dtype, and the masters.
        let place = |drawn: Tensor| {
            if offloaded {
                (device.upload(&drawn.to_kind(kind)), drawn)
            } else {
                let drawn = device.upload(&drawn);
                (drawn.to_kind(kind), drawn)
            }
        };
        let has_separate_master = offloaded || kind != Kind::Float;
        let (weight, stored, master) = if self.zero == 3 && ranks > 1 {
            let (stored, master) = place(draw(&own));
            (
                Weight::without_value(shape, kind, stored.device()),
                stored,
                master,
            )
        } else {
            let (value, all) = place(draw(&(0..rows)));
            let own_of = |tensor: &Tensor| tensor.narrow(0, own.start, count);
            let master = if !has_separate_master || ranks == 1 {
                own_of(&all)
            } else {
                own_of(&all).copy()
            };
            (Weight::new(value.view(shape)), own_of(&value), master)
        };
        let handle = weight.clone();
        let ParameterOptions {
            decay, lr_scale, ..
        } = options;
        let row_slices = Mutex::new(row_slices);
        self.list.push(Parameter {
            row_slices,
            weight,
            own,
            stored,
            master,
            has_separate_master,
            replicas,
            counted,
            decay,
            lr_scale,
        });
        handle
    }

    /// The parameters from number `first` on, as they are needed at the same time.
    pub(crate) fn unit(&self, first: usize) -> Unit {
        let of = |replicas: Replicas| {
            let group = &self.replications[replicas as usize].shard_group;
            let members: Vec<_> = self.list[first..]
                .iter()
                .filter(|parameter| parameter.replicas == replicas)
                .map(|parameter| (parameter.weight.clone(), parameter.stored.shallow_clone()))
                .collect();
            let sharded = self.zero > 0 && group.size() > 1 && !members.is_empty();
            sharded.then(|| ShardedWeights::new(members, group.clone(), self.zero < 3))
        };
        Unit(Replicas::ALL.into_iter().filter_map(of).collect())
    }

    /// Whether whole gradients are kept during a step.
    pub(crate) fn keep_gradients(&self) -> bool {
        self.zero < 2
    }

    /// Who holds the same parameters, by the number of [`Replicas`].
    pub(crate) fn replications(&self) -> &[Replication] {
        &self.replications
    }
}

/// Weights that ranks share out and that are needed at the same time; nothing where each rank has its own.
pub(crate) struct Unit(Vec<ShardedWeights>);

impl Unit {
    /// Starts to gather.
    pub(crate) fn prefetch(&self) -> Result<(), CommError> {
        self.0.iter().try_for_each(ShardedWeights::prefetch)
    }

    /// Makes the values be there until they are released as often.
    pub(crate) fn gather(&self) -> Result<(), CommError> {
        self.0.iter().try_for_each(ShardedWeights::gather)
    }

    /// Says that they are not needed any longer.
    pub(crate) fn release(&self) {
        self.0.iter().for_each(ShardedWeights::release);
    }

    /// Says that ranks have changed what they keep.
    pub(crate) fn mark_stale(&self) {
        self.0.iter().for_each(ShardedWeights::mark_stale);
    }

    /// Whether there is anything to gather.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
