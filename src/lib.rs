//! coar: one frozen autoregressive image model, and the concepts of many tenants.
//!
//! Modules, and the direction in which they may use each other, are described in `docs/architecture.md`
//! and enforced by `tests/it/architecture.rs`.

/// HTTP only: routes, extractors, errors as JSON.
pub mod api;
/// Connects the modules, starts and stops them in order.
pub mod app;
/// The command line: one file per command.
pub mod cli;
/// A client of the server's HTTP API, for the command line.
pub mod client;
/// Where generations run: in this process, or on workers over the network.
pub mod cluster;
/// The operator's configuration: flags, variables, file.
pub mod config;
/// Memory and threads for decoding images.
pub mod decoders;
/// The persistent job queue and its worker.
pub mod jobs;
/// Fair shares of memory, disk and places.
pub mod pool;
/// Scheduling priorities of threads.
pub mod priority;
/// Everything that must survive a restart: database and blobs.
pub use coar_registry as registry;
/// The use cases, shared by HTTP and the command line.
pub mod service;
/// Log lines and spans.
pub mod telemetry;
