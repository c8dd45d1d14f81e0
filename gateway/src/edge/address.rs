//! Limits by address. They apply only under pressure, unless the operator sets fixed figures: 15,000 devices behind one
//! address may connect.
//!
//! Start with [`FairShare`]. While less than half of a bound is in use, no address is limited. Above that an address
//! may hold at most [`ALPHA`] times what is still free, and always at least an even share. This is a dynamic threshold:
//! the first address can never take everything. An IPv6 address stands for its /64, because a client usually has all of
//! it.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
pub use seawall_proto::id::Network;

/// With 8, a single address levels off at eight ninths of a bound. The last ninth stays free for others.
const ALPHA: usize = 8;

/// Addresses that a bound limits to their share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All: a unit is held for long (connections).
    Everyone,
    /// Those with a [slow](Share::mark_slow) unit. The other units are released soon (handshakes), so that a fleet
    /// behind one address waits for its turn instead of being rejected.
    TheSlow,
}

/// A bound shared by all addresses. Its table has one entry per address with a unit, so it never exceeds the bound.
#[derive(Debug)]
pub struct FairShare {
    bound: usize,
    scope: Scope,
    /// Configured maximum per address, which also applies without pressure.
    fixed_max: Option<usize>,
    held: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    used: usize,
    by_network: HashMap<Network, Held>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Held {
    count: usize,
    slow: usize,
}

/// One unit of the bound, held until dropped.
#[derive(Debug)]
pub struct Share {
    of: Arc<FairShare>,
    /// `None`: a load balancer's, until it has named its client.
    network: Option<Network>,
    is_slow: bool,
}

/// Why an address gets no unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exhausted {
    /// The bound is exhausted.
    Bound,
    /// The address has its share.
    Address,
}

impl FairShare {
    #[must_use]
    pub fn new(bound: usize, scope: Scope, fixed_max: Option<usize>) -> Arc<Self> {
        Arc::new(Self {
            bound,
            scope,
            fixed_max,
            held: Mutex::default(),
        })
    }

    /// The bound.
    #[must_use]
    pub const fn bound(&self) -> usize {
        self.bound
    }

    /// Takes one unit for `network`. Without a network it counts for the bound alone, until it is
    /// [settled](Share::settle).
    ///
    /// # Errors
    /// The bound is exhausted, or the address has its share.
    pub fn take(self: &Arc<Self>, network: Option<Network>) -> Result<Share, Exhausted> {
        let mut table = self.table();
        if table.used >= self.bound {
            return Err(Exhausted::Bound);
        }
        if let Some(network) = network {
            self.count(&mut table, network)?;
        }
        table.used += 1;
        drop(table);
        Ok(Share {
            of: Arc::clone(self),
            network,
            is_slow: false,
        })
    }

    /// Counts one more unit for an address.
    fn count(&self, table: &mut Table, network: Network) -> Result<(), Exhausted> {
        let held = table.by_network.get(&network).copied().unwrap_or_default();
        if held.count >= self.share(table, held) {
            return Err(Exhausted::Address);
        }
        table.by_network.entry(network).or_default().count += 1;
        Ok(())
    }

    /// Number of units held.
    #[must_use]
    pub fn used(&self) -> usize {
        self.table().used
    }

    /// Maximum number of units for an address that holds `held`.
    fn share(&self, table: &Table, held: Held) -> usize {
        let fixed = self.fixed_max.unwrap_or(usize::MAX);
        let is_held_to_it = match self.scope {
            Scope::Everyone => true,
            Scope::TheSlow => held.slow > 0,
        };
        if table.used.saturating_mul(2) <= self.bound || !is_held_to_it {
            return fixed;
        }
        fixed.min(self.fair(table))
    }

    fn fair(&self, table: &Table) -> usize {
        let dynamic = (self.bound - table.used.min(self.bound)).saturating_mul(ALPHA);
        dynamic.max(self.even(table)).max(1)
    }

    /// One more address than is seen: the one that waits to be accepted.
    fn even(&self, table: &Table) -> usize {
        self.bound / (table.by_network.len() + 1)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// Counts this unit for an address that has just become known.
    ///
    /// # Errors
    /// The address has its share.
    pub fn settle(&mut self, network: Network) -> Result<(), Exhausted> {
        if self.network.is_none() {
            self.of.count(&mut self.of.table(), network)?;
            self.network = Some(network);
        }
        Ok(())
    }

    /// Whether it is counted for an address.
    #[must_use]
    pub const fn is_settled(&self) -> bool {
        self.network.is_some()
    }

    /// Records that this unit is held for long.
    pub fn mark_slow(&mut self) {
        let Some(network) = self.network else { return };
        let mut table = self.of.table();
        if let Some(entry) = table.by_network.get_mut(&network) {
            entry.slow += usize::from(!self.is_slow);
        }
        self.is_slow = true;
    }

    /// Whether its address holds more than an even share. If others wait for a unit, they wait because of this address.
    #[must_use]
    pub fn is_of_a_crowd(&self) -> bool {
        let Some(network) = self.network else { return false };
        let table = self.of.table();
        let held = table.by_network.get(&network).map_or(0, |held| held.count);
        held > self.of.even(&table)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut table = self.of.table();
        table.used = table.used.saturating_sub(1);
        let Some(network) = self.network else { return };
        if let Some(held) = table.by_network.get_mut(&network) {
            held.count = held.count.saturating_sub(1);
            held.slow = held.slow.saturating_sub(usize::from(self.is_slow));
            if held.count == 0 {
                table.by_network.remove(&network);
            }
        }
    }
}

/// Handshakes per second from one address, if the operator set a maximum.
///
/// Networks are mapped to 65,536 cells by a keyed hash, so that the memory is bounded for any addresses: about 1.5 MB.
/// Two networks in one cell share a rate; a client cannot choose its cell.
pub struct HandshakeRate {
    limiter: DefaultKeyedRateLimiter<u16>,
    hasher: RandomState,
}

impl HandshakeRate {
    /// `per_second` sustained, and as many in one burst.
    #[must_use]
    pub fn new(per_second: NonZeroU32) -> Self {
        Self {
            limiter: RateLimiter::keyed(Quota::per_second(per_second)),
            hasher: RandomState::new(),
        }
    }

    /// Takes one handshake. Returns `false` if the address has exceeded its rate.
    #[must_use]
    pub fn allows(&self, network: Network) -> bool {
        let [a, b, ..] = self.hasher.hash_one(network).to_be_bytes();
        self.limiter.check_key(&u16::from_be_bytes([a, b])).is_ok()
    }

    /// Forgets addresses that were idle for a while. Takes the locks of the table one after the other: do not call it
    /// in an async task.
    pub fn forget_idle(&self) {
        self.limiter.retain_recent();
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr};

    use super::*;

    fn v4(last: u32) -> Option<Network> {
        Some(Network::V4(last))
    }

    /// Takes units until one is refused.
    fn take_all(share: &Arc<FairShare>, network: Option<Network>) -> Vec<Share> {
        std::iter::from_fn(|| share.take(network).ok()).collect()
    }

    #[test]
    fn ipv6_counts_by_its_upper_half_and_mapped_ipv4_as_ipv4() {
        let ipv6 = |text: &str| Network::from(IpAddr::V6(text.parse::<Ipv6Addr>().unwrap()));

        assert_eq!(ipv6("2001:db8::1"), ipv6("2001:db8::ffff:1"));
        assert_ne!(ipv6("2001:db8::1"), ipv6("2001:db8:0:1::1"));
        assert_eq!(ipv6("::ffff:10.0.0.1"), Network::from(IpAddr::from([10, 0, 0, 1])));
    }

    #[test]
    fn fifteen_thousand_devices_behind_one_address_fit_under_twenty_thousand() {
        let share = FairShare::new(19_500, Scope::Everyone, None);

        let held = take_all(&share, v4(1));

        assert!(held.len() > 15_000, "{}", held.len());
        assert_eq!(share.take(v4(1)).unwrap_err(), Exhausted::Address);
    }

    #[test]
    fn one_address_never_takes_everything() {
        let share = FairShare::new(900, Scope::Everyone, None);

        let flood = take_all(&share, v4(1));

        assert!((800..=801).contains(&flood.len()), "{}", flood.len());
        let others: Vec<_> = (2..90).map(|n| share.take(v4(n)).unwrap()).collect();
        assert_eq!(others.len(), 88);
    }

    #[test]
    fn every_address_has_an_even_share_and_no_less() {
        let share = FairShare::new(100, Scope::Everyone, None);
        let first = take_all(&share, v4(1));
        let second = take_all(&share, v4(2));
        drop(first);

        assert!(share.take(v4(3)).is_ok());
        assert!(!second.is_empty());
    }

    #[test]
    fn used_up_bound_is_told_apart() {
        let share = FairShare::new(2, Scope::Everyone, None);
        let _one = share.take(v4(1)).unwrap();
        let _two = share.take(v4(2)).unwrap();

        assert_eq!(share.take(v4(3)).unwrap_err(), Exhausted::Bound);
    }

    #[test]
    fn what_is_dropped_is_free_again_and_forgotten() {
        let share = FairShare::new(4, Scope::Everyone, None);

        drop(take_all(&share, v4(1)));

        assert_eq!(share.used(), 0);
        assert!(share.table().by_network.is_empty());
    }

    #[test]
    fn unit_of_a_balancer_counts_for_nobody_until_it_is_settled() {
        let share = FairShare::new(10, Scope::Everyone, Some(2));
        let mut held = take_all(&share, None);
        assert_eq!((held.len(), share.table().by_network.len()), (10, 0));
        held.truncate(3);

        let settled: Vec<_> = held.iter_mut().map(|unit| unit.settle(Network::V4(1))).collect();

        assert_eq!(settled, [Ok(()), Ok(()), Err(Exhausted::Address)]);
        drop(held);
        assert_eq!((share.used(), share.table().by_network.len()), (0, 0));
    }

    #[test]
    fn fixed_figure_holds_without_pressure() {
        let share = FairShare::new(1_000, Scope::Everyone, Some(3));

        assert_eq!(take_all(&share, v4(1)).len(), 3);
        assert!(share.take(v4(2)).is_ok());
    }

    #[test]
    fn crowd_of_quick_ones_may_use_the_whole_bound() {
        let share = FairShare::new(500, Scope::TheSlow, None);

        assert_eq!(take_all(&share, v4(1)).len(), 500);
    }

    #[test]
    fn slow_ones_are_held_to_their_share() {
        let share = FairShare::new(500, Scope::TheSlow, None);
        let mut held = take_all(&share, v4(1));

        held.iter_mut().for_each(Share::mark_slow);
        held.truncate(250);

        let more = take_all(&share, v4(1));
        assert!(held.len() + more.len() < 450, "{}", more.len());
        assert!(share.take(v4(2)).is_ok());
    }

    #[test]
    fn an_address_is_a_crowd_until_it_holds_an_even_share() {
        let share = FairShare::new(500, Scope::TheSlow, None);
        let mut crowd = take_all(&share, v4(1));

        while crowd.last().is_some_and(Share::is_of_a_crowd) {
            crowd.pop();
        }

        assert_eq!(crowd.len(), 250);
        let other = share.take(v4(2)).unwrap();
        assert!(crowd[0].is_of_a_crowd() && !other.is_of_a_crowd());
    }

    #[test]
    fn handshake_rate_is_counted_by_address() {
        let rate = HandshakeRate::new(NonZeroU32::new(2).unwrap());

        assert_eq!((0..5).filter(|_| rate.allows(Network::V4(1))).count(), 2);
        rate.forget_idle();
        assert!(!rate.allows(Network::V4(1)));
        assert!((2..100).any(|n| rate.allows(Network::V4(n))));
    }
}
