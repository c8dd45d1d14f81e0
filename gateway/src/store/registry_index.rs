//! The registered devices, in pages, for the registry index of every node.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use seawall_proto::{id::DeviceId, resume::Generation, time::WallTime};

use super::{
    Store,
    connection::{Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{DEFAULT_TENANT, DEVICE_KINDS_MAX, DeviceKind, DeviceKinds, Page, to_ms},
};

/// Number of rows of a page.
const ROWS: u32 = 2_000;
/// Maximum number of rows that are read for a page if so many in a row can't be read.
const ROWS_MAX: u32 = 16 * ROWS;

/// A device, and the name of its tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexRow {
    pub tenant: String,
    pub device: DeviceId,
}

/// Index: devices_by_tenant alone, since it has all columns. Of a million devices in PostgreSQL, a page takes 16
/// buffers and 0.5 ms; by primary key 2,000 buffers and 12 ms (measured).
const PAGE: Sql =
    Sql::both("SELECT tenant, id FROM devices WHERE (tenant, id) >= ($1, $2) ORDER BY tenant, id LIMIT $3");

/// Index: any of devices.
const COUNT: Sql = Sql::both("SELECT count(*) AS number FROM (SELECT 1 FROM devices LIMIT $1) AS counted");

/// Index: devices_by_tenant_and_model alone, of which every entry is read.
const KINDS: Sql = Sql::both(
    "SELECT tenant, model, count(*) AS number, CAST(sum(count(*)) OVER () AS BIGINT) AS total FROM devices \
     GROUP BY tenant, model ORDER BY number DESC, tenant, model LIMIT $1",
);

/// As [`KINDS`], for devices that no node has seen. Index: presence's primary key as well.
const KINDS_NEVER_SEEN: Sql = Sql::both(
    "SELECT tenant, model, count(*) AS number, CAST(sum(count(*)) OVER () AS BIGINT) AS total FROM devices \
     WHERE NOT EXISTS (SELECT 1 FROM presence WHERE presence.device = devices.id) \
     GROUP BY tenant, model ORDER BY number DESC, tenant, model LIMIT $1",
);

/// Reads the table, which pruning keeps small.
const CHANGED: Sql = Sql::both("SELECT DISTINCT device FROM revocations WHERE at >= $1");

/// Index: revocations' primary key.
const CHANGED_AFTER: Sql = Sql::both("SELECT DISTINCT device FROM revocations WHERE revision > $1");

/// Index: devices' primary key.
const PRESENT: Sql = Sql {
    sqlite: "SELECT id AS device FROM devices WHERE id IN (SELECT unhex(value) FROM json_each($1))",
    postgres: "SELECT id AS device FROM devices WHERE id = ANY($1)",
};

impl Store {
    /// Returns the number of registered devices, counted up to `most`.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.devices.count", level = "debug", skip_all)]
    pub async fn devices_up_to(&self, most: usize) -> Result<usize, StoreError> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let row = held.first(COUNT, &[Value::from(most)]).await?;
            held.release();
            let number = row.map(|row| row.int("number")).transpose()?.flatten();
            Ok(usize::try_from(number.unwrap_or_default()).unwrap_or_default())
        })
        .await
    }

    /// Counts registered devices by tenant and model; of `never_seen`, only those whose presence no node has written.
    ///
    /// # Errors
    /// The database is unavailable, or slow.
    #[tracing::instrument(name = "db.devices.kinds", level = "debug", skip_all)]
    pub async fn device_kinds(&self, never_seen: bool) -> Result<DeviceKinds, StoreError> {
        let sql = if never_seen { KINDS_NEVER_SEEN } else { KINDS };
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let rows = held.all(sql, &[Value::from(i64::from(DEVICE_KINDS_MAX))]).await?;
            held.release();
            let unsigned = |row: &Row, column| Ok::<_, StoreError>(row.int(column)?.unwrap_or_default().unsigned_abs());
            let kind = |row: &Row| {
                Ok(DeviceKind {
                    tenant: row.text("tenant")?.unwrap_or_else(|| DEFAULT_TENANT.to_owned()).into(),
                    model: row.text("model")?.map(Arc::from),
                    devices: unsigned(row, "number")?,
                })
            };
            let kinds = self.readable(&rows, kind);
            let total = rows.first().map_or(Ok(0), |row| unsigned(row, "total"))?;
            let counted: u64 = kinds.iter().map(|kind| kind.devices).sum();
            Ok(DeviceKinds {
                kinds,
                rest: total.saturating_sub(counted),
            })
        })
        .await
    }

    /// Returns devices that were deleted, disabled or given another credential since a time, or up to `skew` before it.
    /// The record has the newest 65,536 of the last eight days.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.revocations.changed", level = "debug", skip_all)]
    pub async fn changed_since(&self, at: WallTime, skew: Duration) -> Result<BTreeSet<DeviceId>, StoreError> {
        let skew = i64::try_from(skew.as_millis()).unwrap_or(i64::MAX);
        self.device_set(CHANGED, to_ms(at).saturating_sub(skew).into()).await
    }

    /// Returns devices that were deleted, disabled or given another credential after a revision of the revocations. See
    /// [`changed_since`](Self::changed_since).
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.revocations.changed_after", level = "debug", skip_all)]
    pub async fn changed_after(&self, revision: Generation) -> Result<BTreeSet<DeviceId>, StoreError> {
        self.device_set(CHANGED_AFTER, i64::from(revision.0).into()).await
    }

    /// Returns the registered devices among `ids`, whether or not their rows can be read.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.devices.present", level = "debug", skip_all)]
    pub async fn present_among(&self, ids: &[DeviceId]) -> Result<BTreeSet<DeviceId>, StoreError> {
        self.device_set(PRESENT, Value::Keys(ids)).await
    }

    async fn device_set(&self, sql: Sql, value: Value<'_>) -> Result<BTreeSet<DeviceId>, StoreError> {
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let rows = held.all(sql, &[value]).await?;
            held.release();
            rows.iter()
                .map(|row| row.uuid("device").map(DeviceId::from_uuid))
                .collect()
        })
        .await
    }

    /// Returns the registered devices in the order of tenants, from `cursor` on; usually 2,000 at a time. A row that
    /// can't be read is left out, and reported.
    ///
    /// # Errors
    /// The database is unavailable, no row of the first page can be read, or none of 32,000 in a row.
    #[tracing::instrument(name = "db.devices.registry_index", level = "debug", skip_all)]
    pub async fn registry_index_page(&self, cursor: Option<&IndexRow>) -> Result<Page<IndexRow, IndexRow>, StoreError> {
        let (tenant, first) = cursor.map_or(("", DeviceId::from_uuid(uuid::Uuid::nil())), |row| {
            (row.tenant.as_str(), row.device)
        });
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let mut limit = ROWS;
            loop {
                let values = [tenant.into(), first.into(), Value::from(i64::from(limit) + 1)];
                let rows = held.all(PAGE, &values).await?;
                let readable = self.readable(&rows, registry_index_row);
                if cursor.is_none() && readable.is_empty() {
                    // Not a few rows: the schema is another one.
                    rows.first().map(registry_index_row).transpose()?;
                }
                match page_of(readable, rows.len() > limit as usize, cursor) {
                    Some(page) => {
                        held.release();
                        return Ok(page);
                    }
                    None if limit < ROWS_MAX => limit *= 2,
                    None => return Err(StoreError::Unusable(format!("{limit} rows of devices can't be read"))),
                }
            }
        })
        .await
    }
}

/// Makes a page of the readable rows. If there are more, the last readable one begins the next page. `None`: the next
/// page would be this one.
fn page_of(mut readable: Vec<IndexRow>, has_more: bool, cursor: Option<&IndexRow>) -> Option<Page<IndexRow, IndexRow>> {
    let next_cursor = if has_more { readable.pop() } else { None };
    let goes_on = !has_more || next_cursor.as_ref().is_some_and(|next| Some(next) != cursor);
    goes_on.then_some(Page {
        items: readable,
        next_cursor,
    })
}

fn registry_index_row(row: &Row) -> Result<IndexRow, StoreError> {
    Ok(IndexRow {
        tenant: row.text("tenant")?.unwrap_or_else(|| DEFAULT_TENANT.to_owned()),
        device: DeviceId::from_uuid(row.uuid("id")?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(numbers: std::ops::Range<u128>) -> Vec<IndexRow> {
        let row = |number| IndexRow {
            tenant: "acme".to_owned(),
            device: DeviceId::from_uuid(uuid::Uuid::from_u128(number)),
        };
        numbers.map(row).collect()
    }

    #[test]
    fn next_page_begins_with_the_last_row_that_can_be_read() {
        let all = page_of(rows(0..2_001), true, None).unwrap();
        let most = page_of(rows(0..1_500), true, None).unwrap();
        let last = page_of(rows(0..1_500), false, None).unwrap();

        assert_eq!((all.items.len(), all.next_cursor), (2_000, rows(2_000..2_001).pop()));
        assert_eq!((most.items.len(), most.next_cursor), (1_499, rows(1_499..1_500).pop()));
        assert_eq!((last.items.len(), last.next_cursor), (1_500, None));
    }

    #[test]
    fn page_whose_further_rows_can_not_be_read_is_none_unless_it_is_the_last() {
        let first = rows(7..8);

        assert_eq!(page_of(first.clone(), true, first.first()), None);
        assert_eq!(page_of(Vec::new(), true, first.first()), None);
        assert_eq!(page_of(first.clone(), false, first.first()).unwrap().items, first);
        assert_eq!(page_of(Vec::new(), false, None).unwrap().next_cursor, None);
    }
}
