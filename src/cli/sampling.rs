//! The flags of commands that draw images: how many, and how they are sampled.

use clap::Args;

/// How many images, and how they are sampled.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Number of images.
    #[arg(short = 'n', long, default_value_t = 1)]
    pub count: u32,
    /// WIDTHxHEIGHT in pixels, one of the model's sizes (`coar inspect` lists them). Default: the model's square size.
    #[arg(long)]
    pub size: Option<String>,
    /// Default: a random seed, which is printed.
    #[arg(long)]
    pub seed: Option<u64>,
    /// How strongly the prompt counts; 1 disables guidance. Default: the model's (2 on the pocket model, 4 on a 7B).
    #[arg(long)]
    pub guidance_scale: Option<f64>,
    /// Randomness of sampling; 0 always takes the most likely code. Default: the model's, 1.
    #[arg(long)]
    pub temperature: Option<f64>,
    /// Codes to choose from at each step; 0: all. Default: the model's (20 on the pocket model, 2000 on a 7B).
    #[arg(long)]
    pub top_k: Option<u32>,
}

impl SamplingArgs {
    /// Width and height in pixels, if `--size` is given.
    ///
    /// # Errors
    /// When it is not WIDTHxHEIGHT.
    pub fn size(&self) -> anyhow::Result<Option<(u32, u32)>> {
        let Some(text) = &self.size else { return Ok(None) };
        let size = text
            .split_once('x')
            .and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
        size.map(Some)
            .ok_or_else(|| anyhow::anyhow!("--size is `{text}`; expected WIDTHxHEIGHT, such as 96x96"))
    }
}
