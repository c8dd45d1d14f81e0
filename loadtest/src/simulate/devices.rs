//! The fleet of a simulation: production's device machines, and what the simulator must know of each, in arrays.
//!
//! Ten million devices fit because nothing is kept that follows from a device's number: its id is computed, and
//! version, profile, tenant and model are its cohort's.

use std::{collections::BTreeMap, time::Duration};

use firmware_sim::{
    device::{Device as Machine, Patience, State},
    profile::Profile,
};
use rand::{Rng, seq::SliceRandom};
use seawall_proto::{
    id::{Credential, DeviceId, Label, SecretHash},
    record::{DeviceRecord, DeviceState},
    slots::{RegistryIndex, RegistryIndexBuilder},
    time::{Instant, WallTime},
};
use uuid::Uuid;

use super::{
    network::Network,
    presence::{Due, Presence},
};
use crate::{
    plan::apportion,
    scenario::{FieldError, Scenario, problem},
};

/// The credential of every simulated device: what it hashes to makes no difference to any decision.
pub const CREDENTIAL: Credential = Credential::Secret(SECRET);
const SECRET: SecretHash = SecretHash::from_bytes([7; 32]);
/// The registry's word for a device without a tenant.
const TENANT_DEFAULT: &str = "default";

/// Devices that have all of this in common.
#[derive(Clone, Debug, PartialEq)]
pub struct Cohort {
    pub fleet: usize,
    /// An index into [`Devices::versions`].
    pub version: usize,
    pub profile: Profile,
    pub tenant: Label,
    pub model: Option<Label>,
    pub patience: Patience,
    /// Its devices keep their resume tokens.
    pub resumes: bool,
    /// What its devices say that they run.
    pub firmware: Option<Label>,
}

/// What the simulator knows of a device beside its machine, in one place: an event touches all of it.
#[derive(Clone, Copy, Debug)]
struct Traits {
    /// What it was told, in microseconds of the slot; 0 for nothing.
    promised: u64,
    /// Half a round trip, in microseconds.
    half_trip: u32,
    /// Attempts so far, modulo 2^16: an event of another attempt is not this one's.
    attempt: u16,
    cohort: u16,
    /// As in the presence bitmap.
    due: Due,
    /// The node that holds its session, or was asked last.
    home: u8,
    /// Its session was told to close.
    is_closing: bool,
}

/// All devices, by number.
#[derive(Debug)]
pub struct Devices {
    pub machines: Vec<Machine>,
    traits: Vec<Traits>,
    presence: Presence,
    cohorts: Vec<Cohort>,
    versions: Vec<String>,
    seed: u64,
}

impl Devices {
    /// The scenario's fleets, shuffled. No device connects on its own.
    ///
    /// # Errors
    /// A tenant's name is not valid.
    pub fn new(scenario: &Scenario, network: &Network, rng: &mut impl Rng) -> Result<Self, FieldError> {
        let total = usize::try_from(scenario.devices).unwrap_or(usize::MAX);
        let shares: Vec<f64> = scenario.fleets.iter().map(|fleet| fleet.share).collect();
        let mut devices = Self {
            machines: Vec::with_capacity(total),
            traits: Vec::with_capacity(total),
            presence: Presence::new(total),
            cohorts: Vec::new(),
            versions: Vec::new(),
            seed: scenario.seed,
        };
        let half_trips: Vec<u32> = (0..total).map(|_| network.draw_half_trip(rng)).collect();
        let mut cohort_of = Vec::with_capacity(total);
        for (number, count) in apportion(total, &shares).into_iter().enumerate() {
            let fleet = &scenario.fleets[number];
            let versions = dealt(count, &fleet.firmware, rng);
            let profiles = dealt(count, &fleet.profile, rng);
            let tenant = fleet.tenant.as_deref().unwrap_or(TENANT_DEFAULT);
            let tenant = label(tenant).ok_or_else(|| problem("fleet.tenant", "is empty"))?;
            for (version, profile) in versions.into_iter().zip(profiles) {
                let cohort = Cohort {
                    fleet: number,
                    version: devices.version(version),
                    profile: profile.parse().unwrap_or_default(),
                    tenant: tenant.clone(),
                    model: fleet.model.as_deref().and_then(label),
                    patience: fleet.patience(),
                    resumes: fleet.resume,
                    firmware: label(version),
                };
                cohort_of.push(devices.cohort_number(&cohort));
            }
        }
        cohort_of.shuffle(rng);
        let traits = half_trips.into_iter().zip(cohort_of).map(|(half_trip, cohort)| Traits {
            promised: 0,
            half_trip,
            attempt: 0,
            cohort,
            due: Due::NEVER,
            home: 0,
            is_closing: false,
        });
        devices.traits.extend(traits);
        for number in 0..total {
            let machine = devices.machine_from(number, Instant::FAR_FUTURE);
            devices.machines.push(machine);
        }
        Ok(devices)
    }

    #[must_use]
    pub const fn len(&self) -> usize {
        self.machines.len()
    }

    /// A machine for this device that knows nothing of a life before.
    #[must_use]
    pub fn machine_from(&self, device: usize, first_attempt_at: Instant) -> Machine {
        let cohort = self.cohort(device);
        Machine::new(cohort.profile, first_attempt_at).with_patience(cohort.patience)
    }

    #[must_use]
    pub fn cohort(&self, device: usize) -> &Cohort {
        &self.cohorts[usize::from(self.traits[device].cohort)]
    }

    #[must_use]
    pub fn version_name(&self, version: usize) -> &str {
        &self.versions[version]
    }

    /// Its id looks random, as ids of real fleets do, and belongs to no other: the halves are permutations of its
    /// number.
    #[must_use]
    pub fn id(&self, device: usize) -> DeviceId {
        let number = u64::try_from(device).unwrap_or(u64::MAX);
        DeviceId::from_uuid(Uuid::from_u64_pair(
            mixed(number ^ self.seed.rotate_left(32)),
            mixed(number.wrapping_add(self.seed)),
        ))
    }

    /// The registry's record; `None` for an id of nobody's.
    #[must_use]
    pub fn record(&self, id: DeviceId) -> Option<DeviceRecord> {
        let (upper, _) = id.as_uuid().as_u64_pair();
        let device = usize::try_from(unmixed(upper) ^ self.seed.rotate_left(32)).ok()?;
        if device >= self.len() || self.id(device) != id {
            return None;
        }
        let cohort = self.cohort(device);
        Some(DeviceRecord {
            id,
            tenant: cohort.tenant.clone(),
            model: cohort.model.clone(),
            secret: SECRET,
            previous_secret: None,
            state: DeviceState::Enabled,
        })
    }

    /// All of them, as a gateway reads them from the registry.
    #[must_use]
    pub fn registry_index(&self) -> RegistryIndex {
        let mut builder = RegistryIndexBuilder::new([1; 16]);
        for device in 0..self.len() {
            // A simulation has no more devices than a registry index.
            builder.add(self.id(device), self.cohort(device).tenant.as_str());
        }
        builder.finish(WallTime::from_unix_ms(0))
    }

    #[must_use]
    pub fn half_trip(&self, device: usize) -> Duration {
        Duration::from_micros(self.traits[device].half_trip.into())
    }

    #[must_use]
    pub fn attempt(&self, device: usize) -> u16 {
        self.traits[device].attempt
    }

    /// Counts the next attempt of a device. Returns its number.
    pub fn count_attempt(&mut self, device: usize) -> u16 {
        let traits = &mut self.traits[device];
        traits.attempt = traits.attempt.wrapping_add(1);
        traits.is_closing = false;
        traits.attempt
    }

    #[must_use]
    pub fn home(&self, device: usize) -> u8 {
        self.traits[device].home
    }

    pub fn set_home(&mut self, device: usize, node: u8) {
        self.traits[device].home = node;
    }

    /// Whether its session was told to close.
    #[must_use]
    pub fn is_closing(&self, device: usize) -> bool {
        self.traits[device].is_closing
    }

    pub fn set_closing(&mut self, device: usize) {
        self.traits[device].is_closing = true;
    }

    /// When it was told to return, if that was its slot's time.
    #[must_use]
    pub fn promised(&self, device: usize) -> Option<Instant> {
        let promised = self.traits[device].promised;
        (promised > 0).then(|| Instant::from_micros(promised))
    }

    pub fn set_promised(&mut self, device: usize, promised: Option<Instant>) {
        self.traits[device].promised = promised.map_or(0, Instant::as_micros);
    }

    /// Updates the presence bitmap after an event of a device's machine. Returns whether the device is online.
    pub fn note_presence(&mut self, device: usize) -> bool {
        let (is_online, due) = self.look(device);
        let before = std::mem::replace(&mut self.traits[device].due, due);
        self.presence.change(device, is_online, before, due);
        is_online
    }

    /// Whether the presence bitmap still agrees with the machine.
    #[must_use]
    pub fn is_as_noted(&self, device: usize) -> bool {
        self.look(device) == (self.presence.online().get(device), self.traits[device].due)
    }

    #[must_use]
    pub const fn presence(&self) -> &Presence {
        &self.presence
    }

    fn look(&self, device: usize) -> (bool, Due) {
        let machine = &self.machines[device];
        let state = machine.state();
        let due = match state {
            State::Waiting | State::Connecting => machine.poll_timeout(),
            State::Online | State::Stopped { .. } => None,
        };
        (state == State::Online, Due::of(due))
    }

    /// Loads what is known of a device into the processor's cache, before its event is handled.
    pub fn fetch(&self, device: usize) {
        if let Some(machine) = self.machines.get(device) {
            std::hint::black_box((
                machine.state(),
                machine.slot().map(|slot| slot.as_bytes().first().copied()),
                self.traits[device].attempt,
            ));
        }
    }

    /// Changes the version of a device.
    pub fn upgrade(&mut self, device: usize, version: &str) {
        let of = self.cohort(device).clone();
        let cohort = Cohort {
            firmware: label(version),
            version: self.version(version),
            ..of
        };
        self.traits[device].cohort = self.cohort_number(&cohort);
    }

    /// Draws devices of other versions until `version` has the share `to` of all, in the order in which they change.
    pub fn draw_upgrades(&mut self, version: &str, to: f64, rng: &mut impl Rng) -> Vec<u32> {
        let version = self.version(version);
        let (has, mut others): (Vec<u32>, Vec<u32>) = (0_u32..)
            .zip(&self.traits)
            .map(|(device, traits)| (device, self.cohorts[usize::from(traits.cohort)].version))
            .fold((Vec::new(), Vec::new()), |(mut has, mut others), (device, of)| {
                if of == version {
                    has.push(device)
                } else {
                    others.push(device)
                }
                (has, others)
            });
        let wanted = apportion(self.len(), &[to, 1.0 - to]).first().copied().unwrap_or(0);
        others.shuffle(rng);
        others.truncate(wanted.saturating_sub(has.len()));
        others
    }

    /// The number of a version, known or new.
    pub fn version(&mut self, name: &str) -> usize {
        self.versions.iter().position(|known| known == name).unwrap_or_else(|| {
            self.versions.push(name.to_owned());
            self.versions.len() - 1
        })
    }

    /// There are as many as fleets, versions and profiles make: far fewer than 2^16 (a scenario is a file of 256 KiB).
    fn cohort_number(&mut self, cohort: &Cohort) -> u16 {
        let number = self
            .cohorts
            .iter()
            .position(|known| known == cohort)
            .unwrap_or_else(|| {
                self.cohorts.push(cohort.clone());
                self.cohorts.len() - 1
            });
        u16::try_from(number).unwrap_or(u16::MAX)
    }
}

/// `count` names in the proportions of `mix`, shuffled.
fn dealt<'a>(count: usize, mix: &'a BTreeMap<String, f64>, rng: &mut impl Rng) -> Vec<&'a str> {
    let shares: Vec<f64> = mix.values().copied().collect();
    let mut names: Vec<&str> = mix
        .keys()
        .zip(apportion(count, &shares))
        .flat_map(|(name, count)| std::iter::repeat_n(name.as_str(), count))
        .collect();
    names.shuffle(rng);
    names
}

fn label(text: &str) -> Option<Label> {
    Label::parse(text).ok().flatten()
}

/// A permutation of all numbers of 64 bits that leaves no trace of their order (SplitMix64's).
const fn mixed(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// The number that [`mixed`] makes this one of.
const fn unmixed(mixed: u64) -> u64 {
    let number = mixed ^ (mixed >> 31) ^ (mixed >> 62);
    let number = number.wrapping_mul(0x3196_42b2_d24d_8ec3);
    let number = number ^ (number >> 27) ^ (number >> 54);
    let number = number.wrapping_mul(0x96de_1b17_3f11_9089);
    let number = number ^ (number >> 30) ^ (number >> 60);
    number.wrapping_sub(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_of_a_device_follows_from_its_id() {
        for number in [0, 1, 2, 1 << 20, u64::MAX, 0x0123_4567_89ab_cdef] {
            assert_eq!(unmixed(mixed(number)), number);
        }
    }
}
