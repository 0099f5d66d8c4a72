//! Steps of torch's optimizers on single matrices. scripts/golden/optimizers.py writes them.

use super::rule::{RowUpdate, StepScalars};
use std::{collections::HashMap, path::Path};
use tch::{Kind, Tensor};

/// Shapes of the matrices.
pub(super) const SHAPES: [[i64; 2]; 3] = [[12, 20], [20, 12], [16, 16]];
pub(super) const LR: f64 = 0.02;
pub(super) const WEIGHT_DECAY: f64 = 0.1;

pub(super) struct GoldenFile(HashMap<String, Tensor>);

impl GoldenFile {
    pub(super) fn open() -> GoldenFile {
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let folder = std::env::var_os("MOERUN_TEST_GOLDEN").map_or(here, Into::into);
        let bytes = std::fs::read(folder.join("optimizers.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |(name, view): (String, safetensors::tensor::TensorView)| {
            let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            (
                name,
                Tensor::from_data_size(view.data(), &shape, Kind::Float),
            )
        };
        GoldenFile(file.tensors().into_iter().map(tensor).collect())
    }

    pub(super) fn tensor(&self, [rows, columns]: [i64; 2], name: &str) -> &Tensor {
        &self.0[&format!("{rows}x{columns}/{name}")]
    }

    /// Returns the weights after each step of `apply`, which has `states` tensors of state.
    pub(super) fn steps(
        &self,
        shape: [i64; 2],
        states: usize,
        apply: impl Fn(&RowUpdate, StepScalars),
    ) -> Tensor {
        let master = self.tensor(shape, "weight").copy();
        let state: Vec<Tensor> = (0..states).map(|_| master.zeros_like()).collect();
        let gradients = self.tensor(shape, "gradients").unbind(0);
        let after: Vec<Tensor> = (1..)
            .zip(gradients)
            .map(|(step, gradient)| {
                // Clipping divides by the scale, so that both sides see one gradient.
                let update = RowUpdate {
                    master: master.shallow_clone(),
                    gradient: gradient * 2.0,
                    state: state.iter().map(Tensor::shallow_clone).collect(),
                    stored: None,
                    rounding: None,
                };
                let scalars = StepScalars {
                    step,
                    lr: LR,
                    decays: true,
                    scale: Some(2.0),
                };
                apply(&update, scalars);
                master.copy()
            })
            .collect();
        Tensor::stack(&after, 0)
    }
}

/// Returns the largest norm of a step's difference over the norm of the change since the first
/// step.
pub(super) fn largest_difference(ours: &Tensor, theirs: &Tensor, begun: &Tensor) -> f64 {
    let norms = |x: Tensor| {
        x.flatten(1, 2)
            .square()
            .sum_dim_intlist(&[1i64][..], false, None)
    };
    let ratios = norms(ours - theirs) / norms(theirs - begun);
    ratios.max().double_value(&[]).sqrt()
}
