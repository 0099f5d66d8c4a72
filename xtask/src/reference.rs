//! The hidden command of moerun that writes the generated files.

use crate::{cargo, tree::Tree};
use anyhow::Result;
use std::{path::PathBuf, process::Command};

/// Builds moerun and returns its command that writes the reference pages and the schema.
///
/// The build is that of `scripts/test`: all packages decide on the features of dependencies, and
/// MPI is included if `scripts/setup` has installed it. So nothing is built twice.
pub(crate) fn reference(tree: &Tree) -> Result<Command> {
    let mut build = cargo::command(tree, &["build", "--release", "--quiet", "--workspace"]);
    if std::env::var_os("MPICC").is_some() {
        build.args(["--features", "mpi"]);
    }
    cargo::run(build.args(["--bin", "moerun-core"]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or_else(|| tree.root.join("target"), PathBuf::from);
    let mut command = Command::new(target.join("release/moerun-core"));
    command.current_dir(&tree.root).arg("reference");
    Ok(command)
}
