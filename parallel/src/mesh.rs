//! Who sits where: the only place that turns a rank into coordinates and groups.
//!
//! Ranks are numbered with the tensor axis fastest, then context, data and pipeline, so that ranks which talk most
//! are neighbours. The expert axes are folded over the dense ones: inside one pipeline stage the `data x context x
//! tensor` ranks, in order, form rows of `expert x expert_tensor` consecutive ranks, `expert_tensor` fastest. The ranks of
//! a row hold a layer's experts once; the ranks of a column hold the same part of them.

/// Sizes of the axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshShape {
    /// Replicas of the dense layers, each with its own share of the batch.
    pub data: usize,
    /// Ranks that split every matrix.
    pub tensor: usize,
    /// Stages that layers are spread over.
    pub pipeline: usize,
    /// Ranks that split every sequence.
    pub context: usize,
    /// Ranks that split the experts of a layer.
    pub expert: usize,
    /// Ranks that split every expert's matrices; `expert * expert_tensor` divides `data * context * tensor`.
    pub expert_tensor: usize,
}

/// The axes do not fit together or do not fill the ranks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MeshError {
    /// An axis of size zero.
    #[error("the {axis} axis has size 0; the smallest is 1")]
    EmptyAxis {
        /// Its name.
        axis: &'static str,
    },
    /// The product of the axes is not the number of ranks.
    #[error(
        "data {data} x context {context} x tensor {tensor} x pipeline {pipeline} = {product} ranks, but {ranks} were started"
    )]
    WrongProduct {
        /// Size of the data axis.
        data: usize,
        /// Size of the context axis.
        context: usize,
        /// Size of the tensor axis.
        tensor: usize,
        /// Size of the pipeline axis.
        pipeline: usize,
        /// Their product.
        product: usize,
        /// Ranks there are.
        ranks: usize,
    },
    /// The expert axes do not divide a stage.
    #[error(
        "expert {expert} x expert_tensor {expert_tensor} does not divide the {stage} ranks of a pipeline stage (data {data} x \
         context {context} x tensor {tensor})"
    )]
    ExpertDoesNotDivide {
        /// Size of the expert axis.
        expert: usize,
        /// Size of the expert tensor axis.
        expert_tensor: usize,
        /// Size of the data axis.
        data: usize,
        /// Size of the context axis.
        context: usize,
        /// Size of the tensor axis.
        tensor: usize,
        /// Their product.
        stage: usize,
    },
}

/// Where a rank sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coordinates {
    /// On the data axis.
    pub data: usize,
    /// On the tensor axis.
    pub tensor: usize,
    /// On the pipeline axis.
    pub pipeline: usize,
    /// On the context axis.
    pub context: usize,
    /// On the expert axis: which of the experts it holds.
    pub expert: usize,
    /// On the expert tensor axis: which slice of each it holds.
    pub expert_tensor: usize,
    /// Which replica of those slices it is.
    pub expert_replica: usize,
}

/// A kind of group that the ranks fall into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// All ranks.
    World,
    /// Same stage, context and tensor coordinate: different data.
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
    /// The ranks that share out a vocabulary: pipeline x tensor.
    Vocabulary,
    /// The ranks that share out one layer's experts: expert x expert_tensor.
    Expert,
    /// The ranks that hold the same slices of the same experts.
    ExpertReplicas,
}

impl GroupKind {
    /// Every kind of group.
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

/// One rank's view of all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mesh {
    shape: MeshShape,
    rank: usize,
}

impl Mesh {
    /// The mesh of `ranks` ranks as `rank` sees it.
    ///
    /// # Errors
    /// When the axes do not multiply to the number of ranks, or the expert axis does not fold into a stage.
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
        let stage = data * context * tensor;
        if stage * pipeline != ranks {
            let product = stage * pipeline;
            return Err(MeshError::WrongProduct {
                data,
                context,
                tensor,
                pipeline,
                product,
                ranks,
            });
        }
        if !stage.is_multiple_of(expert * expert_tensor) {
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

    /// Sizes of the axes.
    pub fn shape(&self) -> MeshShape {
        self.shape
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.stage() * self.shape.pipeline
    }

    /// How many ranks hold the same experts.
    pub fn expert_replicas(&self) -> usize {
        self.stage() / (self.shape.expert * self.shape.expert_tensor)
    }

    /// Where this rank sits.
    pub fn coordinates(&self) -> Coordinates {
        self.coordinates_of(self.rank)
    }

    /// Where `rank` sits.
    pub fn coordinates_of(&self, rank: usize) -> Coordinates {
        let MeshShape {
            tensor,
            context,
            expert,
            expert_tensor,
            ..
        } = self.shape;
        let pipeline = rank / self.stage();
        let in_stage = rank % self.stage();
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

    /// The ranks, in order, of this rank's group of the given kind.
    pub fn group(&self, group: GroupKind) -> Vec<usize> {
        let own = self.key(self.rank, group);
        (0..self.size())
            .filter(|&rank| self.key(rank, group) == own)
            .collect()
    }

    /// The replicas of this rank's dense layers, and the ranks that sit like them in the pipeline stages `stages`.
    pub fn dense_replicas_in_stages(&self, stages: &[usize]) -> Vec<usize> {
        let tensor = self.coordinates().tensor;
        let member = |&rank: &usize| {
            let at = self.coordinates_of(rank);
            at.tensor == tensor && stages.contains(&at.pipeline)
        };
        (0..self.size()).filter(member).collect()
    }

    /// The node of each rank of the group `group`, where every node has `per_node` ranks.
    pub fn nodes(&self, group: GroupKind, per_node: usize) -> Vec<usize> {
        self.group(group)
            .into_iter()
            .map(|rank| rank / per_node)
            .collect()
    }

    /// Of the group `group` the ranks on this rank's node, and those with this rank's number among them on the other
    /// nodes; None where not every node has as many of the group, or whole owners of experts.
    pub fn split_by_node(
        &self,
        group: GroupKind,
        per_node: usize,
    ) -> Option<(Vec<usize>, Vec<usize>)> {
        let members = self.group(group);
        let on = |node: usize| {
            members
                .iter()
                .copied()
                .filter(move |rank| rank / per_node == node)
        };
        let inside: Vec<usize> = on(self.rank / per_node).collect();
        let place = inside.iter().position(|&rank| rank == self.rank)?;
        let mut nodes = self.nodes(group, per_node);
        nodes.dedup();
        let even = nodes.iter().all(|&node| on(node).count() == inside.len());
        let whole = inside.len().is_multiple_of(self.shape.expert_tensor);
        (even && whole).then(|| {
            (
                inside.clone(),
                members
                    .iter()
                    .copied()
                    .skip(place)
                    .step_by(inside.len())
                    .collect(),
            )
        })
    }

    /// What the ranks of one group have in common.
    fn key(&self, rank: usize, group: GroupKind) -> [usize; 3] {
        let at = self.coordinates_of(rank);
        match group {
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

    fn stage(&self) -> usize {
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
        write!(
            f,
            "{} rank{}: data {data}",
            self.size(),
            if self.size() == 1 { "" } else { "s" }
        )?;
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
            let slices = if expert_tensor > 1 {
                format!(" x tensor {expert_tensor}")
            } else {
                String::new()
            };
            write!(
                f,
                "; experts over {expert} ranks{slices} x {} replica{}",
                self.expert_replicas(),
                if self.expert_replicas() == 1 { "" } else { "s" }
            )?;
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
                let folds = |expert: usize, slices: usize| stage.is_multiple_of(expert * slices);
                let all =
                    (1..=stage).flat_map(|expert| (1..=stage).map(move |slices| (expert, slices)));
                let folding: Vec<_> = all
                    .filter(|&(expert, slices)| folds(expert, slices))
                    .collect();
                let (expert, expert_tensor) = folding[pick.index(folding.len())];
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn every_kind_of_group_divides_the_ranks_evenly(shape in shapes()) {
            let ranks = ranks(shape);
            for group in GroupKind::ALL {
                for rank in 0..ranks {
                    let members = Mesh::new(shape, rank, ranks).unwrap().group(group);
                    prop_assert!(members.contains(&rank));
                    prop_assert_eq!(members.len(), expected_size(shape, group));
                    // All members see the same group, in the same order.
                    for &member in &members {
                        prop_assert_eq!(&Mesh::new(shape, member, ranks).unwrap().group(group), &members);
                    }
                }
            }
        }

        #[test]
        fn coordinates_name_a_rank(shape in shapes()) {
            let mesh = Mesh::new(shape, 0, ranks(shape)).unwrap();
            let mut seen = std::collections::HashSet::new();
            for rank in 0..mesh.size() {
                let at = mesh.coordinates_of(rank);
                prop_assert!(seen.insert((at.data, at.context, at.tensor, at.pipeline)));
                prop_assert!(at.expert < shape.expert && at.expert_replica < mesh.expert_replicas());
            }
        }

        #[test]
        fn an_expert_group_and_a_replica_group_share_one_rank(shape in shapes()) {
            let ranks = ranks(shape);
            for rank in 0..ranks {
                let mesh = Mesh::new(shape, rank, ranks).unwrap();
                let replicas = mesh.group(GroupKind::ExpertReplicas);
                let common: Vec<_> = mesh.group(GroupKind::Expert).into_iter().filter(|r| replicas.contains(r)).collect();
                prop_assert_eq!(common, vec![rank]);
            }
        }
    }

    #[test]
    fn an_expert_group_by_node() {
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
            Some((vec![4, 5, 6, 7], vec![1, 5]))
        );
        assert_eq!(
            mesh.split_by_node(GroupKind::Expert, 8),
            Some(((0..8).collect(), vec![5]))
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
