//! Points in time that the caller supplies. Nothing here reads a clock.

use std::{
    ops::{Add, AddAssign, Sub},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

/// Monotonic time, in microseconds since an origin that the caller chose (process start, or the start of a simulation).
///
/// Eight bytes, so that millions of deadlines stay small. It can be created from a number, for simulated time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// The caller's origin.
    pub const ZERO: Self = Self(0);
    /// Later than any real time.
    pub const FAR_FUTURE: Self = Self(u64::MAX);

    #[must_use]
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    #[must_use]
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// Time from `earlier` to `self`; zero if `earlier` is later.
    #[must_use]
    pub const fn saturating_since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// Monotonic time in tenths of a second, since the same origin.
///
/// Four bytes, since every session has several. It ends after 13 years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tenths(u32);

impl Tenths {
    /// Later than every time that can be reached.
    pub const FAR_FUTURE: Self = Self(u32::MAX);

    const MICROS: u64 = 100_000;

    /// The last tenth that has begun at `at`.
    #[must_use]
    pub fn begun(at: Instant) -> Self {
        Self(u32::try_from(at.0 / Self::MICROS).unwrap_or(u32::MAX - 1))
    }

    /// The first tenth that does not begin before `at`.
    #[must_use]
    pub fn not_before(at: Instant) -> Self {
        Self(u32::try_from(at.0.div_ceil(Self::MICROS)).unwrap_or(u32::MAX))
    }

    /// Its beginning.
    #[must_use]
    pub const fn begin(self) -> Instant {
        Instant(self.0 as u64 * Self::MICROS)
    }
}

/// Saturates at [`Instant::FAR_FUTURE`].
impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(micros(span)))
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, span: Duration) {
        *self = *self + span;
    }
}

/// Saturates at [`Instant::ZERO`].
impl Sub<Duration> for Instant {
    type Output = Self;

    fn sub(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(micros(span)))
    }
}

/// Wall-clock time, in milliseconds since the Unix epoch. Only for data that leaves the process: tokens, stored rows,
/// API answers, expiry of rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WallTime(u64);

impl WallTime {
    #[must_use]
    pub const fn from_unix_ms(unix_ms: u64) -> Self {
        Self(unix_ms)
    }

    #[must_use]
    pub const fn as_unix_ms(self) -> u64 {
        self.0
    }

    /// Time from `earlier` to `self`; zero if `earlier` is later.
    #[must_use]
    pub const fn saturating_since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// RFC 3339 with milliseconds, in UTC. It can't write a time after the year 9999: that becomes the last
    /// millisecond of the year.
    #[must_use]
    pub fn to_rfc3339(self) -> String {
        const LAST_MS: u64 = 253_402_300_799_999;
        let since_epoch = Duration::from_millis(self.0.min(LAST_MS));
        humantime::format_rfc3339_millis(SystemTime::UNIX_EPOCH + since_epoch).to_string()
    }
}

/// Whole milliseconds; saturates.
impl Add<Duration> for WallTime {
    type Output = Self;

    fn add(self, span: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(span.as_millis()).unwrap_or(u64::MAX)),
        )
    }
}

/// Whole milliseconds; saturates at the Unix epoch.
impl Sub<Duration> for WallTime {
    type Output = Self;

    fn sub(self, span: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(u64::try_from(span.as_millis()).unwrap_or(u64::MAX)),
        )
    }
}

fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}
