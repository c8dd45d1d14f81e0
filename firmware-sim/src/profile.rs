//! How a simulated device behaves, from the reference device to the ones that a gateway must survive.
//!
//! A [`Profile`] is data: [`Device`](crate::device::Device) asks it what to obey, the driver asks it how to read.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Serialize, Serializer};

/// One named behaviour. Its name, in kebab case, is what the command line and scenarios take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Profile {
    /// `well-behaved`: the reference device. Obeys hints, slots and close codes; full jitter without a hint.
    #[default]
    WellBehaved,
    /// `fixed-5s` (or any `fixed-Ns`, 1 to 3600): reconnects every N seconds whatever it is told.
    Fixed { seconds: u16 },
    /// `immediate`: reconnects after 50 ms, whatever it is told.
    Immediate,
    /// `ignores-hints`: full jitter as the reference device, but blind to hints, slots and close codes.
    IgnoresHints,
    /// `exponential-no-jitter`: 1, 2, 4, … 60 s whatever it is told; devices that failed together return together.
    ExponentialNoJitter,
    /// `patient`: well-behaved, but never takes a silent gateway for gone, as a client that trusts TCP alone.
    Patient,
    /// `slow-reader`: well-behaved, but takes one message a second from a small receive buffer.
    SlowReader,
    /// `half-open`: connects, then neither reads nor writes, as a device that lost its power; reconnects after 2 min.
    HalfOpen,
    /// `flapping`: resets its connection after 1 to 5 s of session, and is back within a second; obeys hints.
    Flapping,
    /// `duplicate-id`: two devices under one identity, as cloned firmware makes them; neither heeds close code 4500.
    DuplicateId,
}

/// `fixed-Ns` takes at most an hour.
const FIXED_SECONDS_MAX: u16 = 3600;

/// What `immediate` means: about the time in which a device's stack opens its next socket. Without it a fleet on the same
/// machine as its gateway would spin on a closed port.
pub const IMMEDIATE: Duration = Duration::from_millis(50);

/// A half-open device's silence, until it has its power back: longer than the gateway's 3 × `heartbeat_ms`, by default.
pub const HALF_OPEN_SILENCE: Duration = Duration::from_secs(120);

/// Shortest and longest session of a flapping device.
pub const FLAPPING_SESSION: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

/// A flapping device is back within this.
pub const FLAPPING_RETURN_MAX: Duration = Duration::from_secs(1);

impl Profile {
    /// One of each, `fixed` with its usual 5 s.
    pub const ALL: [Self; 10] = [
        Self::WellBehaved,
        Self::Fixed { seconds: 5 },
        Self::Immediate,
        Self::IgnoresHints,
        Self::ExponentialNoJitter,
        Self::Patient,
        Self::SlowReader,
        Self::HalfOpen,
        Self::Flapping,
        Self::DuplicateId,
    ];

    /// Whether it waits as hints say, shows its slot and its resume token, and heeds close codes. The others know nothing of this gateway.
    #[must_use]
    pub const fn obeys_hints(self) -> bool {
        match self {
            Self::WellBehaved
            | Self::Patient
            | Self::SlowReader
            | Self::HalfOpen
            | Self::Flapping
            | Self::DuplicateId => true,
            Self::Fixed { .. } | Self::Immediate | Self::IgnoresHints | Self::ExponentialNoJitter => false,
        }
    }

    /// Whether it stays away for a quarter of an hour after a newer session replaced its own (4500).
    #[must_use]
    pub const fn yields_to_newer_session(self) -> bool {
        self.obeys_hints() && !matches!(self, Self::DuplicateId)
    }

    /// Whether it reads and writes at all while connected.
    #[must_use]
    pub const fn is_silent(self) -> bool {
        matches!(self, Self::HalfOpen)
    }

    /// Whether it ends sessions on its own, by a reset.
    #[must_use]
    pub const fn ends_sessions(self) -> bool {
        matches!(self, Self::HalfOpen | Self::Flapping)
    }

    /// Whether it ends a session in which the gateway has been silent for three heartbeats.
    #[must_use]
    pub const fn gives_up_on_silence(self) -> bool {
        !matches!(self, Self::Patient) && !self.is_silent()
    }

    /// How many devices share one identity.
    #[must_use]
    pub const fn devices_per_identity(self) -> usize {
        if matches!(self, Self::DuplicateId) { 2 } else { 1 }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WellBehaved => f.write_str("well-behaved"),
            Self::Fixed { seconds } => write!(f, "fixed-{seconds}s"),
            Self::Immediate => f.write_str("immediate"),
            Self::IgnoresHints => f.write_str("ignores-hints"),
            Self::ExponentialNoJitter => f.write_str("exponential-no-jitter"),
            Self::Patient => f.write_str("patient"),
            Self::SlowReader => f.write_str("slow-reader"),
            Self::HalfOpen => f.write_str("half-open"),
            Self::Flapping => f.write_str("flapping"),
            Self::DuplicateId => f.write_str("duplicate-id"),
        }
    }
}

impl FromStr for Profile {
    type Err = UnknownProfile;

    fn from_str(name: &str) -> Result<Self, UnknownProfile> {
        if let Some(seconds) = name.strip_prefix("fixed-").and_then(|rest| rest.strip_suffix('s')) {
            return match seconds.parse() {
                Ok(seconds @ 1..=FIXED_SECONDS_MAX) => Ok(Self::Fixed { seconds }),
                Ok(_) | Err(_) => Err(UnknownProfile(name.into())),
            };
        }
        Self::ALL
            .into_iter()
            .find(|profile| profile.to_string() == name)
            .ok_or_else(|| UnknownProfile(name.into()))
    }
}

impl Serialize for Profile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Profile {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        name.parse().map_err(serde::de::Error::custom)
    }
}

/// No profile has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no profile is called {0:?}: expected well-behaved, fixed-Ns (N from 1 to 3600), immediate, ignores-hints, \
     exponential-no-jitter, patient, slow-reader, half-open, flapping or duplicate-id"
)]
pub struct UnknownProfile(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_is_found_by_its_name() {
        for profile in Profile::ALL {
            assert_eq!(profile.to_string().parse(), Ok(profile));
        }
        assert_eq!("fixed-90s".parse(), Ok(Profile::Fixed { seconds: 90 }));
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        for name in [
            "",
            "fixed-s",
            "fixed-0s",
            "fixed-3601s",
            "fixed--1s",
            "Well-Behaved",
            "fixed",
        ] {
            let message = name.parse::<Profile>().unwrap_err().to_string();

            assert!(message.contains("well-behaved"), "{message}");
        }
    }
}
