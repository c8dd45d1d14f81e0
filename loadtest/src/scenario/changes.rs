//! Changes that a command makes to a scenario: fewer devices, other lengths of phases, no naive server.

use super::{Executor, FieldError, Scenario, Until, check, problem};
use crate::threshold::Threshold;

/// What a command changes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// Whether the scenario's `[short]` applies.
    pub is_short: bool,
    pub devices: Option<u32>,
    /// Devices at most: a scenario that has more runs with these.
    pub devices_max: Option<u32>,
    pub seed: Option<u64>,
    /// Lengths of phases by name, in seconds. 0 leaves a phase out.
    pub seconds: Vec<(String, f64)>,
    /// Whether the naive server is left out.
    pub is_without_naive: bool,
}

impl Scenario {
    /// Changes it. Thresholds on what is left out go to [`Scenario::not_judged`].
    ///
    /// # Errors
    /// There is no short form, no phase of that name, or no phase left.
    pub(super) fn change(&mut self, changes: &Changes, executor: Executor) -> Result<(), FieldError> {
        if changes.is_short {
            let short = self.short.clone();
            let short = short.ok_or_else(|| problem("short", "the scenario has no short form"))?;
            if let Some(devices) = short.devices {
                self.set_devices(devices, executor);
            }
            for (phase, seconds) in short.seconds {
                self.set_seconds(&phase, seconds, "short.seconds")?;
            }
            self.is_naive_beside = self.naive.is_some();
        }
        if let Some(devices) = changes.devices {
            self.set_devices(devices, executor);
        }
        if let Some(most) = changes.devices_max.filter(|most| self.devices > *most) {
            self.bounded_from = Some(self.devices);
            self.set_devices(most, executor);
        }
        self.seed = changes.seed.unwrap_or(self.seed);
        for (phase, seconds) in &changes.seconds {
            self.set_seconds(phase, *seconds, "--seconds")?;
        }
        if changes.is_without_naive {
            self.naive = None;
            self.is_naive_beside = false;
            self.leave_out(|figure| figure.starts_with("naive."));
        }
        Ok(())
    }

    /// Another number of devices. In virtual time, phases that wait for all of them last as much longer as there are
    /// more: time costs nothing there.
    fn set_devices(&mut self, devices: u32, executor: Executor) {
        let factor = f64::from(devices) / f64::from(self.devices.max(1));
        self.devices = devices;
        if executor == Executor::Simulate && factor > 1.0 {
            let waiting = |phase: &&mut super::Phase| phase.until == Some(Until::Connected);
            for phase in self.phases.iter_mut().filter(waiting) {
                phase.stretch = factor;
            }
        }
    }

    fn set_seconds(&mut self, name: &str, seconds: f64, field: &str) -> Result<(), FieldError> {
        let phase = self.phases.iter_mut().find(|phase| phase.name == name);
        let phase = phase.ok_or_else(|| problem(field, format!("there is no phase {name:?}")))?;
        if seconds > 0.0 {
            phase.seconds = seconds;
            return Ok(());
        }
        self.phases.retain(|phase| phase.name != name);
        self.leave_out(|figure| figure.split('.').nth(1) == Some(name));
        check(!self.phases.is_empty(), field, "no phase is left")
    }

    /// Removes the thresholds that need such a figure. Those that can't be read stay: they are an error later.
    fn leave_out(&mut self, is_gone: impl Fn(&str) -> bool) {
        let thresholds = std::mem::take(&mut self.thresholds);
        let (gone, kept): (Vec<_>, Vec<_>) = thresholds.into_iter().partition(|text| {
            let threshold = Threshold::parse(text);
            threshold.is_ok_and(|threshold| threshold.figures().into_iter().any(&is_gone))
        });
        self.thresholds = kept;
        self.not_judged.extend(gone);
    }
}
