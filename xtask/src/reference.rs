//! The hidden command of moerun that writes the generated files.

use std::{path::Path, process::Command};

/// Returns the command that writes the reference pages and the schema.
///
/// It has MPI if `scripts/setup` brought it: the tests then need no second build.
pub(crate) fn reference(root: &Path) -> Command {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(root);
    cargo.args(["run", "--release", "--quiet", "--package", "launch"]);
    if std::env::var_os("MPICC").is_some() {
        cargo.args(["--features", "mpi"]);
    }
    cargo.args(["--bin", "moerun-core", "--", "reference"]);
    cargo
}
