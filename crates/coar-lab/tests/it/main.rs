//! The laboratory's commands on the shipped pocket model.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod dreambench;
mod methods;
mod support;
