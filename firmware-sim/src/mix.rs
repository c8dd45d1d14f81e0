//! Shares of a fleet: `3.8.0-b2=70%,3.8.0-b3=30%`, or counts, or `well-behaved=80%,fixed-5s=20%`.
//!
//! A [`Mix`] is what was asked for, a [`Deal`] who got what: exact to the device, spread evenly over the fleet, and the
//! same in every process that knows the seed.

use std::{fmt, str::FromStr, sync::Arc};

use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

/// Names in one mix, and versions that a fleet may ever have: each has its own row of figures.
pub const NAMES_MAX: usize = 256;

/// Percentages may miss 100 by this much: thirds can't be written exactly.
const PERCENT_SLACK: f64 = 0.5;

/// A part of a fleet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Share {
    /// 0 to 100.
    Percent(f64),
    /// Devices.
    Count(usize),
}

impl Share {
    /// Devices of `total`, to the nearest.
    #[must_use]
    pub fn of(self, total: usize) -> usize {
        match self {
            Self::Percent(percent) => part(total, percent / 100.0),
            Self::Count(count) => count.min(total),
        }
    }
}

impl FromStr for Share {
    type Err = MixError;

    fn from_str(text: &str) -> Result<Self, MixError> {
        let bad = || MixError::BadShare(text.into());
        match text.trim().strip_suffix('%') {
            Some(number) => match number.trim().parse() {
                Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(Self::Percent(percent)),
                Ok(_) | Err(_) => Err(bad()),
            },
            None => text.trim().parse().map(Self::Count).map_err(|_| bad()),
        }
    }
}

/// Names and their shares, in the order given. All shares are percentages that add up to 100, or all are counts.
#[derive(Clone, Debug, PartialEq)]
pub struct Mix(Vec<(String, Share)>);

impl Mix {
    /// One name for all.
    #[must_use]
    pub fn all(name: &str) -> Self {
        Self(vec![(name.into(), Share::Percent(100.0))])
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// Devices of each name, in the order of names.
    ///
    /// # Errors
    /// Counts that do not add up to `total`.
    pub fn counts(&self, total: usize) -> Result<Vec<usize>, MixError> {
        let counts: Vec<usize> = self
            .0
            .iter()
            .filter_map(|(_, share)| match share {
                Share::Count(count) => Some(*count),
                Share::Percent(_) => None,
            })
            .collect();
        if !counts.is_empty() {
            let sum = counts.iter().fold(0_usize, |sum, count| sum.saturating_add(*count));
            return if sum == total {
                Ok(counts)
            } else {
                Err(MixError::OtherTotal { sum, total })
            };
        }
        let mut ends = Vec::with_capacity(self.0.len());
        let mut percent = 0.0;
        for (_, share) in &self.0 {
            if let Share::Percent(part) = share {
                percent += part;
            }
            ends.push(part(total, percent / 100.0).min(total));
        }
        // The slack of the sum is the last name's.
        if let Some(last) = ends.last_mut() {
            *last = total;
        }
        let mut begin = 0;
        Ok(ends
            .into_iter()
            .map(|end| end - std::mem::replace(&mut begin, end))
            .collect())
    }
}

impl FromStr for Mix {
    type Err = MixError;

    /// Names may contain `=`: the last one divides. A name alone has everything.
    fn from_str(text: &str) -> Result<Self, MixError> {
        let mut parts: Vec<(String, Share)> = Vec::new();
        for entry in text.split(',') {
            let (name, share) = match entry.rsplit_once('=') {
                Some((name, share)) => (name.trim(), share.parse()?),
                None if text.contains(',') => return Err(MixError::NoShare(entry.trim().into())),
                None => (entry.trim(), Share::Percent(100.0)),
            };
            if name.is_empty() {
                return Err(MixError::NoName);
            }
            if parts.iter().any(|(known, _)| known == name) {
                return Err(MixError::Doubled(name.into()));
            }
            parts.push((name.into(), share));
        }
        if parts.len() > NAMES_MAX {
            return Err(MixError::TooMany);
        }
        let percents = parts.iter().filter_map(|(_, share)| match share {
            Share::Percent(percent) => Some(*percent),
            Share::Count(_) => None,
        });
        let (with_percent, sum) = percents.fold((0, 0.0), |(count, sum), percent| (count + 1, sum + percent));
        if with_percent != 0 && with_percent != parts.len() {
            return Err(MixError::MixedShares);
        }
        if with_percent != 0 && f64::abs(sum - 100.0) > PERCENT_SLACK {
            return Err(MixError::NotWhole(sum));
        }
        Ok(Self(parts))
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, share)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match share {
                Share::Percent(percent) => write!(f, "{comma}{name}={percent}%")?,
                Share::Count(count) => write!(f, "{comma}{name}={count}")?,
            }
        }
        Ok(())
    }
}

/// Who of a fleet has which name.
#[derive(Clone, Debug)]
pub struct Deal {
    names: Vec<Arc<str>>,
    /// An index into `names` for each device.
    of: Vec<u16>,
    /// Devices in the order in which they change: drawn once.
    order: Vec<u32>,
}

impl Deal {
    /// Deals the mix to `total` devices; different seeds give independent deals.
    ///
    /// # Errors
    /// Counts that do not add up to `total`.
    pub fn new(mix: &Mix, total: usize, seed: u64) -> Result<Self, MixError> {
        let counts = mix.counts(total)?;
        let mut order: Vec<u32> = (0..u32::try_from(total).map_err(|_| MixError::TooMany)?).collect();
        order.shuffle(&mut StdRng::seed_from_u64(seed));
        let mut of = vec![0; total];
        let dealt = (0_u16..)
            .zip(&counts)
            .flat_map(|(name, count)| std::iter::repeat_n(name, *count));
        for (device, name) in order.iter().zip(dealt) {
            of[*device as usize] = name;
        }
        let names = mix.names().map(Arc::from).collect();
        Ok(Self { names, of, order })
    }

    /// Index of the name that a device has.
    #[must_use]
    pub fn index_of(&self, device: usize) -> usize {
        self.of.get(device).copied().unwrap_or(0).into()
    }

    #[must_use]
    pub fn names(&self) -> &[Arc<str>] {
        &self.names
    }

    /// Gives `name` this share. The fewest devices change: those it lacks come from all the others alike, those it has too
    /// many of go to the other name with the most devices. Returns who has changed.
    ///
    /// # Errors
    /// More than [`NAMES_MAX`] names, or no other name to go to.
    pub fn set_share(&mut self, name: &str, share: Share) -> Result<Vec<usize>, MixError> {
        let known = self.names.iter().position(|known| &**known == name);
        let name = u16::try_from(known.unwrap_or(self.names.len())).map_err(|_| MixError::TooMany)?;
        if known.is_none() && self.names.len() == NAMES_MAX {
            return Err(MixError::TooMany);
        }
        let wanted = share.of(self.of.len());
        let has = self.of.iter().filter(|of| **of == name).count();
        let changed: Vec<usize> = if wanted >= has {
            self.moved(|of| of != name, wanted - has, name)
        } else {
            let other = self.commonest_but(name).ok_or(MixError::NoOther)?;
            self.moved(|of| of == name, has - wanted, other)
        };
        Ok(changed)
    }

    /// Adds a name that nobody has yet; returns its index.
    ///
    /// # Errors
    /// More than [`NAMES_MAX`] names.
    pub fn add_name(&mut self, name: &str) -> Result<usize, MixError> {
        if let Some(known) = self.names.iter().position(|known| &**known == name) {
            return Ok(known);
        }
        if self.names.len() == NAMES_MAX {
            return Err(MixError::TooMany);
        }
        self.names.push(name.into());
        Ok(self.names.len() - 1)
    }

    fn moved(&mut self, from: impl Fn(u16) -> bool, count: usize, to: u16) -> Vec<usize> {
        let moving: Vec<usize> = self
            .order
            .iter()
            .map(|device| *device as usize)
            .filter(|device| self.of.get(*device).is_some_and(|of| from(*of)))
            .take(count)
            .collect();
        for device in &moving {
            self.of[*device] = to;
        }
        moving
    }

    fn commonest_but(&self, name: u16) -> Option<u16> {
        let mut counts = vec![0_usize; self.names.len()];
        for of in &self.of {
            counts[usize::from(*of)] += 1;
        }
        (0_u16..)
            .zip(counts)
            .filter(|(other, _)| *other != name)
            .max_by_key(|(_, count)| *count)
            .map(|(other, _)| other)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "a share of at most the total, which is far below 2^52"
)]
fn part(total: usize, share: f64) -> usize {
    (total as f64 * share).round() as usize
}

/// A mix that can't be dealt.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum MixError {
    #[error("{0:?} is not a share: expected a percentage such as 70% or a number of devices")]
    BadShare(String),
    #[error("{0:?} has no share: expected NAME=70%")]
    NoShare(String),
    #[error("a name is missing before a share")]
    NoName,
    #[error("{0:?} is named twice")]
    Doubled(String),
    #[error("some shares are percentages, some are counts")]
    MixedShares,
    #[error("the percentages add up to {0:.1}, not to 100")]
    NotWhole(f64),
    #[error("the counts add up to {sum}, but the fleet has {total} devices")]
    OtherTotal { sum: usize, total: usize },
    #[error("more than 256 names")]
    TooMany,
    #[error("there is no other version to go back to")]
    NoOther,
    #[error("{0:?} is not a version: expected 1 to 64 bytes of printable ASCII")]
    BadVersion(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dealt(deal: &Deal) -> Vec<usize> {
        let mut counts = vec![0; deal.names().len()];
        for device in 0..deal.of.len() {
            counts[deal.index_of(device)] += 1;
        }
        counts
    }

    fn deal(mix: &str, total: usize) -> Deal {
        Deal::new(&mix.parse().unwrap(), total, 7).unwrap()
    }

    #[test]
    fn percentages_are_dealt_exactly() {
        assert_eq!(dealt(&deal("3.8.0-b2=70%,3.8.0-b3=30%", 1000)), [700, 300]);
        assert_eq!(dealt(&deal("a=33.3%,b=33.3%,c=33.3%", 100)), [33, 34, 33]);
        assert_eq!(dealt(&deal("3.8.0", 10)), [10]);
        assert_eq!(dealt(&deal("a=0.4%,b=99.6%", 10)), [0, 10]);
    }

    #[test]
    fn counts_are_dealt_exactly_or_refused() {
        assert_eq!(dealt(&deal("a=3,b=7", 10)), [3, 7]);
        assert_eq!(
            Deal::new(&"a=3,b=7".parse().unwrap(), 11, 7).unwrap_err(),
            MixError::OtherTotal { sum: 10, total: 11 }
        );
    }

    #[test]
    fn same_seed_deals_the_same_and_spreads_over_the_fleet() {
        let (one, two) = (deal("a=50%,b=50%", 1000), deal("a=50%,b=50%", 1000));

        assert_eq!(one.of, two.of);
        let in_first_half = one.of[..500].iter().filter(|of| **of == 0).count();
        assert!((200..300).contains(&in_first_half), "{in_first_half}");
    }

    #[test]
    fn growing_a_share_moves_only_who_must() {
        let mut deal = deal("a=50%,b=30%,c=20%", 1000);
        let before = deal.of.clone();

        let changed = deal.set_share("c", Share::Percent(40.0)).unwrap();

        assert_eq!(changed.len(), 200);
        assert_eq!(dealt(&deal)[2], 400);
        let really = (0..1000).filter(|device| before[*device] != deal.of[*device]).count();
        assert_eq!(really, 200);
    }

    #[test]
    fn shrinking_a_share_goes_to_the_commonest_other() {
        let mut deal = deal("a=50%,b=30%,c=20%", 1000);

        deal.set_share("c", Share::Count(0)).unwrap();

        assert_eq!(dealt(&deal), [700, 300, 0]);
    }

    #[test]
    fn new_version_joins_a_deal() {
        let mut deal = deal("a", 100);

        deal.add_name("b").unwrap();
        deal.set_share("b", Share::Percent(25.0)).unwrap();

        assert_eq!(dealt(&deal), [75, 25]);
    }

    #[test]
    fn only_version_has_nowhere_to_go() {
        assert_eq!(deal("a", 10).set_share("a", Share::Count(1)), Err(MixError::NoOther));
    }

    #[test]
    fn bad_mixes_say_what_is_wrong() {
        for (mix, words) in [
            ("a=70%,b=20%", "add up to 90"),
            ("a=70%,b=3", "some shares"),
            ("a=70%,b", "\"b\" has no share"),
            ("a=x", "\"x\" is not a share"),
            ("a=-1%,b=101%", "is not a share"),
            ("=100%", "a name is missing"),
            ("", "a name is missing"),
            ("a=50%,a=50%", "twice"),
            ("a=nan%", "is not a share"),
        ] {
            let message = mix.parse::<Mix>().unwrap_err().to_string();

            assert!(message.contains(words), "{message}");
        }
    }
}
