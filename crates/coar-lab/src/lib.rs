//! The laboratory: everything that measures coar, or makes the models that it is measured with. No server needs it.

/// The command line of `coar-lab`.
pub mod cli;
/// Measures: fidelity, prompt following, judges.
pub mod eval;
/// Every parser of untrusted bytes as a function of bytes, with what must hold of what it returns.
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
/// The pocket model: the world it is drawn from, and how it is trained.
pub mod pocket;
/// A fleet of workers on paper: a simulator fed with measured step times, and closed forms.
pub mod simulator;
/// Methods that change the model's weights, on a copy.
pub mod tuning;
