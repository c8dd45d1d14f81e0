//! What an operator asks of a rollout: its stages, and what each of them needs.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::rules::text;

/// Devices that a first stage of the default stages has at least, where there are that many. A stage of fewer devices
/// does not wait for its connects without an end.
pub(super) const FEW_DEVICES: u64 = 20;
/// Largest first stage, in percent, that [`FEW_DEVICES`] can lead to.
const FIRST_STAGE_MAX: u8 = 50;

/// Stages of a rollout, and what each of them needs before the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Shares of the matched devices, in percent, rising; at most [`Plan::STAGES_MAX`]. They are kept as ordered. Empty:
    /// [`Plan::STAGES_DEFAULT`], with a first stage that has enough devices.
    #[serde(default, deserialize_with = "ordered")]
    pub stages: Vec<u8>,
    /// Shortest time of a stage. Default 10 minutes, 1 second to 7 days.
    #[serde(default = "Plan::default_bake", with = "text::span")]
    pub bake: Duration,
    /// Connects of treated devices that a stage needs. Default 200, 1 to 1,000,000. A stage whose devices are known to
    /// be few needs fewer.
    #[serde(default = "Plan::default_connects_min")]
    pub connects_min: u32,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            stages: Vec::new(),
            bake: Self::default_bake(),
            connects_min: Self::default_connects_min(),
        }
    }
}

impl Plan {
    /// Stages that are used if none are ordered.
    pub const STAGES_DEFAULT: [u8; 5] = [1, 5, 25, 50, 100];
    /// Most stages.
    pub const STAGES_MAX: usize = 20;
    /// Shortest bake.
    pub const BAKE_MIN: Duration = Duration::from_secs(1);
    /// Longest bake.
    pub const BAKE_MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);
    /// Largest `connects_min`.
    pub const CONNECTS_MAX: u32 = 1_000_000;

    /// Checks every field.
    ///
    /// # Errors
    /// The first field that may not be as it is.
    pub fn validate(&self) -> Result<(), PlanError> {
        let is_rising = self.stages.is_sorted_by(|left, right| left < right);
        let is_percent = self.stages.iter().all(|stage| (1..=100).contains(stage));
        if self.stages.len() > Self::STAGES_MAX || !is_rising || !is_percent {
            return Err(PlanError::Stages);
        }
        if !(Self::BAKE_MIN..=Self::BAKE_MAX).contains(&self.bake) {
            return Err(PlanError::Bake);
        }
        if !(1..=Self::CONNECTS_MAX).contains(&self.connects_min) {
            return Err(PlanError::ConnectsMin);
        }
        Ok(())
    }

    /// The stages above `treated` percent. Default stages begin with enough devices where there are that many.
    /// `devices` is the number of matched devices, 0 if unknown.
    pub(super) fn fitted(mut self, devices: u64, treated: u8) -> Result<Self, PlanError> {
        if self.stages.is_empty() {
            let least = match devices {
                0 => 1,
                devices => u8::try_from((FEW_DEVICES * 100).div_ceil(devices)).unwrap_or(u8::MAX),
            };
            let least = least.min(FIRST_STAGE_MAX);
            self.stages = Self::STAGES_DEFAULT.map(|stage| stage.max(least)).to_vec();
            self.stages.dedup();
        }
        self.stages.retain(|stage| *stage > treated);
        if self.stages.is_empty() {
            return Err(PlanError::NothingLeft(treated));
        }
        Ok(self)
    }

    const fn default_bake() -> Duration {
        Duration::from_secs(10 * 60)
    }

    const fn default_connects_min() -> u32 {
        200
    }
}

/// Reads stages that are ordered. None at all are a mistake.
fn ordered<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let stages = Vec::deserialize(deserializer)?;
    if stages.is_empty() {
        return Err(serde::de::Error::custom(PlanError::Stages));
    }
    Ok(stages)
}

/// Why a plan is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("stages must be 1 to {max} rising percentages from 1 to 100, such as [1,5,25,50,100]", max = Plan::STAGES_MAX)]
    Stages,
    #[error("bake must be from 1s to 7days")]
    Bake,
    #[error("connects_min must be from 1 to {max}", max = Plan::CONNECTS_MAX)]
    ConnectsMin,
    #[error("the rule admits {0} % already, and no stage is above that")]
    NothingLeft(u8),
}

impl PlanError {
    /// The field that is wrong, as the API writes it.
    #[must_use]
    pub const fn field(&self) -> &'static str {
        match self {
            Self::Stages | Self::NothingLeft(_) => "stages",
            Self::Bake => "bake",
            Self::ConnectsMin => "connects_min",
        }
    }
}
