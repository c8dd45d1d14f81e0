//! The schema, embedded in the binary: one set of files per database, with equal versions. See migrations/README.md.

use std::{collections::BTreeMap, time::Duration};

use data_encoding::HEXLOWER;
use sqlx::{
    AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _, SqlSafeStr,
    migrate::{Migrate as _, MigrateError, Migration, MigrationType, Migrator},
};
use tokio::time::sleep;

use super::{
    connection::{Connection, Postgres},
    error::StoreError,
};

struct Version {
    number: i64,
    name: &'static str,
    sqlite: &'static str,
    postgres: &'static str,
}

impl Version {
    /// Whether it creates PostgreSQL's indexes concurrently. Such statements run one by one, outside a transaction.
    /// After a failure all of them run again, so each index is dropped first if it exists.
    fn is_concurrent(&self) -> bool {
        self.postgres.contains(CONCURRENTLY)
    }
}

const CONCURRENTLY: &str = " CONCURRENTLY";

const VERSIONS: &[Version] = &[
    Version {
        number: 1,
        name: "registry",
        sqlite: include_str!("../../../migrations/sqlite/0001_registry.sql"),
        postgres: include_str!("../../../migrations/postgres/0001_registry.sql"),
    },
    Version {
        number: 2,
        name: "revocations",
        sqlite: include_str!("../../../migrations/sqlite/0002_revocations.sql"),
        postgres: include_str!("../../../migrations/postgres/0002_revocations.sql"),
    },
    Version {
        number: 3,
        name: "device_lists",
        sqlite: include_str!("../../../migrations/sqlite/0003_device_lists.sql"),
        postgres: include_str!("../../../migrations/postgres/0003_device_lists.sql"),
    },
    Version {
        number: 4,
        name: "device_counts",
        sqlite: include_str!("../../../migrations/sqlite/0004_device_counts.sql"),
        postgres: include_str!("../../../migrations/postgres/0004_device_counts.sql"),
    },
    Version {
        number: 5,
        name: "external_ids",
        sqlite: include_str!("../../../migrations/sqlite/0005_external_ids.sql"),
        postgres: include_str!("../../../migrations/postgres/0005_external_ids.sql"),
    },
    Version {
        number: 6,
        name: "rollouts",
        sqlite: include_str!("../../../migrations/sqlite/0006_rollouts.sql"),
        postgres: include_str!("../../../migrations/postgres/0006_rollouts.sql"),
    },
    Version {
        number: 7,
        name: "rule_writes",
        sqlite: include_str!("../../../migrations/sqlite/0007_rule_writes.sql"),
        postgres: include_str!("../../../migrations/postgres/0007_rule_writes.sql"),
    },
    Version {
        number: 8,
        name: "presence",
        sqlite: include_str!("../../../migrations/sqlite/0008_presence.sql"),
        postgres: include_str!("../../../migrations/postgres/0008_presence.sql"),
    },
    Version {
        number: 9,
        name: "firmware_versions",
        sqlite: include_str!("../../../migrations/sqlite/0009_firmware_versions.sql"),
        postgres: include_str!("../../../migrations/postgres/0009_firmware_versions.sql"),
    },
];

/// The newest version of the schema that this binary knows.
pub const SCHEMA_VERSION: i64 = VERSIONS[VERSIONS.len() - 1].number;

/// Table size, in bytes, above which `seawall serve` leaves an index on `devices` to `seawall migrate`. Creating it
/// takes long, and in a transaction it blocks writes.
const LARGE_TABLE_BYTES: i64 = 256 * 1024 * 1024;
/// The table of applied versions, as sqlx names it.
const TABLE: &str = "_sqlx_migrations";
const APPLIED: &str = "SELECT version, success, encode(checksum, 'hex') AS checksum FROM _sqlx_migrations";
const TABLE_SIZE: &str = "SELECT coalesce(pg_total_relation_size(to_regclass('devices')), 0)::bigint";
/// Time between two attempts to get the lock that another process holds.
const LOCK_RETRY: Duration = Duration::from_millis(200);

/// The caller of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    /// A starting gateway. Long migrations, and those that another process runs, are errors to retry.
    Serve,
    /// `seawall migrate`: waits.
    Migrate,
}

/// Brings the schema up to [`SCHEMA_VERSION`]. A newer schema is left alone. PostgreSQL's runs under an advisory lock.
pub(super) async fn migrate(connection: &mut Connection, caller: Caller) -> Result<(), StoreError> {
    match connection {
        Connection::Sqlite(connection) => {
            let migrator = migrator(|version| version.sqlite);
            migrator.run_direct(None, &mut **connection, false).await?;
            Ok(())
        }
        Connection::Postgres(postgres) => migrate_postgres(postgres, caller).await,
    }
}

async fn migrate_postgres(postgres: &mut Postgres, caller: Caller) -> Result<(), StoreError> {
    let migrator = migrator(|version| version.postgres);
    let pending = pending(&mut postgres.connection, &migrator).await?;
    if pending.is_empty() {
        return Ok(());
    }
    let is_outside_transaction = caller == Caller::Migrate && postgres.pooled.is_none();
    if let Some(version) = pending.iter().find(|version| version.is_concurrent())
        && !is_outside_transaction
        && devices_bytes(&mut postgres.connection).await? > LARGE_TABLE_BYTES
    {
        let number = version.number;
        return Err(StoreError::Migration(match caller {
            Caller::Serve => format!(
                "version {number} of the schema takes long with this many devices: run `seawall migrate`; this gateway waits for it"
            ),
            Caller::Migrate => format!(
                "version {number} of the schema can't be made through a pooler with this many devices: run `seawall migrate` with the \
                 server's own address"
            ),
        }));
    }
    if let Some(begin) = postgres.pooled.clone() {
        return migrate_pooled(&mut postgres.connection, &begin, &migrator, caller).await;
    }
    let connection = &mut postgres.connection;
    let lock = lock(connection, "pg_try_advisory_lock", caller).await?;
    // Another process may have done it.
    let pending = self::pending(connection, &migrator).await?;
    let is_apart = |version: &Version| version.is_concurrent() && is_outside_transaction;
    // Neighbours are run by one call, each in a transaction of its own: a call costs round trips, and the server may be
    // far away.
    for versions in pending.chunk_by(|one, next| is_apart(one) == is_apart(next)) {
        match versions {
            [first, ..] if is_apart(first) => {
                for version in versions {
                    run_outside_transaction(connection, &migrator, version).await?;
                }
            }
            [.., last] => migrator.run_direct(Some(last.number), connection, false).await?,
            [] => {}
        }
    }
    let unlock = format!("SELECT pg_advisory_unlock({lock})");
    connection.execute(sqlx::raw_sql(AssertSqlSafe(unlock))).await?;
    Ok(())
}

/// All in one transaction, so that it is prepared and locked in one server connection.
async fn migrate_pooled(
    connection: &mut PgConnection,
    begin: &str,
    migrator: &Migrator,
    caller: Caller,
) -> Result<(), StoreError> {
    let mut transaction = connection.begin_with(AssertSqlSafe(begin.to_owned())).await?;
    lock(&mut transaction, "pg_try_advisory_xact_lock", caller).await?;
    // Prepared statements of other clients have the same names as those that the migrator is about to prepare.
    transaction.execute(sqlx::raw_sql("DEALLOCATE ALL")).await?;
    migrator.run_direct(None, &mut *transaction, false).await?;
    transaction.execute(sqlx::raw_sql("DEALLOCATE ALL")).await?;
    transaction.commit().await?;
    Ok(())
}

/// Returns the missing versions. All of them if one is incomplete or different: sqlx then names it.
async fn pending(connection: &mut PgConnection, migrator: &Migrator) -> Result<Vec<&'static Version>, StoreError> {
    let rows = match connection.fetch_all(sqlx::raw_sql(APPLIED)).await {
        Ok(rows) => rows,
        Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| code == "42P01") => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let mut applied = BTreeMap::new();
    for row in rows {
        let (is_done, checksum): (bool, String) = (row.try_get("success")?, row.try_get("checksum")?);
        applied.insert(row.try_get::<i64, _>("version")?, is_done.then_some(checksum));
    }
    let is_strange = migrator.iter().any(|migration| {
        let found = applied.get(&migration.version);
        found.is_some_and(|found| found.as_ref() != Some(&HEXLOWER.encode(&migration.checksum)))
    });
    let pending = VERSIONS
        .iter()
        .filter(|version| is_strange || !applied.contains_key(&version.number));
    Ok(pending.collect())
}

async fn devices_bytes(connection: &mut PgConnection) -> Result<i64, StoreError> {
    let row = connection.fetch_one(sqlx::raw_sql(TABLE_SIZE)).await?;
    Ok(row.try_get(0)?)
}

/// Acquires the lock that sqlx also uses, and returns its key. It polls, because a waiting statement would block the
/// other process: `CREATE INDEX CONCURRENTLY` waits for every statement.
async fn lock(connection: &mut PgConnection, function: &str, caller: Caller) -> Result<i64, StoreError> {
    let row = connection
        .fetch_one(sqlx::raw_sql("SELECT current_database()::text"))
        .await?;
    let key = lock_key(&row.try_get::<String, _>(0)?);
    loop {
        let attempt = sqlx::raw_sql(AssertSqlSafe(format!("SELECT {function}({key})")));
        if connection.fetch_one(attempt).await?.try_get(0)? {
            return Ok(key);
        }
        if caller == Caller::Serve {
            return Err(StoreError::Migration(
                "another process changes the schema: this gateway waits for it".into(),
            ));
        }
        sleep(LOCK_RETRY).await;
    }
}

/// As in sqlx, so that older versions of this program are excluded as well.
fn lock_key(database: &str) -> i64 {
    let mut crc = u32::MAX;
    for byte in database.bytes() {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    0x3d32_ad9e * i64::from(!crc)
}

async fn run_outside_transaction(
    connection: &mut PgConnection,
    migrator: &Migrator,
    version: &Version,
) -> Result<(), StoreError> {
    // It waits for every earlier transaction. Nothing waits for it.
    connection.execute(sqlx::raw_sql("SET lock_timeout = 0")).await?;
    for statement in statements(version.postgres) {
        let done = connection.execute(sqlx::raw_sql(statement)).await;
        done.map_err(|error| MigrateError::ExecuteMigration(error, version.number))?;
    }
    connection.execute(sqlx::raw_sql("RESET lock_timeout")).await?;
    if let Some(migration) = migrator.iter().find(|migration| migration.version == version.number) {
        // Records the version.
        connection.skip(TABLE, migration).await?;
    }
    Ok(())
}

/// Splits a file into statements. Each ends with `;` at the end of a line.
fn statements(sql: &'static str) -> impl Iterator<Item = &'static str> {
    sql.split(";\n")
        .map(str::trim)
        .filter(|statement| !statement.is_empty())
}

/// Returns the same statements in a form that a transaction allows.
fn in_transaction(sql: &str) -> String {
    sql.replace(CONCURRENTLY, "")
}

fn migrator(sql: fn(&Version) -> &'static str) -> Migrator {
    let migrations = VERSIONS.iter().map(|version| {
        let file = sql(version);
        let mut migration = Migration::new(
            version.number,
            version.name.into(),
            MigrationType::Simple,
            file.into_sql_str(),
            false,
        );
        // The checksum stays that of the file.
        migration.sql = AssertSqlSafe(in_transaction(file)).into_sql_str();
        migration
    });
    let mut migrator = Migrator::with_migrations(migrations.collect());
    // The old binary may start again on the new schema during a deploy.
    migrator.set_ignore_missing(true);
    // PostgreSQL's lock is taken here; SQLite has none.
    migrator.set_locking(false);
    migrator
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    #[test]
    fn both_databases_have_the_embedded_versions_and_no_others() {
        let embedded: BTreeSet<_> = VERSIONS
            .iter()
            .map(|version| format!("{:04}_{}.sql", version.number, version.name))
            .collect();

        for folder in ["sqlite", "postgres"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../migrations").join(folder);
            let files = fs::read_dir(path)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap());
            assert_eq!(files.collect::<BTreeSet<_>>(), embedded, "{folder}");
        }
        assert!(VERSIONS.is_sorted_by(|a, b| a.number < b.number));
    }

    #[test]
    fn statements_outside_a_transaction_are_run_one_by_one() {
        let found: Vec<_> =
            statements("-- Why.\nDROP INDEX CONCURRENTLY IF EXISTS a;\nCREATE INDEX CONCURRENTLY a ON b (c);\n")
                .collect();

        assert_eq!(
            found,
            [
                "-- Why.\nDROP INDEX CONCURRENTLY IF EXISTS a",
                "CREATE INDEX CONCURRENTLY a ON b (c)"
            ]
        );
    }

    #[test]
    fn index_on_an_older_postgresql_table_is_dropped_and_made_concurrently_in_a_version_of_its_own() {
        for version in VERSIONS {
            let number = version.number;
            let lines: Vec<_> = version
                .postgres
                .lines()
                .filter(|line| !line.starts_with("--"))
                .collect();
            for line in lines.iter().filter(|line| line.contains(" INDEX ")) {
                let table = line.split(" ON ").nth(1).and_then(|rest| rest.split(' ').next());
                let is_new = table.is_some_and(|table| version.postgres.contains(&format!("CREATE TABLE {table} (")));
                assert!(is_new || line.contains(" INDEX CONCURRENTLY "), "{number}: {line}");
            }
            if version.is_concurrent() {
                let statements: Vec<_> = lines.into_iter().filter(|line| !line.is_empty()).collect();
                for pair in statements.chunks(2) {
                    let drop = "DROP INDEX CONCURRENTLY IF EXISTS ";
                    let name = pair[0].strip_prefix(drop).and_then(|name| name.strip_suffix(';'));
                    let create = format!(" INDEX CONCURRENTLY {} ON ", name.expect(pair[0]));
                    assert!(pair[1].starts_with("CREATE ") && pair[1].contains(&create), "{pair:?}");
                }
            }
        }
    }

    #[test]
    fn lock_is_the_one_that_sqlx_takes() {
        // CRC-32 of "123456789" is 0xcbf43926.
        assert_eq!(lock_key("123456789"), 0x3d32_ad9e * 0xcbf4_3926);
    }
}
