//! `moerun model upcycle`: makes an MoE model of a dense one.

use super::{dtype, report};
use crate::{
    cli::{ModelUpcycleArgs, UpcycleKind},
    progress,
};
use anyhow::Result;
use std::process::ExitCode;
use trainer::{UpcycleMethod, UpcycleOptions, upcycle};

pub(crate) fn run(args: ModelUpcycleArgs) -> Result<ExitCode> {
    let options = UpcycleOptions {
        dense: args.dense,
        output: args.output,
        experts: args.experts,
        top_k: args.top_k,
        granularity: args.granularity,
        method: match args.method {
            UpcycleKind::Naive => UpcycleMethod::Naive,
            UpcycleKind::VirtualGroups => UpcycleMethod::VirtualGroups,
            UpcycleKind::Drop => UpcycleMethod::Drop(args.drop_share),
        },
        seed: args.seed,
        dtype: args.dtype.map(dtype),
    };
    let bar = progress::Transfer::new("writing");
    let made = upcycle(&options, &|done, total| bar.show(done, total));
    bar.clear();
    report(&options.output, made?);
    Ok(ExitCode::SUCCESS)
}
