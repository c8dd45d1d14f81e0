//! Makes look-ups of marked devices as costly as they were on 8 February 2020, inside the scenario's own database.
//!
//! The table of devices gets another name; in front of it stands a view with the old one. For a marked device the view
//! compares its id as text with that of every row, which is the table scan of the incident. The gateway sees nothing of it but time.
//! What reads or counts the whole registry costs what it always did: in 2020 only look-ups of devices scanned.

use anyhow::{Context, Result};
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use uuid::Uuid;

use crate::postgres::Postgres;

/// Written to the server's log by each slow look-up: a reader may not write anything else.
const MARK: &str = "seawall-slow-look-up";

/// Run once, when the registry is full. The function runs for rows that an index has found.
const INSTALL: &str = "
    ALTER TABLE devices RENAME TO devices_table;
    ANALYZE devices_table;
    CREATE TABLE slow_devices (id UUID PRIMARY KEY);
    CREATE FUNCTION look_up_as_text(wanted UUID) RETURNS BOOLEAN LANGUAGE plpgsql VOLATILE COST 100000 AS $$
    BEGIN
        IF current_query() NOT LIKE '%= ANY(%' OR NOT EXISTS (SELECT FROM slow_devices WHERE id = wanted) THEN
            RETURN true;
        END IF;
        RAISE LOG 'seawall-slow-look-up';
        RETURN (SELECT count(*) FROM devices_table WHERE lower(id::text) = lower(wanted::text)) > 0;
    END $$;
    CREATE VIEW devices AS SELECT * FROM devices_table WHERE look_up_as_text(id);
";

const MARK_DEVICES: &str = "INSERT INTO slow_devices SELECT unnest($1::UUID[]) ON CONFLICT DO NOTHING";
const UNMARK_ALL: &str = "TRUNCATE slow_devices";

/// Puts the view in front of the table.
///
/// # Errors
/// The database refuses.
pub async fn install(database: &PgConnectOptions) -> Result<()> {
    let mut connection = PgConnection::connect_with(database)
        .await
        .context("connecting to the database")?;
    sqlx::raw_sql(INSTALL)
        .execute(&mut connection)
        .await
        .context("putting the slow view in front of the devices")?;
    connection.close().await.context("closing the connection")
}

/// Forgets all marks, then marks these devices.
///
/// # Errors
/// The database refuses.
pub async fn mark_only(database: &PgConnectOptions, devices: &[Uuid]) -> Result<()> {
    let mut connection = PgConnection::connect_with(database)
        .await
        .context("connecting to the database")?;
    sqlx::query(UNMARK_ALL)
        .execute(&mut connection)
        .await
        .context("taking the marks away")?;
    mark_with(&mut connection, devices).await
}

/// Marks more devices.
///
/// # Errors
/// The database refuses.
pub async fn mark(database: &PgConnectOptions, devices: &[Uuid]) -> Result<()> {
    let mut connection = PgConnection::connect_with(database)
        .await
        .context("connecting to the database")?;
    mark_with(&mut connection, devices).await
}

/// Slow look-ups so far.
///
/// # Errors
/// The database's log can't be read.
pub fn count(postgres: &Postgres) -> Result<u64> {
    postgres.count_in_log(MARK).context("reading PostgreSQL's log")
}

async fn mark_with(connection: &mut PgConnection, devices: &[Uuid]) -> Result<()> {
    sqlx::query(MARK_DEVICES)
        .bind(devices)
        .execute(connection)
        .await
        .context("marking devices")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const LOOK_UP: &str = "SELECT id, secret_sha256 FROM devices WHERE id = ANY($1)";
    /// As the registry is read in pages: the first row is a marked device's.
    const PAGE: &str = "SELECT id FROM devices WHERE id >= $1 ORDER BY id LIMIT 100";

    #[tokio::test]
    async fn only_marked_devices_cost_a_scan_and_each_is_counted() {
        let mut postgres = Postgres::start(None).await.unwrap();
        let options = postgres.options();
        let mut connection = PgConnection::connect_with(&options).await.unwrap();
        sqlx::raw_sql(
            "CREATE TABLE devices (id UUID PRIMARY KEY, secret_sha256 BYTEA NOT NULL);
             INSERT INTO devices SELECT md5(n::text)::uuid, '' FROM generate_series(1, 50000) n;",
        )
        .execute(&mut connection)
        .await
        .unwrap();
        let ids: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM devices ORDER BY id LIMIT 20")
            .fetch_all(&mut connection)
            .await
            .unwrap();

        install(&options).await.unwrap();
        mark_only(&options, &ids[..1]).await.unwrap();
        // As the gateway does: by a transaction that may only read.
        sqlx::raw_sql("SET default_transaction_read_only = on")
            .execute(&mut connection)
            .await
            .unwrap();
        look_up(&mut connection, &ids[1..]).await;
        let healthy = look_up(&mut connection, &ids[1..]).await;
        let slow = look_up(&mut connection, &ids[..1]).await;
        let page = sqlx::query(PAGE).bind(ids[0]).fetch_all(&mut connection).await.unwrap();
        assert_eq!(page.len(), 100);

        assert!(
            slow > 3 * healthy,
            "a scan takes {slow:?}, 19 look-ups by key {healthy:?}"
        );
        assert_eq!(count(&postgres).unwrap(), 1);
        postgres.check().unwrap();
        postgres.stop().await;
    }

    async fn look_up(connection: &mut PgConnection, ids: &[Uuid]) -> std::time::Duration {
        let started = Instant::now();
        let rows = sqlx::query(LOOK_UP).bind(ids).fetch_all(connection).await.unwrap();
        assert_eq!(rows.len(), ids.len());
        started.elapsed()
    }
}
