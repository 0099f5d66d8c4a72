//! The outcome of a conformance test.

use tch::{Device, Kind, Tensor};

/// A requirement and how this rank met it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The name of the requirement.
    pub name: &'static str,
    /// A description of the violation; `None` if the requirement is met.
    pub problem: Option<String>,
}

pub(super) type Verdict = Result<(), String>;

/// Converts any error to the text of a [`Verdict`].
pub(super) fn text(error: impl ToString) -> String {
    error.to_string()
}

/// Compares a tensor on any device with the expected numbers.
pub(super) fn expect(what: &str, tensor: &Tensor, expected: &[f64]) -> Verdict {
    let host = tensor.to_device(Device::Cpu).to_kind(Kind::Double);
    let got = Vec::<f64>::try_from(host.flatten(0, -1)).map_err(text)?;
    if got == expected {
        return Ok(());
    }
    let first = |values: &[f64]| format!("{:?}", &values[..values.len().min(8)]);
    let got = first(&got);
    let expected = first(expected);
    Err(format!("{what}: got {got}, expected {expected}"))
}
