//! image_grammar
