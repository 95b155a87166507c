//! The laboratory's commands on the shipped pocket model.

// Test helpers may panic, like tests.
#![allow(clippy::unwrap_used)]

mod dreambench;
mod methods;
mod support;
