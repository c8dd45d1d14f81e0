//! The throttle of wrong credentials, by device id: GCRAs in bounded memory.
//!
//! An attempt is counted when it is let into the queue, and taken back when its credential was right or never compared. So no
//! number of connections at a time gets more credentials compared than the budget allows.
//!
//! Guesses from other networks can't lock a device out. Who comes at a due slot has a budget of its own for each network: what
//! others have tried from elsewhere does not count against it, and what was right costs nothing. Anybody can have a slot for any id,
//! so this budget is small. Within one network it is shared: who guesses there once a second delays a device that has neither a
//! resume token nor a certificate.
//!
//! An id that someone guesses at is *disputed* for the network that the guesses come from: it loses its priority there for a
//! while, or guessing would be a way to the front. The device itself, elsewhere, keeps it.
//!
//! Secrets and certificates are counted apart: anybody can send a wrong secret, and it says nothing of a device that its
//! certificate proves. What counts there is a certificate of a device that the registry does not have, or no longer.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    id::{DeviceId, Network, Proof},
    time::Instant,
};

/// Wrong credentials in a row that are looked up without delay.
const BURST: u32 = 10;
/// One more is forgiven each. A device that keeps to the hints of 401 (1 to 5 min) never reaches the throttle.
const FORGIVEN_EVERY: Duration = Duration::from_secs(30);
/// Wrong credentials in a row that one network may try at due slots, once [`BURST`] is used up. One more is forgiven each
/// [`FORGIVEN_EVERY`]. More than one: a device may connect anew before its first attempt is answered.
const DUE_BURST: u32 = 3;
/// The same for all networks together: the bound on guesses from many networks.
const DUE_BURST_ALL: u32 = 10;
/// One more of [`DUE_BURST_ALL`] is forgiven each. Shorter than [`FORGIVEN_EVERY`]: only an attacker with dozens of networks uses
/// it up, and then delays the device.
const DUE_FORGIVEN_EVERY: Duration = Duration::from_secs(1);
/// Look-ups of one id that a network may leave before they are answered; with more the id is disputed for it. One more is forgiven each
/// [`LEFT_FORGIVEN_EVERY`]. A device on a bad line leaves a few.
const LEFT_BURST: u32 = 10;
const LEFT_FORGIVEN_EVERY: Duration = Duration::from_secs(1);
/// Networks watched for one id. Then the one with the fewest wrong credentials is forgotten.
const NETWORKS_MAX: usize = 4;
/// Maximum number of ids that are watched, about 290 bytes each. Then the one watched longest is forgotten: an attacker with more ids
/// is slowed by the small queue of unknown devices instead.
const IDS_MAX: usize = 65_536;

/// An id, and what the claim to be it rests on.
pub(super) type Claim = (DeviceId, Proof);

/// What became of an attempt that was let into the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The credential was right.
    Right,
    /// It was wrong, or there is no such device: the two must look the same.
    Wrong,
    /// It was never compared, and nothing was asked of the registry that is not of use to others.
    Open,
    /// The device left after its look-up was sent, before its credential was compared.
    Left,
}

/// Wrong credentials lately, as the time at which all are forgiven.
#[derive(Clone, Copy, Debug, Default)]
struct Wrong {
    clean_at: Instant,
}

impl Wrong {
    /// Wrong credentials that are not forgiven yet; a part of one counts as one.
    fn len(self, every: Duration, now: Instant) -> u32 {
        let left = self.clean_at.saturating_since(now).as_micros();
        u32::try_from(left.div_ceil(every.as_micros())).unwrap_or(u32::MAX)
    }

    fn add(&mut self, every: Duration, burst: u32, now: Instant) {
        self.clean_at = (self.clean_at.max(now) + every).min(now + every * burst);
    }
}

#[derive(Clone, Copy, Debug)]
struct FromNetwork {
    network: Network,
    /// All of them: the id is disputed for this network by these.
    wrong: Wrong,
    /// Those since the budget of all is used up: the budget at due slots.
    wrong_due: Wrong,
    /// Look-ups that nobody waited for in the end.
    left: Wrong,
    /// Attempts that are not judged yet.
    open: u32,
}

impl FromNetwork {
    fn is_clean(&self, now: Instant) -> bool {
        let clean_at = self.wrong.clean_at.max(self.wrong_due.clean_at).max(self.left.clean_at);
        self.open == 0 && clean_at <= now
    }
}

/// What was tried with one claim.
#[derive(Debug, Default)]
struct Account {
    wrong: Wrong,
    /// Beyond the budget of all, at due slots.
    wrong_due: Wrong,
    /// Attempts that are not judged yet.
    open: u32,
    networks: [Option<FromNetwork>; NETWORKS_MAX],
    /// Its key in [`Throttle::order`].
    entered: u64,
}

impl Account {
    fn of(&self, network: Network) -> Option<&FromNetwork> {
        self.networks.iter().flatten().find(|from| from.network == network)
    }

    /// The entry of a network, in the place of the one that matters least where there is none.
    fn of_mut(&mut self, network: Network) -> &mut FromNetwork {
        let own = |from: &Option<FromNetwork>| from.is_some_and(|from| from.network == network);
        let at = self.networks.iter().position(own).unwrap_or_else(|| {
            let weight = |from: Option<FromNetwork>| from.map(|from| (from.open > 0, from.wrong.clean_at));
            let least = (0..NETWORKS_MAX).min_by_key(|at| weight(self.networks[*at]));
            let at = least.unwrap_or(0);
            self.networks[at] = None;
            at
        });
        self.networks[at].get_or_insert(FromNetwork {
            network,
            wrong: Wrong::default(),
            wrong_due: Wrong::default(),
            left: Wrong::default(),
            open: 0,
        })
    }

    fn has_room(&self, now: Instant) -> bool {
        self.wrong.len(FORGIVEN_EVERY, now).saturating_add(self.open) < BURST
    }

    fn has_room_when_due(&self, network: Network, now: Instant) -> bool {
        // Open attempts count against the budget of all first.
        let left = BURST.saturating_sub(self.wrong.len(FORGIVEN_EVERY, now));
        let open = self.open.saturating_sub(left);
        let from_network = self.of(network).map_or(0, |from| {
            from.wrong_due.len(FORGIVEN_EVERY, now).saturating_add(from.open)
        });
        from_network < DUE_BURST && self.wrong_due.len(DUE_FORGIVEN_EVERY, now).saturating_add(open) < DUE_BURST_ALL
    }

    fn is_clean(&self, now: Instant) -> bool {
        self.open == 0
            && self.wrong.clean_at.max(self.wrong_due.clean_at) <= now
            && self.networks.iter().flatten().all(|from| from.is_clean(now))
    }
}

#[derive(Debug, Default)]
pub(super) struct Throttle {
    accounts: BTreeMap<Claim, Account>,
    /// Claims in the order in which they came to be watched.
    order: BTreeMap<u64, Claim>,
    counter: u64,
}

impl Throttle {
    /// An attempt is let into the queue. [`end`](Self::end) follows.
    pub fn begin(&mut self, claim: Claim, network: Network) {
        let account = self.account(claim);
        account.open = account.open.saturating_add(1);
        let from = account.of_mut(network);
        from.open = from.open.saturating_add(1);
    }

    /// An attempt was judged, or never will be.
    pub fn end(&mut self, claim: Claim, network: Network, verdict: Verdict, now: Instant) {
        let account = match verdict {
            Verdict::Wrong | Verdict::Left => self.account(claim),
            Verdict::Right | Verdict::Open => match self.accounts.get_mut(&claim) {
                Some(account) => account,
                // Others pushed it out meanwhile.
                None => return,
            },
        };
        account.open = account.open.saturating_sub(1);
        let from = account.of_mut(network);
        from.open = from.open.saturating_sub(1);
        if verdict == Verdict::Left {
            from.left.add(LEFT_FORGIVEN_EVERY, LEFT_BURST * 2, now);
        } else if verdict == Verdict::Wrong {
            from.wrong.add(FORGIVEN_EVERY, BURST, now);
            // Each fills both budgets, so that with and without a slot there is one more each 30 s, and not two.
            let has_filled = account.wrong.len(FORGIVEN_EVERY, now) + 1 >= BURST;
            if has_filled {
                account.of_mut(network).wrong_due.add(FORGIVEN_EVERY, DUE_BURST, now);
            }
            if account.wrong.len(FORGIVEN_EVERY, now) >= BURST {
                account.wrong_due.add(DUE_FORGIVEN_EVERY, DUE_BURST_ALL, now);
            }
            account.wrong.add(FORGIVEN_EVERY, BURST, now);
        } else if account.is_clean(now) {
            let entered = account.entered;
            self.accounts.remove(&claim);
            self.order.remove(&entered);
        }
    }

    /// The device was registered, or given another credential: what was wrong before says nothing now.
    pub fn forgive(&mut self, device: DeviceId) {
        for claim in [(device, Proof::Secret), (device, Proof::Certificate)] {
            if let Some(account) = self.accounts.remove(&claim) {
                self.order.remove(&account.entered);
            }
        }
    }

    /// Any number of devices were registered.
    pub fn forgive_all(&mut self) {
        *self = Self::default();
    }

    /// Too many, too lately. `is_due`: it comes at its slot.
    pub fn is_throttled(&self, claim: Claim, network: Network, is_due: bool, now: Instant) -> bool {
        self.accounts.get(&claim).is_some_and(|account| {
            let has_room = account.has_room(now) || (is_due && account.has_room_when_due(network, now));
            !has_room
        })
    }

    /// More than one wrong credential came from this network lately, or it made the registry answer for nobody again and again.
    pub fn is_disputed(&self, claim: Claim, network: Network, now: Instant) -> bool {
        let from = self.accounts.get(&claim).and_then(|account| account.of(network));
        from.is_some_and(|from| {
            from.wrong.len(FORGIVEN_EVERY, now) > 1 || from.left.len(LEFT_FORGIVEN_EVERY, now) > LEFT_BURST
        })
    }

    fn account(&mut self, claim: Claim) -> &mut Account {
        if !self.accounts.contains_key(&claim) {
            if self.accounts.len() >= IDS_MAX
                && let Some((_, oldest)) = self.order.pop_first()
            {
                self.accounts.remove(&oldest);
            }
            self.counter += 1;
            self.order.insert(self.counter, claim);
        }
        let entered = self.counter;
        self.accounts.entry(claim).or_insert_with(|| Account {
            entered,
            ..Account::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Network = Network::V4(1);
    const ELSEWHERE: Network = Network::V4(2);

    #[test]
    fn watched_id_takes_about_290_bytes() {
        let watched = size_of::<(Claim, Account)>() + size_of::<(u64, Claim)>();

        assert!((260..=300).contains(&watched), "{watched}");
    }

    fn device(n: u128) -> Claim {
        (DeviceId::from_uuid(uuid::Uuid::from_u128(n)), Proof::Secret)
    }

    fn certified(n: u128) -> Claim {
        (device(n).0, Proof::Certificate)
    }

    fn at(s: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(s)
    }

    impl Throttle {
        pub(in crate::admission) fn has_none_open(&self) -> bool {
            self.accounts.values().all(|account| {
                let networks = account.networks.iter().flatten();
                account.open == 0 && networks.map(|from| from.open).sum::<u32>() == 0
            })
        }

        fn wrong(&mut self, claim: Claim, network: Network, now: Instant) {
            self.begin(claim, network);
            self.end(claim, network, Verdict::Wrong, now);
        }

        /// Lets an attempt begin if it may.
        fn try_begin(&mut self, claim: Claim, network: Network, is_due: bool, now: Instant) -> bool {
            let may = !self.is_throttled(claim, network, is_due, now);
            if may {
                self.begin(claim, network);
            }
            may
        }

        fn is_refused(&self, claim: Claim, now: Instant) -> bool {
            self.is_throttled(claim, HERE, false, now)
        }
    }

    fn guessed_at() -> Throttle {
        let mut throttle = Throttle::default();
        for _ in 0..BURST {
            throttle.wrong(device(1), HERE, Instant::ZERO);
        }
        throttle
    }

    #[test]
    fn wrong_secrets_say_nothing_of_a_certificate() {
        let throttle = guessed_at();

        assert!(throttle.is_refused(device(1), Instant::ZERO));
        assert!(!throttle.is_refused(certified(1), Instant::ZERO));
        assert!(!throttle.is_disputed(certified(1), HERE, Instant::ZERO));
    }

    #[test]
    fn certificate_of_no_device_is_throttled_by_itself_and_forgiven_with_the_device() {
        let mut throttle = Throttle::default();
        for _ in 0..BURST {
            throttle.wrong(certified(1), HERE, Instant::ZERO);
        }

        assert!(throttle.is_refused(certified(1), Instant::ZERO));
        assert!(!throttle.is_refused(device(1), Instant::ZERO));
        throttle.forgive(device(1).0);
        assert!(!throttle.is_refused(certified(1), Instant::ZERO));
        assert!(throttle.order.is_empty());
    }

    #[test]
    fn registration_forgives_the_device_and_nobody_else() {
        let mut throttle = guessed_at();
        for _ in 0..BURST {
            throttle.wrong(device(2), HERE, Instant::ZERO);
        }

        throttle.forgive(device(1).0);

        assert!(!throttle.is_refused(device(1), Instant::ZERO));
        assert!(!throttle.is_disputed(device(1), HERE, Instant::ZERO));
        assert!(throttle.is_refused(device(2), Instant::ZERO));
        assert_eq!(throttle.order.len(), throttle.accounts.len());
        throttle.forgive_all();
        assert!(!throttle.is_refused(device(2), Instant::ZERO));
    }

    #[test]
    fn eleventh_wrong_credential_in_a_row_is_throttled_and_forgiven_later() {
        let mut throttle = Throttle::default();
        for _ in 0..BURST {
            assert!(!throttle.is_refused(device(1), Instant::ZERO));
            throttle.wrong(device(1), HERE, Instant::ZERO);
        }

        assert!(throttle.is_refused(device(1), Instant::ZERO));
        assert!(!throttle.is_refused(device(2), Instant::ZERO));
        assert!(!throttle.is_refused(device(1), Instant::ZERO + FORGIVEN_EVERY));
    }

    #[test]
    fn attempts_at_a_time_count_before_they_are_judged() {
        let mut throttle = Throttle::default();

        let begun = (0..100)
            .filter(|_| throttle.try_begin(device(1), HERE, true, at(0)))
            .count();
        assert_eq!(
            begun, 10,
            "a due slot adds nothing for a network that used up the budget of all"
        );
        for _ in 0..begun {
            throttle.end(device(1), HERE, Verdict::Wrong, at(1));
        }

        assert!(throttle.is_refused(device(1), at(1)));
    }

    #[test]
    fn guessing_from_one_network_gets_twelve_and_one_each_30_s_whatever_slots_it_has() {
        let mut throttle = Throttle::default();

        let mut compared = 0;
        for second in 0..300 {
            let begun = (0..50)
                .filter(|_| throttle.try_begin(device(1), HERE, true, at(second)))
                .count();
            for _ in 0..begun {
                throttle.end(device(1), HERE, Verdict::Wrong, at(second));
            }
            compared += begun;
        }

        assert_eq!(compared, 10 + 2 + 9);
    }

    #[test]
    fn device_behind_one_address_with_who_guessed_before_comes_in_at_its_slot() {
        let mut throttle = Throttle::default();
        for _ in 0..50 {
            if throttle.try_begin(device(1), HERE, false, at(0)) {
                throttle.end(device(1), HERE, Verdict::Wrong, at(0));
            }
        }

        assert!(!throttle.try_begin(device(1), HERE, false, at(10)));
        assert!(throttle.try_begin(device(1), HERE, true, at(10)));
    }

    #[test]
    fn device_behind_one_address_with_who_guesses_all_the_time_gets_what_the_guesser_leaves() {
        let mut throttle = Throttle::default();
        let mut admitted = 0;
        for second in 0..300 {
            // The slot belongs to the id, so the guesser is due whenever the device is.
            while throttle.try_begin(device(1), HERE, true, at(second)) {
                throttle.end(device(1), HERE, Verdict::Wrong, at(second));
            }
            let is_let_in = throttle.try_begin(device(1), HERE, true, at(second));
            admitted += u32::from(is_let_in);
        }

        assert_eq!(admitted, 0, "SECURITY.md says that they share one budget");
    }

    #[test]
    fn look_ups_left_by_one_network_dispute_the_id_there_and_throttle_nobody() {
        let mut throttle = Throttle::default();
        for _ in 0..1_000 {
            assert!(throttle.try_begin(device(1), HERE, false, at(0)));
            throttle.end(device(1), HERE, Verdict::Left, at(0));
        }

        assert!(throttle.is_disputed(device(1), HERE, at(0)));
        assert!(!throttle.is_disputed(device(1), ELSEWHERE, at(0)));
        assert!(!throttle.is_disputed(device(1), HERE, at(20)));
    }

    #[test]
    fn guessing_from_a_thousand_networks_at_due_slots_gets_one_a_second() {
        let mut throttle = Throttle::default();

        let mut compared = 0;
        for second in 0..100 {
            for network in 0..1_000 {
                let network = Network::V4(network);
                while throttle.try_begin(device(1), network, true, at(second)) {
                    throttle.end(device(1), network, Verdict::Wrong, at(second));
                    compared += 1;
                }
            }
        }

        assert!((100..=10 + 3 + 10 + 100).contains(&compared), "{compared}");
    }

    #[test]
    fn device_with_the_right_credential_and_a_due_slot_is_never_throttled_by_guesses_from_elsewhere() {
        let mut throttle = Throttle::default();

        for second in 0..1_000 {
            let now = at(second);
            while throttle.try_begin(device(1), HERE, true, now) {
                throttle.end(device(1), HERE, Verdict::Wrong, now);
            }
            assert!(throttle.is_refused(device(1), now) || second % 30 < 2);
            for _ in 0..3 {
                assert!(throttle.try_begin(device(1), ELSEWHERE, true, now));
            }
            for _ in 0..3 {
                throttle.end(device(1), ELSEWHERE, Verdict::Right, now);
            }
        }
    }

    #[test]
    fn attempts_that_were_right_or_never_compared_leave_nothing_behind() {
        let mut throttle = Throttle::default();

        for n in 0..100 {
            for verdict in [Verdict::Right, Verdict::Open] {
                throttle.begin(device(n), HERE);
                throttle.end(device(n), HERE, verdict, Instant::ZERO);
            }
        }

        assert!(throttle.accounts.is_empty() && throttle.order.is_empty());
    }

    #[test]
    fn guesses_dispute_an_id_for_their_network_alone() {
        let throttle = guessed_at();

        assert!(throttle.is_disputed(device(1), HERE, Instant::ZERO));
        assert!(!throttle.is_disputed(device(1), ELSEWHERE, Instant::ZERO));
    }

    #[test]
    fn device_that_keeps_to_the_hint_is_never_throttled() {
        let mut throttle = Throttle::default();

        for minute in 0..1_000 {
            let now = at(60 * minute);
            assert!(!throttle.is_refused(device(1), now));
            throttle.wrong(device(1), HERE, now);
        }
    }

    #[test]
    fn memory_is_bounded() {
        let mut throttle = Throttle::default();

        for n in 0..200_000 {
            throttle.wrong(device(n), HERE, Instant::ZERO);
        }

        assert_eq!(throttle.accounts.len(), IDS_MAX);
        assert_eq!(throttle.order.len(), IDS_MAX);
    }
}
