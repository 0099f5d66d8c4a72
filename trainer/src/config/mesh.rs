//! The mesh that a layout gives on a number of ranks.

use super::{Config, layout::ParallelConfig, words::AxisSize};
use parallel::{Mesh, MeshShape};

impl Config {
    /// Returns the microbatches of a rank in a step of `sequences` sequences.
    pub fn microbatches(&self, mesh: &Mesh, sequences: usize) -> usize {
        let replicas = mesh.shape().data;
        sequences / (self.train.micro_batch * replicas)
    }

    /// Returns the mesh of `ranks` ranks as `rank` sees it.
    ///
    /// # Errors
    /// If the axes do not fit the ranks. The message names the keys and shows the arithmetic.
    pub fn mesh(&self, rank: usize, ranks: usize) -> Result<Mesh, String> {
        let ParallelConfig {
            tensor,
            context,
            expert,
            expert_tensor,
            pipeline,
            ..
        } = self.parallel;
        let shape = MeshShape {
            data: self.data_ranks(ranks)?,
            tensor,
            pipeline,
            context,
            expert,
            expert_tensor,
        };
        Mesh::new(shape, rank, ranks).map_err(|error| {
            let fitting = describe(&nearest_shape(&shape, ranks));
            format!(
                "parallel: {error}; nearest that fits: {fitting}, or start another number of \
                 ranks (--nproc-per-node)"
            )
        })
    }

    /// Returns the size of the data axis; `auto` uses the ranks that the other axes leave.
    fn data_ranks(&self, ranks: usize) -> Result<usize, String> {
        let ParallelConfig {
            data,
            tensor,
            context,
            pipeline,
            ..
        } = self.parallel;
        if let AxisSize::Size(size) = data {
            return Ok(size);
        }
        let others = tensor.saturating_mul(context).saturating_mul(pipeline);
        if others == 0 || ranks.is_multiple_of(others) {
            return Ok(ranks / others.max(1));
        }
        let fewer = ranks / others * others;
        let nearest = match fewer {
            0 => format!("{others} ranks"),
            _ => format!("{fewer} or {} ranks", fewer + others),
        };
        Err(format!(
            "parallel: {ranks} ranks are not a multiple of tensor {tensor} x context {context} \
             x pipeline {pipeline} = {others}; use {nearest}, or change one of these keys"
        ))
    }
}

/// Returns the layout that is most like `wanted` and fits `ranks` ranks.
fn nearest_shape(wanted: &MeshShape, ranks: usize) -> MeshShape {
    let mut nearest = *wanted;
    let mut least = f64::INFINITY;
    for shape in shapes(ranks) {
        let distance = distance(&shape, wanted);
        if distance < least {
            least = distance;
            nearest = shape;
        }
    }
    nearest
}

/// Returns all layouts that fit `ranks` ranks.
fn shapes(ranks: usize) -> Vec<MeshShape> {
    let mut shapes = Vec::new();
    for pipeline in divisors(ranks) {
        for tensor in divisors(ranks / pipeline) {
            for context in divisors(ranks / pipeline / tensor) {
                let data = ranks / pipeline / tensor / context;
                let expert_ranks = data * tensor * context;
                for expert in divisors(expert_ranks) {
                    for expert_tensor in divisors(expert_ranks / expert) {
                        shapes.push(MeshShape {
                            data,
                            tensor,
                            pipeline,
                            context,
                            expert,
                            expert_tensor,
                        });
                    }
                }
            }
        }
    }
    shapes
}

/// Returns the divisors of a number, ascending.
fn divisors(number: usize) -> Vec<usize> {
    let small = (1..=number.isqrt()).filter(|divisor| number.is_multiple_of(*divisor));
    let mut divisors: Vec<usize> = small.collect();
    let large: Vec<usize> = divisors.iter().map(|divisor| number / divisor).collect();
    divisors.extend(large.into_iter().rev());
    divisors.dedup();
    divisors
}

/// Returns how far two layouts are apart, by the ratios of their axes.
fn distance(one: &MeshShape, other: &MeshShape) -> f64 {
    let axis = |a: usize, b: usize| (a.max(1) as f64 / b.max(1) as f64).ln().abs();
    // A change of the data axis matters least to users.
    0.5 * axis(one.data, other.data)
        + axis(one.tensor, other.tensor)
        + axis(one.context, other.context)
        + axis(one.pipeline, other.pipeline)
        + axis(one.expert, other.expert)
        + axis(one.expert_tensor, other.expert_tensor)
}

/// Returns a layout as the section `parallel` takes it.
fn describe(shape: &MeshShape) -> String {
    let MeshShape {
        data,
        tensor,
        pipeline,
        context,
        expert,
        expert_tensor,
    } = shape;
    format!(
        "{{data: {data}, tensor: {tensor}, context: {context}, pipeline: {pipeline}, \
         expert: {expert}, expert_tensor: {expert_tensor}}}"
    )
}
