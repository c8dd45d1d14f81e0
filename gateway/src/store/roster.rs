//! Who is registered, in pages, for the roster that every node keeps.

use std::time::Duration;

use seawall_proto::{id::DeviceId, time::WallTime};

use super::{
    Store,
    connection::{Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{DEFAULT_TENANT, Page, to_ms},
};

/// Rows of a page.
const ROWS: u32 = 2_000;

/// A device, and the name of its tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RosterRow {
    pub tenant: String,
    pub device: DeviceId,
}

/// Index: devices_by_tenant, alone, because all that is asked for is in it: of a million devices in PostgreSQL a page costs 16 buffers and 0.5 ms, by
/// primary key 2,000 and 12 ms (measured).
const PAGE: Sql =
    Sql::both("SELECT tenant, id FROM devices WHERE (tenant, id) >= ($1, $2) ORDER BY tenant, id LIMIT $3");

/// Index: any of devices.
const COUNT: Sql = Sql::both("SELECT count(*) AS number FROM (SELECT 1 FROM devices LIMIT $1) AS counted");

/// Reads the table, which pruning keeps small.
const CHANGED: Sql =
    Sql::both("SELECT count(*) AS number FROM (SELECT DISTINCT device FROM revocations WHERE at >= $1) AS changed");

impl Store {
    /// How many devices are registered, counted up to `most`.
    ///
    /// # Errors
    /// The database is away.
    #[tracing::instrument(name = "db.devices.count", level = "debug", skip_all)]
    pub async fn devices_up_to(&self, most: usize) -> Result<usize, StoreError> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        self.count(COUNT, most).await
    }

    /// Devices that were deleted, disabled or given another credential since a time, or up to `skew` before it, as far as is on record:
    /// the newest 65,536 of the last eight days.
    ///
    /// # Errors
    /// The database is away.
    #[tracing::instrument(name = "db.revocations.count", level = "debug", skip_all)]
    pub async fn changed_since(&self, at: WallTime, skew: Duration) -> Result<usize, StoreError> {
        let skew = i64::try_from(skew.as_millis()).unwrap_or(i64::MAX);
        self.count(CHANGED, to_ms(at).saturating_sub(skew)).await
    }

    async fn count(&self, sql: Sql, value: i64) -> Result<usize, StoreError> {
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let row = held.first(sql, &[Value::from(value)]).await?;
            held.give_back();
            let number = row.map(|row| row.int("number")).transpose()?.flatten();
            Ok(usize::try_from(number.unwrap_or_default()).unwrap_or_default())
        })
        .await
    }

    /// The registered devices in the order of tenants, from `cursor` on; 2,000 at a time.
    ///
    /// # Errors
    /// The database is away.
    #[tracing::instrument(name = "db.devices.roster", level = "debug", skip_all)]
    pub async fn roster_page(&self, cursor: Option<&RosterRow>) -> Result<Page<RosterRow, RosterRow>, StoreError> {
        let (tenant, first) = cursor.map_or(("", DeviceId::from_uuid(uuid::Uuid::nil())), |row| {
            (row.tenant.as_str(), row.device)
        });
        let values = [tenant.into(), first.into(), Value::from(i64::from(ROWS) + 1)];
        self.bounded(Operation::Read, async {
            let mut held = self.reads().take().await?;
            let rows = held.all(PAGE, &values).await?;
            held.give_back();
            let rows = rows.iter().map(roster_row).collect::<Result<_, _>>()?;
            Ok(Page::from_rows(rows, ROWS, RosterRow::clone))
        })
        .await
    }
}

fn roster_row(row: &Row) -> Result<RosterRow, StoreError> {
    Ok(RosterRow {
        tenant: row.text("tenant")?.unwrap_or_else(|| DEFAULT_TENANT.to_owned()),
        device: DeviceId::from_uuid(row.uuid("id")?),
    })
}
