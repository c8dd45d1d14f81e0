//! Cohorts: devices of one model with one firmware version. Devices are counted, compared and isolated by cohort.
//!
//! Versions that are equal in the order are one cohort: `v3.8.0`, `3.8` and `3.8.0+serial17`. A [`CohortTag`]
//! identifies a cohort.

use std::{fmt, hash::Hasher as _};

use siphasher::sip::SipHasher13;

use crate::firmware::{MISSING, Version};

/// Minimum ratio of sizes at which a cohort replaces one that is shown. It keeps the choice stable.
const HYSTERESIS: f64 = 1.2;

/// A model with a firmware version, in eight bytes: the same on all nodes. Devices that only claim to be of a cohort
/// have another tag than authenticated ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CohortTag(u64);

impl CohortTag {
    /// Set in the tags of authenticated devices.
    const CONFIRMED: u64 = 1;

    /// Tag of devices that claim this model and version. The model may be left to the registry.
    #[must_use]
    pub fn of(model: Option<&str>, firmware: Option<&str>) -> Self {
        let mut hash = Hashed(SipHasher13::new());
        hash.0.write(model.unwrap_or_default().as_bytes());
        // A byte that no model or version contains.
        hash.0.write_u8(0);
        let firmware = firmware.map(str::trim).filter(|text| !text.is_empty());
        Version::of(firmware.unwrap_or(MISSING))
            .write_canonical(&mut hash)
            .expect("hashing does not fail");
        Self(hash.0.finish() & !Self::CONFIRMED)
    }

    /// Tag of authenticated devices. `model` is the device's claim, otherwise the registry's.
    #[must_use]
    pub fn confirmed(model: Option<&str>, firmware: Option<&str>) -> Self {
        Self(Self::of(model, firmware).0 | Self::CONFIRMED)
    }

    #[must_use]
    pub const fn is_confirmed(self) -> bool {
        self.0 & Self::CONFIRMED != 0
    }

    /// Tag of devices that claim to be of this cohort.
    #[must_use]
    pub const fn claimed(self) -> Self {
        Self(self.0 & !Self::CONFIRMED)
    }
}

/// What an authenticated device is, for comparisons between versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Model and version, as devices that name both claim it.
    pub named: CohortTag,
    /// The version alone, as devices that leave their model to the registry claim it.
    pub unnamed: CohortTag,
    pub model: ModelTag,
}

/// A model, in eight bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelTag(u64);

impl ModelTag {
    #[must_use]
    pub fn of(model: Option<&str>) -> Self {
        Self(CohortTag::of(model, None).0)
    }
}

impl Kind {
    /// `model` is the device's claim, otherwise the registry's.
    #[must_use]
    pub fn of(model: Option<&str>, firmware: Option<&str>) -> Self {
        Self {
            named: CohortTag::of(model, firmware),
            unnamed: CohortTag::of(None, firmware),
            model: ModelTag::of(model),
        }
    }
}

struct Hashed(SipHasher13);

impl fmt::Write for Hashed {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

/// Chooses at most `max` cohorts to be shown separately: the largest ones, except that `chosen` ones stay until another
/// clearly exceeds them.
///
/// `by_size`: all cohorts, largest first.
pub fn choose<C: Clone>(
    chosen: Vec<C>,
    by_size: &[C],
    max: usize,
    size: impl Fn(&C) -> usize,
    is_same: impl Fn(&C, &C) -> bool,
) -> Vec<C> {
    let mut chosen = chosen;
    chosen.retain(|cohort| by_size.iter().any(|other| is_same(cohort, other)));
    for candidate in by_size {
        if chosen.iter().any(|cohort| is_same(cohort, candidate)) {
            continue;
        }
        if chosen.len() < max {
            chosen.push(candidate.clone());
            continue;
        }
        let smallest = chosen.iter_mut().min_by_key(|cohort| size(cohort));
        match smallest.filter(|smallest| size(candidate) as f64 > size(smallest) as f64 * HYSTERESIS) {
            Some(smallest) => *smallest = candidate.clone(),
            None => break,
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_versions_are_one_cohort() {
        let of = |firmware| CohortTag::of(Some("camera"), Some(firmware));

        for same in [
            "3.8.0",
            "v3.8",
            "3.8.0+serial17",
            " FW_3.08.0.0 ",
            "3.8.0-gcb84623",
            "3.8.0 (stable)",
        ] {
            assert_eq!(of(same), of("v3.8.0"), "{same}");
        }
        for other in ["3.8.0-b2", "3.8.1", "3.8.0-1", "main", "38.0"] {
            assert_ne!(of(other), of("v3.8.0"), "{other}");
        }
        assert_eq!(of(""), CohortTag::of(Some("camera"), None));
    }

    #[test]
    fn model_and_confirmation_tell_cohorts_apart() {
        let (claimed, confirmed) = (
            CohortTag::of(Some("a"), Some("1")),
            CohortTag::confirmed(Some("a"), Some("1")),
        );

        assert_ne!(claimed, CohortTag::of(Some("b"), Some("1")));
        assert_ne!(claimed, CohortTag::of(None, Some("1")));
        assert_ne!(claimed, confirmed);
        assert!(confirmed.is_confirmed() && !claimed.is_confirmed());
        assert_eq!(confirmed.claimed(), claimed);
    }

    /// Nodes add up what they count.
    #[test]
    fn tags_are_the_same_in_all_versions() {
        assert_eq!(
            CohortTag::of(Some("camera"), Some("3.8.0-b3")).0,
            13_615_759_406_397_610_166
        );
        assert_eq!(CohortTag::confirmed(None, None).0, 200_173_246_920_635_303);
    }

    #[test]
    fn the_largest_are_chosen_and_stay_until_others_are_clearly_larger() {
        let choose = |chosen: &[usize], sizes: &[usize]| {
            let mut by_size: Vec<usize> = (0..sizes.len()).collect();
            by_size.sort_by_key(|cohort| std::cmp::Reverse(sizes[*cohort]));
            super::choose(
                chosen.to_vec(),
                &by_size,
                2,
                |cohort| sizes[*cohort],
                |left, right| left == right,
            )
        };

        assert_eq!(choose(&[], &[5, 10, 20]), [2, 1]);
        assert_eq!(choose(&[2, 1], &[12, 10, 20]), [2, 1]);
        assert_eq!(choose(&[2, 1], &[13, 10, 20]), [2, 0]);
        assert_eq!(choose(&[7, 1], &[5, 10]), [1, 0]);
        assert!(choose(&[], &[]).is_empty());
    }
}
