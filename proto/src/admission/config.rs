//! The settings of admission, with their bounds. Spans that docs/PROTOCOL.md fixes are constants in [`super`].

use std::{collections::BTreeMap, ops::RangeInclusive};

use serde::{Deserialize, Serialize};

use crate::slots::SlotsConfig;

/// Section `[admission]` of the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdmissionConfig {
    /// Maximum number of keys looked up a second by this node, or by all nodes of which
    /// [`Admission::handle_peers`](super::Admission::handle_peers) was told. Never exceeded, whatever the limit on keys
    /// in flight is.
    pub lookups_per_second_max: u32,
    /// Maximum number of distinct keys sent to the database and not answered, by the same nodes.
    pub keys_in_flight_max: u32,
    /// Maximum number of keys in one statement.
    pub batch_keys_max: u32,
    /// Maximum number of devices that wait for a lookup. Further ones get a slot.
    pub waiting_max: usize,
    /// Maximum number of devices whose slot is remembered here. Further slots are in their token only.
    pub slots_max: usize,
    /// Maximum number of known devices beside the registry index. Then the one not seen longest becomes unknown.
    pub known_max: usize,
    /// Maximum number of tenants with a queue of their own. Further tenants share one.
    pub tenants_max: usize,
    /// Weight of a tenant in the queue of slots, by name. A tenant that is not named has weight 1.
    pub tenant_weights: BTreeMap<String, u32>,
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        let SlotsConfig {
            slots_max,
            known_max,
            tenants_max,
            tenant_weights,
        } = SlotsConfig::default();
        Self {
            lookups_per_second_max: 10_000,
            keys_in_flight_max: 512,
            batch_keys_max: 256,
            waiting_max: 65_536,
            slots_max,
            known_max,
            tenants_max,
            tenant_weights,
        }
    }
}

/// One figure of [`AdmissionConfig`], as the documentation of the configuration shows it.
#[derive(Clone, Debug)]
pub struct Figure {
    /// Key in the section.
    pub name: &'static str,
    /// What it does.
    pub text: &'static str,
    /// What it counts.
    pub unit: &'static str,
    /// Minimum and maximum.
    pub bounds: RangeInclusive<u64>,
    /// Current value.
    pub value: u64,
}

/// A setting that is out of its bounds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("admission.{setting}: {reason}")]
pub struct InvalidAdmission {
    /// Key in the section.
    pub setting: String,
    pub reason: String,
}

impl AdmissionConfig {
    /// The part that concerns slots.
    #[must_use]
    pub fn slots(&self) -> SlotsConfig {
        SlotsConfig {
            slots_max: self.slots_max,
            known_max: self.known_max,
            tenants_max: self.tenants_max,
            tenant_weights: self.tenant_weights.clone(),
        }
    }

    /// All figures, in the order of the struct.
    #[must_use]
    pub fn figures(&self) -> [Figure; 7] {
        let wide = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        [
            Figure {
                name: "lookups_per_second_max",
                text: "Maximum rate of lookups on this node. Never exceeded. Slots are issued at a quarter of it at least.",
                unit: "keys per second",
                bounds: 1..=1_000_000,
                value: u64::from(self.lookups_per_second_max),
            },
            Figure {
                name: "keys_in_flight_max",
                text: "Maximum number of distinct keys sent to the database and not answered.",
                unit: "keys",
                bounds: 2..=65_536,
                value: u64::from(self.keys_in_flight_max),
            },
            Figure {
                name: "batch_keys_max",
                text: "Maximum number of keys in one statement.",
                unit: "keys",
                bounds: 1..=256,
                value: u64::from(self.batch_keys_max),
            },
            Figure {
                name: "waiting_max",
                text: "Maximum number of devices that wait for a lookup. Beyond it a device gets a slot.",
                unit: "devices",
                bounds: 1..=10_000_000,
                value: wide(self.waiting_max),
            },
            Figure {
                name: "slots_max",
                text: "Maximum number of slots that this node remembers, about 70 bytes each, at most a quarter of them for unknown devices. Beyond it a slot is in its token only.",
                unit: "devices",
                bounds: 1..=16_000_000,
                value: wide(self.slots_max),
            },
            Figure {
                name: "known_max",
                text: "Maximum number of remembered devices that were admitted or registered here and are not in the registry index, about 60 bytes each. Beyond it the least recently seen is unknown again.",
                unit: "devices",
                bounds: 1..=16_000_000,
                value: wide(self.known_max),
            },
            Figure {
                name: "tenants_max",
                text: "Maximum number of tenants with their own virtual queue. Beyond it the rest share one. Each refusal reads all of them.",
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
