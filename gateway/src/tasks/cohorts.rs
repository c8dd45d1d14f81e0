//! Judges the cohorts once a second, tells operators of proposals, and writes the rules of automatic ones. Start with
//! [`judge`].

use std::{sync::Arc, time::Duration};

use seawall_proto::{
    cohorts::{Action, Breaker, BreakerRule, ProposalId, ProposalState, is_of_one_tenant, may_hold},
    id::RuleId,
    rules::{Rule, RuleSpec},
    time::Instant,
};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    fleet::{
        breaker::{Shown, gates},
        events::Body,
    },
    node::{
        Shared, State,
        preview::held_back,
        rule_write::{Author, Place, made_or_changed},
    },
    runtime::lifecycle::blocking,
    session::census::Census,
    store::{Audit, Consent, StoreError},
};

/// Interval at which cohorts are judged.
const INTERVAL: Duration = Duration::from_secs(1);
/// The alarm that operators see while a proposal is open or its rule holds.
pub const ALARM: &str = "bad_cohort";
/// Who writes an automatic rule, in the audit log.
const ACTOR: &str = "gateway";

/// Judges the cohorts, until `stop`.
pub async fn judge(state: Shared, stop: CancellationToken) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = state.clock.now();
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let now = state.clock.now();
        let elapsed = now.saturating_since(last).as_secs_f64();
        if elapsed <= 0.0 {
            continue;
        }
        last = now;
        // Read before the rules: a rule that comes in between makes an automatic one wait.
        let revision = state.rules.stored_revision();
        let gates = gates(&state.rules.current(), state.clock.wall());
        for action in state.breaker.handle_second(&state.cohorts, &gates, elapsed, now) {
            obey(&state, action, revision, now).await;
        }
        let proposals = state.breaker.proposals();
        let open = proposals.iter().filter(|shown| shown.proposal.is_open()).count();
        let gated = proposals.iter().filter(|shown| is_applied(shown)).count();
        state.metrics.proposals.set("open", as_gauge(open));
        state.metrics.proposals.set("applied", as_gauge(gated));
    }
}

/// `revision`: of the stored rules that the action is based on.
async fn obey(state: &Shared, action: Action, revision: u64, now: Instant) {
    let (Action::Opened(id)
    | Action::Applied(id)
    | Action::Dismissed(id)
    | Action::Expired(id)
    | Action::Apply(id)
    | Action::Renew(id)) = action;
    let Some(shown) = state.breaker.proposal(id) else {
        return state.breaker.handle_failed(id, now);
    };
    match action {
        Action::Opened(_) => {
            narrow(state, &shown);
            announce(state, &shown, "opened");
        }
        Action::Applied(_) => announce(state, &shown, "taken over"),
        Action::Dismissed(_) => announce(state, &shown, "dismissed"),
        Action::Expired(_) => announce(state, &shown, "expired"),
        Action::Apply(_) => {
            let spec = shown.rule(state.clock.wall());
            let exact = spec.filter(|spec| state.breaker.is_exact(spec, &shown.cohort));
            let Some(spec) = exact else {
                state.breaker.handle_failed(id, now);
                return tracing::warn!(
                    proposal.id = %id.0,
                    cohort = shown.cohort.name(),
                    "cohort not gated: a rule for it would match other cohorts"
                );
            };
            apply(state, &shown, spec, revision, now).await;
        }
        Action::Renew(_) => renew(state, &shown).await,
    }
}

/// Makes the proposal one about a single tenant, if the events are of its devices and other tenants have the version as
/// well.
fn narrow(state: &Shared, shown: &Shown) {
    let Some(tenant) = &shown.tenant else { return };
    let (mut devices, mut others) = (0, 0);
    let (groups, _) = state.history.groups().all();
    for (group, counts) in groups {
        if group.cohort.tag() == shown.cohort.tag() {
            let count = if group.tenant == *tenant {
                &mut devices
            } else {
                &mut others
            };
            // Devices in a crash loop are away at times.
            *count += counts.total();
        }
    }
    if is_of_one_tenant(devices, others) {
        state.breaker.narrow(shown.proposal.id, tenant);
    }
}

/// Writes the rule of a proposal that no person has asked for, and puts it in force on this node. If another node has
/// written rules meanwhile, the limits are checked again.
async fn apply(state: &Shared, shown: &Shown, spec: RuleSpec, revision: u64, now: Instant) {
    let (id, rule) = (shown.proposal.id, shown.proposal.rule_id());
    let audit = audit(state, "proposal.apply");
    let made = match is_within_limit(state, &spec).await {
        Ok(true) => {
            let interval = Breaker::APPLY_INTERVAL;
            let inserting = state
                .store
                .rule_insert_automatic(rule, spec, revision, interval, &audit);
            inserting.await
        }
        Ok(false) => {
            state.breaker.handle_failed(id, now);
            return tracing::warn!(
                proposal.id = %id.0,
                cohort = shown.cohort.name(),
                "cohort not gated: over a fifth of the devices of all nodes would be held back"
            );
        }
        Err(error) => Err(error),
    };
    match made {
        Ok(rule) => {
            put_in_force(state, &rule, "created").await;
            applied(state, id, rule.id, true);
        }
        Err(error) => {
            tracing::warn!(%error, proposal.id = %id.0, "rule of a proposal not written: trying again");
            state.breaker.handle_failed(id, now);
        }
    }
}

/// Whether the breaker's rules in force, with this one, hold back no more devices of all nodes than is allowed. This
/// node alone has counted its own before.
async fn is_within_limit(state: &Shared, spec: &RuleSpec) -> Result<bool, StoreError> {
    let check = state.store.rule_check(state.run).await?;
    if check.nodes.iter().all(|node| !node.is_live) {
        return Ok(true);
    }
    let (rules, wall) = (state.rules.current(), state.clock.wall());
    let (spec, shared) = (spec.clone(), Arc::clone(state));
    let counted = blocking(move || {
        let census = Census::of(&shared.sessions, &shared.history);
        let in_force = rules.rules().iter().filter(|rule| {
            let own = BreakerRule::of(rule, wall);
            own.is_some_and(|own| own.holds())
        });
        let specs: Vec<&RuleSpec> = in_force.map(|rule| &rule.spec).chain([&spec]).collect();
        held_back(&specs, &check, &census, &shared.node)
    });
    // What cannot be counted is not within the limit.
    let counted = counted.await.flatten();
    Ok(counted.is_some_and(|(held, fleet)| may_hold(held, fleet)))
}

/// The rule of a proposal is in force.
pub fn applied(state: &State, id: ProposalId, rule: RuleId, is_automatic: bool) {
    state.breaker.handle_applied(id, rule, is_automatic, state.clock.now());
    if let Some(shown) = state.breaker.proposal(id) {
        announce(state, &shown, "applied");
    }
}

/// Extends a rule whose cohort is still bad. If it is changed or deleted meanwhile, the next look at the rules finds
/// out. Another node may extend it as well.
async fn renew(state: &Shared, shown: &Shown) {
    let (rules, wall) = (state.rules.current(), state.clock.wall());
    let mut own = rules
        .rules()
        .iter()
        .filter(|rule| BreakerRule::of(rule, wall).is_some());
    let Some(rule) = own.find(|rule| Some(rule.id) == shown.proposal.rule) else {
        return;
    };
    if shown.proposal.is_automatic() {
        match is_within_limit(state, &rule.spec).await {
            Ok(true) => {}
            Ok(false) => {
                return tracing::warn!(
                    rule.id = %rule.id,
                    cohort = shown.cohort.name(),
                    "rule of a proposal not extended: over a fifth of the devices of all nodes would be held back"
                );
            }
            Err(error) => {
                return tracing::warn!(%error, rule.id = %rule.id, "rule of a proposal not extended: trying again");
            }
        }
    }
    let spec = RuleSpec {
        expires_at: Some(wall + Breaker::GATE),
        ..rule.spec.clone()
    };
    let audit = audit(state, "proposal.renew");
    let writing = state
        .store
        .rule_update(rule.id, rule.revision, spec, Consent::NotNeeded, &audit);
    match writing.await {
        Ok(Some(rule)) => put_in_force(state, &rule, "changed").await,
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(%error, rule.id = %rule.id, "rule of a proposal not extended: trying again");
        }
    }
}

/// Puts a rule of the breaker in force that the database has taken.
async fn put_in_force(state: &State, rule: &Rule, change: &'static str) {
    let by = Author {
        name: ACTOR,
        request: "",
    };
    made_or_changed(state, rule.id, Place::Database(rule.clone()), &rule.spec, by, change).await;
}

/// Closes an open proposal for a person. False if it is not open.
pub fn dismiss(state: &State, id: ProposalId) -> bool {
    let is_dismissed = state.breaker.dismiss(id, state.clock.now());
    if is_dismissed && let Some(shown) = state.breaker.proposal(id) {
        announce(state, &shown, "dismissed");
    }
    is_dismissed
}

/// Tells operators: alarm, event, log line.
fn announce(state: &State, shown: &Shown, change: &'static str) {
    let proposal = &shown.proposal;
    let name = shown.cohort.name();
    let evidence = &proposal.evidence;
    tracing::warn!(
        proposal.id = %proposal.id.0,
        cohort = name,
        signal = proposal.signal.as_str(),
        observed = evidence.observed,
        expected = evidence.expected,
        score = evidence.score,
        devices = evidence.devices,
        rule.id = proposal.rule.map(|rule| rule.to_string()),
        change,
        "cohort proposal changed"
    );
    let event = Body::Proposal {
        proposal: proposal.id.0,
        cohort: name.clone(),
        signal: proposal.signal.as_str(),
        state: proposal.state.as_str(),
        rule: proposal.rule,
    };
    let wall = state.clock.wall();
    let data = serde_json::json!(&event);
    let kind = match proposal.state {
        ProposalState::Open => "proposal.opened",
        ProposalState::Applied => "proposal.applied",
        ProposalState::Dismissed => "proposal.dismissed",
        ProposalState::Expired => "proposal.expired",
    };
    state.webhook.notify(kind, wall, state.clock.now(), data);
    state.events.notice(wall, event);
    let figure = format!(
        "{name} stands out by {}: {:.0} {}, expected {:.1}",
        proposal.signal.as_str(),
        evidence.observed,
        proposal.signal.unit(),
        evidence.expected
    );
    let rule = proposal.rule.map(|rule| rule.to_string()).unwrap_or_default();
    let (detail, action) = match proposal.state {
        ProposalState::Open => (
            format!("{figure}. A rule would admit 10 % of it for 15 minutes"),
            format!("seawall proposals apply {}", proposal.id.0),
        ),
        ProposalState::Applied => (
            format!("{figure}. 10 % of it are admitted until it is well"),
            format!("seawall rules unblock {rule}"),
        ),
        ProposalState::Dismissed | ProposalState::Expired => {
            let detail = format!("the proposal about {name} is {}", proposal.state.as_str());
            return state.alarms.set_for(ALARM, &name, false, detail);
        }
    };
    state.alarms.raise(ALARM, &name, detail, Some(action.into()));
}

fn is_applied(shown: &Shown) -> bool {
    shown.proposal.state == ProposalState::Applied
}

fn audit(state: &State, action: &'static str) -> Audit {
    Audit {
        id: Uuid::now_v7(),
        at: state.clock.wall(),
        actor: ACTOR.to_owned(),
        action,
    }
}

#[expect(clippy::cast_precision_loss, reason = "at most 100")]
const fn as_gauge(count: usize) -> f64 {
    count as f64
}
