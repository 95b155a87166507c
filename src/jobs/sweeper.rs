//! Removes expired images, generations, webhook deliveries and idempotency keys.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::registry::{Registry, RegistryError};

/// Sweep interval.
const PERIOD: Duration = Duration::from_secs(600);
/// How long ended webhook deliveries are kept, without their bodies: a training that ended within a day and has no
/// delivery gets one.
const KEEP_DELIVERIES: Duration = Duration::from_secs(25 * 3600);

/// Sweeps periodically until `stop`. Images, and then their generations, are kept for `age`.
pub async fn sweep(registry: Registry, age: Duration, stop: CancellationToken) {
    loop {
        match once(&registry, age).await {
            Ok((0, 0, 0)) => {}
            Ok((images, generations, deliveries)) => {
                tracing::info!(images, generations, deliveries, "removed expired objects");
            }
            Err(error) => tracing::warn!(%error, "could not remove expired objects"),
        }
        if let Err(error) = registry.expire_keys().await {
            tracing::warn!(%error, "could not remove expired idempotency keys");
        }
        if let Err(error) = registry.expire_tallies().await {
            tracing::warn!(%error, "could not remove outdated counts of rate limits");
        }
        match registry.expire_holds().await {
            Ok(0) => {}
            Ok(blobs) => tracing::info!(blobs, "removed blobs of interrupted requests"),
            Err(error) => tracing::warn!(%error, "could not remove blobs of interrupted requests"),
        }
        match registry.note_sizes().await {
            Ok(0) => {}
            Ok(blobs) => tracing::info!(blobs, "counted what an earlier release has stored"),
            Err(error) => tracing::warn!(%error, "could not count what an earlier release has stored"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(PERIOD) => {}
        }
    }
}

async fn once(registry: &Registry, age: Duration) -> Result<(usize, u64, u64), RegistryError> {
    Ok((
        registry.expire_images(age).await?,
        registry.expire_generations(age).await?,
        registry.expire_deliveries(KEEP_DELIVERIES).await?,
    ))
}
