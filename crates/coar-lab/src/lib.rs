//! The laboratory: tools that measure coar or train its small models. No server needs them.

/// The command line of `coar-lab`.
pub mod cli;
/// Measures: fidelity, prompt following, judges.
pub mod eval;
/// Every parser of untrusted bytes as a function of bytes, with the properties of its result.
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
/// The pocket model: the world it is trained on, and its recipe.
pub mod pocket;
/// Capacity planning: a simulator of a fleet of workers, fed with measured step times, and closed forms.
pub mod simulator;
/// Methods that change the model's weights, on a copy.
pub mod tuning;
