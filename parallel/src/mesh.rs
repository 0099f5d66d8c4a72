//! The mesh: the only place that turns a rank into coordinates and groups.
//!
//! Ranks are numbered with the tensor axis fastest, then context, data and pipeline, so that the
//! ranks that communicate most are neighbours. The expert axes are folded over the dense ones.
//! Inside one pipeline stage, the `data x context x tensor` ranks form rows of `expert x
//! expert_tensor` consecutive ranks, `expert_tensor` fastest. The ranks of a row hold a layer's
//! experts once; the ranks of a column hold the same part of them.

/// Sizes of the parallel axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshShape {
    /// Replicas of the dense layers, each with its own share of the batch.
    pub data: usize,
    /// Ranks that split every matrix.
    pub tensor: usize,
    /// Pipeline stages, each with a part of the layers.
    pub pipeline: usize,
    /// Ranks that split every sequence.
    pub context: usize,
    /// Ranks that split the experts of a layer.
    pub expert: usize,
    /// Ranks that split every expert's matrices. `expert * expert_tensor` divides `data * context *
    /// tensor`.
    pub expert_tensor: usize,
}

/// A reason why axis sizes do not fit the number of ranks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MeshError {
    #[error("the {axis} axis has size 0; the smallest is 1")]
    EmptyAxis { axis: &'static str },
    #[error(
        "data {data} x context {context} x tensor {tensor} x pipeline {pipeline} = {product} \
         ranks, but {ranks} were started"
    )]
    WrongProduct {
        data: usize,
        context: usize,
        tensor: usize,
        pipeline: usize,
        product: usize,
        ranks: usize,
    },
    #[error(
        "expert {expert} x expert_tensor {expert_tensor} does not divide the {stage} ranks of a \
         pipeline stage (data {data} x context {context} x tensor {tensor})"
    )]
    ExpertDoesNotDivide {
        expert: usize,
        expert_tensor: usize,
        data: usize,
        context: usize,
        tensor: usize,
        stage: usize,
    },
}

/// The place of a rank on each axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coordinates {
    pub data: usize,
    pub tensor: usize,
    pub pipeline: usize,
    pub context: usize,
    /// Index of the set of experts that the rank holds.
    pub expert: usize,
    /// Index of the slice that the rank holds of each of these experts.
    pub expert_tensor: usize,
    /// Index among the ranks that hold the same slices.
    pub expert_replica: usize,
}

/// A kind of process group; the groups of a kind partition the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GroupKind {
    World,
    /// The ranks that differ only in their data coordinate.
    Data,
    /// The ranks that split a matrix.
    Tensor,
    /// The stages of one pipeline.
    Pipeline,
    /// The ranks that split a sequence.
    Context,
    /// The ranks that hold the same dense parameters: data x context.
    DenseReplicas,
    /// The ranks of a stage: data x context x tensor.
    Stage,
    /// The ranks that work on the same sequences in a stage: context x tensor.
    Sequence,
    /// The ranks that split the vocabulary: pipeline x tensor.
    Vocabulary,
    /// The ranks that split a layer's experts: expert x expert_tensor.
    Expert,
    /// The ranks that hold the same slices of the same experts.
    ExpertReplicas,
}

impl GroupKind {
    /// All kinds, in the order of declaration.
    pub const ALL: [GroupKind; 11] = [
        GroupKind::World,
        GroupKind::Data,
        GroupKind::Tensor,
        GroupKind::Pipeline,
        GroupKind::Context,
        GroupKind::DenseReplicas,
        GroupKind::Stage,
        GroupKind::Sequence,
        GroupKind::Vocabulary,
        GroupKind::Expert,
        GroupKind::ExpertReplicas,
    ];
}

/// Equally many members at equal distances.
#[derive(Debug, Clone, Copy)]
struct Steps {
    count: usize,
    stride: usize,
}

/// The members of a group: in each step of `outer`, the steps of `inner`.
#[derive(Debug, Clone, Copy)]
struct GroupSteps {
    outer: Steps,
    inner: Steps,
}

impl GroupSteps {
    fn single(count: usize, stride: usize) -> GroupSteps {
        GroupSteps {
            outer: Steps {
                count: 1,
                stride: 0,
            },
            inner: Steps { count, stride },
        }
    }

    /// Returns the distance of member `position` from the first one.
    fn offset(self, position: usize) -> usize {
        let GroupSteps { outer, inner } = self;
        position / inner.count * outer.stride + position % inner.count * inner.stride
    }
}

/// A rank's group, split by nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSplit {
    /// The members on this rank's node.
    pub intra_node: Vec<usize>,
    /// One member per node: those with this rank's position on their node.
    pub inter_node: Vec<usize>,
}

/// The assignment of ranks to coordinates, as one rank sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mesh {
    shape: MeshShape,
    rank: usize,
}

impl Mesh {
    /// Arranges `ranks` ranks for the one that is `rank`.
    ///
    /// # Errors
    /// If the dense axes do not multiply to the number of ranks, or the expert axes do not divide a
    /// stage.
    ///
    /// # Panics
    /// If `rank` is not below `ranks`.
    pub fn new(shape: MeshShape, rank: usize, ranks: usize) -> Result<Mesh, MeshError> {
        let MeshShape {
            data,
            tensor,
            pipeline,
            context,
            expert,
            expert_tensor,
        } = shape;
        let named = [
            ("data", data),
            ("tensor", tensor),
            ("pipeline", pipeline),
            ("context", context),
            ("expert", expert),
            ("expert_tensor", expert_tensor),
        ];
        if let Some((axis, _)) = named.into_iter().find(|&(_, size)| size == 0) {
            return Err(MeshError::EmptyAxis { axis });
        }
        // Axes from a file may have any size.
        let stage = data.saturating_mul(context).saturating_mul(tensor);
        let product = stage.saturating_mul(pipeline);
        if product != ranks {
            return Err(MeshError::WrongProduct {
                data,
                context,
                tensor,
                pipeline,
                product,
                ranks,
            });
        }
        if !stage.is_multiple_of(expert.saturating_mul(expert_tensor)) {
            return Err(MeshError::ExpertDoesNotDivide {
                expert,
                expert_tensor,
                data,
                context,
                tensor,
                stage,
            });
        }
        assert!(rank < ranks, "rank {rank} of {ranks}");
        Ok(Mesh { shape, rank })
    }

    /// Returns the sizes of the axes.
    pub fn shape(&self) -> MeshShape {
        self.shape
    }

    /// Returns this rank's number.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Returns the number of ranks.
    pub fn size(&self) -> usize {
        self.ranks_per_stage() * self.shape.pipeline
    }

    /// Returns the number of ranks that hold the same slices of the same experts.
    pub fn expert_replicas(&self) -> usize {
        self.ranks_per_stage() / (self.shape.expert * self.shape.expert_tensor)
    }

    /// Returns this rank's coordinates.
    pub fn coordinates(&self) -> Coordinates {
        self.coordinates_of(self.rank)
    }

    /// Returns the coordinates of `rank`.
    pub fn coordinates_of(&self, rank: usize) -> Coordinates {
        let MeshShape {
            tensor,
            context,
            expert,
            expert_tensor,
            ..
        } = self.shape;
        let pipeline = rank / self.ranks_per_stage();
        let in_stage = rank % self.ranks_per_stage();
        Coordinates {
            tensor: in_stage % tensor,
            context: in_stage / tensor % context,
            data: in_stage / tensor / context,
            pipeline,
            expert: in_stage / expert_tensor % expert,
            expert_tensor: in_stage % expert_tensor,
            expert_replica: in_stage / (expert * expert_tensor),
        }
    }

    /// Returns the members, in order, of this rank's group of the given kind.
    pub fn group(&self, kind: GroupKind) -> Vec<usize> {
        let steps = self.steps(kind);
        let first = self.rank - steps.offset(self.position(kind));
        let members = 0..steps.outer.count * steps.inner.count;
        members.map(|place| first + steps.offset(place)).collect()
    }

    /// Returns this rank's index in its group of the given kind.
    pub fn position(&self, kind: GroupKind) -> usize {
        let shape = self.shape;
        let at = self.coordinates();
        match kind {
            GroupKind::World => self.rank,
            GroupKind::Data => at.data,
            GroupKind::Tensor => at.tensor,
            GroupKind::Pipeline => at.pipeline,
            GroupKind::Context => at.context,
            GroupKind::DenseReplicas => at.data * shape.context + at.context,
            GroupKind::Stage => self.rank % self.ranks_per_stage(),
            GroupKind::Sequence => at.context * shape.tensor + at.tensor,
            GroupKind::Vocabulary => at.pipeline * shape.tensor + at.tensor,
            GroupKind::Expert => at.expert * shape.expert_tensor + at.expert_tensor,
            GroupKind::ExpertReplicas => at.expert_replica,
        }
    }

    /// Returns the ranks that hold dense layers with this rank's tensor coordinate in `stages`.
    pub fn dense_replicas_in_stages(&self, stages: &[usize]) -> Vec<usize> {
        let tensor = self.coordinates().tensor;
        let holds = |stage: &usize| stages.contains(stage);
        let stages = (0..self.shape.pipeline).filter(holds);
        let of_stage = |stage: usize| {
            let first = stage * self.ranks_per_stage() + tensor;
            let end = (stage + 1) * self.ranks_per_stage();
            (first..end).step_by(self.shape.tensor)
        };
        stages.flat_map(of_stage).collect()
    }

    /// Returns the node of each member of this rank's group, for nodes of `per_node` ranks.
    pub fn nodes(&self, kind: GroupKind, per_node: usize) -> Vec<usize> {
        self.group(kind)
            .into_iter()
            .map(|rank| rank / per_node)
            .collect()
    }

    /// Splits this rank's group by nodes of `per_node` ranks.
    ///
    /// Returns `None` unless every node has the same number of members, and whole owners of
    /// experts.
    pub fn split_by_node(&self, kind: GroupKind, per_node: usize) -> Option<NodeSplit> {
        let members = self.group(kind);
        let node = self.rank / per_node;
        let is_inside = |rank: &usize| rank / per_node == node;
        let inside = members
            .iter()
            .copied()
            .filter(is_inside)
            .collect::<Vec<usize>>();
        let position = inside.iter().position(|&rank| rank == self.rank)?;
        let nodes = self.nodes(kind, per_node);
        let mut members_by_node = nodes.chunk_by(|node, next| node == next);
        let even = members_by_node.all(|members| members.len() == inside.len());
        let whole = inside.len().is_multiple_of(self.shape.expert_tensor);
        let from_own = members.iter().copied().skip(position);
        let across = from_own.step_by(inside.len()).collect();
        (even && whole).then_some(NodeSplit {
            intra_node: inside,
            inter_node: across,
        })
    }

    /// Returns the distances between the members of a group, in the order of
    /// [`Mesh::position`].
    fn steps(&self, kind: GroupKind) -> GroupSteps {
        let MeshShape {
            data,
            tensor,
            pipeline,
            context,
            expert,
            expert_tensor,
        } = self.shape;
        let stage = self.ranks_per_stage();
        let owners = expert * expert_tensor;
        match kind {
            GroupKind::World => GroupSteps::single(self.size(), 1),
            GroupKind::Data => GroupSteps::single(data, context * tensor),
            GroupKind::Tensor => GroupSteps::single(tensor, 1),
            GroupKind::Pipeline => GroupSteps::single(pipeline, stage),
            GroupKind::Context => GroupSteps::single(context, tensor),
            GroupKind::DenseReplicas => GroupSteps::single(data * context, tensor),
            GroupKind::Stage => GroupSteps::single(stage, 1),
            GroupKind::Sequence => GroupSteps::single(context * tensor, 1),
            GroupKind::Vocabulary => GroupSteps {
                outer: Steps {
                    count: pipeline,
                    stride: stage,
                },
                inner: Steps {
                    count: tensor,
                    stride: 1,
                },
            },
            GroupKind::Expert => GroupSteps::single(owners, 1),
            GroupKind::ExpertReplicas => GroupSteps::single(self.expert_replicas(), owners),
        }
    }

    /// Returns the number of ranks of a pipeline stage.
    fn ranks_per_stage(&self) -> usize {
        self.shape.data * self.shape.context * self.shape.tensor
    }
}

impl std::fmt::Display for Mesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let MeshShape {
            data,
            tensor,
            pipeline,
            context,
            expert,
            expert_tensor,
        } = self.shape;
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        let size = self.size();
        write!(f, "{size} rank{}: data {data}", plural(size))?;
        for (name, size) in [
            ("context", context),
            ("tensor", tensor),
            ("pipeline", pipeline),
        ] {
            if size > 1 {
                write!(f, " x {name} {size}")?;
            }
        }
        if expert * expert_tensor > 1 {
            write!(f, "; experts over {expert} ranks")?;
            if expert_tensor > 1 {
                write!(f, " x tensor {expert_tensor}")?;
            }
            let replicas = self.expert_replicas();
            write!(f, " x {replicas} replica{}", plural(replicas))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shapes() -> impl Strategy<Value = MeshShape> {
        (
            1usize..5,
            1usize..4,
            1usize..4,
            1usize..4,
            any::<prop::sample::Index>(),
        )
            .prop_map(|(data, tensor, pipeline, context, pick)| {
                let stage = data * tensor * context;
                let pairs =
                    (1..=stage).flat_map(|expert| (1..=stage).map(move |slices| (expert, slices)));
                let fits =
                    |&(expert, slices): &(usize, usize)| stage.is_multiple_of(expert * slices);
                let fitting: Vec<_> = pairs.filter(fits).collect();
                let (expert, expert_tensor) = fitting[pick.index(fitting.len())];
                MeshShape {
                    data,
                    tensor,
                    pipeline,
                    context,
                    expert,
                    expert_tensor,
                }
            })
    }

    fn ranks(shape: MeshShape) -> usize {
        shape.data * shape.tensor * shape.pipeline * shape.context
    }

    fn expected_size(shape: MeshShape, group: GroupKind) -> usize {
        let stage = shape.data * shape.tensor * shape.context;
        match group {
            GroupKind::World => ranks(shape),
            GroupKind::Data => shape.data,
            GroupKind::Tensor => shape.tensor,
            GroupKind::Pipeline => shape.pipeline,
            GroupKind::Context => shape.context,
            GroupKind::DenseReplicas => shape.data * shape.context,
            GroupKind::Stage => stage,
            GroupKind::Sequence => shape.context * shape.tensor,
            GroupKind::Vocabulary => shape.pipeline * shape.tensor,
            GroupKind::Expert => shape.expert * shape.expert_tensor,
            GroupKind::ExpertReplicas => stage / (shape.expert * shape.expert_tensor),
        }
    }

    /// Returns a key that is the same for all members of a group.
    fn key(at: Coordinates, kind: GroupKind) -> [usize; 3] {
        match kind {
            GroupKind::World => [0, 0, 0],
            GroupKind::Data => [at.pipeline, at.context, at.tensor],
            GroupKind::Tensor => [at.pipeline, at.data, at.context],
            GroupKind::Pipeline => [at.data, at.context, at.tensor],
            GroupKind::Context => [at.pipeline, at.data, at.tensor],
            GroupKind::DenseReplicas => [at.pipeline, at.tensor, 0],
            GroupKind::Stage => [at.pipeline, 0, 0],
            GroupKind::Sequence => [at.pipeline, at.data, 0],
            GroupKind::Vocabulary => [at.data, at.context, 0],
            GroupKind::Expert => [at.pipeline, at.expert_replica, 0],
            GroupKind::ExpertReplicas => [at.pipeline, at.expert, at.expert_tensor],
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// A scan of all ranks finds the members of a group by the coordinates they share.
        #[test]
        fn groups_by_stride_are_those_of_a_scan(shape in shapes(), stages in 0usize..16) {
            let ranks = ranks(shape);
            let stages: Vec<usize> = (0..4)
                .rev()
                .filter(|bit| stages >> bit & 1 == 1)
                .collect();
            for rank in 0..ranks {
                let mesh = Mesh::new(shape, rank, ranks).unwrap();
                let own = mesh.coordinates();
                for kind in GroupKind::ALL {
                    let is_member =
                        |other: &usize| key(mesh.coordinates_of(*other), kind) == key(own, kind);
                    let scanned: Vec<usize> = (0..ranks)
                        .filter(is_member)
                        .collect();
                    prop_assert_eq!(mesh.group(kind), scanned);
                }
                let is_replica = |other: &usize| {
                    let at = mesh.coordinates_of(*other);
                    at.tensor == own.tensor && stages.contains(&at.pipeline)
                };
                let scanned: Vec<usize> = (0..ranks)
                    .filter(is_replica)
                    .collect();
                prop_assert_eq!(mesh.dense_replicas_in_stages(&stages), scanned);
            }
        }

        #[test]
        fn every_kind_of_group_divides_the_ranks_evenly(shape in shapes()) {
            let ranks = ranks(shape);
            for group in GroupKind::ALL {
                for rank in 0..ranks {
                    let members = Mesh::new(shape, rank, ranks)
                        .unwrap()
                        .group(group);
                    let position = Mesh::new(shape, rank, ranks)
                        .unwrap()
                        .position(group);
                    prop_assert_eq!(members.get(position), Some(&rank));
                    prop_assert_eq!(members.len(), expected_size(shape, group));
                    for &member in &members {
                        let its_group = Mesh::new(shape, member, ranks)
                            .unwrap()
                            .group(group);
                        prop_assert_eq!(&its_group, &members);
                    }
                }
            }
        }

        #[test]
        fn coordinates_identify_a_rank(shape in shapes()) {
            let mesh = Mesh::new(shape, 0, ranks(shape)).unwrap();
            let mut seen = std::collections::HashSet::new();
            for rank in 0..mesh.size() {
                let at = mesh.coordinates_of(rank);
                prop_assert!(seen.insert((at.data, at.context, at.tensor, at.pipeline)));
                prop_assert!(at.expert < shape.expert);
                prop_assert!(at.expert_replica < mesh.expert_replicas());
            }
        }

        #[test]
        fn an_expert_group_and_a_replica_group_share_one_rank(shape in shapes()) {
            let ranks = ranks(shape);
            for rank in 0..ranks {
                let mesh = Mesh::new(shape, rank, ranks).unwrap();
                let replicas = mesh.group(GroupKind::ExpertReplicas);
                let mut common = mesh.group(GroupKind::Expert);
                common.retain(|member| replicas.contains(member));
                prop_assert_eq!(common, vec![rank]);
            }
        }
    }

    #[test]
    fn an_expert_group_is_split_by_node() {
        let shape = MeshShape {
            data: 8,
            tensor: 1,
            pipeline: 1,
            context: 1,
            expert: 8,
            expert_tensor: 1,
        };
        let mesh = Mesh::new(shape, 5, 8).unwrap();
        assert_eq!(mesh.nodes(GroupKind::Expert, 4), [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(
            mesh.split_by_node(GroupKind::Expert, 4),
            Some(NodeSplit {
                intra_node: vec![4, 5, 6, 7],
                inter_node: vec![1, 5],
            })
        );
        assert_eq!(
            mesh.split_by_node(GroupKind::Expert, 8),
            Some(NodeSplit {
                intra_node: (0..8).collect(),
                inter_node: vec![5],
            })
        );
        assert_eq!(
            mesh.split_by_node(GroupKind::Expert, 3),
            None,
            "3, 3 and 2 ranks"
        );
        let split = Mesh::new(
            MeshShape {
                expert: 4,
                expert_tensor: 2,
                ..shape
            },
            0,
            8,
        )
        .unwrap();
        assert_eq!(
            split.split_by_node(GroupKind::Expert, 1),
            None,
            "half an owner"
        );
    }

    #[test]
    fn four_ranks_with_two_expert_slices() {
        let shape = MeshShape {
            data: 4,
            tensor: 1,
            pipeline: 1,
            context: 1,
            expert: 2,
            expert_tensor: 1,
        };
        let mesh = Mesh::new(shape, 2, 4).unwrap();
        assert_eq!(mesh.group(GroupKind::Expert), [2, 3]);
        assert_eq!(mesh.group(GroupKind::ExpertReplicas), [0, 2]);
        assert_eq!(mesh.group(GroupKind::DenseReplicas), [0, 1, 2, 3]);
        assert_eq!(
            mesh.to_string(),
            "4 ranks: data 4; experts over 2 ranks x 2 replicas"
        );
    }

    #[test]
    fn shapes_that_do_not_fit_show_the_arithmetic() {
        let shape = MeshShape {
            data: 2,
            tensor: 1,
            pipeline: 1,
            context: 1,
            expert: 1,
            expert_tensor: 1,
        };
        let error = Mesh::new(shape, 0, 3).unwrap_err().to_string();
        assert_eq!(
            error,
            "data 2 x context 1 x tensor 1 x pipeline 1 = 2 ranks, but 3 were started"
        );
        let error = Mesh::new(MeshShape { expert: 3, ..shape }, 0, 2)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("expert 3 x expert_tensor 1 does not divide the 2 ranks"),
            "{error}"
        );
        let error = Mesh::new(MeshShape { data: 0, ..shape }, 0, 2)
            .unwrap_err()
            .to_string();
        assert!(error.contains("data axis has size 0"), "{error}");
    }
}
