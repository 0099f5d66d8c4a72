//! `scripts/setup` refuses downloads that differ from their stored hashes.

use crate::fixture::{finish, text};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Returns a copy of the project's `scripts`, which writes nothing into the project.
fn copy_scripts(folder: &Path) -> PathBuf {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let scripts = folder.join("scripts");
    std::fs::create_dir(&scripts).unwrap();
    for name in ["setup", "wheels.sha256"] {
        std::fs::copy(project.join("scripts").join(name), scripts.join(name)).unwrap();
    }
    scripts
}

#[test]
fn a_wheel_in_the_cache_that_was_changed_is_refused_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let scripts = copy_scripts(folder.path());
    let list = std::fs::read_to_string(scripts.join("wheels.sha256")).unwrap();
    let wheel = list.lines().find(|line| line.contains("  pip-")).unwrap();
    let (_, name) = wheel.split_once("  ").unwrap();
    let wheel = folder.path().join("cache/wheels").join(name);
    std::fs::create_dir_all(wheel.parent().unwrap()).unwrap();
    // The program that setup would run first.
    std::fs::write(&wheel, "not the wheel of pip").unwrap();
    let setup = |option: &str| {
        let mut command = Command::new(scripts.join("setup"));
        command
            .arg(option)
            .env("MOERUN_CACHE", folder.path().join("cache"))
            .env_remove("MPICC");
        finish(&mut command)
    };
    for option in ["--deny", "--mpi", "--nvrtc"] {
        std::fs::write(&wheel, "not the wheel of pip").unwrap();
        let output = setup(option);
        let said = text(&output);
        let refused = format!("{name} is not the file that scripts/wheels.sha256 lists");
        assert!(
            !output.status.success() && said.contains(&refused),
            "{said}"
        );
        assert!(!wheel.exists(), "{option}");
    }
    assert!(!folder.path().join(".cargo").exists());
}

#[test]
fn every_download_has_one_hash_for_each_processor() {
    let folder = tempfile::tempdir().unwrap();
    let scripts = copy_scripts(folder.path());
    let list = std::fs::read_to_string(scripts.join("wheels.sha256")).unwrap();
    let names = list.lines().map(|line| {
        let (hash, name) = line.split_once("  ").unwrap();
        assert!(
            hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit()),
            "{line}"
        );
        name
    });
    let names: Vec<&str> = names.collect();
    let of = |suffix: &str| {
        let mut packages: Vec<&str> = names
            .iter()
            .filter(|name| name.ends_with(suffix))
            .map(|name| name.split('-').next().unwrap())
            .collect();
        packages.sort_unstable();
        packages
    };
    let x86 = of("_x86_64.whl");
    assert_eq!(x86, of("_aarch64.whl"));
    let mut once = x86.clone();
    once.dedup();
    assert_eq!(x86, once);
    // A package that setup downloads without a line here could not be verified.
    let setup = std::fs::read_to_string(scripts.join("setup")).unwrap();
    let fetched = setup.lines().filter_map(|line| {
        let (_, requirement) = line.trim().split_once("fetch \"")?;
        let (package, _) = requirement.split_once("==")?;
        Some(package.replace('-', "_")).filter(|package| !package.starts_with('$'))
    });
    for package in fetched {
        let known = names
            .iter()
            .any(|name| name.starts_with(&format!("{package}-")));
        assert!(known, "{package}");
    }
}
