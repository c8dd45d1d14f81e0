//! The virtual queues from which slots are taken: one for each tenant, weighted, and one for all unknown devices.
//!
//! A virtual queue is a GCRA that commits its time although the device is refused: this time is the slot. A tenant
//! is slowed down only by tenants that are still backlogged at that time, so that the whole rate is given out.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::Duration,
};

use super::token::TenantTag;
use crate::time::Instant;

/// Share of the rate that unknown devices get while tenants are backlogged. With 5 % the fleet returns within 1.1
/// times the optimum beside 10,000 random ids a second, with 20 % it does not.
pub(crate) const UNKNOWN_SHARE: f64 = 0.05;
/// Maximum length of the unknown devices' queue. A time beyond it is issued several times: their ids can be invented
/// freely.
const UNKNOWN_HORIZON: Duration = Duration::from_secs(3_600);
/// Maximum length of a tenant's queue. It is reached only if the memory of slots is full.
const TENANTS_HORIZON: Duration = Duration::from_secs(24 * 3_600);

/// Maximum number of times to issue once more, of all tenants. Further ones are issued once.
const SHARED_MAX: usize = 65_536;
/// Minimum time between two purges of past ones while the maximum is reached.
const PURGE_EVERY: Duration = Duration::from_secs(1);
/// Maximum number of past times dropped in a call.
const PURGE_STEPS: usize = 64;

/// Weights of tenants, as configured.
#[derive(Debug, Default)]
pub(crate) struct Weights(BTreeMap<TenantTag, u32>);

impl Weights {
    pub fn new(named: &BTreeMap<String, u32>) -> Self {
        Self(
            named
                .iter()
                .map(|(name, weight)| (TenantTag::of(name), *weight))
                .collect(),
        )
    }

    /// Weight of a tenant, at least 1. That of unknown devices and of tenants that are not named is 1.
    pub fn of(&self, tenant: Option<TenantTag>) -> u32 {
        tenant
            .and_then(|tenant| self.0.get(&tenant))
            .map_or(1, |weight| (*weight).max(1))
    }
}

/// All virtual queues.
#[derive(Debug)]
pub(super) struct Tenants {
    /// Tenants that were backlogged lately, at most `tenants_max`.
    ends: BTreeMap<TenantTag, QueueEnd>,
    /// Tenants beyond `tenants_max`.
    rest: QueueEnd,
    unknown: QueueEnd,
    weights: Weights,
    tenants_max: usize,
    /// Times to issue once more, whose devices do not follow hints; the earliest first. At most [`SHARED_MAX`].
    shared: BTreeMap<TenantTag, BinaryHeap<Reverse<Instant>>>,
    shared_len: usize,
    /// Whether the next such time is issued once more; see [`Tenants::share`].
    is_next_shared: bool,
    purged_at: Instant,
}

/// End of a virtual queue. In nanoseconds: at a million slots per second, microseconds would round by too much.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueEnd {
    nanos: u64,
    weight: f64,
}

impl QueueEnd {
    pub const fn empty(weight: f64) -> Self {
        Self { nanos: 0, weight }
    }

    /// Takes the next time not before `from`, in a queue that has `rate` slots per second to itself.
    pub fn take(&mut self, from: Instant, rate: f64) -> Instant {
        let base = self.base(from, UNKNOWN_HORIZON);
        self.nanos = base.saturating_add(step(rate));
        Instant::from_micros(base / 1_000)
    }

    fn base(&self, from: Instant, horizon: Duration) -> u64 {
        self.nanos.clamp(nanos(from), nanos(from + horizon))
    }
}

impl Tenants {
    pub fn new(weights: &BTreeMap<String, u32>, tenants_max: usize) -> Self {
        Self {
            ends: BTreeMap::new(),
            rest: QueueEnd::empty(1.0),
            unknown: QueueEnd::empty(1.0),
            weights: Weights::new(weights),
            tenants_max,
            shared: BTreeMap::new(),
            shared_len: 0,
            is_next_shared: true,
            purged_at: Instant::ZERO,
        }
    }

    /// The device of this time does not follow hints. Every other such time is issued once more; docs/design/slots.md
    /// has the figures.
    pub fn share(&mut self, tenant: TenantTag, time: Instant, now: Instant) {
        self.is_next_shared = !self.is_next_shared;
        if self.is_next_shared {
            return;
        }
        if self.shared_len >= SHARED_MAX && self.purged_at + PURGE_EVERY <= now {
            self.purged_at = now;
            self.shared.retain(|_, times| {
                while times.peek().is_some_and(|Reverse(time)| *time < now) {
                    times.pop();
                }
                !times.is_empty()
            });
            self.shared_len = self.shared.values().map(BinaryHeap::len).sum();
        }
        if self.shared_len < SHARED_MAX {
            self.shared.entry(tenant).or_default().push(Reverse(time));
            self.shared_len += 1;
        }
    }

    /// Number of times to issue once more.
    #[cfg(test)]
    pub const fn shared(&self) -> usize {
        self.shared_len
    }

    /// Takes the earliest of the tenant's times to issue once more, if it is not before `at_least`. Times before `from`
    /// are past.
    pub fn take_shared(&mut self, tenant: TenantTag, from: Instant, at_least: Instant) -> Option<Instant> {
        let times = self.shared.get_mut(&tenant)?;
        let mut found = None;
        for _ in 0..PURGE_STEPS {
            match times.peek() {
                Some(Reverse(time)) if *time < from => drop(times.pop()),
                Some(Reverse(time)) if *time >= at_least => {
                    found = Some(*time);
                    times.pop();
                }
                Some(_) | None => break,
            }
            self.shared_len -= 1;
            if found.is_some() {
                break;
            }
        }
        if times.is_empty() {
            self.shared.remove(&tenant);
        }
        found
    }

    /// Takes the next time not before `from` in the queue of `tenant` (of unknown devices if `None`). All queues
    /// together have `rate` slots per second.
    pub fn take(&mut self, tenant: Option<TenantTag>, from: Instant, rate: f64) -> Instant {
        let Some(tenant) = tenant else {
            return self.take_as_unknown(from, rate);
        };
        let queue = self.queue_of(tenant, from);
        let own = *self.end(queue);
        let base = own.base(from, TENANTS_HORIZON);
        let all: f64 = self.queues().filter(|end| end.nanos > base).map(|end| end.weight).sum();
        // The own end is not after its base, unless the horizon cut it: then it is among the rivals already.
        let all = if own.nanos > base { all } else { all + own.weight };
        let end = self.end(queue);
        end.nanos = base.saturating_add(step(rate * own.weight / all));
        Instant::from_micros(base / 1_000)
    }

    /// Unknown devices do not move a tenant's end. Backlogged tenants leave them a small share.
    fn take_as_unknown(&mut self, from: Instant, rate: f64) -> Instant {
        let base = self.unknown.base(from, UNKNOWN_HORIZON);
        let contended = self.queues().any(|end| end.nanos > base);
        let share = if contended { UNKNOWN_SHARE } else { 1.0 };
        self.unknown.nanos = base.saturating_add(step(rate * share));
        Instant::from_micros(base / 1_000)
    }

    /// `None` for the shared queue of the rest.
    fn queue_of(&mut self, tenant: TenantTag, from: Instant) -> Option<TenantTag> {
        if self.ends.contains_key(&tenant) {
            return Some(tenant);
        }
        if self.ends.len() >= self.tenants_max {
            let from = nanos(from);
            self.ends.retain(|_, end| end.nanos > from);
        }
        if self.ends.len() >= self.tenants_max {
            return None;
        }
        let weight = f64::from(self.weights.of(Some(tenant)));
        self.ends.insert(tenant, QueueEnd::empty(weight));
        Some(tenant)
    }

    fn end(&mut self, queue: Option<TenantTag>) -> &mut QueueEnd {
        match queue {
            Some(tenant) => self.ends.entry(tenant).or_insert(QueueEnd::empty(1.0)),
            None => &mut self.rest,
        }
    }

    fn queues(&self) -> impl Iterator<Item = &QueueEnd> {
        self.ends.values().chain([&self.rest])
    }
}

fn nanos(at: Instant) -> u64 {
    at.as_micros().saturating_mul(1_000)
}

/// Nanoseconds between two slots at `rate` slots per second.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the rate is positive; a float too large saturates"
)]
fn step(rate: f64) -> u64 {
    (1e9 / rate.max(1e-3)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: f64 = 1_000.0;

    fn tenants(max: usize) -> Tenants {
        Tenants::new(&BTreeMap::from([("heavy".to_owned(), 3)]), max)
    }

    fn last_of(tenants: &mut Tenants, name: &str, count: usize) -> Duration {
        let from = Instant::ZERO;
        (0..count)
            .map(|_| tenants.take(Some(TenantTag::of(name)), from, RATE))
            .last()
            .unwrap_or(from)
            .saturating_since(from)
    }

    #[test]
    fn slots_of_one_tenant_are_given_out_at_the_rate() {
        let mut tenants = tenants(16);

        assert_eq!(last_of(&mut tenants, "a", 1_001), Duration::from_secs(1));
    }

    #[test]
    fn small_tenant_waits_its_share_of_a_great_ones_backlog() {
        let mut tenants = tenants(16);
        last_of(&mut tenants, "great", 90_000);

        let small = last_of(&mut tenants, "small", 501);

        assert_eq!(small, Duration::from_secs(1), "half of the rate, not behind 90 s");
    }

    #[test]
    fn heavy_tenant_gets_its_weight() {
        let mut tenants = tenants(16);
        last_of(&mut tenants, "light", 10_000);

        let heavy = last_of(&mut tenants, "heavy", 751);

        assert!(
            heavy.abs_diff(Duration::from_secs(1)) < Duration::from_millis(1),
            "{heavy:?}"
        );
    }

    #[test]
    fn unknown_devices_never_move_the_end_of_a_tenants_queue() {
        let mut tenants = tenants(16);
        for _ in 0..100_000 {
            tenants.take(None, Instant::ZERO, RATE);
        }

        assert_eq!(last_of(&mut tenants, "a", 1_001), Duration::from_secs(1));
    }

    #[test]
    fn unknown_devices_get_the_whole_rate_alone_and_a_small_share_under_contention() {
        let mut alone = tenants(16);
        let mut contended = tenants(16);
        last_of(&mut contended, "a", 50_000);

        let last = |tenants: &mut Tenants| (0..101).map(|_| tenants.take(None, Instant::ZERO, RATE)).last();

        assert_eq!(last(&mut alone), Some(Instant::from_micros(100_000)));
        assert_eq!(last(&mut contended), Some(Instant::from_micros(2_000_000)));
    }

    #[test]
    fn tenants_are_bounded_and_the_rest_share_a_queue() {
        let mut tenants = tenants(4);
        for n in 0..1_000 {
            last_of(&mut tenants, &format!("t{n}"), 2);
        }

        assert_eq!(tenants.ends.len(), 4);
    }

    #[test]
    fn endless_unknown_devices_stay_within_the_horizon() {
        let mut tenants = tenants(4);

        let last = (0..100_000).map(|_| tenants.take(None, Instant::ZERO, 1.0)).last();

        assert!(last <= Some(Instant::ZERO + UNKNOWN_HORIZON), "{last:?}");
    }

    #[test]
    fn shared_places_are_bounded_and_past_ones_make_room() {
        let mut tenants = tenants(4);
        let (absent, other) = (TenantTag::of("a"), TenantTag::of("b"));
        for n in 0..200_000 {
            tenants.share(absent, Instant::from_micros(n), Instant::ZERO);
        }
        assert_eq!(tenants.shared(), SHARED_MAX);

        let now = Instant::ZERO + Duration::from_secs(2);
        tenants.share(other, now, now);

        assert_eq!(tenants.shared(), 1);
        assert_eq!(tenants.take_shared(absent, now, now), None);
        assert_eq!(tenants.take_shared(other, now, now), Some(now));
    }

    #[test]
    fn shared_place_too_early_for_one_is_left_to_another() {
        let mut tenants = tenants(4);
        let tenant = TenantTag::of("a");
        let time = Instant::ZERO + Duration::from_secs(3);
        tenants.share(tenant, time, Instant::ZERO);

        let (now, later) = (Instant::ZERO, Instant::ZERO + Duration::from_secs(5));

        assert_eq!(tenants.take_shared(tenant, now, later), None);
        assert_eq!(tenants.take_shared(tenant, now, now), Some(time));
    }
}
