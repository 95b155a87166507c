//! `coar serve`

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::model::{EngineArgs, ModelArgs};

/// Serve the HTTP API.
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Address to listen on. There are no API keys yet: keep it on loopback or behind a proxy that checks them.
    #[arg(long, env = "COAR_LISTEN", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Folder of the database, pictures and concepts.
    #[arg(long, env = "COAR_DATA", default_value = "data", value_name = "DIR")]
    data: PathBuf,
    /// Hours for which pictures that were answered by URL are kept.
    #[arg(long, env = "COAR_KEEP_IMAGES", default_value_t = 24, value_name = "HOURS")]
    keep_images: u32,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    model: ModelArgs,
}

impl ServeArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::bind(self.listen).await.map_err(|error| {
                anyhow::anyhow!(
                    "cannot listen on {}: {error}; choose another address with --listen",
                    self.listen
                )
            })?;
            // Tests and scripts that ask for port 0 read the address from this line.
            println!("listening on http://{}", listener.local_addr()?);
            let stop = CancellationToken::new();
            tokio::spawn(signalled(stop.clone()));
            let (model, options) = (self.model, self.engine.options());
            crate::app::serve(
                self.data,
                std::time::Duration::from_secs(3600 * u64::from(self.keep_images)),
                listener,
                move || model.start_engine(options),
                stop,
            )
            .await
        })
    }
}

async fn signalled(stop: CancellationToken) {
    let mut terminate = match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(signal) => signal,
        Err(error) => {
            tracing::warn!(%error, "SIGTERM cannot be handled; it will end the server at once");
            return;
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    stop.cancel();
}
