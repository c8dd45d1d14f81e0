//! Devices, as operators see and change them. The read of the connect path is in [`super::lookup`].

use seawall_proto::{
    id::{DeviceId, Label, SecretHash},
    record::{DeviceRecord, DeviceState},
};
use serde_json::{Value as Json, json};

use super::{
    Store,
    audit::{self, Change},
    connection::{Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{
        Audit, DEFAULT_TENANT, DeviceChange, DeviceFilter, DeviceRow, DeviceRows, NewDevice, PAGE_MAX, Rotated,
        Rotation, from_ms, to_ms,
    },
    revocations,
};

/// Index: devices' primary key.
const FIND: Sql = Sql::both(
    "SELECT id, tenant, model, secret_sha256, previous_secret_sha256, previous_valid_until, state, created_at, updated_at, external_id \
     FROM devices WHERE id = $1",
);

/// Index: devices' primary key. Locks the row until the transaction ends; SQLite has one writer.
const FIND_FOR_UPDATE: Sql = Sql {
    sqlite: FIND.sqlite,
    postgres: "SELECT id, tenant, model, secret_sha256, previous_secret_sha256, previous_valid_until, state, created_at, updated_at, external_id \
               FROM devices WHERE id = $1 FOR UPDATE",
};

/// Index: devices' primary key.
const PAGE: Sql = Sql::both(
    "SELECT id, tenant, model, secret_sha256, previous_secret_sha256, previous_valid_until, state, created_at, updated_at, external_id \
     FROM devices WHERE id >= $1 AND ($2 IS NULL OR state = $2) ORDER BY id LIMIT $3",
);

/// Index: devices_by_tenant.
const PAGE_OF_TENANT: Sql = Sql::both(
    "SELECT id, tenant, model, secret_sha256, previous_secret_sha256, previous_valid_until, state, created_at, updated_at, external_id \
     FROM devices WHERE tenant = $4 AND id >= $1 AND ($2 IS NULL OR state = $2) ORDER BY id LIMIT $3",
);

/// Index: devices_by_tenant_and_model.
const PAGE_OF_TENANT_AND_MODEL: Sql = Sql::both(
    "SELECT id, tenant, model, secret_sha256, previous_secret_sha256, previous_valid_until, state, created_at, updated_at, external_id \
     FROM devices WHERE tenant = $4 AND model = $5 AND id >= $1 AND ($2 IS NULL OR state = $2) ORDER BY id LIMIT $3",
);

/// Index: devices_not_enabled, which holds few devices. Other conditions filter them.
const PAGE_OF_NOT_ENABLED: Sql = Sql::both(
    "SELECT id, tenant, model, secret_sha256, previous_secret_sha256, previous_valid_until, state, created_at, updated_at, external_id \
     FROM devices WHERE state = $2 AND state <> 0 AND id >= $1 AND ($4 IS NULL OR tenant = $4) AND ($5 IS NULL OR model = $5) \
     ORDER BY id LIMIT $3",
);

/// Index: devices_by_model.
const PAGE_OF_MODEL: Sql = Sql::both(
    "SELECT id, tenant, model, secret_sha256, previous_secret_sha256, previous_valid_until, state, created_at, updated_at, external_id \
     FROM devices WHERE model = $4 AND id >= $1 AND ($2 IS NULL OR state = $2) ORDER BY id LIMIT $3",
);

/// Index: devices' primary key.
const AMONG: Sql = Sql {
    sqlite: "SELECT id, tenant, model, secret_sha256, previous_secret_sha256, previous_valid_until, state, created_at, updated_at, external_id \
             FROM devices WHERE id IN (SELECT unhex(value) FROM json_each($1)) ORDER BY id",
    postgres: "SELECT id, tenant, model, secret_sha256, previous_secret_sha256, previous_valid_until, state, created_at, updated_at, external_id \
               FROM devices WHERE id = ANY($1) ORDER BY id",
};

const INSERT: Sql = Sql::both(
    "INSERT INTO devices (id, tenant, model, secret_sha256, state, created_at, updated_at, external_id) \
     VALUES ($1, $2, $3, $4, 0, $5, $5, $6)",
);

/// Index: devices' primary key.
const UPDATE: Sql = Sql::both(
    "UPDATE devices SET tenant = $2, model = $3, secret_sha256 = $4, previous_secret_sha256 = $5, \
     previous_valid_until = $6, state = $7, updated_at = $8 WHERE id = $1",
);

/// Index: devices' primary key.
const DELETE: Sql = Sql::both("DELETE FROM devices WHERE id = $1");

impl Store {
    /// Returns one device.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.devices.find", level = "debug", skip_all)]
    pub async fn device(&self, id: DeviceId) -> Result<Option<DeviceRow>, StoreError> {
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let row = held.first(FIND, &[id.into()]).await?;
            held.release();
            row.as_ref().map(device_row).transpose()
        })
        .await
    }

    /// Returns devices in the order of their ids, from `cursor` on; at most [`PAGE_MAX`]. A row that can't be read is
    /// reported as [`Trouble::Unreadable`](super::Trouble).
    ///
    /// # Errors
    /// The database is unavailable, or no row of the first page can be read.
    #[tracing::instrument(name = "db.devices.page", level = "debug", skip_all)]
    pub async fn devices_page(
        &self,
        filter: &DeviceFilter,
        cursor: Option<DeviceId>,
        limit: u32,
    ) -> Result<DeviceRows, StoreError> {
        let limit = limit.clamp(1, PAGE_MAX);
        let first = cursor.unwrap_or(DeviceId::from_uuid(uuid::Uuid::nil()));
        let state = Value::Small(filter.state.map(state_to_small));
        let common = [first.into(), state, Value::from(i64::from(limit) + 1)];
        let is_enabled = filter.state.is_none_or(|state| state == DeviceState::Enabled);
        let (tenant, model) = (filter.tenant.as_ref(), filter.model.as_ref());
        let (sql, more): (_, Vec<Value<'_>>) = match (is_enabled, tenant, model) {
            (false, tenant, model) => (PAGE_OF_NOT_ENABLED, vec![tenant.into(), model.into()]),
            (true, Some(_), Some(_)) => (PAGE_OF_TENANT_AND_MODEL, vec![tenant.into(), model.into()]),
            (true, Some(_), None) => (PAGE_OF_TENANT, vec![tenant.into()]),
            (true, None, Some(_)) => (PAGE_OF_MODEL, vec![model.into()]),
            (true, None, None) => (PAGE, Vec::new()),
        };
        let values = [&common[..], &more].concat();
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let rows = held.all(sql, &values).await?;
            held.release();
            let mut devices = self.device_rows(rows.iter().take(limit as usize));
            if cursor.is_none() && devices.items.is_empty() {
                // Not a few rows: the schema is another one.
                rows.first().map(device_row).transpose()?;
            }
            let next = rows.get(limit as usize).map(|row| row.uuid("id")).transpose()?;
            devices.next_cursor = next.map(DeviceId::from_uuid);
            Ok(devices)
        })
        .await
    }

    /// Returns the registered devices among `ids`, in the order of ids. The caller bounds their number. See
    /// [`devices_page`](Self::devices_page).
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.devices.among", level = "debug", skip_all)]
    pub async fn devices_among(&self, ids: &[DeviceId]) -> Result<DeviceRows, StoreError> {
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let rows = held.all(AMONG, &[Value::Keys(ids)]).await?;
            held.release();
            Ok(self.device_rows(&rows))
        })
        .await
    }

    fn device_rows<'a>(&self, rows: impl IntoIterator<Item = &'a Row>) -> DeviceRows {
        let mut devices = DeviceRows::default();
        for row in rows {
            match device_row(row) {
                Ok(device) => devices.items.push(device),
                Err(error) => {
                    self.failures().note_unreadable(row, &error);
                    devices.unreadable.extend(row.uuid("id").ok().map(DeviceId::from_uuid));
                }
            }
        }
        devices
    }

    /// Reads rows. A row that can't be read is left out, and reported.
    pub(super) fn readable<'a, T>(
        &self,
        rows: impl IntoIterator<Item = &'a Row>,
        read: impl Fn(&Row) -> Result<T, StoreError>,
    ) -> Vec<T> {
        let read = |row| {
            read(row)
                .inspect_err(|error| self.failures().note_unreadable(row, error))
                .ok()
        };
        rows.into_iter().filter_map(read).collect()
    }

    /// Returns the registered devices among `ids`; `None` for a row that can't be read.
    ///
    /// # Errors
    /// The database is unavailable, or a row's id can't be read.
    #[tracing::instrument(name = "db.devices.records", level = "debug", skip_all)]
    pub async fn device_records(&self, ids: &[DeviceId]) -> Result<Vec<(DeviceId, Option<DeviceRecord>)>, StoreError> {
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let rows = held.all(AMONG, &[Value::Keys(ids)]).await?;
            held.release();
            let records = rows.iter().map(|row| {
                let read = device_record(row)
                    .inspect_err(|error| self.failures().note_unreadable(row, error))
                    .ok();
                Ok((DeviceId::from_uuid(row.uuid("id")?), read))
            });
            records.collect()
        })
        .await
    }

    /// Registers a device, enabled.
    ///
    /// # Errors
    /// [`StoreError::Conflict`]: the id is registered. The database is unavailable or full.
    #[tracing::instrument(name = "db.devices.insert", level = "debug", skip_all)]
    pub async fn device_insert(&self, new: &NewDevice, audit: &Audit) -> Result<DeviceRow, StoreError> {
        let row = DeviceRow {
            record: DeviceRecord {
                id: new.id,
                tenant: new.tenant.clone().unwrap_or_else(default_tenant),
                model: new.model.clone(),
                secret: new.secret,
                previous_secret: None,
                state: DeviceState::Enabled,
            },
            external_id: new.external_id.clone(),
            created_at: audit.at,
            updated_at: audit.at,
        };
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            held.begin().await?;
            let device = &row.record;
            let values = [
                device.id.into(),
                Some(&device.tenant).into(),
                device.model.as_ref().into(),
                (&device.secret).into(),
                Value::from(to_ms(audit.at)),
                row.external_id.as_ref().into(),
            ];
            match held.run(INSERT, &values).await {
                Ok(_) => {}
                Err(StoreError::Conflict(_)) => {
                    held.rollback().await?;
                    return Err(StoreError::Conflict(format!(
                        "device {} is already registered",
                        device.id
                    )));
                }
                Err(error) => return Err(error),
            }
            let mut after = describe(device);
            if let Some(external_id) = &row.external_id {
                after["external_id"] = json!(external_id);
            }
            let change = Change {
                subject: device.id.to_string(),
                before: None,
                after: Some(after),
            };
            audit::record(&mut held, audit, change).await?;
            held.commit().await?;
            Ok(())
        })
        .await?;
        Ok(row)
    }

    /// Changes state, tenant or model, and revokes the device's resume tokens. Does nothing if the device has these
    /// values already. `Ok(None)`: there is no such device.
    ///
    /// # Errors
    /// The database is unavailable, full, or another transaction holds the device for too long.
    #[tracing::instrument(name = "db.devices.update", level = "debug", skip_all)]
    pub async fn device_update(
        &self,
        id: DeviceId,
        change: &DeviceChange,
        audit: &Audit,
    ) -> Result<Option<DeviceRow>, StoreError> {
        self.device_replace(id, audit, |device| {
            if let Some(state) = change.state {
                device.state = state;
            }
            if let Some(tenant) = &change.tenant {
                device.tenant = tenant.clone();
            }
            if let Some(model) = &change.model {
                device.model = model.clone();
            }
        })
        .await
    }

    /// Gives a device a new credential, and revokes its resume tokens. The old credential ends after the overlap, an
    /// older one at once. `Ok(None)`: there is no such device.
    ///
    /// # Errors
    /// As [`Store::device_update`].
    #[tracing::instrument(name = "db.devices.rotate", level = "debug", skip_all)]
    pub async fn device_rotate(
        &self,
        id: DeviceId,
        rotation: Rotation,
        audit: &Audit,
    ) -> Result<Option<Rotated>, StoreError> {
        let mut ended_overlap = None;
        let row = self.device_replace(id, audit, |device| {
            let running = device.previous_secret.as_ref().map(|(_, until)| *until);
            ended_overlap = running.filter(|until| audit.at < *until);
            let valid_until = audit.at + rotation.overlap;
            device.previous_secret = (!rotation.overlap.is_zero()).then_some((device.secret, valid_until));
            device.secret = rotation.secret;
        });
        let row = row.await?;
        Ok(row.map(|row| Rotated { row, ended_overlap }))
    }

    /// Deletes a device, and revokes its resume tokens, even if its row can't be read. `Ok(None)`: there is no such
    /// device.
    ///
    /// # Errors
    /// As [`Store::device_update`].
    #[tracing::instrument(name = "db.devices.delete", level = "debug", skip_all)]
    pub async fn device_delete(&self, id: DeviceId, audit: &Audit) -> Result<Option<()>, StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            held.begin().await?;
            let Some(row) = held.first(FIND_FOR_UPDATE, &[id.into()]).await? else {
                held.rollback().await?;
                return Ok(None);
            };
            let before = match device_record(&row) {
                Ok(record) => describe(&record),
                Err(error) => json!({ "unreadable": error.to_string() }),
            };
            held.run(DELETE, &[id.into()]).await?;
            let change = Change {
                subject: id.to_string(),
                before: Some(before),
                after: None,
            };
            audit::record(&mut held, audit, change).await?;
            revocations::revoke(&mut held, id, audit.at).await?;
            held.commit().await?;
            Ok(Some(()))
        })
        .await
    }

    /// Reads a device, calls `alter`, and writes the device, in one transaction. If `alter` changes nothing, writes
    /// nothing, and the device's resume tokens stay valid.
    async fn device_replace(
        &self,
        id: DeviceId,
        audit: &Audit,
        alter: impl FnOnce(&mut DeviceRecord) + Send,
    ) -> Result<Option<DeviceRow>, StoreError> {
        self.bounded(Operation::Write, async {
            let mut held = self.writes().take().await?;
            held.begin().await?;
            let Some(row) = held.first(FIND_FOR_UPDATE, &[id.into()]).await? else {
                held.rollback().await?;
                return Ok(None);
            };
            let mut device = device_row(&row)?;
            let (before, record_before) = (describe(&device.record), device.record.clone());
            alter(&mut device.record);
            if device.record == record_before {
                held.rollback().await?;
                return Ok(Some(device));
            }
            device.updated_at = audit.at;
            let record = &device.record;
            let previous = record.previous_secret.as_ref();
            let values = [
                id.into(),
                Some(&record.tenant).into(),
                record.model.as_ref().into(),
                (&record.secret).into(),
                Value::Bytes(previous.map(|(hash, _)| &hash.as_bytes()[..])),
                Value::Int(previous.map(|(_, until)| to_ms(*until))),
                Value::Small(Some(state_to_small(record.state))),
                Value::from(to_ms(audit.at)),
            ];
            held.run(UPDATE, &values).await?;
            let change = Change {
                subject: id.to_string(),
                before: Some(before),
                after: Some(describe(record)),
            };
            audit::record(&mut held, audit, change).await?;
            revocations::revoke(&mut held, id, audit.at).await?;
            held.commit().await?;
            Ok(Some(device))
        })
        .await
    }
}

/// A device in the audit log: everything but its credentials.
pub(super) fn describe(device: &DeviceRecord) -> Json {
    json!({
        "tenant": device.tenant,
        "model": device.model,
        "state": device.state,
        "previous_secret_until_ms": device.previous_secret.as_ref().map(|(_, until)| until.as_unix_ms()),
    })
}

fn device_row(row: &Row) -> Result<DeviceRow, StoreError> {
    Ok(DeviceRow {
        record: device_record(row)?,
        external_id: label(row, "external_id")?,
        created_at: from_ms(row.int("created_at")?.unwrap_or_default()),
        updated_at: from_ms(row.int("updated_at")?.unwrap_or_default()),
    })
}

pub(super) fn device_record(row: &Row) -> Result<DeviceRecord, StoreError> {
    let previous_secret = match (hash(row, "previous_secret_sha256")?, row.int("previous_valid_until")?) {
        (Some(hash), Some(until)) => Some((hash, from_ms(until))),
        (_, None) | (None, Some(_)) => None,
    };
    Ok(DeviceRecord {
        id: DeviceId::from_uuid(row.uuid("id")?),
        tenant: label(row, "tenant")?.unwrap_or_else(default_tenant),
        model: label(row, "model")?,
        secret: hash(row, "secret_sha256")?.ok_or_else(|| corrupt("secret_sha256", "null"))?,
        previous_secret,
        state: state_from_small(row.small("state")?)?,
    })
}

fn hash(row: &Row, column: &'static str) -> Result<Option<SecretHash>, StoreError> {
    row.bytes(column)?
        .map(|bytes| <[u8; 32]>::try_from(&*bytes).map(SecretHash::from_bytes))
        .transpose()
        .map_err(|_| corrupt(column, "not 32 bytes"))
}

fn label(row: &Row, column: &'static str) -> Result<Option<Label>, StoreError> {
    match row.text(column)? {
        Some(text) => Label::parse(&text).map_err(|error| corrupt(column, &error.to_string())),
        None => Ok(None),
    }
}

fn default_tenant() -> Label {
    Label::parse(DEFAULT_TENANT)
        .ok()
        .flatten()
        .expect("`default` is printable ASCII")
}

const fn state_to_small(state: DeviceState) -> i16 {
    match state {
        DeviceState::Enabled => 0,
        DeviceState::Disabled => 1,
        DeviceState::Revoked => 2,
    }
}

fn state_from_small(number: i16) -> Result<DeviceState, StoreError> {
    match number {
        0 => Ok(DeviceState::Enabled),
        1 => Ok(DeviceState::Disabled),
        2 => Ok(DeviceState::Revoked),
        _ => Err(corrupt("state", &number.to_string())),
    }
}

fn corrupt(column: &'static str, detail: &str) -> StoreError {
    StoreError::Corrupt {
        table: "devices",
        column,
        detail: detail.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection as _, Row as _, SqliteConnection};

    use super::*;

    #[tokio::test]
    async fn each_page_of_a_list_is_read_through_its_index_in_order() {
        let mut database = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        for schema in [
            include_str!("../../../migrations/sqlite/0001_registry.sql"),
            include_str!("../../../migrations/sqlite/0003_device_lists.sql"),
            include_str!("../../../migrations/sqlite/0005_external_ids.sql"),
        ] {
            sqlx::raw_sql(schema).execute(&mut database).await.unwrap();
        }

        for (page, index) in [
            (PAGE, "sqlite_autoindex_devices_1"),
            (PAGE_OF_TENANT, "devices_by_tenant "),
            (PAGE_OF_MODEL, "devices_by_model "),
            (PAGE_OF_TENANT_AND_MODEL, "devices_by_tenant_and_model "),
            (PAGE_OF_NOT_ENABLED, "devices_not_enabled "),
        ] {
            let explained = sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {}", page.sqlite));
            let plan = sqlx::query(explained).fetch_all(&mut database).await.unwrap();
            let steps: Vec<String> = plan.iter().map(|step| step.get("detail")).collect();

            assert_eq!(steps.len(), 1, "sorted by itself: {steps:?}");
            assert!(steps[0].starts_with("SEARCH devices USING "), "{steps:?}");
            assert!(
                steps[0].contains(index) || index.starts_with("sqlite_") && steps[0].contains("PRIMARY KEY"),
                "{steps:?}"
            );
        }
    }
}
