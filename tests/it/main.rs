//! The one integration-test binary.

mod api;
mod architecture;
mod device_indices;
mod dreambench;
mod engine;
mod golden;
mod gpu_memory;
mod methods;
mod model;
mod security;
mod support;
mod training;
