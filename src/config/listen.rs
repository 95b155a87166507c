//! The address in `--listen`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// Where the server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// A host name or an address, and a port. An empty name means all addresses of the machine.
    Tcp(String, u16),
    /// A Unix socket's path.
    Unix(PathBuf),
}

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            if !path.starts_with('/') {
                return Err("a Unix socket needs an absolute path: unix:/run/coar/coar.sock".to_owned());
            }
            return Ok(Self::Unix(path.into()));
        }
        let expected = || "expected HOST:PORT, [IPV6]:PORT, :PORT or unix:/PATH".to_owned();
        let (host, port) = text.rsplit_once(':').ok_or_else(expected)?;
        let port = port.parse().map_err(|_| expected())?;
        let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = inner.unwrap_or(host);
        // An address with colons needs brackets: otherwise the port could be a part of it.
        let known = match inner {
            Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.contains([':', '/', '[', ']', '@']) && !host.chars().any(char::is_whitespace),
        };
        known.then(|| Self::Tcp(host.to_owned(), port)).ok_or_else(expected)
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl From<std::net::SocketAddr> for ListenAddress {
    fn from(address: std::net::SocketAddr) -> Self {
        Self::Tcp(address.ip().to_string(), address.port())
    }
}

impl Serialize for ListenAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_they_are_shown() {
        for text in [
            "127.0.0.1:8080",
            "localhost:8080",
            ":8080",
            "[::]:0",
            "[::1]:8080",
            "unix:/run/coar/coar.sock",
        ] {
            let read: ListenAddress = text.parse().unwrap();
            assert_eq!(read.to_string(), text);
        }
        for bad in [
            "8080",
            "localhost",
            "localhost:http",
            "::1:8080",
            "[localhost]:1",
            "http://localhost:8080",
            "a b:1",
            "unix:coar.sock",
            ":99999",
        ] {
            assert!(bad.parse::<ListenAddress>().is_err(), "{bad}");
        }
    }
}
