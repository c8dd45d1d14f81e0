//! Presence of devices, which nodes write behind, in batches. A row is only replaced by one of a newer session, or by a
//! later one of the same session. Neither the node that writes it nor its clock matters. Only registered devices have
//! rows: a late write of another node does not bring a deleted one back.
//!
//! All writes go over one connection of their own: they take none from lookups or operators.

use std::{collections::BTreeSet, time::Duration};

use seawall_proto::{
    epoch::{NodeTag, node_of},
    id::{DeviceId, SessionId},
    presence::{Cause, Known, Presence, gone::Sign, known::Boot},
    time::WallTime,
};
use serde_json::{Value as Json, json};

use super::{
    Store,
    connection::{Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{from_ms, to_ms},
    presence_words::{EvidenceText, PresenceState, Reason},
};

/// Maximum number of transitions of one call of [`Store::presence_write`].
pub const PRESENCE_WRITE_MAX: usize = 1_000;
/// Maximum number of transitions that one statement deletes.
pub const PRESENCE_PRUNE_MAX: u32 = 5_000;
/// Maximum number of transitions of one device that are read, and that [`Store::presence_trim`] leaves. They take some
/// 150 KB.
pub const PRESENCE_HISTORY_MAX: u32 = 1_000;
/// Rows of a page of [`Store::presence_page`].
const ROWS: u32 = 2_000;
/// Age of a node's row up to which the node lives. It writes its row several times in this time.
const LIVE_FOR: Duration = Duration::from_secs(30);
/// Bit by which ids, which have no sign, are made numbers of the same order, which have one.
const SIGN: u64 = 1 << 63;

/// A transition of a device, to be stored.
#[derive(Clone, Copy, Debug)]
pub struct PresenceWrite<'a> {
    pub device: DeviceId,
    pub known: Known,
    /// When it happened.
    pub at: WallTime,
    pub reason: Reason,
    /// Order of the transitions that a node writes.
    pub number: u64,
    pub tenant: &'a str,
    pub model: Option<&'a str>,
    pub firmware: Option<&'a str>,
}

/// The newest stored state of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredPresence {
    pub device: DeviceId,
    pub known: Known,
    /// Order of the transitions of one session.
    pub number: u64,
    pub reason: Reason,
    /// Of the registry.
    pub tenant: String,
    /// Of the registry.
    pub registered_model: Option<String>,
    /// Of its last session.
    pub model: Option<String>,
    pub firmware: Option<String>,
}

/// A stored transition of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTransition {
    /// `since` is when it happened.
    pub known: Known,
    /// Order of the transitions of one session.
    pub number: u64,
    pub reason: Reason,
}

/// A node that writes presence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresenceNode {
    pub sign: Sign,
    pub node: String,
    /// Time since it wrote its row. Zero if another node found it gone.
    pub age: Duration,
}

/// Stored states, in the order of devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresencePage {
    pub items: Vec<StoredPresence>,
    /// Rows that can't be read. They are left out.
    pub unreadable: usize,
    pub next_cursor: Option<DeviceId>,
}

/// Indexes: the primary keys of presence_history and devices. A batch that is written again changes nothing.
const ADD_HISTORY: Sql = Sql {
    sqlite: "INSERT INTO presence_history (device, epoch, number, state, at, reason, evidence) \
             SELECT unhex(value->>0), value->>1, value->>2, value->>3, value->>4, value->>5, value->>6 \
             FROM json_each($1) WHERE EXISTS (SELECT 1 FROM devices WHERE id = unhex(value->>0)) \
             ON CONFLICT (device, epoch, number) DO NOTHING",
    postgres: "INSERT INTO presence_history (device, epoch, number, state, at, reason, evidence) \
               SELECT (value->>0)::uuid, (value->>1)::bigint, (value->>2)::bigint, (value->>3)::smallint, (value->>4)::bigint, \
               value->>5, value->>6 FROM json_array_elements($1::json) AS item(value) \
               WHERE EXISTS (SELECT 1 FROM devices WHERE id = (value->>0)::uuid) \
               ON CONFLICT (device, epoch, number) DO NOTHING",
};

/// Indexes: the primary keys of presence and devices. Each device is there once, in the order of ids: two nodes that
/// write the same devices wait for each other, and never in a circle. A row whose epoch is not believed yields to any.
/// Returns the devices whose rows were written.
const UPSERT: Sql = Sql {
    sqlite: "INSERT INTO presence (device, epoch, number, state, since, reason, evidence, tenant, model, firmware) \
             SELECT unhex(value->>0), value->>1, value->>2, value->>3, value->>4, value->>5, value->>6, value->>7, value->>8, \
             value->>9 FROM json_each($1) WHERE EXISTS (SELECT 1 FROM devices WHERE id = unhex(value->>0)) \
             ON CONFLICT (device) DO UPDATE SET epoch = excluded.epoch, number = excluded.number, state = excluded.state, \
             since = excluded.since, reason = excluded.reason, evidence = excluded.evidence, tenant = excluded.tenant, \
             model = excluded.model, firmware = excluded.firmware \
             WHERE presence.epoch < excluded.epoch OR (presence.epoch = excluded.epoch AND presence.number <= excluded.number) \
             OR presence.epoch > $2 RETURNING device",
    postgres: "INSERT INTO presence (device, epoch, number, state, since, reason, evidence, tenant, model, firmware) \
               SELECT (value->>0)::uuid, (value->>1)::bigint, (value->>2)::bigint, (value->>3)::smallint, (value->>4)::bigint, \
               value->>5, value->>6, value->>7, value->>8, value->>9 FROM json_array_elements($1::json) AS item(value) \
               WHERE EXISTS (SELECT 1 FROM devices WHERE id = (value->>0)::uuid) \
               ON CONFLICT (device) DO UPDATE SET epoch = excluded.epoch, number = excluded.number, state = excluded.state, \
               since = excluded.since, reason = excluded.reason, evidence = excluded.evidence, tenant = excluded.tenant, \
               model = excluded.model, firmware = excluded.firmware \
               WHERE presence.epoch < excluded.epoch OR (presence.epoch = excluded.epoch AND presence.number <= excluded.number) \
               OR presence.epoch > $2 RETURNING device",
};

/// Index: presence's primary key.
const FORGET: Sql = Sql {
    sqlite: "DELETE FROM presence WHERE device IN (SELECT unhex(value) FROM json_each($1))",
    postgres: "DELETE FROM presence WHERE device = ANY($1)",
};

/// Index: presence_history's primary key.
const FORGET_HISTORY: Sql = Sql {
    sqlite: "DELETE FROM presence_history WHERE device IN (SELECT unhex(value) FROM json_each($1))",
    postgres: "DELETE FROM presence_history WHERE device = ANY($1)",
};

/// Indexes: the primary keys of presence and devices.
const PAGE: Sql = Sql::both(
    "SELECT p.device, p.epoch, p.number, p.state, p.since, p.reason, p.evidence, d.tenant, d.model AS registered_model, \
     p.model, p.firmware FROM presence AS p JOIN devices AS d ON d.id = p.device WHERE p.device >= $1 \
     ORDER BY p.device LIMIT $2",
);

/// Indexes: the primary keys of presence and devices.
const AMONG: Sql = Sql {
    sqlite: "SELECT p.device, p.epoch, p.number, p.state, p.since, p.reason, p.evidence, d.tenant, \
             d.model AS registered_model, p.model, p.firmware FROM presence AS p JOIN devices AS d ON d.id = p.device \
             WHERE p.device IN (SELECT unhex(value) FROM json_each($1))",
    postgres: "SELECT p.device, p.epoch, p.number, p.state, p.since, p.reason, p.evidence, d.tenant, \
               d.model AS registered_model, p.model, p.firmware FROM presence AS p JOIN devices AS d ON d.id = p.device \
               WHERE p.device = ANY($1)",
};

/// Index: the primary key of presence. The registry is not read: looking devices up there is for admission alone.
const SESSIONS_AMONG: Sql = Sql {
    sqlite: "SELECT device, epoch, number, state, since, reason, evidence, tenant, NULL AS registered_model, model, \
             firmware FROM presence WHERE device IN (SELECT unhex(value) FROM json_each($1))",
    postgres: "SELECT device, epoch, number, state, since, reason, evidence, tenant, NULL AS registered_model, model, \
               firmware FROM presence WHERE device = ANY($1)",
};

/// Index: presence_history's primary key, from its end.
const HISTORY: Sql = Sql::both(
    "SELECT device, epoch, number, state, at AS since, reason, evidence FROM presence_history \
     WHERE device = $1 AND (epoch, number) <= ($2, $3) ORDER BY epoch DESC, number DESC LIMIT $4",
);

/// Index: presence_history_by_at, and the primary key or the place of the rows.
const PRUNE: Sql = Sql {
    sqlite: "DELETE FROM presence_history WHERE (device, epoch, number) IN \
             (SELECT device, epoch, number FROM presence_history WHERE at < $1 ORDER BY at LIMIT $2)",
    postgres: "DELETE FROM presence_history WHERE ctid = ANY(ARRAY\
               (SELECT ctid FROM presence_history WHERE at < $1 ORDER BY at LIMIT $2))",
};

/// Index: presence_history's primary key, from its end.
const TRIM: Sql = Sql::both(
    "DELETE FROM presence_history WHERE device = $1 AND (epoch, number) IN \
     (SELECT epoch, number FROM presence_history WHERE device = $1 ORDER BY epoch DESC, number DESC LIMIT $2 OFFSET $3)",
);

/// Index: presence_nodes' primary key. Nobody else writes the row until the transaction ends.
const OWN_NODE: Sql = Sql {
    sqlite: "SELECT seen_at FROM presence_nodes WHERE tag = $1",
    postgres: "SELECT seen_at FROM presence_nodes WHERE tag = $1 FOR UPDATE",
};

/// Index: presence_nodes' primary key.
const NODE_GONE: Sql = Sql::both("UPDATE presence_nodes SET seen_at = 0 WHERE tag = $1 AND seen_at = $2");

/// Index: presence_nodes' primary key.
const WRITE_NODE: Sql = Sql {
    sqlite: "INSERT INTO presence_nodes (tag, node, boot, seen_at) VALUES ($1, $2, $3, CAST(unixepoch('subsec') * 1000 AS INTEGER)) \
             ON CONFLICT (tag) DO UPDATE SET node = excluded.node, boot = excluded.boot, seen_at = excluded.seen_at",
    postgres: "INSERT INTO presence_nodes (tag, node, boot, seen_at) \
               VALUES ($1, $2, $3, CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)) \
               ON CONFLICT (tag) DO UPDATE SET node = excluded.node, boot = excluded.boot, seen_at = excluded.seen_at",
};

/// Reads the table, which has a row for each data directory that a node was ever started with.
const NODES: Sql = Sql {
    sqlite: "SELECT tag, node, boot, seen_at, CAST(unixepoch('subsec') * 1000 AS INTEGER) - seen_at AS age FROM presence_nodes",
    postgres: "SELECT tag, node, boot, seen_at, \
               CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) - seen_at AS age FROM presence_nodes",
};

impl Store {
    /// Stores transitions, oldest first, and the newest state of their devices. Those that are stored already are left
    /// alone, and those of devices that are not registered are left out. `believed`: greatest epoch that a stored state
    /// may have; one with a greater epoch yields.
    ///
    /// Returns the stored states that stay, because they are newer.
    ///
    /// # Errors
    /// The database is unavailable, slow or full, or refuses a transition. Some may be stored all the same.
    #[tracing::instrument(name = "db.presence.write", level = "debug", skip_all)]
    pub async fn presence_write(
        &self,
        transitions: &[PresenceWrite<'_>],
        believed: SessionId,
    ) -> Result<Vec<StoredPresence>, StoreError> {
        let all: Vec<Json> = transitions.iter().map(history_row).collect();
        let mut newest: Vec<&PresenceWrite<'_>> = transitions.iter().collect();
        newest.sort_by_key(|transition| (transition.device, transition.known.epoch, transition.number));
        let next = newest.get(1..).unwrap_or_default().iter().map(Some).chain([None]);
        let newest: Vec<_> = newest.iter().zip(next).collect();
        let newest = newest
            .iter()
            .filter(|(this, next)| next.is_none_or(|next| next.device != this.device));
        let newest: Vec<_> = newest.map(|(this, _)| **this).collect();
        let rows: Vec<Json> = newest.iter().map(|transition| presence_row(transition)).collect();
        let (all, rows) = (Json::from(all).to_string(), Json::from(rows).to_string());
        let values = [Value::from(rows.as_str()), Value::from(to_number(believed))];
        self.bounded(Operation::Presence, async {
            let mut held = self.presence_pool().take().await?;
            held.begin().await?;
            held.run(ADD_HISTORY, &[Value::from(all.as_str())]).await?;
            let written = held.all(UPSERT, &values).await?;
            let written = written
                .iter()
                .map(|row| row.uuid("device"))
                .collect::<Result<Vec<_>, _>>()?;
            let outdone = if written.len() < newest.len() {
                let written: BTreeSet<_> = written.into_iter().map(DeviceId::from_uuid).collect();
                let others = newest.iter().map(|transition| transition.device);
                let others: Vec<DeviceId> = others.filter(|device| !written.contains(device)).collect();
                self.readable(&held.all(AMONG, &[Value::Keys(&others)]).await?, presence)
            } else {
                Vec::new()
            };
            held.commit().await?;
            Ok(outdone)
        })
        .await
    }

    /// Deletes all that is stored of devices.
    ///
    /// # Errors
    /// The database is unavailable or slow.
    #[tracing::instrument(name = "db.presence.forget", level = "debug", skip_all)]
    pub async fn presence_forget(&self, devices: &[DeviceId]) -> Result<(), StoreError> {
        self.bounded(Operation::Presence, async {
            let mut held = self.presence_pool().take().await?;
            held.begin().await?;
            held.run(FORGET, &[Value::Keys(devices)]).await?;
            held.run(FORGET_HISTORY, &[Value::Keys(devices)]).await?;
            held.commit().await
        })
        .await
    }

    /// Notes that a run of a node lives. Returns whether another node found it [gone](Self::presence_node_gone).
    ///
    /// # Errors
    /// The database is unavailable or slow.
    #[tracing::instrument(name = "db.presence_nodes.write", level = "debug", skip_all)]
    pub async fn presence_node_write(&self, boot: Boot, node: &str) -> Result<bool, StoreError> {
        let tag = Value::from(i64::from(boot.node.0));
        let values = [tag, Value::from(node), Value::from(to_number(boot.epoch))];
        self.bounded(Operation::Presence, async {
            let mut held = self.presence_pool().take().await?;
            held.begin().await?;
            let before = held.all(OWN_NODE, &[tag]).await?;
            held.run(WRITE_NODE, &values).await?;
            held.commit().await?;
            let before = before.first().map(|row| row.int("seen_at")).transpose()?.flatten();
            Ok(before.is_some_and(|written| written <= 0))
        })
        .await
    }

    /// Notes that another node is gone, unless it has written since `written`. Returns whether it is. The node learns of
    /// it when it writes next.
    ///
    /// # Errors
    /// The database is unavailable or slow.
    #[tracing::instrument(name = "db.presence_nodes.gone", level = "debug", skip_all)]
    pub async fn presence_node_gone(&self, node: NodeTag, written: i64) -> Result<bool, StoreError> {
        let values = [Value::from(i64::from(node.0)), Value::from(written)];
        self.bounded(Operation::Presence, async {
            let mut held = self.presence_pool().take().await?;
            held.begin().await?;
            let changed = held.run(NODE_GONE, &values).await?;
            held.commit().await?;
            Ok(changed == 1)
        })
        .await
    }

    /// Deletes the oldest transitions from before a time, at most `limit` and [`PRESENCE_PRUNE_MAX`]. Returns their
    /// number.
    ///
    /// # Errors
    /// The database is unavailable or slow.
    #[tracing::instrument(name = "db.presence_history.prune", level = "debug", skip_all)]
    pub async fn presence_prune(&self, before: WallTime, limit: u32) -> Result<u64, StoreError> {
        let limit = limit.min(PRESENCE_PRUNE_MAX);
        let values = [Value::from(to_ms(before)), Value::from(i64::from(limit))];
        self.bounded(Operation::Presence, async {
            let mut held = self.presence_pool().take().await?;
            held.begin().await?;
            let deleted = held.run(PRUNE, &values).await?;
            held.commit().await?;
            Ok(deleted)
        })
        .await
    }

    /// Deletes the oldest transitions of devices beyond [`PRESENCE_HISTORY_MAX`], at most [`PRESENCE_PRUNE_MAX`] of each.
    /// Returns their number.
    ///
    /// # Errors
    /// The database is unavailable or slow.
    #[tracing::instrument(name = "db.presence_history.trim", level = "debug", skip_all)]
    pub async fn presence_trim(&self, devices: &[DeviceId]) -> Result<u64, StoreError> {
        self.bounded(Operation::Presence, async {
            let mut held = self.presence_pool().take().await?;
            held.begin().await?;
            let mut deleted = 0;
            for device in devices {
                let bounds = [PRESENCE_PRUNE_MAX, PRESENCE_HISTORY_MAX].map(|len| Value::from(i64::from(len)));
                deleted += held.run(TRIM, &[(*device).into(), bounds[0], bounds[1]]).await?;
            }
            held.commit().await?;
            Ok(deleted)
        })
        .await
    }

    /// Returns the nodes that ever wrote presence.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.presence_nodes.all", level = "debug", skip_all)]
    pub async fn presence_nodes(&self) -> Result<Vec<PresenceNode>, StoreError> {
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let rows = held.all(NODES, &[]).await?;
            held.release();
            Ok(self.readable(&rows, node))
        })
        .await
    }

    /// Returns stored states in the order of devices, from `cursor` on; 2,000 at a time.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.presence.page", level = "debug", skip_all)]
    pub async fn presence_page(&self, cursor: Option<DeviceId>) -> Result<PresencePage, StoreError> {
        let first = cursor.unwrap_or(DeviceId::from_uuid(uuid::Uuid::nil()));
        let values = [first.into(), Value::from(i64::from(ROWS) + 1)];
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let mut rows = held.all(PAGE, &values).await?;
            held.release();
            let next = rows.get(ROWS as usize).map(|row| row.uuid("device")).transpose()?;
            rows.truncate(ROWS as usize);
            let items = self.readable(&rows, presence);
            Ok(PresencePage {
                unreadable: rows.len() - items.len(),
                items,
                next_cursor: next.map(DeviceId::from_uuid),
            })
        })
        .await
    }

    /// Returns the stored states of devices, in no order. The caller bounds their number. Rows that can't be read are
    /// left out.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.presence.among", level = "debug", skip_all)]
    pub async fn presence_among(&self, devices: &[DeviceId]) -> Result<Vec<StoredPresence>, StoreError> {
        self.presence_by(AMONG, devices).await
    }

    /// The same without the registry: the tenant is that of the last session, and there is no registered model. For
    /// calls that are made again and again, even while the database is busy.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.presence.sessions", level = "debug", skip_all)]
    pub async fn sessions_among(&self, devices: &[DeviceId]) -> Result<Vec<StoredPresence>, StoreError> {
        self.presence_by(SESSIONS_AMONG, devices).await
    }

    async fn presence_by(&self, sql: Sql, devices: &[DeviceId]) -> Result<Vec<StoredPresence>, StoreError> {
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let rows = held.all(sql, &[Value::Keys(devices)]).await?;
            held.release();
            Ok(self.readable(&rows, presence))
        })
        .await
    }

    /// Returns stored transitions of a device, newest first, at most one more than [`PRESENCE_HISTORY_MAX`]. `from`:
    /// epoch and number of the first; `None` for the newest. Rows that can't be read are left out.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.presence_history.page", level = "debug", skip_all)]
    pub async fn presence_history(
        &self,
        device: DeviceId,
        from: Option<(SessionId, u64)>,
        limit: u32,
    ) -> Result<Vec<StoredTransition>, StoreError> {
        let limit = limit.min(PRESENCE_HISTORY_MAX + 1);
        let (epoch, number) = from.map_or((i64::MAX, i64::MAX), |(epoch, number)| {
            (to_number(epoch), i64::try_from(number).unwrap_or(i64::MAX))
        });
        let values = [
            device.into(),
            Value::from(epoch),
            Value::from(number),
            Value::from(i64::from(limit)),
        ];
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let rows = held.all(HISTORY, &values).await?;
            held.release();
            let transition = |row: &Row| {
                let (known, reason) = state(row)?;
                let number = number_of(row)?;
                Ok(StoredTransition { known, number, reason })
            };
            Ok(self.readable(&rows, transition))
        })
        .await
    }
}

/// `[device, epoch, number, state, at, reason, evidence]`.
fn history_row(transition: &PresenceWrite<'_>) -> Json {
    let known = &transition.known;
    json!([
        transition.device.as_uuid().simple().to_string(),
        to_number(known.epoch),
        transition.number,
        PresenceState::of(known.presence) as u8,
        to_ms(transition.at),
        transition.reason.as_str(),
        evidence(known.presence),
    ])
}

/// As [`history_row`], with the time of the state, and tenant, model and firmware behind it.
fn presence_row(transition: &PresenceWrite<'_>) -> Json {
    let mut row = history_row(transition);
    if let Json::Array(row) = &mut row {
        row[4] = to_ms(transition.known.since).into();
        row.push(transition.tenant.into());
        row.push(transition.model.into());
        row.push(transition.firmware.into());
    }
    row
}

fn evidence(presence: Presence) -> Option<String> {
    let evidence = EvidenceText::of(presence)?;
    serde_json::to_string(&evidence).ok()
}

fn presence(row: &Row) -> Result<StoredPresence, StoreError> {
    let (known, reason) = state(row)?;
    Ok(StoredPresence {
        device: DeviceId::from_uuid(row.uuid("device")?),
        known,
        number: number_of(row)?,
        reason,
        tenant: row.text("tenant")?.unwrap_or_default(),
        registered_model: row.text("registered_model")?,
        model: row.text("model")?,
        firmware: row.text("firmware")?,
    })
}

fn number_of(row: &Row) -> Result<u64, StoreError> {
    Ok(u64::try_from(row.int("number")?.unwrap_or_default()).unwrap_or_default())
}

fn state(row: &Row) -> Result<(Known, Reason), StoreError> {
    let reason = row.text("reason")?.unwrap_or_default();
    let presence = match row.small("state")? {
        0 => Presence::Online,
        1 => {
            let text = row.text("evidence")?.unwrap_or_default();
            let evidence: Option<EvidenceText> = serde_json::from_str(&text).ok();
            let evidence = evidence.and_then(|evidence| evidence.evidence());
            Presence::Offline(evidence.ok_or_else(|| corrupt("evidence", text))?)
        }
        // Of a later version.
        _ => {
            let cause = Cause::ALL.into_iter().find(|cause| cause.as_str() == reason);
            Presence::Unknown(cause.unwrap_or(Cause::NodeLost))
        }
    };
    let known = Known {
        epoch: from_number(row.int("epoch")?.unwrap_or_default()),
        presence,
        since: from_ms(row.int("since")?.unwrap_or_default()),
    };
    Ok((known, Reason::of(&reason)))
}

fn node(row: &Row) -> Result<PresenceNode, StoreError> {
    let tag = row.int("tag")?.unwrap_or_default();
    let written = row.int("seen_at")?.filter(|written| *written > 0);
    let age = written.and(row.int("age")?).unwrap_or_default();
    let age = Duration::from_millis(u64::try_from(age).unwrap_or_default());
    Ok(PresenceNode {
        sign: Sign {
            boot: Boot {
                node: NodeTag(u16::try_from(tag).map_err(|_| corrupt("tag", tag.to_string()))?),
                epoch: from_number(row.int("boot")?.unwrap_or_default()),
            },
            written,
            is_late: age > LIVE_FOR,
        },
        node: row.text("node")?.unwrap_or_default(),
        age,
    })
}

impl PresenceNode {
    /// Whether it held, or holds, a session.
    #[must_use]
    pub fn has(&self, session: SessionId) -> bool {
        node_of(session) == self.sign.boot.node
    }
}

const fn to_number(id: SessionId) -> i64 {
    (id.0 ^ SIGN).cast_signed()
}

const fn from_number(number: i64) -> SessionId {
    SessionId(number.cast_unsigned() ^ SIGN)
}

fn corrupt(column: &'static str, detail: String) -> StoreError {
    StoreError::Corrupt {
        table: "presence",
        column,
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_epochs_is_that_of_their_numbers() {
        let ids = [0, 1, SIGN - 1, SIGN, u64::MAX].map(SessionId);

        assert!(ids.map(to_number).is_sorted());
        assert_eq!(ids.map(to_number).map(from_number), ids);
    }
}
