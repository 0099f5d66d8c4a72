//! `moerun model import`: writes the weights of a folder as a checkpoint.

use crate::{cli::ModelImportArgs, progress};
use anyhow::Result;
use std::process::ExitCode;
use trainer::{ImportReport, import};

pub(crate) fn run(args: &ModelImportArgs) -> Result<ExitCode> {
    let bar = progress::Transfer::new("converting");
    let imported = import(&args.folder, &args.output, &|done, total| {
        bar.show(done, total);
    });
    bar.clear();
    let ImportReport {
        path,
        tensors,
        bytes,
    } = imported?;
    println!(
        "{}: {tensors} tensors, {:.1} MB in fp32",
        path.display(),
        bytes as f64 / 1e6
    );
    println!(
        "an export of this checkpoint takes tokenizer and other files from {0}; for a later \
         checkpoint of the run, name that folder with --source",
        args.folder.display()
    );
    Ok(ExitCode::SUCCESS)
}
