//! What every [`Communicator`](crate::Communicator) and every [`Accelerator`](crate::Accelerator) has to do, as two suites: a new
//! backend passes its own, or the report says what it lacks.
//!
//! `moerun conformance` runs both where the hardware is; the tests run them for every backend that works without any.

mod accelerator;
mod communicator;

pub use accelerator::accelerator;
pub use communicator::communicator;

use tch::{Device, Kind, Tensor};

/// One requirement, and what was wrong with it on this rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The requirement.
    pub name: &'static str,
    /// What is wrong; nothing where it is met.
    pub problem: Option<String>,
}

type Verdict = Result<(), String>;

/// Compares a tensor on any device with numbers.
fn expect(what: &str, tensor: &Tensor, expected: &[f64]) -> Verdict {
    let host = tensor
        .to_device(Device::Cpu)
        .to_kind(Kind::Double)
        .flatten(0, -1);
    let got = Vec::<f64>::try_from(host).map_err(|e| e.to_string())?;
    if got == expected {
        Ok(())
    } else {
        let short = |values: &[f64]| format!("{:?}", &values[..values.len().min(8)]);
        Err(format!(
            "{what}: got {} and not {}",
            short(&got),
            short(expected)
        ))
    }
}
