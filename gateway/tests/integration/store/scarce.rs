//! PostgreSQL that has no free connections, while another program takes each one that becomes free.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use seawall_gateway::{
    runtime::config::DatabaseUrl,
    store::{Consent, DatabaseStatus, Store, StoreError},
};
use seawall_proto::{id::RuleId, rules::RuleSpec};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::{WAIT_MAX, audit, device, within};
use crate::harness::{pg, wait::eventually};

/// A database, and a role with this maximum number of connections.
struct Scarce {
    owner: DatabaseUrl,
    url: DatabaseUrl,
    role: String,
}

impl Scarce {
    async fn new(role: &str, connections_max: usize) -> Self {
        let owner = pg::shared().database().await.unwrap();
        Store::migrate(&owner).await.unwrap();
        let scarce = Self {
            url: owner
                .expose()
                .replace("postgres://postgres@", &format!("postgres://{role}@"))
                .parse()
                .unwrap(),
            owner,
            role: role.to_owned(),
        };
        let sql = format!(
            "CREATE ROLE {role} LOGIN CONNECTION LIMIT {connections_max}; \
             GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}; \
             GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role}"
        );
        scarce.run(sql).await;
        scarce
    }

    async fn store(&self) -> Store {
        let store = Store::open(&self.url).await.unwrap();
        within(store.ready()).await;
        store
    }

    async fn run(&self, sql: String) {
        let mut owner = PgConnection::connect(self.owner.expose()).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut owner).await.unwrap();
    }

    /// Names of the connections that the role has.
    async fn connections(&self) -> Vec<String> {
        let mut owner = PgConnection::connect(self.owner.expose()).await.unwrap();
        let names = sqlx::query_scalar("SELECT application_name FROM pg_stat_activity WHERE usename = $1 ORDER BY 1");
        names.bind(&self.role).fetch_all(&mut owner).await.unwrap()
    }
}

/// Another program of the same role, which takes each connection that it can get.
struct Neighbour {
    taken: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl Neighbour {
    fn start(url: &DatabaseUrl) -> Self {
        let (url, taken) = (url.expose().to_owned(), Arc::<AtomicUsize>::default());
        let count = Arc::clone(&taken);
        let task = tokio::spawn(async move {
            let mut kept = Vec::new();
            loop {
                match PgConnection::connect(&url).await {
                    Ok(connection) => {
                        kept.push(connection);
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(_) => sleep(Duration::from_millis(1)).await,
                }
            }
        });
        Self {
            taken,
            _task: AbortOnDropHandle::new(task),
        }
    }

    fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }
}

async fn write_rule(store: &Store) -> Result<(), StoreError> {
    let id = RuleId(uuid::Uuid::new_v4());
    let spec: RuleSpec = serde_json::from_value(serde_json::json!({
        "match": {"firmware": "=1.0.0"}, "effect": "block", "reason": "broken"
    }))
    .unwrap();
    let audit = audit("rule.create", 1);
    store.rule_insert(id, spec, Consent::Given, &audit).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn second_call_of_the_api_costs_neither_look_ups_nor_rules_their_connections() {
    // One each for lookups, polls, rules and the API.
    let scarce = Scarce::new("full", 4).await;
    let store = scarce.store().await;
    let mut worker = store.lookup_worker();
    let deadline = Instant::now() + WAIT_MAX;
    while scarce.connections().await.len() < 4 {
        assert!(Instant::now() < deadline, "{:?}", scarce.connections().await);
        let _ = store.rules_revision().await;
        let _ = write_rule(&store).await;
        let _ = store.device(device(1)).await;
        let _ = worker.find(&[device(1)], Duration::from_secs(1)).await;
    }
    let neighbour = Neighbour::start(&scarce.url);
    let mut locker = PgConnection::connect(scarce.owner.expose()).await.unwrap();
    let lock = sqlx::raw_sql("BEGIN; LOCK TABLE devices IN ACCESS EXCLUSIVE MODE");
    lock.execute(&mut locker).await.unwrap();

    // The first one holds the API's connection, so the second one needs another.
    let (first, second) = tokio::join!(store.device(device(1)), store.device(device(1)));

    assert!(first.is_err() && second.is_err(), "{first:?} {second:?}");
    sqlx::raw_sql("ROLLBACK").execute(&mut locker).await.unwrap();
    assert!(store.scarce_connections().is_some());
    for _ in 0..3 {
        worker.find(&[device(1)], Duration::from_secs(1)).await.unwrap();
        store.rules_revision().await.unwrap();
        write_rule(&store).await.unwrap();
    }
    // The one whose statement was cancelled.
    assert!(neighbour.taken() <= 1, "{} taken", neighbour.taken());
}

#[tokio::test(flavor = "multi_thread")]
async fn polls_that_get_no_connection_do_not_call_the_database_away() {
    let scarce = Scarce::new("polling", 4).await;
    let store = scarce.store().await;
    let neighbour = Neighbour::start(&scarce.url);
    eventually(|| neighbour.taken() >= 4).await;

    for _ in 0..2 {
        let (rules, revocations, ping) =
            tokio::join!(store.rules_revision(), store.revocations_since(None), store.ping());

        let outcomes = [rules.map(drop), revocations.map(drop), ping];
        for outcome in outcomes {
            assert!(matches!(outcome, Err(StoreError::NoConnectionFree(_))), "{outcome:?}");
        }
        assert_eq!(store.state().status, DatabaseStatus::Available);
    }
}
