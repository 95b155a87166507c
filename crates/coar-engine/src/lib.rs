//! The base model on libtorch, everything that concepts do to it, and the thread that owns the device. The only crate of
//! the server that names `tch`.

/// The thread that owns the device, and its handle.
pub mod device;
/// Variables that libtorch and its libraries read at their start.
pub mod environment;
/// From concepts to the values that the transformer injects.
pub mod injection;
/// What a checkpoint is, found without loading it.
pub mod inspect;
/// Choosing and loading a base model.
pub mod loading;
/// The Chameleon / Lumina-mGPT transformer, its VQGAN and image preparation.
pub mod model;
/// From a prompt with concepts to one sequence.
pub mod plan;
/// The checkpoint that is shipped inside the binary.
pub mod pocket;
/// Concept training: data, losses, a resumable trainer.
pub mod training;

pub use device::{EngineOptions, start};
