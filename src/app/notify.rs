//! systemd's notification protocol (sd_notify(3)): datagrams to the socket in `NOTIFY_SOCKET`. Without it, or on a
//! failure, nothing is sent, and the service manager decides what to do.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use coar_core::engine::{EngineHandle, Health};
use tokio_util::sync::CancellationToken;

/// Requests are served.
pub(super) const READY: &str = "READY=1";
/// The process is ending.
pub(super) const STOPPING: &str = "STOPPING=1";
const ALIVE: &str = "WATCHDOG=1";

/// Sends a state to the service manager, if there is one.
pub(super) fn notify(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    if let Err(error) = send(socket.as_encoded_bytes(), state) {
        tracing::warn!(%error, state, "the service manager cannot be notified");
    }
}

/// A leading `@` denotes an abstract socket.
fn send(socket: &[u8], state: &str) -> std::io::Result<()> {
    let address = match socket.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(std::str::from_utf8(socket).map_err(std::io::Error::other)?)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

/// Half of the watchdog's timeout, as systemd recommends.
fn interval(microseconds: &str) -> Option<Duration> {
    let time = Duration::from_micros(microseconds.parse().ok()?) / 2;
    (!time.is_zero()).then_some(time)
}

/// Sends systemd's watchdog signal until `ended`, if it is configured; not while the device does not respond.
pub(super) async fn watchdog(engine: Option<EngineHandle>, ended: CancellationToken) {
    let Some(every) = std::env::var("WATCHDOG_USEC").ok().and_then(|time| interval(&time)) else {
        return;
    };
    let mut tick = tokio::time::interval(every);
    loop {
        tokio::select! {
            () = ended.cancelled() => return,
            _ = tick.tick() => {}
        }
        match engine.as_ref().map(EngineHandle::health) {
            Some(Health::Stuck(since)) => {
                tracing::error!(
                    seconds = since.as_secs(),
                    "the device does not answer; the service manager is not notified"
                );
            }
            _ => notify(ALIVE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_arrive_at_either_kind_of_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("coar-test-{}", std::process::id());
        let named = SocketAddr::from_abstract_name(&name).unwrap();
        for (socket, text) in [
            (UnixDatagram::bind(&path).unwrap(), path.display().to_string()),
            (UnixDatagram::bind_addr(&named).unwrap(), format!("@{name}")),
        ] {
            send(text.as_bytes(), READY).unwrap();
            let mut bytes = [0; 64];
            let length = socket.recv(&mut bytes).unwrap();
            assert_eq!(&bytes[..length], READY.as_bytes());
        }
        assert!(send(dir.path().join("absent").as_os_str().as_encoded_bytes(), READY).is_err());
    }

    #[test]
    fn the_watchdog_is_fed_twice_in_its_time() {
        assert_eq!(interval("30000000"), Some(Duration::from_secs(15)));
        assert_eq!(interval("0"), None);
        assert_eq!(interval("soon"), None);
    }
}
