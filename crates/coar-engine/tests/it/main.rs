//! The engine against reference data, and on the shipped pocket model.

mod device_indices;
mod engine;
mod golden;
mod gpu_memory;
mod model;
mod support;
mod training;
