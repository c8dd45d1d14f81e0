//! The registered devices, in pages, for the registry index of every node.

use std::time::Duration;

use seawall_proto::{id::DeviceId, resume::Generation, time::WallTime};

use super::{
    Store,
    connection::{Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{DEFAULT_TENANT, Page, to_ms},
};

/// Number of rows of a page.
const ROWS: u32 = 2_000;

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

/// Reads the table, which pruning keeps small.
const CHANGED: Sql =
    Sql::both("SELECT count(*) AS number FROM (SELECT DISTINCT device FROM revocations WHERE at >= $1) AS changed");

/// Index: revocations' primary key.
const CHANGED_AFTER: Sql = Sql::both(
    "SELECT count(*) AS number FROM (SELECT DISTINCT device FROM revocations WHERE revision > $1) AS changed",
);

impl Store {
    /// Returns the number of registered devices, counted up to `most`.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.devices.count", level = "debug", skip_all)]
    pub async fn devices_up_to(&self, most: usize) -> Result<usize, StoreError> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        self.count(COUNT, most).await
    }

    /// Returns devices that were deleted, disabled or given another credential since a time, or up to `skew` before it.
    /// The record has the newest 65,536 of the last eight days.
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.revocations.count", level = "debug", skip_all)]
    pub async fn changed_since(&self, at: WallTime, skew: Duration) -> Result<usize, StoreError> {
        let skew = i64::try_from(skew.as_millis()).unwrap_or(i64::MAX);
        self.count(CHANGED, to_ms(at).saturating_sub(skew)).await
    }

    /// Returns devices that were deleted, disabled or given another credential after a revision of the revocations. See
    /// [`changed_since`](Self::changed_since).
    ///
    /// # Errors
    /// The database is unavailable.
    #[tracing::instrument(name = "db.revocations.count_after", level = "debug", skip_all)]
    pub async fn changed_after(&self, revision: Generation) -> Result<usize, StoreError> {
        self.count(CHANGED_AFTER, i64::from(revision.0)).await
    }

    async fn count(&self, sql: Sql, value: i64) -> Result<usize, StoreError> {
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let row = held.first(sql, &[Value::from(value)]).await?;
            held.release();
            let number = row.map(|row| row.int("number")).transpose()?.flatten();
            Ok(usize::try_from(number.unwrap_or_default()).unwrap_or_default())
        })
        .await
    }

    /// Returns the registered devices in the order of tenants, from `cursor` on; 2,000 at a time. A row that can't be
    /// read is left out, and reported.
    ///
    /// # Errors
    /// The database is unavailable, or no row of the first page can be read.
    #[tracing::instrument(name = "db.devices.registry_index", level = "debug", skip_all)]
    pub async fn registry_index_page(&self, cursor: Option<&IndexRow>) -> Result<Page<IndexRow, IndexRow>, StoreError> {
        let (tenant, first) = cursor.map_or(("", DeviceId::from_uuid(uuid::Uuid::nil())), |row| {
            (row.tenant.as_str(), row.device)
        });
        let values = [tenant.into(), first.into(), Value::from(i64::from(ROWS) + 1)];
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let rows = held.all(PAGE, &values).await?;
            held.release();
            let readable = self.readable(&rows, registry_index_row);
            if cursor.is_none() && readable.is_empty() {
                rows.first().map(registry_index_row).transpose()?;
            }
            Ok(page_of(readable, rows.len(), cursor))
        })
        .await
    }
}

/// Makes a page of the readable ones among `read` rows. The last readable row begins the next page.
fn page_of(mut readable: Vec<IndexRow>, read: usize, cursor: Option<&IndexRow>) -> Page<IndexRow, IndexRow> {
    let has_more = read > ROWS as usize;
    // Otherwise the next page would be this one.
    let goes_on = readable.last().is_some_and(|last| Some(last) != cursor);
    let next_cursor = if has_more && goes_on { readable.pop() } else { None };
    Page {
        items: readable,
        next_cursor,
    }
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
        let all = page_of(rows(0..2_001), 2_001, None);
        let most = page_of(rows(0..1_500), 2_001, None);
        let last = page_of(rows(0..1_500), 2_000, None);

        assert_eq!((all.items.len(), all.next_cursor), (2_000, rows(2_000..2_001).pop()));
        assert_eq!((most.items.len(), most.next_cursor), (1_499, rows(1_499..1_500).pop()));
        assert_eq!((last.items.len(), last.next_cursor), (1_500, None));
    }

    #[test]
    fn page_whose_further_rows_can_not_be_read_is_the_last() {
        let first = rows(7..8);

        let page = page_of(first.clone(), 2_001, first.first());

        assert_eq!((page.items, page.next_cursor), (first, None));
        assert_eq!(page_of(Vec::new(), 2_001, rows(0..1).first()).next_cursor, None);
    }
}
