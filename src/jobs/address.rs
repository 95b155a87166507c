//! Which addresses webhooks may have. A caller names the address and the server connects to it, so this must not
//! open a way into the server's own network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// The longest webhook address, in bytes.
const URL_LIMIT: usize = 2048;

/// Which addresses are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressPolicy {
    /// All addresses: for tests and closed networks.
    pub allow_private: bool,
}

fn within(address: u32, network: [u8; 4], bits: u32) -> bool {
    let mask = u32::MAX << (32 - bits);
    address & mask == u32::from(Ipv4Addr::from(network)) & mask
}

/// Whether the address is globally routable.
fn is_public_v4(address: Ipv4Addr) -> bool {
    // The special-purpose registry of RFC 6890 and its updates, multicast, and reserved ranges; and the address at
    // which virtual machines of Azure reach their host, which is not in the registry.
    const SPECIAL: [([u8; 4], u32); 19] = [
        ([0, 0, 0, 0], 8),
        ([10, 0, 0, 0], 8),
        ([100, 64, 0, 0], 10),
        ([127, 0, 0, 0], 8),
        ([169, 254, 0, 0], 16),
        ([168, 63, 129, 16], 32),
        ([172, 16, 0, 0], 12),
        ([192, 0, 0, 0], 24),
        ([192, 0, 2, 0], 24),
        ([192, 31, 196, 0], 24),
        ([192, 52, 193, 0], 24),
        ([192, 88, 99, 0], 24),
        ([192, 168, 0, 0], 16),
        ([192, 175, 48, 0], 24),
        ([198, 18, 0, 0], 15),
        ([198, 51, 100, 0], 24),
        ([203, 0, 113, 0], 24),
        ([224, 0, 0, 0], 4),
        ([240, 0, 0, 0], 4),
    ];
    !SPECIAL
        .iter()
        .any(|&(network, bits)| within(address.into(), network, bits))
}

/// As [`is_public_v4`]: global unicast (2000::/3) without its special-purpose ranges. Everything else is excluded:
/// loopback, mapped and translated IPv4 addresses (::ffff:0:0/96, 64:ff9b::/96), unique local, link-local and
/// multicast addresses.
fn is_public_v6(address: Ipv6Addr) -> bool {
    let [first, second, third, ..] = address.segments();
    let global = first & 0xe000 == 0x2000;
    // 2001::/23 (protocol assignments, Teredo), 2001:db8::/32 and 3fff::/20 (documentation), 2002::/16 (6to4),
    // 2620:4f:8000::/48 (delegation of private addresses' names).
    let set_apart = (first == 0x2001 && (second < 0x200 || second == 0xdb8))
        || first == 0x2002
        || (first, second, third) == (0x2620, 0x4f, 0x8000)
        || (first == 0x3fff && second < 0x1000);
    global && !set_apart
}

impl AddressPolicy {
    /// Whether the server may connect to the address.
    pub fn allows(self, address: IpAddr) -> bool {
        self.allow_private
            || match address {
                IpAddr::V4(address) => is_public_v4(address),
                IpAddr::V6(address) => is_public_v6(address),
            }
    }

    /// Parses an address as written by a caller. A host name is checked again whenever the server connects.
    ///
    /// # Errors
    /// What is wrong with it; completes a sentence that begins with the field's name.
    pub fn check(self, url: &str) -> Result<Url, String> {
        if url.len() > URL_LIMIT {
            return Err(format!("has {} bytes; the limit is {URL_LIMIT}", url.len()));
        }
        let url = Url::parse(url).map_err(|error| format!("is no address: {error}"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err("must begin with https:// or http://".to_owned());
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("must not hold a user or password".to_owned());
        }
        let port = url.port_or_known_default();
        if !self.allow_private && !matches!(port, Some(80 | 443)) {
            return Err("must use port 80 or 443".to_owned());
        }
        let host = url.host_str().unwrap_or_default();
        let literal: Option<IpAddr> = host.trim_matches(['[', ']']).parse().ok();
        match literal {
            _ if host.is_empty() => Err("names no host".to_owned()),
            Some(address) if !self.allows(address) => {
                Err(format!("leads to {address}, which is not on the public internet"))
            }
            _ => Ok(url),
        }
    }
}

/// The host of an address, with its port unless that is the default port of http or https.
pub fn host_of(url: &str) -> String {
    let Ok(url) = Url::parse(url) else { return String::new() };
    let host = url.host_str().unwrap_or_default().to_ascii_lowercase();
    match url.port() {
        None | Some(80 | 443) => host,
        Some(port) => format!("{host}:{port}"),
    }
}

/// A DNS resolver that drops addresses which are not allowed: the addresses that are checked are those that are
/// used.
impl Resolve for AddressPolicy {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = *self;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> = found.filter(|address| policy.allows(address.ip())).collect();
            if allowed.is_empty() {
                return Err(format!("`{}` has no address on the public internet", name.as_str()).into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRICT: AddressPolicy = AddressPolicy { allow_private: false };
    const OPEN: AddressPolicy = AddressPolicy { allow_private: true };

    #[test]
    fn only_public_addresses_are_allowed() {
        for private in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.0.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.52.193.1",
            "192.168.1.1",
            "192.175.48.6",
            "168.63.129.16",
            "198.19.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "::7f00:1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "100::1",
            "fc00::1",
            "fd12::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2620:4f:8000::6",
            "3fff::1",
        ] {
            assert!(!STRICT.allows(private.parse().unwrap()), "{private}");
            assert!(OPEN.allows(private.parse().unwrap()), "{private}");
        }
        for public in [
            "1.1.1.1",
            "8.8.8.8",
            "100.63.255.255",
            "100.128.0.0",
            "172.15.0.1",
            "172.32.0.1",
            "168.63.129.15",
            "168.63.129.17",
            "192.0.1.1",
            "192.52.192.1",
            "192.175.49.1",
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.255",
            "2001:4860:4860::8888",
            "2606:4700::1111",
            "2620:4f:8001::1",
            "3ffe::1",
        ] {
            assert!(STRICT.allows(public.parse().unwrap()), "{public}");
        }
    }

    #[test]
    fn parse_checks_every_spelling_of_an_address() {
        for bad in [
            "",
            "nonsense",
            "ftp://example.com/",
            "file:///etc/passwd",
            "https://",
            "https://user@example.com/",
            "https://example.com:8443/",
            "http://127.0.0.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://[::1]/",
            "http://[::ffff:10.0.0.1]/",
            "http://[64:ff9b::a00:1]/",
            "http://169.254.169.254/latest",
            // The same host in the other notations that a URL allows.
            "http://127.0.0.1./",
            "http://0/",
            "http://127.1/",
            "http://017700000001/",
            "http://0x7f000001/",
            "http://0xa9fea9fe/latest",
            "http://[::ffff:7f00:1]/",
            "http://[::127.0.0.1]/",
            "http://[0:0:0:0:0:0:0:1]/",
            "http://[2002:7f00:1::]/",
            "http://[2001:0:7f00:1::]/",
            "http://[64:ff9b::169.254.169.254]/",
            "http://%31%32%37.0.0.1/",
            "http://127\u{3002}0\u{3002}0\u{3002}1/",
            "http://\u{ff11}\u{ff12}\u{ff17}.0.0.1/",
            "http:\\\\127.0.0.1\\",
            "http:127.0.0.1",
            "http:///127.0.0.1/",
            "http://example.com@127.0.0.1/",
            "http://127.0.0.1#@example.com/",
            "http://127.0.0.1\\@example.com/",
            "http://:word@example.com/",
            "http://example.com:22/",
            "http://[::1%25lo]/",
            "http://1.1.1.1.1/",
            "http://256.1.1.1/",
        ] {
            assert!(STRICT.check(bad).is_err(), "{bad}");
        }
        for good in [
            "https://example.com/hook?x=1",
            "http://example.com:80/",
            "https://8.8.8.8/",
        ] {
            assert!(STRICT.check(good).is_ok(), "{good}");
        }
        // Characters that could end a line of the request are no longer part of a parsed address.
        let split = STRICT
            .check("http://example.com/\r\nX-Injected: 1?a=\r\nHost: b#\n")
            .unwrap();
        assert!(!split.as_str().contains(['\r', '\n', ' ']), "{split}");
        let split = STRICT.check("http://example.com/%0d%0aX-Injected:%201").unwrap();
        assert_eq!(split.path(), "/%0d%0aX-Injected:%201");
        assert!(OPEN.check("http://127.0.0.1:9000/").is_ok());
        assert!(OPEN.check("gopher://127.0.0.1:9000/").is_err());
    }

    #[test]
    fn host_is_told_apart_by_unusual_ports() {
        for (url, host) in [
            ("https://Example.com/hook?x=1", "example.com"),
            ("http://example.com:443/", "example.com"),
            ("http://127.0.0.1:9000/", "127.0.0.1:9000"),
            ("https://[2606:4700::1111]/", "[2606:4700::1111]"),
        ] {
            assert_eq!(host_of(url), host);
        }
    }

    #[tokio::test]
    async fn resolver_drops_private_addresses() {
        let name = || "localhost".parse::<Name>().unwrap();
        let refused = STRICT.resolve(name()).await.err().unwrap();
        assert!(
            refused.to_string().contains("no address on the public internet"),
            "{refused}"
        );
        assert!(OPEN.resolve(name()).await.unwrap().count() > 0);
    }
}
