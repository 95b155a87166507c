//! The laboratory's commands on the shipped pocket model.

mod dreambench;
mod methods;
mod support;
