//! VQGAN
