//! State in bf16: updates compute in fp32, and their results are rounded.

use super::rule::{RowRule, RowUpdate, StepScalars};
use crate::Error;
use tch::{Kind, Tensor};

/// Elements whose state is in fp32 at once.
const CHUNK_ELEMENTS: i64 = 1 << 20;

/// Updates elements by a rule that computes in fp32.
///
/// # Errors
/// If libtorch refuses an operation.
pub(crate) fn update_rows(
    rule: &dyn RowRule,
    updates: &[RowUpdate],
    scalars: StepScalars,
) -> Result<(), Error> {
    if updates.iter().all(|update| update.rounding.is_none()) {
        return rule.update_rows(updates, scalars);
    }
    updates.iter().try_for_each(|update| {
        with_wide_state(update, |part| {
            rule.update_rows(std::slice::from_ref(part), scalars)
        })
    })
}

/// Calls `apply` with parts of `update` whose state is in fp32, and rounds the new state.
///
/// # Errors
/// The errors of `apply`.
pub(crate) fn with_wide_state(
    update: &RowUpdate,
    mut apply: impl FnMut(&RowUpdate) -> Result<(), Error>,
) -> Result<(), Error> {
    for part in chunks(update) {
        let Some(rounding) = &part.rounding else {
            apply(&part)?;
            continue;
        };
        let wide = part.state.iter().map(|state| state.to_kind(Kind::Float));
        let wide = RowUpdate {
            state: wide.collect(),
            rounding: None,
            master: part.master.shallow_clone(),
            gradient: part.gradient.shallow_clone(),
            stored: part.stored.as_ref().map(Tensor::shallow_clone),
        };
        apply(&wide)?;
        for (number, (rounded, wide)) in part.state.iter().zip(&wide.state).enumerate() {
            rounding.round(wide, rounded, number);
        }
    }
    Ok(())
}

/// Divides an update into parts of few elements.
pub(crate) fn chunks(update: &RowUpdate) -> impl Iterator<Item = RowUpdate> {
    let len = update.master.numel() as i64;
    let starts = (0..len).step_by(CHUNK_ELEMENTS as usize);
    starts.map(move |start| update.elements(&(start..(start + CHUNK_ELEMENTS).min(len))))
}
