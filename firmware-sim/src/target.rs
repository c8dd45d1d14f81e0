//! Where the gateway is, and from which of this machine's addresses a device goes there.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use rustls::pki_types::ServerName;
use tokio_tungstenite::tungstenite::http::{Uri, uri::InvalidUri};

use crate::tls::{Tls, Trust, TrustError};

/// What a URL without a path means. See docs/PROTOCOL.md.
const PATH_DEFAULT: &str = "/v1/connect";

/// Expected form, for a URL that does not parse.
const EXPECTED: &str = "expected ws://host:port or wss://host:port";

/// How a URL over TLS begins.
const TLS_SCHEME: &str = "wss";

/// Devices of one source address: far from the 28,000 ports that Linux hands out for one (`ip_local_port_range`), so that
/// a port is found at once, with as many still closing.
pub const DEVICES_PER_SOURCE: usize = 4_000;

/// Addresses of 127.0.0.0/24 that a fleet uses, from 127.0.0.1 up.
const SOURCES_MAX: usize = 250;

/// Placeholder for a device's id in the path of a URL.
const DEVICE: &str = "{device}";

/// A gateway's address and what to ask it for.
#[derive(Clone)]
pub struct Target {
    addr: SocketAddr,
    uri: Uri,
    tls: Option<Tls>,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The query may hold a credential.
        write!(f, "{} at {}", self.uri.path(), self.addr)
    }
}

impl Target {
    /// The same, with the authorities of this machine.
    ///
    /// # Errors
    /// As [`resolve_trusting`](Self::resolve_trusting).
    pub async fn resolve(url: &str) -> Result<Self, TargetError> {
        Self::resolve_trusting(url, &Trust::System).await
    }

    /// Reads `ws://host:port[/path][?query]`, `wss://…`, or `host:port` alone, and looks up the host's address. `{device}` in the path
    /// stands for the id of each device. The path defaults to
    /// `/v1/connect`, the port to 80, with TLS to 443. The gateway itself need not be there.
    ///
    /// # Errors
    /// No such URL, a host without an address, or authorities that can't be read.
    pub async fn resolve_trusting(url: &str, trust: &Trust) -> Result<Self, TargetError> {
        let (uri, host, port) = parse(url)?;
        let tls = if uri.scheme_str() == Some(TLS_SCHEME) {
            let name = ServerName::try_from(host.clone())
                .map_err(|_| TargetError::BadUrl("the host is not a name that a certificate could contain"))?;
            Some(Tls::new(name, trust)?)
        } else {
            None
        };
        let no_address = |source| TargetError::NoAddress {
            host: host.clone(),
            source,
        };
        let addr = tokio::net::lookup_host((host.as_str(), port))
            .await
            .map_err(|error| no_address(Some(error)))?
            .next()
            .ok_or_else(|| no_address(None))?;
        Ok(Self { addr, uri, tls })
    }

    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What connections to it are made with; `None` over plain TCP.
    pub(crate) const fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    #[must_use]
    pub const fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Whether the path says which device connects.
    pub(crate) fn names_device(&self) -> bool {
        self.uri.path().contains(DEVICE)
    }

    /// What a device of this name asks for.
    pub(crate) fn uri_of(&self, name: &str) -> Result<Uri, InvalidUri> {
        if !self.names_device() {
            return Ok(self.uri.clone());
        }
        let name = utf8_percent_encode(name, NON_ALPHANUMERIC).to_string();
        self.uri.to_string().replacen(DEVICE, &name, 1).parse()
    }
}

fn parse(url: &str) -> Result<(Uri, String, u16), TargetError> {
    let bad = TargetError::BadUrl;
    let full = if url.contains("://") {
        url.to_owned()
    } else {
        format!("ws://{url}")
    };
    let uri: Uri = full.parse().map_err(|_| bad(EXPECTED))?;
    let (scheme, port_default) = match uri.scheme_str() {
        Some("ws") => ("ws", 80),
        Some(TLS_SCHEME) => (TLS_SCHEME, 443),
        Some(_) | None => return Err(bad(EXPECTED)),
    };
    let authority = uri.authority().ok_or_else(|| bad("the host is missing"))?.as_str();
    if authority.contains('@') {
        return Err(bad("ids and secrets come from the devices file, not from the URL"));
    }
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    if host.is_empty() {
        return Err(bad("the host is missing"));
    }
    let path = match uri.path() {
        "" | "/" => PATH_DEFAULT,
        path => path,
    };
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let port = uri.port_u16().unwrap_or(port_default);
    let uri = format!("{scheme}://{authority}{path}{query}")
        .parse()
        .map_err(|_| bad(EXPECTED))?;
    Ok((uri, host, port))
}

/// Reason why a URL is not a gateway's.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// It is not repeated: it may hold a secret.
    #[error("--url: {0}")]
    BadUrl(&'static str),
    #[error("the gateway's host {host:?} has no address")]
    NoAddress {
        host: String,
        #[source]
        source: Option<std::io::Error>,
    },
    #[error(transparent)]
    NoTrust(#[from] TrustError),
}

/// Local addresses that devices connect from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources(Vec<IpAddr>);

impl Sources {
    /// These, in turn; without any: 127.0.0.1 and its neighbours, [`DEVICES_PER_SOURCE`] each, for a gateway on IPv4
    /// loopback, and whatever the system picks for one elsewhere.
    #[must_use]
    pub const fn new(addresses: Vec<IpAddr>) -> Self {
        Self(addresses)
    }

    /// The address of the device with this number in the fleet. `None`: the system picks.
    #[must_use]
    pub fn of(&self, number: usize, target: &Target) -> Option<IpAddr> {
        if !self.0.is_empty() {
            return self.0.get(number % self.0.len()).copied();
        }
        match target.addr.ip() {
            IpAddr::V4(address) if address.is_loopback() => {
                let last = u8::try_from(number / DEVICES_PER_SOURCE % SOURCES_MAX + 1).unwrap_or(1);
                Some(Ipv4Addr::new(127, 0, 0, last).into())
            }
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn url_gets_the_contract_s_path_and_keeps_its_query() {
        for (url, uri) in [
            ("ws://127.0.0.1:8080", "ws://127.0.0.1:8080/v1/connect"),
            ("127.0.0.1:8080", "ws://127.0.0.1:8080/v1/connect"),
            ("ws://127.0.0.1:8080/?x=1", "ws://127.0.0.1:8080/v1/connect?x=1"),
            ("ws://[::1]:8080/other", "ws://[::1]:8080/other"),
            ("wss://127.0.0.1:8443", "wss://127.0.0.1:8443/v1/connect"),
        ] {
            assert_eq!(Target::resolve(url).await.unwrap().uri().to_string(), uri);
        }
    }

    #[tokio::test]
    async fn device_in_the_path_is_replaced_by_each_device_s_name() {
        let target = Target::resolve("ws://127.0.0.1:8080/ocpp/{device}?x=1").await.unwrap();

        assert!(target.names_device());
        assert_eq!(
            target.uri_of("CP/01").unwrap().to_string(),
            "ws://127.0.0.1:8080/ocpp/CP%2F01?x=1"
        );
    }

    #[tokio::test]
    async fn bad_urls_say_what_is_wrong() {
        for (url, words) in [
            ("http://127.0.0.1:1", "ws://"),
            ("ws://id:secret@127.0.0.1:1", "devices file"),
            ("ws://:80", ""),
            ("", ""),
        ] {
            let message = Target::resolve(url).await.unwrap_err().to_string();

            assert!(message.contains(words), "{message}");
        }
    }

    #[tokio::test]
    async fn fleet_on_loopback_spreads_over_addresses() {
        let target = Target::resolve("127.0.0.1:1").await.unwrap();
        let source = |number| Sources::default().of(number, &target).unwrap().to_string();

        assert_eq!(
            [source(0), source(3_999), source(4_000), source(999_999)],
            ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.250"]
        );
    }

    #[tokio::test]
    async fn gateway_elsewhere_is_reached_from_wherever_the_system_likes() {
        let target = Target::resolve("192.0.2.1:80").await.unwrap();

        assert_eq!(Sources::default().of(7, &target), None);
        let own: IpAddr = "192.0.2.9".parse().unwrap();
        assert_eq!(Sources::new(vec![own]).of(7, &target), Some(own));
    }
}
