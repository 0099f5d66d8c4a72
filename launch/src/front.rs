//! The `moerun` command: checks that the real program finds its libraries, then becomes it.
//!
//! The loader's own message would not say how to fix a missing library. Commands about data are in
//! a program of their own, `moerun-data`, which needs no libraries.

mod held_signals;

use std::{
    ffi::OsString,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode},
};

/// The signal that makes UCX, a library of Open MPI, log everything. Its default is SIGHUP, which
/// stops moerun in order.
const UCX_SIGNAL: &str = "UCX_DEBUG_SIGNO";

/// Tells `moerun-data` the version of this program, so that it notices another build.
const FRONT_VERSION: &str = "MOERUN_FRONT_VERSION";

fn main() -> ExitCode {
    let own = match std::env::current_exe() {
        Ok(own) => own,
        Err(error) => {
            eprintln!("error: cannot find this program's file: {error}");
            return ExitCode::FAILURE;
        }
    };
    let data_program = own.with_file_name("moerun-data");
    if is_about_data() && data_program.exists() {
        let mut data = Command::new(&data_program);
        data.env(FRONT_VERSION, env!("CARGO_PKG_VERSION"));
        return become_program(data.arg0("moerun").args(std::env::args_os().skip(1)));
    }
    // `moerun-core` handles them. Best effort: a signal during the start may kill the process.
    let _ = held_signals::hold();
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
    core.arg0("moerun").args(std::env::args_os().skip(1)).env(
        held_signals::IGNORED,
        held_signals::ignored_mask().to_string(),
    );
    become_program(&mut core)
}

/// True for the commands that `moerun-data` has, which need no libtorch.
fn is_about_data() -> bool {
    let arguments = std::env::args_os().skip(1);
    let arguments = arguments
        .enumerate()
        .filter(|(at, word)| *at > 0 || word != "help");
    let arguments: Vec<OsString> = arguments.map(|(_, word)| word).take(2).collect();
    let is = |index: usize, name: &str| arguments.get(index).is_some_and(|word| word == name);
    is(0, "data") || (is(0, "bench") && is(1, "data"))
}

/// Returns only if the program cannot be started.
fn become_program(command: &mut Command) -> ExitCode {
    let error = command.exec();
    let program = command.get_program().display();
    eprintln!("error: cannot start {program}: {error}");
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
