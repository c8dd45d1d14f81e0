//! PostgreSQL that accepts no more connections (`max_connections`).

use std::time::Duration;

use seawall_gateway::runtime::config::DatabaseUrl;
use sqlx::{Connection as _, PgConnection};
use tokio::time::{Instant, sleep};

use super::super::harness::pg::Cluster;
use crate::harness::{
    devices::{ANSWER_MAX, assert_alive, device, devices, persist_all},
    gateway::Gateway,
    wait::{PATIENCE, eventually},
};

/// More than a gateway holds, and few enough to exhaust.
const CONNECTIONS_MAX: usize = 24;

#[tokio::test(flavor = "multi_thread")]
async fn database_without_free_connections_is_an_outage_with_an_end() {
    let cluster = Cluster::start_with(&[&format!("max_connections={CONNECTIONS_MAX}")]).unwrap();
    let url = cluster.database().await.unwrap();
    let gateway = Gateway::start_on(Some(&url), "").await;
    eventually(|| gateway.shared.readiness().ready).await;
    gateway.register(0..60).await;
    let mut live = gateway.session(&device(0)).await;

    let hoard = take_every_connection(&url).await;
    let attempts = gateway.connect_all(&devices(1..60)).await;

    for attempt in &attempts {
        let refused = attempt.refused();
        assert_eq!(refused.status, 503, "{refused:?}");
        assert!(
            refused.slot.is_some() && refused.retry_after_ms.is_some(),
            "{refused:?}"
        );
        assert!(attempt.took < ANSWER_MAX, "answered after {:?}", attempt.took);
    }
    assert_alive(&mut live).await;
    eventually(|| gateway.shared.store.failed(seawall_gateway::store::Operation::Lookup) > 0).await;

    drop(hoard);
    let returning = attempts.iter().zip(devices(1..60)).map(|(attempt, mut device)| {
        device.slot = attempt.refused().slot.clone();
        device
    });
    // Held: so many devices that leave at once are an alarm.
    let sessions = persist_all(gateway.devices, returning).await;
    assert_eq!(sessions.len(), 59);
    assert_alive(&mut live).await;
    eventually(|| gateway.shared.readiness().reasons.is_empty()).await;
}

/// Takes all connections, and ends those of others, until the gateway has none left.
async fn take_every_connection(url: &DatabaseUrl) -> Vec<PgConnection> {
    let mut hoard = vec![PgConnection::connect(url.expose()).await.unwrap()];
    let deadline = Instant::now() + PATIENCE;
    loop {
        while let Ok(connection) = PgConnection::connect(url.expose()).await {
            hoard.push(connection);
        }
        let ended = sqlx::query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() \
             AND backend_type = 'client backend' AND pid <> ALL($1)",
        );
        let ours = pids(&mut hoard).await;
        let ended = ended.bind(ours).execute(&mut hoard[0]).await.unwrap().rows_affected();
        if ended == 0 && hoard.len() >= CONNECTIONS_MAX - 1 {
            return hoard;
        }
        assert!(Instant::now() < deadline, "the gateway is always faster");
        sleep(Duration::from_millis(1)).await;
    }
}

async fn pids(connections: &mut [PgConnection]) -> Vec<i32> {
    let mut pids = Vec::new();
    for connection in connections {
        pids.push(
            sqlx::query_scalar("SELECT pg_backend_pid()")
                .fetch_one(connection)
                .await
                .unwrap(),
        );
    }
    pids
}
