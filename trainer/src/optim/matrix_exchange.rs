//! Execution of a plan for whole matrices: ranks transform some while parts of others arrive.

use super::{
    matrix_plan::{Part, Place, ROUNDS, Rectangle, Round, SplitMatrix, Transfer, plan},
    rule::MatrixRule,
};
use crate::{
    Error,
    model::{
        activations::FP32_BYTES,
        parameters::Parameters,
        spec::{ParamSpec, SplitDim},
    },
    stage_layout::StageLayout,
};
use checkpoint::TensorSlice;
use kernels::profile::{Cost, span};
use parallel::{Communicator, Local, Work};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Arc,
};
use tch::{Device, Kind, Tensor};

/// Most elements of the matrices that a rank transforms in a round, and most elements that it sends
/// or receives at once when results are scattered. One matrix, or one part of it, may have more.
const ROUND_ELEMENTS: i64 = 16 << 20;

/// Tensors in fp32 as large as a matrix that exist during its transformation.
const COPIES_OF_MATRIX: u64 = 6;

/// Matrices of one parameter, as a rank holds them.
pub(crate) struct HeldMatrices {
    /// Elements of one whole matrix.
    pub(crate) matrix: u64,
    /// Elements of all whole matrices of the stage, per rank.
    pub(crate) per_rank: f64,
    /// Elements that this rank updates.
    pub(crate) held: u64,
}

/// Returns about how many bytes a rank needs to exchange and transform whole matrices in `kind`.
///
/// The results of a round are scattered while the matrices of the next one arrive. Each element
/// exists once as a part of either, and once more in a buffer on each side of a transfer.
pub(crate) fn exchange_bytes(all: impl Iterator<Item = HeldMatrices>, kind: Kind) -> u64 {
    let mut owned = 0.0;
    let mut gathered = 0.0;
    let mut scattered = 0.0;
    let mut largest_matrix = 0;
    let mut largest_part = 0;
    for HeldMatrices {
        matrix,
        per_rank,
        held,
    } in all.filter(|matrices| matrices.held > 0)
    {
        // A rank with the rows of several matrices has whole ones.
        let part = matrix.min(held);
        let holders = (held * matrix) as f64 / (per_rank * part as f64);
        owned += per_rank;
        gathered += per_rank * (1.0 - part as f64 / matrix as f64);
        scattered += held as f64 * (1.0 - 1.0 / holders.max(1.0));
        largest_matrix = largest_matrix.max(matrix);
        largest_part = largest_part.max(part);
    }
    let most = ROUND_ELEMENTS as f64;
    let round = (owned / ROUNDS as f64).min(most).max(largest_matrix as f64);
    let share = (round / owned.max(1.0)).min(1.0);
    let arriving = round + 2.0 * gathered * share;
    let leaving = round + 2.0 * (scattered * share).min(most.max(largest_part as f64));
    let element = kind.elt_size_in_bytes() as f64;
    let transforming = COPIES_OF_MATRIX * largest_matrix * FP32_BYTES;
    (element * (arriving + leaving)) as u64 + transforming
}

/// The ranks of a pipeline stage, which exchange matrices, and the rows that each updates.
pub struct StageRanks {
    group: Arc<dyn Communicator>,
    layout: StageLayout,
}

impl StageRanks {
    /// Returns the ranks of `group`, with their rows.
    pub(crate) fn new(group: Arc<dyn Communicator>, layout: StageLayout) -> StageRanks {
        StageRanks { group, layout }
    }

    /// Returns a stage of one rank.
    pub fn alone() -> StageRanks {
        StageRanks {
            group: Arc::new(Local::new(0, "alone")),
            layout: StageLayout::alone(),
        }
    }
}

/// The rounds for some parameters, for the experts' places at the time of the plan.
pub(crate) struct MatrixRounds {
    experts: Vec<Vec<usize>>,
    rounds: Vec<Round>,
}

impl MatrixRounds {
    /// Plans the transformation of the parameters `members`.
    pub(crate) fn new(
        stage: &StageRanks,
        rule: &dyn MatrixRule,
        parameters: &Parameters,
        members: &[usize],
    ) -> MatrixRounds {
        let experts = experts_of(parameters, members);
        let matrices = || {
            let of_member = |(tensor, &index): (usize, &usize)| {
                let spec = &parameters.get(index).spec;
                split_matrices(&stage.layout, spec, &experts[tensor], tensor, rule)
            };
            members.iter().enumerate().flat_map(of_member)
        };
        let rank = stage.group.rank();
        let rounds = plan(matrices, rank, stage.layout.len(), ROUND_ELEMENTS);
        MatrixRounds { experts, rounds }
    }

    /// True if the experts of the parameters are where they were.
    pub(crate) fn fits(&self, parameters: &Parameters, members: &[usize]) -> bool {
        self.experts == experts_of(parameters, members)
    }

    /// Replaces `tensors`, this rank's rows of each parameter, by rows of the transformed matrices.
    ///
    /// # Collective
    /// All ranks of the stage.
    ///
    /// # Errors
    /// If a collective fails.
    pub(crate) fn run(
        &self,
        stage: &StageRanks,
        rule: &dyn MatrixRule,
        tensors: &[Tensor],
    ) -> Result<(), Error> {
        let Some(first) = tensors.first() else {
            return Ok(());
        };
        let exchange = Exchange {
            group: stage.group.as_ref(),
            kind: rule.kind(),
            device: first.device(),
        };
        let gather = |round| exchange.begin_gather(round, tensors);
        let mut rounds = self.rounds.iter();
        let mut arriving = rounds.next().map(gather).transpose()?;
        let mut leaving: Option<Pending> = None;
        for round in &self.rounds {
            let Some(Arriving { pending, matrices }) = arriving.take() else {
                break;
            };
            exchange.finish("gathered matrices", pending, &matrices)?;
            arriving = rounds.next().map(gather).transpose()?;
            let transform = |matrix: Tensor| rule.transform(&matrix);
            let transformed: Vec<Tensor> = matrices.into_iter().map(transform).collect();
            for scatter in &round.scatters {
                if let Some(earlier) = leaving.take() {
                    exchange.finish("scattered matrices", earlier, tensors)?;
                }
                let begun = exchange.begin("scatter matrices", scatter, &transformed, tensors)?;
                leaving = Some(begun);
            }
        }
        match leaving {
            Some(last) => exchange.finish("scattered matrices", last, tensors),
            None => Ok(()),
        }
    }
}

fn experts_of(parameters: &Parameters, members: &[usize]) -> Vec<Vec<usize>> {
    let experts = |&index: &usize| parameters.get(index).experts_by_slot();
    members.iter().map(experts).collect()
}

/// Returns the matrices of a parameter, in order, with the parts of all ranks.
fn split_matrices(
    layout: &StageLayout,
    spec: &ParamSpec,
    experts_by_slot: &[usize],
    tensor: usize,
    rule: &dyn MatrixRule,
) -> Vec<SplitMatrix> {
    let rectangles = fused_matrices(spec);
    let of_expert = |expert: usize| (spec.name(expert), expert * rectangles.len());
    let first_of: HashMap<String, usize> = (0..spec.matrices() as usize).map(of_expert).collect();
    let matrix = |at: &Rectangle| {
        let rows = at.rows.end - at.rows.start;
        let columns = at.columns.end - at.columns.start;
        SplitMatrix {
            tensor,
            rows,
            columns,
            cost: rule.flops(rows, columns),
            parts: Vec::new(),
        }
    };
    let mut matrices: Vec<SplitMatrix> = (0..spec.matrices())
        .flat_map(|_| rectangles.iter().map(matrix))
        .collect();
    for rank in 0..layout.len() {
        let mut row = 0;
        for slice in layout.slices(rank, spec, experts_by_slot) {
            let first = first_of[&slice.name];
            for (number, at) in rectangles.iter().enumerate() {
                let part = part(rank, &slice, row, at);
                matrices[first + number].parts.extend(part);
            }
            row += slice.shape[0];
        }
    }
    matrices
}

/// Returns the rectangles of the global tensor that are matrices of their own.
fn fused_matrices(spec: &ParamSpec) -> Vec<Rectangle> {
    let [rows, columns] = spec.matrix_shape();
    let SplitDim { dim, fused, .. } = spec.fused();
    let rectangle = |number: i64| {
        let first = |this: usize, size: i64| if this == dim { number * size } else { 0 };
        let row = first(0, rows);
        let column = first(1, columns);
        Rectangle {
            rows: row..row + rows,
            columns: column..column + columns,
        }
    };
    (0..fused as i64).map(rectangle).collect()
}

/// Returns what `slice`, whose rows begin at `row` of the rank's tensor, has in common with the
/// matrix at `at`.
fn part(rank: usize, slice: &TensorSlice, row: i64, at: &Rectangle) -> Option<Part> {
    let common = |dim: usize, of_matrix: &Range<i64>| {
        let start = slice.offset[dim].max(of_matrix.start);
        let end = (slice.offset[dim] + slice.shape[dim]).min(of_matrix.end);
        (start < end).then_some(start..end)
    };
    let shifted = |range: &Range<i64>, by: i64| range.start - by..range.end - by;
    let rows = common(0, &at.rows)?;
    let columns = common(1, &at.columns)?;
    Some(Part {
        rank,
        of_matrix: Rectangle {
            rows: shifted(&rows, at.rows.start),
            columns: shifted(&columns, at.columns.start),
        },
        of_tensor: Rectangle {
            rows: shifted(&rows, slice.offset[0] - row),
            columns: shifted(&columns, slice.offset[1]),
        },
    })
}

/// Transfers of one dtype in a group.
struct Exchange<'a> {
    group: &'a dyn Communicator,
    kind: Kind,
    device: Device,
}

/// A transfer in progress.
struct Pending<'a> {
    work: Work,
    transfer: &'a Transfer,
    received: Tensor,
    /// Memory that the transfer reads.
    _sent: Tensor,
}

/// Matrices of a round that arrive.
struct Arriving<'a> {
    pending: Pending<'a>,
    matrices: Vec<Tensor>,
}

impl Exchange<'_> {
    /// Starts to gather the matrices that this rank owns in a round.
    fn begin_gather<'a>(
        &self,
        round: &'a Round,
        tensors: &[Tensor],
    ) -> Result<Arriving<'a>, Error> {
        let empty = |shape: &[i64; 2]| Tensor::empty(shape, (self.kind, self.device));
        let matrices: Vec<Tensor> = round.owned.iter().map(empty).collect();
        let pending = self.begin("gather matrices", &round.gather, tensors, &matrices)?;
        Ok(Arriving { pending, matrices })
    }

    /// Starts a transfer, and copies what stays on this rank.
    fn begin<'a>(
        &self,
        name: &'static str,
        transfer: &'a Transfer,
        sources: &[Tensor],
        targets: &[Tensor],
    ) -> Result<Pending<'a>, Error> {
        let counts = |places: &BTreeMap<usize, Vec<Place>>| {
            let mut counts = vec![0; self.group.size()];
            for (&rank, places) in places {
                counts[rank] = places.iter().map(|place| place.at.elements()).sum();
            }
            counts
        };
        let send_counts = counts(&transfer.sends);
        let receive_counts = counts(&transfer.receives);
        let moved: i64 = send_counts.iter().chain(&receive_counts).sum();
        let bytes = (moved * self.kind.elt_size_in_bytes() as i64) as f64;
        let cost = || Cost { flops: 0.0, bytes };
        span("optimizer", name, cost, || {
            tch::no_grad(|| {
                for [from, to] in &transfer.kept {
                    view(targets, to).f_copy_(&view(sources, from))?;
                }
                let empty = |counts: &[i64]| {
                    let elements: i64 = counts.iter().sum();
                    Tensor::f_empty([elements], (self.kind, self.device))
                };
                let sent = empty(&send_counts)?;
                let mut next = 0;
                for place in transfer.sends.values().flatten() {
                    let source = view(sources, place);
                    let packed = sent.narrow(0, next, place.at.elements());
                    packed.view(source.size().as_slice()).f_copy_(&source)?;
                    next += place.at.elements();
                }
                let received = empty(&receive_counts)?;
                let work =
                    self.group
                        .all_to_all(&received, &sent, &receive_counts, &send_counts)?;
                Ok(Pending {
                    work,
                    transfer,
                    received,
                    _sent: sent,
                })
            })
        })
    }

    /// Waits for a transfer and copies what has arrived to its places.
    fn finish(
        &self,
        name: &'static str,
        pending: Pending,
        targets: &[Tensor],
    ) -> Result<(), Error> {
        let Pending {
            work,
            transfer,
            received,
            _sent,
        } = pending;
        span("optimizer", name, Cost::default, || {
            work.wait()?;
            let mut next = 0;
            for place in transfer.receives.values().flatten() {
                let mut target = view(targets, place);
                let values = received.narrow(0, next, place.at.elements());
                let values = values.view(target.size().as_slice());
                tch::no_grad(|| target.f_copy_(&values))?;
                next += place.at.elements();
            }
            Ok(())
        })
    }
}

fn view(tensors: &[Tensor], place: &Place) -> Tensor {
    let Rectangle { rows, columns } = &place.at;
    tensors[place.tensor]
        .narrow(0, rows.start, rows.end - rows.start)
        .narrow(1, columns.start, columns.end - columns.start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{ModelConfig, ParallelConfig},
        model::decoder::layer_specs,
        optim::rule::{RowUpdate, StepScalars},
    };
    use parallel::{Mesh, MeshShape, run_on_threads};
    use proptest::prelude::*;
    use serde_json::json;
    use std::time::Duration;

    /// A transformation in which each result depends on the shape and on all elements.
    struct Mix;

    impl MatrixRule for Mix {
        fn kind(&self) -> Kind {
            Kind::Float
        }
        fn flops(&self, rows: i64, columns: i64) -> f64 {
            (rows * columns) as f64
        }
        fn prepare(&self, _update: &RowUpdate, _scalars: StepScalars) -> Result<(), Error> {
            Ok(())
        }
        fn transform(&self, matrix: &Tensor) -> Tensor {
            let rows = matrix.size()[0] as f64;
            matrix * 2.0 + matrix.sum(Kind::Float) + rows
        }
        fn apply(
            &self,
            _update: &RowUpdate,
            _shape: [i64; 2],
            _scalars: StepScalars,
        ) -> Result<(), Error> {
            Ok(())
        }
    }

    /// The matrices of a layer: attention, router, experts and a shared expert.
    fn specs() -> Vec<ParamSpec> {
        let moe = json!({"experts": 12, "top_k": 1, "ffn": 12, "shared_experts": 1});
        let model = json!({"layers": 1, "hidden": 8, "heads": 4, "kv_heads": 2, "vocab_size": 1,
                           "moe": moe});
        let model: ModelConfig = serde_json::from_value(model).unwrap();
        let mut specs = layer_specs(&model, 0);
        specs.retain(|spec| spec.dims.len() == 2);
        specs
    }

    /// Returns global tensors with whole numbers, by name.
    fn globals(specs: &[ParamSpec]) -> HashMap<String, Tensor> {
        let mut next = 0;
        let mut tensors = HashMap::new();
        for spec in specs {
            for expert in 0..spec.matrices() as usize {
                let shape = spec.shape();
                let count: i64 = shape.iter().product();
                let values = Tensor::arange(count, (Kind::Float, Device::Cpu));
                let values = values.remainder(7.0) + next % 5;
                tensors.insert(spec.name(expert), values.view(shape.as_slice()));
                next += 1;
            }
        }
        tensors
    }

    /// Transforms the matrices of global tensors in place.
    fn transform_globals(specs: &[ParamSpec], tensors: &HashMap<String, Tensor>) {
        for spec in specs {
            for expert in 0..spec.matrices() as usize {
                for at in fused_matrices(spec) {
                    let place = Place { tensor: 0, at };
                    let global = tensors[&spec.name(expert)].shallow_clone();
                    let mut matrix = view(&[global], &place);
                    matrix.copy_(&Mix.transform(&matrix));
                }
            }
        }
    }

    /// Returns a rank's rows of each parameter.
    fn rows(
        layout: &StageLayout,
        rank: usize,
        specs: &[ParamSpec],
        slots: &[usize],
        globals: &HashMap<String, Tensor>,
    ) -> Vec<Tensor> {
        let of_spec = |spec: &ParamSpec| {
            let experts: &[usize] = if spec.matrices() > 1 { slots } else { &[0] };
            let slices = layout.slices(rank, spec, experts);
            let parts: Vec<Tensor> = slices
                .iter()
                .map(|slice| {
                    globals[&slice.name]
                        .narrow(0, slice.offset[0], slice.shape[0])
                        .narrow(1, slice.offset[1], slice.shape[1])
                })
                .collect();
            if parts.is_empty() {
                Tensor::empty([0, 1], (Kind::Float, Device::Cpu))
            } else {
                Tensor::cat(&parts, 0)
            }
        };
        specs.iter().map(of_spec).collect()
    }

    /// Random meshes of a stage, with ZeRO and its groups.
    fn stages() -> impl Strategy<Value = (MeshShape, ParallelConfig)> {
        let axes = (1usize..5, 1usize..4, 1usize..3, 0u8..4);
        let fold = any::<[prop::sample::Index; 2]>();
        (axes, fold).prop_map(|((data, tensor, context, zero), [fold, block])| {
            let stage = data * tensor * context;
            let pairs = (1..=stage).flat_map(|e| (1..=stage).map(move |t| (e, t)));
            let fits = |&(e, t): &(usize, usize)| {
                stage.is_multiple_of(e * t)
                    && 12usize.is_multiple_of(e)
                    && 12usize.is_multiple_of(t)
            };
            let folds: Vec<_> = pairs.filter(fits).collect();
            let (expert, expert_tensor) = folds[fold.index(folds.len())];
            let replicas = data * context;
            let blocks: Vec<usize> = (1..=replicas)
                .filter(|block| replicas.is_multiple_of(*block))
                .collect();
            let group = (zero > 0).then(|| blocks[block.index(blocks.len())]);
            let parallel = json!({"zero": zero, "zero_group_size": group});
            let shape = MeshShape {
                data,
                tensor,
                pipeline: 1,
                context,
                expert,
                expert_tensor,
            };
            (shape, serde_json::from_value(parallel).unwrap())
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn every_layout_transforms_whole_matrices(
            (shape, parallel) in stages(),
            slots in Just((0..12usize).collect::<Vec<_>>()).prop_shuffle(),
            round_elements in prop::sample::select(vec![1i64, 200, 1 << 20]),
        ) {
            let ranks = shape.data * shape.tensor * shape.context;
            run_on_threads(ranks, Duration::from_secs(60), move |world| {
                let mesh = Mesh::new(shape, world.rank(), ranks).unwrap();
                let layout = StageLayout::new(&parallel, &mesh).unwrap();
                let specs = specs();
                let globals = globals(&specs);
                let tensors = rows(&layout, world.rank(), &specs, &slots, &globals);
                transform_globals(&specs, &globals);
                let expected = rows(&layout, world.rank(), &specs, &slots, &globals);
                let matrices = || {
                    specs.iter().enumerate().flat_map(|(tensor, spec)| {
                        let experts: &[usize] = if spec.matrices() > 1 { &slots } else { &[0] };
                        split_matrices(&layout, spec, experts, tensor, &Mix)
                    })
                };
                let rounds = MatrixRounds {
                    experts: Vec::new(),
                    rounds: plan(matrices, world.rank(), ranks, round_elements),
                };
                let stage = StageRanks::new(world.all("stage").unwrap(), layout);
                rounds.run(&stage, &Mix, &tensors).unwrap();
                assert_eq!(tensors, expected);
            });
        }
    }
}
