//! The throttle for wrong credentials, by device id: GCRAs in bounded memory. docs/design/admission.md has the
//! reasons.
//!
//! An attempt is counted when it enters the queue, and refunded if its credential was right or was never compared. So
//! parallel connections get no more credentials compared than the budget allows.
//!
//! Guesses do not lock a device out: at a due slot each network has its own budget. It is small, because any client
//! can get a slot for any id. Beyond it, an attempt at a due slot is compared with what the last lookup found: it is
//! never throttled if it shows that, and costs no lookup otherwise.
//!
//! An id that is guessed at is *disputed* for the guessing network: it loses its priority there. Secrets and
//! certificates are counted separately.

use std::time::Duration;

use crate::{
    bounded::Bounded,
    id::{CredentialTag, DeviceId, Network, Proof},
    rate::{Gcra, Rate},
    time::Instant,
};

/// Wrong credentials that are looked up without delay: [`BURST`] in a row, and then one per 30 s. A device that follows
/// the hints of 401 (1 to 5 min) never reaches the throttle.
const WRONG: Rate = Rate::every(Duration::from_secs(30), BURST);
const BURST: u32 = 10;
/// Budget of one network at due slots, once [`WRONG`] is exhausted. More than one: a device may reconnect before its
/// first attempt is answered.
const WRONG_DUE: Rate = Rate::every(Duration::from_secs(30), DUE_BURST);
const DUE_BURST: u32 = 3;
/// Budget of all networks together at due slots. It refills faster than [`WRONG`]: only an attacker with dozens of
/// networks exhausts it, and then delays the device.
const WRONG_DUE_ALL: Rate = Rate::every(Duration::from_secs(1), DUE_BURST_ALL);
const DUE_BURST_ALL: u32 = 10;
/// Lookups of one id that a network may abandon before they are answered. With more than half of the burst the id is
/// disputed for it. A device on a bad line abandons a few.
const LEFT: Rate = Rate::every(Duration::from_secs(1), LEFT_BURST * 2);
const LEFT_BURST: u32 = 10;
/// Maximum number of networks watched for one id. A further one replaces the one with the fewest wrong credentials, and
/// inherits the highest count of any replaced one. This is the Space-Saving algorithm (Metwally et al., 2005). So an
/// attacker gains nothing by alternating between many networks.
const NETWORKS_MAX: usize = 4;
/// Maximum number of ids that are watched, about 300 bytes each. Beyond it the one with the fewest wrong credentials is
/// forgotten: invented ids, each guessed once, do not renew the budget of another. An attacker with more ids is slowed
/// by the small queue of unknown devices instead.
const IDS_MAX: usize = 65_536;

/// A device id, and the kind of its credential.
pub(super) type Claim = (DeviceId, Proof);

/// Result of an attempt that was admitted to the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The credential was right.
    Right,
    /// It was wrong, or there is no such device: the two must look the same.
    Wrong,
    /// It was never compared, and its lookup was useful for others.
    Open,
    /// The device left after its lookup was sent, before its credential was compared.
    Left,
}

/// Why an id is disputed for a network.
#[derive(Clone, Copy, Debug, Default)]
struct Dispute {
    wrong: Gcra,
    /// Lookups whose answer no device waited for.
    left: Gcra,
}

impl Dispute {
    fn is_on(&self, now: Instant) -> bool {
        self.wrong.owed(WRONG, now) > 1 || self.left.owed(LEFT, now) > LEFT_BURST
    }

    fn is_clean(&self, now: Instant) -> bool {
        self.wrong.is_clean(now) && self.left.is_clean(now)
    }

    fn raise_to(&mut self, other: &Self) {
        self.wrong = self.wrong.max(other.wrong);
        self.left = self.left.max(other.left);
    }
}

#[derive(Clone, Copy, Debug)]
struct FromNetwork {
    network: Network,
    dispute: Dispute,
    /// Wrong credentials since [`WRONG`] of the id is exhausted.
    wrong_due: Gcra,
    /// Number of attempts without an outcome.
    open: u32,
}

impl FromNetwork {
    fn is_clean(&self, now: Instant) -> bool {
        self.open == 0 && self.dispute.is_clean(now) && self.wrong_due.is_clean(now)
    }
}

/// Credentials of one device, as a lookup found them: its secret, and the previous one within the overlap of a
/// rotation. No entry for a device that is not registered.
pub type Right = [Option<CredentialTag>; 2];

/// Attempts with one claim.
#[derive(Debug, Default)]
struct Account {
    /// What the last lookup with a wrong credential found. It is read again once per 30 s at least while somebody
    /// guesses: [`WRONG`] lets one attempt through. An absent one is zero, which one credential in two billion equals.
    right: [CredentialTag; 2],
    wrong: Gcra,
    /// Further wrong credentials, at due slots.
    wrong_due: Gcra,
    /// Number of attempts without an outcome.
    open: u32,
    networks: [Option<FromNetwork>; NETWORKS_MAX],
    /// Highest count of a network that was replaced. It applies to every network that is not watched.
    others: Dispute,
}

impl Account {
    fn of(&self, network: Network) -> Option<&FromNetwork> {
        self.networks.iter().flatten().find(|from| from.network == network)
    }

    /// The entry of a network. If there is none, a new one replaces the least important entry.
    fn of_mut(&mut self, network: Network) -> &mut FromNetwork {
        let own = |from: &Option<FromNetwork>| from.is_some_and(|from| from.network == network);
        let at = self.networks.iter().position(own).unwrap_or_else(|| {
            let weight = |from: Option<FromNetwork>| from.map(|from| (from.open > 0, from.dispute.wrong));
            let least = (0..NETWORKS_MAX).min_by_key(|at| weight(self.networks[*at]));
            let at = least.unwrap_or(0);
            if let Some(replaced) = self.networks[at].take() {
                self.others.raise_to(&replaced.dispute);
            }
            at
        });
        self.networks[at].get_or_insert(FromNetwork {
            network,
            dispute: self.others,
            wrong_due: Gcra::default(),
            open: 0,
        })
    }

    fn has_room(&self, now: Instant) -> bool {
        self.wrong.owed(WRONG, now).saturating_add(self.open) < BURST
    }

    fn has_room_when_due(&self, network: Network, now: Instant) -> bool {
        // Open attempts first use the budget of all networks.
        let left = BURST.saturating_sub(self.wrong.owed(WRONG, now));
        let open = self.open.saturating_sub(left);
        let from_network = self
            .of(network)
            .map_or(0, |from| from.wrong_due.owed(WRONG_DUE, now).saturating_add(from.open));
        from_network < DUE_BURST && self.wrong_due.owed(WRONG_DUE_ALL, now).saturating_add(open) < DUE_BURST_ALL
    }

    fn is_clean(&self, now: Instant) -> bool {
        self.open == 0
            && self.wrong.is_clean(now)
            && self.wrong_due.is_clean(now)
            && self.others.is_clean(now)
            && self.networks.iter().flatten().all(|from| from.is_clean(now))
    }
}

#[derive(Debug)]
pub(super) struct Throttle {
    accounts: Bounded<Claim, Account>,
}

impl Default for Throttle {
    fn default() -> Self {
        Self {
            accounts: Bounded::new(IDS_MAX),
        }
    }
}

impl Throttle {
    /// An attempt is admitted to the queue. A call of [`end`](Self::end) follows.
    pub fn begin(&mut self, claim: Claim, network: Network) {
        let account = self.account(claim);
        account.open = account.open.saturating_add(1);
        let from = account.of_mut(network);
        from.open = from.open.saturating_add(1);
    }

    /// A lookup found these credentials, and not the one that was shown.
    pub fn learn(&mut self, claim: Claim, right: Right) {
        self.account(claim).right = right.map(Option::unwrap_or_default);
    }

    /// An attempt has its result.
    pub fn end(&mut self, claim: Claim, network: Network, outcome: Outcome, now: Instant) {
        let account = match outcome {
            Outcome::Wrong | Outcome::Left => self.account(claim),
            Outcome::Right | Outcome::Open => match self.accounts.get_mut(&claim) {
                Some(account) => account,
                // Other ids displaced it meanwhile.
                None => return,
            },
        };
        account.open = account.open.saturating_sub(1);
        let from = account.of_mut(network);
        from.open = from.open.saturating_sub(1);
        if outcome == Outcome::Left {
            from.dispute.left.charge(LEFT, now);
        } else if outcome == Outcome::Wrong {
            from.dispute.wrong.charge(WRONG, now);
            // Each fills both budgets, so that there is one more attempt per 30 s with and without a slot, not two.
            let has_filled = account.wrong.owed(WRONG, now) + 1 >= BURST;
            if has_filled {
                account.of_mut(network).wrong_due.charge(WRONG_DUE, now);
            }
            if account.wrong.owed(WRONG, now) >= BURST {
                account.wrong_due.charge(WRONG_DUE_ALL, now);
            }
            account.wrong.charge(WRONG, now);
            let rank = account.wrong.clean_at_ns();
            self.accounts.rank(&claim, rank);
        } else if account.is_clean(now) {
            self.accounts.remove(&claim);
        }
    }

    /// The device was registered, or got another credential: earlier attempts are forgotten.
    pub fn forgive(&mut self, device: DeviceId) {
        for claim in [(device, Proof::Secret), (device, Proof::Certificate)] {
            self.accounts.remove(&claim);
        }
    }

    /// Many devices were registered: all earlier attempts are forgotten.
    pub fn forgive_all(&mut self) {
        self.accounts.clear();
    }

    /// Whether there were too many wrong credentials lately. `is_due`: the device returns at its slot.
    pub fn is_throttled(
        &self,
        (device, presented): (DeviceId, CredentialTag),
        network: Network,
        is_due: bool,
        now: Instant,
    ) -> bool {
        self.accounts.get(&(device, presented.proof())).is_some_and(|account| {
            let is_let_in = || account.has_room_when_due(network, now) || account.right.contains(&presented);
            let has_room = account.has_room(now) || (is_due && is_let_in());
            !has_room
        })
    }

    /// Whether more than one wrong credential came from this network lately, or too many lookups that no device waited
    /// for. All networks that are not watched share one count.
    pub fn is_disputed(&self, claim: Claim, network: Network, now: Instant) -> bool {
        self.accounts.get(&claim).is_some_and(|account| {
            let dispute = account.of(network).map_or(&account.others, |from| &from.dispute);
            dispute.is_on(now)
        })
    }

    fn account(&mut self, claim: Claim) -> &mut Account {
        self.accounts.entry(claim, Account::default)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::id::{Credential, SecretHash};

    const HERE: Network = Network::V4(1);
    const ELSEWHERE: Network = Network::V4(2);

    #[test]
    fn watched_id_takes_about_300_bytes() {
        let watched = size_of::<(Claim, Account, (u64, u64))>() + size_of::<((u64, u64), Claim)>();

        assert!((260..=320).contains(&watched), "{watched}");
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
            self.accounts.iter().all(|(_, account)| {
                let networks = account.networks.iter().flatten();
                account.open == 0 && networks.map(|from| from.open).sum::<u32>() == 0
            })
        }

        fn wrong(&mut self, claim: Claim, network: Network, now: Instant) {
            self.begin(claim, network);
            self.learn(claim, [Some(right()), None]);
            self.end(claim, network, Outcome::Wrong, now);
        }

        /// Begins an attempt with a wrong credential if it is allowed.
        fn try_begin(&mut self, claim: Claim, network: Network, is_due: bool, now: Instant) -> bool {
            let may = !self.is_throttled((claim.0, guess(claim.1)), network, is_due, now);
            if may {
                self.begin(claim, network);
            }
            may
        }

        fn is_refused(&self, claim: Claim, now: Instant) -> bool {
            self.is_throttled((claim.0, guess(claim.1)), HERE, false, now)
        }
    }

    fn guess(proof: Proof) -> CredentialTag {
        match proof {
            Proof::Secret => CredentialTag::from(&Credential::from(SecretHash::of(b"a guess"))),
            Proof::Certificate => CredentialTag::from(&Credential::Certificate(SecretHash::of(b"a guess"))),
        }
    }

    fn right() -> CredentialTag {
        CredentialTag::from(&Credential::from(SecretHash::of(b"right")))
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
        assert_eq!(throttle.accounts.len(), 0);
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
        assert_eq!(throttle.accounts.len(), 1);
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
        assert!(!throttle.is_refused(device(1), at(30)));
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
            throttle.end(device(1), HERE, Outcome::Wrong, at(1));
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
                throttle.end(device(1), HERE, Outcome::Wrong, at(second));
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
                throttle.end(device(1), HERE, Outcome::Wrong, at(0));
            }
        }

        assert!(!throttle.try_begin(device(1), HERE, false, at(10)));
        assert!(throttle.try_begin(device(1), HERE, true, at(10)));
    }

    #[test]
    fn right_credential_at_a_due_slot_is_looked_up_whoever_guesses_with_the_same_slot_from_its_address() {
        let mut throttle = Throttle::default();
        let mut guesses = 0;
        for second in 0..300 {
            let now = at(second);
            // The slot belongs to the id, so the attacker is due whenever the device is.
            while throttle.try_begin(device(1), HERE, true, now) {
                throttle.learn(device(1), [Some(right()), None]);
                throttle.end(device(1), HERE, Outcome::Wrong, now);
                guesses += 1;
            }
            // One of its guesses is always being looked up.
            throttle.begin(device(1), HERE);

            assert!(
                !throttle.is_throttled((device(1).0, right()), HERE, true, now),
                "{second}"
            );
            throttle.end(device(1), HERE, Outcome::Open, now);
        }

        assert!(guesses <= 10 + 3 + 10, "{guesses}");
        assert!(
            throttle.is_throttled((device(1).0, right()), HERE, false, at(299)),
            "it has no slot"
        );
    }

    #[test]
    fn rotated_secret_is_known_after_the_next_lookup_even_if_that_is_of_a_guess() {
        let mut throttle = Throttle::default();
        for second in 0..60 {
            while throttle.try_begin(device(1), HERE, true, at(second)) {
                throttle.learn(device(1), [Some(right()), None]);
                throttle.end(device(1), HERE, Outcome::Wrong, at(second));
            }
        }
        let rotated = CredentialTag::from(&Credential::from(SecretHash::of(b"rotated")));

        assert!(throttle.is_throttled((device(1).0, rotated), HERE, true, at(59)));
        assert!(!throttle.is_throttled((device(1).0, rotated), HERE, true, at(60)));
        // A guess takes that lookup, and finds the new secret.
        throttle.begin(device(1), HERE);
        throttle.learn(device(1), [Some(rotated), Some(right())]);
        throttle.end(device(1), HERE, Outcome::Wrong, at(60));
        for secret in [rotated, right()] {
            assert!(!throttle.is_throttled((device(1).0, secret), HERE, true, at(60)));
        }
        assert!(throttle.is_throttled((device(1).0, guess(Proof::Secret)), HERE, true, at(60)));
    }

    #[test]
    fn look_ups_left_by_one_network_dispute_the_id_there_and_throttle_nobody() {
        let mut throttle = Throttle::default();
        for _ in 0..1_000 {
            assert!(throttle.try_begin(device(1), HERE, false, at(0)));
            throttle.end(device(1), HERE, Outcome::Left, at(0));
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
                    throttle.end(device(1), network, Outcome::Wrong, at(second));
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
                throttle.end(device(1), HERE, Outcome::Wrong, now);
            }
            assert!(throttle.is_refused(device(1), now) || second % 30 < 2);
            for _ in 0..3 {
                assert!(throttle.try_begin(device(1), ELSEWHERE, true, now));
            }
            for _ in 0..3 {
                throttle.end(device(1), ELSEWHERE, Outcome::Right, now);
            }
        }
    }

    #[test]
    fn attempts_that_were_right_or_never_compared_leave_nothing_behind() {
        let mut throttle = Throttle::default();

        for n in 0..100 {
            for outcome in [Outcome::Right, Outcome::Open] {
                throttle.begin(device(n), HERE);
                throttle.end(device(n), HERE, outcome, Instant::ZERO);
            }
        }

        assert_eq!(throttle.accounts.len(), 0);
    }

    #[test]
    fn guesses_dispute_an_id_for_their_network_alone() {
        let throttle = guessed_at();

        assert!(throttle.is_disputed(device(1), HERE, Instant::ZERO));
        assert!(!throttle.is_disputed(device(1), ELSEWHERE, Instant::ZERO));
    }

    #[test]
    fn guesses_from_more_networks_in_turn_than_are_watched_dispute_the_id_for_each() {
        let mut throttle = Throttle::default();
        let networks = || (0..=NETWORKS_MAX).map(|network| Network::V4(u32::try_from(network).unwrap()));
        for second in 0..4 {
            for network in networks() {
                throttle.wrong(device(1), network, at(second));
            }
        }

        assert!(networks().all(|network| throttle.is_disputed(device(1), network, at(4))));
        for network in networks() {
            throttle.wrong(device(1), network, at(5));
            assert!(throttle.is_disputed(device(1), network, at(5)), "{network:?}");
        }
        assert!(!networks().any(|network| throttle.is_disputed(device(1), network, at(400))));
        throttle.wrong(device(1), HERE, at(400));
        throttle.begin(device(1), HERE);
        throttle.end(device(1), HERE, Outcome::Right, at(460));
        assert_eq!(throttle.accounts.len(), 0);
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
    }

    #[test]
    fn invented_ids_do_not_renew_the_budget_of_an_id_that_is_guessed_at() {
        let mut throttle = guessed_at();

        for n in 0..200_000 {
            throttle.wrong(device(1_000 + n), HERE, at(10));
        }

        assert!(throttle.is_refused(device(1), at(20)));
    }
}
