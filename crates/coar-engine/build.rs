//! Compiles what tch does not bind of libtorch, and tells the packages with binaries where libtorch was linked.

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
        // They are not ours: their warnings tell us nothing.
        .flag(format!("-isystem{}", include.display()))
        .flag(format!("-isystem{}", include.join("torch/csrc/api/include").display()))
        .warnings(true)
        .compile("coar_libtorch");
}

/// libtorch's headers: where `LIBTORCH_INCLUDE` says, as torch-sys has it, else beside its libraries.
fn headers(lib: &Path) -> PathBuf {
    println!("cargo:rerun-if-changed={}", lib.display());
    let root = std::env::var_os("LIBTORCH_INCLUDE").map(PathBuf::from);
    let root = root.or_else(|| lib.parent().map(Path::to_owned)).unwrap_or_default();
    root.join("include")
}
