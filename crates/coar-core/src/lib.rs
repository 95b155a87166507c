//! Shared code of the server, the engine and the tools, without tensors, databases and HTTP: concepts and their file
//! format, image decoding under limits, the engine's requests and events, token counting, and scheduling policies.

/// Concepts: tensors on the host, the file format, placeholders in prompts.
pub mod concept;
/// The engine's requests and events.
pub mod engine;
/// Error kinds.
pub mod error;
/// Typed identifiers.
pub mod ids;
/// Images in memory: decoding of untrusted bytes under limits, encoding.
pub mod image;
/// The process's metrics: a table of names and help texts, and their values.
pub mod metrics;
/// Routing: which of several workers runs a request.
pub mod routing;
/// Scheduling: which request is admitted next, and how device time is shared.
pub mod scheduler;
/// The setting of speculative decoding.
pub mod speculation;
/// Text tokens, image codes and special ids of a checkpoint's vocabulary.
pub mod tokenizer;
/// Training settings: hyper-parameters, presets, losses.
pub mod training;
