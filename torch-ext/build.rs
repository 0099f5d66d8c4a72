//! Compiles the C++ bindings against the headers of the libtorch that torch-sys links.
use std::{env, path::PathBuf};

fn include_folder() -> PathBuf {
    println!("cargo:rerun-if-env-changed=MOERUN_TORCH_INCLUDE");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Some(include) = env::var_os("MOERUN_TORCH_INCLUDE") {
        return include.into();
    }
    let Some(libtorch) = env::var_os("LIBTORCH") else {
        panic!("libtorch: LIBTORCH is not set; run ./scripts/setup first");
    };
    PathBuf::from(libtorch).join("include")
}

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    let include = include_folder();
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .warnings(false)
        .flag_if_supported("-Wno-deprecated-declarations")
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .include("cpp/gloo-forward")
        .include(&include)
        .include(include.join("torch/csrc/api/include"));
    build.file("cpp/ffi.cpp").compile("moerun_torch_ext");
}
