//! The base model on libtorch, concept injection and training, and the thread that owns the device. The only crate
//! of the server that uses `tch`.

/// Limits of memory and processors that a container sets.
pub mod cgroup;
/// The thread that owns the device, and its handle.
pub mod device;
/// Environment variables that libtorch and its libraries read at startup.
pub mod environment;
/// Converts concepts to the values that the transformer injects.
pub mod injection;
/// Describes a checkpoint without loading it.
pub mod inspect;
/// Choosing and loading a base model.
pub mod loading;
/// The Chameleon / Lumina-mGPT transformer, its VQGAN and image preparation.
pub mod model;
/// Lays out a prompt with concepts as one sequence.
pub mod plan;
/// The checkpoint that is shipped inside the binary.
pub mod pocket;
/// Concept training: data, losses, a resumable trainer.
pub mod training;

pub use device::{EngineOptions, start};
