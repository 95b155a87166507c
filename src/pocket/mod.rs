//! The small default model: a world that it draws itself, and the recipe that trains it.

/// Classes, attributes, scenes, styles, captions, and how they are drawn.
pub mod world;
