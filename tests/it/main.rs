//! The one integration-test binary.

mod api;
mod architecture;
mod engine;
mod golden;
mod model;
mod support;
mod training;
