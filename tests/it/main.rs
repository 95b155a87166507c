//! The one integration-test binary.

mod api;
mod architecture;
mod security;
mod support;
