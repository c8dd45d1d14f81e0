//! Decides when a node with little free memory refuses devices. Start with [`Guard`].
//!
//! It measures nothing: the caller reports usage and limits periodically, and asks before it accepts a device. Live
//! sessions are never closed for memory.

/// Maximum memory of a further device, in bytes, kernel and TLS included (docs/BENCHMARKS.md: 7 KB over plain TCP).
pub const DEVICE_BYTES: u64 = 16 * 1024;

/// Minimum part of its memory that a node keeps free, in percent. Below it the node is full.
const RESERVE_PERCENT: u64 = 10;
/// Minimum memory that a node keeps free, in bytes.
const RESERVE_BYTES: u64 = 24 * 1024 * 1024;
/// Maximum memory that a node keeps free, in bytes: ten percent of a large memory may be what other processes need.
const RESERVE_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// Maximum part of its memory that a node keeps free, in percent.
const RESERVE_PERCENT_MAX: u64 = 25;
/// Free memory beyond the reserve at which a full node accepts devices again, in percent of the limit. At most half of
/// the reserve. It prevents flapping.
const RELIEF_PERCENT: u64 = 5;

/// Usage of a memory limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes in use that cannot be reclaimed.
    pub used: u64,
    /// Maximum number of bytes. Above 0.
    pub limit: u64,
}

/// Memory that a full node keeps free, in bytes. Running handshakes must fit into it.
#[must_use]
pub fn reserve(limit: u64) -> u64 {
    let part = |percent| limit / 100 * percent;
    let usual = part(RESERVE_PERCENT).min(RESERVE_BYTES_MAX);
    RESERVE_BYTES.min(part(RESERVE_PERCENT_MAX)).max(usual)
}

impl Usage {
    /// Usage from which the node is full.
    fn full_from(self) -> u64 {
        self.limit - reserve(self.limit)
    }

    fn is_full(self) -> bool {
        self.used >= self.full_from()
    }

    fn is_relieved(self) -> bool {
        let relief = (self.limit / 100 * RELIEF_PERCENT).min(reserve(self.limit) / 2);
        self.used < self.full_from() - relief
    }

    /// Number of devices that fit.
    fn room(self) -> u64 {
        self.full_from().saturating_sub(self.used) / DEVICE_BYTES
    }

    /// Whether over half is used, so that it should be measured more often.
    #[must_use]
    pub const fn is_high(self) -> bool {
        self.used > self.limit / 2
    }

    /// Usage as a part of the usage at which the node is full. 1 or more if it is full.
    #[must_use]
    pub fn fullness(self) -> f64 {
        self.used as f64 / self.full_from() as f64
    }
}

/// Decides whether a further device fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guard {
    is_full: bool,
    /// Number of devices that fitted at the last measurement.
    fitting: u64,
    /// Number of devices that became sessions since then. The next measurement includes them.
    added: u64,
    /// Number of acquired permits that are neither committed nor released.
    held: u64,
}

impl Default for Guard {
    /// Every device fits until the first measurement.
    fn default() -> Self {
        Self {
            is_full: false,
            fitting: u64::MAX,
            added: 0,
            held: 0,
        }
    }
}

impl Guard {
    /// Records the usage of each limit. `None`: the limit could not be measured, and its last usage still applies.
    /// Without any limit every device fits.
    pub fn handle_measured(&mut self, usages: &[Option<Usage>]) {
        let measured = || usages.iter().flatten();
        let is_complete = usages.iter().all(Option::is_some);
        self.is_full = if self.is_full {
            !(is_complete && measured().all(|usage| usage.is_relieved()))
        } else {
            measured().any(|usage| usage.is_full())
        };
        let fitting = measured().map(|usage| usage.room()).min().unwrap_or(u64::MAX);
        if is_complete {
            self.fitting = fitting;
            self.added = 0;
        } else {
            self.fitting = self.fitting.min(fitting.saturating_add(self.added));
        }
    }

    /// Number of further devices that fit.
    #[must_use]
    pub const fn room(&self) -> u64 {
        if self.is_full {
            return 0;
        }
        self.fitting.saturating_sub(self.added.saturating_add(self.held))
    }

    /// Whether a further device fits.
    #[must_use]
    pub const fn has_room(&self) -> bool {
        self.room() > 0
    }

    /// Whether undecided handshakes hold half of the room. The other half is for known devices.
    #[must_use]
    pub const fn is_crowded(&self) -> bool {
        self.held >= self.room()
    }

    /// Acquires a permit for a device. Returns `false` if it does not fit. Each permit is [committed](Self::commit) or
    /// [released](Self::release).
    #[must_use]
    pub const fn try_acquire(&mut self) -> bool {
        let has_room = self.has_room();
        if has_room {
            self.held += 1;
        }
        has_room
    }

    /// The device of a permit became a session.
    pub const fn commit(&mut self) {
        self.release();
        self.added = self.added.saturating_add(1);
    }

    /// The device of a permit did not become a session.
    pub const fn release(&mut self) {
        debug_assert!(self.held > 0, "taken before");
        self.held = self.held.saturating_sub(1);
    }

    /// Whether memory is short. It remains so until enough is free again.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.is_full
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn of(limit: u64, used: u64) -> Usage {
        Usage { used, limit }
    }

    fn measured<const N: usize>(guard: &mut Guard, usages: [Usage; N]) {
        guard.handle_measured(&usages.map(Some));
    }

    #[test]
    fn everybody_fits_until_something_is_measured_and_where_nothing_can_be() {
        let mut guard = Guard::default();
        assert!(guard.has_room() && guard.try_acquire());
        measured(&mut guard, [of(100 * MIB, 99 * MIB)]);
        assert!(!guard.has_room());

        guard.handle_measured(&[]);

        assert!(guard.try_acquire() && !guard.is_full());
    }

    #[test]
    fn no_more_are_taken_between_two_measurements_than_fit() {
        let mut guard = Guard::default();
        measured(&mut guard, [of(1024 * MIB, 900 * MIB), of(4096 * MIB, 0)]);

        let taken = (0..100_000).filter(|_| guard.try_acquire()).count();

        // 921.6 MiB less 900 MiB, by 16 KiB.
        assert_eq!(taken, 1_382);
        assert!(!guard.is_full(), "used memory alone does not make it full");
    }

    #[test]
    fn it_is_crowded_once_half_of_what_fits_is_held() {
        let mut guard = Guard::default();
        measured(&mut guard, [of(1000 * MIB, 900 * MIB - 4 * DEVICE_BYTES)]);

        assert!(guard.try_acquire() && !guard.is_crowded());
        assert!(guard.try_acquire() && guard.is_crowded());
        guard.commit();

        assert!(!guard.is_crowded(), "of three that fit one is held");
    }

    #[test]
    fn a_full_node_takes_devices_again_once_five_percent_more_are_free() {
        let mut guard = Guard::default();
        measured(&mut guard, [of(1000 * MIB, 899 * MIB)]);
        assert!(!guard.is_full());
        measured(&mut guard, [of(1000 * MIB, 901 * MIB)]);
        assert!(guard.is_full() && !guard.try_acquire());

        measured(&mut guard, [of(1000 * MIB, 860 * MIB)]);
        assert!(guard.is_full() && !guard.try_acquire(), "not enough is free");
        measured(&mut guard, [of(1000 * MIB, 849 * MIB)]);

        assert!(!guard.is_full() && guard.try_acquire());
    }

    #[test]
    fn small_memory_keeps_more_for_handshakes_but_never_more_than_a_quarter() {
        assert_eq!(of(128 * MIB, 0).full_from().div_ceil(MIB), 104);
        assert!((48 * MIB..49 * MIB).contains(&of(64 * MIB, 0).full_from()));
        assert!((921 * MIB..923 * MIB).contains(&of(1024 * MIB, 0).full_from()));
    }

    #[test]
    fn what_cannot_be_measured_any_more_is_as_full_as_it_was() {
        let one_fits = of(1000 * MIB, 900 * MIB - DEVICE_BYTES);
        let mut guard = Guard::default();
        measured(&mut guard, [one_fits, of(1000 * MIB, 0)]);
        guard.handle_measured(&[None, Some(of(1000 * MIB, 0))]);
        assert!(guard.try_acquire());
        guard.commit();
        guard.handle_measured(&[None, Some(of(1000 * MIB, 0))]);
        assert!(!guard.try_acquire(), "one fitted, and became a session");

        measured(&mut guard, [of(1000 * MIB, 950 * MIB)]);
        guard.handle_measured(&[None]);
        assert!(guard.is_full());
        measured(&mut guard, [of(1000 * MIB, 0)]);
        assert!(!guard.is_full() && guard.try_acquire());
    }

    #[test]
    fn group_that_is_nearest_to_its_own_bound_is_the_fullest() {
        // A quarter of 64 MiB is kept free, a tenth of 1,000 MiB.
        let (small, large) = (of(64 * MIB, 50 * MIB), of(1000 * MIB, 850 * MIB));

        assert!(small.fullness() > 1.0 && large.fullness() < 1.0);
    }

    #[test]
    fn large_memory_keeps_half_a_gibibyte() {
        assert_eq!(reserve(64 * 1024 * MIB), 512 * MIB);
        assert!(of(64 * 1024 * MIB, 65_100 * MIB).is_full());
        assert!(!of(64 * 1024 * MIB, 64_900 * MIB).is_relieved());
        assert!(of(64 * 1024 * MIB, 64_700 * MIB).is_relieved());
    }

    #[test]
    fn place_of_a_device_that_does_not_stay_is_given_back_and_counts_meanwhile_whatever_is_measured() {
        let one_fits = [of(1000 * MIB, 900 * MIB - DEVICE_BYTES)];
        let mut guard = Guard::default();
        measured(&mut guard, one_fits);
        assert!(guard.try_acquire());

        measured(&mut guard, one_fits);
        assert!(!guard.try_acquire(), "it may still become a session");
        guard.release();

        assert!(guard.try_acquire());
        guard.commit();
        assert!(!guard.try_acquire(), "not measured yet");
        measured(&mut guard, one_fits);
        assert!(guard.try_acquire());
    }

    proptest! {
        #[test]
        fn any_measurement_is_judged(usages in prop::collection::vec((1..=u64::MAX, any::<u64>()), 0..4)) {
            let usages: Vec<Usage> = usages.iter().map(|(limit, used)| of(*limit, *used)).collect();
            let mut guard = Guard::default();

            guard.handle_measured(&usages.iter().copied().map(Some).collect::<Vec<_>>());

            prop_assert!(!(guard.is_full() && guard.has_room()));
            prop_assert_eq!(guard.is_full(), usages.iter().any(|usage| usage.is_full()));
        }
    }
}
