//! coar: one frozen autoregressive image model, and the concepts of many tenants.
//!
//! Modules, and the direction in which they may use each other, are described in `docs/architecture.md`
//! and enforced by `tests/it/architecture.rs`.

/// HTTP only: routes, extractors, errors as JSON.
pub mod api;
/// Wires the modules together, starts and stops them in order.
pub mod app;
/// The command line: one file per command.
pub mod cli;
/// A client of the server's HTTP API, for the command line.
pub mod client;
/// Where generations are drawn: here, or by workers over the network.
pub mod cluster;
/// What the operator decides: flags, variables, file.
pub mod config;
/// The persistent job queue and its worker.
pub mod jobs;
/// Shares of memory, disk and places.
pub mod pool;
/// Everything that must survive: database and blobs.
pub use coar_registry as registry;
/// The use cases, shared by HTTP and the command line.
pub mod service;
/// Log lines and spans.
pub mod telemetry;
