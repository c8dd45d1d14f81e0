//! Addresses to listen on, in text: `IP:PORT`, `HOST:PORT`, `:PORT`.

use std::{
    borrow::Cow,
    net::{Ipv4Addr, SocketAddr, ToSocketAddrs},
};

use serde::{Deserialize, Deserializer, de::Error};

/// Parses an address. A host name is resolved once, now. Its first IPv4 address is used, or else its first address.
///
/// # Errors
/// The expected form, or that the host has no address. The text itself is not repeated.
pub fn parse(text: &str) -> Result<SocketAddr, &'static str> {
    let text = text.trim();
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let (host, port) = text.rsplit_once(':').ok_or(EXPECTED)?;
    let port: u16 = port.parse().map_err(|_| EXPECTED)?;
    if host.is_empty() {
        return Ok(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
    }
    if !is_host_name(host) {
        return Err(EXPECTED);
    }
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(|_| NO_ADDRESS)?.collect();
    let ipv4 = addresses.iter().find(|address| address.is_ipv4());
    ipv4.or(addresses.first()).copied().ok_or(NO_ADDRESS)
}

const EXPECTED: &str = "expected IP:PORT, HOST:PORT or :PORT";
const NO_ADDRESS: &str = "the host has no address";

/// Whether a text can be a host name: letters, digits, hyphens and dots.
fn is_host_name(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.')
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = Cow::<'de, str>::deserialize(deserializer)?;
    parse(&text).map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_read_as_ip_host_or_port_alone() {
        for (text, address) in [
            ("127.0.0.1:8080", "127.0.0.1:8080"),
            ("[::1]:8080", "[::1]:8080"),
            ("localhost:8080", "127.0.0.1:8080"),
            (":8080", "0.0.0.0:8080"),
            (" :0 ", "0.0.0.0:0"),
        ] {
            assert_eq!(parse(text), Ok(address.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn what_is_no_address_says_what_is_expected() {
        for text in [
            "",
            "8080",
            "localhost",
            "localhost:",
            "localhost:http",
            "a b:1",
            "::1:8080x",
            "[::1",
            ":70000",
        ] {
            assert_eq!(parse(text), Err(EXPECTED), "{text}");
        }
        assert_eq!(parse("name.invalid:1"), Err(NO_ADDRESS));
    }
}
