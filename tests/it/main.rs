//! The one integration-test binary.

// Test helpers may panic.
#![allow(clippy::unwrap_used)]

mod api;
mod architecture;
mod security;
mod support;
