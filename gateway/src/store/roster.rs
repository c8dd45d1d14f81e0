//! Who is registered, in pages, for the roster that every node keeps.

use seawall_proto::id::DeviceId;

use super::{
    Store,
    connection::{Row, Sql, Value},
    error::StoreError,
    failures::Operation,
    model::{DEFAULT_TENANT, Page},
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

impl Store {
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
