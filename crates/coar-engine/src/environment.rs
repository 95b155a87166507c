//! Environment variables that libtorch and its libraries read once, at or before their start.

use std::os::unix::process::CommandExt;

/// How long a thread of libtorch's pool spins before it sleeps. By default it spins forever, which slows down
/// everything else on the same cores; sleeping at once costs a third of the speed.
const SPIN: (&str, &str) = ("GOMP_SPINCOUNT", "10000");

/// Lets libtorch's CUDA allocator grow its blocks in place: otherwise a training's varying sizes beside a server's
/// fixed ones leave unusable fragments.
const SEGMENTS: (&str, &str) = ("PYTORCH_ALLOC_CONF", "expandable_segments:True");

/// Libraries read these before `main` or at an unspecified time, so the process executes itself again with them,
/// once. Values that the user has set are kept.
pub fn with_library_settings() {
    let is_set = |name: &str| std::env::var_os(name).is_some();
    let mut missing = vec![];
    if !is_set(SPIN.0) && !is_set("OMP_WAIT_POLICY") {
        missing.push(SPIN);
    }
    // The second name is the older one.
    if !is_set(SEGMENTS.0) && !is_set("PYTORCH_CUDA_ALLOC_CONF") {
        missing.push(SEGMENTS);
    }
    if missing.is_empty() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        // Returns only on failure; the process then continues with the defaults.
        let _ = std::process::Command::new(program)
            .args(std::env::args_os().skip(1))
            .envs(missing)
            .exec();
    }
}
