//! The one integration-test binary.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod api;
mod architecture;
mod security;
mod support;
