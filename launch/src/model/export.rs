//! `moerun model export`: writes a trained model as a folder.

use super::{dtype, report};
use crate::{cli::ModelExportArgs, progress};
use anyhow::Result;
use std::process::ExitCode;
use trainer::{ExportOptions, export};

pub(crate) fn run(args: ModelExportArgs) -> Result<ExitCode> {
    let options = ExportOptions {
        checkpoint: args.checkpoint,
        output: args.output,
        dtype: args.dtype.map(dtype),
        source: args.source,
        shard_bytes: args.max_shard_gb.map(|size| (size * 1e9) as u64),
    };
    let bar = progress::Transfer::new("writing");
    let exported = export(&options, &|done, total| bar.show(done, total));
    bar.clear();
    report(&options.output, exported?);
    Ok(ExitCode::SUCCESS)
}
