//! Compiles the bindings to libtorch that tch lacks, and passes libtorch's location on to the packages with binaries.

use std::path::{Path, PathBuf};

const SOURCE: &str = "src/native/libtorch.cpp";

fn main() {
    println!("cargo:rerun-if-changed={SOURCE}");
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else {
        return;
    };
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    // For dependents: DEP_COAR_LIBTORCH_LIB.
    println!("cargo:lib={lib}");
    let include = headers(Path::new(&lib));
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .file(SOURCE)
        // Warnings in libtorch's headers are not ours to fix.
        .flag(format!("-isystem{}", include.display()))
        .flag(format!("-isystem{}", include.join("torch/csrc/api/include").display()))
        .warnings(true)
        .compile("coar_libtorch");
}

/// The folder of libtorch's headers: below `LIBTORCH_INCLUDE` as in torch-sys, otherwise beside the libraries.
fn headers(lib: &Path) -> PathBuf {
    println!("cargo:rerun-if-changed={}", lib.display());
    let root = std::env::var_os("LIBTORCH_INCLUDE").map(PathBuf::from);
    let root = root.or_else(|| lib.parent().map(Path::to_owned)).unwrap_or_default();
    root.join("include")
}
