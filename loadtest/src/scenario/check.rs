//! Whether a scenario can be run: the first setting that can't be is named by its path.

use std::collections::BTreeSet;

use firmware_sim::{
    messages::PER_MINUTE_MAX,
    profile::{Profile, UnknownProfile},
};

use super::{Action, DEVICES_MAX, Executor, FieldError, GROUP_ALL, Scenario, Trouble};
use crate::simulate::settings;

/// Most rows in the registry.
const REGISTERED_MAX: u32 = 1_000_000;
/// Longest phase, in seconds.
const SECONDS_MAX: f64 = 43_200.0;

impl Executor {
    const fn devices_max(self) -> u32 {
        match self {
            Self::Run => DEVICES_MAX,
            Self::Simulate => settings::DEVICES_MAX,
        }
    }
}

impl Scenario {
    /// # Errors
    /// The first setting that can't be, by its path. Names of figures are checked by the report, which knows them.
    pub fn check(&self, executor: Executor) -> Result<(), FieldError> {
        check(
            is_name(&self.name, '-'),
            "name",
            "expected lower-case letters, digits and `-`",
        )?;
        check(
            (1..=executor.devices_max()).contains(&self.devices),
            "devices",
            format!("expected 1 to {}", executor.devices_max()),
        )?;
        check(
            self.capacity_per_second.is_finite() && self.capacity_per_second > 0.0,
            "capacity_per_second",
            "expected more than 0",
        )?;
        check(
            self.database.registered <= REGISTERED_MAX,
            "database.registered",
            "expected at most 1000000",
        )?;
        check(
            self.is_postgres() || (self.naive.is_none() && self.database.slow_firmware.is_empty()),
            "database.kind",
            "[naive] and slow_firmware need \"postgres\"",
        )?;
        check(
            self.database
                .cores
                .is_none_or(|cores| self.is_postgres() && (1..=64).contains(&cores)),
            "database.cores",
            "expected 1 to 64, and \"postgres\"",
        )?;
        if let Some(naive) = &self.naive {
            check((1..=400).contains(&naive.pool), "naive.pool", "expected 1 to 400")?;
            for (field, seconds) in [
                ("naive.heartbeat_seconds", naive.heartbeat_seconds),
                ("naive.deadline_seconds", naive.deadline_seconds),
            ] {
                check((1.0..=3_600.0).contains(&seconds), field, "expected 1 to 3600")?;
            }
            check(
                !self.is_naive_beside || executor == Executor::Simulate || self.devices <= DEVICES_MAX / 2,
                "devices",
                format!("expected 1 to {}: the naive server has as many", DEVICES_MAX / 2),
            )?;
        }
        self.check_presence()?;
        self.check_fleets()?;
        self.check_versions()?;
        self.check_phases()?;
        self.simulate.check()?;
        self.thresholds().map(drop)
    }

    fn check_presence(&self) -> Result<(), FieldError> {
        let Some(presence) = &self.presence else {
            let is_away = |phase: &&super::Phase| phase.power_cuts_per_second + phase.closes_per_second > 0.0;
            let field = |phase: &super::Phase| format!("phase.{}", phase.name);
            return match self.phases.iter().find(is_away) {
                Some(phase) => Err(problem(field(phase), "power cuts and closes need [presence]")),
                None => Ok(()),
            };
        };
        for (field, value, least, most) in [
            ("deadline_seconds", presence.deadline_seconds, 1.0, 3_600.0),
            ("grace_seconds", presence.grace_seconds, 0.0, 3_600.0),
            ("away_seconds", presence.away_seconds.unwrap_or(1.0), 1.0, 86_400.0),
        ] {
            check(
                (least..=most).contains(&value),
                format!("presence.{field}"),
                format!("expected {least} to {most}"),
            )?;
        }
        let shares_ids = |name: &String| {
            let profile: Option<Profile> = name.parse().ok();
            profile.is_some_and(|profile| profile.devices_per_identity() > 1)
        };
        let mut profiles = self.fleets.iter().flat_map(|fleet| fleet.profile.keys());
        check(
            !profiles.any(shares_ids),
            "presence",
            "devices that share an id have no presence of their own",
        )
    }

    fn check_fleets(&self) -> Result<(), FieldError> {
        check(!self.fleets.is_empty(), "fleet", "expected at least one")?;
        let mut names = BTreeSet::new();
        for fleet in &self.fleets {
            let field = |key: &str| format!("fleet.{}.{key}", fleet.name);
            check(
                is_name(&fleet.name, '-'),
                "fleet.name",
                "expected lower-case letters, digits and `-`",
            )?;
            check(
                names.insert(&fleet.name),
                "fleet.name",
                format!("`{}` is there twice", fleet.name),
            )?;
            check(
                adds_up(fleet.firmware.values()),
                field("firmware"),
                "parts must add up to 1",
            )?;
            check(
                adds_up(fleet.profile.values()),
                field("profile"),
                "parts must add up to 1",
            )?;
            for profile in fleet.profile.keys() {
                profile
                    .parse::<Profile>()
                    .map_err(|error: UnknownProfile| problem(field("profile"), error.to_string()))?;
            }
            for (name, seconds) in [
                ("connect_timeout_seconds", fleet.connect_timeout_seconds),
                ("answer_timeout_seconds", fleet.answer_timeout_seconds),
            ] {
                check((0.1..=600.0).contains(&seconds), field(name), "expected 0.1 to 600")?;
            }
            check(
                (0.0..=PER_MINUTE_MAX).contains(&fleet.messages_per_minute),
                field("messages_per_minute"),
                "expected 0 to 6000",
            )?;
            for version in fleet.firmware.keys() {
                check_label(version, &field("firmware"))?;
            }
            for (key, label) in [("tenant", &fleet.tenant), ("model", &fleet.model)] {
                if let Some(label) = label {
                    check_label(label, &field(key))?;
                }
            }
        }
        check(
            adds_up(self.fleets.iter().map(|fleet| &fleet.share)),
            "fleet.share",
            "shares must add up to 1",
        )
    }

    fn check_versions(&self) -> Result<(), FieldError> {
        let known: BTreeSet<&str> = self.versions().collect();
        for phase in &self.phases {
            if let Action::Grow { firmware, .. } = &phase.action {
                check_label(firmware, &format!("phase.{}.action.grow.firmware", phase.name))?;
            }
        }
        for (name, versions) in &self.groups {
            check(
                is_name(name, '_') && name != GROUP_ALL,
                "groups",
                format!("`{name}` can't be a group's name"),
            )?;
            check(!versions.is_empty(), format!("groups.{name}"), "is empty")?;
            for version in versions {
                check(
                    known.contains(version.as_str()),
                    format!("groups.{name}"),
                    format!("no fleet ever runs version {version}"),
                )?;
            }
        }
        for version in &self.database.slow_firmware {
            check(
                known.contains(version.as_str()),
                "database.slow_firmware",
                format!("no fleet ever runs version {version}"),
            )?;
        }
        Ok(())
    }

    fn check_phases(&self) -> Result<(), FieldError> {
        check(!self.phases.is_empty(), "phase", "expected at least one")?;
        let mut names = BTreeSet::new();
        for phase in &self.phases {
            let field = |key: &str| format!("phase.{}.{key}", phase.name);
            check(
                is_name(&phase.name, '_'),
                "phase.name",
                "expected lower-case letters, digits and `_`",
            )?;
            check(
                names.insert(&phase.name),
                "phase.name",
                format!("`{}` is there twice", phase.name),
            )?;
            check(
                phase.seconds > 0.0 && phase.seconds <= SECONDS_MAX,
                field("seconds"),
                "expected more than 0, at most 43200",
            )?;
            check(
                (0.0..=10_000.0).contains(&phase.churn_per_second),
                field("churn_per_second"),
                "expected 0 to 10000",
            )?;
            for (name, rate) in [
                ("power_cuts_per_second", phase.power_cuts_per_second),
                ("closes_per_second", phase.closes_per_second),
            ] {
                check((0.0..=1_000.0).contains(&rate), field(name), "expected 0 to 1000")?;
            }
            if let Some(group) = &phase.churn_group {
                self.check_group(group, &field("churn_group"))?;
            }
            self.check_action(&phase.action, &field("action"))?;
        }
        Ok(())
    }

    fn check_group(&self, group: &str, field: &str) -> Result<(), FieldError> {
        let is_known = self.group_names().any(|name| name == group);
        check(is_known, field, format!("no group `{group}`"))
    }

    fn check_action(&self, action: &Action, field: &str) -> Result<(), FieldError> {
        match action {
            Action::Hold | Action::DropAll | Action::Unblock => Ok(()),
            Action::Drop { group } => self.check_group(group, field),
            Action::Connect { per_second } => check(
                (0.1..=100_000.0).contains(per_second),
                field,
                "per_second: expected 0.1 to 100000",
            ),
            Action::Grow { to, .. } => check((0.0..=1.0).contains(to), field, "to: expected 0 to 1"),
            Action::Database(trouble) => {
                check(
                    self.is_postgres(),
                    field,
                    "only a PostgreSQL can be slow, frozen or killed",
                )?;
                check_factor(trouble, field)
            }
            Action::Gateway(trouble) => {
                check(
                    !matches!(trouble, Trouble::Killed),
                    field,
                    "a server can be frozen or slow, but not killed",
                )?;
                check_factor(trouble, field)
            }
            Action::Block { range, reason, .. } => {
                check(!range.trim().is_empty(), field, "range: is empty")?;
                check(!reason.trim().is_empty(), field, "reason: is empty")
            }
        }
    }
}

fn check_factor(trouble: &Trouble, field: &str) -> Result<(), FieldError> {
    match trouble {
        Trouble::Slow { factor } => check((1.5..=100.0).contains(factor), field, "factor: expected 1.5 to 100"),
        Trouble::Frozen | Trouble::Killed => Ok(()),
    }
}

pub(crate) fn check(holds: bool, field: impl Into<String>, otherwise: impl Into<String>) -> Result<(), FieldError> {
    if holds { Ok(()) } else { Err(problem(field, otherwise)) }
}

pub(crate) fn problem(field: impl Into<String>, problem: impl Into<String>) -> FieldError {
    FieldError {
        field: field.into(),
        problem: problem.into(),
    }
}

fn check_label(text: &str, field: &str) -> Result<(), FieldError> {
    match seawall_proto::id::Label::parse(text) {
        Ok(Some(label)) if label.as_str() == text => Ok(()),
        Ok(_) => Err(problem(field, format!("{text:?} is empty or has spaces around it"))),
        Err(error) => Err(problem(field, format!("{text:?}: {error}"))),
    }
}

fn is_name(text: &str, and: char) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == and)
}

/// Parts between 0 and 1 that make a whole, as well as decimal fractions can.
fn adds_up<'a>(parts: impl Iterator<Item = &'a f64>) -> bool {
    let mut sum = 0.0;
    for part in parts {
        if !(0.0..=1.0).contains(part) {
            return false;
        }
        sum += part;
    }
    (sum - 1.0_f64).abs() < 1e-6
}
