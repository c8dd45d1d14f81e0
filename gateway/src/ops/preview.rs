//! What a rule would hit now: among the devices that are connected to this node, and among those that it remembers.

use std::collections::BTreeMap;

use seawall_proto::rules::{Preview, RuleSpec};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    census::{Census, Which},
    state::State,
};

/// What a rule would hit now.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct RulePreview {
    /// Connected devices that it matches.
    pub connected: u64,
    /// All connected devices.
    pub connected_total: u64,
    /// Devices that it matches among those that this node has seen authenticated since it started and remembers; the connected ones are among them.
    pub known: u64,
    /// All devices that this node remembers.
    pub known_total: u64,
    /// So many that `POST /rules` will want `confirm`.
    pub needs_confirmation: bool,
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

impl RulePreview {
    /// Asks `spec` about everybody whom this node knows.
    #[must_use]
    pub fn of(spec: &RuleSpec, state: &State) -> Self {
        let census = Census::of(state);
        let connected = Preview::of(spec, census.seen(Which::Connected));
        let known = Preview::of(spec, census.seen(Which::Known));
        let counts: BTreeMap<&str, u64> = connected
            .by_version
            .iter()
            .map(|hit| (hit.firmware.as_str(), hit.devices))
            .collect();
        Self {
            connected: connected.matched,
            connected_total: connected.total,
            known: known.matched,
            known_total: known.total,
            needs_confirmation: connected.needs_confirmation(),
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
