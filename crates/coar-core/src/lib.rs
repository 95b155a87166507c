//! What the server, the engine and the tools share, free of tensors, databases and HTTP: what a concept is and its file,
//! images under limits, the engine's requests and events, token counting, and the policies that schedule a device.

/// What a concept is: its tensors on the host, its file, its name in a prompt.
pub mod concept;
/// What an engine is asked and what it answers.
pub mod engine;
/// Kinds of failure.
pub mod error;
/// Typed identifiers.
pub mod ids;
/// Images in memory: decoding of untrusted bytes under limits, encoding.
pub mod image;
/// The process's metrics: one table of names and help texts, and their values.
pub mod metrics;
/// Which of several workers draws next.
pub mod routing;
/// Which request is admitted next, and how a device's time is shared.
pub mod scheduler;
/// Text tokens, image codes and special ids of a checkpoint's vocabulary.
pub mod tokenizer;
/// What a training is asked for: hyper-parameters, presets, losses.
pub mod training;
