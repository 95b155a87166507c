//! The flags of commands that need a base model, as the engine takes them. Without the feature `device` there is none.

use coar_core::engine::EngineHandle;

use crate::config::{EngineArgs, ModelArgs};

#[cfg(feature = "device")]
mod device;

/// Loads the base model on a device thread of its own.
///
/// # Errors
/// When the device is absent, a file or tensor is missing or misshapen, or this build has no device.
#[cfg(feature = "device")]
pub(super) fn start_engine(model: &ModelArgs, engine: Option<&EngineArgs>) -> anyhow::Result<EngineHandle> {
    let options = engine.map(EngineArgs::options).unwrap_or_default();
    Ok(model.source().start_engine(options)?)
}

/// As with the feature `device`; fails because this build has none.
#[cfg(not(feature = "device"))]
pub(super) fn start_engine(_: &ModelArgs, _: Option<&EngineArgs>) -> anyhow::Result<EngineHandle> {
    anyhow::bail!(
        "this build of coar has no device: use --server URL, serve with --role api, or build it with the feature `device`"
    )
}
