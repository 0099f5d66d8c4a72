//! `moerun model export`: writes a trained model as a folder.

use crate::{
    cli::{ModelExportArgs, WeightDtype},
    hint::printable,
    progress,
};
use anyhow::Result;
use std::process::ExitCode;
use trainer::{ExportOptions, ExportReport, config::Dtype, export};

pub(crate) fn run(args: ModelExportArgs) -> Result<ExitCode> {
    let options = ExportOptions {
        checkpoint: args.checkpoint,
        output: args.output,
        dtype: args.dtype.map(|dtype| match dtype {
            WeightDtype::Fp32 => Dtype::Fp32,
            WeightDtype::Bf16 => Dtype::Bf16,
        }),
        source: args.source,
        shard_bytes: (args.max_shard_gb * 1e9) as u64,
    };
    let bar = progress::Transfer::new("writing");
    let exported = export(&options, &|done, total| bar.show(done, total));
    bar.clear();
    let ExportReport {
        family,
        step,
        files,
        tensors,
        bytes,
        carried,
        notes,
    } = exported?;
    for note in notes {
        eprintln!("note: {}", printable(&note));
    }
    let plural = if files == 1 { "" } else { "s" };
    println!(
        "{}: a {family} model of step {step}: {tensors} tensors, {:.1} MB in {files} file{plural}",
        options.output.display(),
        bytes as f64 / 1e6,
    );
    if carried > 0 {
        println!("{carried} tensors are those of the folder that the model came from");
    }
    Ok(ExitCode::SUCCESS)
}
