//! `moerun model`: models of Hugging Face transformers.

pub(crate) mod export;
pub(crate) mod import;
pub(crate) mod inspect;
pub(crate) mod upcycle;

use crate::{cli::WeightDtype, hint::printable};
use std::path::Path;
use trainer::{ExportReport, config::Dtype};

/// Returns the dtype that a command names.
pub(crate) fn dtype(dtype: WeightDtype) -> Dtype {
    match dtype {
        WeightDtype::Fp32 => Dtype::Fp32,
        WeightDtype::Bf16 => Dtype::Bf16,
    }
}

/// Prints what was written to a folder.
fn report(folder: &Path, report: ExportReport) {
    let ExportReport {
        family,
        step,
        files,
        tensors,
        bytes,
        carried,
        notes,
    } = report;
    for note in notes {
        eprintln!("note: {}", printable(&note));
    }
    let plural = if files == 1 { "" } else { "s" };
    let step = step.map_or_else(String::new, |step| format!(" of step {step}"));
    println!(
        "{}: a {family} model{step}: {tensors} tensors, {:.1} MB in {files} file{plural}",
        folder.display(),
        bytes as f64 / 1e6,
    );
    if carried > 0 {
        println!("{carried} tensors are those of the folder that the model came from");
    }
}
