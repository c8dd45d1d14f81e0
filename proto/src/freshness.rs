//! How old a copy of something is, in words: the registry, the rules, the configuration.

use std::time::Duration;

/// Time without contact to its source after which a copy is stale.
pub const STALE_AFTER: Duration = Duration::from_secs(60);
/// Time without contact after which its grace begins.
pub const GRACE_AFTER: Duration = Duration::from_mins(15);
/// Time without contact after which it has expired.
pub const GRACE: Duration = Duration::from_hours(8);

crate::labels! {
    /// How long ago its source last confirmed a copy.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub enum Freshness {
        /// Within the last minute.
        Fresh = "fresh",
        /// Not within the last minute.
        Stale = "stale",
        /// Not within the last 15 minutes.
        Grace = "grace",
        /// Not within the last eight hours.
        Expired = "expired",
    }
}

impl Freshness {
    /// `age`: time since its source last confirmed it.
    #[must_use]
    pub const fn of(age: Duration) -> Self {
        let seconds = age.as_secs();
        if seconds < STALE_AFTER.as_secs() {
            Self::Fresh
        } else if seconds < GRACE_AFTER.as_secs() {
            Self::Stale
        } else if seconds < GRACE.as_secs() {
            Self::Grace
        } else {
            Self::Expired
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_is_fresh_for_a_minute_then_stale_then_in_grace_until_eight_hours() {
        for (seconds, freshness) in [
            (0, Freshness::Fresh),
            (59, Freshness::Fresh),
            (60, Freshness::Stale),
            (899, Freshness::Stale),
            (900, Freshness::Grace),
            (28_799, Freshness::Grace),
            (28_800, Freshness::Expired),
        ] {
            assert_eq!(Freshness::of(Duration::from_secs(seconds)), freshness, "{seconds} s");
        }
    }
}
