//! The virtual queues that slots are taken from: one a tenant, weighted, and one for all strangers.
//!
//! Taking a place is a GCRA that commits although the device is refused: the committed time is its slot. A tenant is slowed
//! down only by tenants that are still backlogged at the time in question, so that the whole rate is given out.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::Duration,
};

use super::token::TenantTag;
use crate::time::Instant;

/// Share of the rate that strangers get while tenants are backlogged. At most 20 % is asked for, and that the fleet is back within 1.1 times
/// the optimum beside 10,000 random ids a second: with 20 % it is not, with a twentieth it is.
pub(crate) const STRANGERS_SHARE: f64 = 0.05;
/// A place further ahead than this is given to several strangers: their ids are free to invent, and must not fill the queue for days.
const STRANGERS_HORIZON: Duration = Duration::from_secs(3_600);
/// The same for tenants, whose queue moves once a slot and device: reached only if the memory of slots is full.
const TENANTS_HORIZON: Duration = Duration::from_secs(24 * 3_600);

/// Places to be given twice, of all tenants together; further ones are given once.
const SHARED_MAX: usize = 65_536;
/// Where there are as many, past ones are looked for this often.
const PURGE_EVERY: Duration = Duration::from_secs(1);
/// Past places dropped a call, so that no call takes long.
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

    /// At least 1; that of strangers and of tenants that are not named.
    pub fn of(&self, tenant: Option<TenantTag>) -> u32 {
        tenant
            .and_then(|tenant| self.0.get(&tenant))
            .map_or(1, |weight| (*weight).max(1))
    }
}

/// The tails of all virtual queues.
#[derive(Debug)]
pub(super) struct Tenants {
    /// Only tenants that were backlogged lately; bounded by `tenants_max`.
    tails: BTreeMap<TenantTag, Tail>,
    /// Tenants beyond `tenants_max`, together.
    rest: Tail,
    strangers: Tail,
    weights: Weights,
    tenants_max: usize,
    /// Places to be given once more, whose devices don't keep to them; the earliest first. Of at most [`SHARED_MAX`] places.
    shared: BTreeMap<TenantTag, BinaryHeap<Reverse<Instant>>>,
    shared_len: usize,
    /// The next place whose device does not keep to it is given once more; see [`Tenants::share`].
    is_next_shared: bool,
    purged_at: Instant,
}

/// The end of one queue. Nanoseconds: at a million slots a second, microseconds would round by too much.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tail {
    nanos: u64,
    weight: f64,
}

impl Tail {
    pub const fn empty(weight: f64) -> Self {
        Self { nanos: 0, weight }
    }

    /// The next place not before `from` in a queue that has `rate` places a second to itself.
    pub fn take(&mut self, from: Instant, rate: f64) -> Instant {
        let base = self.base(from, STRANGERS_HORIZON);
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
            tails: BTreeMap::new(),
            rest: Tail::empty(1.0),
            strangers: Tail::empty(1.0),
            weights: Weights::new(weights),
            tenants_max,
            shared: BTreeMap::new(),
            shared_len: 0,
            is_next_shared: true,
            purged_at: Instant::ZERO,
        }
    }

    /// The device that has this place does not keep to it. Every other such place is given once more: their devices come all the same, a few
    /// seconds late. With all of them the queue is full when those come: a fleet with a fifth of such devices is back after 1.10 of the
    /// optimum; with half of them after 1.07, and the obedient after 0.92 (simulated).
    pub fn share(&mut self, tenant: TenantTag, place: Instant, now: Instant) {
        self.is_next_shared = !self.is_next_shared;
        if self.is_next_shared {
            return;
        }
        if self.shared_len >= SHARED_MAX && self.purged_at + PURGE_EVERY <= now {
            self.purged_at = now;
            self.shared.retain(|_, places| {
                while places.peek().is_some_and(|Reverse(place)| *place < now) {
                    places.pop();
                }
                !places.is_empty()
            });
            self.shared_len = self.shared.values().map(BinaryHeap::len).sum();
        }
        if self.shared_len < SHARED_MAX {
            self.shared.entry(tenant).or_default().push(Reverse(place));
            self.shared_len += 1;
        }
    }

    /// Places that wait to be given once more.
    #[cfg(test)]
    pub const fn shared(&self) -> usize {
        self.shared_len
    }

    /// The earliest of the tenant's places to be given once more, if it is not before `at_least`. Those before `from` are past.
    pub fn take_shared(&mut self, tenant: TenantTag, from: Instant, at_least: Instant) -> Option<Instant> {
        let places = self.shared.get_mut(&tenant)?;
        let mut found = None;
        for _ in 0..PURGE_STEPS {
            match places.peek() {
                Some(Reverse(place)) if *place < from => drop(places.pop()),
                Some(Reverse(place)) if *place >= at_least => {
                    found = Some(*place);
                    places.pop();
                }
                Some(_) | None => break,
            }
            self.shared_len -= 1;
            if found.is_some() {
                break;
            }
        }
        if places.is_empty() {
            self.shared.remove(&tenant);
        }
        found
    }
    /// The next place not before `from` in the queue of `tenant` (of the strangers if `None`), where `rate` places a second
    /// are given out in all.
    pub fn take(&mut self, tenant: Option<TenantTag>, from: Instant, rate: f64) -> Instant {
        let Some(tenant) = tenant else {
            return self.take_as_stranger(from, rate);
        };
        let queue = self.queue_of(tenant, from);
        let own = *self.tail(queue);
        let base = own.base(from, TENANTS_HORIZON);
        let all: f64 = self
            .queues()
            .filter(|tail| tail.nanos > base)
            .map(|tail| tail.weight)
            .sum();
        // The own tail is not after its own base, unless the horizon cut it: then it is among the rivals already.
        let all = if own.nanos > base { all } else { all + own.weight };
        let tail = self.tail(queue);
        tail.nanos = base.saturating_add(step(rate * own.weight / all));
        Instant::from_micros(base / 1_000)
    }

    /// Strangers don't move a tenant's tail, and tenants that are backlogged leave them a small share.
    fn take_as_stranger(&mut self, from: Instant, rate: f64) -> Instant {
        let base = self.strangers.base(from, STRANGERS_HORIZON);
        let contended = self.queues().any(|tail| tail.nanos > base);
        let share = if contended { STRANGERS_SHARE } else { 1.0 };
        self.strangers.nanos = base.saturating_add(step(rate * share));
        Instant::from_micros(base / 1_000)
    }

    /// `None`: the shared queue of the rest.
    fn queue_of(&mut self, tenant: TenantTag, from: Instant) -> Option<TenantTag> {
        if self.tails.contains_key(&tenant) {
            return Some(tenant);
        }
        if self.tails.len() >= self.tenants_max {
            let from = nanos(from);
            self.tails.retain(|_, tail| tail.nanos > from);
        }
        if self.tails.len() >= self.tenants_max {
            return None;
        }
        let weight = f64::from(self.weights.of(Some(tenant)));
        self.tails.insert(tenant, Tail::empty(weight));
        Some(tenant)
    }

    fn tail(&mut self, queue: Option<TenantTag>) -> &mut Tail {
        match queue {
            Some(tenant) => self.tails.entry(tenant).or_insert(Tail::empty(1.0)),
            None => &mut self.rest,
        }
    }

    fn queues(&self) -> impl Iterator<Item = &Tail> {
        self.tails.values().chain([&self.rest])
    }
}

fn nanos(at: Instant) -> u64 {
    at.as_micros().saturating_mul(1_000)
}

/// Nanoseconds between two places at `rate` a second.
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
    fn strangers_never_move_a_tenants_tail() {
        let mut tenants = tenants(16);
        for _ in 0..100_000 {
            tenants.take(None, Instant::ZERO, RATE);
        }

        assert_eq!(last_of(&mut tenants, "a", 1_001), Duration::from_secs(1));
    }

    #[test]
    fn strangers_get_the_whole_rate_alone_and_a_small_share_under_contention() {
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

        assert_eq!(tenants.tails.len(), 4);
    }

    #[test]
    fn endless_strangers_stay_within_the_horizon() {
        let mut tenants = tenants(4);

        let last = (0..100_000).map(|_| tenants.take(None, Instant::ZERO, 1.0)).last();

        assert!(last <= Some(Instant::ZERO + STRANGERS_HORIZON), "{last:?}");
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
        let place = Instant::ZERO + Duration::from_secs(3);
        tenants.share(tenant, place, Instant::ZERO);

        let (now, later) = (Instant::ZERO, Instant::ZERO + Duration::from_secs(5));

        assert_eq!(tenants.take_shared(tenant, now, later), None);
        assert_eq!(tenants.take_shared(tenant, now, now), Some(place));
    }
}
