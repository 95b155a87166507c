//! coar: one frozen autoregressive image model, and everybody's concepts beside it.
//!
//! Rooms, and the direction in which they may use each other, are described in `docs/architecture.md`
//! and enforced by `tests/it/architecture.rs`.

/// HTTP only: routes, extractors, errors as JSON.
pub mod api;
/// Wires the rooms together, starts and stops them in order.
pub mod app;
/// The command line: one file per command.
pub mod cli;
/// A client of the server's HTTP API, for the command line.
pub mod client;
/// Where generations are drawn: here, or by workers over the network.
pub mod cluster;
/// What a concept is: its tensors, its file, its composition with others.
pub mod concept;
/// What the operator decides: flags, variables, file.
pub mod config;
/// The device thread and its door: generation and training slices on one frozen model.
pub mod engine;
/// Kinds of failure, shared by every room.
pub mod error;
/// Measures: fidelity, prompt following, the judge.
pub mod eval;
/// A fleet of workers on paper: a simulator fed with measured step times, and closed forms.
pub mod fleet;
/// Every parser of foreign bytes as a function of bytes, with what must hold of what it returns.
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
/// Typed identifiers.
pub mod ids;
/// The persistent job queue and its worker.
pub mod jobs;
/// Pure tensors: the Chameleon / Lumina-mGPT transformer, its VQGAN, tokenizer and picture preparation.
pub mod model;
/// Pictures in memory: decoding of foreign bytes under limits, encoding.
pub mod picture;
/// The small default model: the world it is drawn from, and how it is trained.
pub mod pocket;
/// Everything that must survive: database and blobs.
pub mod registry;
/// The use cases, shared by HTTP and the command line.
pub mod service;
/// Log lines, spans, metrics.
pub mod telemetry;
/// Concept training: data, losses, a resumable trainer.
pub mod training;
