//! Firmware versions that the fleet has never run: few of their devices are admitted at a time, until their sessions
//! show that the version is not worse than the others. docs/design/unproven-versions.md has the reasons and figures.
//!
//! Start with [`Proving`]: the versions under test on one node. It stores nothing; the caller stores each [`Change`],
//! and hands over what is stored. It limits nobody before [`Proving::handle_loaded`].

mod entry;
mod ledger;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use self::{
    entry::{Entry, Verdict},
    ledger::Outcome,
};
use crate::{
    close::EndReason,
    cohort::{CohortTag, Kind, ModelTag},
    id::{DeviceId, Label},
    rate::{Gcra, Rate},
    rollout::{self, Counts, Side},
    slots::QueueEnd,
    time::Instant,
};

/// A session that lives this long has proved itself: 2 minutes.
pub const PROVEN_AFTER: Duration = rollout::SHORT_SESSION;
/// Age that the recorded versions must have: the versions of a younger fleet are proven at once. 24 h.
pub const FLEET_AGE_MIN: Duration = Duration::from_hours(24);
/// Age at which a version with too few devices for a test is proven, once all its sessions have lived
/// [`PROVEN_AFTER`]. 24 h.
pub const SMALL_PROVEN_AFTER: Duration = Duration::from_hours(24);
/// Maximum number of versions that are tested at a time. Every session that begins or ends costs a step for each.
pub const TESTED_MAX: usize = 16;
/// Maximum number of versions that are known, in two forms each. Beyond it no version is limited.
const KNOWN_MAX: usize = 65_536;
/// Maximum number of devices whose failures are told apart. Failures of others count one by one.
const FAILURES_MAX: usize = 20_000;
/// Time after which failures are forgotten, at most: each time reads all of them.
const PURGE_EVERY: Duration = Duration::from_mins(1);
/// Maximum number of changes that wait to be stored. Further ones are dropped: other nodes test these versions too.
const CHANGES_MAX: usize = 1_000;
/// Part of the reference capacity that all versions without an entry share: a twentieth.
const PART_OF_CAPACITY: f64 = 20.0;
/// Least time after which a device of a version that was found worse returns.
const WORSE_RETURNS: Duration = Duration::from_mins(5);

crate::labels! {
    /// State of a version.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    pub enum VersionState {
        /// It is not worse than others, or was there before.
        Proven = "proven",
        /// Its test has no verdict yet.
        Unproven = "unproven",
        /// Its devices failed more often than others, or cost the database far more.
        Worse = "worse",
    }
}

/// A version changes its state: to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub model: Option<Label>,
    pub firmware: Option<Label>,
    /// `None`: it was never seen before.
    pub before: Option<VersionState>,
    pub after: VersionState,
    /// Sessions that led to it: of the version, and of the control.
    pub evidence: (Counts, Counts),
}

/// A version under test.
#[derive(Clone, Debug, PartialEq)]
pub struct Tested {
    pub model: Option<Label>,
    pub firmware: Option<Label>,
    pub state: VersionState,
    /// Open sessions.
    pub online: u32,
    /// Open sessions that have not proved themselves.
    pub young: u32,
    /// Maximum of `young`.
    pub room: u32,
    /// Attempts that were refused.
    pub refused: u64,
    /// Sessions of the version that are too young to count, whether they are open or not.
    pub pending: Counts,
    /// Devices have been refused for a quarter of an hour, without a verdict.
    pub is_waiting: bool,
    /// Sessions of the version, and of the control, in the current test.
    pub evidence: (Counts, Counts),
    /// See [`Rollout::log_likelihood_ratio`](crate::rollout::Rollout::log_likelihood_ratio).
    pub log_likelihood_ratio: f64,
}

/// A connecting device whose version is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Asking {
    /// What it claims.
    pub cohort: CohortTag,
    /// Sessions of this node.
    pub sessions: usize,
    /// Reference capacity, in keys per second.
    pub k_ref: f64,
}

/// An open session.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    pub device: DeviceId,
    pub kind: Kind,
}

/// Failures of a device: one that restarts over and over counts once in a test.
#[derive(Clone, Copy, Debug)]
struct Failure {
    kind: Kind,
    opened_at: Instant,
    stage: Stage,
    until: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It has failed, and its next session may still make up for it.
    First,
    /// It has returned in time: its next failure counts.
    Returned,
    /// A failure of it counts: further ones say nothing.
    Counted,
}

impl Failure {
    /// `None` once it is forgotten. A first failure that was not made up for counts.
    fn stage_at(&self, now: Instant) -> Option<Stage> {
        match self.stage {
            Stage::First if self.until <= now => (self.until + entry::TEST_MAX > now).then_some(Stage::Counted),
            stage @ (Stage::First | Stage::Returned | Stage::Counted) => (self.until > now).then_some(stage),
        }
    }
}

/// The versions under test on one node.
#[derive(Debug)]
pub struct Proving {
    is_loaded: bool,
    is_young: bool,
    /// Proven versions, as devices claim them: with and without the model.
    known: BTreeSet<CohortTag>,
    /// Models that have a proven version.
    models: BTreeSet<ModelTag>,
    entries: BTreeMap<CohortTag, Entry>,
    /// Versions without an entry.
    unseen: Gcra,
    unseen_end: QueueEnd,
    refused: u64,
    failures: BTreeMap<DeviceId, Failure>,
    purged_at: Instant,
    changes: VecDeque<Change>,
}

impl Default for Proving {
    fn default() -> Self {
        Self {
            is_loaded: false,
            is_young: false,
            known: BTreeSet::new(),
            models: BTreeSet::new(),
            entries: BTreeMap::new(),
            unseen: Gcra::default(),
            unseen_end: QueueEnd::empty(1.0),
            refused: 0,
            failures: BTreeMap::new(),
            purged_at: Instant::ZERO,
            changes: VecDeque::new(),
        }
    }
}

impl Proving {
    // === What is stored ===

    /// A version was there before, or is proven.
    pub fn handle_known(&mut self, model: Option<&str>, firmware: Option<&str>) {
        let kind = Kind::of(model, firmware);
        self.known.extend([kind.named, kind.unnamed]);
        self.models.insert(kind.model);
    }

    /// Takes the stored state of a version, which another node or a person may have set.
    pub fn handle_stored(
        &mut self,
        model: Option<&Label>,
        firmware: Option<&Label>,
        state: VersionState,
        now: Instant,
    ) {
        let (model_text, firmware_text) = (model.map(Label::as_str), firmware.map(Label::as_str));
        let tag = CohortTag::of(model_text, firmware_text);
        match state {
            VersionState::Proven => {
                self.entries.remove(&tag);
                self.handle_known(model_text, firmware_text);
            }
            VersionState::Unproven => {
                self.known.remove(&tag);
            }
            VersionState::Worse => {
                self.known.remove(&tag);
                if !self.entries.contains_key(&tag) && !self.make_room(now) {
                    return;
                }
                let entry = self.entries.entry(tag);
                let entry = entry.or_insert_with(|| Entry::new(model.cloned(), firmware.cloned(), now));
                if entry.state != VersionState::Worse {
                    entry.set_worse(now);
                }
            }
        }
    }

    /// All stored versions were handed over: from now on others are limited. `is_young`: the oldest of them is younger
    /// than [`FLEET_AGE_MIN`], so that new versions are proven at once.
    pub fn handle_loaded(&mut self, is_young: bool) {
        self.is_loaded = true;
        self.is_young = is_young;
    }

    /// The next change to store.
    pub fn poll_change(&mut self) -> Option<Change> {
        self.changes.pop_front()
    }

    // === Devices that connect ===

    /// Whether devices that claim this are limited.
    #[must_use]
    pub fn is_limited(&self, cohort: CohortTag) -> bool {
        self.is_limiting() && !self.known.contains(&cohort)
    }

    /// Whether a device of a limited version may connect now. It takes no room yet: admission may still refuse it, see
    /// [`handle_entered`](Self::handle_entered).
    ///
    /// # Errors
    /// It should return at this time.
    pub fn ask(&mut self, asking: Asking, now: Instant) -> Result<(), Instant> {
        let unproven: u32 = self.entries.values().map(|entry| entry.online).sum();
        let asked = match self.entries.get_mut(&asking.cohort) {
            Some(entry) => {
                let proven = asking.sessions.saturating_sub(unproven as usize);
                entry.ask(proven, asking.sessions, asking.k_ref, now)
            }
            None if self.is_young => Ok(()),
            None => self.ask_unseen(asking.k_ref, now),
        };
        self.refused += u64::from(asked.is_err());
        asked
    }

    fn ask_unseen(&mut self, k_ref: f64, now: Instant) -> Result<(), Instant> {
        let rate = unseen_rate(k_ref);
        let mut after = self.unseen;
        let taken = after.take(1, Rate::per_second(rate, rate), now);
        taken.map_err(|next| {
            self.unseen_end
                .take(next.max(now + Duration::from_secs(1)), f64::from(rate))
        })
    }

    /// A device of a limited version that may connect is looked up now, or needs no lookup.
    pub fn handle_entered(&mut self, asking: Asking, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&asking.cohort) {
            entry.handle_entered(now);
        } else if !self.is_young {
            let rate = unseen_rate(asking.k_ref);
            self.unseen.charge(Rate::per_second(rate, rate), now);
        }
    }

    /// A device of a limited version is authenticated and admitted.
    pub fn handle_admitted(&mut self, model: Option<&Label>, firmware: Option<&Label>, now: Instant) {
        let (model_text, firmware_text) = (model.map(Label::as_str), firmware.map(Label::as_str));
        let tag = CohortTag::of(model_text, firmware_text);
        if !self.is_limited(tag) || self.entries.contains_key(&tag) {
            return;
        }
        let after = if self.is_young {
            self.handle_known(model_text, firmware_text);
            VersionState::Proven
        } else if self.make_room(now) {
            self.entries
                .insert(tag, Entry::new(model.cloned(), firmware.cloned(), now));
            VersionState::Unproven
        } else {
            return;
        };
        self.note(Change {
            model: model.cloned(),
            firmware: firmware.cloned(),
            before: None,
            after,
            evidence: Default::default(),
        });
    }

    fn note(&mut self, change: Change) {
        if self.changes.len() < CHANGES_MAX {
            self.changes.push_back(change);
        }
    }

    /// Forgets a test that limits nobody now, if there is no room for another. False if there is none: then a version
    /// shares what versions without an entry have.
    fn make_room(&mut self, now: Instant) -> bool {
        if self.entries.len() < TESTED_MAX {
            return true;
        }
        let idle = |(tag, entry): (&CohortTag, &Entry)| entry.idleness(now).map(|idleness| (idleness, *tag));
        let least = self.entries.iter().filter_map(idle).min();
        least.and_then(|(_, tag)| self.entries.remove(&tag)).is_some()
    }

    // === Sessions ===

    /// Whether sessions need to be reported.
    #[must_use]
    pub fn is_testing(&self) -> bool {
        !self.entries.is_empty()
    }

    pub fn handle_opened(&mut self, member: Member, now: Instant) {
        let is_again = self.handle_return(member, now);
        self.each_side(member.kind, |entry, side| {
            entry.handle_opened(side, member.kind.model, now)
        });
        if let Some(failure) = is_again {
            self.each_side(failure.kind, |entry, side| {
                entry.ledger.forgive(side, failure.opened_at)
            });
        }
    }

    /// Returns the first failure of a device that returns with the same version.
    fn handle_return(&mut self, member: Member, now: Instant) -> Option<Failure> {
        let failure = self.failures.get_mut(&member.device)?;
        let is_forgiven = failure.stage_at(now) == Some(Stage::First) && failure.kind == member.kind;
        is_forgiven.then(|| {
            let before = *failure;
            failure.stage = Stage::Returned;
            failure.until = now + PROVEN_AFTER;
            before
        })
    }

    /// The session that began at `opened_at` ended. `None`: it never was one.
    pub fn handle_ended(&mut self, member: Member, opened_at: Instant, reason: Option<EndReason>, now: Instant) {
        let has_failed = reason.is_some_and(|reason| reason.ended_by().is_failure())
            && now.saturating_since(opened_at) < PROVEN_AFTER;
        let outcome = if has_failed && self.counts(member, opened_at, now) {
            Outcome::Failed
        } else {
            Outcome::Nothing
        };
        self.each_side(member.kind, |entry, side| entry.handle_ended(side, opened_at, outcome));
    }

    /// Whether the failure of a session counts. A first one may be forgiven later.
    fn counts(&mut self, member: Member, opened_at: Instant, now: Instant) -> bool {
        let has_room = self.failures.len() < FAILURES_MAX;
        let before = self.failures.get_mut(&member.device);
        let stage = before
            .as_ref()
            .filter(|failure| failure.kind == member.kind)
            .and_then(|failure| failure.stage_at(now));
        let failure = Failure {
            kind: member.kind,
            opened_at,
            stage: if stage.is_some() { Stage::Counted } else { Stage::First },
            until: if stage.is_some() {
                now + entry::TEST_MAX
            } else {
                opened_at + PROVEN_AFTER
            },
        };
        match before {
            Some(_) if stage == Some(Stage::Counted) => return false,
            Some(before) => *before = failure,
            None if has_room => _ = self.failures.insert(member.device, failure),
            None => {}
        }
        true
    }

    /// Calls `work` for every entry whose test the session is part of.
    fn each_side(&mut self, kind: Kind, mut work: impl FnMut(&mut Entry, Side)) {
        for tag in [kind.named, kind.unnamed] {
            if let Some(entry) = self.entries.get_mut(&tag) {
                return work(entry, Side::Treated);
            }
        }
        for entry in self.entries.values_mut() {
            let side = if entry.models.contains(&kind.model) {
                Side::Near
            } else {
                Side::Other
            };
            work(entry, side);
        }
    }

    /// Looks at the evidence. `sessions`: of this node. `is_costly`: whether the lookups of a cohort are isolated.
    pub fn handle_second(&mut self, sessions: usize, is_costly: impl Fn(CohortTag) -> bool, now: Instant) {
        if self.purged_at + PURGE_EVERY <= now {
            self.purged_at = now;
            self.failures.retain(|_, failure| failure.stage_at(now).is_some());
        }
        let (mut proven, mut restarted, mut changes) = (Vec::new(), BTreeSet::new(), Vec::new());
        for (tag, entry) in &mut self.entries {
            let has_proven_model = entry.models.iter().any(|model| self.models.contains(model));
            let before = entry.state;
            let verdict = entry.handle_second(sessions, has_proven_model, is_costly(*tag), now);
            let evidence = entry.evidence();
            let after = match verdict {
                Verdict::Open => continue,
                Verdict::Fine => {
                    proven.push(*tag);
                    VersionState::Proven
                }
                Verdict::Worse => {
                    entry.set_worse(now);
                    restarted.insert(*tag);
                    VersionState::Worse
                }
                Verdict::Expired => {
                    entry.restart(now);
                    restarted.insert(*tag);
                    continue;
                }
            };
            if before != after {
                changes.push(Change {
                    model: entry.model.clone(),
                    firmware: entry.firmware.clone(),
                    before: Some(before),
                    after,
                    evidence,
                });
            }
        }
        changes.into_iter().for_each(|change| self.note(change));
        if !restarted.is_empty() {
            // In a new test, every device may count again.
            let is_of = |kind: Kind| [kind.named, kind.unnamed].iter().any(|tag| restarted.contains(tag));
            self.failures
                .retain(|_, failure| failure.stage_at(now) != Some(Stage::Counted) || !is_of(failure.kind));
        }
        for tag in proven {
            if let Some(entry) = self.entries.remove(&tag) {
                self.handle_known(entry.model.as_deref(), entry.firmware.as_deref());
                self.models.extend(entry.models);
            }
        }
    }

    /// Attempts that were refused so far.
    #[must_use]
    pub const fn refused(&self) -> u64 {
        self.refused
    }

    /// The versions under test.
    pub fn tested(&self, now: Instant) -> impl Iterator<Item = Tested> {
        self.entries.values().map(move |entry| entry.tested(now))
    }

    pub(crate) fn is_limiting(&self) -> bool {
        self.is_loaded && self.known.len() < KNOWN_MAX
    }
}

/// Devices per second, and at once, of all versions without an entry.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the clamp bounds the value"
)]
fn unseen_rate(k_ref: f64) -> u32 {
    (k_ref / PART_OF_CAPACITY).clamp(1.0, 10_000.0) as u32
}

#[cfg(test)]
mod tests;
