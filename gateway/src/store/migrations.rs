//! The schema, embedded in the binary: one set of files a database, with equal versions. See migrations/README.md.

use sqlx::{
    SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
};

use super::{connection::Connection, error::StoreError};

struct Version {
    number: i64,
    name: &'static str,
    sqlite: &'static str,
    postgres: &'static str,
}

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
];

/// The newest version of the schema that this binary knows.
pub const SCHEMA_VERSION: i64 = VERSIONS[VERSIONS.len() - 1].number;

/// Brings the schema up to [`SCHEMA_VERSION`]. A newer schema is left alone. PostgreSQL's runs under an advisory lock.
pub(super) async fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    match connection {
        Connection::Sqlite(connection) => {
            migrator(|version| version.sqlite)
                .run_direct(None, connection, false)
                .await?
        }
        Connection::Postgres(connection) => {
            migrator(|version| version.postgres)
                .run_direct(None, connection, false)
                .await?;
        }
    }
    Ok(())
}

fn migrator(sql: fn(&Version) -> &'static str) -> Migrator {
    let migrations = VERSIONS.iter().map(|version| {
        let sql = sql(version).into_sql_str();
        Migration::new(version.number, version.name.into(), MigrationType::Simple, sql, false)
    });
    let mut migrator = Migrator::with_migrations(migrations.collect());
    // The old binary may start again on the new schema during a deploy.
    migrator.set_ignore_missing(true);
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
}
