//! The ranks that hold the same values of a parameter.

/// The ranks that hold the same values of a parameter, and reduce its gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Replicas {
    /// Ranks with the same part of the dense layers.
    Dense,
    /// All ranks of the stage, for parameters that tensor parallelism does not split.
    Stage,
    /// Ranks with the same part of the experts.
    Expert,
    /// Ranks of the first and the last stage, for an embedding that is also the output layer.
    TiedEmbedding,
}

impl Replicas {
    /// All kinds, in the order of their discriminants.
    pub const ALL: [Replicas; 4] = [
        Replicas::Dense,
        Replicas::Stage,
        Replicas::Expert,
        Replicas::TiedEmbedding,
    ];
}
