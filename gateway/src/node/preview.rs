//! The devices that a rule would match, on all nodes: connected ones, and those that were seen within a day.

use std::{collections::BTreeMap, sync::atomic::Ordering, time::Duration};

use seawall_proto::{
    departures::eviction_rate_per_second,
    id::RuleId,
    rules::{Beside, Preview, RuleSpec, Subject},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::State;
use crate::{
    session::census::{Census, Counts, Group, Published},
    store::{RuleCheck, StoreError},
};

/// The devices that a rule would match now, on all nodes.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct RulePreview {
    /// Connected devices that the rule matches.
    pub connected: u64,
    /// Of `connected`, those that it does not let through: all but its `admit_percent`.
    pub affected: u64,
    /// All connected devices.
    pub connected_total: u64,
    /// Matching devices that were seen, connected ones included: the largest number that one node knows of each
    /// version, and those of earlier runs of nodes whose devices no later run knows.
    pub known: u64,
    /// All devices that were authenticated in that time.
    pub known_total: u64,
    /// Registered devices that this node knows of.
    pub registered: u64,
    /// Counted nodes, this one included.
    pub nodes: u64,
    /// Other unconfirmed rules of the last hour. The rule is added up with them.
    pub unconfirmed_rules: u64,
    /// Devices of other nodes whose versions are not known here. They count as matched when a confirmation is decided.
    pub unlisted: u64,
    /// Whether `POST /rules` will require `confirm`.
    pub needs_confirmation: bool,
    /// Why it will require it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confirmation: Option<String>,
    /// Sessions that this node closes per second if the rule has `evict`.
    pub evictions_per_second: f64,
    /// Matched devices by version, in the order of versions; at most the 100 versions with most devices.
    pub by_version: Vec<VersionRow>,
    /// Matched devices whose version is not in `by_version`.
    pub other_versions: u64,
    /// Tenants of whose connected devices, as far as this node knows them, none could connect any more; at most 20
    /// names. None for a rule that throttles or only counts.
    pub dark_tenants: Vec<String>,
    /// Number of all such tenants.
    pub dark_tenants_total: u64,
}

/// Matched devices of one version.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct VersionRow {
    /// As devices state it; `(none)` without one.
    pub firmware: String,
    pub connected: u64,
    pub known: u64,
}

/// The devices of other nodes.
#[derive(Debug, Default)]
struct Others {
    /// Nodes whose devices are connected now.
    live: Vec<Published>,
    /// Earlier runs of nodes, in their last state.
    gone: Vec<Published>,
    /// Number of nodes whose counts cannot be read.
    unreadable: u64,
}

/// Age difference up to which two runs may have ended together, as in a crash of all nodes: they had different devices.
const TOGETHER: Duration = Duration::from_secs(60);

impl Others {
    /// `node` is the name of this node, which knows `known` devices.
    ///
    /// An earlier run is counted only while the later ones, of any name, know less than half of its devices. Otherwise
    /// most of its devices would be counted once per restart.
    fn of(check: &RuleCheck, node: &str, known: u64) -> Self {
        let mut others = Self::default();
        // The devices that each run knows, with the age of the run.
        let mut runs = vec![(node, Duration::ZERO, known)];
        let (live, gone): (Vec<_>, Vec<_>) = check.nodes.iter().partition(|node| node.is_live);
        for node in live.into_iter().chain(gone) {
            let Ok(published) = serde_json::from_str::<Published>(&node.counts) else {
                others.unreadable += u64::from(node.is_live);
                continue;
            };
            let known = published.known();
            let is_later = |name: &str, age: Duration| name == node.node || age + TOGETHER < node.age;
            let later = runs.iter().filter(|(name, age, _)| is_later(name, *age));
            if node.is_live {
                runs.push((&node.node, Duration::ZERO, known));
                others.live.push(published);
            } else if later.map(|(_, _, known)| known).sum::<u64>() < known.div_ceil(2) {
                runs.push((&node.node, node.age, known));
                others.gone.push(published);
            }
        }
        others
    }

    /// Devices of groups that are not listed.
    fn rest(&self) -> Counts {
        let live = |count: fn(&Counts) -> u64| self.live.iter().map(move |node| count(&node.rest));
        Counts {
            connected: live(|rest| rest.connected).sum(),
            known: live(|rest| rest.known).max().unwrap_or(0)
                + self.gone.iter().map(|node| node.rest.known).sum::<u64>(),
        }
    }
}

/// Merges the groups of all live nodes. Each node knows nearly all devices that were seen, since it reads them at its
/// start: the largest count stands for all.
fn merged<'a>(groups: impl Iterator<Item = Group<'a>>) -> Vec<Group<'a>> {
    let mut merged: BTreeMap<Subject<'a>, Counts> = BTreeMap::new();
    for Group { subject, counts } in groups {
        let all = merged.entry(subject).or_default();
        all.connected += counts.connected;
        all.known = all.known.max(counts.known).max(all.connected);
    }
    let groups = merged.into_iter().map(|(subject, counts)| Group { subject, counts });
    groups.collect()
}

/// Devices of the cohorts that these rules hold back, and of the whole fleet, as far as all nodes count them. `None`
/// if a node's counts cannot be read.
///
/// Of the cohorts all remembered devices count: most of them are away. Of all others those that are connected.
pub(crate) fn held_back(rules: &[&RuleSpec], check: &RuleCheck, census: &Census, node: &str) -> Option<(u64, u64)> {
    let others = Others::of(check, node, census.known());
    if others.unreadable > 0 {
        return None;
    }
    let groups = census.groups().chain(others.live.iter().flat_map(Published::groups));
    let (mut held, mut fleet) = (0_u64, 0_u64);
    for Group { subject, counts } in merged(groups) {
        if rules.iter().any(|rule| rule.is_for(&subject)) {
            let devices = counts.known.max(counts.connected);
            held = held.saturating_add(devices);
            fleet = fleet.saturating_add(devices);
        } else {
            fleet = fleet.saturating_add(counts.connected);
        }
    }
    Some((held, fleet))
}

/// Which devices were counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// The devices of all nodes, with the rules of this revision.
    Cluster { revision: u64 },
    /// The devices of this node: the database is away, so the rule will be in force only here.
    Node,
    /// The other nodes could not be counted, although the database may accept the rule.
    Unknown,
}

impl RulePreview {
    /// Evaluates `spec` for these devices. `of` is the rule that it changes, which is left out of the others.
    pub(crate) fn of(
        spec: &RuleSpec,
        of: Option<RuleId>,
        check: &Result<RuleCheck, StoreError>,
        basis: Basis,
        census: &Census,
        state: &State,
    ) -> Self {
        let wall = state.clock.wall();
        let (others, unconfirmed, registered, problem) = match check {
            Ok(check) => (
                Others::of(check, &state.node, census.known()),
                &check.unconfirmed[..],
                check.registered,
                None,
            ),
            Err(_) if basis == Basis::Node => (Others::default(), &[][..], 0, None),
            Err(error) => (Others::default(), &[][..], 0, Some(error)),
        };
        let local = state.rules.local();
        let is_counted =
            |id: RuleId, spec: &RuleSpec| Some(id) != of && spec.validate_expiry(wall).is_ok() && !spec.is_harmless();
        let stored = unconfirmed.iter().map(|rule| (rule.id, &rule.spec));
        let unconfirmed: Vec<&RuleSpec> = stored
            .chain(local.unconfirmed())
            .filter(|(id, spec)| is_counted(*id, spec))
            .map(|(_, spec)| spec)
            .collect();
        let live = merged(census.groups().chain(others.live.iter().flat_map(Published::groups)));
        let live = || live.iter().copied();
        let gone = || others.gone.iter().flat_map(Published::groups);
        let rest = others.rest();
        let connected = Preview::of(
            spec,
            &Beside {
                rules: &unconfirmed,
                sent_away: live().map(|group| sent_away(group, &unconfirmed)).sum(),
                unlisted: rest.connected,
            },
            live().map(Group::connected),
        );
        let known = Preview::of(
            spec,
            &Beside {
                rules: &unconfirmed,
                sent_away: 0,
                unlisted: rest.known,
            },
            live().chain(gone()).map(Group::known),
        );
        let connected_total = live().map(|group| group.counts.connected).sum::<u64>() + rest.connected;
        // The registry index may be half an hour old, and the database's count has a maximum.
        let registered = registered.max(state.lookups.registry_index().len() as u64);
        let counts: BTreeMap<&str, u64> = connected
            .by_version
            .iter()
            .map(|hit| (hit.firmware.as_str(), hit.devices))
            .collect();
        // In an outage few devices are connected. Then the devices of the last day represent the fleet.
        let is_outage = u128::from(connected_total) * 2 < u128::from(known.total);
        let confirmation = if spec.is_harmless() {
            None
        } else if let Some(problem) = &problem {
            Some(format!("the devices of other nodes can't be counted: {problem}"))
        } else if others.unreadable > 0 {
            Some(format!(
                "the devices of {} other nodes can't be read",
                others.unreadable
            ))
        } else if connected.needs_confirmation() {
            Some(refusal(&connected, "connected", unconfirmed.len()))
        } else if is_outage && known.needs_confirmation() {
            Some(refusal(&known, "recently seen", unconfirmed.len()))
        } else if !state.is_presence_restored.load(Ordering::Relaxed) && known.is_blind(registered) {
            Some(format!(
                "this node has not read yet which of {registered} registered devices were seen, and knows {}: the effect of the rule is not known",
                known.total
            ))
        } else {
            None
        };
        Self {
            connected: connected.matched,
            affected: connected.affected,
            connected_total,
            known: known.matched,
            known_total: known.total,
            registered,
            nodes: 1 + others.live.len() as u64,
            unconfirmed_rules: unconfirmed.len() as u64,
            unlisted: rest.connected,
            needs_confirmation: confirmation.is_some(),
            confirmation,
            evictions_per_second: {
                let sessions = usize::try_from(spec.affected_of(census.matched(spec))).unwrap_or(usize::MAX);
                eviction_rate_per_second(sessions, state.lookups.k_ref())
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
            dark_tenants: connected.dark_tenants,
            dark_tenants_total: connected.dark,
        }
    }
}

/// Estimates the devices of a group that these rules have refused: those that were seen and are not connected.
fn sent_away(group: Group<'_>, rules: &[&RuleSpec]) -> u64 {
    let for_these = rules.iter().filter(|rule| rule.is_for(&group.subject));
    let most = for_these.map(|rule| rule.affected_of(group.counts.known)).max();
    let gone = group.counts.known.saturating_sub(group.counts.connected);
    gone.min(most.unwrap_or(0))
}

fn refusal(preview: &Preview, which: &str, unconfirmed: usize) -> String {
    let affected = preview.affected;
    let alone = format!("the rule would refuse {affected} of {} {which} devices", preview.total);
    if unconfirmed == 0 || preview.together == affected {
        alone
    } else {
        format!(
            "{alone}, and {} of them together with {unconfirmed} rules of the last hour that no author confirmed",
            preview.together
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::CountedNode;

    fn run(node: &str, age_s: u64, known: u64) -> CountedNode {
        CountedNode {
            node: node.to_owned(),
            is_live: age_s <= 30,
            age: Duration::from_secs(age_s),
            counts: format!(r#"{{"groups":[{{"firmware":"1","connected":1,"known":{known}}}]}}"#),
        }
    }

    fn known_of_gone(nodes: Vec<CountedNode>, known: u64) -> u64 {
        let check = RuleCheck {
            revision: 1,
            registered: 0,
            unconfirmed: Vec::new(),
            nodes,
        };
        Others::of(&check, "here", known)
            .gone
            .iter()
            .map(Published::known)
            .sum()
    }

    #[test]
    fn devices_count_once_however_often_nodes_of_other_names_were_deployed() {
        let two_deploys = || {
            let noon = [run("b1", 7_200, 100), run("b2", 7_500, 100), run("b3", 7_800, 100)];
            let morning = [run("c1", 30_000, 100), run("c2", 30_300, 100)];
            let live = [run("a2", 5, 100), run("a3", 5, 100)];
            live.into_iter().chain(noon).chain(morning).collect::<Vec<_>>()
        };

        assert_eq!(known_of_gone(two_deploys(), 100), 0);
        assert_eq!(
            known_of_gone(two_deploys().split_off(2), 0),
            100,
            "this node is new, and alone"
        );
    }

    #[test]
    fn nodes_that_ended_together_had_different_devices() {
        let crashed = vec![run("b1", 100, 50), run("b2", 110, 60), run("b3", 120, 70)];

        assert_eq!(known_of_gone(crashed.clone(), 0), 180);
        assert_eq!(known_of_gone(crashed, 40), 0);
    }

    #[test]
    fn device_that_several_nodes_know_is_counted_once() {
        let group = |firmware, connected, known| Group {
            subject: Subject {
                firmware: Some(firmware),
                ..Subject::default()
            },
            counts: Counts { connected, known },
        };
        let nodes = [
            group("1", 10, 100),
            group("2", 5, 5),
            group("1", 60, 90),
            group("1", 40, 95),
        ];

        let merged = merged(nodes.into_iter());

        let counts: Vec<_> = merged
            .iter()
            .map(|group| (group.counts.connected, group.counts.known))
            .collect();
        assert_eq!(counts, [(110, 110), (5, 5)]);
    }
}
