//! Pure tensor code: no HTTP, SQL, tokio, clock or environment in this module.

/// Streams, events, memory and uploads of an accelerator.
pub mod accelerator;
mod attention;
/// Serde mirror of a checkpoint's `config.json`.
pub mod config;
/// Rows to inject at given positions of a sequence, layer by layer, and the identity mask.
pub mod context;
/// Decode steps on the CPU.
pub mod cpu;
/// Autoregressive image decoding.
pub mod decoding;
mod error;
/// The files of a checkpoint folder.
pub mod files;
/// The constraint on the next token inside an image.
pub mod image_grammar;
/// Conversations as token sequences.
pub mod item;
/// KV cache for decoding.
pub mod kv_cache;
mod layers;
/// A whole checkpoint.
pub mod lumina;
mod rope;
/// From logits to sampled codes.
pub mod sampling;
/// Forward and backward passes in segments of layers.
pub mod segments;
/// The decoder stack.
pub mod transformer;
/// The image tokenizer.
pub mod vqgan;
/// Tensors on disk: safetensors shards, and a pickle reader that executes nothing.
pub mod weights;

/// Crop sizes, Pillow-exact resampling.
pub use coar_core::image::preprocessing;
pub use config::ModelConfig;
pub use error::ModelError;
pub use lumina::LuminaMgpt;
pub use transformer::Transformer;
pub use vqgan::Vqgan;
