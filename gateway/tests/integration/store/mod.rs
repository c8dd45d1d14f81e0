//! The store: every function on both databases, then failures of each database.

mod away;
mod devices;
mod files;
mod import;
mod indexes;
mod lookup;
mod plan;
mod pooler;
mod presence;
mod records;
mod registry_index;
mod revocations;
mod rollouts;
mod rules;
mod scarce;
mod schema;
mod server;
mod versions;

use std::{future::Future, time::Duration};

use seawall_gateway::{
    runtime::config::DatabaseUrl,
    store::{Audit, NewDevice, Store},
};
use seawall_proto::{
    id::{DeviceId, Label, SecretHash},
    time::WallTime,
};
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};
use tempfile::TempDir;

use crate::harness::pg;

/// Maximum wait for a condition.
const WAIT_MAX: Duration = Duration::from_secs(15);

/// Runs each test, a function of `&Fixture`, on either database.
macro_rules! on_both {
    ($($name:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $name() {
                super::$name(&crate::store::Fixture::sqlite().await).await;
            })+
        }
        mod postgres {
            $(#[tokio::test]
            async fn $name() {
                super::$name(&crate::store::Fixture::postgres().await).await;
            })+
        }
    };
}
use on_both;

/// A store on an empty database of its own.
struct Fixture {
    store: Store,
    url: DatabaseUrl,
    _directory: Option<TempDir>,
}

impl Fixture {
    async fn sqlite() -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let url = DatabaseUrl::sqlite(&directory.path().join("seawall.db"));
        Self {
            store: Store::open(&url).await.expect("SQLite opens"),
            url,
            _directory: Some(directory),
        }
    }

    async fn postgres() -> Self {
        let url = pg::shared().database().await.expect("a database");
        let store = Store::open(&url).await.expect("PostgreSQL's URL is good");
        within(store.ready()).await;
        Self {
            store,
            url,
            _directory: None,
        }
    }

    /// Runs SQL without the store.
    async fn db_run(&self, sql: impl Into<String>) {
        self.db_try(sql).await.expect("the SQL is good");
    }

    async fn db_try(&self, sql: impl Into<String>) -> Result<(), sqlx::Error> {
        let sql = sqlx::raw_sql(AssertSqlSafe(sql.into()));
        match self.url.sqlite_path() {
            Some(path) => {
                let mut connection = SqliteConnection::connect(&format!("sqlite:{}", path.display())).await?;
                sql.execute(&mut connection).await.map(drop)
            }
            None => {
                let mut connection = PgConnection::connect(self.url.expose()).await?;
                sql.execute(&mut connection).await.map(drop)
            }
        }
    }

    /// Registers devices number 1 to `count`, far faster than one by one.
    async fn db_fill(&self, count: u32) {
        let sql = if self.url.sqlite_path().is_some() {
            format!(
                "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {count}) \
                 INSERT INTO devices (id, secret_sha256, created_at, updated_at) \
                 SELECT unhex(printf('%032x', n)), unhex(printf('%064x', n)), 1, 1 FROM n; ANALYZE"
            )
        } else {
            format!(
                "INSERT INTO devices (id, secret_sha256, created_at, updated_at) \
                 SELECT lpad(to_hex(n), 32, '0')::uuid, decode(lpad(to_hex(n), 64, '0'), 'hex'), 1, 1 \
                 FROM generate_series(1, {count}) n; ANALYZE devices"
            )
        };
        self.db_run(sql).await;
    }
}

/// Fails the test instead of hanging it.
async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(WAIT_MAX, work).await.expect("done in time")
}

fn device(number: u128) -> DeviceId {
    DeviceId::from_uuid(uuid::Uuid::from_u128(number))
}

fn label(text: &str) -> Label {
    Label::parse(text).expect("a good label").expect("not empty")
}

fn audit(action: &'static str, at_ms: u64) -> Audit {
    Audit {
        id: uuid::Uuid::now_v7(),
        at: WallTime::from_unix_ms(at_ms),
        actor: "alice".into(),
        action,
    }
}

fn new_device(number: u128) -> NewDevice {
    NewDevice {
        external_id: None,
        id: device(number),
        tenant: None,
        model: None,
        secret: SecretHash::of(format!("secret {number}").as_bytes()),
    }
}
