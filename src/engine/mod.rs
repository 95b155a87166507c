//! The device thread and its door. One process has one device; the thread is the model's only owner.

mod command;
mod concept_cache;
mod generations;
mod handle;
mod memory;
mod pictures;
mod plan;
mod scheduler;
mod thread;
mod trainings;

pub use command::{
    ConceptUse, EngineError, GenerateRequest, GenerationEvent, TrainingEvent, TrainingProgress, TrainingRequest,
};
pub use concept_cache::ConceptCache;
pub use generations::Load;
pub use handle::{EngineHandle, GenerationStream, Health, ModelInfo, TrainingStream};
pub use memory::{free_bytes, used_bytes};
pub use plan::{DrawSettings, PlannedConcept, PlannedSequence, plan_sequence};
pub use thread::{EngineOptions, start};

/// Makes libtorch's CUDA part available where it is installed beside the CPU part: the linker leaves it out of the
/// binary, so that one binary serves machines with and without it.
pub fn load_cuda() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: the library's initialisers only register kernels with libtorch, which is loaded already.
        let opened = unsafe {
            libloading::os::unix::Library::open(
                Some("libtorch_cuda.so"),
                libloading::os::unix::RTLD_NOW | libloading::os::unix::RTLD_GLOBAL,
            )
        };
        match opened {
            // Never unloaded: its kernels stay registered.
            Ok(library) => std::mem::forget(library),
            Err(error) => tracing::debug!(%error, "libtorch has no CUDA part here"),
        }
    });
}

/// Makes libtorch compute on the calling thread alone, without a pool. Where the pools of a process have more threads than
/// there are cores, libgomp puts all of them to sleep between any two operations: a second pool made every decode step
/// four times as long.
fn without_pool() {
    let process = libloading::os::unix::Library::this();
    // SAFETY: OpenMP's own function, of this signature since its first version; it sets a value of this thread.
    unsafe {
        if let Ok(set) = process.get::<unsafe extern "C" fn(std::ffi::c_int)>(b"omp_set_num_threads\0") {
            set(1);
        }
    }
    // It is part of the process for good.
    std::mem::forget(process);
}
