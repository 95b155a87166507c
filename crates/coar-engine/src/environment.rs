//! Variables that libtorch and its libraries read once, before or at their start.

use std::os::unix::process::CommandExt;

/// How long a thread of libtorch's pool spins for its next piece of work before it sleeps. The default spins for ever,
/// which ruins every neighbour on the same cores; sleeping at once costs a third of the speed.
const SPIN: (&str, &str) = ("GOMP_SPINCOUNT", "10000");

/// Lets libtorch's CUDA allocator grow its blocks in place: a training's varying sizes beside a server's fixed ones leave
/// fragments that nothing fits into otherwise.
const SEGMENTS: (&str, &str) = ("PYTORCH_ALLOC_CONF", "expandable_segments:True");

/// Libraries read these before `main` or where nobody can tell when, so the process starts itself anew with them, once.
/// What the user has set stays.
pub fn with_library_settings() {
    let is_set = |name: &str| std::env::var_os(name).is_some();
    let mut missing = vec![];
    if !is_set(SPIN.0) && !is_set("OMP_WAIT_POLICY") {
        missing.push(SPIN);
    }
    // The second is the older name of the first.
    if !is_set(SEGMENTS.0) && !is_set("PYTORCH_CUDA_ALLOC_CONF") {
        missing.push(SEGMENTS);
    }
    if missing.is_empty() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        // Returns only where it failed; the process then goes on with the defaults.
        let _ = std::process::Command::new(program)
            .args(std::env::args_os().skip(1))
            .envs(missing)
            .exec();
    }
}
