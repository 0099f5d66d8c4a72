//! The `moerun` command: checks that the real program finds its libraries, then becomes it.
//!
//! The loader's own message would not say how to fix a missing library.

mod held_signals;

use std::{
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode},
};

/// The signal that makes UCX, a library of Open MPI, log everything. Its default is SIGHUP, which
/// stops moerun in order.
const UCX_SIGNAL: &str = "UCX_DEBUG_SIGNO";

fn main() -> ExitCode {
    // `moerun-core` handles them. Best effort: a signal during the start may kill the process.
    let _ = held_signals::hold();
    let own = match std::env::current_exe() {
        Ok(own) => own,
        Err(error) => {
            eprintln!("error: cannot find this program's file: {error}");
            return ExitCode::FAILURE;
        }
    };
    let program = own.with_file_name("moerun-core");
    if !program.exists() {
        eprintln!(
            "error: {} is missing\n\
             hint: keep it in the same folder as moerun, where cargo builds both",
            program.display()
        );
        return ExitCode::FAILURE;
    }
    let missing = missing_libraries(&program);
    if !missing.is_empty() {
        for library in &missing {
            let fix = fix(library);
            eprintln!("fail {library} cannot be found\n     fix: {fix}");
        }
        eprintln!("error: moerun cannot start without {}", missing.join(", "));
        return ExitCode::FAILURE;
    }
    let mut core = Command::new(&program);
    if std::env::var_os(UCX_SIGNAL).is_none() {
        core.env(UCX_SIGNAL, "0");
    }
    let error = core
        .arg0("moerun")
        .args(std::env::args_os().skip(1))
        .env(
            held_signals::IGNORED,
            held_signals::ignored_mask().to_string(),
        )
        .exec();
    eprintln!("error: cannot start {}: {error}", program.display());
    ExitCode::FAILURE
}

/// Returns the libraries that the loader does not find, or nothing if it cannot be asked.
///
/// Takes two milliseconds.
fn missing_libraries(program: &Path) -> Vec<String> {
    let Ok(output) = Command::new(program)
        .env("LD_TRACE_LOADED_OBJECTS", "1")
        .output()
    else {
        return Vec::new();
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .filter_map(|line| Some(line.trim().strip_suffix(" => not found")?.to_string()))
        .collect()
}

fn fix(library: &str) -> &'static str {
    const TORCH: [&str; 5] = ["libtorch", "libc10", "libcudart", "libcupti", "libgomp"];
    if library.starts_with("libmpi") {
        "this moerun was built with --features mpi: run ./scripts/setup --mpi, or add the folder \
         of your MPI's libmpi to LD_LIBRARY_PATH, or build without the feature"
    } else if TORCH.iter().any(|name| library.starts_with(name)) {
        "run ./scripts/setup and build again, or add the lib folder of a libtorch 2.11.0 to \
         LD_LIBRARY_PATH"
    } else {
        "install the package that has it, or add its folder to LD_LIBRARY_PATH"
    }
}
