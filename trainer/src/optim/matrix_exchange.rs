//! Execution of a plan for whole matrices: parts travel while other matrices are transformed.

use super::{
    matrix_plan::{Part, Place, Rectangle, Round, SplitMatrix, Transfer, plan},
    rule::MatrixRule,
};
use crate::{
    Error,
    model::{
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

/// Elements of the matrices that a rank transforms in a round. Two rounds are in memory at once.
const ROUND_ELEMENTS: i64 = 16 << 20;

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

    /// Replaces `tensors`, this rank's rows of each parameter, by those of the transformed matrices.
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
            let transformed: Vec<Tensor> = matrices.iter().map(|x| rule.transform(x)).collect();
            drop(matrices);
            let begun =
                exchange.begin("scatter matrices", &round.scatter, &transformed, tensors)?;
            if let Some(earlier) = leaving.replace(begun) {
                exchange.finish("scattered matrices", earlier, tensors)?;
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
                let mut parts = vec![Tensor::empty([0], (self.kind, self.device))];
                for place in transfer.sends.values().flatten() {
                    parts.push(view(sources, place).to_kind(self.kind).reshape([-1]));
                }
                let sent = Tensor::f_cat(&parts, 0)?;
                let received: i64 = receive_counts.iter().sum();
                let received = Tensor::empty([received], (self.kind, self.device));
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
