//! The connect machine: the one order of decisions about a connecting device, from its hello to its answer.
//!
//! ```text
//! draining? ─▶ rules on claims ─▶ credential present? ─▶ resume token ─▶          screen
//! throttles ─▶ unproven version? ─▶ admission ─▶ [lookup] ─▶ credential ─▶ disabled? ─▶
//! rules on registry data ─▶ draining? ─▶ Admitted | Refused                       Connect
//! ```
//!
//! Start with [`Connect`], one per node. [`screen`] is the part of the order that needs no state shared between
//! devices, so that a gateway runs it before it takes its lock. Only the result of `screen` can be handed to
//! [`Connect`], and only `Connect` returns an [`Admitted`]: no step can be left out, and none is done twice.
//!
//! Nothing here reads a socket or sends a query. The limits on connections and addresses, and the checks on the form of
//! a request, come before.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand::Rng;

mod absences;
mod doubts;
mod screening;
mod throttles;

pub use self::screening::{Attempt, Restriction, ResumeOutcome, Screened, Screening, screen};
use self::{
    absences::{Absences, Registrations},
    doubts::Doubts,
    screening::{Standing, claimed_tenant, concluded, ruled},
    throttles::{Asking, Throttle, Throttles},
};
use crate::{
    admission::{
        self, Admission, AdmissionConfig, AdmissionState, Answered, Arrival, Batch, BatchFailure, Cause, Costly,
        Outcome, Refused, Registry, Ticket, Told,
    },
    cohort::CohortTag,
    id::{Credential, CredentialTag, DeviceId, Label, Network, RuleId, SessionId},
    proving::{self, Proving},
    record::{DeviceRecord, DeviceState},
    refusal::{Hint, Peers, Refusal},
    resume::{Generation, Grant, Verifier},
    rules::{OwnedSubject, RuleSet, Subject},
    slots::{RegistryIndex, SlotKeys, Slots, TenantTag},
    time::{Instant, WallTime},
};

/// The state of the node that decisions depend on.
#[derive(Clone, Copy, Debug)]
pub struct Conditions<'a> {
    /// The rules in force.
    pub rules: &'a Arc<RuleSet>,
    /// Verifies resume tokens.
    pub verifier: Verifier<'a>,
    /// Set while this node is draining.
    pub draining: Option<Peers>,
    /// Sessions of this node.
    pub sessions: usize,
    pub now: Instant,
    pub wall: WallTime,
}

/// A device that is registered, authenticated and admitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// The device's claim, otherwise the registry's.
    pub model: Option<Label>,
    /// Its registry data, for its resume tokens.
    pub grant: Grant,
    /// The session whose resume token admitted it; `None` if it was looked up.
    pub resumed: Option<SessionId>,
}

impl Admitted {
    /// The registry's tenant, whatever the device claimed.
    #[must_use]
    pub const fn tenant(&self) -> &Label {
        &self.grant.tenant
    }

    /// The device by registry data, for firmware rules.
    fn subject<'a>(&'a self, firmware: Option<&'a Label>) -> Subject<'a> {
        Subject {
            device: Some(self.grant.device),
            firmware: firmware.map(Label::as_str),
            model: self.model.as_deref(),
            tenant: Some(self.tenant().as_str()),
        }
    }
}

/// Result of the order of decisions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Admitted(Admitted),
    /// Not authenticated.
    Restricted(Box<Restriction>),
    Refused(Refusal),
}

/// A decision, and the result of the lookup before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conclusion {
    pub decision: Decision,
    /// `None` if admission was not involved.
    pub look_up: Option<LookUp>,
    /// The rule in dry-run mode that would have applied to the device, if it were enforced and there were no others.
    pub dry_run: Option<RuleId>,
}

impl Conclusion {
    /// A refusal without a lookup.
    #[must_use]
    pub const fn refused(refusal: Refusal) -> Self {
        concluded(Decision::Refused(refusal), None)
    }
}

/// Result of a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookUp {
    /// The registry has the device. Its statement took this long, for this many keys.
    Found { took: Duration, keys: u32 },
    /// The registry does not have the device.
    Absent,
    /// The registry did not have the device a short time ago, and was not queried again.
    RememberedAbsent,
    /// There was no lookup, or no reliable answer.
    Refused(Cause),
}

impl LookUp {
    /// Label of `seawall_lookups_total`; `None` if no key was sent for the device.
    #[must_use]
    pub const fn as_str(self) -> Option<&'static str> {
        match self {
            Self::Found { .. } => Some("found"),
            Self::Absent => Some("not_found"),
            Self::RememberedAbsent => Some("cached"),
            Self::Refused(Cause::LookupFailed | Cause::LookupUntold) => Some("failed"),
            Self::Refused(Cause::LookupTimedOut) => Some("timed_out"),
            Self::Refused(Cause::Throttle | Cause::QueueFull | Cause::Deadline | Cause::Breaker) => None,
        }
    }
}

/// The next step of a device that has passed [`screen`].
#[derive(Debug)]
pub enum Step {
    Concluded(Conclusion),
    /// It waits for its lookup. An [`Output::Conclusion`] with this ticket follows, unless
    /// [`handle_gone`](Connect::handle_gone) is called before.
    Waiting(Ticket),
}

/// A statement to send to the registry.
#[derive(Debug)]
pub struct Statement {
    pub batch: Batch,
    /// The revocations that were known before it was sent.
    as_of: Generation,
    /// The registrations that were known before it was sent.
    registrations: Registrations,
}

/// The answer of a statement about one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Row {
    Found(DeviceRecord),
    /// The registry does not have the device.
    Missing,
    /// The registry has the device, but its record cannot be read.
    Unreadable,
}

/// The caller's next action. See [`Connect::poll_output`].
#[derive(Debug)]
pub enum Output<T> {
    /// Send it, and call [`handle_answered`](Connect::handle_answered) or [`handle_failed`](Connect::handle_failed).
    Send(Statement),
    /// Answer the device that waits with this ticket.
    Conclusion {
        ticket: Ticket,
        caller: T,
        conclusion: Conclusion,
    },
    /// Count the registry's devices: it lacks a device that it had when the index was read.
    CountRegistry,
    /// Nothing, until this time or until something else happens.
    Wait(Option<Instant>),
}

/// A device that waits for its lookup.
#[derive(Debug)]
struct Waiting<T> {
    credential: Credential,
    claims: OwnedSubject,
    /// See [`Screened::tenant`].
    tenant: Option<TenantTag>,
    dry_run: Option<RuleId>,
    /// It has taken a permit of its throttle at its arrival.
    is_paid: bool,
    /// Throttles do not refuse it, because it returned at its slot.
    is_exempt: bool,
    /// Its version had not proved itself when it came.
    is_limited: bool,
    caller: T,
}

/// A record, as a lookup found it.
#[derive(Clone, Debug)]
struct Found {
    record: DeviceRecord,
    took: Duration,
    /// Keys of its statement.
    keys: u32,
    as_of: Generation,
}

/// Decides about all devices that connect to one node. `T` is the caller's data for a device that waits.
#[derive(Debug)]
pub struct Connect<T> {
    admission: Admission<Found, Waiting<T>>,
    slots: Slots,
    /// Devices that no longer wait, because a rule that came into force meanwhile refuses or restricts them. Bounded by
    /// the number of waiting devices.
    refused: VecDeque<(Ticket, T, Conclusion)>,
    /// The rules that the waiting devices were screened by.
    rules: Arc<RuleSet>,
    throttles: Throttles,
    absences: Absences,
    believes_absence: bool,
    doubts: Doubts,
    has_doubt: bool,
    proving: Proving,
}

impl<T> Connect<T> {
    /// Lookups are allowed from the start, unless [`Registry::Absent`] is reported.
    #[must_use]
    pub fn new(config: AdmissionConfig, keys: SlotKeys, now: Instant) -> Self {
        Self {
            slots: Slots::new(&config.slots(), keys),
            admission: Admission::new(config, now),
            refused: VecDeque::new(),
            rules: Arc::new(RuleSet::empty()),
            throttles: Throttles::default(),
            absences: Absences::new(),
            believes_absence: true,
            doubts: Doubts::default(),
            has_doubt: false,
            proving: Proving::default(),
        }
    }

    // === One attempt ===

    /// Decides about a device that has passed [`screen`]. `caller` is called only if it waits.
    pub fn handle_screened(
        &mut self,
        screened: Screened<'_>,
        caller: impl FnOnce() -> T,
        conditions: &Conditions<'_>,
        rng: &mut impl Rng,
    ) -> Step {
        let Screened {
            attempt,
            credential,
            rules,
            tenant,
            standing,
            mut dry_run,
            mut throttle,
        } = screened;
        let Conditions { now, wall, .. } = *conditions;
        if !Arc::ptr_eq(&rules, conditions.rules) {
            let known = || self.slots.claimed_tenant(attempt.device, attempt.slot, now);
            let subject = match &standing {
                Standing::Resumed(admitted) => admitted.subject(attempt.firmware),
                Standing::Unproven { .. } => attempt.claims(tenant.or_else(known), conditions.rules),
            };
            let ruled = ruled(conditions.rules, &subject, wall, rng);
            (dry_run, throttle) = (ruled.dry_run, ruled.throttle);
            if let Some(decision) = ruled.decision {
                return Step::Concluded(concluded(decision, dry_run));
            }
        }
        if let Standing::Unproven { hinted: Some(tenant) } = &standing {
            self.slots.handle_hinted_tenant(attempt.device, tenant.as_str());
        }
        let (device, is_resumed) = (attempt.device, matches!(standing, Standing::Resumed(_)));
        let is_due = |token| self.slots.shows_due(device, token, now, wall);
        let is_exempt = is_resumed || attempt.slot.is_some_and(is_due);
        if let Some(throttle) = throttle {
            let asking = Asking {
                device,
                is_known: is_resumed || self.slots.is_known(device, attempt.slot, now, wall),
                is_exempt,
            };
            if let Some(refusal) = self.throttled(throttle, asking, conditions, rng) {
                return Step::Concluded(concluded(Decision::Refused(refusal), dry_run));
            }
        }
        let cohort = CohortTag::of(attempt.model.map(Label::as_str), attempt.firmware.map(Label::as_str));
        let is_limited = self.proving.is_limited(cohort);
        // Other devices are left to admission, because anybody can name an id and a version.
        let is_asked = is_limited && (is_resumed || self.slots.is_known(device, attempt.slot, now, wall));
        let proving = is_asked.then(|| proving::Asking {
            cohort,
            sessions: conditions.sessions,
            k_ref: self.admission.k_ref(now),
        });
        if let Some(refusal) = proving.and_then(|asking| self.not_proven_yet(asking, &attempt, (now, wall), rng)) {
            return Step::Concluded(concluded(Decision::Refused(refusal), dry_run));
        }
        if let Standing::Resumed(admitted) = standing {
            if let Some(asking) = proving {
                self.proving.handle_admitted(attempt.model, attempt.firmware, now);
                self.proving.handle_entered(asking, now);
            }
            return Step::Concluded(self.let_in(admitted, None, dry_run, conditions, rng));
        }
        let arrival = Arrival {
            device: attempt.device,
            cohort,
            slot_token: attempt.slot,
            arrived: attempt.arrived,
            is_known_absent: self.absences.contains(attempt.device, now),
            credential: CredentialTag::from(&credential),
            network: attempt.network,
        };
        let waiting = || Waiting {
            credential,
            claims: attempt.owned_claims(),
            tenant,
            dry_run,
            is_paid: throttle.is_some(),
            is_exempt,
            is_limited,
            caller: caller(),
        };
        match self
            .admission
            .attempt(&arrival, waiting, &mut self.slots, (now, wall), rng)
        {
            admission::Decision::Queued(ticket) => {
                if let Some(asking) = proving {
                    self.proving.handle_entered(asking, now);
                }
                Step::Waiting(ticket)
            }
            admission::Decision::Refused(refused) => {
                Step::Concluded(self.not_looked_up(refused, Some(attempt.device), dry_run, now))
            }
            admission::Decision::KnownAbsent => Step::Concluded(Conclusion {
                decision: Decision::Refused(Refusal::unauthorized(rng)),
                look_up: Some(LookUp::RememberedAbsent),
                dry_run,
            }),
        }
    }

    /// The device has left. Unless its key is in flight, or others wait for it, it never reaches the database. Returns
    /// `None` if it no longer waits.
    pub fn handle_gone(&mut self, ticket: Ticket, now: Instant) -> Option<T> {
        let gone = self.admission.abandon(ticket, now)?;
        Some(gone.caller)
    }

    /// The devices that wait, by arrival.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = &T> {
        self.admission.waiting().map(|(_, waiting)| &waiting.caller)
    }

    /// A statement was answered after `took`. `row` is called once for each of its keys.
    pub fn handle_answered(
        &mut self,
        statement: &Statement,
        mut row: impl FnMut(DeviceId) -> Row,
        took: Duration,
        now: Instant,
        rng: &mut impl Rng,
    ) {
        let Self {
            admission,
            slots,
            absences,
            doubts,
            has_doubt,
            ..
        } = self;
        let believes_absence = self.believes_absence;
        let keys = u32::try_from(statement.batch.keys.len()).unwrap_or(u32::MAX);
        // It is called for every key, even if no device waits for it: the result spares later lookups.
        let told = |device| match row(device) {
            Row::Found(record) => Told::Found(Found {
                record,
                took,
                keys,
                as_of: statement.as_of,
            }),
            Row::Missing => {
                // The registry may have lost a device that it had when the index was read.
                let was_there = slots.registry_index().has(device);
                *has_doubt |= was_there;
                // Recorded even while no absence is believed: the count that ends that state settles the doubt as well.
                let is_settled = !was_there || doubts.is_settled(device);
                if believes_absence && is_settled {
                    absences.learn(device, statement.registrations, now, rng);
                    Told::Absent
                } else {
                    Told::Nothing
                }
            }
            Row::Unreadable => Told::Nothing,
        };
        admission.handle_batch_done(statement.batch.id, Ok(told), now);
    }

    /// A statement was not answered.
    pub fn handle_failed(&mut self, statement: &Statement, failure: BatchFailure, now: Instant) {
        let failed = Err::<fn(_) -> _, _>(failure);
        self.admission.handle_batch_done(statement.batch.id, failed, now);
    }

    /// Returns the caller's next action. Call it after every other call and at the time that it names, until it returns
    /// [`Wait`](Output::Wait).
    pub fn poll_output(&mut self, conditions: &Conditions<'_>, rng: &mut impl Rng) -> Output<T> {
        self.screen_waiting(conditions, rng);
        if let Some((ticket, caller, conclusion)) = self.refused.pop_front() {
            return Output::Conclusion {
                ticket,
                caller,
                conclusion,
            };
        }
        let times = (conditions.now, conditions.wall);
        let (ticket, caller, conclusion) = match self.admission.poll_output(&mut self.slots, times, rng) {
            admission::Output::Send(batch) => {
                return Output::Send(Statement {
                    batch,
                    as_of: conditions.verifier.revoked.known(),
                    registrations: self.absences.registrations(),
                });
            }
            admission::Output::Wait(_) if std::mem::take(&mut self.has_doubt) => return Output::CountRegistry,
            admission::Output::Wait(until) => return Output::Wait(until),
            admission::Output::Answer {
                ticket,
                kept,
                record,
                answered,
            } => {
                let conclusion = self.conclude(answered, &kept, record, conditions, rng);
                (ticket, kept.caller, conclusion)
            }
            admission::Output::Refuse { ticket, kept, refused } => {
                let device = kept.claims.device;
                let conclusion = self.not_looked_up(refused, device, kept.dry_run, conditions.now);
                (ticket, kept.caller, conclusion)
            }
        };
        Output::Conclusion {
            ticket,
            caller,
            conclusion,
        }
    }

    /// If the rules in force changed since the waiting devices were screened, answers the devices that the new rules
    /// block or restrict. A blocked device costs no query, even if its rule came while it waited.
    fn screen_waiting(&mut self, conditions: &Conditions<'_>, rng: &mut impl Rng) {
        if Arc::ptr_eq(conditions.rules, &self.rules) {
            return;
        }
        self.rules = Arc::clone(conditions.rules);
        self.throttles.handle_rules(&self.rules);
        // Many devices wait, with few different versions. Each version is evaluated once, and hints are drawn for
        // refused devices only.
        let mut is_ruled: BTreeMap<Subject<'_>, bool> = BTreeMap::new();
        let mut refused = Vec::new();
        for (ticket, waiting) in self.admission.waiting() {
            let Waiting {
                claims,
                tenant,
                dry_run,
                ..
            } = waiting;
            let known = || {
                let device = claims.device.filter(|_| self.rules.name_tenants())?;
                self.slots.claimed_tenant(device, None, conditions.now)
            };
            let tenant = claimed_tenant(claims.tenant.as_ref(), tenant.or_else(known), &self.rules);
            let claims = Subject {
                tenant: Some(tenant),
                ..claims.as_subject()
            };
            let all = Subject { device: None, ..claims };
            let is_any_ruled = || self.rules.verdict(&all, conditions.wall).enforced.is_some();
            if *is_ruled.entry(all).or_insert_with(is_any_ruled)
                && let Some(decision) = ruled(&self.rules, &claims, conditions.wall, rng).decision
            {
                refused.push((ticket, concluded(decision, *dry_run)));
            }
        }
        for (ticket, conclusion) in refused {
            if let Some(caller) = self.handle_gone(ticket, conditions.now) {
                self.refused.push_back((ticket, caller, conclusion));
            }
        }
    }

    /// The device was looked up. Checks its credential, then whether it is disabled, then the rules by registry data.
    /// Unknown, wrong and revoked give the same answer, so that no client learns which ids exist.
    fn conclude(
        &mut self,
        answered: Answered,
        waiting: &Waiting<T>,
        found: Option<Found>,
        conditions: &Conditions<'_>,
        rng: &mut impl Rng,
    ) -> Conclusion {
        let Conditions { now, wall, .. } = *conditions;
        let mut dry_run = waiting.dry_run;
        let device = answered.device();
        let look_up = match &found {
            Some(Found { took, keys, .. }) => LookUp::Found {
                took: *took,
                keys: *keys,
            },
            None => LookUp::Absent,
        };
        let right = found.as_ref().filter(|Found { record, .. }| {
            record.accepts(&waiting.credential, wall) && record.state != DeviceState::Revoked
        });
        let Some(Found { record, as_of, .. }) = right else {
            let right = found.as_ref().map(|found| found.record.right(wall));
            self.admission.learn(&answered, right.unwrap_or_default());
            let unproven = self.not_proven(answered, dry_run, conditions, rng);
            return Conclusion {
                look_up: Some(look_up),
                ..unproven
            };
        };
        self.admission.end(answered, Outcome::Right, now);
        let decision = if record.state == DeviceState::Disabled {
            self.throttles.handle_ended(device);
            Decision::Refused(Refusal::device_disabled(rng))
        } else {
            let admitted = Admitted {
                model: waiting.claims.model.clone().or_else(|| record.model.clone()),
                grant: Grant {
                    device,
                    credential: waiting.credential,
                    tenant: record.tenant.clone(),
                    model: record.model.clone(),
                    generation: *as_of,
                    credential_until: record.ends(&waiting.credential),
                },
                resumed: None,
            };
            let subject = admitted.subject(waiting.claims.firmware.as_ref());
            let ruled = ruled(conditions.rules, &subject, wall, rng);
            dry_run = dry_run.or(ruled.dry_run);
            if ruled.decision.is_some() {
                self.throttles.handle_ended(device);
            }
            // A device takes one permit. Two rules that each refuse it for lack of a permit would otherwise never admit
            // it.
            let throttle = ruled.throttle.filter(|_| !waiting.is_paid);
            let asking = Asking {
                device,
                is_known: true,
                is_exempt: waiting.is_exempt,
            };
            let throttled = |throttle| self.throttled(throttle, asking, conditions, rng);
            let refused = || throttle.and_then(throttled).map(Decision::Refused);
            match ruled.decision.or_else(refused) {
                None => {
                    if waiting.is_limited {
                        let OwnedSubject { model, firmware, .. } = &waiting.claims;
                        self.proving.handle_admitted(model.as_ref(), firmware.as_ref(), now);
                    }
                    return self.let_in(admitted, Some(look_up), dry_run, conditions, rng);
                }
                Some(decision) => decision,
            }
        };
        Conclusion {
            decision,
            look_up: Some(look_up),
            dry_run,
        }
    }

    /// The registry does not have the device, or its credential is wrong. While no absence is believed, an unknown
    /// device is refused as one that cannot be verified now; a wrong credential must look the same.
    fn not_proven(
        &mut self,
        answered: Answered,
        dry_run: Option<RuleId>,
        conditions: &Conditions<'_>,
        rng: &mut impl Rng,
    ) -> Conclusion {
        let Conditions { now, wall, .. } = *conditions;
        if self.believes_absence {
            self.admission.end(answered, Outcome::Wrong, now);
            return concluded(Decision::Refused(Refusal::unauthorized(rng)), dry_run);
        }
        let device = answered.device();
        let refused = self
            .admission
            .refuse(answered, Cause::LookupUntold, &mut self.slots, (now, wall), rng);
        self.not_looked_up(refused, Some(device), dry_run, now)
    }

    /// The refusal of a device that a rule throttles, if the rate of the rule has no room for it now.
    fn throttled(
        &mut self,
        throttle: Throttle,
        asking: Asking,
        conditions: &Conditions<'_>,
        rng: &mut impl Rng,
    ) -> Option<Refusal> {
        let k_ref = self.admission.k_ref(conditions.now);
        let taken = self.throttles.take(throttle, asking, k_ref, conditions.now, rng);
        let after = taken.err()?;
        let reason = conditions.rules.get(throttle.rule);
        let reason = reason.map_or("", |rule| rule.spec.reason.as_str());
        Some(Refusal::throttled_by(throttle.rule, reason, after))
    }

    /// The refusal of a device whose version has not proved itself, if there is no room for it now. Neither a resume
    /// token nor a due slot makes a difference: they say nothing about the firmware.
    fn not_proven_yet(
        &mut self,
        asking: proving::Asking,
        attempt: &Attempt<'_>,
        (now, wall): (Instant, WallTime),
        rng: &mut impl Rng,
    ) -> Option<Refusal> {
        let at = self.proving.ask(asking, now).err()?;
        let hint = self
            .slots
            .refuse_until(attempt.device, attempt.slot, at, (now, wall), rng);
        self.throttles.handle_refused(attempt.device, hint.after, now);
        Some(Refusal::unproven(hint))
    }

    fn not_looked_up(
        &mut self,
        refused: Refused,
        device: Option<DeviceId>,
        dry_run: Option<RuleId>,
        now: Instant,
    ) -> Conclusion {
        let look_up = Some(LookUp::Refused(refused.cause));
        let refusal = Refusal::from(refused);
        if let (Some(device), Some(hint)) = (device, &refusal.hint) {
            self.throttles.handle_refused(device, hint.after, now);
        }
        Conclusion {
            decision: Decision::Refused(refusal),
            look_up,
            dry_run,
        }
    }

    /// The last check: a drain may have begun meanwhile. Then the device keeps its slot.
    fn let_in(
        &mut self,
        admitted: Admitted,
        look_up: Option<LookUp>,
        dry_run: Option<RuleId>,
        conditions: &Conditions<'_>,
        rng: &mut impl Rng,
    ) -> Conclusion {
        let decision = match conditions.draining {
            Some(peers) => Decision::Refused(Refusal::draining(peers, rng)),
            None => {
                let tenant = admitted.tenant().as_str();
                self.slots.handle_admitted(admitted.grant.device, tenant);
                self.throttles.handle_ended(admitted.grant.device);
                Decision::Admitted(admitted)
            }
        };
        Conclusion {
            decision,
            look_up,
            dry_run,
        }
    }
}

// === What the node learns ===

impl<T> Connect<T> {
    /// A report about the registry from calls other than lookups.
    pub fn handle_registry(&mut self, registry: Registry, now: Instant) {
        self.admission.handle_registry(registry, now);
    }

    /// See [`Admission::had_contact`].
    #[must_use]
    pub const fn had_contact(&self) -> bool {
        self.admission.had_contact()
    }

    /// The device was registered, or changed: its remembered absence and attempts are forgotten.
    pub fn handle_registered(&mut self, device: DeviceId) {
        self.admission.handle_registered(device);
        self.absences.handle_registered(device);
    }

    /// Any number of devices were registered.
    pub fn handle_many_registered(&mut self) {
        self.admission.handle_many_registered();
        self.absences.handle_many_registered();
    }

    /// The registry has the device with this tenant, whatever the index says.
    pub fn handle_tenant(&mut self, device: DeviceId, tenant: &str) {
        self.slots.handle_tenant(device, tenant);
    }

    /// Whether a device that the registry does not have is handled as not registered. Otherwise it is refused as one
    /// that cannot be verified now.
    #[must_use]
    pub const fn believes_absence(&self) -> bool {
        self.believes_absence
    }

    pub fn set_believes_absence(&mut self, believes_absence: bool) {
        self.believes_absence = believes_absence;
        if !believes_absence {
            // Absences that were learnt shortly before may be wrong as well.
            self.absences.handle_many_registered();
        }
    }

    /// Devices that the registry did not have although the index has them.
    #[must_use]
    pub const fn doubts(&self) -> &Doubts {
        &self.doubts
    }

    /// Records that a count which began after the doubt of this number found the registry complete: devices that were
    /// missing before are not registered.
    pub fn settle_doubts(&mut self, last: u64) {
        self.doubts.settle(last);
    }

    /// Sets the index of registered devices. A device that is not in it, and was not seen authenticated, is unknown.
    /// Returns the previous index, because dropping a large one takes a moment.
    pub fn set_registry_index(&mut self, registry_index: Arc<RegistryIndex>) -> Arc<RegistryIndex> {
        self.doubts.clear();
        self.slots.set_registry_index(registry_index)
    }

    /// See [`Admission::set_bounds`].
    pub fn set_bounds(&mut self, lookups_per_second_max: u32, keys_in_flight_max: u32, now: Instant) {
        self.admission
            .set_bounds(lookups_per_second_max, keys_in_flight_max, now);
    }

    /// The versions that have not proved themselves.
    #[must_use]
    pub const fn proving(&self) -> &Proving {
        &self.proving
    }

    /// As [`proving`](Self::proving), to report what is stored and which sessions begin and end.
    pub const fn proving_mut(&mut self) -> &mut Proving {
        &mut self.proving
    }

    /// Looks at the evidence about versions; once a second. `sessions`: of this node.
    pub fn handle_second(&mut self, sessions: usize, now: Instant) {
        if self.proving.is_testing() {
            let costly: BTreeSet<CohortTag> = self.costly().map(|costly| costly.cohort.claimed()).collect();
            self.proving
                .handle_second(sessions, |cohort| costly.contains(&cohort), now);
        }
    }

    /// See [`Admission::set_limit_cut`].
    pub fn set_limit_cut(&mut self, is_cut: bool, now: Instant) {
        self.admission.set_limit_cut(is_cut, now);
    }

    /// See [`Admission::set_last_known_good`].
    pub fn set_last_known_good(&mut self, keys_per_second: f64) {
        self.admission.set_last_known_good(keys_per_second);
    }

    /// See [`Admission::take_last_known_good`].
    pub fn take_last_known_good(&mut self, now: Instant) -> Option<f64> {
        self.admission.take_last_known_good(now)
    }

    // === Questions beside attempts ===

    /// Gives a slot to a device whose session is closed, or for which the node has no room. See [`Slots::give`].
    pub fn give_slot(
        &mut self,
        device: DeviceId,
        slot_token: Option<&str>,
        at_least: Duration,
        (now, wall): (Instant, WallTime),
        rng: &mut impl Rng,
    ) -> Hint {
        let rate = self.admission.k_ref(now);
        self.slots.give(device, slot_token, at_least, rate, (now, wall), rng)
    }

    /// The slots of this node, and its index of registered devices.
    #[must_use]
    pub const fn slots(&self) -> &Slots {
        &self.slots
    }

    /// See [`Slots::claimed_tenant`].
    #[must_use]
    pub fn claimed_tenant(&self, attempt: &Attempt<'_>, now: Instant) -> Option<TenantTag> {
        self.slots.claimed_tenant(attempt.device, attempt.slot, now)
    }

    /// See [`Admission::is_at_its_slot`].
    #[must_use]
    pub fn is_at_its_slot(
        &self,
        shown: (DeviceId, CredentialTag),
        slot_token: &str,
        network: Network,
        times: (Instant, WallTime),
    ) -> bool {
        self.admission
            .is_at_its_slot(&self.slots, shown, slot_token, network, times)
    }

    /// Isolated cohorts, whose lookups cost far more than those of others.
    pub fn costly(&self) -> impl Iterator<Item = Costly> {
        self.admission.costly()
    }

    /// Figures for people and metrics.
    #[must_use]
    pub fn state(&self, now: Instant) -> AdmissionState {
        self.admission.state(now)
    }
}

#[cfg(test)]
mod tests;
