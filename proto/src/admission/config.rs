//! The settings of admission, with their bounds. Spans that the contract fixes are constants in [`super`], not settings.

use std::{collections::BTreeMap, ops::RangeInclusive};

use serde::{Deserialize, Serialize};

/// Section `[admission]` of the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdmissionConfig {
    /// Most keys looked up a second, on this node. Never exceeded, whatever the limit on keys in flight finds.
    pub lookups_per_second_max: u32,
    /// Most distinct keys sent to the database and not answered.
    pub keys_in_flight_max: u32,
    /// Most keys in one statement.
    pub batch_keys_max: u32,
    /// Most devices waiting for a look-up, several a key counted singly. Then a device gets a slot.
    pub waiting_max: usize,
    /// Most devices whose slot is remembered here. Then a slot is in its token only.
    pub slots_max: usize,
    /// Most devices remembered that were let in or registered here and are not in the roster. Then the one not seen longest is a stranger again.
    pub known_max: usize,
    /// Most tenants with a queue of their own at a time. Then the rest share one.
    pub tenants_max: usize,
    /// Weight of a tenant in the queue of slots, by name. A tenant that is not named weighs 1.
    pub tenant_weights: BTreeMap<String, u32>,
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self {
            lookups_per_second_max: 10_000,
            keys_in_flight_max: 512,
            batch_keys_max: 256,
            waiting_max: 65_536,
            slots_max: 2_000_000,
            known_max: 1_000_000,
            tenants_max: 1_024,
            tenant_weights: BTreeMap::new(),
        }
    }
}

/// One figure of [`AdmissionConfig`]: what the configuration's documentation shows of it.
#[derive(Clone, Debug)]
pub struct Figure {
    /// Its key in the section.
    pub name: &'static str,
    /// What it does.
    pub text: &'static str,
    /// What it counts.
    pub unit: &'static str,
    /// Smallest and greatest value allowed.
    pub bounds: RangeInclusive<u64>,
    /// Its value.
    pub value: u64,
}

/// A setting out of its bounds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("admission.{setting}: {reason}")]
pub struct InvalidAdmission {
    /// Its key in the section.
    pub setting: String,
    pub reason: String,
}

impl AdmissionConfig {
    /// Every figure, in the order of the struct.
    #[must_use]
    pub fn figures(&self) -> [Figure; 7] {
        let wide = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        [
            Figure {
                name: "lookups_per_second_max",
                text: "Most keys looked up a second on this node. Never exceeded. Slots are given out at a quarter of it at least.",
                unit: "keys a second",
                bounds: 1..=1_000_000,
                value: u64::from(self.lookups_per_second_max),
            },
            Figure {
                name: "keys_in_flight_max",
                text: "Most distinct keys sent to the database and not answered.",
                unit: "keys",
                bounds: 2..=65_536,
                value: u64::from(self.keys_in_flight_max),
            },
            Figure {
                name: "batch_keys_max",
                text: "Most keys in one statement.",
                unit: "keys",
                bounds: 1..=256,
                value: u64::from(self.batch_keys_max),
            },
            Figure {
                name: "waiting_max",
                text: "Most devices waiting for a look-up. Then a device gets a slot.",
                unit: "devices",
                bounds: 1..=10_000_000,
                value: wide(self.waiting_max),
            },
            Figure {
                name: "slots_max",
                text: "Most devices whose slot this node remembers, about 70 bytes each, a quarter of them strangers. Then a slot is in its token only.",
                unit: "devices",
                bounds: 1..=16_000_000,
                value: wide(self.slots_max),
            },
            Figure {
                name: "known_max",
                text: "Most devices remembered that were let in or registered here and are not in the roster, about 60 bytes each. Then the one not seen longest counts as a stranger.",
                unit: "devices",
                bounds: 1..=16_000_000,
                value: wide(self.known_max),
            },
            Figure {
                name: "tenants_max",
                text: "Most tenants with a queue of their own at a time. Then the rest share one. Each refusal reads all of them.",
                unit: "tenants",
                bounds: 1..=4_096,
                value: wide(self.tenants_max),
            },
        ]
    }

    /// Compares every figure with its bounds.
    ///
    /// # Errors
    /// The first that is out of them.
    pub fn validate(&self) -> Result<(), InvalidAdmission> {
        for figure in self.figures() {
            if !figure.bounds.contains(&figure.value) {
                return Err(InvalidAdmission {
                    setting: figure.name.to_owned(),
                    reason: format!(
                        "{} is out of range: {} to {} {} are allowed",
                        figure.value,
                        figure.bounds.start(),
                        figure.bounds.end(),
                        figure.unit
                    ),
                });
            }
        }
        match self
            .tenant_weights
            .iter()
            .find(|(_, weight)| !(1..=1_000).contains(*weight))
        {
            Some((tenant, weight)) => Err(InvalidAdmission {
                setting: format!("tenant_weights.{tenant}"),
                reason: format!("{weight} is out of range: 1 to 1000 are allowed"),
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_within_their_bounds() {
        assert_eq!(AdmissionConfig::default().validate(), Ok(()));
    }

    #[test]
    fn figure_out_of_bounds_is_named() {
        let config = AdmissionConfig {
            keys_in_flight_max: 1,
            ..AdmissionConfig::default()
        };

        let error = config.validate().unwrap_err();

        assert_eq!(
            error.to_string(),
            "admission.keys_in_flight_max: 1 is out of range: 2 to 65536 keys are allowed"
        );
    }

    #[test]
    fn weightless_tenant_is_refused() {
        let config = AdmissionConfig {
            tenant_weights: BTreeMap::from([("acme".to_owned(), 0)]),
            ..AdmissionConfig::default()
        };

        assert!(
            config
                .validate()
                .unwrap_err()
                .to_string()
                .contains("tenant_weights.acme")
        );
    }
}
