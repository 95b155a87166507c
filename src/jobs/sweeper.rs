//! Removes what has had its time: drawn images, generations, web-hooks, first answers of idempotency keys.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::registry::{Registry, RegistryError};

/// How often it looks.
const PERIOD: Duration = Duration::from_secs(600);
/// Web-hooks are kept this long after their end, for whoever looks into a problem.
const KEEP_DELIVERIES: Duration = Duration::from_secs(7 * 24 * 3600);

/// Looks now and then, until `stop`. Images, and after them their generations, are kept for `age`.
pub async fn sweep(registry: Registry, age: Duration, stop: CancellationToken) {
    loop {
        match once(&registry, age).await {
            Ok((0, 0, 0)) => {}
            Ok((images, generations, deliveries)) => {
                tracing::info!(images, generations, deliveries, "removed what has expired");
            }
            Err(error) => tracing::warn!(%error, "what has expired could not be removed"),
        }
        if let Err(error) = registry.expire_keys().await {
            tracing::warn!(%error, "expired idempotency keys could not be removed");
        }
        match registry.expire_holds().await {
            Ok(0) => {}
            Ok(blobs) => tracing::info!(blobs, "removed what interrupted requests left"),
            Err(error) => tracing::warn!(%error, "what interrupted requests left could not be removed"),
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
