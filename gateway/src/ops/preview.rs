//! What a rule would hit now, in the whole cluster: among the devices that are connected, and among those that were seen today.

use std::collections::BTreeMap;

use seawall_proto::{
    drain::Pacing,
    id::RuleId,
    rules::{Beside, Preview, RuleSpec},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{Api, problem::Problem};
use crate::{
    census::{Census, Counts, Group, Published},
    state::State,
    store::{RuleCheck, StoreError},
};

/// What a rule would hit now, on all nodes.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct RulePreview {
    /// Connected devices that it matches.
    pub connected: u64,
    /// All connected devices.
    pub connected_total: u64,
    /// Devices that it matches among those that were seen authenticated within a day, or since their node started; the connected
    /// ones are among them. A device that was seen by several nodes counts several times.
    pub known: u64,
    /// All devices that were seen so.
    pub known_total: u64,
    /// Registered devices, as far as this node knows.
    pub registered: u64,
    /// Nodes whose devices are counted, this one included.
    pub nodes: u64,
    /// Other rules of the last hour that nobody confirmed: it is added up with those.
    pub unconfirmed_rules: u64,
    /// Devices of other nodes whose versions are not known here: they count as hit where it is asked whether to confirm.
    pub unlisted: u64,
    /// So many that `POST /rules` will want `confirm`.
    pub needs_confirmation: bool,
    /// Why it will want it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confirmation: Option<String>,
    /// Sessions a second that this node closes where the rule has `evict`.
    pub evictions_per_second: f64,
    /// Matched devices by version, in the order of versions; at most 100, those with most devices.
    pub by_version: Vec<VersionRow>,
    /// Matched devices whose version is not in `by_version`.
    pub other_versions: u64,
}

/// Matched devices of one version.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct VersionRow {
    /// As devices state it; `(none)` where they state none.
    pub firmware: String,
    pub connected: u64,
    pub known: u64,
}

/// The devices of other nodes, and of earlier runs of this one.
#[derive(Debug, Default)]
struct Others {
    /// Whose devices are connected now.
    live: Vec<Published>,
    /// Nodes that are gone, as they were.
    gone: Vec<Published>,
    /// Nodes whose counts can't be read.
    unreadable: u64,
}

impl Others {
    fn of(check: &RuleCheck) -> Self {
        let mut others = Self::default();
        for node in &check.nodes {
            match serde_json::from_str::<Published>(&node.counts) {
                Ok(published) if node.is_live => others.live.push(published),
                Ok(published) => others.gone.push(published),
                Err(_) if node.is_live => others.unreadable += 1,
                // Nothing is known of a node that has been gone for long.
                Err(_) => {}
            }
        }
        others
    }

    fn rest(published: &[Published]) -> Counts {
        Counts {
            connected: published.iter().map(|node| node.rest.connected).sum(),
            known: published.iter().map(|node| node.rest.known).sum(),
        }
    }
}

/// A preview, and the revision of the rules that it was made beside; `None` where the other nodes could not be counted.
pub struct Checked {
    pub preview: RulePreview,
    pub revision: Option<u64>,
}

impl Checked {
    /// Asks `spec` about all devices that the cluster knows. `of` is the rule that it changes: that one is not added up with it.
    ///
    /// # Errors
    /// The database takes no writes and `is_needed`: then a rule could not be written either. One that is only slow is no reason: the preview
    /// asks for a confirmation then.
    pub async fn of(api: &Api, spec: &RuleSpec, of: Option<RuleId>, is_needed: bool) -> Result<Self, Problem> {
        let check = match api.state.store.rule_check(api.state.run).await {
            Err(error) if is_needed && error.is_retryable() && !is_slow(&error) => return Err(error.into()),
            check => check,
        };
        let spec = spec.clone();
        api.survey(move |gateway| {
            let revision = check.as_ref().ok().map(|check| check.revision);
            let preview = RulePreview::of(&spec, of, check, gateway);
            Self { preview, revision }
        })
        .await
    }
}

/// The check was cut off or waited for others: a write may still succeed.
const fn is_slow(error: &StoreError) -> bool {
    matches!(error, StoreError::TimedOut | StoreError::Busy | StoreError::Locked(_))
}

impl RulePreview {
    fn of(spec: &RuleSpec, of: Option<RuleId>, check: Result<RuleCheck, StoreError>, state: &State) -> Self {
        let wall = state.clock.wall();
        let census = Census::of(state);
        let (others, unconfirmed, stored, problem) = match check {
            Ok(check) => (Others::of(&check), check.unconfirmed, check.registered, None),
            Err(error) => (Others::default(), Vec::new(), 0, Some(error)),
        };
        let unconfirmed: Vec<&RuleSpec> = unconfirmed
            .iter()
            .filter(|rule| Some(rule.id) != of && !rule.is_expired(wall))
            .map(|rule| &rule.spec)
            .collect();
        let live = || census.groups().chain(others.live.iter().flat_map(Published::groups));
        let gone = || others.gone.iter().flat_map(Published::groups);
        let (live_rest, gone_rest) = (Others::rest(&others.live), Others::rest(&others.gone));
        let connected = Preview::of(
            spec,
            &Beside {
                rules: &unconfirmed,
                sent_away: live().map(|group| sent_away(group, &unconfirmed)).sum(),
                unlisted: live_rest.connected,
            },
            live().map(Group::connected),
        );
        let known = Preview::of(
            spec,
            &Beside {
                rules: &unconfirmed,
                sent_away: 0,
                unlisted: live_rest.known + gone_rest.known,
            },
            live().chain(gone()).map(Group::known),
        );
        let connected_total = live().map(|group| group.counts.connected).sum::<u64>() + live_rest.connected;
        // The roster may be half an hour old, and the database is not counted to its end.
        let registered = stored.max(state.gate.roster().len() as u64);
        let counts: BTreeMap<&str, u64> = connected
            .by_version
            .iter()
            .map(|hit| (hit.firmware.as_str(), hit.devices))
            .collect();
        // In an outage, few are connected: then those that were seen before it stand for all.
        let is_outage = u128::from(connected_total) * 2 < u128::from(known.total);
        let confirmation = if let Some(problem) = &problem {
            Some(format!("the devices of other nodes can't be counted: {problem}"))
        } else if others.unreadable > 0 {
            Some(format!(
                "the devices of {} other nodes can't be read",
                others.unreadable
            ))
        } else if connected.needs_confirmation() {
            Some(refusal(connected.matched, &connected, "connected", unconfirmed.len()))
        } else if is_outage && known.needs_confirmation() {
            Some(refusal(known.matched, &known, "recently seen", unconfirmed.len()))
        } else if known.is_blind(registered) {
            Some(format!(
                "the nodes have seen {} of {registered} registered devices, so what the rule would refuse is not known",
                known.total
            ))
        } else {
            None
        };
        Self {
            connected: connected.matched,
            connected_total,
            known: known.matched,
            known_total: known.total,
            registered,
            nodes: 1 + others.live.len() as u64,
            unconfirmed_rules: unconfirmed.len() as u64,
            unlisted: live_rest.connected,
            needs_confirmation: confirmation.is_some(),
            confirmation,
            evictions_per_second: {
                let sessions = usize::try_from(census.matched(spec)).unwrap_or(usize::MAX);
                Pacing::evict(state.gate.k_ref(), sessions, state.clock.now()).rate_per_second()
            },
            by_version: known
                .by_version
                .iter()
                .map(|hit| VersionRow {
                    firmware: hit.firmware.clone(),
                    connected: counts.get(hit.firmware.as_str()).copied().unwrap_or(0),
                    known: hit.devices,
                })
                .collect(),
            other_versions: known.others,
        }
    }
}

/// Devices of a group that one of these rules has sent away, as far as that can be known: they were seen, and are not connected.
fn sent_away(group: Group<'_>, rules: &[&RuleSpec]) -> u64 {
    if rules.iter().any(|rule| rule.is_for(&group.subject)) {
        group.counts.known.saturating_sub(group.counts.connected)
    } else {
        0
    }
}

fn refusal(matched: u64, preview: &Preview, which: &str, unconfirmed: usize) -> String {
    let alone = format!("the rule would refuse {matched} of {} {which} devices", preview.total);
    if unconfirmed == 0 || preview.together == matched {
        alone
    } else {
        format!(
            "{alone}, and {} of them together with {unconfirmed} rules of the last hour that nobody confirmed",
            preview.together
        )
    }
}
