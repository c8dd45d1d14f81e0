//! Trusted load balancers: their addresses, and how they name their clients. Start with [`Proxies`].

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use super::ProxySettings;

/// Length of the prefix before an IPv4 address that is written as IPv6 (RFC 4291 §2.5.5.2).
const MAPPED_PREFIX_LEN: u8 = 96;

/// The trusted load balancers, and how they name clients.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    trusted: Vec<IpNet>,
    speaks_proxy: bool,
    forwards: bool,
}

impl Proxies {
    /// # Errors
    /// An element of `proxy.trusted` that is neither an address nor a network.
    pub fn of(settings: &ProxySettings) -> Result<Self, String> {
        let network = |text: &String| {
            text.parse::<IpNet>()
                .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
                .map(canonical)
                .map_err(|_| format!("{text:?} is neither an address nor a network such as 10.0.0.0/8"))
        };
        Ok(Self {
            trusted: settings.trusted.iter().map(network).collect::<Result<_, _>>()?,
            speaks_proxy: settings.protocol,
            forwards: settings.forwarded_for,
        })
    }

    /// Whether a connection from here is for another client, which is named later.
    #[must_use]
    pub fn speaks_for_others(&self, address: IpAddr) -> bool {
        (self.speaks_proxy || self.forwards) && self.is_trusted(address)
    }

    /// Whether a connection from here begins with a PROXY header.
    #[must_use]
    pub fn sends_header(&self, address: IpAddr) -> bool {
        self.speaks_proxy && self.is_trusted(address)
    }

    /// Whether `X-Forwarded-For` of a request from here is used.
    #[must_use]
    pub fn forwards(&self, address: IpAddr) -> bool {
        self.forwards && self.is_trusted(address)
    }

    #[must_use]
    pub fn is_trusted(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.trusted.iter().any(|network| network.contains(&address))
    }
}

/// A network of IPv4 addresses that was written as IPv6 (`::ffff:10.0.0.0/104`), as IPv4, because connections are
/// compared so.
fn canonical(network: IpNet) -> IpNet {
    let IpNet::V6(mapped) = network else { return network };
    let network_of = |address: Ipv4Addr| {
        let len = mapped.prefix_len().checked_sub(MAPPED_PREFIX_LEN)?;
        Ipv4Net::new(address, len).ok().map(IpNet::V4)
    };
    mapped.addr().to_ipv4_mapped().and_then(network_of).unwrap_or(network)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_balancer_may_be_written_as_ipv6() {
        for (trusted, address, is_trusted) in [
            ("::ffff:10.0.0.1", "10.0.0.1", true),
            ("::ffff:10.0.0.1", "::ffff:10.0.0.1", true),
            ("::ffff:10.0.0.1", "10.0.0.2", false),
            ("::ffff:10.0.0.0/104", "10.9.8.7", true),
            ("::ffff:10.0.0.0/104", "11.0.0.1", false),
            ("::ffff:0:0/96", "192.0.2.1", true),
            ("::ffff:0:0/96", "2001:db8::1", false),
            ("2001:db8::/32", "2001:db8::1", true),
            ("10.0.0.0/8", "::ffff:10.0.0.1", true),
        ] {
            let proxies = Proxies::of(&ProxySettings {
                trusted: vec![trusted.to_owned()],
                ..ProxySettings::default()
            })
            .unwrap();

            assert_eq!(
                proxies.is_trusted(address.parse().unwrap()),
                is_trusted,
                "{trusted} {address}"
            );
        }
    }
}
