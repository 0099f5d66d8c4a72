//! Biases: vectors that are added to the outputs of matrices.

use super::spec::{Dim, ParamSpec, Role, Split, Stack};
use parallel::Weight;
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// Returns the description of a bias over `dim`, of which `split` gives the division.
pub(crate) fn bias_spec(block: &str, part: &'static str, dim: Dim, split: Split) -> ParamSpec {
    ParamSpec {
        block: block.to_string(),
        part,
        dims: vec![dim],
        stack: Stack::Single,
        split,
        role: Role::Bias,
        writes_residual: false,
    }
}

/// Returns `x` `[N, F]` plus `bias` `[F]` in each row.
///
/// # Errors
/// libtorch's message.
pub(crate) fn add_bias(x: &Tensor, bias: &Weight) -> Result<Tensor, Error> {
    let value = tch::no_grad(|| x.detach() + bias.value());
    let used = bias.clone();
    let mut out = attach_backward(&[x, &bias.tracker()], vec![value], move |grads| {
        let Some(grad) = &grads[0] else {
            return Ok(vec![None, None]);
        };
        let summed = grad.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        used.add_gradient(move |sum| {
            let _ = sum.tensor().view_as(&summed).g_add_(&summed);
            Ok(())
        })?;
        Ok(vec![Some(grad.shallow_clone()), None])
    })?;
    Ok(out.remove(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Accelerator, Cpu, GradientBuckets, Replication};

    #[test]
    fn the_gradient_of_a_bias_is_the_sum_over_rows() {
        let bias = Weight::new(Tensor::from_slice(&[1f32, 2.0, 3.0]));
        let buckets = [(bias.clone(), 0)];
        let alone = [Replication::alone()];
        let gradients = GradientBuckets::new(&buckets, &alone, 1 << 20, true, &Cpu).unwrap();
        gradients.begin(1);
        let x = Cpu.zeros(&[2, 3], Kind::Float).set_requires_grad(true);
        let out = add_bias(&x, &bias).unwrap();
        let expected = Tensor::from_slice(&[1f32, 2.0, 3.0]).repeat([2, 1]);
        assert_eq!(out.detach(), expected);
        let probe = Tensor::from_slice(&[1f32, 10.0, 100.0, 2.0, 20.0, 200.0]).view([2, 3]);
        (&out * &probe).sum(Kind::Float).backward();
        gradients.finish().unwrap();
        assert_eq!(x.grad(), probe);
        let sums = Tensor::from_slice(&[3f32, 30.0, 300.0]);
        assert_eq!(gradients.gradient(0).view([3]), sums);
    }
}
