//! Measures of fidelity and prompt following on the pocket world.

mod compositions;
/// The designers' world: its own judge, the published one, and a report with both.
pub mod designers;
/// Thirty subjects, twenty-five prompts each: the benchmark of the DreamBooth paper.
pub mod dreambench;
/// A small network that recognises the world's attributes.
pub mod judge;
/// DINO and CLIP, the scoring networks of DreamBench.
pub mod judges;
mod measures;
/// The comparison of methods.
pub mod methods;
mod report;
mod run;
mod styles;
mod subjects;

pub use report::{Report, Row};
pub use run::{EvalOptions, evaluate};
