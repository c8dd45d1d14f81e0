//! Sites: networks whose devices fail together, as in a power cut.

use std::{
    fmt,
    hash::Hasher as _,
    sync::atomic::{AtomicU32, Ordering},
};

use siphasher::sip::SipHasher13;

use crate::id::{DeviceId, Network};

/// Number of counters. Networks share them, so that memory is bounded: the count of a network may be too high by a few.
const CELLS: usize = 1 << 16;
/// Failure domains of a network that holds as many devices as all the others together.
const DOMAINS_AT_HALF: f64 = 200.0;
/// From this many domains on, each device is its own.
const DOMAINS_MAX: f64 = 65_536.0;

/// Sessions by network: 256 KiB, whatever the size of the fleet.
///
/// A small network (IPv4 /24, IPv6 /48) is one failure domain. A network that holds a large share of the fleet is the
/// address of a carrier or a proxy, with many sites behind it. It counts as several domains, in proportion to the odds
/// of its share: one at 0.5 % of the fleet, 22 at 10 %, 200 at 50 %, and each device by itself at 100 %.
pub struct Sites {
    sessions: Box<[AtomicU32]>,
}

impl Default for Sites {
    fn default() -> Self {
        Self {
            sessions: (0..CELLS).map(|_| AtomicU32::new(0)).collect(),
        }
    }
}

impl fmt::Debug for Sites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sites").finish_non_exhaustive()
    }
}

impl Sites {
    /// Counts a session from `network`.
    pub fn handle_opened(&self, network: Network) {
        self.cell(network).fetch_add(1, Ordering::Relaxed);
    }

    /// A session that was counted ended.
    pub fn handle_closed(&self, network: Network) {
        self.cell(network).fetch_sub(1, Ordering::Relaxed);
    }

    /// Returns the failure domain of a device. `sessions_total` is the number of sessions of all networks.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 1 to 65,536"
    )]
    pub fn domain(&self, network: Network, device: DeviceId, sessions_total: usize) -> u64 {
        let here = f64::from(self.cell(network).load(Ordering::Relaxed));
        let elsewhere = (sessions_total as f64 - here).max(1.0);
        let domains = (DOMAINS_AT_HALF * here / elsewhere).clamp(1.0, DOMAINS_MAX) as u64;
        // A power of two, so that a device stays in its domain while the share changes a little.
        let domains = domains.next_power_of_two();
        let site = hash(&site(network));
        if domains == 1 {
            return site;
        }
        let device = hash(device.as_bytes());
        if domains as f64 >= DOMAINS_MAX {
            return device;
        }
        hash(&[site.to_be_bytes(), (device % domains).to_be_bytes()].concat())
    }

    fn cell(&self, network: Network) -> &AtomicU32 {
        let at = usize::try_from(hash(&site(network)) % CELLS as u64).unwrap_or(0);
        &self.sessions[at]
    }
}

/// The IPv4 /24 or the IPv6 /48 of a network.
fn site(network: Network) -> [u8; 9] {
    let (kind, bits) = match network {
        Network::V4(address) => (4, u64::from(address & !0xff)),
        Network::V6(upper) => (6, upper & !0xffff),
    };
    let mut bytes = [kind; 9];
    bytes[1..].copy_from_slice(&bits.to_be_bytes());
    bytes
}

/// A hash that is the same on all nodes.
fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = SipHasher13::new();
    hasher.write(bytes);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::IpAddr};

    use uuid::Uuid;

    use super::*;

    fn network(address: &str) -> Network {
        Network::from(address.parse::<IpAddr>().unwrap())
    }

    fn domains(sites: &Sites, address: &str, total: usize) -> usize {
        let device = |n| DeviceId::from_uuid(Uuid::from_u128(n));
        let of = |n| sites.domain(network(address), device(n), total);
        (0..1_000).map(of).collect::<BTreeSet<_>>().len()
    }

    #[test]
    fn a_small_network_is_one_domain_and_a_carrier_is_many() {
        let sites = Sites::default();
        (0..40).for_each(|_| sites.handle_opened(network("192.0.2.7")));
        (0..1_000).for_each(|_| sites.handle_opened(network("198.51.100.1")));

        assert_eq!(domains(&sites, "192.0.2.99", 10_000), 1, "0.4 % of the fleet");
        assert_eq!(domains(&sites, "198.51.100.1", 10_000), 32, "10 % of the fleet");
        assert_eq!(domains(&sites, "198.51.100.1", 1_000), 1_000, "all of it");

        (0..1_000).for_each(|_| sites.handle_closed(network("198.51.100.1")));
        assert_eq!(domains(&sites, "198.51.100.1", 10_000), 1);
    }

    #[test]
    fn neighbours_are_one_site_and_others_are_not() {
        let sites = Sites::default();
        let domain = |address| sites.domain(network(address), DeviceId::from_uuid(Uuid::nil()), 100);

        assert_eq!(domain("192.0.2.1"), domain("192.0.2.200"));
        assert_eq!(domain("2001:db8:1::1"), domain("2001:db8:1:9::2"));
        assert_ne!(domain("192.0.2.1"), domain("192.0.3.1"));
        assert_ne!(domain("2001:db8:1::1"), domain("2001:db8:2::1"));
    }
}
