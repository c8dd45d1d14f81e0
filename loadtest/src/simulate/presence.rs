//! Presence bitmap: whether each device is online, and when its machine is due. Dense enough to check all devices each
//! virtual second.
//!
//! It is updated from the machine after each event of a device. The sweep compares it with the recorder and, in turn,
//! with the machines. Start with [`Presence`].

use std::time::Duration;

use seawall_proto::time::Instant;

/// One bit per device.
#[derive(Debug, PartialEq, Eq)]
pub struct Bits(Vec<u64>);

impl Bits {
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self(vec![0; len.div_ceil(64)])
    }

    #[must_use]
    pub fn get(&self, index: usize) -> bool {
        self.0[index / 64] & bit(index) != 0
    }

    pub fn set(&mut self, index: usize, is_set: bool) {
        let word = &mut self.0[index / 64];
        *word = if is_set {
            *word | bit(index)
        } else {
            *word & !bit(index)
        };
    }

    /// Number of bits that are set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The first bit in which the two differ.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<usize> {
        let at = self.0.iter().zip(&other.0).position(|(one, other)| one != other)?;
        Some(at * 64 + (self.0[at] ^ other.0[at]).trailing_zeros() as usize)
    }
}

const fn bit(index: usize) -> u64 {
    1 << (index % 64)
}

/// The second in which a machine is due; [`NEVER`](Self::NEVER) if it only reacts to events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due(u32);

impl Due {
    pub const NEVER: Self = Self(u32::MAX);

    #[must_use]
    pub fn of(due: Option<Instant>) -> Self {
        due.map_or(Self::NEVER, |due| Self(second(due)))
    }
}

/// Presence of all devices.
#[derive(Debug)]
pub struct Presence {
    online: Bits,
    /// Number of machines that are due in each second.
    dues: Vec<u32>,
}

impl Presence {
    #[must_use]
    pub fn new(devices: usize) -> Self {
        Self {
            online: Bits::new(devices),
            dues: Vec::new(),
        }
    }

    #[must_use]
    pub const fn online(&self) -> &Bits {
        &self.online
    }

    /// This device's machine is online now, or not, and due then instead.
    pub fn change(&mut self, device: usize, is_online: bool, before: Due, after: Due) {
        self.online.set(device, is_online);
        if before == after {
            return;
        }
        if before != Due::NEVER {
            self.dues[before.0 as usize] -= 1;
        }
        if after != Due::NEVER {
            let second = after.0 as usize;
            if self.dues.len() <= second {
                self.dues.resize(second + 1, 0);
            }
            self.dues[second] += 1;
        }
    }

    /// Machines that were due in a second which is past, and nothing woke them. `slack`: what a timer may be late by.
    #[must_use]
    pub fn overdue(&self, slack: Duration, now: Instant) -> u64 {
        let past = second(now - slack) as usize;
        let dues = self.dues.iter().take(past);
        dues.map(|count| u64::from(*count)).sum()
    }
}

/// A simulation lasts for days at most.
fn second(at: Instant) -> u32 {
    u32::try_from(at.as_micros() / 1_000_000).unwrap_or(u32::MAX - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLACK: Duration = Duration::from_millis(50);

    fn at(seconds: u64) -> Instant {
        Instant::from_micros(seconds * 1_000_000)
    }

    #[test]
    fn machine_that_nothing_wakes_is_overdue_until_it_moves() {
        let mut presence = Presence::new(3);
        let (first, second) = (Due::of(Some(at(5))), Due::of(Some(at(7))));
        presence.change(0, false, Due::NEVER, first);
        presence.change(1, false, Due::NEVER, second);

        assert_eq!(presence.overdue(SLACK, at(6)), 0, "it may be late by the slack");
        assert_eq!(presence.overdue(SLACK, at(7)), 1);
        assert_eq!(presence.overdue(SLACK, at(9)), 2);

        presence.change(0, true, first, Due::NEVER);
        presence.change(1, false, second, Due::of(Some(at(12))));

        assert_eq!(presence.overdue(SLACK, at(9)), 0);
        assert_eq!(presence.online().count(), 1);
    }

    #[test]
    fn bits_that_differ_are_found() {
        let (mut one, mut other) = (Bits::new(1_000), Bits::new(1_000));
        one.set(700, true);
        other.set(700, true);
        assert_eq!(one.difference(&other), None);

        other.set(999, true);

        assert_eq!(one.difference(&other), Some(999));
        other.set(999, false);
        assert!(one.get(700) && one == other);
    }
}
