//! Rates of rules with effect `throttle`. A device over the rate gets a place in the rule's virtual queue: the time at
//! which the rate has room for it. docs/design/rules.md has the formula and the bounds.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    time::Duration,
};

use rand::Rng;

use crate::{
    hint::draw,
    id::{DeviceId, RuleId},
    rate::{Gcra, Rate},
    rules::{Rule, RuleSet, RuleSpec},
    time::Instant,
};

/// Maximum number of devices with a place, over all rules.
const PLACES_MAX: usize = 50_000;
/// A device may return this long before its place.
const EARLY_MAX: Duration = Duration::from_millis(300);
/// A place is kept for this long after its time, or after the hint of a later refusal.
const LATE_MAX: Duration = Duration::from_secs(60);
/// A hint is drawn from the time until the place to this much later.
const HINT_SPREAD: Duration = Duration::from_secs(2);
/// Longest place. Devices beyond it get a hint from [`FAR_HINT`] and no place.
const PLACE_MAX: Duration = Duration::from_secs(600);
const FAR_HINT: RangeInclusive<Duration> = Duration::from_secs(450)..=PLACE_MAX;
/// Part of the reference capacity that is the rate of a rule without a rate of its own: a twentieth.
const PART_OF_CAPACITY: f64 = 20.0;
/// Attempts that a place lets past. Beyond that the device is a newcomer.
const PASSES_MAX: u8 = 3;
/// Devices that nothing is known of share this part of a rule's rate, beside those that are known.
const UNKNOWN_PART: u32 = 4;
/// How long an unknown device stays away if there is no room: it gets no place.
const UNKNOWN_HINT: RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(120);
/// Expired places that are removed for each question.
const REMOVED_AT_ONCE_MAX: usize = 8;

/// A rule that throttles a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Throttle {
    pub rule: RuleId,
    /// `None`: by the capacity.
    per_second: Option<u32>,
}

impl Throttle {
    pub fn by(rule: &Rule) -> Self {
        Self {
            rule: rule.id,
            per_second: rule.spec.rate_per_second,
        }
    }

    /// `k_ref`: keys per second that the database is known to answer. The burst is that of one second.
    fn rate(self, k_ref: f64) -> Rate {
        let per_second = self.events(k_ref);
        Rate::per_second(per_second, per_second)
    }

    /// The rate of all unknown devices together.
    fn rate_of_unknown(self, k_ref: f64) -> Rate {
        let per_second = self.events(k_ref);
        let interval = Duration::from_secs(1) * UNKNOWN_PART / per_second;
        Rate::every(interval, per_second / UNKNOWN_PART)
    }

    fn events(self, k_ref: f64) -> u32 {
        let own = || (k_ref / PART_OF_CAPACITY).clamp(1.0, f64::from(RuleSpec::RATE_MAX)) as u32;
        self.per_second.unwrap_or_else(own)
    }
}

/// A device that asks for room.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asking {
    pub device: DeviceId,
    /// It was seen authenticated, or is registered as far as this node knows. Only such devices get places: anybody
    /// can name new ids.
    pub is_known: bool,
    /// It takes part of the rate, and is never refused.
    pub is_exempt: bool,
}

/// The rates of all rules that throttle, and the places of devices.
#[derive(Clone, Debug, Default)]
pub(super) struct Throttles {
    /// Bounded by the rules in force.
    queues: BTreeMap<RuleId, Queue>,
    places: BTreeMap<DeviceId, Place>,
    /// The places by their ends.
    ends: BTreeSet<(Instant, DeviceId)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Queue {
    gcra: Gcra,
    unknown: Gcra,
    /// As the rule says: another rate starts over.
    per_second: Option<u32>,
}

/// Part of the rate that is kept for a device.
#[derive(Clone, Copy, Debug)]
struct Place {
    rule: RuleId,
    at: Instant,
    /// From then on it is lost.
    until: Instant,
    passes_left: u8,
}

impl Throttles {
    /// Whether the rate has room for a device that connects now.
    ///
    /// # Errors
    /// It has none. The device should return after this time, not before.
    pub fn take(
        &mut self,
        throttle: Throttle,
        asking: Asking,
        k_ref: f64,
        now: Instant,
        rng: &mut impl Rng,
    ) -> Result<(), Duration> {
        let taken = self.taken(throttle, asking, k_ref, now, rng);
        if asking.is_exempt { Ok(()) } else { taken }
    }

    fn taken(
        &mut self,
        throttle: Throttle,
        asking: Asking,
        k_ref: f64,
        now: Instant,
        rng: &mut impl Rng,
    ) -> Result<(), Duration> {
        let device = asking.device;
        self.remove_expired(now);
        let Throttle { rule, per_second } = throttle;
        let is_changed = |queue: &Queue| queue.per_second != per_second;
        if self.queues.get(&rule).is_some_and(is_changed) {
            self.queues.remove(&rule);
            self.remove_places(|place| place.rule == rule);
        }
        let place = self.places.get_mut(&device);
        if let Some(place) = place.filter(|place| place.rule == rule && place.until > now) {
            let early = place.at.saturating_since(now);
            if early > EARLY_MAX {
                return Err(hint_for(early, rng));
            }
            if let Some(left) = place.passes_left.checked_sub(1) {
                place.passes_left = left;
                return Ok(());
            }
        }
        self.remove(device);
        let queue = self.queues.entry(rule).or_insert(Queue {
            per_second,
            ..Queue::default()
        });
        if !asking.is_known {
            let taken = queue.unknown.take(1, throttle.rate_of_unknown(k_ref), now);
            return taken.map_err(|_| draw(UNKNOWN_HINT, rng));
        }
        let rate = throttle.rate(k_ref);
        let at = match queue.gcra.take(1, rate, now) {
            Ok(()) => now,
            Err(next) => {
                let wait = next.saturating_since(now);
                if wait > *FAR_HINT.start() {
                    return Err(draw(FAR_HINT, rng));
                }
                if self.places.len() >= PLACES_MAX {
                    // A device without a place returns after those that have one.
                    return Err(draw(wait..=(wait * 2).max(LATE_MAX).min(PLACE_MAX), rng));
                }
                queue.gcra.reserve(rate, now)
            }
        };
        let wait = at.saturating_since(now);
        let is_past = wait.is_zero() || asking.is_exempt;
        // It is kept until the device is admitted: a limit behind this one may send it away once more.
        self.keep(
            device,
            Place {
                rule,
                at,
                until: at + LATE_MAX,
                passes_left: PASSES_MAX - u8::from(is_past),
            },
        );
        if wait.is_zero() {
            Ok(())
        } else {
            Err(hint_for(wait, rng))
        }
    }

    /// A limit behind this one has sent the device away for this time: its place waits for it.
    pub fn handle_refused(&mut self, device: DeviceId, after: Duration, now: Instant) {
        if let Some(mut place) = self.remove(device) {
            place.until = place.until.max(now + after + LATE_MAX);
            place.passes_left = PASSES_MAX;
            self.keep(device, place);
        }
    }

    /// The device is admitted, or refused for good. Its next attempt needs another place.
    pub fn handle_ended(&mut self, device: DeviceId) {
        self.remove(device);
    }

    /// Forgets rules that are not in force any more. Those that are keep what they know.
    pub fn handle_rules(&mut self, rules: &RuleSet) {
        if self.queues.is_empty() {
            return;
        }
        let in_force: BTreeSet<RuleId> = rules.rules().iter().map(|rule| rule.id).collect();
        self.queues.retain(|rule, _| in_force.contains(rule));
        self.remove_places(|place| !in_force.contains(&place.rule));
    }

    fn keep(&mut self, device: DeviceId, place: Place) {
        self.remove(device);
        if self.places.len() < PLACES_MAX {
            self.places.insert(device, place);
            self.ends.insert((place.until, device));
        }
    }

    fn remove(&mut self, device: DeviceId) -> Option<Place> {
        let place = self.places.remove(&device)?;
        self.ends.remove(&(place.until, device));
        Some(place)
    }

    fn remove_places(&mut self, is_removed: impl Fn(&Place) -> bool) {
        self.places.retain(|_, place| !is_removed(place));
        let places = &self.places;
        self.ends.retain(|(_, device)| places.contains_key(device));
    }

    fn remove_expired(&mut self, now: Instant) {
        for _ in 0..REMOVED_AT_ONCE_MAX {
            let Some((until, device)) = self.ends.first().copied().filter(|(until, _)| *until <= now) else {
                return;
            };
            self.ends.remove(&(until, device));
            self.places.remove(&device);
        }
    }
}

/// The hint of a device whose place is after `wait`.
fn hint_for(wait: Duration, rng: &mut impl Rng) -> Duration {
    draw(wait..=wait + HINT_SPREAD, rng)
}

#[cfg(test)]
mod tests {
    use std::collections::BinaryHeap;

    use rand::{SeedableRng, rngs::SmallRng};
    use uuid::Uuid;

    use super::*;
    use crate::{
        rules::{Effect, Match},
        time::WallTime,
    };

    fn device(number: u64) -> DeviceId {
        DeviceId::from_uuid(Uuid::from_u128(number.into()))
    }

    fn rule(number: u128, rate_per_second: Option<u32>) -> Rule {
        Rule {
            id: RuleId(Uuid::from_u128(number)),
            spec: RuleSpec {
                rate_per_second,
                ..RuleSpec::new(Match::default(), Effect::Throttle)
            },
            created_at: WallTime::from_unix_ms(1),
            revision: 1,
        }
    }

    fn known(number: u64) -> Asking {
        Asking {
            device: device(number),
            is_known: true,
            is_exempt: false,
        }
    }

    fn throttle(number: u128, rate_per_second: u32) -> Throttle {
        Throttle::by(&rule(number, Some(rate_per_second)))
    }

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1_000)
    }

    /// Devices that come at once, return when they are told, and leave once they are admitted. Returns when they are
    /// admitted, in milliseconds, and the number of attempts.
    fn storm(devices: u64, throttle: Throttle) -> (Vec<u64>, u64) {
        let (mut throttles, mut rng) = (Throttles::default(), SmallRng::seed_from_u64(1));
        let arrivals = (0..devices).map(|number| std::cmp::Reverse((number % 1_000, number)));
        let mut arrivals: BinaryHeap<_> = arrivals.collect();
        let (mut let_in, mut attempts) = (Vec::new(), 0);
        while let Some(std::cmp::Reverse((ms, number))) = arrivals.pop() {
            attempts += 1;
            match throttles.take(throttle, known(number), 1_000.0, at(ms), &mut rng) {
                Ok(()) => {
                    throttles.handle_ended(device(number));
                    let_in.push(ms);
                }
                // Told in whole milliseconds.
                Err(after) => {
                    let after = u64::try_from(after.as_millis()).unwrap().max(1);
                    arrivals.push(std::cmp::Reverse((ms + after, number)));
                }
            }
            assert!(throttles.places.len() <= PLACES_MAX && throttles.places.len() == throttles.ends.len());
        }
        (let_in, attempts)
    }

    fn assert_paced(let_in: &[u64], per_second: usize) {
        for (index, ms) in let_in.iter().enumerate() {
            let within = let_in[index..].partition_point(|later| later - ms < 10_000);
            // The burst, and the 300 ms by which devices may be early.
            assert!(
                within <= per_second * 11 + per_second,
                "{within} within 10 s of {ms} ms"
            );
        }
    }

    #[test]
    fn fleet_is_let_in_at_the_rate_and_no_device_comes_in_vain() {
        let (let_in, attempts) = storm(3_000, throttle(1, 10));

        assert_paced(&let_in, 10);
        let last = *let_in.last().unwrap();
        assert!((290_000..=310_000).contains(&last), "{last}");
        assert!(attempts <= 6_000, "{attempts}: each is told once when to return");
    }

    #[test]
    fn devices_beyond_ten_minutes_return_a_few_times_only() {
        let (let_in, attempts) = storm(20_000, throttle(1, 10));

        assert_paced(&let_in, 10);
        let last = *let_in.last().unwrap();
        assert!((1_990_000..=2_700_000).contains(&last), "{last}");
        assert!(attempts <= 100_000, "{attempts}");
    }

    #[test]
    fn memory_is_bounded_and_the_rate_holds_where_it_is_full() {
        let (let_in, attempts) = storm(150_000, throttle(1, 1_000));

        assert_paced(&let_in, 1_000);
        assert!(*let_in.last().unwrap() < 300_000, "{:?}", let_in.last());
        assert!(attempts < 600_000, "{attempts}");
    }

    /// Whether the device is told to return after this time or a little later.
    fn is_told(taken: Result<(), Duration>, ms: u64) -> bool {
        let wait = Duration::from_millis(ms);
        taken.is_err_and(|after| (wait..=wait + HINT_SPREAD).contains(&after))
    }

    #[test]
    fn each_refusal_draws_its_hint_from_the_place_on() {
        let (mut throttles, mut rng) = (Throttles::default(), SmallRng::seed_from_u64(1));
        let mut take = |number, ms| throttles.take(throttle(1, 1), known(number), 1.0, at(ms), &mut rng);
        assert_eq!(take(1, 0), Ok(()));

        let hints: BTreeSet<_> = (0..50).map(|_| take(2, 0).unwrap_err()).collect();

        assert!(hints.len() > 40, "{hints:?}");
        assert!(hints.iter().all(|after| is_told(Err(*after), 1_000)), "{hints:?}");
    }

    #[test]
    fn early_device_keeps_its_place_and_late_one_has_lost_it() {
        let (mut throttles, mut rng) = (Throttles::default(), SmallRng::seed_from_u64(1));
        let one = throttle(1, 1);
        let mut take = |number, ms| throttles.take(one, known(number), 1.0, at(ms), &mut rng);

        assert_eq!(take(1, 0), Ok(()));
        assert!(is_told(take(2, 0), 1_000));
        assert!(is_told(take(3, 0), 2_000));
        assert!(is_told(take(2, 400), 600));
        assert_eq!(take(2, 800), Ok(()), "300 ms before its time");
        assert!(is_told(take(4, 1_900), 1_100), "the next second is device 3's");
        assert_eq!(take(3, 61_999), Ok(()));
        assert_eq!(take(5, 70_000), Ok(()));
        assert!(take(4, 70_000).is_err(), "it is late by over a minute");
    }

    #[test]
    fn place_waits_for_a_device_that_admission_sends_away_and_is_gone_once_it_is_admitted() {
        let (mut throttles, mut rng) = (Throttles::default(), SmallRng::seed_from_u64(1));
        let one = throttle(1, 1);
        assert_eq!(throttles.take(one, known(1), 1.0, at(0), &mut rng), Ok(()));
        throttles.handle_refused(device(1), Duration::from_secs(300), at(0));
        assert_eq!(throttles.take(one, known(2), 1.0, at(300_000), &mut rng), Ok(()));

        assert_eq!(throttles.take(one, known(1), 1.0, at(300_000), &mut rng), Ok(()));
        throttles.handle_ended(device(1));
        assert!(throttles.take(one, known(1), 1.0, at(300_000), &mut rng).is_err());
    }

    #[test]
    fn unknown_devices_take_no_places_and_no_room_of_known_ones() {
        let (mut throttles, mut rng) = (Throttles::default(), SmallRng::seed_from_u64(1));
        let mut take = |asking, ms| throttles.take(throttle(1, 8), asking, 1.0, at(ms), &mut rng);
        let unknown_device = |number| Asking {
            is_known: false,
            ..known(number)
        };

        let passed = (0..60_000).filter(|number| take(unknown_device(*number), number / 6).is_ok());
        assert_eq!(passed.count(), 2 + 20 - 1, "a quarter of 8 per second, for 10 s");
        let hint = take(unknown_device(70_000), 9_999).unwrap_err();
        assert!(UNKNOWN_HINT.contains(&hint), "{hint:?}");
        assert!((0..8).all(|number| take(known(number), 10_000).is_ok()));
        assert!(is_told(take(known(8), 10_000), 125));
        assert_eq!(throttles.places.len(), 9);
    }

    #[test]
    fn exempt_devices_take_of_the_rate_and_are_never_refused() {
        let (mut throttles, mut rng) = (Throttles::default(), SmallRng::seed_from_u64(1));
        let mut take = |asking| throttles.take(throttle(1, 1), asking, 1.0, at(0), &mut rng);
        let exempt = |number| Asking {
            is_exempt: true,
            ..known(number)
        };

        assert!((0..9).all(|number| take(exempt(number)) == Ok(()) && take(exempt(number)) == Ok(())));
        assert!(is_told(take(known(10)), 9_000), "each has taken once");
        assert!((100..2_000).all(|number| take(exempt(number)) == Ok(())));
        assert!(FAR_HINT.contains(&take(known(11)).unwrap_err()));
    }

    #[test]
    fn a_place_lets_a_few_attempts_past() {
        let (mut throttles, mut rng) = (Throttles::default(), SmallRng::seed_from_u64(1));
        let mut take = |number| throttles.take(throttle(1, 1), known(number), 1.0, at(0), &mut rng);

        assert!((0..PASSES_MAX).all(|_| take(1) == Ok(())));
        assert!(is_told(take(1), 1_000));
    }

    #[test]
    fn state_is_kept_while_a_rule_is_in_force_and_another_rate_starts_over() {
        let (mut throttles, mut rng) = (Throttles::default(), SmallRng::seed_from_u64(1));
        let mut take = |throttles: &mut Throttles, throttle| throttles.take(throttle, known(9), 1.0, at(0), &mut rng);
        for number in 1..=2 {
            throttles
                .take(
                    throttle(1, 1),
                    known(number),
                    1.0,
                    at(0),
                    &mut SmallRng::seed_from_u64(1),
                )
                .ok();
        }
        throttles.handle_rules(&RuleSet::compile(2, vec![rule(1, Some(1)), rule(2, Some(5))]));
        assert!(take(&mut throttles, throttle(1, 1)).is_err());
        assert_eq!(take(&mut throttles, throttle(1, 2)), Ok(()), "the rate was changed");
        throttles.handle_rules(&RuleSet::empty());
        assert!(throttles.queues.is_empty() && throttles.places.is_empty() && throttles.ends.is_empty());
    }

    #[test]
    fn rate_without_a_figure_is_a_twentieth_of_the_capacity() {
        let own = Throttle::by(&rule(1, None));

        assert_eq!(own.rate(1_000.0), Rate::per_second(50, 50));
        assert_eq!(own.rate(0.5), Rate::per_second(1, 1));
        assert_eq!(throttle(1, 7).rate(1_000.0), Rate::per_second(7, 7));
    }
}
