//! Which devices a scenario has: their ids, secrets, versions and behaviours, drawn from the seed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use firmware_sim::{device::Patience, identity::Identity, messages, profile::Profile};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use uuid::Uuid;

use crate::scenario::Scenario;

/// A device of a fleet.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    pub id: Uuid,
    /// What it calls itself, where that is not a UUID.
    pub external_id: Option<Arc<str>>,
    pub secret: String,
    pub firmware: String,
    pub profile: Profile,
    /// Another device has its id and secret.
    pub has_twin: bool,
    pub tenant: Option<String>,
    pub model: Option<String>,
    pub patience: Patience,
    /// Between two messages that it sends. None: it sends none.
    pub messages_every: Option<Duration>,
    /// It shows its resume token when it returns.
    pub resumes: bool,
}

/// All devices of a scenario.
#[derive(Clone, Debug)]
pub struct Plan {
    pub devices: Vec<Device>,
    /// Registered devices that no fleet has.
    bystanders: u32,
    seed: u64,
}

impl Plan {
    /// The same scenario and seed give the same devices.
    #[must_use]
    pub fn new(scenario: &Scenario) -> Self {
        let mut rng = StdRng::seed_from_u64(scenario.seed);
        let total = usize::try_from(scenario.devices).unwrap_or(usize::MAX);
        let fleet_shares: Vec<f64> = scenario.fleets.iter().map(|fleet| fleet.share).collect();
        let mut devices = Vec::with_capacity(total);
        for (fleet, count) in scenario.fleets.iter().zip(apportion(total, &fleet_shares)) {
            let versions = dealt(count, &fleet.firmware, &mut rng);
            let profiles = dealt(count, &fleet.profile, &mut rng);
            let first = devices.len();
            for (firmware, profile) in versions.into_iter().zip(profiles) {
                devices.push(Device {
                    id: uuid(&mut rng),
                    external_id: None,
                    secret: secret(&mut rng),
                    firmware: firmware.to_owned(),
                    // A scenario that has been checked names no other.
                    profile: profile.parse().unwrap_or_default(),
                    has_twin: false,
                    tenant: fleet.tenant.clone(),
                    model: fleet.model.clone(),
                    patience: fleet.patience(),
                    messages_every: messages::every(fleet.messages_per_minute),
                    resumes: fleet.resume,
                });
            }
            pair(&mut devices[first..]);
        }
        devices.shuffle(&mut rng);
        let bystanders = scenario.database.registered.saturating_sub(scenario.devices);
        Self {
            devices,
            bystanders,
            seed: scenario.seed,
        }
    }

    /// Gives the devices these identities, which are registered already. Devices that share an id get the same one.
    /// Devices beyond their number keep their own.
    pub fn adopt(&mut self, identities: &[Identity]) {
        let mut left = identities.iter();
        let mut adopted: BTreeMap<Uuid, &Identity> = BTreeMap::new();
        for device in &mut self.devices {
            let identity = match adopted.get(&device.id) {
                Some(identity) => identity,
                None => match left.next() {
                    Some(identity) => {
                        adopted.insert(device.id, identity);
                        identity
                    }
                    None => continue,
                },
            };
            device.id = identity.id.as_uuid();
            device.external_id.clone_from(&identity.external_id);
            device.secret = identity.secret.to_string();
            device.tenant = identity.tenant.as_deref().map(str::to_owned);
            if let Some(model) = &identity.model {
                device.model = Some(model.to_string());
            }
        }
    }

    /// Everything that is registered, as `devices import` reads it.
    #[must_use]
    pub fn csv(&self) -> String {
        let mut out = csv::Writer::from_writer(Vec::new());
        // Writing to memory can't fail, and each record has the four fields of the first.
        let _ = out.write_record(["id", "secret", "tenant", "model"]);
        let mut ids = BTreeSet::new();
        for device in self.devices.iter().filter(|device| ids.insert(device.id)) {
            let (tenant, model) = (device.tenant.as_deref(), device.model.as_deref());
            let id = device.id.to_string();
            let _ = out.write_record([&id, device.secret.as_str(), tenant.unwrap_or(""), model.unwrap_or("")]);
        }
        let mut rng = StdRng::seed_from_u64(!self.seed);
        for _ in 0..self.bystanders {
            let _ = out.write_record([uuid(&mut rng).to_string().as_str(), &secret(&mut rng), "", ""]);
        }
        out.into_inner()
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .unwrap_or_default()
    }

    /// Draws devices of other versions until `firmware` has the share `to` of all. Returns their indices, in the order in which they
    /// change.
    #[must_use]
    pub fn to_upgrade(&self, firmware: &str, to: f64, rng: &mut impl Rng) -> Vec<usize> {
        let has = self.devices.iter().filter(|device| device.firmware == firmware).count();
        let wanted = apportion(self.devices.len(), &[to, 1.0 - to])
            .first()
            .copied()
            .unwrap_or(0);
        let mut others: Vec<usize> = (0..self.devices.len())
            .filter(|index| {
                self.devices
                    .get(*index)
                    .is_some_and(|device| device.firmware != firmware)
            })
            .collect();
        others.shuffle(rng);
        others.truncate(wanted.saturating_sub(has));
        others
    }
}

/// Gives every second device of a profile that shares ids the id and secret of the one before. An odd one stays alone.
fn pair(devices: &mut [Device]) {
    let mut alone: Option<usize> = None;
    for index in 0..devices.len() {
        if devices[index].profile.devices_per_identity() == 1 {
            continue;
        }
        match alone.take() {
            None => alone = Some(index),
            Some(other) => {
                devices[index].id = devices[other].id;
                devices[index].secret = devices[other].secret.clone();
                (devices[index].has_twin, devices[other].has_twin) = (true, true);
            }
        }
    }
}

/// Parts of a whole, rounded so that they add up: the greatest remainders get the rest.
pub(crate) fn apportion(total: usize, shares: &[f64]) -> Vec<usize> {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at most 16,000,000 devices, and shares of 0 to 1"
    )]
    let mut parts: Vec<(usize, f64)> = shares
        .iter()
        .map(|share| {
            let exact = total as f64 * share;
            (exact.floor() as usize, exact.fract())
        })
        .collect();
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by(|a, b| parts[*b].1.total_cmp(&parts[*a].1));
    let given: usize = parts.iter().map(|part| part.0).sum();
    for index in order.into_iter().cycle().take(total.saturating_sub(given).min(total)) {
        parts[index].0 += 1;
    }
    parts.into_iter().map(|part| part.0).collect()
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

fn uuid(rng: &mut impl Rng) -> Uuid {
    uuid::Builder::from_random_bytes(rng.random()).into_uuid()
}

/// 256 bits, as hexadecimal digits.
fn secret(rng: &mut impl Rng) -> String {
    format!("{:032x}{:032x}", rng.random::<u128>(), rng.random::<u128>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_a_file_replace_those_of_the_plan_and_twins_share_one() {
        let mut scenario = scenario(1);
        scenario.devices = 4;
        let mut plan = Plan::new(&scenario);
        (plan.devices[1].id, plan.devices[3].id) = (plan.devices[0].id, Uuid::from_u128(7));
        let text = "id,secret,tenant,model\nfirst one,secret-of-16-bytes,acme,m9\n\
            00000000-0000-4000-8000-000000000002,secret-2-of-16-bytes,,\n";
        let identities = firmware_sim::identity::read_devices(text.as_bytes(), Default::default()).unwrap();
        let model = plan.devices[2].model.clone();

        plan.adopt(&identities);

        let of = |index: usize| (&plan.devices[index].id, plan.devices[index].secret.as_str());
        assert_eq!(of(0), of(1));
        assert_eq!(plan.devices[0].external_id.as_deref(), Some("first one"));
        assert_eq!(
            (plan.devices[0].tenant.as_deref(), plan.devices[0].model.as_deref()),
            (Some("acme"), Some("m9"))
        );
        assert_eq!((of(2).1, &plan.devices[2].model), ("secret-2-of-16-bytes", &model));
        assert_eq!(*of(3).0, Uuid::from_u128(7), "the file has no third");
    }

    #[test]
    fn parts_add_up_to_the_whole() {
        assert_eq!(apportion(10, &[0.7, 0.3]), [7, 3]);
        assert_eq!(apportion(10, &[0.333, 0.333, 0.334]).iter().sum::<usize>(), 10);
        assert_eq!(apportion(1, &[0.5, 0.5]).iter().sum::<usize>(), 1);
        assert_eq!(apportion(0, &[1.0]), [0]);
    }

    #[test]
    fn the_same_seed_gives_the_same_devices() {
        let (a, b) = (Plan::new(&scenario(1)), Plan::new(&scenario(1)));

        assert_eq!(a.devices, b.devices);
        assert_ne!(a.devices, Plan::new(&scenario(2)).devices);
        let with = |version: &str| a.devices.iter().filter(|device| device.firmware == version).count();
        assert_eq!((with("b2"), with("b3")), (75, 25));
    }

    #[test]
    fn every_registered_device_is_in_the_import_once() {
        let csv = Plan::new(&scenario(1)).csv();

        let ids: std::collections::BTreeSet<&str> = csv
            .lines()
            .skip(1)
            .map(|line| line.split(',').next().unwrap())
            .collect();
        assert_eq!(csv.lines().next(), Some("id,secret,tenant,model"));
        assert_eq!(ids.len(), 250);
    }

    #[test]
    fn devices_that_share_ids_do_so_in_pairs_and_are_registered_once() {
        let mut scenario = scenario(1);
        scenario.fleets[0].profile =
            BTreeMap::from([("duplicate-id".to_owned(), 0.21), ("well-behaved".to_owned(), 0.79)]);

        let plan = Plan::new(&scenario);

        let twins: Vec<&Device> = plan.devices.iter().filter(|device| device.has_twin).collect();
        let ids: BTreeSet<Uuid> = plan.devices.iter().map(|device| device.id).collect();
        assert_eq!((plan.devices.len(), twins.len(), ids.len()), (100, 20, 90));
        assert!(twins.iter().all(|twin| twin.profile == Profile::DuplicateId));
        assert_eq!(plan.csv().lines().count(), 1 + 90 + 150);
    }

    #[test]
    fn a_version_grows_to_its_share() {
        let plan = Plan::new(&scenario(1));
        let mut rng = StdRng::seed_from_u64(1);

        let upgraded = plan.to_upgrade("b3", 0.6, &mut rng);

        assert_eq!(upgraded.len(), 35);
        assert!(upgraded.iter().all(|index| plan.devices[*index].firmware == "b2"));
        assert!(plan.to_upgrade("b3", 0.1, &mut rng).is_empty());
    }

    fn scenario(seed: u64) -> Scenario {
        let text = format!(
            r#"name = "s"
            about = ""
            devices = 100
            seed = {seed}
            capacity_per_second = 1
            thresholds = ["missing == 0"]
            database = {{ registered = 250 }}
            [[fleet]]
            name = "f"
            tenant = "t"
            firmware = {{ b2 = 0.75, b3 = 0.25 }}
            [[phase]]
            name = "p"
            seconds = 1"#
        );
        toml::from_str(&text).unwrap()
    }
}
