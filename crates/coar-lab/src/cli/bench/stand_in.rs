//! `coar-lab bench stand-in`

use std::time::Duration;

use clap::Args;
use tokio_util::sync::CancellationToken;

use coar::config::{Config, Role};
mod device;

use device::{Pace, stand_in};

/// Serve like `coar serve`, but with a simulated device that only takes time: to benchmark everything around it.
///
/// Its images are grey. Every request is checked, counted, stored and sent as usual; training is not supported.
#[derive(Debug, Args)]
pub(in crate::cli) struct StandInArgs {
    /// Milliseconds per step of the batch: one code of every image in it.
    #[arg(long, default_value_t = 5.0, value_name = "MS")]
    step_ms: f64,
    /// Maximum number of images per step.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pictures: usize,
    #[command(flatten)]
    config: Config,
}

impl StandInArgs {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        let config = self.config;
        config.validate()?;
        anyhow::ensure!(self.step_ms >= 0.0, "--step-ms is {}; expected 0 or more", self.step_ms);
        let pace = Pace {
            step: Duration::from_secs_f64(self.step_ms / 1000.0),
            pictures: self.pictures.max(1),
            queue: config.engine.queue,
        };
        let model = config.model.clone();
        let address = match config.role {
            Role::Worker => config.worker_listen.into(),
            Role::All | Role::Api => config.listen.clone(),
        };
        crate::cli::block_on(async move {
            let listener = coar::app::Listener::bind(&address).await?;
            let stop = CancellationToken::new();
            tokio::spawn(coar::app::signalled(stop.clone()));
            let load = move || {
                let (model, info) = model.load()?;
                Ok(stand_in(pace, &model, info)?)
            };
            coar::app::serve(config, listener, load, stop).await
        })
    }
}
