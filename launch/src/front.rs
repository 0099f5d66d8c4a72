//! `moerun` as it is started: looks whether the program proper finds its libraries, and becomes it. The loader's own message
//! would not say what to do.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let own = match std::env::current_exe() {
        Ok(own) => own,
        Err(error) => {
            eprintln!("error: cannot find this program's own file: {error}");
            return ExitCode::FAILURE;
        }
    };
    let program = own.with_file_name("moerun-core");
    if !program.exists() {
        eprintln!(
            "error: {} is missing: moerun needs it beside itself, as cargo builds both",
            program.display()
        );
        return ExitCode::FAILURE;
    }
    let missing = missing_libraries(&program);
    if !missing.is_empty() {
        for library in &missing {
            eprintln!(
                "fail {library} cannot be found\n      fix: {}",
                fix(library)
            );
        }
        eprintln!("error: moerun cannot start without {}", missing.join(", "));
        return ExitCode::FAILURE;
    }
    let error = Command::new(&program)
        .arg0("moerun")
        .args(std::env::args_os().skip(1))
        .exec();
    eprintln!("error: cannot start {}: {error}", program.display());
    ExitCode::FAILURE
}

/// What the loader does not find; nothing where it cannot be asked. Takes two milliseconds.
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
    if library.starts_with("libmpi") {
        "this moerun was built with --features mpi: run ./scripts/setup --mpi, or add the folder of your MPI's libmpi to \
         LD_LIBRARY_PATH, or build without the feature"
    } else if ["libtorch", "libc10", "libcudart", "libcupti", "libgomp"]
        .iter()
        .any(|name| library.starts_with(name))
    {
        "run ./scripts/setup and build again, or add the lib folder of a libtorch 2.11.0 to LD_LIBRARY_PATH"
    } else {
        "install the package that has it, or add its folder to LD_LIBRARY_PATH"
    }
}
