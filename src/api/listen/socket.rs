//! The socket that the server listens on: TCP, or a Unix socket for a proxy on the same machine.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_util::either::Either;

use crate::config::ListenAddress;

/// The mode of a Unix socket: access for the server's user, and for the group of the proxy.
const MODE: u32 = 0o660;

/// A bound socket. A Unix socket's file is removed when it is dropped.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// A connection of either kind.
pub(super) type Stream = Either<TcpStream, UnixStream>;

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl Listener {
    /// Binds an address. Names are resolved, and the first resolved address that can be bound is used.
    ///
    /// # Errors
    /// When it cannot be resolved or is in use.
    pub async fn bind(address: &ListenAddress) -> io::Result<Self> {
        match address {
            ListenAddress::Unix(path) => bind_unix(path).await,
            ListenAddress::Tcp(host, port) if host.is_empty() => {
                // On Linux a socket on this address accepts IPv4 too. It fails on machines without IPv6.
                let all = SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port));
                let listener = match TcpListener::bind(all).await {
                    Err(error) if error.kind() != ErrorKind::AddrInUse => {
                        TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).await?
                    }
                    bound => bound?,
                };
                Ok(listener.into())
            }
            ListenAddress::Tcp(host, port) => Ok(TcpListener::bind((host.as_str(), *port)).await?.into()),
        }
    }

    /// Whether it can be reached only from this machine.
    ///
    /// # Errors
    /// When the socket has no address.
    pub fn is_local(&self) -> io::Result<bool> {
        match self {
            Self::Tcp(listener) => Ok(listener.local_addr()?.ip().is_loopback()),
            Self::Unix(..) => Ok(true),
        }
    }

    /// The address that it is bound to; `None` for a Unix socket.
    ///
    /// # Errors
    /// When the socket has no address.
    pub fn address(&self) -> io::Result<Option<SocketAddr>> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Some),
            Self::Unix(..) => Ok(None),
        }
    }

    /// A URL at which it can be reached from this machine. If the server listens on all addresses, it contains the
    /// loopback address.
    ///
    /// # Errors
    /// When the socket has no address.
    pub fn url(&self) -> io::Result<String> {
        match self {
            Self::Tcp(listener) => Ok(format!("http://{}", reachable(listener.local_addr()?))),
            Self::Unix(_, file) => Ok(format!("unix:{}", file.0.display())),
        }
    }

    /// The next connection and its peer. A peer on a Unix socket has no address and does not count as loopback, because
    /// it is a proxy.
    pub(super) async fn accept(&self) -> io::Result<(Stream, SocketAddr)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // Events of a stream are small and must not be delayed.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "a connection has no nodelay");
                }
                Ok((Either::Left(stream), peer))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                Ok((Either::Right(stream), SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))))
            }
        }
    }
}

fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

/// The file of a Unix socket.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A leftover file does no harm: the next start removes it.
        let _ = std::fs::remove_file(&self.0);
    }
}

async fn bind_unix(path: &Path) -> io::Result<Listener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse && is_stale(path).await => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        bound => bound?,
    };
    let file = SocketFile(path.to_owned());
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(MODE))?;
    Ok(Listener::Unix(listener, file))
}

/// Whether a dead process left the socket behind: connections to it are refused.
async fn is_stale(path: &Path) -> bool {
    let socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    socket && matches!(UnixStream::connect(path).await, Err(error) if error.kind() == ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_and_all_addresses_are_bound_and_reachable() {
        for (text, local) in [
            ("localhost:0", true),
            ("127.0.0.1:0", true),
            (":0", false),
            ("0.0.0.0:0", false),
        ] {
            let listener = Listener::bind(&text.parse().unwrap()).await.unwrap();
            assert_eq!(listener.is_local().unwrap(), local, "{text}");
            let url = listener.url().unwrap();
            let address = url.strip_prefix("http://").unwrap().to_owned();
            let (accepted, connected) = tokio::join!(listener.accept(), TcpStream::connect(&address));
            assert!(accepted.is_ok() && connected.is_ok(), "{text} as {url}");
        }
        let missing = Listener::bind(&"nowhere.invalid:0".parse().unwrap()).await;
        assert!(missing.is_err());
    }

    #[tokio::test]
    async fn only_a_stale_unix_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coar.sock");
        let address = ListenAddress::Unix(path.clone());
        // The file remains, as after a killed process.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&address).await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, MODE);
        let second = Listener::bind(&address).await.unwrap_err();
        assert_eq!(second.kind(), ErrorKind::AddrInUse);
        let (accepted, connected) = tokio::join!(listener.accept(), UnixStream::connect(&path));
        assert!(connected.is_ok() && !accepted.unwrap().1.ip().is_loopback());
        drop(listener);
        assert!(!path.exists());
        std::fs::write(&path, "a file of another kind").unwrap();
        assert!(Listener::bind(&address).await.is_err());
        assert!(path.exists());
    }
}
