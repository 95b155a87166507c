//! The engine against reference data, and on the shipped pocket model.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod device_indices;
mod engine;
mod golden;
mod gpu_memory;
mod model;
mod speculation;
mod support;
mod training;
