//! A device as the API shows it: from the registry, or from this node's memory while the database does not answer.

use std::sync::{Arc, atomic::Ordering};

use seawall_proto::{
    id::{DeviceId, Label},
    time::WallTime,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    presence::SeenElsewhere,
    problem::{Code, Problem},
};
use crate::{
    node::State as Gateway,
    session::presence::{Presence, Seer},
    store::{DatabaseStatus, DeviceRow},
};

/// Source of an answer about devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The registry, which is complete.
    Database,
    /// The memory of this node, because the database did not answer. It is not complete: it has the devices that had a
    /// session on this node.
    Memory,
}

/// A device and its connection to this node. `source` says where the data comes from.
#[derive(Debug, Serialize, ToSchema)]
pub struct Device {
    #[schema(value_type = uuid::Uuid)]
    id: DeviceId,
    /// The device's name, if it is not a UUID (`identity.namespace`).
    #[schema(value_type = Option<String>)]
    external_id: Option<Label>,
    /// From memory: as this node knows it from the device's last session.
    #[schema(value_type = Option<String>)]
    tenant: Option<Label>,
    /// The registry's model, whatever the device claims. From memory: as this node knows it from its last session.
    #[schema(value_type = Option<String>)]
    model: Option<Label>,
    /// The version of its last connection.
    #[schema(value_type = Option<String>)]
    firmware: Option<Arc<str>>,
    /// `enabled`, `disabled` or `revoked`. Null from memory, which does not know it.
    state: Option<&'static str>,
    presence: Presence,
    /// RFC 3339. Null from memory.
    created_at: Option<String>,
    /// RFC 3339. Null from memory.
    updated_at: Option<String>,
    /// The previous secret stays valid until then, RFC 3339. Null if it is not valid any more, and from memory.
    previous_secret_until: Option<String>,
    source: Source,
}

impl Device {
    pub fn of(row: DeviceRow, gateway: &Gateway) -> Self {
        let wall = gateway.clock.wall();
        let DeviceRow {
            record,
            external_id,
            created_at,
            updated_at,
        } = row;
        let session = gateway.sessions.get(record.id);
        // A device that was registered by its UUID states its name itself.
        let stated = session
            .as_ref()
            .and_then(|session| session.info.external_id.as_deref().cloned());
        let firmware = match session {
            Some(session) => session.info.cohort().firmware.clone(),
            None => gateway
                .history
                .record(record.id)
                .and_then(|known| known.group)
                .and_then(|group| group.cohort.firmware.clone()),
        };
        Self {
            presence: presence(record.id, gateway),
            id: record.id,
            external_id: external_id.or(stated),
            tenant: Some(record.tenant),
            model: record.model,
            firmware,
            state: Some(record.state.as_str()),
            created_at: Some(created_at.to_rfc3339()),
            updated_at: Some(updated_at.to_rfc3339()),
            previous_secret_until: record
                .previous_secret
                .map(|(_, until)| until)
                .filter(|until| wall < *until)
                .map(WallTime::to_rfc3339),
            source: Source::Database,
        }
    }

    /// Returns the device as this node remembers it. `None` if it has neither a session nor an attempt here.
    pub fn remembered(id: DeviceId, gateway: &Gateway) -> Option<Self> {
        let session = gateway.sessions.get(id);
        let record = gateway.history.record(id);
        if session.is_none() && record.is_none() {
            return None;
        }
        let known = record.and_then(|record| record.group);
        let group = known.or_else(|| session.as_ref().map(|session| Arc::clone(&session.info.group)));
        let group = group.as_deref();
        let label = |text: &str| Label::parse(text).ok().flatten();
        Some(Self {
            id,
            external_id: session
                .as_ref()
                .and_then(|session| session.info.external_id.as_deref().cloned()),
            tenant: group.and_then(|group| label(&group.tenant)),
            model: group.and_then(|group| label(group.model.as_deref()?)),
            firmware: group.and_then(|group| group.cohort.firmware.clone()),
            state: None,
            presence: presence(id, gateway),
            created_at: None,
            updated_at: None,
            previous_secret_until: None,
            source: Source::Memory,
        })
    }

    /// Takes what another node has stored, where that is newer.
    pub fn take(&mut self, seen: SeenElsewhere) {
        self.presence = seen.presence;
        self.firmware = seen.firmware;
    }
}

/// Presence of a device, as this node knows it.
pub fn presence(device: DeviceId, gateway: &Gateway) -> Presence {
    let seer = Seer {
        history: &gateway.history,
        node: &gateway.node,
        as_of: gateway.clock.wall(),
        is_restored: gateway.is_presence_restored.load(Ordering::Relaxed),
    };
    Presence::of(device, seer)
}

/// Reads from the database, unless it is known to be unavailable.
///
/// # Errors
/// Errors of `read`. `Ok(None)`: the database does not answer.
pub async fn unless_unavailable<T>(
    gateway: &Gateway,
    read: impl Future<Output = Result<T, Problem>>,
) -> Result<Option<T>, Problem> {
    if gateway.store.state().status == DatabaseStatus::Away {
        return Ok(None);
    }
    match read.await {
        Err(problem) if problem.code() == Code::DatabaseUnavailable => Ok(None),
        done => done.map(Some),
    }
}

/// 503 for a question that only the registry can answer.
pub fn registry_unavailable() -> Problem {
    Problem::new(
        Code::DatabaseUnavailable,
        "the database does not answer, and this node has no data for the request",
    )
}
